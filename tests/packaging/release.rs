//! What people run without cargo: the release's scripts, the acceptance suite, GitHub's workflows.

use crate::manifests::{self, documents};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(directory)).unwrap_or_else(|e| panic!("{directory}: {e}"));
    let found: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    assert!(!found.is_empty(), "{directory} has no .{extension}");
    found
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What bash prints, in the suite's directory.
fn bash(script: &str) -> String {
    let output = Command::new("bash").args(["-euc", script]).current_dir(root().join("tests/cluster")).output();
    let output = output.expect("run bash");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// `release.sh` and the acceptance suite put another name in its place.
#[test]
fn the_manifests_name_one_image_and_it_is_this_version() {
    let name = concat!("egret.invalid/egret:v", env!("CARGO_PKG_VERSION"));
    for file in ["install/egret.yaml", "install/uninstall.yaml"] {
        let manifest = manifests::read(file);
        let images: Vec<&str> = manifest.lines().filter_map(|l| l.trim().strip_prefix("image: ")).collect();
        assert!(!images.is_empty() && images.iter().all(|i| *i == name), "{file}: {images:?}");
    }
}

/// `release.sh` puts the checksum in its place.
#[test]
fn the_plugins_manifest_for_krew_is_of_this_version() {
    let manifest = text(&root().join("install/krew/egret.yaml"));
    let read: Value = serde_saphyr::from_str(&manifest).expect("YAML");
    let version = concat!("v", env!("CARGO_PKG_VERSION"));
    assert_eq!(read["spec"]["version"], version);
    let platform = &read["spec"]["platforms"][0];
    let name = format!("kubectl-egret-{version}-linux-amd64.tar.gz");
    assert!(platform["uri"].as_str().is_some_and(|uri| uri.ends_with(&name)), "{platform}");
    assert_eq!(platform["sha256"].as_str().map(|sum| sum.trim_matches('0').len()), Some(0), "not set by hand");
    let files = platform["files"].as_array().expect("files");
    let script = text(&root().join("release/release.sh"));
    for file in files.iter().filter_map(|file| file["from"].as_str()) {
        assert!(script.contains(file), "release.sh does not put {file} into the archive");
    }
}

#[test]
fn the_scripts_are_bash() {
    for script in ["release", "tests", "tests/cluster"].iter().flat_map(|d| files(d, "sh")) {
        let output = Command::new("bash").arg("-n").arg(&script).output().expect("run bash");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A script stands in a manifest in double quotes, between YAML, Kubernetes and the shell.
#[test]
fn a_client_of_the_suite_runs_the_script_that_was_written() {
    for script in ["ONCE", "STEADY", "HELD"] {
        let set = "SERVER=192.0.2.9:80 SERVER_PATH=/who CLIENT_IMAGE=busybox; . ./clients.sh";
        let written = bash(&format!("{set}; printf %s \"${script}\""));
        let pod = bash(&format!(
            "{set}; echo \"apiVersion: v1\nkind: Pod\nmetadata: {{ name: client, namespace: shop }}\nspec: {{ containers: [$(container main \"${script}\")] }}\""
        ));
        let pods = documents(&pod);
        let container = &pods["Pod shop/client"]["spec"]["containers"][0];
        assert_eq!(container["command"][2].as_str(), Some(written.as_str()), "{script}");
        // Kubernetes makes one of two.
        assert!(!written.contains("$$"), "{script}");
        assert_eq!(container["env"][0]["value"], "192.0.2.9:80");
    }
}

/// All steps of a workflow.
fn steps(workflow: &Path) -> Vec<Value> {
    let read: Value = serde_saphyr::from_str(&text(workflow)).unwrap_or_else(|e| panic!("{}: {e}", workflow.display()));
    let jobs = read["jobs"].as_object().expect("jobs");
    jobs.values().flat_map(|j| j["steps"].as_array().expect("steps").clone()).collect()
}

#[test]
fn workflows_run_targets_of_the_makefile() {
    let makefile = text(&root().join("Makefile"));
    let mut seen = Vec::new();
    for step in files(".github/workflows", "yaml").iter().flat_map(|w| steps(w)) {
        for line in step["run"].as_str().unwrap_or_default().lines() {
            if let Some(target) = line.trim().strip_prefix("make ").and_then(|l| l.split_whitespace().next()) {
                assert!(makefile.lines().any(|l| l.starts_with(&format!("{target}:"))), "make {target}");
                seen.push(target.to_owned());
            }
        }
    }
    for target in ["lint", "test", "cluster-test", "release", "reproducible"] {
        assert!(seen.iter().any(|s| s == target), "no workflow runs make {target}, but {seen:?}");
    }
}

/// A variable that the suite does not know would be passed over.
#[test]
fn variables_that_workflows_pass_to_the_suite_are_in_its_readme() {
    let readme = text(&root().join("tests/cluster/README.md"));
    let run = text(&root().join("tests/cluster/run.sh")) + &text(&root().join("tests/cluster/clients.sh"));
    let workflow = root().join(".github/workflows/ci.yaml");
    let step = steps(&workflow).into_iter().find(|s| s["run"] == "make cluster-test").expect("make cluster-test");
    let given = step["env"].as_object().expect("variables").keys().cloned();
    for name in given.chain(["SERVER", "ADDRESSES", "IMAGE", "CLIENT_IMAGE", "READY_WITHIN", "KEEP"].map(String::from))
    {
        assert!(readme.contains(&format!("`{name}`")), "README.md does not tell of {name}");
        assert!(run.contains(&name), "the suite does not look at {name}");
        assert!(text(&workflow).contains(&name) || ["READY_WITHIN", "KEEP"].contains(&name.as_str()), "{name}");
    }
}
