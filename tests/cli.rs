//! The help texts and errors of Egret's programs. No root is needed.

use lab::snapshot;
use std::io::Write;
use std::process::{Command, Stdio};

/// The output and the exit code of a call.
fn said(arguments: &[&str]) -> String {
    said_by("egretd", env!("CARGO_BIN_EXE_egretd"), arguments)
}

fn said_by(name: &str, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    // Without the variables of the user who runs the test, which are defaults.
    command.env_clear().args(arguments);
    let output = command.output().expect(name);
    let text = [output.stdout, output.stderr].concat();
    format!("$ {name} {}\n{}({})\n", arguments.join(" "), String::from_utf8_lossy(&text), output.status)
}

#[test]
fn every_command_has_a_help_text() {
    let verbs = [
        "node",
        "controller",
        "install",
        "uninstall",
        "crds",
        "check",
        "why",
        "ruleset",
        "state",
        "trace",
        "test-server",
    ];
    let top = said(&["--help"]);
    let listed = top.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   ") && !l.starts_with("  -"));
    let listed: Vec<&str> = listed.filter_map(|l| l.split_whitespace().next()).filter(|v| *v != "help").collect();
    assert_eq!(listed, verbs, "a command is not among those whose help is looked at");
    let all = verbs.map(|verb| said(&[verb, "--help"])).join("\n");
    snapshot::assert("help.txt", &format!("{top}\n{all}"));
}

#[test]
fn an_invalid_call_is_an_error_with_the_remedy() {
    let calls: [&[&str]; 7] = [
        &[],
        &["guess"],
        &["node", "--cluster", "kube"],
        &["node", "--name", "n1", "--cluster", "etcd"],
        &["node", "--name", "n1", "--cluster", "dir:/nowhere/at/all"],
        &["why", "visitor", "--cluster", "dir:/nowhere/at/all"],
        &["check", "--log-level", "loud=very"],
    ];
    snapshot::assert("wrong-calls.txt", &calls.map(said).join("\n"));
}

/// The commands of `kubectl egret`, in the order of its help.
const OF_PLUGIN: [&str; 14] = [
    "status",
    "convert",
    "check",
    "test",
    "test-server",
    "pods",
    "ip",
    "why",
    "trace",
    "plan",
    "move",
    "drain",
    "rebalance",
    "completion",
];

fn plugin(arguments: &[&str]) -> String {
    said_by("kubectl egret", env!("CARGO_BIN_EXE_kubectl-egret"), arguments)
}

#[test]
fn every_command_of_the_plugin_has_a_help_text_with_examples() {
    let top = plugin(&["-h"]);
    let listed = top.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   ") && !l.starts_with("  -"));
    let listed: Vec<&str> = listed.filter_map(|l| l.split_whitespace().next()).filter(|v| *v != "help").collect();
    assert_eq!(listed, OF_PLUGIN, "a command is not among those whose help is looked at");
    let all = OF_PLUGIN.map(|verb| plugin(&[verb, "--help"]));
    for help in &all {
        assert!(help.contains("\nExamples:\n  "), "no examples in {help}");
    }
    snapshot::assert("kubectl-egret-help.txt", &format!("{top}\n{}", all.join("\n")));
}

/// Under the name `egretctl`, the help names that.
#[test]
fn help_texts_use_the_name_of_the_call() {
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("egretctl");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kubectl-egret"), &program).expect("a link");
    let said = said_by("egretctl", &program.display().to_string(), &["status", "--help"]);
    assert!(said.contains("Usage: egretctl status") && said.contains("  egretctl status -n shop"), "{said}");
    assert!(!said.contains("kubectl egret"), "{said}");
}

/// kubectl asks for completions through `kubectl_complete-egret`, and expects cobra's answer.
#[test]
fn words_are_completed_for_kubectl() {
    let said = plugin(&["__complete", "stat"]);
    assert!(said.contains("\nstatus\tShow what is wrong") && said.contains("\n:4\n"), "{said}");
    let said = plugin(&["__complete", "status", "--w"]);
    assert!(said.contains("\n--watch\t"), "{said}");
}

#[test]
fn an_invalid_call_of_the_plugin_is_an_error_with_the_remedy() {
    let calls: [&[&str]; 7] = [
        &["guess"],
        &["convert"],
        &["convert", "-f", "/nowhere/at/all.yaml"],
        &["status", "--cluster", "etcd"],
        &["status", "--cluster", "dir:/nowhere/at/all"],
        &["status", "-o", "xml"],
        &["status"],
    ];
    snapshot::assert("kubectl-egret-wrong-calls.txt", &calls.map(plugin).join("\n"));
}

/// The output of `convert` on stdout and stderr, and its exit code.
#[test]
fn other_systems_objects_are_converted() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/convert");
    let golden = std::fs::read_to_string(format!("{directory}/antrea/pool.egret.yaml")).expect("a golden file");
    let pool = format!("{directory}/antrea/pool.yaml");
    let run = |arguments: &[&str], input: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
        command.env_clear().arg("convert").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl-egret");
        child.stdin.take().expect("its input").write_all(input.as_bytes()).expect("write its input");
        let output = child.wait_with_output().expect("its output");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (text(output.stdout), text(output.stderr), output.status.code())
    };
    let (out, notes, code) = run(&["-f", &pool], "");
    assert_eq!((out, code), (golden.clone(), Some(0)), "{notes}");
    assert!(notes.contains("differs: Egress.crd.antrea.io egress-staging-web: spec.bandwidth.burst"), "{notes}");
    // The common fields of two objects are one line.
    assert!(
        notes.contains("egress-prod-web, Egress.crd.antrea.io egress-staging-web: the egress IP has no IPv6"),
        "{notes}"
    );
    let text = std::fs::read_to_string(&pool).expect("its input");
    assert_eq!(run(&["-f", "-", "--exit-code"], &text), (golden, notes, Some(0)));
    let (_, notes, code) = run(&["-f", "-", "--exit-code"], &text.replace("800M", "fast"));
    assert_eq!(code, Some(2));
    assert!(notes.contains("lost: Egress.crd.antrea.io egress-staging-web: spec.bandwidth: "), "{notes}");
    // A directory, by both names.
    let (by_file, ..) = run(&["-f", &format!("{directory}/kube-vip")], "");
    let source = format!("dir:{directory}/kube-vip");
    let (by_source, ..) = run(&["--from-cluster", "--cluster", &source], "");
    assert!(by_file == by_source && by_file.contains("name: kube-vip-eth1-200"), "{by_file}\n{by_source}");
    let (json, ..) = run(&["-f", &pool, "-o", "json"], "");
    let list: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(list["items"].as_array().map(Vec::len), Some(3));
    let nothing = run(&["-f", "-"], "");
    assert!(nothing.0.is_empty() && nothing.1.contains("Nothing was converted") && nothing.2 == Some(0), "{nothing:?}");
    let wrong = run(&["-f", "-"], &text.replace("192.0.2.12", "192.0.2.300"));
    assert!(wrong.0.is_empty() && wrong.2 == Some(1), "{wrong:?}");
    assert!(wrong.1.contains("spec.egressIP: \"192.0.2.300\" is not an IP address; write one like"), "{}", wrong.1);
}
