//! What users read of a cluster with one gateway, one policy and one pod: names of metrics and their labels,
//! statuses, `egretd why`. The texts are in `tests/snapshots`; `make snapshots` writes them anew. Needs root.

use lab::scene::assert_leaves_by_egress;
use lab::{EXT4, Lab, Metrics, NodeSpec, Pods, VISITOR, snapshot};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The metrics of a daemon: help, kind, and names with their labels; no values, no buckets.
fn shape(text: &str) -> String {
    let comments = text.lines().filter(|line| line.starts_with("# HELP") || line.starts_with("# TYPE"));
    let named = |line: &str| (line.split(' ').nth(2).unwrap_or_default().to_owned(), line.to_owned());
    let mut lines: BTreeSet<(String, String)> = comments.map(named).collect();
    for sample in Metrics::parse(text).0.into_iter().filter(|sample| !sample.name.ends_with("_bucket")) {
        let labels: Vec<String> = sample.labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
        lines.insert((sample.name.clone(), format!("{}{{{}}}", sample.name, labels.join(","))));
    }
    lines.into_iter().map(|(_, line)| line + "\n").collect()
}

/// The paths of all files below, relative to it, sorted.
fn files_of(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                directories.push(path);
            } else if let Ok(path) = path.strip_prefix(root) {
                found.insert(path.display().to_string());
            }
        }
    }
    found
}

#[test]
fn metrics_statuses_and_why_match_their_snapshots() {
    // With one gateway node, only one node can hold the egress IP.
    let nodes = vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)];
    let lab = Lab::builder().nodes(nodes).scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let status = lab.manifests().path().join("status");
    let statuses = || -> String {
        let text = |file: &String| format!("--- {file}\n{}", fs::read_to_string(status.join(file)).unwrap_or_default());
        files_of(&status).iter().map(text).collect()
    };
    lab.wait_until("the statuses count the pod and the ready node", Duration::from_secs(30), || {
        statuses().contains("pods: 1\n") && statuses().contains("readyNodes: 1\n")
    });

    let seconds = |line: &str| match line.split_once("since: ") {
        Some((before, _)) => format!("{before}since: SECONDS\n"),
        None => format!("{line}\n"),
    };
    let text: String = statuses().lines().map(seconds).collect();
    let text = text.replace(&format!("version: {}\n", env!("CARGO_PKG_VERSION")), "version: VERSION\n");
    snapshot::assert("statuses.yaml", &snapshot::without_times(&text));

    for (daemon, name) in [("n1", "source-node"), ("g1", "owner"), ("controller", "controller")] {
        snapshot::assert(&format!("metrics-{name}.txt"), &shape(&lab.metrics_text(daemon)));
    }

    let cluster = format!("dir:{}", lab.manifests().path().display());
    let why = |more: &[&str]| {
        let mut command = Command::new(lab::places::program("egretd"));
        let output = command.args(["why", "shop/visitor", "--cluster", &cluster]).args(more).output().expect("egretd");
        let arguments = [&["why", "shop/visitor"][..], more].concat().join(" ");
        format!("$ egretd {arguments}\n{}", String::from_utf8_lossy(&output.stdout))
    };
    let to = format!("{EXT4}:443");
    let inside = lab.add_pod("g1", "office", "inside", &[]).ipv4().to_string();
    snapshot::assert("why.txt", &[why(&[]), why(&["--to", &to]), why(&["--to", &inside])].join("\n"));
}
