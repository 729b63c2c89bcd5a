//! Loss, latency, reordering and jitter, by netem on every node's interface to the others.

use lab::fault_injection::{answered_after, cordoned, dies, holders, owner_and_other, plugged, wait_holder};
use lab::scene::egress_towards;
use lab::survival::{assert_live, sessions};
use lab::{EXT4, Lab, Pod, SERVERS, VISITOR};
use std::thread;
use std::time::{Duration, Instant};

/// How long nothing may move.
const LONG: Duration = Duration::from_secs(300);

/// From now on these hosts' interfaces do that to every packet which they send.
fn impaired(lab: &Lab, hosts: &[&str], how: &str) {
    for name in hosts {
        let arguments = format!("qdisc replace dev eth0 root netem limit 10000 {how}");
        let host = lab.nodes().iter().find(|node| node.name == *name).map_or_else(|| lab.host(name), |node| &node.host);
        host.run(["tc"].into_iter().chain(arguments.split(' ')));
    }
}

const NODES: [&str; 4] = ["n1", "n2", "g1", "g2"];
const ALL: [&str; 5] = ["n1", "n2", "g1", "g2", "ext"];

fn scene() -> (Lab, Vec<Pod>, String, String) {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = NODES.map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into();
    (lab, pods, owner, other)
}

/// For some time: the egress IP stays on its node, and every answer says that the pod left from it.
fn nothing_moves(lab: &Lab, pods: &[Pod], owner: &str, time: Duration, least_answered: u64) {
    let both = pods.iter().flat_map(|pod| SERVERS.map(|server| (pod, server)));
    let floods: Vec<_> = both.map(|(p, s)| (p, s, p.flood(s, Duration::from_millis(200), false))).collect();
    let begin = Instant::now();
    while begin.elapsed() < time {
        assert_eq!(holders(lab), [owner], "after {:?}", begin.elapsed());
        thread::sleep(Duration::from_secs(1));
    }
    for (pod, server, flood) in floods {
        let (what, report) = (format!("{} to {server}", pod.name), flood.stop());
        println!("{what}: {} of {} answered, gap {:?}", report.answered, report.sent, report.longest_gap);
        assert_eq!(report.seen_as, [egress_towards(server)].into(), "{what}");
        assert!(report.answered * 100 > report.sent * least_answered, "{what}: {report:?}");
    }
    for node in lab.nodes() {
        for reason in ["owner_dead", "uplink_lost"] {
            let taken = lab.metrics(&node.name).get("egret_node_takeovers_total", &[("reason", reason)]);
            assert_eq!(taken.unwrap_or_default(), 0.0, "{} took an egress IP over: {reason}", node.name);
        }
        let log = lab.daemon(&node.name).log();
        for line in log.lines().filter(|line| line.contains("does not answer") || line.contains("has lost a family")) {
            println!("{}: {line}", node.name);
        }
    }
    lab.assert_nothing_leaked();
}

/// Each direction of each path loses that many packets in a hundred: between nodes, and on the uplinks.
fn loss(percent: u64, least_answered: u64) {
    let (lab, pods, owner, _) = scene();
    let going_on = sessions(&pods);
    impaired(&lab, &ALL, &format!("loss random {percent}%"));
    nothing_moves(&lab, &pods, &owner, LONG, least_answered);
    assert_live("loss", going_on);
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn five_percent_loss_in_each_direction_moves_nothing_in_five_minutes() {
    loss(5, 70);
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn twenty_percent_loss_in_each_direction_moves_nothing_in_five_minutes() {
    loss(20, 30);
}

/// The owner dies where a packet from one node to another takes half of the round trip.
fn failover_at(round_trip: u64) {
    let (lab, pods, owner, other) = scene();
    impaired(&lab, &NODES, &format!("delay {}ms", round_trip / 2));
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    // What the nodes know of the path's round trip.
    nothing_moves(&lab, &others, &owner, Duration::from_secs(20), 95);
    let going_on = sessions(&others);
    let gap = dies_slowly(&lab, &owner, &other, &others);
    thread::sleep(Duration::from_secs(3));
    let longest = assert_live("the owner's death", going_on);
    println!("round trip {round_trip} ms: a session was silent for {longest:?}, new packets after {gap:?}");
    // 0.4 to 0.7 s, what one emulated processor for all nodes adds, and what the round trip adds to the wait for a reply
    // (1.7 s at 0.4 s), to ARP and to the packet.
    assert!(gap < Duration::from_millis(2000 + 5 * round_trip), "{gap:?}");
    // A TCP sender repeats after a time that doubles.
    assert!(longest < 2 * Duration::from_millis(2500 + 5 * round_trip), "{longest:?}");
    lab.assert_nothing_leaked();
}

/// As [`dies`], where an answer may take longer than the second that a first packet is given, or get lost: where each of
/// four hops loses a fifth, two requests in five are answered, and each is waited for for five seconds.
fn dies_slowly(lab: &Lab, owner: &str, other: &str, pods: &[Pod]) -> Duration {
    plugged(lab, owner, false);
    let gap = answered_after(&pods[0], Instant::now());
    wait_holder(lab, other);
    for pod in pods {
        for server in SERVERS {
            lab.wait_until(&format!("{} is answered by {server}", pod.name), Duration::from_secs(90), || {
                pod.udp_who_patiently(server).ok() == Some(egress_towards(server))
            });
        }
    }
    gap
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn the_owner_dies_at_a_round_trip_of_60_ms() {
    failover_at(60);
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn the_owner_dies_at_a_round_trip_of_200_ms() {
    failover_at(200);
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn the_owner_dies_at_a_round_trip_of_400_ms() {
    failover_at(400);
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn the_owner_dies_on_lines_that_lose_a_fifth_of_all_packets() {
    let (lab, pods, owner, other) = scene();
    impaired(&lab, &ALL, "loss random 20%");
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    nothing_moves(&lab, &others, &owner, Duration::from_secs(30), 30);
    let gap = dies_slowly(&lab, &owner, &other, &others);
    println!("a fifth is lost: new packets are answered after {gap:?}");
    assert!(gap < Duration::from_millis(4000), "{gap:?}");
    lab.assert_nothing_leaked();
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn reordering_and_jitter_move_nothing_and_break_nothing() {
    let (lab, pods, owner, other) = scene();
    impaired(&lab, &ALL, "delay 30ms 25ms reorder 25% 50%");
    let going_on = sessions(&pods);
    nothing_moves(&lab, &pods, &owner, Duration::from_secs(60), 95);
    assert_live("reordering", going_on);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    let gap = dies(&lab, &owner, &other, &others);
    assert!(gap < Duration::from_millis(2500), "{gap:?}");
    lab.assert_nothing_leaked();
}

#[test]
#[ignore = "needs netem: make vm-test"]
fn a_planned_move_loses_nothing_at_a_round_trip_of_200_ms() {
    let (lab, pods, owner, other) = scene();
    impaired(&lab, &NODES, "delay 100ms");
    let going_on = sessions(&pods);
    let floods: Vec<_> = pods.iter().map(|pod| pod.flood(EXT4, Duration::from_millis(20), false)).collect();
    thread::sleep(Duration::from_secs(5));
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(5));
    for (pod, flood) in pods.iter().zip(floods) {
        let report = flood.stop();
        println!("{}: {} of {} packets lost", pod.name, report.lost(), report.sent);
        assert!(report.lost() * 100 <= report.sent, "{}: {report:?}", pod.name);
    }
    println!("moved at 200 ms: longest pause {:?}", assert_live("a planned move", going_on));
    lab.assert_nothing_leaked();
}
