//! Packets that connection tracking assigns to another pod's connection, by their addresses or by what they quote.
//! None of them may leave from an address that is not the policy's. Needs root.

use lab::fault_injection::owner_and_other;
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::server::UDP_WHO;
use lab::{EGRESS4, EGRESS6, EXT4, Host, Lab, Pod, SERVERS, Server, VISITOR};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

/// A pod's address of the server's family.
fn own(pod: &Pod, server: IpAddr) -> IpAddr {
    if server.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() }
}

/// A socket whose packet was answered, and one whose packet was not.
fn connections(lab: &Lab, pod: &Pod, server: IpAddr) -> [UdpSocket; 2] {
    // If a packet was sent with its address, the neighbour's answer must come back first.
    lab.wait_until("it is answered", Duration::from_secs(15), || pod.udp_who(server).is_ok());
    let answered = pod.udp_socket((server, UDP_WHO).into()).expect("a socket");
    lab::client::udp_who_by(&answered).expect("an answer");
    let unanswered = pod.udp_socket((server, 9).into()).expect("a socket");
    unanswered.send(b"who").expect("send");
    [answered, unanswered]
}

/// Sends packets from `forger` that connection tracking assigns to these connections of `victim`.
fn forge(forger: &Host, victim: IpAddr, sockets: &[UdpSocket]) {
    let length = if victim.is_ipv4() { "32" } else { "128 nodad" };
    let (address, more) = length.split_once(' ').unwrap_or((length, ""));
    forger.ip(&format!("addr add {victim}/{address} dev eth0 {more}"));
    for socket in sockets {
        let (port, to): (u16, SocketAddr) =
            (socket.local_addr().expect("a port").port(), socket.peer_addr().expect("a server"));
        let forged = forger.within(|| UdpSocket::bind((victim, port))).expect("bind");
        for _ in 0..5 {
            let _ = forged.send_to(b"who", to);
        }
    }
    forger.ip(&format!("addr del {victim}/{address} dev eth0"));
}

/// On the node of a selected pod, whatever the source address filters.
#[test]
fn a_pod_cannot_send_in_another_pods_connection() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    for node in ["n1", "n2", &owner] {
        let victim = lab.add_pod(node, "shop", &format!("victim-{node}"), VISITOR);
        let forger = lab.add_pod(node, "office", &format!("forger-{node}"), &[]);
        assert_leaves_by_node(&forger);
        for (rp_filter, restore) in [(0, false), (1, false), (2, false), (0, true)] {
            lab.node(node).set_rp_filter(rp_filter);
            for server in SERVERS {
                let sockets = connections(&lab, &victim, server);
                if restore {
                    // As iptables' CONNMARK --restore-mark without a mask does.
                    lab.node(node).nft(
                        "table inet other { chain restore { type filter hook prerouting priority mangle; \
                         meta mark set ct mark; }; }",
                    );
                }
                thread::sleep(Duration::from_millis(50));
                lab.forget_wire();
                forge(&forger, own(&victim, server), &sockets);
                thread::sleep(Duration::from_millis(50));
                let came: Vec<_> = lab.wire().into_iter().filter(|seen| seen.to == server).collect();
                assert!(came.is_empty(), "forged on {node}, rp_filter {rp_filter}, {restore}: {server} saw {came:?}");
                if restore {
                    lab.node(node).nft("delete table inet other");
                }
            }
        }
        lab.node(node).set_rp_filter(1);
        // Neighbours reach the victim again at once.
        lab.wait_seen_as(&victim, EGRESS4);
        lab.wait_seen_as(&victim, EGRESS6);
        assert_leaves_by_egress(&victim);
    }
}

/// On the owner of the allocation of a pod that runs on another node.
#[test]
fn a_pod_on_a_gateway_cannot_send_in_a_connection_that_is_translated_there() {
    let lab = Lab::scene();
    let owner = lab.node(&owner_and_other(&lab).0);
    let victims = ["n1", "n2"].map(|node| lab.add_pod(node, "shop", &format!("victim-{node}"), VISITOR));
    let forgers = [("office", &[][..]), ("shop", VISITOR)];
    for (namespace, labels) in forgers {
        let forger = lab.add_pod(&owner.name, namespace, "forger", labels);
        lab.wait_until("the forger is answered", Duration::from_secs(5), || forger.udp_who(EXT4).is_ok());
        for rp_filter in [0, 1, 2] {
            owner.set_rp_filter(rp_filter);
            for (victim, server) in victims.iter().flat_map(|victim| SERVERS.map(|server| (victim, server))) {
                let sockets = connections(&lab, victim, server);
                thread::sleep(Duration::from_millis(50));
                lab.forget_wire();
                forge(&forger, own(victim, server), &sockets);
                thread::sleep(Duration::from_millis(50));
                let came = lab.sources(server);
                assert!(came.is_empty(), "{} of {namespace}, rp_filter {rp_filter}: {came:?}", victim.name);
            }
        }
        let metrics = lab.metrics(&owner.name);
        assert_eq!(metrics.dropped("leaked"), Some(0.0), "it was seen where it came in: {metrics:?}");
        forger.delete();
    }
}

/// An ICMP error "port unreachable" (RFC 792, RFC 4443) about a UDP packet from `server` to `end`.
fn unreachable(server: SocketAddr, end: SocketAddr) -> Vec<u8> {
    let udp = [&server.port().to_be_bytes()[..], &end.port().to_be_bytes(), &8u16.to_be_bytes(), &[0, 0]].concat();
    match (server.ip(), end.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = [&[0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0][..], &from.octets(), &to.octets()].concat();
            checksum(&mut ip, 10);
            let mut icmp = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &ip, &udp].concat();
            checksum(&mut icmp, 2);
            icmp
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // The kernel fills in the checksum.
            let ip = [&[0x60, 0, 0, 0, 0, 8, 17, 64][..], &from.octets(), &to.octets()].concat();
            [&[1, 4, 0, 0, 0, 0, 0, 0][..], &ip, &udp].concat()
        }
        other => panic!("of one family: {other:?}"),
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    bytes[at..at + 2].copy_from_slice(&(!((sum + (sum >> 16)) as u16)).to_be_bytes());
}

/// Sends an error from `pod` about a packet from `server` to `end`.
fn send_error(pod: &Pod, server: SocketAddr, end: SocketAddr) {
    let (family, protocol) = if server.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6)
    };
    let fd = pod.within(|| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)).expect("a raw socket");
    let error = unreachable(server, end);
    UdpSocket::from(fd).send_to(&error, (server.ip(), 0)).expect("send");
}

/// The source addresses of ICMP messages that arrived at a server.
fn errors(lab: &Lab, server: IpAddr) -> Vec<IpAddr> {
    thread::sleep(Duration::from_millis(50));
    lab.wire().into_iter().filter(|s| s.to == server && s.protocol.contains("icmp")).map(|s| s.from).collect()
}

#[test]
fn an_icmp_error_about_another_pods_connection_does_not_leave() {
    let lab = Lab::scene();
    lab.write_rich();
    let (owner, _) = owner_and_other(&lab);
    for node in ["n1", "n2", &owner] {
        let selected = lab.add_pod(node, "shop", &format!("selected-{node}"), VISITOR);
        let rich = lab.add_pod(node, "shop", &format!("rich-{node}"), &[("app", "rich")]);
        let other = lab.add_pod(node, "office", &format!("other-{node}"), &[]);
        lab.wait_seen_as(&rich, [192, 0, 2, 56]);
        for server in SERVERS {
            let at = |pod| {
                let [answered, _] = connections(&lab, pod, server);
                let port = answered.local_addr().expect("a port").port();
                (answered, SocketAddr::new(own(pod, server), port))
            };
            let (to, [_mine, _rich, _other]) = ((server, UDP_WHO).into(), [&selected, &rich, &other].map(at));
            for (sender, end) in [
                // Another pod's connection without an allocation, and one with an allocation, quoted by pods with and
                // without a policy.
                (&selected, _other.1),
                (&selected, _rich.1),
                (&other, _rich.1),
            ] {
                lab.forget_wire();
                send_error(sender, to, end);
                let from = errors(&lab, server);
                assert!(from.is_empty(), "{} sent an error about {end}'s: from {from:?}", sender.name);
            }
            // An error about the pod's own connection has the connection's source address.
            lab.forget_wire();
            send_error(&selected, to, _mine.1);
            let egress: IpAddr = if server.is_ipv4() { EGRESS4.into() } else { EGRESS6.into() };
            assert_eq!(errors(&lab, server), [egress], "{node}: an error about its own");
        }
    }
}

/// Sends a UDP packet with a wrong checksum, which gets the state invalid.
fn send_invalid(pod: &Pod, server: IpAddr) {
    let family = if server.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = pod.within(|| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Udp)).expect("a socket");
    let udp =
        [&4444u16.to_be_bytes()[..], &UDP_WHO.to_be_bytes(), &11u16.to_be_bytes(), &[0xba, 0xad], b"who"].concat();
    UdpSocket::from(fd).send_to(&udp, (server, 0)).expect("send");
}

#[test]
fn packets_of_state_invalid_do_not_leave() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    for fallback in ["Block", "NodeAddress"] {
        lab.write_manifest("policy.yaml", &(lab::scene::visitors() + &format!("  fallback: {fallback}\n")));
        for node in ["n1", "n2", &owner] {
            let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
            lab.wait_seen_as(&pod, EGRESS4);
            thread::sleep(Duration::from_millis(500));
            assert_leaves_by_egress(&pod);
            thread::sleep(Duration::from_millis(50));
            lab.forget_wire();
            SERVERS.iter().for_each(|server| send_invalid(&pod, *server));
            thread::sleep(Duration::from_millis(50));
            lab.assert_nothing_arrives();
            pod.delete();
        }
    }
}

#[test]
fn pods_of_other_nodes_cannot_bypass_the_owners_firewall() {
    let lab = Lab::scene();
    let owner = lab.node(&owner_and_other(&lab).0);
    let _server = Server::start(owner);
    // An address that is not in the Node object.
    owner.ip("addr add 192.0.2.77/32 dev eth0");
    for node in ["n1", "n2"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        for address in [IpAddr::from([192, 0, 2, 77]), EGRESS4.into(), EGRESS6.into()] {
            assert!(pod.udp_who(address).is_err() && pod.who(address).is_err(), "{node} to {address}");
        }
        assert!(pod.udp_who(owner.ipv4()).is_ok(), "the node's own address is direct");
    }
    let own = lab.add_pod(&owner.name, "shop", "own", VISITOR);
    assert!([IpAddr::from(EGRESS4), EGRESS6.into()].iter().all(|address| own.udp_who(*address).is_err()));
    let metrics = lab.metrics(&owner.name);
    assert!(metrics.dropped("to_owner").is_some_and(|n| n >= 12.0), "{metrics:?}");
}
