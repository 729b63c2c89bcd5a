//! The plugin's other verbs besides ADD and DEL, and its results. Needs root.

use lab::kernel::assert_no_traces;
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::{Lab, Pod, VISITOR};
use serde_json::{Value, json};
use std::fs;

/// The code of the error, if there is one.
fn code(pod: &Pod, verb: &str, change: impl FnOnce(&mut Value)) -> Option<u64> {
    pod.egret(verb, change).err().map(|e| e.code.unwrap_or_else(|| panic!("{verb}: {e}")))
}

#[test]
fn check_detects_a_kernel_state_that_add_did_not_leave() {
    // If the tables have an owner, nobody else can remove anything.
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    for name in ["n1", "n2"] {
        let pod = lab.add_pod(name, "shop", &format!("pod-{name}"), VISITOR);
        pod.check().unwrap_or_else(|e| panic!("CHECK: {e}"));
        let other = lab.add_pod(name, "office", &format!("other-{name}"), &[]);
        other.check().unwrap_or_else(|e| panic!("CHECK: {e}"));
        assert_eq!(code(&pod, "CHECK", |_| {}), None);
        assert_eq!(
            code(&pod, "CHECK", |stdin| stdin["prevResult"]["ips"][0]["address"] = json!("10.244.9.9/24")),
            Some(101)
        );
        // The daemon has restored what was removed.
        let before = pod.node.egret_state();
        pod.node.nft("flush chain inet egret prerouting");
        assert_eq!(code(&pod, "CHECK", |_| {}), None);
        assert_eq!(lab::kernel::difference(&before, &pod.node.egret_state()), "");
        let mut unknown = lab.sandbox(name, "shop", &format!("unknown-{name}"), VISITOR);
        unknown.conflist = lab.plain_conflist(name);
        unknown.attach().expect("ADD without Egret");
        assert_eq!(code(&unknown, "CHECK", |_| {}), Some(101));
    }
}

#[test]
fn gc_removes_ended_attachments_of_its_network_and_status_succeeds() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    let pods = ["stays", "lost"].map(|name| lab.add_pod("n1", "shop", name, VISITOR));
    let of_other_network = lab.sandbox("n1", "shop", "other", VISITOR);
    let of_other_network = {
        let mut pod = of_other_network;
        pod.conflist.json["name"] = json!("other");
        pod.attach().expect("ADD in another network");
        pod
    };
    let [stays, lost] = &pods;
    let version = |stdin: &mut Value| stdin["cniVersion"] = json!("1.1.0");
    let valid = json!([{"containerID": stays.runtime.container_id, "ifname": "eth0"}]);
    let gc = code(stays, "GC", |stdin| {
        version(stdin);
        stdin["cni.dev/valid-attachments"] = valid;
        stdin.as_object_mut().expect("an object").remove("prevResult");
    });
    assert_eq!(gc, None);
    let recorded: Vec<String> = fs::read_dir(node.run_dir().join("attachments"))
        .expect("records")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    let is_recorded = |pod: &Pod| recorded.iter().any(|file| file.contains(&pod.runtime.container_id));
    assert_eq!([stays, lost, &of_other_network].map(is_recorded), [true, false, true], "{recorded:?}");
    assert_leaves_by_egress(stays);
    assert_leaves_by_egress(&of_other_network);
    let status = |pod: &Pod| code(pod, "STATUS", version);
    assert_eq!(status(stays), None);
    // The kernel is not in sync. Pods can start all the same, at least in quarantine.
    lab.daemon("n1").kill9();
    assert_eq!(status(stays), None);
    node.ip("route flush table 7873");
    node.ip("-6 route flush table 7873");
    assert_eq!(status(stays), None, "a runtime that hears no takes the whole node for one without a network");
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    assert_eq!(status(stays), None);
    pods.into_iter().chain([of_other_network]).for_each(Pod::delete);
    assert_no_traces(node, &before);
}

/// A pod whose interface has no end on the host cannot be enforced.
#[test]
fn a_pod_without_a_veth_starts_only_where_no_policy_selects_it() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let macvlan = |name: &str, labels| {
        let mut pod = lab.sandbox("n1", "shop", name, labels);
        node.ip("link add link eth0 name mac0 type macvlan mode bridge");
        node.ip(&format!("link set mac0 netns {} name eth0", pod.netns));
        pod.ip("address add 10.244.1.99/24 dev eth0");
        pod.result = Some(json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": pod.netns_path()}],
            "ips": [{"address": "10.244.1.99/24", "interface": 0}]
        }));
        pod
    };
    let free = macvlan("free", &[("app", "other")]);
    assert_eq!(code(&free, "ADD", |_| {}), None);
    let selected = macvlan("selected", VISITOR);
    assert_eq!(code(&selected, "ADD", |_| {}), Some(100));
    // A policy that comes later cannot be enforced either, and this must be visible.
    let mut free = free;
    free.relabel(VISITOR);
    let unmanaged = || lab.metrics("n1").get("egret_node_pods", &[("state", "unmanaged")]);
    lab.wait_for("the metric", &Some(1.0), unmanaged);
    assert_eq!(code(&free, "DEL", |_| {}), None);
    lab.wait_for("the metric", &Some(0.0), unmanaged);
}

#[test]
fn the_result_is_passed_on_unchanged() {
    let lab = Lab::scene();
    for name in ["n1", "n2"] {
        let pod = lab.add_pod(name, "shop", &format!("pod-{name}"), VISITOR);
        let plain = lab.plain_conflist(name);
        let mut other = lab.sandbox(name, "shop", &format!("plain-{name}"), VISITOR);
        other.conflist = plain;
        other.attach().expect("ADD without Egret");
        let shape = |pod: &Pod| {
            let mut result = pod.result.clone().expect("a result");
            // Only addresses and names may differ between pods.
            for ip in result["ips"].as_array_mut().into_iter().flatten() {
                ip["address"] = Value::Null;
            }
            for interface in result["interfaces"].as_array_mut().into_iter().flatten() {
                let interface = interface.as_object_mut().expect("an object");
                for own in ["name", "mac", "sandbox"] {
                    interface.remove(own);
                }
            }
            result
        };
        assert_eq!(shape(&pod), shape(&other));
    }
}

#[test]
fn pods_of_a_runtime_without_kubernetes_start_and_are_not_enforced() {
    let lab = Lab::scene();
    let mut pod = lab.sandbox_unknown("n1", "shop", "podman");
    pod.runtime.args = String::new();
    pod.attach().unwrap_or_else(|e| panic!("ADD: {e}"));
    assert_leaves_by_node(&pod);
    pod.detach().unwrap_or_else(|e| panic!("DEL: {e}"));
}

#[test]
fn cni_versions_from_0_3_0_to_1_0_0_work_through_the_whole_chain() {
    let lab = Lab::scene();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        let mut pod = lab.sandbox("n1", "shop", &format!("pod-{}", version.replace('.', "-")), VISITOR);
        pod.conflist.json["cniVersion"] = Value::from(version);
        pod.attach().unwrap_or_else(|e| panic!("ADD by {version}: {e}"));
        assert_eq!(pod.result.as_ref().expect("a result")["cniVersion"], version);
        assert_leaves_by_egress(&pod);
        pod.delete();
    }
}
