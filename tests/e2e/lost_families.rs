//! Gateway nodes' uplinks lose one family: the other one continues, and egress IPs move to nodes that can serve more.
//! Needs root.

use lab::fault_injection::{answered_after, assert_stays, holders, owner_and_other};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, Lab, Pod, VISITOR, manifests};
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);
/// The egress IP of a policy without IPv6.
const PLAIN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 51);

/// Removes a node's IPv6 network, as when its routers no longer advertise it, or restores it.
fn ipv6(lab: &Lab, node: &str, there: bool) {
    let (node, change) = (lab.node(node), if there { "add" } else { "del" });
    let nodad = if there { " nodad" } else { "" };
    node.ip(&format!("addr {change} {}/64 dev eth0{nodad}", node.ipv6()));
}

/// The nodes that have the address.
fn have(lab: &Lab, address: impl Into<IpAddr>) -> Vec<String> {
    let address = address.into();
    let text = format!(" {address}/{} ", if address.is_ipv4() { 32 } else { 128 });
    lab.nodes().iter().filter(|n| n.ip("-o addr").contains(&text)).map(|n| n.name.clone()).collect()
}

/// The status of a node's EgressNode.
fn says(lab: &Lab, node: &str, text: &str) -> bool {
    let statuses = lab.manifests().statuses();
    let of_node = statuses.split("--- ").find(|part| part.contains(&format!("egressnodes/{node}")));
    of_node.is_some_and(|part| part.contains(text))
}

/// A policy without IPv6, on `owner`, and a pod that it selects.
fn plain(lab: &Lab, owner: &str) -> Pod {
    let spec = format!("podSelector: {{ matchLabels: {{ app: plain }} }}\n  address: {{ ipv4: {PLAIN} }}");
    let policy = manifests::policy("shop", "plain", &spec);
    let policy =
        policy.replacen("metadata: {", &format!("metadata: {{ annotations: {{ egret.dev/move-to: {owner} }},"), 1);
    lab.write_manifest("plain.yaml", &policy);
    lab.wait_for("the address is on", &vec![owner.to_owned()], || have(lab, PLAIN));
    let pod = lab.add_pod("n1", "shop", "plain", &[("app", "plain")]);
    lab.wait_seen_as(&pod, PLAIN);
    pod
}

fn v6_is_back(lab: &Lab, pods: &[Pod]) {
    for pod in pods {
        lab.wait_until(&format!("{} leaves by IPv6", pod.name), PATIENCE, || {
            pod.udp_who(EXT6).ok() == Some(EGRESS6.into())
        });
    }
}

#[test]
fn a_family_that_all_gateway_nodes_lose_affects_no_other_and_returns() {
    // Every packet of four seconds must be answered in time.
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let mut pods: Vec<Pod> =
        ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into();
    pods.iter().for_each(assert_leaves_by_egress);
    let plain = plain(&lab, &owner);
    pods.push(plain);
    let floods: Vec<_> = pods.iter().map(|pod| pod.flood(EXT4, Duration::from_millis(5), false)).collect();
    let plain = pods.pop().expect("a pod");
    thread::sleep(Duration::from_millis(500));

    for gateway in [&other, &owner] {
        ipv6(&lab, gateway, false);
    }
    lab.wait_until("the statuses name what was lost", PATIENCE, || {
        [&owner, &other].iter().all(|g| says(&lab, g, "IPv6"))
    });
    let is_told = || lab.manifests().statuses().contains("has lost IPv6");
    lab.wait_until("the policy is told what was lost", PATIENCE, is_told);
    // Until each node has detected that the others have lost the same.
    thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(4) {
        for pod in &pods {
            assert_eq!(pod.udp_who(EXT4).ok(), Some(EGRESS4.into()), "{} after {:?}", pod.name, begin.elapsed());
            assert!(pod.udp_who(EXT6).is_err(), "{} has no way out by IPv6", pod.name);
        }
        assert_eq!(plain.udp_who(EXT4).ok(), Some(PLAIN.into()));
        assert_eq!(have(&lab, EGRESS4), [owner.as_str()]);
    }
    let late = lab.add_pod("n2", "shop", "late", VISITOR);
    assert_eq!(late.who(EXT4).ok(), Some(EGRESS4.into()), "a new pod's first connection");

    for gateway in [&owner, &other] {
        ipv6(&lab, gateway, true);
    }
    v6_is_back(&lab, &pods);
    lab.wait_until("nothing is lost any more", PATIENCE, || ![&owner, &other].iter().any(|g| says(&lab, g, "lost:")));
    lab.wait_until("the policy is told", PATIENCE, || !is_told());
    pods.iter().for_each(assert_leaves_by_egress);
    assert_eq!(holders(&lab), [owner.as_str()]);
    for flood in floods {
        let report = flood.stop();
        println!("{} of {} IPv4 packets lost", report.lost(), report.sent);
        // Each node must detect that the others have lost the same.
        assert_short(Duration::from_millis(5 * report.lost()), 700);
    }
    let sources = lab.sources(EXT4);
    assert_eq!(sources, [EGRESS4.into(), PLAIN.into()].into());
    assert_eq!(lab.sources(EXT6), [EGRESS6.into()].into());
}

#[test]
fn a_family_that_one_gateway_node_loses_moves_to_another_and_the_rest_stays() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods: Vec<Pod> =
        ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into();
    let plain = plain(&lab, &owner);
    let sessions = sessions(&pods);
    let flood = plain.flood(EXT4, Duration::from_millis(5), false);
    thread::sleep(Duration::from_millis(500));

    ipv6(&lab, &owner, false);
    let begin = Instant::now();
    lab.wait_for("the address is on", &vec![other.clone()], || have(&lab, EGRESS6));
    println!("IPv6 is on the other gateway after {:?}", begin.elapsed());
    assert_short(begin.elapsed(), 1500);
    pods.iter().for_each(|pod| println!("{}: answered after {:?}", pod.name, answered_after(pod, begin)));
    v6_is_back(&lab, &pods);
    assert_eq!(holders(&lab), [other.as_str()]);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.wait_until("the status names what was lost", PATIENCE, || says(&lab, &owner, "IPv6"));
    let takeovers = lab.metrics(&other).get("egret_node_takeovers_total", &[("reason", "uplink_lost")]);
    assert_eq!(takeovers, Some(1.0));

    ipv6(&lab, &owner, true);
    lab.wait_until("it is lost no more", PATIENCE, || !says(&lab, &owner, "lost:"));
    assert_stays(&lab, &other, Duration::from_secs(3), || {
        assert_eq!(have(&lab, EGRESS6), [other.as_str()]);
        assert_eq!(have(&lab, PLAIN), [owner.as_str()], "it needs no IPv6");
    });
    assert_short(assert_live("one family lost", sessions), 1500);
    let report = flood.stop();
    println!("{} of {} packets of the policy without IPv6 lost", report.lost(), report.sent);
    assert!(report.lost() * 100 < report.sent, "a policy without IPv6 has lost nothing");
}
