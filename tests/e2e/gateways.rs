//! The effects of an EgressGateway's fields. Needs root.

use lab::fault_injection::{owner_and_other, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::server::{ECHO, UDP_WHO};
use lab::{
    EGRESS4, EGRESS6, EXT4, EXT6, FAR4, FAR6, Host, Lab, Node, Pod, SERVERS, Server, VISITOR, machine, manifests,
};
use lab::{fault_injection, topology};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
/// A server in a network that only gateway nodes are connected to.
const PARTNER4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);
const PARTNER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x200);

/// The lab's gateway with more lines in its spec.
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

fn has(node: &Node, interface: &str, address: IpAddr) -> bool {
    node.ip(&format!("addr show dev {interface}")).contains(&format!("{address}/"))
}

fn wait_blocked(lab: &Lab, pod: &Pod, server: impl Into<IpAddr>) {
    let server = server.into();
    lab.wait_until(&format!("{} is blocked", pod.name), PATIENCE, || pod.udp_who(server).is_err());
}

#[test]
fn traffic_of_a_gateway_with_a_next_hop_uses_it_and_not_the_main_table() {
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
    // A missing next hop must not make packets take another way.
    lab.write_manifest("gateway.yaml", &gateway_with("  nextHop: { ipv4: 192.0.2.250 }\n"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, FAR4));
    // Destinations on the link do not use the next hop.
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, EGRESS4));
    lab.write_manifest("gateway.yaml", &gateway_with(""));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, EGRESS4));
}

/// A partner's network, to which the gateway nodes have a second interface, and a server behind its router.
fn partners_network(lab: &Lab, interfaces: [&str; 2]) -> (Host, Server) {
    topology::namespaces(lab.name(), &["partner"]);
    let partner = Host::open("partner", &format!("{}-partner", lab.name()));
    partner.sysctl(&["net.ipv6.conf.default.accept_dad=0"]);
    partner.ip_batch(&[
        "link set lo up".into(),
        format!("addr add {PARTNER4}/32 dev lo"),
        format!("addr add {PARTNER6}/128 dev lo nodad"),
        "link add br0 type bridge mcast_snooping 0".into(),
        "addr add 198.51.100.1/24 dev br0".into(),
        "addr add 2001:db8:51::1/64 dev br0 nodad".into(),
        "link set br0 up".into(),
        // The server answers datagrams from the address to which they were sent.
        format!("route add 198.51.100.50 dev br0 src {PARTNER4}"),
        format!("route add 2001:db8:51::50 dev br0 src {PARTNER6}"),
    ]);
    for (node, interface) in ["g1", "g2"].map(|name| lab.node(name)).into_iter().zip(interfaces) {
        node.ip_batch(&[
            format!("link add {interface} type veth peer name p-{} netns {}", node.name, partner.netns),
            format!("addr add 198.51.100.{}/24 dev {interface}", node.spec.last),
            format!("addr add 2001:db8:51::{}/64 dev {interface} nodad", node.spec.last),
            format!("link set {interface} up"),
            // The main table's route to everything else is dead.
            "route add default via 192.0.2.254".into(),
            "route add default via 2001:db8::fe".into(),
        ]);
        node.sysctl(&[&format!("net.ipv4.conf.{interface}.rp_filter=2")]);
        partner.ip(&format!("link set p-{} master br0 up", node.name));
    }
    let server = Server::start(&partner);
    (partner, server)
}

#[test]
fn traffic_of_a_gateway_on_a_second_interface_uses_this_interface_and_its_next_hop() {
    let lab = Lab::new();
    let (_partner, _server) = partners_network(&lab, ["eth1", "eth1"]);
    // Without a route to the source, the usual settings of distributions drop packets.
    for node in ["n1", "n2"] {
        lab.node(node).sysctl(&["net.ipv4.conf.all.rp_filter=0"]);
    }
    let (egress4, egress6): (IpAddr, IpAddr) = ([198, 51, 100, 50].into(), "2001:db8:51::50".parse().expect("IPv6"));
    let address = format!("podSelector: {{}}\n  address: {{ ipv4: {egress4}, ipv6: \"{egress6}\" }}");
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "partner", &address));
    let gateway = manifests::gateway("default", &["198.51.100.50-198.51.100.59", "2001:db8:51::50-2001:db8:51::59"])
        + "  interface: eth1\n  nextHop: { ipv4: 198.51.100.1, ipv6: \"2001:db8:51::1\" }\n";
    lab.write_manifest("gateway.yaml", &gateway);
    lab.start();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), &[]));
    let seen_everywhere = || {
        for pod in &pods {
            for (server, egress) in [(IpAddr::V4(PARTNER4), egress4), (IpAddr::V6(PARTNER6), egress6)] {
                lab.wait_for(&format!("{server} to see {}", pod.name), &Some(egress), || pod.who(server).ok());
                assert_eq!(pod.udp_who(server).ok(), Some(egress), "{} by UDP", pod.name);
            }
        }
    };
    seen_everywhere();
    lab.node("n1").ip("route add default via 192.0.2.254");
    lab.node("n1").sysctl(&["net.ipv4.conf.all.rp_filter=1"]);
    seen_everywhere();
    let (owner, other) = if has(lab.node("g1"), "eth1", egress4) { ("g1", "g2") } else { ("g2", "g1") };
    assert!(!has(lab.node(owner), "eth0", egress4) && !has(lab.node(other), "eth1", egress4));

    // The same from the other node.
    fault_injection::label(&lab, owner, &[("egret.dev/gateway", "no")]);
    lab.wait_until(&format!("{other} alone has it"), PATIENCE, || {
        has(lab.node(other), "eth1", egress4) && !has(lab.node(owner), "eth1", egress4)
    });
    seen_everywhere();

    // Its interface goes down: the allocation moves, and policies are still enforced there.
    lab.node(other).ip("link set eth1 down");
    fault_injection::label(&lab, owner, &[("egret.dev/gateway", "true")]);
    lab.wait_until(&format!("{owner} has it"), PATIENCE, || has(lab.node(owner), "eth1", egress4));
    seen_everywhere();
    let late = lab.add_pod(other, "office", "late", &[]);
    let of_office = manifests::policy("office", "late", "podSelector: {}\n  address: { ipv4: 198.51.100.51 }");
    lab.write_manifest("office.yaml", &of_office);
    let egress: IpAddr = [198, 51, 100, 51].into();
    lab.wait_for("the partner to see it", &Some(egress), || late.who(PARTNER4).ok());
    lab.node(other).ip("link set eth1 up");
    fault_injection::label(&lab, owner, &[("egret.dev/gateway", "no")]);
    lab.wait_until(&format!("{other} alone has it"), PATIENCE, || {
        has(lab.node(other), "eth1", egress4) && !has(lab.node(owner), "eth1", egress4)
    });
    seen_everywhere();
    lab.remove_manifest("office.yaml");

    // Its routes and rules in the kernel are removed with it.
    let ways = |node: &str| {
        let of = |family: &str| {
            let node = lab.node(node);
            node.ip(&format!("{family} rule show pref 74"))
                + &node.ip(&format!("{family} route show table all dev eth1"))
        };
        let all = of("-4") + &of("-6");
        all.lines().filter(|line| line.contains("7881")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ways(other).len(), 6, "a rule and two routes of each family: {:?}", ways(other));
    // The encrypted packets of Calico's WireGuard, between nodes, are not of this uplink.
    let way = |mark: &str| {
        let out = lab.node(other).try_run(["ip", "route", "get", "203.0.113.9", "mark", mark]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert!(way("0x3fe00000").contains("dev eth1"), "{}", way("0x3fe00000"));
    assert!(!way("0x200000").contains("dev eth1"), "{}", way("0x200000"));
    lab.remove_manifest("gateway.yaml");
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, PARTNER4));
    for node in ["g1", "g2"] {
        lab.wait_until(&format!("nothing is left on {node}"), PATIENCE, || ways(node).is_empty());
    }
}

#[test]
fn nodes_may_name_the_gateways_interface_differently() {
    let lab = Lab::new();
    let (_partner, _server) = partners_network(&lab, ["eth1", "ens192"]);
    lab.node("n1").sysctl(&["net.ipv4.conf.all.rp_filter=0"]);
    let (egress4, egress6): (IpAddr, IpAddr) = ([198, 51, 100, 50].into(), "2001:db8:51::50".parse().expect("IPv6"));
    let address = format!("podSelector: {{}}\n  address: {{ ipv4: {egress4}, ipv6: \"{egress6}\" }}");
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "partner", &address));
    let gateway = |interfaces: &str| {
        manifests::gateway("default", &["198.51.100.50-198.51.100.59", "2001:db8:51::50-2001:db8:51::59"])
            + &format!("  interfaces: {interfaces}\n  nextHop: {{ ipv4: 198.51.100.1, ipv6: \"2001:db8:51::1\" }}\n")
    };
    lab.write_manifest("gateway.yaml", &gateway("[bond7, ens192, eth1]"));
    lab.start();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), &[]));
    let mut holders = BTreeSet::new();
    for _ in 0..2 {
        for (pod, (server, egress)) in
            pods.iter().flat_map(|pod| [(PARTNER4.into(), egress4), (IpAddr::V6(PARTNER6), egress6)].map(|s| (pod, s)))
        {
            lab.wait_for(&format!("{server} to see {}", pod.name), &Some(egress), || pod.who(server).ok());
        }
        let (owner, interface) = if has(lab.node("g1"), "eth1", egress4) { ("g1", "eth1") } else { ("g2", "ens192") };
        assert!(has(lab.node(owner), interface, egress6), "{owner}");
        holders.insert(owner);
        // The other node's interface counts, by its own name.
        lab.node(owner).ip(&format!("link set {interface} down"));
        let (other, by) = if owner == "g1" { ("g2", "ens192") } else { ("g1", "eth1") };
        lab.wait_until(&format!("{other} has it"), PATIENCE, || has(lab.node(other), by, egress4));
        lab.node(owner).ip_batch(&[
            format!("link set {interface} up"),
            format!("addr replace 2001:db8:51::{}/64 dev {interface} nodad", lab.node(owner).spec.last),
        ]);
    }
    assert_eq!(holders.len(), 2, "{holders:?}");
    lab.write_manifest("gateway.yaml", &gateway("[bond7, bond8]"));
    pods.iter().for_each(|pod| wait_blocked(&lab, pod, PARTNER4));
    let said = "no interface \"bond7/bond8\"";
    lab.wait_until("the status says so", PATIENCE, || lab.manifests().statuses().contains(said));
}

#[test]
fn a_missing_interface_of_a_gateway_node_blocks_and_is_reported_in_the_status() {
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
fn a_vlan_that_the_kernel_does_not_make_blocks_and_is_reported_in_the_status() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    // No kernel has a VLAN on a loopback device.
    let vlan = "  vlan: 100\n  nextHop: { ipv4: 192.0.2.100, ipv6: \"2001:db8::100\" }\n";
    lab.write_manifest("gateway.yaml", &gateway_with(&format!("  interface: lo\n{vlan}")));
    wait_blocked(&lab, &pod, EXT4);
    lab.wait_until("the status says so", PATIENCE, || {
        let statuses = lab.manifests().statuses();
        statuses.contains("cannot make the interface egret1.100 of the VLAN 100 on lo") && statuses.contains("8021q")
    });
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
fn egress_ips_leave_a_node_that_loses_the_gateways_label() {
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
fn egress_ips_answer_ping_if_the_gateway_allows_it() {
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

/// A UDP socket of the pod with this port, to which the server has answered.
fn udp_from(pod: &Pod, port: u16, server: IpAddr) -> UdpSocket {
    let own: IpAddr = if server.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
    let socket = pod.within(|| UdpSocket::bind((own, port))).expect("a port");
    socket.connect((server, UDP_WHO)).expect("a route");
    socket.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
    for _ in 0..3 {
        socket.send(b"who").expect("send");
        machine::receive(&socket, &mut [0; 64])
            .unwrap_or_else(|e| panic!("{} from port {port} to {server}: {e}", pod.name));
    }
    socket
}

/// A TCP connection of the pod from this port.
fn tcp_from(pod: &Pod, port: u16) -> OwnedFd {
    let made = pod.within(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None));
    let stream = made.expect("a socket");
    bind(stream.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))).expect("a port");
    let server = SockaddrIn::from(SocketAddrV4::new(EXT4, ECHO));
    connect(stream.as_raw_fd(), &server).unwrap_or_else(|e| panic!("{} from port {port}: {e}", pod.name));
    stream
}

#[test]
fn a_connection_whose_port_is_taken_gets_another_port_and_is_counted() {
    let lab = Lab::scene();
    let [one, two] = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let (owner, _) = owner_and_other(&lab);
    let counted = || lab.metrics(&owner).get("egret_node_other_port_connections_total", &[]).expect("a counter");
    let before = counted();
    // Below the ports that the kernel chooses, which other connections use.
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
    assert_eq!(lab.metrics(&owner).dropped("other_port"), None, "nothing is lost by it");
    drop((stream, other, open));
}

/// The machine still runs, and must give its egress IPs to the others.
#[test]
fn a_gateway_node_that_is_deleted_from_the_cluster_gives_up_its_egress_ips() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    lab.remove_manifest(&format!("node-{owner}.yaml"));
    wait_holder(&lab, &other);
    lab.wait_seen_as(&pod, EGRESS4);
    assert_leaves_by_egress(&pod);
}

/// A next hop that the kernel rejects is a fault of one gateway only.
#[test]
fn an_invalid_next_hop_affects_no_other_gateway() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let (owner, _) = owner_and_other(&lab);
    // A node's own address is no router.
    let own = lab.node(&owner).ipv4();
    let second = manifests::gateway("second", &["192.0.2.70"]).replace("default: true", "default: false");
    lab.write_manifest("second.yaml", &format!("{second}  nextHop: {{ ipv4: {own} }}\n"));
    lab.wait_until("the log says so", PATIENCE, || {
        let log = lab.daemon(&owner).log();
        log.contains("next hop 0.0.0.0/0") && log.contains(&format!("{own}")) && log.contains("invalid gateway")
    });
    lab.wait_ready(&owner);
    assert_leaves_by_egress(&pod);
    let late = lab.add_pod(&owner, "office", "late", &[]);
    lab.write_manifest(
        "office.yaml",
        &manifests::policy("office", "late", "podSelector: {}\n  address: { ipv4: 192.0.2.55 }"),
    );
    lab.wait_seen_as(&late, [192, 0, 2, 55]);
}
