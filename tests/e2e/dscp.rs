//! The DSCP of packets that leave from an egress IP. Needs root.

use lab::client::udp_who_by;
use lab::fault_injection::owner_and_other;
use lab::scene::egress_towards;
use lab::server::UDP_WHO;
use lab::{EGRESS4, EGRESS6, EXT4, Host, Lab, Pod, SERVERS, VISITOR, manifests};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// `ECT(0)`, RFC 3168: the packet's sender knows of congestion.
const ECT0: i32 = 0b10;
/// The DSCPs that this test knows.
const VALUES: [u8; 3] = [0, 45, 46];

/// Counts what comes to a host from the egress IPs, by DSCP and ECN. The owner itself sends neighbour discovery from
/// them. (A set of DSCPs would be shorter, but nft 1.0.6 makes a wrong key of `ip6 dscp`.)
fn watch(host: &Host) {
    let mut rules = String::from(
        "add table inet seen\nadd counter inet seen packets-of-egress\nadd counter inet seen congestion\n",
    );
    rules += "add chain inet seen arrivals { type filter hook prerouting priority -400; }\n";
    VALUES.iter().for_each(|value| rules += &format!("add counter inet seen dscp-{value}\n"));
    for (ip, address) in [("ip", EGRESS4.to_string()), ("ip6", EGRESS6.to_string())] {
        let from = format!("add rule inet seen arrivals {ip} saddr {address}");
        rules += &format!("{from} {ip} ecn ect0 counter name congestion\n");
        rules += &format!("{from} meta l4proto {{ tcp, udp }} counter name packets-of-egress\n");
        for value in VALUES {
            rules += &format!("{from} meta l4proto {{ tcp, udp }} {ip} dscp {value} counter name dscp-{value}\n");
        }
    }
    host.nft(&rules);
}

/// The packets that came since the last call, by counter.
fn counted(host: &Host) -> BTreeMap<String, u64> {
    let text = host.run(["nft", "reset", "counters", "table", "inet", "seen"]);
    let mut name = String::new();
    let mut all = BTreeMap::new();
    for words in text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
        match words.as_slice() {
            ["counter", counter, ..] => name = (*counter).to_owned(),
            ["packets", number, ..] => drop(all.insert(name.clone(), number.parse().expect("a number"))),
            _ => {}
        }
    }
    all
}

/// The DSCPs of the packets that came since the last call; `None` for one that this test does not know.
fn seen(host: &Host) -> BTreeSet<Option<u8>> {
    let counted = counted(host);
    let of = |value: &u8| counted[&format!("dscp-{value}")];
    let known = VALUES.iter().filter(|value| of(value) > 0).map(|value| Some(*value));
    let others = (VALUES.iter().map(of).sum::<u64>() < counted["packets-of-egress"]).then_some(None);
    known.chain(others).collect()
}

fn visitors(more: &str) -> String {
    let spec = format!(
        "podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {EGRESS4}, ipv6: \"{EGRESS6}\" }}\n  \
         {more}"
    );
    manifests::policy("shop", "visitors", &spec)
}

/// Speaks by TCP and UDP with the server, and returns the DSCPs that it saw.
fn speak(lab: &Lab, pod: &Pod, server: IpAddr) -> BTreeSet<Option<u8>> {
    let host = lab.host("ext");
    seen(host);
    let expected = Some(egress_towards(server));
    assert_eq!(pod.udp_who_patiently(server).ok(), expected, "{} to {server}", pod.name);
    assert_eq!(pod.who(server).ok(), expected, "{} to {server}", pod.name);
    seen(host)
}

#[test]
fn packets_that_leave_from_the_egress_ip_have_the_policys_dscp() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    watch(lab.host("ext"));
    let pods = ["n1", &owner, &other].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    let wait = |wanted: u8| {
        for pod in &pods {
            for server in SERVERS {
                let wanted = BTreeSet::from([Some(wanted)]);
                lab.wait_for("the DSCP", &wanted, || speak(&lab, pod, server));
            }
        }
    };
    wait(0);
    // A connection that goes on gets it, too.
    let session = pods[0].session(EXT4).expect("a session");
    lab.write_manifest("policy.yaml", &visitors("dscp: 46"));
    wait(46);
    seen(lab.host("ext"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(seen(lab.host("ext")), [Some(46)].into());
    let report = session.stop();
    assert!(report.broken.is_none(), "{report:?}");
    // A value without a name; and what the pod has asked for of ECN stays.
    lab.write_manifest("policy.yaml", &visitors("dscp: 45"));
    wait(45);
    counted(lab.host("ext"));
    for server in SERVERS {
        let socket = pods[0].udp_socket((server, UDP_WHO).into()).expect("a socket");
        match server {
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4Tos, &ECT0),
            IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6TClass, &ECT0),
        }
        .expect("ECN");
        assert_eq!(udp_who_by(&socket).ok(), Some(egress_towards(server)));
    }
    assert_eq!(counted(lab.host("ext"))["congestion"], 2);
    // The next owner has it from its first packet.
    lab.daemon(&owner).kill9();
    lab.node(&owner).ip("link set eth0 down");
    let survivors = [&pods[0], &pods[2]];
    for pod in survivors {
        for server in SERVERS {
            lab.wait_until("the other node has taken over", Duration::from_secs(10), || pod.udp_who(server).is_ok());
        }
    }
    for pod in survivors {
        for server in SERVERS {
            assert_eq!(speak(&lab, pod, server), [Some(45)].into(), "{} to {server}", pod.name);
        }
    }
    let status = lab.manifests().statuses();
    assert!(status.contains("its packets have DSCP 45"), "{status}");
}

#[test]
fn without_a_dscp_there_is_no_chain_for_it() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let rules = || lab.node(&owner).run(["nft", "list", "table", "inet", "egret"]);
    assert!(!rules().contains("dscp"), "{}", rules());
    lab.write_manifest("policy.yaml", &visitors("dscp: 10"));
    lab.wait_until("the chain is there", Duration::from_secs(5), || rules().contains("ip dscp set af11"));
    lab.write_manifest("policy.yaml", &visitors(""));
    lab.wait_until("the chain is gone", Duration::from_secs(5), || !rules().contains("dscp"));
}
