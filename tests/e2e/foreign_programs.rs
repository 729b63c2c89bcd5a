//! Other CNIs' eBPF at pods' veths, which can take packets past nf_tables. Needs root.

use lab::redirecting::Program;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::{EXT4, EXT6, Lab, Server, VISITOR, manifests};
use std::thread;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

/// What the condition of the only node with one says.
fn says(lab: &Lab, status: &str) -> bool {
    let statuses = lab.manifests().statuses();
    let condition = statuses.split("type: PodsArrive").nth(1).unwrap_or_default();
    condition.lines().take(3).any(|line| line.contains("status:") && line.contains(status))
}

/// The outside can answer pods that leave with their own addresses.
fn route_to_pods(lab: &Lab) {
    for node in lab.nodes() {
        let ext = lab.host("ext");
        ext.ip(&format!("route add {} via {}", node.pods4(), node.ipv4()));
        ext.ip(&format!("route add {} via {}", node.pods6(), node.ipv6()));
    }
}

fn nothing_leaks_past_nf_tables(program: Program) {
    let lab = Lab::scene();
    route_to_pods(&lab);
    lab.redirect("n1", program);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_blocked(&pod);
    lab.assert_nothing_arrives();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()), "what stays in the cluster passes");
    if program == Program::Neigh {
        // The kernel's look-up for programs does not know `throw` routes of IPv6 (`fib6_rule_action_alt`).
        assert_eq!(pod.who(inside.ipv6()).ok(), Some(pod.ipv6().into()), "what stays in the cluster passes");
    }
    let other = lab.add_pod("n1", "office", "other", &[]);
    assert_eq!(other.who(EXT4).ok(), Some(other.ipv4().into()), "a pod without a policy leaves as before");
    assert_eq!(other.who(EXT6).ok(), Some(other.ipv6().into()), "a pod without a policy leaves as before");
    lab.wait_until("the node says that packets do not arrive", SOON, || says(&lab, "False"));
    lab.forget_wire();
    thread::sleep(Duration::from_secs(2));
    assert_blocked(&pod);
    lab.assert_nothing_arrives();

    // The administrator follows the advice.
    lab.redirect_pod(&pod, Program::Stack);
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_until("the node says that packets arrive", SOON, || says(&lab, "True"));
    thread::sleep(Duration::from_secs(2));
    assert_leaves_by_egress(&pod);
    lab.assert_nothing_leaked();
    pod.delete();
    lab.wait_until("no rule is left", SOON, || !lab.node("n1").ip("rule").contains("lookup 7875"));
}

#[test]
fn packets_that_a_program_sends_to_the_uplink_do_not_leak() {
    nothing_leaks_past_nf_tables(Program::Neigh);
}

#[test]
fn packets_whose_route_a_program_looks_up_do_not_leak() {
    nothing_leaks_past_nf_tables(Program::Fib);
}

#[test]
fn a_pod_that_starts_while_the_daemon_is_away_does_not_leak_by_a_program() {
    for program in [Program::Neigh, Program::Fib] {
        let lab = Lab::scene();
        route_to_pods(&lab);
        lab.redirect("n1", program);
        lab.daemon("n1").kill9();
        let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
        assert_blocked(&pod);
        lab.assert_nothing_arrives();
        lab.daemon("n1").restart();
        lab.wait_ready("n1");
        assert_blocked(&pod);
        lab.assert_nothing_arrives();
    }
}

#[test]
fn under_a_program_that_leaves_packets_to_the_stack_all_is_as_without_it() {
    let lab = Lab::scene();
    lab.redirect("n1", Program::Stack);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    lab.assert_nothing_leaked();
    let elsewhere =
        "podSelector: { matchLabels: { app: picky } }\n  egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24 } }] }]";
    lab.write_manifest("picky.yaml", &manifests::policy("shop", "picky", elsewhere));
    thread::sleep(Duration::from_secs(1));
    let picky = lab.add_pod("n1", "shop", "picky", &[("app", "picky")]);
    assert_leaves_by_node(&picky);
    lab.wait_until("the node says that packets arrive", SOON, || says(&lab, "True"));
    assert_leaves_by_node(&picky);
    assert_leaves_by_egress(&pod);
}

/// Cilium's identities are random in the bits that are Egret's.
#[test]
fn marks_of_cilium_on_pods_without_a_policy_are_not_taken_for_egrets() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    node.ip("link add cilium_host type veth peer name cilium_net");
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_until("the daemon knows it", SOON, || {
        node.run(["nft", "list", "table", "inet", "egret"]).contains("meta mark set 0x00000000")
    });
    lab.redirect("n1", Program::Stack);
    let other = lab.add_pod("n1", "office", "other", &[]);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    for identity in [0x1234_0f00_u32, 0x4321_0f00, 0x8000_0f00, 0x9abc_0f00, 0xc001_0f00, 0xffff_0f00] {
        node.nft("add table inet cilium");
        node.nft("add chain inet cilium marks { type filter hook prerouting priority -95; }");
        node.nft(&format!("add rule inet cilium marks iifname {{ {}, {} }} meta mark & 0xc0000000 != 0x40000000 meta mark set {identity:#x}", other.host_interface(), pod.host_interface()));
        assert_leaves_by_node(&other);
        assert_leaves_by_egress(&pod);
        node.nft("delete table inet cilium");
    }
}
