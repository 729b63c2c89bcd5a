//! DEL and GC without the daemon: late, twice, without ADD's result, and after the address is used again. Needs root.

use crate::call::Call;
use crate::node::{Node, OUTSIDE, ip};
use serde_json::json;
use std::time::Duration;

#[test]
fn del_succeeds_twice_and_without_an_add() {
    let node = Node::new();
    Call::new(&node, "DEL").run().success();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    Call::new(&node, "ADD").pod(&pod).run().success();
    for _ in 0..3 {
        assert_eq!(Call::new(&node, "DEL").run().success(), "");
        assert!(node.rules().is_empty() && node.records().is_empty());
    }
    Call::new(&node, "DEL").container("c2").run().success();
}

#[test]
fn del_succeeds_with_the_least_input() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    Call::new(&node, "ADD").pod(&pod).run().success();
    ip(&format!("netns delete {}", pod.name));
    // No prevResult, no network name, no version, invalid arguments, and no namespace.
    let del = Call::new(&node, "DEL").netns(&pod.netns()).variable("CNI_ARGS", "K8S_POD_NAME");
    del.without_key("name").without_key("cniVersion").run().success();
    assert!(node.rules().is_empty() && node.records().is_empty());
    Call::new(&node, "DEL").variable("CNI_NETNS", "").previous("5").run().success();
}

#[test]
fn a_late_del_leaves_the_next_containers_rule() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    Call::new(&node, "ADD").container("old").pod(&pod).run().success();
    Call::new(&node, "ADD").container("new").pod(&pod).run().success();
    Call::new(&node, "DEL").container("old").pod(&pod).run().success();
    assert_eq!(node.records(), ["new@eth0.json"]);
    assert_eq!(pod.reaches(OUTSIDE), [false; 2]);
    Call::new(&node, "DEL").container("old").pod(&pod).run().success();
    assert_eq!(pod.reaches(OUTSIDE), [false; 2]);
    Call::new(&node, "DEL").container("new").pod(&pod).run().success();
    assert_eq!(pod.reaches(OUTSIDE), [true; 2]);
}

#[test]
fn an_interrupted_add_is_undone() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    // An attachment's file without rules, with some rules, and a truncated file.
    Call::new(&node, "ADD").pod(&pod).run().success();
    ip(&format!("-n {} rule delete priority 71", node.name));
    Call::new(&node, "DEL").run().success();
    assert!(node.rules().is_empty() && node.records().is_empty());
    std::fs::write(node.run_dir().join("attachments/c1@eth0.json"), "{\"contai").unwrap();
    Call::new(&node, "DEL").run().success();
    assert!(node.records().is_empty());
}

#[test]
fn an_add_killed_at_any_moment_can_be_undone_and_repeated() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    for round in 0..150 {
        let time = Duration::from_micros(round * 40);
        Call::new(&node, "ADD").pod(&pod).run_and_kill(time);
        if round % 3 == 0 {
            Call::new(&node, "ADD").pod(&pod).run().success();
            assert_eq!((node.records().len(), node.rules().len()), (1, 2), "after {time:?}");
        }
        if round % 2 == 0 {
            Call::new(&node, "DEL").run_and_kill(time);
        }
        Call::new(&node, "DEL").run().success();
        let left = (node.records(), node.rules());
        assert_eq!(left, (vec![], vec![]), "after {time:?}");
    }
}

#[test]
fn rules_of_other_programs_stay() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let others = ["from 10.244.1.5 lookup 7873 priority 70", "from 10.244.1.5 lookup main priority 71"];
    for rule in others {
        ip(&format!("-n {} rule add {rule}", node.name));
    }
    Call::new(&node, "ADD").pod(&pod).run().success();
    assert_eq!(node.rules().len(), 3);
    Call::new(&node, "DEL").run().success();
    assert_eq!(node.rules(), ["71: from 10.244.1.5 lookup main"]);
    assert!(ip(&format!("-n {} rule list priority 70", node.name)).contains("7873"));
}

#[test]
fn gc_removes_invalid_attachments_of_its_own_network() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pods = [5, 6, 7].map(|n| node.pod(n));
    let add = |id: &str, at: usize, network: &str| {
        Call::new(&node, "ADD").container(id).pod(&pods[at]).key("name", json!(network)).run().success()
    };
    add("keep", 0, "pods");
    add("stale", 1, "pods");
    add("elsewhere", 2, "other");
    let gc = |valid| {
        let gc = Call::new(&node, "GC").without_variable("CNI_CONTAINERID").without_variable("CNI_IFNAME");
        gc.key("cni.dev/valid-attachments", valid).run().success()
    };
    assert_eq!(gc(json!([{"containerID": "keep", "ifname": "eth0"}, {"containerID": "stale", "ifname": "net1"}])), "");
    assert_eq!(node.records(), ["elsewhere@eth0.json", "keep@eth0.json"]);
    assert_eq!([0, 1, 2].map(|n| pods[n].reaches(OUTSIDE)[0]), [false, true, false]);
    gc(json!([]));
    assert_eq!(node.records(), ["elsewhere@eth0.json"]);
    gc(json!(null));
    assert_eq!(node.rules().len(), 2);
}

#[test]
fn after_an_uninstallation_every_verb_succeeds_and_changes_nothing() {
    let node = Node::new();
    node.prepare(&["shop"]);
    egret_cni::uninstalled::mark(&node.run_dir()).unwrap();
    let pod = node.pod(5);
    assert_eq!(Call::new(&node, "ADD").pod(&pod).run().success(), format!("{}\n", pod.result()));
    for verb in ["CHECK", "DEL", "STATUS"] {
        assert_eq!(Call::new(&node, verb).pod(&pod).run().success(), "", "{verb}");
    }
    let valid = serde_json::json!([]);
    assert_eq!(Call::new(&node, "GC").key("cni.dev/valid-attachments", valid).run().success(), "");
    assert!(node.rules().is_empty() && node.records().is_empty());
    assert_eq!(std::fs::read_dir(node.run_dir()).unwrap().count(), 1, "the mark");
}
