//! What Egret's programs say to people who call them. No root is needed.

use lab::snapshot;
use std::process::Command;

/// What a call says, and how it ends.
fn said(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egretd"));
    // Nothing of who runs the test: its variables are defaults.
    command.env_clear().args(arguments);
    let output = command.output().expect("egretd");
    let text = [output.stdout, output.stderr].concat();
    format!("$ egretd {}\n{}({})\n", arguments.join(" "), String::from_utf8_lossy(&text), output.status)
}

#[test]
fn every_command_explains_itself() {
    let verbs = ["node", "controller", "install", "uninstall", "crds", "check", "why", "ruleset"];
    let top = said(&["--help"]);
    let listed = top.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   ") && !l.starts_with("  -"));
    let listed: Vec<&str> = listed.filter_map(|l| l.split_whitespace().next()).filter(|v| *v != "help").collect();
    assert_eq!(listed, verbs, "a command is not among those whose help is looked at");
    let all = verbs.map(|verb| said(&[verb, "--help"])).join("\n");
    snapshot::assert("help.txt", &format!("{top}\n{all}"));
}

#[test]
fn what_is_wrong_with_a_call_is_told_with_the_remedy() {
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
