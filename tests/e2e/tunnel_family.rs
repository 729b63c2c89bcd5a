//! Tunnel addresses that are not the nodes' InternalIPs. A node whose tunnel address is of another family than the
//! others', or is no host's address: a fault of this node only. Needs root.

use lab::fault_injection::{dies, holders, owner_and_other};
use lab::scene::{assert_blocked, assert_leaves_by_egress, visitors};
use lab::{EGRESS4, EGRESS6, Lab, Pod, VISITOR, manifests};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// The arguments of a node's daemon, with another tunnel address, or without one.
fn arguments(lab: &Lab, node: &str, address: Option<&str>) -> Vec<String> {
    let mut arguments = lab.node_daemon_arguments(node);
    let at = arguments.iter().position(|a| a == "--tunnel-address").expect("the lab gives one");
    match address {
        Some(address) => arguments[at + 1] = address.to_owned(),
        None => drop(arguments.drain(at..at + 2)),
    }
    arguments
}

/// The lab, with its daemons started one by one, and these nodes with other tunnel addresses.
fn scene_with(ends: &[(&str, Option<&str>)]) -> Lab {
    let lab = Lab::new();
    let pool = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &pool);
    lab.write_manifest("policy.yaml", &visitors());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start_controller();
    for node in ["n1", "g1", "g2", "n2"] {
        match ends.iter().find(|(name, _)| *name == node) {
            Some((_, end)) => drop(lab.start_daemon(node, lab.node(node), arguments(&lab, node, *end))),
            None => drop(lab.start_node(node)),
        }
    }
    for node in ["controller", "n1", "n2", "g1", "g2"] {
        lab.wait_ready(node);
    }
    lab
}

#[track_caller]
fn leaves(lab: &Lab, pod: &Pod) {
    lab.wait_seen_as(pod, EGRESS4);
    lab.wait_seen_as(pod, EGRESS6);
}

fn visitor(lab: &Lab, node: &str) -> Pod {
    lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR)
}

#[test]
fn a_node_of_the_other_family_is_reported_and_skipped_and_all_others_work() {
    let lab = scene_with(&[("n2", Some("2001:db8::12"))]);
    for node in ["n1", "g1", "g2"] {
        leaves(&lab, &visitor(&lab, node));
    }
    // Its own pod starts, and is blocked because no gateway node reaches it.
    assert_blocked(&visitor(&lab, "n2"));
    for gateway in ["g1", "g2"] {
        let named = || {
            let log = lab.daemon(gateway).log();
            log.contains("its end of the tunnel is 2001:db8::12, IPv6") && log.contains("node n2")
        };
        lab.wait_until("the log names the node", PATIENCE, named);
        assert_eq!(lab.metrics(gateway).get("egret_node_faults", &[]), Some(1.0));
        assert!(lab.ready(gateway));
    }
    let statuses = lab.manifests().statuses();
    assert!(statuses.contains("of: node n2"), "{statuses}");

    // Corrected, it is reached.
    lab.daemon("n2").kill9();
    lab.start_node("n2");
    lab.wait_ready("n2");
    leaves(&lab, &lab.add_pod("n2", "shop", "mended", VISITOR));
    let mended = || lab.metrics("g1").get("egret_node_faults", &[]) == Some(0.0);
    lab.wait_until("nothing is passed over any more", PATIENCE, mended);
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_node_of_the_other_family_is_replaced_by_one_that_is_reached() {
    for (odd, end) in [("g1", "2001:db8::21"), ("g2", "2001:db8::22")] {
        let lab = scene_with(&[(odd, Some(end))]);
        let other = if odd == "g1" { "g2" } else { "g1" };
        for node in ["n1", "n2", other] {
            leaves(&lab, &visitor(&lab, node));
        }
        assert_eq!(holders(&lab), [other]);
        lab.assert_nothing_leaked();
    }
}

#[test]
fn an_invalid_tunnel_address_is_a_fault_of_its_node() {
    let lab = Lab::scene();
    let broken = "apiVersion: egret.dev/v1alpha1\nkind: EgressNode\nmetadata: { name: n9 }\n\
                  status: { tunnelAddress: 224.0.0.9, tunnelMac: \"02:00:00:00:09:09\", answers: true }\n";
    let node = "apiVersion: v1\nkind: Node\nmetadata: { name: n9 }\nstatus: { addresses: [] }\n";
    lab.write_manifest("n9.yaml", node);
    std::fs::create_dir_all(lab.manifests().path().join("status/egressnodes")).expect("a directory");
    std::fs::write(lab.manifests().path().join("status/egressnodes/n9.yaml"), broken).expect("a status");
    let named = |gateway: &str| lab.daemon(gateway).log().contains("224.0.0.9, which is no host's address");
    lab.wait_until("it is named", PATIENCE, || named("g1") && named("g2"));
    ["n1", "g1", "g2"].into_iter().for_each(|node| assert_leaves_by_egress(&visitor(&lab, node)));
}

#[test]
fn nodes_with_another_order_of_addresses_use_the_clusters_family() {
    let lab = Lab::new();
    let mut object = manifests::node(lab.node("n2"));
    object["status"]["addresses"].as_array_mut().expect("a list").swap(0, 1);
    lab.manifests().write_object("node-n2.yaml", &object);
    let pool = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &pool);
    lab.write_manifest("policy.yaml", &visitors());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start_controller();
    for node in ["n2", "n1", "g1", "g2"] {
        lab.start_daemon(node, lab.node(node), arguments(&lab, node, None));
    }
    for node in ["n1", "n2", "g1", "g2"] {
        lab.wait_ready(node);
        leaves(&lab, &visitor(&lab, node));
        let device = lab.node(node).ip("-d link show egret");
        assert!(device.contains(&format!("local {}", lab.node(node).ipv4())), "{device}");
    }
    lab.assert_nothing_leaked();
}

/// As those of a network of WireGuard below the tunnel.
#[test]
fn tunnel_addresses_that_no_node_lists_work() {
    let lab = Lab::builder().tunnel_network("10.99.0.").build();
    for node in lab.nodes() {
        node.ip(&format!("addr add 10.99.0.{}/24 dev eth0", node.spec.last));
    }
    let lab = lab.with_scene();
    let pods: Vec<Pod> = lab.nodes().iter().map(|node| visitor(&lab, &node.name)).collect();
    lab.assert_carries(&pods);
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    dies(&lab, &owner, &other, &others);
    lab.assert_nothing_leaked();
}
