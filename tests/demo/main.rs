//! `make demo`: Egret at work on this machine, without a cluster. Nodes, gateways and a server outside are network
//! namespaces; everything else is as on real nodes. The exit code is 0 only if every row is as promised.

mod table;

use lab::{EXT4, EXT6, Lab, NodeSpec, Pod, Pods, manifests};
use std::net::IpAddr;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};
use table::{Row, Table};

const EGRESS4: &str = "192.0.2.50";
const EGRESS6: &str = "2001:db8::50";

fn main() -> ExitCode {
    let begin = Instant::now();
    lab::machine::print_no_notes();
    let right = demo();
    println!();
    if right {
        println!("Everything is as promised ({:.1} s). All of it is deleted again.", begin.elapsed().as_secs_f32());
        ExitCode::SUCCESS
    } else {
        println!("NOT everything is as promised: see the rows marked WRONG. All of it is deleted again.");
        ExitCode::FAILURE
    }
}

fn demo() -> bool {
    println!(
        "Building three nodes (n1, n2, n3), two gateways (g1, g2) and a server outside the cluster, each a network"
    );
    println!(
        "namespace. Every node has the CNI's masquerade, strict reverse-path filtering, src_valid_mark, br_netfilter."
    );
    let lab = Lab::builder()
        .nodes(vec![
            NodeSpec::new("n1", 11, Pods::Routed),
            NodeSpec::new("n2", 12, Pods::Bridged),
            NodeSpec::new("n3", 13, Pods::Routed),
            NodeSpec::gateway("g1", 21, Pods::Routed),
            NodeSpec::gateway("g2", 22, Pods::Bridged),
        ])
        .build();
    lab.start();

    println!("Adding pods through each node's conflist. Those with the label app=visitor will be selected.");
    let visitor = &[("app", "visitor")];
    let pods = [
        (lab.add_pod("n1", "shop", "visitor-1", visitor), true),
        (lab.add_pod("n2", "shop", "visitor-2", visitor), true),
        (lab.add_pod("n3", "shop", "visitor-3", visitor), true),
        (lab.add_pod("g1", "shop", "visitor-4", visitor), true),
        (lab.add_pod("g2", "shop", "visitor-5", visitor), true),
        (lab.add_pod("n1", "shop", "other", &[("app", "other")]), false),
    ];
    let asked = |pod: &Pod| [IpAddr::from(EXT4), EXT6.into()].map(|server| (server, who(pod, server)));
    let before: Vec<_> = pods.iter().map(|(pod, _)| asked(pod)).collect();

    println!("Applying this:\n");
    for line in objects().lines() {
        println!("    {line}");
    }
    lab.write_manifest("egress.yaml", &objects());
    // The daemons need a moment. What is not so after it shows in the table.
    settle("the selected pods leave by the gateway", || {
        pods.iter().filter(|(_, selected)| *selected).all(|(pod, _)| seen_as_egress(pod))
    });

    let mut table = Table::new();
    for ((pod, selected), before) in pods.iter().zip(before) {
        for ((server, without), (_, with)) in before.into_iter().zip(asked(pod)) {
            let node = own_address(pod, server);
            let promised = if *selected { egress_address(server) } else { node.clone() };
            table.add(Row::new(pod, server).without(&without, &node).with(&with, &promised));
        }
    }

    // A pod that is new: its very first packet, sent when ADD has returned.
    let new = lab.add_pod("n2", "shop", "visitor-new", visitor);
    for server in [IpAddr::from(EXT4), EXT6.into()] {
        let first = new.udp_who(server).map_or_else(|e| silence(&e), |a| a.to_string());
        table.add(Row::new(&new, server).with(&first, &egress_address(server)).note("its first packet"));
    }

    // Gateways away: nothing may leave, above all not with another address.
    lab.write_manifest("egress.yaml", &objects().replace(r#""true""#, r#""nowhere""#));
    settle("the new pod is blocked", || new.who(EXT4).is_err() && new.who(EXT6).is_err());
    // What earlier connections had still to send has arrived.
    thread::sleep(Duration::from_millis(500));
    lab.forget_wire();
    for server in [IpAddr::from(EXT4), EXT6.into()] {
        let answer = who(&new, server);
        let sources = lab.sources(server);
        let on_the_wire = if sources.is_empty() { "blocked".to_owned() } else { format!("LEAKED {sources:?}") };
        let with = if answer == "blocked" { on_the_wire.to_owned() } else { answer };
        table.add(Row::new(&new, server).with(&with, "blocked").note("no gateway is left"));
    }

    println!("\nThe address that the server saw, without and with the policy:\n");
    table.print();
    println!();
    println!(
        "Each pod left with its node's address before. The ones that the policy selects now leave with {EGRESS4} and"
    );
    println!("{EGRESS6}, whichever node they run on, from their first packet on; the other pod is as it was. When no");
    println!("node can hold the address, the packets are dropped: none leaves with another.");
    table.is_right()
}

fn objects() -> String {
    let policy = manifests::policy(
        "shop",
        "visitors",
        &format!(
            "podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {EGRESS4}, ipv6: \"{EGRESS6}\" }}"
        ),
    );
    manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50"]) + &policy
}

/// The address that the server saw, or in a word why there is none.
fn who(pod: &Pod, server: IpAddr) -> String {
    pod.who(server).map_or_else(|e| silence(&e), |a| a.to_string())
}

fn silence(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => "blocked".to_owned(),
        std::io::ErrorKind::NetworkUnreachable | std::io::ErrorKind::HostUnreachable => "blocked".to_owned(),
        _ => error.to_string(),
    }
}

fn egress_address(server: IpAddr) -> String {
    if server.is_ipv4() { EGRESS4 } else { EGRESS6 }.to_owned()
}

fn own_address(pod: &Pod, server: IpAddr) -> String {
    if server.is_ipv4() { pod.node.ipv4().to_string() } else { pod.node.ipv6().to_string() }
}

fn seen_as_egress(pod: &Pod) -> bool {
    [IpAddr::from(EXT4), EXT6.into()].iter().all(|server| who(pod, *server) == egress_address(*server))
}

/// Waits until it is so, fifteen seconds at most.
fn settle(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        if begin.elapsed() > Duration::from_secs(15) {
            println!("Waited {:?} in vain until {what}.", begin.elapsed());
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
