//! What an EgressGateway's fields promise. Needs root.

mod lab;

use lab::mishaps::owner_and_other;
use lab::scene::assert_leaves_by_egress;
use lab::server::{ECHO, UDP_WHO};
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, FAR4, FAR6, Lab, Node, Pod, SERVERS, VISITOR, manifests};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// The scene's gateway with more lines in its spec.
fn gateway_with(lines: &str) -> String {
    manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]) + lines
}

fn add_addresses(node: &Node) {
    node.ip(&format!("addr add {EGRESS4}/32 dev eth0"));
    node.ip(&format!("addr add {EGRESS6}/128 dev eth0 nodad"));
}

fn del_addresses(node: &Node) {
    node.ip(&format!("addr del {EGRESS4}/32 dev eth0"));
    node.ip(&format!("addr del {EGRESS6}/128 dev eth0"));
}

fn wait_blocked(lab: &Lab, pod: &Pod, server: impl Into<IpAddr>) {
    let server = server.into();
    lab.wait_until(&format!("{} is blocked", pod.name), PATIENCE, || pod.udp_who(server).is_err());
}

#[test]
fn a_gateway_with_a_next_hop_leaves_by_it_and_not_by_the_main_table() {
    let lab = Lab::builder().router().scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    for gateway in ["g1", "g2"] {
        // The main table's router is dead.
        lab.node(gateway).ip("route replace default via 192.0.2.254");
        lab.node(gateway).ip("-6 route replace default via 2001:db8::fe");
    }
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, FAR4));
    lab.write_manifest("gateway.yaml", &gateway_with("  nextHop: { ipv4: 192.0.2.1, ipv6: \"2001:db8::1\" }\n"));
    for pod in &pods {
        lab.wait_until(&format!("{} gets out", pod.name), PATIENCE, || pod.who(FAR4).ok() == Some(EGRESS4.into()));
        lab.wait_until(&format!("{} gets out", pod.name), PATIENCE, || pod.who(FAR6).ok() == Some(EGRESS6.into()));
    }
    // A next hop that is not there is no reason to take another way.
    lab.write_manifest("gateway.yaml", &gateway_with("  nextHop: { ipv4: 192.0.2.250 }\n"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, EXT4));
    lab.write_manifest("gateway.yaml", &gateway_with(""));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, EGRESS4));
}

#[test]
fn an_interface_that_a_gateways_node_lacks_blocks_and_is_said_in_the_status() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.write_manifest("gateway.yaml", &gateway_with("  interface: bond7\n"));
    wait_blocked(&lab, &pod, EXT4);
    lab.wait_until("the status says so", PATIENCE, || lab.manifests().statuses().contains("no interface \"bond7\""));
    lab.write_manifest("gateway.yaml", &gateway_with("  interface: eth0\n"));
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.assert_nothing_leaked();
}

#[test]
fn with_external_placement_the_node_that_has_the_address_owns_it() {
    let lab = Lab::scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    lab.write_manifest("gateway.yaml", &gateway_with("  placement: External\n"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, EXT4));
    for (from, to) in [(None, "g2"), (Some("g2"), "g1")] {
        if let Some(from) = from {
            del_addresses(lab.node(from));
        }
        add_addresses(lab.node(to));
        lab.host("ext").ip("neigh flush dev eth0");
        for pod in &pods {
            lab.wait_seen_as(pod, EGRESS4);
            lab.wait_seen_as(pod, EGRESS6);
        }
        let addresses = lab.node(to).ip("addr show dev eth0");
        assert!(addresses.contains(&format!("{EGRESS4}/32")), "it is not Egret's to take away: {addresses}");
    }
    lab.assert_nothing_leaked();
}

#[test]
fn egress_addresses_go_with_the_label_that_makes_a_node_a_gateway() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let holders = || -> Vec<&str> {
        let has = |n: &&str| lab.node(n).ip("addr show dev eth0").contains(&format!("{EGRESS4}/32"));
        ["n1", "n2", "g1", "g2"].into_iter().filter(has).collect()
    };
    let before = holders();
    assert_eq!(before.len(), 1, "{before:?}");
    let mut node = manifests::node(lab.node(before[0]));
    node["metadata"]["labels"] = serde_json::json!({});
    lab.manifests().write_object(&format!("node-{}.yaml", before[0]), &node);
    lab.wait_until("another node has it", PATIENCE, || holders().len() == 1 && holders() != before);
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.assert_nothing_leaked();
}

#[test]
fn egress_addresses_answer_ping_where_the_gateway_says_so() {
    let lab = Lab::scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let ext = lab.host("ext");
    let answered = || [EGRESS4.into(), EGRESS6.into()].map(|address: IpAddr| ext.ping(address).is_ok());
    assert_eq!(answered(), [false, false]);
    lab.write_manifest("gateway.yaml", &gateway_with("  answerPing: true\n"));
    lab.wait_for("answers to ping:", &[true, true], answered);
    for address in [IpAddr::from(EGRESS4), EGRESS6.into()] {
        let other = ext.who_at(SocketAddr::new(address, 22));
        assert_eq!(other.map_err(|e| e.kind()), Err(ErrorKind::TimedOut), "nothing else is answered");
    }
    for pod in &pods {
        assert_leaves_by_egress(pod);
        for server in SERVERS {
            pod.ping(server).unwrap_or_else(|e| panic!("{} pings {server}: {e}", pod.name));
        }
    }
    lab.write_manifest("gateway.yaml", &gateway_with(""));
    lab.wait_for("answers to ping:", &[false, false], answered);
    lab.assert_nothing_leaked();
}

/// A UDP socket of the pod's with this port, to which the server has answered.
fn udp_from(pod: &Pod, port: u16, server: IpAddr) -> UdpSocket {
    let own: IpAddr = if server.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
    let socket = pod.within(|| UdpSocket::bind((own, port))).expect("a port");
    socket.connect((server, UDP_WHO)).expect("a route");
    socket.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
    for _ in 0..3 {
        socket.send(b"who").expect("send");
        socket.recv(&mut [0; 64]).unwrap_or_else(|e| panic!("{} from port {port} to {server}: {e}", pod.name));
    }
    socket
}

/// A TCP connection of the pod's from this port.
fn tcp_from(pod: &Pod, port: u16) -> OwnedFd {
    let made = pod.within(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None));
    let stream = made.expect("a socket");
    bind(stream.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))).expect("a port");
    let server = SockaddrIn::from(SocketAddrV4::new(EXT4, ECHO));
    connect(stream.as_raw_fd(), &server).unwrap_or_else(|e| panic!("{} from port {port}: {e}", pod.name));
    stream
}

#[test]
fn a_connection_whose_port_another_one_has_gets_another_and_is_counted() {
    let lab = Lab::scene();
    let [one, two] = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let (owner, _) = owner_and_other(&lab);
    let counted = || lab.metrics(&owner).get("egret_node_other_port_connections_total", &[]).expect("a counter");
    let before = counted();
    // Below those that the kernel chooses itself, which are in use for others.
    let ports = [7, 600, 1023, 4096, 5555, 21_845, 32_767];
    let mut open = Vec::new();
    for port in ports {
        open.extend([EXT4.into(), EXT6.into()].map(|server| udp_from(&one, port, server)));
    }
    let stream = tcp_from(&one, 5555);
    open.extend([EXT4.into(), EXT6.into()].map(|server| udp_from(&two, 5556, server)));
    assert_eq!(counted() - before, 0.0, "each has its port");
    for (n, port) in (1..).zip(ports) {
        open.extend([EXT4.into(), EXT6.into()].map(|server| udp_from(&two, port, server)));
        assert_eq!(counted() - before, f64::from(2 * n), "port {port}");
    }
    let other = tcp_from(&two, 5555);
    assert_eq!(counted() - before, f64::from(2 * 7 + 1));
    let dropped = lab.metrics(&owner).get("egret_node_dropped_packets_total", &[("reason", "other_port")]);
    assert_eq!(dropped, None, "nothing is lost by it");
    drop((stream, other, open));
}
