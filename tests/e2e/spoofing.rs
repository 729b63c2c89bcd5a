//! Spoofing: forged addresses, forged tunnel packets, and marks that other programs clear. Needs root.

use lab::fault_injection::owner_and_other;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, egress_towards};
use lab::server::UDP_WHO;
use lab::wire::tunnel_payload;
use lab::{EGRESS4, EXT4, EXT6, Lab, Pods, SERVERS, Server, VISITOR};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::thread;
use std::time::Duration;

#[test]
fn a_pod_cannot_send_with_another_pods_address() {
    let lab = Lab::scene();
    lab.write_rich();
    for node in ["n1", "n2", "g1"] {
        let rich = lab.add_pod(node, "shop", &format!("rich-{node}"), &[("app", "rich")]);
        lab.wait_seen_as(&rich, [192, 0, 2, 56]);
        let forger = lab.add_pod(node, "shop", &format!("forger-{node}"), VISITOR);
        let outsider = lab.add_pod(node, "office", &format!("outsider-{node}"), &[]);
        // So that neighbours are known and the forged packet is sent at once.
        assert_leaves_by_egress(&forger);
        assert_leaves_by_node(&outsider);
        lab.forget_wire();
        for pod in [&forger, &outsider] {
            for (own, server) in [(IpAddr::from(rich.ipv4()), IpAddr::from(EXT4)), (rich.ipv6().into(), EXT6.into())] {
                pod.send_as(own, server);
            }
        }
        thread::sleep(Duration::from_millis(50));
        lab.assert_nothing_arrives();
        let metrics = lab.metrics(node);
        assert!(metrics.dropped("spoofed").is_some_and(|n| n >= 2.0), "{node}: {metrics:?}");
    }
}

#[test]
fn tunnel_packets_from_anyone_but_a_node_are_dropped() {
    tunnel_packets_are_nodes_alone(false);
}

#[test]
fn ipv6_tunnel_packets_from_anyone_but_a_node_are_dropped() {
    tunnel_packets_are_nodes_alone(true);
}

fn tunnel_packets_are_nodes_alone(ipv6: bool) {
    let lab = if ipv6 { Lab::builder().ipv6_tunnel() } else { Lab::builder() }.scene();
    let victim = lab.add_pod("n1", "shop", "victim", VISITOR);
    assert_leaves_by_egress(&victim);
    let owner = lab.node(&owner_and_other(&lab).0);
    let (to_mac, from_mac) = (owner.tunnel_mac(), lab.node("n1").tunnel_mac());
    let (from, to) = ((victim.ipv4(), 12345).into(), (EXT4, UDP_WHO).into());
    let payload = tunnel_payload(0, [&to_mac, &from_mac], lab.egress_id("shop/visitors"), from, to);
    let everybody = || -> Vec<SocketAddr> {
        if ipv6 {
            let link = nix::net::if_::if_nametoindex("eth0").expect("eth0");
            vec![SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 7871, 0, link).into()]
        } else {
            let everybody = [Ipv4Addr::BROADCAST, Ipv4Addr::new(192, 0, 2, 255), Ipv4Addr::new(224, 0, 0, 1)];
            everybody.map(|to| (to, 7871).into()).into()
        }
    };
    let (any, address): (IpAddr, IpAddr) = if ipv6 {
        (Ipv6Addr::UNSPECIFIED.into(), owner.ipv6().into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), owner.ipv4().into())
    };
    let send_from = |host: &lab::Host| {
        let (socket, everybody) = host.within(|| (UdpSocket::bind((any, 0)).expect("bind"), everybody()));
        socket.set_broadcast(true).expect("SO_BROADCAST");
        for to in everybody.into_iter().chain([(address, 7871).into()]) {
            // Some senders have no route to some addresses.
            drop(socket.send_to(&payload, to));
        }
        thread::sleep(Duration::from_millis(100));
    };
    let nodes = ["n1", "n2", "g1", "g2"];
    let selected = nodes.map(|node| lab.add_pod(node, "shop", &format!("selected-{node}"), VISITOR));
    let others = nodes.map(|node| lab.add_pod(node, "office", &format!("other-{node}"), &[]));
    lab.forget_wire();
    for untracked in [false, true] {
        if untracked {
            // From a sender that is no node.
            for (node, iptables) in lab.nodes().iter().flat_map(|node| ["iptables", "ip6tables"].map(|i| (node, i))) {
                let tunnel = ["-p", "udp", "--dport", "7871"];
                node.run([&[iptables, "-t", "raw", "-I", "PREROUTING"][..], &tunnel, &["-j", "NOTRACK"]].concat());
            }
        }
        selected.iter().chain(&others).for_each(|pod| send_from(pod));
        send_from(lab.host("ext"));
        lab.assert_nothing_arrives();
    }

    // With a node's address, from the owner's own pods, whatever the filter.
    let node: IpAddr = if ipv6 { lab.node("n1").ipv6().into() } else { lab.node("n1").ipv4().into() };
    for pod in selected.iter().chain(&others).filter(|pod| pod.node.name == owner.name) {
        for rp_filter in ["0", "1", "2"] {
            for interface in ["all", "default", &pod.host_interface()] {
                owner.sysctl(&[&format!("net.ipv4.conf.{interface}.rp_filter={rp_filter}")]);
            }
            pod.ip(&format!(
                "addr add {node}/{} dev eth0 {}",
                if ipv6 { 128 } else { 32 },
                if ipv6 { "nodad" } else { "" }
            ));
            let socket = pod.within(|| UdpSocket::bind((node, 0))).expect("bind");
            drop(socket.send_to(&payload, (address, 7871)));
            thread::sleep(Duration::from_millis(50));
            pod.ip(&format!("addr del {node}/{} dev eth0", if ipv6 { 128 } else { 32 }));
            lab.assert_nothing_arrives();
        }
    }

    // From a process on a node: straight, and to a Service that stands for the owner.
    for node in ["n1", &owner.name] {
        let host = lab.node(node);
        let (ip, service) = if ipv6 { ("ip6", "fd00:10::1") } else { ("ip", "10.96.0.9") };
        host.nft(&format!(
            "table inet services {{ chain out {{ type nat hook output priority -100; \
             {ip} daddr {service} udp dport 53 dnat {ip} to {}; }}; }}",
            SocketAddr::new(address, 7871)
        ));
        send_from(host);
        let socket = host.within(|| UdpSocket::bind((any, 0))).expect("bind");
        host.ip(&format!("route add {service} dev eth0"));
        drop(socket.send_to(&payload, (service.parse::<IpAddr>().expect("an address"), 53)));
        thread::sleep(Duration::from_millis(100));
        lab.assert_nothing_arrives();
    }
    let metrics = lab.metrics("n1");
    assert!(metrics.dropped("foreign").is_some_and(|n| n >= 2.0), "{metrics:?}");

    // The same packet with the mark of the tunnel device's packets, which only root can set: the gateway node accepts
    // it.
    let socket = lab.node("n1").within(|| UdpSocket::bind((any, 0))).expect("bind");
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &0x4547_0000).expect("SO_MARK");
    socket.send_to(&payload, (address, 7871)).expect("send");
    thread::sleep(Duration::from_millis(100));
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "the packet of this test is no tunnel packet");
}

#[test]
fn a_process_on_the_owner_cannot_send_from_an_egress_ip() {
    let lab = Lab::scene();
    let owner = lab.node(&owner_and_other(&lab).0);
    for server in SERVERS {
        let egress = egress_towards(server);
        let socket = owner.within(|| UdpSocket::bind((egress, 0))).expect("it is an address of the owner's");
        drop(socket.send_to(b"who", (server, lab::server::UDP_WHO)));
        thread::sleep(Duration::from_millis(50));
        assert!(lab.sources(server).is_empty(), "{server} saw {:?}", lab.sources(server));
    }
}

/// Whatever the other source address filters are: IPv6 has none, and IPv4's can be switched off.
#[test]
fn a_pod_cannot_send_from_an_egress_ip() {
    let lab = Lab::scene();
    for node in lab.nodes() {
        node.set_rp_filter(0);
        for labels in [&[][..], VISITOR] {
            let forger = lab.add_pod(&node.name, "shop", &format!("forger-{}-{}", node.name, labels.len()), labels);
            // So that neighbours are known and the forged packet is sent at once.
            for server in SERVERS {
                forger.udp_who(server).expect("an answer");
            }
            lab.forget_wire();
            for server in SERVERS {
                forger.send_as(egress_towards(server), server);
            }
            thread::sleep(Duration::from_millis(50));
            lab.assert_nothing_arrives();
        }
        let spoofed = lab.metrics(&node.name).dropped("spoofed");
        assert!(spoofed.is_some_and(|n| n >= 3.0), "{}: {spoofed:?}", node.name);
    }
}

#[test]
fn a_node_forwards_tunnel_packets_of_nodes_only() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let routers = ["n2", &other];
    for router in routers {
        // Without a redirect that tells the others a shorter way.
        lab.node(router).sysctl(&["net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0"]);
        for (from, to) in [("n1", &*owner), (&*owner, "n1")] {
            let to = lab.node(to).ipv4();
            lab.node(from).ip(&format!("route replace {to}/32 via {}", lab.node(router).ipv4()));
        }
        let pod = lab.add_pod("n1", "shop", &format!("visitor-{router}"), VISITOR);
        assert_leaves_by_egress(&pod);
        let other_pod = lab.add_pod(router, "office", &format!("other-{router}"), &[]);
        let before = lab.metrics(router).dropped("foreign").unwrap_or_default();
        let socket = other_pod.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("bind");
        drop(socket.send_to(b"no tunnel packet", (lab.node(&owner).ipv4(), 7871)));
        lab.wait_until("it is counted", Duration::from_secs(5), || {
            lab.metrics(router).dropped("foreign").unwrap_or_default() > before
        });
    }
    lab.assert_nothing_leaked();
}

#[test]
fn nothing_leaks_if_another_program_clears_marks() {
    let lab = Lab::scene();
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    for nodes in [["n1", "n2"], ["g1", "g2"]] {
        for chain in [
            "prerouting priority -299; meta mark set 0;",
            "prerouting priority mangle; meta mark set 0;",
            "prerouting priority mangle; meta mark set ct mark;",
            "prerouting priority -50; meta mark set 0;",
            "prerouting priority -50; meta l4proto { icmp, ipv6-icmp } meta mark set 0;",
            "forward priority mangle; meta mark set 0;",
            "forward priority 0; meta mark set 0;",
        ] {
            let nodes = nodes.map(|node| lab.node(node));
            let table = format!("table inet other {{ chain clear {{ type filter hook {chain} }}; }}");
            nodes.iter().for_each(|node| drop(node.nft(&table)));
            for (pod, server) in pods.iter().flat_map(|pod| SERVERS.map(|server| (pod, server))) {
                // On a source node, a packet that was already routed no longer needs the mark.
                let who = pod.udp_who(server);
                assert!(who.is_err() || who.ok() == Some(egress_towards(server)), "{chain} on {}", nodes[0].name);
                // Late replies are answered with an ICMP error.
                for _ in 0..10 {
                    let socket = pod.udp_socket((server, lab::server::UDP_WHO).into()).expect("a socket");
                    drop(socket.send(b"who"));
                }
            }
            thread::sleep(Duration::from_millis(100));
            nodes.iter().for_each(|node| drop(node.nft("delete table inet other")));
            pods.iter().for_each(assert_leaves_by_egress);
            lab.assert_nothing_leaked();
        }
    }
}

#[test]
fn a_pod_whose_pod_mark_is_overwritten_reaches_the_cluster_only() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    let (owner, _) = owner_and_other(&lab);
    for node in ["n1", "n2", &owner] {
        let selected = lab.add_pod(node, "shop", &format!("selected-{node}"), VISITOR);
        let other = lab.add_pod(node, "office", &format!("other-{node}"), &[]);
        assert_leaves_by_egress(&selected);
        let sessions = SERVERS.map(|server| selected.session(server).expect("a session"));
        // As iptables' CONNMARK --restore-mark without a mask does.
        lab.node(node).nft(
            "table inet other { chain restore { type filter hook prerouting priority mangle; meta mark set ct mark; }; }",
        );
        lab.forget_wire();
        if lab.node(node).spec.pods == Pods::Routed {
            // The veth identifies the pod again.
            assert_leaves_by_egress(&selected);
        } else {
            assert_blocked(&selected);
            let unmarked = lab.metrics(node).dropped("unmarked");
            assert!(unmarked.is_some_and(|n| n >= SERVERS.len() as f64), "on {node}: {unmarked:?}");
        }
        for address in [IpAddr::from(inside.ipv4()), inside.ipv6().into()] {
            assert!(selected.who(address).is_ok(), "from {node} to {address}, inside the cluster");
        }
        for session in sessions {
            let report = session.stop();
            assert!(report.broken.is_none(), "it is not refused: {report:?}");
        }
        let left = SERVERS.map(|server| lab.sources(server));
        let routed = lab.node(node).spec.pods == Pods::Routed;
        let wanted = SERVERS.map(|server| routed.then(|| egress_towards(server)).into_iter().collect());
        assert_eq!(left, wanted, "on {node}");
        assert_leaves_by_node(&other);
        lab.node(node).nft("delete table inet other");
        assert_leaves_by_egress(&selected);
        selected.delete();
        other.delete();
    }
}
