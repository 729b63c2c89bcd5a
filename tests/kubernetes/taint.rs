//! The taint that keeps pods away from a node until Egret is ready there. Needs root.

use super::PATIENCE;
use lab::Lab;
use serde_json::{Value, json};
use std::thread;
use std::time::Duration;

const MERGE: &str = "application/merge-patch+json";

fn taint(lab: &Lab, node: &str, taints: &Value) {
    let patch = json!({"spec": {"taints": taints}});
    lab.api().ask("PATCH", &format!("/api/v1/nodes/{node}"), Some((MERGE, &patch)));
}

fn keys(lab: &Lab, node: &str) -> Vec<String> {
    let object = lab.api().get(&format!("/api/v1/nodes/{node}"));
    let taints = object["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints.iter().map(|t| t["key"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_nodes_taint_is_removed_when_egret_is_ready_there_and_not_before() {
    let lab = Lab::builder().kubernetes().build();
    let not_ready = "egret.dev/not-ready";
    let all = json!([
        {"key": not_ready, "effect": "NoSchedule"},
        {"key": "dedicated", "value": "database", "effect": "NoSchedule"},
        {"key": not_ready, "effect": "NoExecute"},
    ]);
    for node in ["n1", "n2"] {
        taint(&lab, node, &all);
    }
    lab.start_controller();
    lab.start_node("n1");
    lab.wait_until("n1 is open", PATIENCE, || keys(&lab, "n1") == ["dedicated"]);
    lab.wait_ready("n1");
    // Another node's taint is removed by that node.
    assert_eq!(keys(&lab, "n2"), [not_ready, "dedicated", not_ready]);
    // A machine that returns with the taint: it is removed when Egret is ready, and not while it is away.
    lab.daemon("n1").kill9();
    taint(&lab, "n1", &all);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(keys(&lab, "n1").len(), 3);
    lab.daemon("n1").restart();
    lab.wait_until("n1 is open again", PATIENCE, || keys(&lab, "n1") == ["dedicated"]);
}
