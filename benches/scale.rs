//! `egretd node` in a big cluster: how much memory it takes, how long it takes to start, and how soon a change is in
//! the kernel. On a source node and on a gateway's node.

mod harness;

use harness::{Bound, Memory, Table, cluster, mb, median, pods, start};
use lab::{Daemon, Lab, Node, NodeSpec, Pods};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::iter;
use std::time::{Duration, Instant};

const NODES: usize = 5_000;
const POLICIES: usize = 10_000;
const LOCAL_PODS: usize = 250;
/// Nodes of the gateway, each with its part of the allocations. Only the first one is real.
const GATEWAYS: usize = 3;
const STARTS: usize = 5;
/// An even number: the last one makes the policy what it was.
const CHANGES: usize = 20;
/// What is asked for.
const MEMORY: f64 = 20e6;
const START: Duration = Duration::from_secs(2);
const CHANGE: Duration = Duration::from_millis(50);
/// `NFNLGRP_NFTABLES`, include/uapi/linux/netfilter/nfnetlink.h.
const NFNLGRP_NFTABLES: u32 = 7;

fn main() {
    harness::begin(&format!("{NODES} nodes, {POLICIES} policies and allocations, {LOCAL_PODS} pods on the node"));
    let lab = Lab::builder()
        .nodes(vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)])
        .build();
    let directory = lab.manifests().path();
    cluster::write_nodes(directory, NODES - lab.nodes().len());
    cluster::write_policies(&lab, POLICIES);
    for node in lab.nodes() {
        pods::populate(&lab, &node.name, LOCAL_PODS);
    }
    let others: Vec<String> = (0..GATEWAYS - 1).map(cluster::node_name).collect();
    let gateways: Vec<&str> = iter::once("g1").chain(others.iter().map(String::as_str)).collect();
    cluster::write_gateway(directory, POLICIES, &gateways);
    // Each knows the other's end of the tunnel before anything is measured.
    for node in lab.nodes() {
        start(&lab, node).1.kill9();
    }
    for (node, role) in lab.nodes().iter().zip(["a source node", "one of three gateways"]) {
        measure(&lab, node, role);
    }
}

fn measure(lab: &Lab, node: &Node, role: &str) {
    // An empty kernel and a full one take turns.
    let (mut first, mut placed, mut again, mut nft) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut last = None;
    for _ in 0..STARTS {
        if let Some(daemon) = last.take() {
            Daemon::kill9(&daemon);
        }
        forget(node);
        let (took, daemon) = start(lab, node);
        first.push(took);
        placed.push(took + until_placed(lab, node));
        daemon.kill9();
        nft.push(by_nft(node));
        let (took, daemon) = start(lab, node);
        again.push(took);
        last = Some(daemon);
    }
    let Some(daemon) = last else { return };
    until_placed(lab, node);
    std::thread::sleep(Duration::from_secs(3));
    let begun = Memory::of(&daemon);
    let (mut changes, mut busy) = (Vec::new(), begun);
    for n in 0..CHANGES {
        changes.push(change(lab, node, n));
        let now = Memory::of(&daemon);
        busy = if now.resident > busy.resident { now } else { busy };
    }
    // Long enough for whatever is done some time after a change.
    std::thread::sleep(Duration::from_secs(3));
    let rest = Memory::of(&daemon);

    let mut table = Table::default();
    let mut row = |what: &str, figure: String, ratio, bound| table.row(what, figure, ratio, bound);
    let mut resident = |what: &str, memory: Memory, bound| {
        row(&format!("resident {what}"), mb(memory.resident), memory.resident / MEMORY, bound);
        row("of that, pages of the program's file", mb(memory.file), memory.file / MEMORY, Bound::None);
    };
    resident("after the start", begun, Bound::AtMost(1.0));
    resident(&format!("after {CHANGES} changes"), rest, Bound::AtMost(1.0));
    resident("right after one of the changes, at most", busy, Bound::None);
    row("at its peak", mb(rest.peak), rest.peak / MEMORY, Bound::None);
    let of_start = |t: Duration| t.as_secs_f64() / START.as_secs_f64();
    let (first, placed, again, nft) = (median(&first), median(&placed), median(&again), median(&nft));
    row("start, until an empty kernel is in sync", harness::ms(first), of_start(first), Bound::AtMost(1.0));
    row("and the egress addresses, asked for, are here", harness::ms(placed), of_start(placed), Bound::None);
    row("start, the kernel is in sync already", harness::ms(again), of_start(again), Bound::AtMost(1.0));
    row("for comparison: `nft -f` of the same tables", harness::ms(nft), of_start(nft), Bound::None);
    let change = median(&changes);
    row(
        "a policy's change, until the kernel has it",
        harness::ms(change),
        change.as_secs_f64() / CHANGE.as_secs_f64(),
        Bound::AtMost(1.0),
    );
    println!("On {role}:\n");
    table.print(["", "median", "of what is allowed"]);
    daemon.kill9();
}

/// Waits until the node has all egress addresses that the allocations give it. It asks the link for each before.
fn until_placed(lab: &Lab, node: &Node) -> Duration {
    let wanted = if node.spec.gateway { POLICIES.div_ceil(GATEWAYS) } else { 0 };
    let begin = Instant::now();
    lab.wait_until("the egress addresses are on the node", Duration::from_secs(60), || {
        let addresses = node.run(["ip", "-o", "-4", "addr", "show", "dev", "eth0"]);
        addresses.lines().filter(|l| l.contains("198.18.")).count() == wanted
    });
    begin.elapsed()
}

/// Takes everything of Egret's out of the node's kernel.
fn forget(node: &Node) {
    node.try_run(["ip", "link", "del", "egret"]);
    node.try_run(["nft", "delete table inet egret; delete table netdev egret"]);
    node.try_run(["ip", "addr", "flush", "dev", "eth0", "to", "198.18.0.0/15"]);
    for family in ["-4", "-6"] {
        for table in ["7871", "7872", "7873"] {
            node.try_run(["ip", family, "route", "flush", "table", table]);
        }
    }
}

/// What the tool `nft` takes to load the tables that the kernel holds now, in one transaction.
fn by_nft(node: &Node) -> Duration {
    let text = format!("delete table inet egret; delete table netdev egret;\n{}", node.egret_tables());
    let begin = Instant::now();
    node.nft(&text);
    begin.elapsed()
}

/// Rewrites the file of the first policy, which selects a pod of the node, and waits until the kernel tells of a
/// transaction.
fn change(lab: &Lab, node: &Node, n: usize) -> Duration {
    let socket = node.within(|| {
        let mut socket = Socket::new(12).expect("NETLINK_NETFILTER");
        socket.bind(&SocketAddr::new(0, 0)).expect("bind");
        socket.add_membership(NFNLGRP_NFTABLES).expect("the group of nf_tables");
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).expect("SO_RCVTIMEO");
        socket
    });
    let networks = [if n.is_multiple_of(2) { "198.51.100.0/24" } else { "203.0.113.0/24" }];
    let begin = Instant::now();
    lab.write_manifest("first.yaml", &cluster::policy(0).manifest(&networks));
    #[allow(clippy::disallowed_methods, reason = "a notification, no dump")]
    socket.recv_from_full().expect("a notification");
    let took = begin.elapsed();
    let tables = node.run(["nft", "list", "table", "inet", "egret"]);
    assert!(tables.contains(&networks[0].to_string()), "the kernel has another change than was asked for");
    std::thread::sleep(Duration::from_millis(100));
    took
}
