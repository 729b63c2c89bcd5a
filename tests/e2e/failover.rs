//! Gateway nodes die, freeze, return, and are drained: connections survive, and nothing leaks. Needs root.

use lab::fault_injection::{
    self, THOUSAND, all_of, answered_after, assert_stays, cut, dies, holders, label, owner_and_other, plugged,
    thousand_allocations, three_gateways, tunnel_between, wait_holder,
};
use lab::scene::{assert_blocked, assert_leaves_by_egress, visitors};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EGRESS4, EGRESS6, EXT4, Lab, Pod, VISITOR, manifests};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

/// Stops all of a daemon's threads, or continues them.
fn frozen(lab: &Lab, daemon: &str, frozen: bool) {
    let pid = Pid::from_raw(lab.daemon(daemon).pid().expect("it runs").cast_signed());
    kill(pid, if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }).expect("a signal");
}

/// The longest time during which several nodes had the egress IP, sampled every few milliseconds.
fn longest_double(lab: &Lab, time: Duration) -> Duration {
    let (begin, mut since, mut longest) = (Instant::now(), None, Duration::ZERO);
    while begin.elapsed() < time {
        if holders(lab).len() > 1 {
            let since = *since.get_or_insert_with(Instant::now);
            longest = longest.max(since.elapsed());
        } else {
            since = None;
        }
        thread::sleep(Duration::from_millis(5));
    }
    longest
}

/// Pods on three nodes. One of the nodes is a gateway node that survives.
fn pods(lab: &Lab, other: &str) -> Vec<Pod> {
    ["n1", "n2", other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into()
}

#[test]
fn connections_survive_a_lost_link_and_the_gateway_node_gets_nothing_back() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &other);
    pods.iter().for_each(assert_leaves_by_egress);
    let sessions = sessions(&pods);
    thread::sleep(Duration::from_millis(500));

    let gap = dies(&lab, &owner, &other, &pods);
    thread::sleep(Duration::from_secs(2));
    let longest = assert_live("link down", sessions);
    assert_short(longest, 1500);
    assert_short(gap, 1100);
    let takeovers = |node: &str, reason| lab.metrics(node).get("egret_node_takeovers_total", &[("reason", reason)]);
    assert_eq!((takeovers(&other, "owner_dead"), takeovers(&other, "uplink_lost")), (Some(1.0), Some(0.0)));
    assert_eq!(takeovers(&owner, "owner_dead"), Some(0.0), "the node that was cut off took nothing over");

    let sessions = self::sessions(&pods);
    plugged(&lab, &owner, true);
    assert_stays(&lab, &other, Duration::from_secs(5), || ());
    let longest = assert_live("return", sessions);
    assert_short(longest, 150);
    let returned = lab.add_pod(&owner, "shop", "returned", VISITOR);
    assert_leaves_by_egress(&returned);
    lab.assert_nothing_leaked();
}

#[test]
fn a_daemon_that_dies_moves_nothing() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &other);
    let sessions = sessions(&pods);
    lab.daemon(&owner).kill9();
    assert_stays(&lab, &owner, Duration::from_secs(4), || ());
    lab.daemon(&owner).restart();
    lab.wait_ready(&owner);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(holders(&lab), [owner.as_str()]);
    let longest = assert_live("daemon away", sessions);
    assert_short(longest, 150);
    lab.assert_nothing_leaked();
}

#[test]
fn with_all_gateways_dead_nothing_leaves_and_the_first_one_back_serves() {
    let lab = Lab::scene();
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let (owner, other) = owner_and_other(&lab);
    plugged(&lab, &owner, false);
    plugged(&lab, &other, false);
    thread::sleep(Duration::from_secs(2));
    lab.forget_wire();
    pods.iter().for_each(assert_blocked);
    lab.assert_nothing_arrives();
    for gateway in [&other, &owner] {
        plugged(&lab, gateway, true);
        let begin = Instant::now();
        for pod in &pods {
            println!("{gateway} is back: {} is answered after {:?}", pod.name, answered_after(pod, begin));
            lab.wait_seen_as(pod, EGRESS6);
        }
    }
    thread::sleep(Duration::from_secs(2));
    pods.iter().for_each(assert_leaves_by_egress);
    assert_eq!(holders(&lab), [other.as_str()], "who was first keeps it");
    lab.assert_nothing_leaked();
}

#[test]
fn a_frozen_gateway_node_gives_up_taken_over_egress_ips_when_it_continues() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &other);
    let sessions = sessions(&pods);
    cut(&lab, &all_of(&owner));
    frozen(&lab, &owner, true);
    let gap = answered_after(&pods[0], Instant::now());
    println!("new packets are answered after {gap:?}");
    thread::sleep(Duration::from_secs(2));
    assert_eq!(holders(&lab).len(), 2, "it cannot know");
    cut(&lab, &[]);
    frozen(&lab, &owner, false);
    let double = longest_double(&lab, Duration::from_secs(3));
    println!("the address was on two nodes for {double:?}");
    assert_short(double, 600);
    assert_eq!(holders(&lab), [other.as_str()]);
    let longest = assert_live("frozen", sessions);
    assert_short(longest, 1500);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_node_that_was_cut_off_gives_up_taken_over_egress_ips() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &other);
    let sessions = sessions(&pods);
    cut(&lab, &all_of(&owner));
    lab.wait_until("the other one has it", Duration::from_secs(5), || holders(&lab).contains(&other));
    thread::sleep(Duration::from_secs(2));
    cut(&lab, &[]);
    let double = longest_double(&lab, Duration::from_secs(3));
    println!("the address was on two nodes for {double:?}");
    assert_short(double, 600);
    assert_eq!(holders(&lab), [other.as_str()]);
    let longest = assert_live("cut off", sessions);
    assert_short(longest, 1500);
    let changes = lab.daemon("controller").log().matches("wrote the allocations").count();
    assert!(changes < 6, "the two claimed the egress IP by turns: the allocations were written {changes} times");
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_node_that_only_the_other_one_does_not_reach_keeps_its_egress_ip() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &owner);
    let sessions = sessions(&pods);
    cut(&lab, &tunnel_between(&owner, &other));
    // The other one asks the link, which says who has it.
    assert_stays(&lab, &owner, Duration::from_secs(4), || ());
    pods.iter().for_each(assert_leaves_by_egress);
    cut(&lab, &[]);
    thread::sleep(Duration::from_secs(2));
    assert_eq!(holders(&lab), [owner.as_str()]);
    let longest = assert_live("gateways apart", sessions);
    assert_short(longest, 150);
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_node_that_one_source_node_does_not_reach_keeps_its_egress_ip_and_serves_the_others() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let [apart, n2] = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let sessions = sessions(std::slice::from_ref(&n2));
    cut(&lab, &tunnel_between(&owner, "n1"));
    thread::sleep(Duration::from_secs(2));
    assert_blocked(&apart);
    assert_stays(&lab, &owner, Duration::from_secs(2), || ());
    let longest = assert_live("seen by the others", sessions);
    assert_short(longest, 150);
    cut(&lab, &[]);
    println!("the source node sees it again: answered after {:?}", answered_after(&apart, Instant::now()));
    assert_leaves_by_egress(&apart);
    lab.assert_nothing_leaked();
}

#[test]
fn a_flapping_link_of_a_source_node_moves_nothing_and_breaks_nothing() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &other);
    let sessions = sessions(&pods);
    for away in [100, 400, 800, 1500] {
        plugged(&lab, "n1", false);
        thread::sleep(Duration::from_millis(away));
        plugged(&lab, "n1", true);
        let back = answered_after(&pods[0], Instant::now());
        println!("after {away} ms without a link: answered after {back:?}");
        assert_eq!(holders(&lab), [owner.as_str()]);
        thread::sleep(Duration::from_millis(500));
    }
    assert_live("flapping", sessions);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}

#[test]
fn an_egress_ip_that_is_removed_by_hand_is_back_within_a_second() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    for address in [IpAddr::from(EGRESS4), EGRESS6.into()] {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        lab.node(&owner).ip(&format!("addr del {address}/{prefix} dev eth0"));
        let begin = Instant::now();
        lab.wait_until("the address is back", Duration::from_secs(1), || {
            lab.node(&owner).ip("-o addr").contains(&format!(" {address}/{prefix} "))
        });
        println!("{address} is back after {:?}", begin.elapsed());
    }
    assert_eq!(holders(&lab), [owner.as_str()]);
}

#[test]
fn an_egress_ip_that_another_host_has_is_not_taken_until_that_host_is_gone() {
    let lab = Lab::scene();
    let ext = lab.host("ext");
    ext.ip_batch(&["addr add 192.0.2.57/32 dev eth0".into(), "addr add 2001:db8::57/128 dev eth0 nodad".into()]);
    let spec = "podSelector: { matchLabels: { app: late } }\n  address: { ipv4: 192.0.2.57, ipv6: \"2001:db8::57\" }";
    lab.write_manifest("late.yaml", &manifests::policy("shop", "late", spec));
    let pod = lab.add_pod("n1", "shop", "late", &[("app", "late")]);
    let is_told = || lab.manifests().statuses().contains("answers for it on the link");
    lab.wait_until("the policy is told who has its address", Duration::from_secs(5), is_told);
    let has = |address: &str| lab.nodes().iter().any(|n| n.ip("-o addr").contains(address));
    assert!(!has(" 192.0.2.57/32 ") && !has(" 2001:db8::57/128 "));
    assert!(pod.udp_who(EXT4).is_err(), "blocked, not leaked");
    assert!(!lab.sources(EXT4).contains(&pod.node.ipv4().into()));
    ext.ip_batch(&["addr del 192.0.2.57/32 dev eth0".into(), "addr del 2001:db8::57/128 dev eth0".into()]);
    lab.wait_seen_as(&pod, [192, 0, 2, 57]);
    lab.wait_until("the policy is told that it has its address", Duration::from_secs(5), || !is_told());
}

#[test]
fn two_of_three_gateway_nodes_die_one_after_the_other() {
    let (lab, pod) = three_gateways();
    let sessions = sessions(std::slice::from_ref(&pod));
    for _ in 0..2 {
        let dying = holders(&lab).remove(0);
        plugged(&lab, &dying, false);
        println!("{dying} dies: answered after {:?}", answered_after(&pod, Instant::now()));
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(holders(&lab).len(), 1);
    }
    let longest = assert_live("two of three", sessions);
    assert_short(longest, 1700);
    lab.assert_nothing_leaked();
}

#[test]
fn egress_ips_leave_a_drained_or_removed_gateway_node_without_a_pause() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2", &owner, &other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let sessions = sessions(&pods);
    let floods: Vec<_> = pods.iter().map(|p| p.flood(EXT4, Duration::from_millis(5), false)).collect();
    thread::sleep(Duration::from_millis(300));
    let moves: [(&str, &str, manifests::Labels); 4] = [
        (&owner, &other, &[("egret.dev/drain", "true")]),
        (&other, &owner, &[("egret.dev/gateway", "no")]),
        (&owner, &other, &[("egret.dev/drain", "true")]),
        (&other, &owner, &[("egret.dev/drain", "true")]),
    ];
    for (from, to, labels) in moves {
        label(&lab, to, &[]);
        // A drained node counts as dead until it answers again.
        thread::sleep(Duration::from_millis(1500));
        label(&lab, from, labels);
        wait_holder(&lab, to);
        thread::sleep(Duration::from_millis(500));
        assert_eq!(holders(&lab), [to]);
        pods.iter().for_each(assert_leaves_by_egress);
    }
    let longest = assert_live("moved on purpose", sessions);
    for flood in floods {
        let report = flood.stop();
        println!("moved on purpose: {} of {} packets lost", report.lost(), report.sent);
        assert!(report.lost() * 100 < report.sent, "of four moves, each of which would lose more");
    }
    assert_short(longest, 50);
    for gateway in ["g1", "g2"] {
        let drops = lab.node(gateway).egret_drops();
        assert!(!drops.contains("stale"), "connections of {gateway}'s own pods were translated as before: {drops}");
    }
    lab.assert_nothing_leaked();
}

#[test]
fn an_allocation_is_moved_by_hand() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let sessions = sessions(&pods);
    let policy = visitors();
    for node in [&other, &owner] {
        let asking =
            policy.replacen("metadata: {", &format!("metadata: {{ annotations: {{ egret.dev/move-to: {node} }},"), 1);
        lab.write_manifest("policy.yaml", &asking);
        wait_holder(&lab, node);
        pods.iter().for_each(assert_leaves_by_egress);
        thread::sleep(Duration::from_millis(500));
    }
    lab.write_manifest("policy.yaml", &policy);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(holders(&lab), [owner], "it stays when nothing is asked for any more");
    assert_short(assert_live("moved by hand", sessions), 50);
    lab.assert_nothing_leaked();
}

#[test]
fn a_thousand_allocations_move_at_once() {
    let _machine = lab::turn::alone();
    let lab = thousand_allocations();
    let held = |node: &str| fault_injection::held(&lab, node);
    let pods = ["n1", "n2", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(|pod| {
        lab.wait_until(&format!("{} is answered", pod.name), Duration::from_secs(20), || pod.udp_who(EXT4).is_ok())
    });
    let before = pods[0].who(EXT4).expect("an answer");
    let sessions = sessions(&pods);
    thread::sleep(Duration::from_secs(2));

    plugged(&lab, "g1", false);
    let begin = Instant::now();
    let gap = answered_after(&pods[0], begin);
    println!("a thousand allocations: answered after {gap:?}");
    lab.wait_for("addresses on g2:", &THOUSAND, || held("g2"));
    println!("a thousand allocations: all addresses are on the other node after {:?}", begin.elapsed());
    thread::sleep(Duration::from_secs(2));
    let longest = assert_live("a thousand allocations", sessions);
    assert_eq!(pods[0].who(EXT4).expect("an answer"), before);
    plugged(&lab, "g1", true);
    thread::sleep(Duration::from_secs(4));
    assert_eq!((held("g1"), held("g2")), (0, THOUSAND));
    assert_short(gap, 1300);
    assert_short(longest, 1700);
}

/// The node could take the allocations over, but its link is back before it has probed for other owners.
#[test]
fn a_gateway_node_without_egress_ips_that_loses_its_link_for_a_moment_interrupts_nothing() {
    let (lab, pod) = three_gateways();
    let owner = holders(&lab).pop().expect("an owner");
    let bystander = ["g1", "g2", "g3"].into_iter().find(|name| *name != owner).expect("another gateway");
    let sessions = sessions(std::slice::from_ref(&pod));
    for milliseconds in [300, 600, 900, 1200] {
        plugged(&lab, bystander, false);
        thread::sleep(Duration::from_millis(milliseconds));
        plugged(&lab, bystander, true);
        thread::sleep(Duration::from_millis(2500));
    }
    let longest = assert_live("a bystander's link", sessions);
    assert_short(longest, 500);
    assert_eq!(holders(&lab), [owner]);
}
