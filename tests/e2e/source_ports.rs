//! An egress IP has few source ports left towards a destination: the metrics, the statuses and `kubectl egret` say so
//! before connections are dropped. Needs root and conntrack.

use lab::fault_injection::owner_and_other;
use lab::scene::assert_leaves_by_egress;
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, Lab, VISITOR};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

/// Nothing answers there.
const PORT: u16 = 9;
/// The ports are counted every 30 s.
const PATIENCE: Duration = Duration::from_secs(75);

/// What `kubectl egret status` says.
fn status(lab: &Lab) -> String {
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let mut command = Command::new(lab::places::program("kubectl-egret"));
    let output = command.env_clear().args(["status", "--cluster", &cluster]).output().expect("kubectl-egret");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn source_ports_that_run_out_are_reported_until_there_are_enough() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    lab.node(&owner).sysctl(&["net.netfilter.nf_conntrack_udp_timeout=300"]);
    let (pod, other) = (lab.add_pod("n1", "shop", "visitor", VISITOR), lab.add_pod("n2", "shop", "other", VISITOR));
    assert_leaves_by_egress(&pod);

    // All that the kernel chooses from for a connection from a port below 512.
    let server = |address: IpAddr| SocketAddr::new(address, PORT);
    let ways = [(server(EXT4.into()), IpAddr::from(EGRESS4)), (server(EXT6.into()), EGRESS6.into())];
    for (server, _) in ways {
        pod.udp_from_ports(1..=511, server);
    }
    for (server, egress_ip) in ways {
        let (egress_ip, server) = (egress_ip.to_string(), server.to_string());
        let labels = [("egress_ip", &*egress_ip), ("destination", &server), ("protocol", "UDP"), ("ports", "1-511")];
        let metric = |name: &str| lab.metrics(&owner).get(name, &labels);
        lab.wait_until(&format!("the ports of {egress_ip} are counted"), PATIENCE, || {
            metric("egret_node_source_ports_used") == Some(511.0)
        });
        assert_eq!(metric("egret_node_source_ports_used_ratio"), Some(1.0));
    }
    lab.wait_until("the policy's status names them", PATIENCE, || {
        lab.manifests().statuses().contains("type: PortsNearlyExhausted")
    });
    assert!(lab.manifests().statuses().contains("portsNearlyExhausted:"), "of the owner");
    let text = status(&lab);
    for words in
        ["PortsNearlyExhausted", "(UDP) use more than 70 % of the source ports 1-511", "divide its connections"]
    {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }

    // It is as the status says: another pod's connection from such a port is dropped, and one from another port is not.
    let failed = || lab.metrics(&owner).get("egret_node_insert_failed_packets_total", &[]).unwrap_or_default();
    let before = failed();
    other.udp_from_ports(123..=123, server(EXT4.into()));
    lab.wait_until("the kernel has dropped it", Duration::from_secs(5), || failed() > before);
    assert_leaves_by_egress(&other);

    for family in ["ipv4", "ipv6"] {
        let port = PORT.to_string();
        lab.node(&owner).try_run(["conntrack", "-D", "-f", family, "-p", "udp", "--dport", &port]);
    }
    lab.wait_until("the statuses say no more that there are few", PATIENCE, || {
        !lab.manifests().statuses().to_lowercase().contains("portsnearlyexhausted")
    });
    assert_eq!(lab.metrics(&owner).get("egret_node_source_ports_used", &[("ports", "1-511")]), None);
    lab.assert_nothing_leaked();
}
