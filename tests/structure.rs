//! The code's rules that neither compiler nor clippy checks: which module may use which, and where no I/O is done.

#[path = "structure/documents.rs"]
mod documents;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each module with the modules that it may use. Dependencies have one direction.
const MAY_USE: [(&str, &[&str]); 14] = [
    ("api", &[]),
    ("model", &["api"]),
    ("allocation", &["model", "api"]),
    ("node_plan", &["model", "api"]),
    ("convert", &["model", "api"]),
    ("datapath", &["node_plan", "model", "api"]),
    ("check", &["datapath"]),
    ("telemetry", &[]),
    ("probe", &[]),
    ("cluster", &["model", "api"]),
    ("install", &["check", "cluster", "datapath", "model"]),
    ("controller", &["allocation", "cluster", "model", "api", "telemetry"]),
    ("ctl", &["probe", "convert", "check", "allocation", "cluster", "node_plan", "model", "api"]),
    ("node", &["check", "install", "cluster", "datapath", "node_plan", "model", "api", "telemetry"]),
];

/// Modules that use neither the kernel nor the plugin. Of the crates below they may use only those of [`PLAIN`].
const WITHOUT_KERNEL: [&str; 8] =
    ["api", "model", "allocation", "node_plan", "convert", "cluster", "controller", "telemetry"];
const PLAIN: [&str; 3] = ["nft::Family", "nft::mac", "cni::careful"];

/// Names of what does I/O or reads the time.
const OUTSIDE_WORLD: [&str; 7] =
    ["std::fs", "std::process", "std::env", "std::time::Instant", "SystemTime", "tokio::", "nix::"];

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        if path.ends_with("tests") {
            // Unit tests may use everything.
        } else if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
    found
}

/// The code of a file, without comments and unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn source() -> PathBuf {
    root().join("src")
}

#[test]
fn modules_use_only_modules_below_them() {
    for (module, allowed) in MAY_USE {
        for file in files(&source().join(module)) {
            let code = code(&file);
            for (other, _) in MAY_USE.iter().filter(|(o, _)| *o != module && !allowed.contains(o)) {
                assert!(
                    !code.contains(&format!("crate::{other}::")) && !code.contains(&format!("crate::{{{other}")),
                    "{} uses crate::{other}; {module} may use only {allowed:?}",
                    file.display()
                );
            }
        }
    }
}

#[test]
fn every_module_is_listed() {
    for entry in fs::read_dir(source()).expect("src").flatten().filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().expect("a name");
        assert!(name == "bin" || MAY_USE.iter().any(|(m, _)| *m == name), "src/{name} is in no line of MAY_USE");
    }
}

/// Cargo.toml promises only the Rust version with which everything is built and tested.
#[test]
fn the_oldest_rust_is_the_one_that_is_used() {
    let value = |file: &str, key: &str| {
        let text = fs::read_to_string(root().join(file)).expect(file);
        let line = text.lines().find_map(|line| line.strip_prefix(key).map(str::to_owned));
        line.map(|value| value.trim_matches(|c: char| c != '.' && !c.is_ascii_digit()).to_owned()).expect(key)
    };
    let (oldest, used) = (value("Cargo.toml", "rust-version"), value("rust-toolchain.toml", "channel"));
    assert!(used.starts_with(&format!("{oldest}.")), "rust-version is {oldest}, rust-toolchain.toml has {used}");
}

/// The image has no `nft`, no `ip`, and no other program to call.
#[test]
fn no_program_is_called() {
    for file in files(&source()).into_iter().chain(files(&root().join("crates"))) {
        let code = code(&file);
        for word in ["process::Command", "execv", "posix_spawn"] {
            assert!(!code.contains(word), "{} mentions {word}", file.display());
        }
    }
}

#[test]
fn pure_modules_do_no_input_and_output() {
    for file in ["api", "model", "allocation", "node_plan", "convert"].iter().flat_map(|m| files(&source().join(m))) {
        let code = code(&file);
        for word in OUTSIDE_WORLD {
            assert!(!code.contains(word), "{} mentions {word}", file.display());
        }
    }
}

#[test]
fn only_modules_of_the_node_use_the_crates_of_kernel_and_plugin() {
    for file in WITHOUT_KERNEL.iter().flat_map(|m| files(&source().join(m))) {
        let code = PLAIN.iter().fold(code(&file), |code, plain| code.replace(plain, ""));
        for word in ["nft::", "cni::"] {
            assert!(!code.contains(word), "{} uses more of {word} than {PLAIN:?}", file.display());
        }
    }
}

/// A pod's start waits for the plugin, so the plugin is a small program. Its crate has few dependencies, and the
/// program has only the crate.
#[test]
fn the_plugin_has_no_runtime_and_no_kubernetes() {
    let tree = ["tree", "--locked", "--offline", "--package", "egret-cni", "--edges", "normal", "--prefix", "none"];
    let out = Command::new(env!("CARGO")).args(tree).current_dir(root()).output().expect("cargo tree");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "cargo tree: {}", String::from_utf8_lossy(&out.stderr));
    let crates: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains(&"egret-nft"), "{crates:?}");
    for name in ["tokio", "kube", "kube-client", "k8s-openapi", "hyper", "futures-util", "rtnetlink"] {
        assert!(
            !crates.contains(&name),
            "crates/cni depends on {name}: cargo tree --package egret-cni --invert {name}"
        );
    }
    let program = code(&source().join("bin/egret-cni.rs"));
    let others: Vec<&str> = program.lines().filter(|line| line.contains("egret")).collect();
    assert!(matches!(others[..], [line] if line.ends_with("_cni::plugin::run()")), "{others:?}");
}
