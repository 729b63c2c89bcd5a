//! Tests of what is said of a packet's way.

use super::*;
use crate::ctl::output::{Show, View};
use crate::fixture::trace_request;
use crate::model::trace::EgressIp;

fn armed(dropped: Option<&str>) -> Armed {
    let addresses = vec!["192.0.2.50".parse().unwrap()];
    let node = dropped.is_none().then(|| "g1".to_owned());
    let egress_ips = vec![EgressIp { addresses, node, dropped: dropped.map(str::to_owned) }];
    Armed { node: "n1".into(), egress_ips, ..Armed::default() }
}

/// A step of a packet in a chain of Egret's that it enters with these ends.
fn step(packet: u32, chain: &str, rule: &str, verdict: &str, ends: [&str; 2], output: Option<&str>) -> TraceStep {
    let [source, destination] = ends.map(|end| end.parse::<std::net::SocketAddr>().unwrap());
    let is_reply = destination.port() >= 60_000 || destination.port() == 40_000 || destination.port() == 40_001;
    let flow = Flow {
        protocol: 6,
        source: source.ip(),
        source_port: source.port(),
        destination: destination.ip(),
        destination_port: destination.port(),
        what: if is_reply { "SYN,ACK" } else { "SYN" }.into(),
    };
    TraceStep {
        at: 1500 * u64::from(packet),
        packet,
        is_reply,
        table: "inet egret".into(),
        chain: chain.into(),
        rule: Some(rule.into()),
        verdict: verdict.into(),
        flow: Some(flow),
        input: Some("in0".into()),
        output: output.map(str::to_owned),
    }
}

const POD: &str = "10.244.1.2:61000";
const SERVER: &str = "192.0.2.100:443";
const EGRESS: &str = "192.0.2.50:61000";

fn way(of: Vec<(&str, TraceStep)>, of_pod: &Armed, source_port: Option<u16>) -> Traced {
    let mut collected = Collected::default();
    let request = trace_request(source_port);
    for (node, step) in of {
        collected.add(node, step, &request);
    }
    traced(&request, of_pod, collected, Vec::new())
}

fn out() -> Vec<(&'static str, TraceStep)> {
    vec![
        ("n1", step(1, "pod", "accept", "accept", [POD, SERVER], None)),
        ("n1", step(1, "egress-guard", "goto tunnel", "goto tunnel", [POD, SERVER], Some("egret"))),
    ]
}

fn at_owner() -> Vec<(&'static str, TraceStep)> {
    vec![
        ("g1", step(2, "from-tunnel", "accept", "accept", [POD, SERVER], None)),
        ("g1", step(2, "egress-guard", "accept", "accept", [EGRESS, SERVER], Some("eth0"))),
    ]
}

#[test]
fn an_answered_packet_has_its_egress_address_and_a_way_out_and_back() {
    let mut all = out();
    all.extend(at_owner());
    all.push(("n1", step(4, "from-tunnel", "accept", "accept", [SERVER, POD], None)));
    all.push(("g1", step(3, "prerouting", "accept", "accept", [SERVER, EGRESS], None)));
    // The server sends its answer again.
    all.push(("g1", step(7, "prerouting", "accept", "accept", [SERVER, EGRESS], None)));
    let traced = way(all, &armed(None), Some(61_000));
    assert_eq!(traced.outcome, PacketOutcome::Answered);
    assert_eq!(traced.message, "192.0.2.100 answered with SYN,ACK after 4.5 ms");
    let egress = Egress { node: "g1".into(), address: "192.0.2.50".parse().unwrap(), port: 61_000 };
    assert_eq!(traced.egress, Some(egress));
    let order: Vec<(&str, bool, usize)> =
        traced.way.iter().map(|hop| (&*hop.node, hop.is_reply, hop.steps.len())).collect();
    assert_eq!(order, [("n1", false, 2), ("g1", false, 2), ("g1", true, 1), ("n1", true, 1)]);
    let text = traced.text(View::default());
    assert!(
        text.contains(
            "packet on node g1, in by in0, out by eth0: 10.244.1.2:61000 -> 192.0.2.100:443, now 192.0.2.50:61000"
        ),
        "{text}"
    );
}

#[test]
fn where_a_packet_ends_is_told_with_the_remedy() {
    let blocked = "counter name \"blocked\" drop";
    let dropped = vec![("n1", step(1, "known", blocked, "drop", [POD, SERVER], None))];
    let traced = way(dropped, &armed(Some("no gateway node is alive")), Some(61_000));
    assert_eq!(traced.outcome, PacketOutcome::Dropped);
    assert!(traced.message.contains("node n1: chain known of table inet egret dropped it"), "{}", traced.message);
    assert!(traced.remedy.unwrap().contains("192.0.2.50 are dropped: no gateway node is alive"));

    let foreign =
        TraceStep { table: "inet firewalld".into(), ..step(2, "forward", "handle 7", "drop", [POD, SERVER], None) };
    let traced = way([out(), vec![("g1", foreign)]].concat(), &armed(None), Some(61_000));
    assert!(traced.remedy.unwrap().contains("nft -a list table inet firewalld"));

    for (steps, outcome, words) in [
        (vec![], PacketOutcome::NotSent, "did not come in by the pod's veth"),
        (out()[..1].to_vec(), PacketOutcome::Lost, "ended on node n1 behind chain pod"),
        (out(), PacketOutcome::Lost, "and did not come to g1"),
        ([out(), at_owner()[..1].to_vec()].concat(), PacketOutcome::Lost, "ended on node g1 behind chain from-tunnel"),
        (
            [out(), at_owner()].concat(),
            PacketOutcome::NotAnswered,
            "it left node g1 from 192.0.2.50:61000, and no reply came",
        ),
    ] {
        let traced = way(steps, &armed(None), Some(61_000));
        assert_eq!(traced.outcome, outcome, "{}", traced.message);
        assert!(traced.message.contains(words) && traced.remedy.is_some(), "{}", traced.message);
    }
}

#[test]
fn of_what_the_owner_saw_while_it_waited_only_the_pods_packet_is_told() {
    let pods = ["10.244.1.2:40000", "10.244.1.2:40001"];
    let steps = vec![
        ("g1", step(5, "from-tunnel", "other", "accept", [pods[1], SERVER], None)),
        ("n1", step(1, "pod", "accept", "accept", [pods[0], SERVER], Some("egret"))),
        ("g1", step(6, "from-tunnel", "own", "accept", [pods[0], SERVER], Some("eth0"))),
        ("g1", step(8, "prerouting", "other", "accept", [SERVER, pods[1]], None)),
        ("g1", step(9, "prerouting", "own", "accept", [SERVER, pods[0]], None)),
    ];
    let traced = way(steps, &armed(None), None);
    let rules: Vec<&str> =
        traced.way.iter().filter(|hop| hop.node == "g1").map(|hop| hop.steps[0].rule.as_deref().unwrap()).collect();
    assert_eq!(rules, ["own", "own"]);
    assert_eq!(traced.source, pods[0]);
}
