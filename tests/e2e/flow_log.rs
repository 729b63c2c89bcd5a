//! Records of connections: which pod was behind an egress IP and a port. Needs root.

use lab::fault_injection::{label, owner_and_other, wait_holder};
use lab::scene::{SERVERS, VISITOR, egress_towards};
use lab::server::UDP_PEER;
use lab::{EXT4, Lab, Pod, machine};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

/// The lab, in which both gateway nodes and the other ones record. Connections expire soon, and the kernel counts
/// packets.
fn lab() -> Lab {
    let lab = Lab::builder().node_arguments(&["--flow-log", "stdout"]).build();
    for node in lab.nodes() {
        node.sysctl(&[
            "net.netfilter.nf_conntrack_acct=1",
            "net.netfilter.nf_conntrack_tcp_timeout_time_wait=1",
            "net.netfilter.nf_conntrack_udp_timeout=2",
            "net.netfilter.nf_conntrack_udp_timeout_stream=2",
        ]);
    }
    lab.with_scene()
}

/// The records of a node.
fn records(lab: &Lab, node: &str) -> Vec<Value> {
    let log = lab.daemon(node).log();
    let lines = log.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line:?}: {e}"))).collect()
}

/// Asks the server by UDP which address and port it sees.
fn seen_as(pod: &Pod, server: IpAddr) -> SocketAddr {
    let socket = pod.udp_socket(SocketAddr::new(server, UDP_PEER)).expect("a socket");
    let mut answer = [0; 64];
    for _ in 0..50 {
        socket.send(b"who").expect("a packet is sent");
        if let Ok(length) = machine::receive(&socket, &mut answer) {
            return String::from_utf8_lossy(&answer[..length]).parse().expect("an address and a port");
        }
    }
    panic!("{} gets no answer", pod.name);
}

/// Waits for the record of a connection that the server saw from this address and port.
fn record(lab: &Lab, node: &str, event: &str, seen: SocketAddr, protocol: &str) -> Value {
    let is_it = |record: &Value| {
        record["event"] == event
            && record["egressIP"] == seen.ip().to_string()
            && record["egressPort"] == seen.port()
            && record["protocol"] == protocol
    };
    let find = || {
        // Reading the table makes the kernel remove expired entries. It would do so by itself within a minute.
        lab.node(node).run(["conntrack", "-L"]);
        records(lab, node).into_iter().find(is_it)
    };
    lab.wait_until(&format!("the record of {seen} ({event})"), Duration::from_secs(15), || find().is_some());
    find().expect("a record")
}

/// Checks that the record names the pod, its node, and the policy.
fn assert_names(record: &Value, pod: &Pod, server: IpAddr, gateway_node: &str) {
    let address: IpAddr = if server.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
    let expected = serde_json::json!({
        "podNamespace": "shop", "podName": pod.name, "podAddress": address.to_string(), "node": pod.node.name,
        "policy": "shop/visitors", "gateway": "default", "egressNode": gateway_node, "destination": server.to_string(),
    });
    for (field, value) in expected.as_object().expect("an object") {
        assert_eq!(&record[field], value, "{field} of {record}");
    }
}

#[test]
fn records_name_the_pod_behind_an_egress_ip_and_port() {
    let lab = lab();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2", &owner, &other].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    let unselected = lab.add_pod("n1", "shop", "unselected", &[]);
    let mut seen = Vec::new();
    for (pod, server) in pods.iter().flat_map(|pod| SERVERS.map(|server| (pod, server))) {
        let peer = seen_as(pod, server);
        assert_eq!(peer.ip(), egress_towards(server));
        seen.push((pod, server, peer));
    }
    unselected.who(EXT4).expect("an answer");
    for (pod, server, peer) in &seen {
        let begin = record(&lab, &owner, "begin", *peer, "udp");
        assert_names(&begin, pod, *server, &owner);
        assert_eq!(begin["destinationPort"], UDP_PEER);
        assert_eq!(begin["packetsSent"], Value::Null, "it has just begun");
        let end = record(&lab, &owner, "end", *peer, "udp");
        assert_names(&end, pod, *server, &owner);
        assert_eq!(end["connection"], begin["connection"]);
        assert!(end["packetsSent"].as_u64() >= Some(1) && end["bytesReceived"].as_u64() > Some(28), "{end}");
    }
    for pod in &pods {
        pod.who(EXT4).expect("an answer");
    }
    let tcp = |event: &str| {
        // The lab's own pods are removed.
        let of_visitors = |r: &Value| r["podName"].as_str().is_some_and(|name| name.starts_with("visitor"));
        let is_it = |r: &Value| r["protocol"] == "tcp" && r["event"] == event && of_visitors(r);
        records(&lab, &owner).into_iter().filter(is_it).collect::<Vec<_>>()
    };
    lab.wait_for("ends of TCP connections", &pods.len(), || {
        lab.node(&owner).run(["conntrack", "-L"]);
        tcp("end").len()
    });
    assert_eq!(tcp("begin").len(), pods.len(), "each is recorded once");
    assert!(tcp("end").iter().all(|record| record["packetsSent"].as_u64() >= Some(4)), "{:?}", tcp("end"));
    for node in ["n1", "n2", &other] {
        assert_eq!(records(&lab, node), Vec::<Value>::new(), "{node} holds no egress IP");
    }
    assert!(records(&lab, &owner).iter().all(|record| record["podName"] != "unselected"));
}

#[test]
fn after_a_move_the_new_owner_records_and_a_restarted_daemon_learns_the_pods_again() {
    let lab = lab();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    record(&lab, &owner, "begin", seen_as(&pod, EXT4.into()), "udp");
    label(&lab, &owner, &[("egret.dev/drain", "true")]);
    wait_holder(&lab, &other);
    let peer = seen_as(&pod, EXT4.into());
    assert_names(&record(&lab, &other, "begin", peer, "udp"), &pod, EXT4.into(), &other);
    // A pod that starts and sends at once is named, too.
    let young = lab.add_pod("n2", "shop", "young", VISITOR);
    let peer = seen_as(&young, EXT4.into());
    assert_names(&record(&lab, &other, "begin", peer, "udp"), &young, EXT4.into(), &other);

    lab.daemon(&other).restart();
    lab.wait_until("its pods are known again", Duration::from_secs(20), || {
        let peer = seen_as(&pod, EXT4.into());
        thread::sleep(Duration::from_millis(500));
        let found =
            records(&lab, &other).into_iter().rfind(|r| r["egressPort"] == peer.port() && r["event"] == "begin");
        found.is_some_and(|record| record["podName"] == "visitor")
    });
}
