//! What an EgressGateway's fields promise. Needs root.

mod lab;

use lab::{EGRESS4, EGRESS6, EXT4, FAR4, FAR6, Lab, Node, Pod, VISITOR, manifests};
use std::net::IpAddr;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// The scene's gateway with more lines in its spec.
fn gateway_with(lines: &str) -> String {
    manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]) + lines
}

fn add_addresses(node: &Node) {
    node.ip(&format!("addr add {EGRESS4}/32 dev eth0"));
    node.ip(&format!("addr add {EGRESS6}/128 dev eth0 nodad"));
}

fn del_addresses(node: &Node) {
    node.ip(&format!("addr del {EGRESS4}/32 dev eth0"));
    node.ip(&format!("addr del {EGRESS6}/128 dev eth0"));
}

fn wait_blocked(lab: &Lab, pod: &Pod, server: impl Into<IpAddr>) {
    let server = server.into();
    lab.wait_until(&format!("{} is blocked", pod.name), PATIENCE, || pod.udp_who(server).is_err());
}

#[test]
fn a_gateway_with_a_next_hop_leaves_by_it_and_not_by_the_main_table() {
    let lab = Lab::builder().router().scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    for gateway in ["g1", "g2"] {
        // The main table's router is dead.
        lab.node(gateway).ip("route replace default via 192.0.2.254");
        lab.node(gateway).ip("-6 route replace default via 2001:db8::fe");
    }
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, FAR4));
    lab.write_manifest("gateway.yaml", &gateway_with("  nextHop: { ipv4: 192.0.2.1, ipv6: \"2001:db8::1\" }\n"));
    for pod in &pods {
        lab.wait_until(&format!("{} gets out", pod.name), PATIENCE, || pod.who(FAR4).ok() == Some(EGRESS4.into()));
        lab.wait_until(&format!("{} gets out", pod.name), PATIENCE, || pod.who(FAR6).ok() == Some(EGRESS6.into()));
    }
    // A next hop that is not there is no reason to take another way.
    lab.write_manifest("gateway.yaml", &gateway_with("  nextHop: { ipv4: 192.0.2.250 }\n"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, EXT4));
    lab.write_manifest("gateway.yaml", &gateway_with(""));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, EGRESS4));
}

#[test]
fn an_interface_that_a_gateways_node_lacks_blocks_and_is_said_in_the_status() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.write_manifest("gateway.yaml", &gateway_with("  interface: bond7\n"));
    wait_blocked(&lab, &pod, EXT4);
    lab.wait_until("the status says so", PATIENCE, || lab.manifests().statuses().contains("no interface \"bond7\""));
    lab.write_manifest("gateway.yaml", &gateway_with("  interface: eth0\n"));
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.assert_nothing_leaked();
}

#[test]
fn with_external_placement_the_node_that_has_the_address_owns_it() {
    let lab = Lab::scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    lab.write_manifest("gateway.yaml", &gateway_with("  placement: External\n"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, EXT4));
    for (from, to) in [(None, "g2"), (Some("g2"), "g1")] {
        if let Some(from) = from {
            del_addresses(lab.node(from));
        }
        add_addresses(lab.node(to));
        lab.host("ext").ip("neigh flush dev eth0");
        for pod in &pods {
            lab.wait_seen_as(pod, EGRESS4);
            lab.wait_seen_as(pod, EGRESS6);
        }
        let addresses = lab.node(to).ip("addr show dev eth0");
        assert!(addresses.contains(&format!("{EGRESS4}/32")), "it is not Egret's to take away: {addresses}");
    }
    lab.assert_nothing_leaked();
}

#[test]
fn egress_addresses_go_with_the_label_that_makes_a_node_a_gateway() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let holders = || -> Vec<&str> {
        let has = |n: &&str| lab.node(n).ip("addr show dev eth0").contains(&format!("{EGRESS4}/32"));
        ["n1", "n2", "g1", "g2"].into_iter().filter(has).collect()
    };
    let before = holders();
    assert_eq!(before.len(), 1, "{before:?}");
    let mut node = manifests::node(lab.node(before[0]));
    node["metadata"]["labels"] = serde_json::json!({});
    lab.manifests().write_object(&format!("node-{}.yaml", before[0]), &node);
    lab.wait_until("another node has it", PATIENCE, || holders().len() == 1 && holders() != before);
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.assert_nothing_leaked();
}
