//! Egret beside programs that enforce NetworkPolicies and masquerade, with the rules that they write. Needs root.

use lab::by_hand::ByHand;
use lab::fault_injection::{cordoned, owner_and_other, wait_holder};
use lab::felix::{self, CALICO, Felix};
use lab::kube_router;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{Lab, Masquerade, NodeSpec, Pod, Pods, VISITOR};
use std::thread;
use std::time::Duration;

const EGRETD: &str = env!("CARGO_BIN_EXE_egretd");

/// A lab with routed pods, as Calico has them. Its masquerade is in the table that Felix writes.
fn routed() -> Lab {
    let by = |spec| NodeSpec { masquerade: Masquerade::Iptables, ..spec };
    let nodes = vec![
        by(NodeSpec::new("n1", 11, Pods::Routed)),
        by(NodeSpec::new("n2", 12, Pods::Routed)),
        by(NodeSpec::gateway("g1", 21, Pods::Routed)),
        by(NodeSpec::gateway("g2", 22, Pods::Routed)),
    ];
    Lab::builder().nodes(nodes).build()
}

fn everywhere(lab: &Lab, what: impl Fn(&lab::Node)) {
    lab.nodes().iter().for_each(|node| what(node));
}

/// A pod of Calico's on each node, with these labels.
fn workloads(lab: &Lab, labels: &[(&str, &str)], interface: &str) -> Vec<Pod> {
    let last = if interface == CALICO[0] { 77 } else { 78 };
    let of = |node: &str| ByHand::dual(lab, node, &format!("{interface}-{node}"), labels, interface, last).pod;
    ["n1", "n2", "g1", "g2"].map(of).into()
}

/// What the counter `foreign` has dropped: tunnel packets that no node sent.
fn foreign(lab: &Lab) -> f64 {
    ["n1", "n2", "g1", "g2"].map(|node| lab.metrics(node).dropped("foreign").expect("the counter")).iter().sum()
}

/// Selected pods leave from the egress IP and others from their node, by Felix's masquerade alone; a NetworkPolicy is in
/// force; and nothing leaks while Felix writes everything anew, and when it goes.
fn beside(felix: Felix, lab: &Lab) {
    let visitors = workloads(lab, VISITOR, CALICO[0]);
    let others = workloads(lab, &[("app", "other")], CALICO[1]);
    visitors.iter().for_each(assert_leaves_by_egress);
    lab.assert_carries(&visitors);
    let (owner, before) = (owner_and_other(lab), foreign(lab));
    let going_on = sessions(&visitors);
    for _ in 0..5 {
        everywhere(lab, |node| felix.write(node, true));
        visitors.iter().for_each(assert_leaves_by_egress);
    }
    assert_live("rewritten", going_on);
    assert_eq!(owner_and_other(lab), owner, "the nodes reach each other");
    assert_eq!(foreign(lab), before, "no node's own tunnel packet is dropped");
    lab.assert_nothing_leaked();
    others.iter().for_each(assert_leaves_by_node);

    everywhere(lab, |node| felix.write(node, false));
    lab.forget_wire();
    visitors.iter().chain(&others).for_each(assert_blocked);
    lab.assert_nothing_arrives();
    everywhere(lab, |node| felix.write(node, true));
    visitors.iter().for_each(assert_leaves_by_egress);

    everywhere(lab, |node| felix.remove(node));
    visitors.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}

/// Of two chains of one priority, the kernel calls the one first that was made last.
fn before_and_after(felix: Felix) {
    let lab = routed();
    everywhere(&lab, |node| felix.write(node, true));
    beside(felix, &lab.with_scene());
    let lab = routed().with_scene();
    everywhere(&lab, |node| felix.write(node, true));
    beside(felix, &lab);
}

#[test]
fn egret_and_calicos_rules_of_iptables_that_come_first_respect_each_other() {
    before_and_after(Felix::Insert);
}

#[test]
fn egret_and_calicos_rules_of_iptables_that_come_last_respect_each_other() {
    before_and_after(Felix::Append);
}

#[test]
fn egret_and_calicos_rules_of_iptables_legacy_respect_each_other() {
    before_and_after(Felix::Legacy);
}

#[test]
fn egret_and_calicos_rules_of_nftables_respect_each_other() {
    before_and_after(Felix::Nftables);
}

/// Calico clears bits of the marks of the host's own packets, and copies that are handed over are such packets.
#[test]
fn a_planned_move_beside_calico_makes_no_pause() {
    let lab = routed().with_scene();
    everywhere(&lab, |node| Felix::Insert.write(node, true));
    let pods = workloads(&lab, VISITOR, CALICO[0]);
    let (owner, other) = owner_and_other(&lab);
    let going_on = sessions(&pods);
    thread::sleep(Duration::from_millis(500));
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    pods.iter().for_each(assert_leaves_by_egress);
    assert_short(assert_live("moved", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn a_host_endpoint_that_drops_tunnel_packets_blocks_and_the_statuses_say_so() {
    let lab = routed().with_scene();
    everywhere(&lab, |node| Felix::Insert.write(node, true));
    let pods = workloads(&lab, VISITOR, CALICO[0]);
    pods.iter().for_each(assert_leaves_by_egress);
    everywhere(&lab, felix::add_host_endpoint);
    let status = |node: &str| {
        let file = lab.manifests().path().join(format!("status/egressnodes/{node}.yaml"));
        std::fs::read_to_string(file).unwrap_or_default()
    };
    let (owner, other) = owner_and_other(&lab);
    let named = || {
        let blocked = ["n1", "n2"].iter().all(|node| status(node).contains(&format!("node {owner} does not answer")));
        blocked && status(&other).contains(&format!("unreachablePeers:\n  - {owner}"))
    };
    lab.wait_until("the statuses name the nodes", Duration::from_secs(20), named);
    let source = format!("dir:{}", lab.manifests().path().display());
    let why = lab.node("n1").run([EGRETD, "why", "shop/calia-n1", "--to", "192.0.2.100", "--cluster", &source]);
    assert!(why.contains("blocked"), "{why}");
    pods[..2].iter().for_each(assert_blocked);
    lab.assert_nothing_leaked();

    everywhere(&lab, felix::allow_tunnel);
    lab.wait_until("no node is named", Duration::from_secs(20), || !status("n1").contains("does not answer"));
    for pod in &pods {
        lab.wait_seen_as(pod, lab::EGRESS4);
        assert_leaves_by_egress(pod);
    }
    lab.assert_nothing_leaked();
}

/// Pods by the CNI plugins `ptp` and `bridge`, as kube-router's and kindnet's are.
#[test]
fn egret_and_kube_routers_rules_respect_each_other() {
    let lab = Lab::scene();
    let each =
        |name: &str, labels| ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("{name}-{n}"), labels));
    let (visitors, others) = (each("visitor", VISITOR), each("other", &[("app", "other")]));
    let write = |allow| {
        for node in lab.nodes() {
            let own = |pod: &&Pod| pod.node.name == node.name;
            kube_router::write(node, &visitors.iter().chain(&others).filter(own).collect::<Vec<_>>(), allow);
        }
    };
    write(true);
    visitors.iter().for_each(assert_leaves_by_egress);
    lab.assert_carries(&visitors);
    let going_on = sessions(&visitors);
    for _ in 0..5 {
        write(true);
        visitors.iter().for_each(assert_leaves_by_egress);
    }
    assert_live("rewritten", going_on);
    lab.assert_nothing_leaked();
    others.iter().for_each(assert_leaves_by_node);

    write(false);
    lab.forget_wire();
    visitors.iter().chain(&others).for_each(assert_blocked);
    lab.assert_nothing_arrives();
    write(true);
    visitors.iter().for_each(assert_leaves_by_egress);
    everywhere(&lab, kube_router::remove);
    visitors.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}
