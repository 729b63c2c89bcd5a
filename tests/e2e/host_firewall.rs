//! A gateway node whose host firewall drops forwarded packets: ufw, firewalld and Docker set the policy of iptables'
//! chain FORWARD to DROP. Needs root.

use lab::fault_injection::owner_and_other;
use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{EXT4, EXT6, Lab, Node, Pod, SERVERS, VISITOR};
use std::net::IpAddr;
use std::time::Duration;

const EGRETD: &str = env!("CARGO_BIN_EXE_egretd");

fn why(lab: &Lab, to: IpAddr) -> String {
    let source = format!("dir:{}", lab.manifests().path().display());
    lab.node("n1").run([EGRETD, "why", "shop/visitor", "--to", &to.to_string(), "--cluster", &source])
}

fn dropped(lab: &Lab, node: &str, family: &str) -> f64 {
    lab.metrics(node).get("egret_node_forward_dropped_packets_total", &[("family", family)]).unwrap_or(-1.0)
}

/// The status of the node.
fn status(lab: &Lab, node: &str) -> String {
    let file = lab.manifests().path().join(format!("status/egressnodes/{node}.yaml"));
    std::fs::read_to_string(file).unwrap_or_default()
}

/// As the programs write it, for IPv4 and IPv6.
fn closes_and_is_opened(lab: &Lab, node: &Node, pod: &Pod, programs: [&str; 2]) {
    let before = ["ipv4", "ipv6"].map(|family| dropped(lab, &node.name, family));
    node.run([programs[0], "-P", "FORWARD", "DROP"]);
    for _ in 0..4 {
        assert!(pod.udp_who(EXT4).is_err(), "{programs:?} do not close it");
    }
    let named = || status(lab, &node.name).contains("iptables -I FORWARD -i egret");
    lab.wait_until("the EgressNode names the firewall", Duration::from_secs(10), named);
    assert!(dropped(lab, &node.name, "ipv4") >= before[0] + 3.0);
    assert_eq!(dropped(lab, &node.name, "ipv6"), before[1]);
    let told = why(lab, EXT4.into());
    assert!(told.contains("is blocked") && told.contains(&node.name) && told.contains("FORWARD"), "{told}");
    let told = why(lab, EXT6.into());
    assert!(told.contains("leaves from 2001:db8::50"), "{told}");

    node.run([programs[1], "-P", "FORWARD", "DROP"]);
    assert_blocked(pod);
    assert_blocked(pod);
    lab.wait_until("both are named", Duration::from_secs(10), || status(lab, &node.name).contains("ip6tables"));
    let checked = node.try_run([EGRETD, "check"]);
    let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
    let warned =
        |line: &str| line.starts_with("warn") && line.contains("firewall") && line.contains("FORWARD -i egret");
    assert!(checked.lines().any(warned), "{checked}");

    // The remedy that the status names.
    for program in programs {
        for direction in ["-i", "-o"] {
            node.run([program, "-I", "FORWARD", direction, "egret", "-j", "ACCEPT"]);
        }
    }
    assert_leaves_by_egress(pod);
    lab.wait_until("nothing is named", Duration::from_secs(10), || !status(lab, &node.name).contains("FORWARD"));
    for server in SERVERS {
        let told = why(lab, server);
        assert!(told.contains("leaves from"), "{told}");
    }
    for program in programs {
        node.run([program, "-P", "FORWARD", "ACCEPT"]);
        node.run([program, "-F", "FORWARD"]);
    }
}

#[test]
fn a_firewall_that_drops_forwarded_packets_is_counted_and_reported_with_the_remedy() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    for programs in [["iptables", "ip6tables"], ["iptables-legacy", "ip6tables-legacy"]] {
        closes_and_is_opened(&lab, lab.node(&owner), &pod, programs);
    }
    let others = lab.nodes().iter().filter(|node| node.name != owner);
    others.for_each(|node| assert_eq!(dropped(&lab, &node.name, "ipv4"), 0.0, "{}", node.name));
    lab.assert_nothing_leaked();
}
