//! Finding the host's end of a pod's interface, as ADD stores it in the attachment's file. Needs root.

use crate::call::Call;
use crate::node::{Node, Pod, ip};
use serde_json::{Value, json};

fn record(node: &Node) -> Value {
    serde_json::from_slice(&std::fs::read(node.run_dir().join("attachments/c1@eth0.json")).unwrap()).unwrap()
}

fn index(namespace: &str, name: &str) -> Value {
    let links: Value = serde_json::from_str(&ip(&format!("-n {namespace} -json link show {name}"))).unwrap();
    links[0]["ifindex"].clone()
}

/// ADD of a pod that no policy can select. It is stored whatever its interface is.
fn added(node: &Node, pod: &Pod) -> Value {
    node.offline_policies(&[]);
    Call::new(node, "ADD").pod(pod).run().success();
    record(node)
}

#[test]
fn a_veths_other_end_is_found() {
    let node = Node::new();
    let pods = [5, 6, 7].map(|n| node.pod(n));
    for pod in pods {
        let record = added(&node, &pod);
        let expected = json!({"index": index(&node.name, &pod.host), "peerIndex": index(&pod.name, "eth0")});
        assert_eq!(record["host"], expected);
        assert_eq!(record["network"], "pods");
        assert_eq!(record["addresses"], json!(pod.addresses));
        assert_eq!(record["pod"], json!({"namespace": "shop", "name": "web-0"}));
    }
}

#[test]
fn an_interface_with_another_name_is_found_by_the_result() {
    let node = Node::new();
    let pod = node.pod(5);
    ip(&format!("-n {} link set eth0 down", pod.name));
    ip(&format!("-n {} link set eth0 name net1", pod.name));
    let result = pod.result().replace("\"eth0\"", "\"net1\"");
    node.offline_policies(&[]);
    Call::new(&node, "ADD").pod(&pod).previous(&result).run().success();
    assert_eq!(record(&node)["host"]["index"], index(&node.name, &pod.host));
}

#[test]
fn other_kinds_of_interfaces_have_no_end_on_the_host() {
    let node = Node::new();
    let bridge = node.empty_pod(5);
    ip(&format!("-n {} link add eth0 type bridge", bridge.name));
    assert_eq!(added(&node, &bridge).get("host"), None);
    let macvlan = node.empty_pod(6);
    ip(&format!("-n {} link add link eth0 name m6 type macvlan mode bridge", node.name));
    ip(&format!("-n {} link set m6 netns {} name eth0", node.name, macvlan.name));
    assert_eq!(added(&node, &macvlan).get("host"), None);
    let nothing = node.empty_pod(7);
    assert_eq!(added(&node, &nothing).get("host"), None);
}

#[test]
fn a_veth_whose_peer_is_elsewhere_has_no_end_on_the_host() {
    let node = Node::new();
    let (both, left, right) = (node.empty_pod(5), node.empty_pod(6), node.empty_pod(7));
    ip(&format!("-n {} link add eth0 type veth peer name eth1", both.name));
    assert_eq!(added(&node, &both).get("host"), None);
    // The node has interfaces with many indexes. An interface with the peer's index is not necessarily the peer.
    let decoys = [11, 12, 13].map(|n| node.pod(n));
    for host in [&decoys[0].host, &decoys[1].host, &decoys[2].host] {
        let number = index(&node.name, host);
        ip(&format!("link add eth0 netns {} type veth peer name eth0 index {number} netns {}", left.name, right.name));
        assert_eq!(added(&node, &left).get("host"), None);
        ip(&format!("-n {} link delete eth0", left.name));
    }
}
