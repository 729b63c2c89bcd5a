//! Tunnel packets that the programs write and take apart themselves.

use super::{FAST, LEASE, TOLD, fast_packets, going_fast, scene};
use lab::client::udp_who_by;
use lab::fault_injection::{owner_and_other, plugged};
use lab::scene::{assert_leaves_by_egress, egress_towards};
use lab::server::UDP_WHO;
use lab::wire::{AS_THE_KERNEL, tunnel_payload};
use lab::{EGRESS4, EXT4, Host, Lab, Node, Pod, SERVERS, VISITOR};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;
use std::{iter, thread};

/// The packets that the tunnel device has received and sent.
fn of_device(node: &Node) -> [f64; 2] {
    let shown: Value = serde_json::from_str(&node.ip("-s -j link show egret")).expect("JSON");
    let stats = &shown[0]["stats64"];
    ["rx", "tx"].map(|way| stats[way]["packets"].as_f64().expect("a number"))
}

/// A connection of UDP, each of whose requests has an answer.
struct Asking {
    socket: UdpSocket,
    server: IpAddr,
}

impl Asking {
    fn new(pod: &Pod, server: IpAddr) -> Asking {
        Asking { socket: pod.udp_socket(SocketAddr::new(server, UDP_WHO)).expect("a socket"), server }
    }

    fn asks(&self) -> bool {
        udp_who_by(&self.socket).is_ok_and(|address| address == egress_towards(self.server))
    }

    /// Asks so often that both directions have a lease.
    #[track_caller]
    fn asks_often(&self) {
        let answered = (0..150).filter(|_| self.asks()).count();
        assert!(answered >= 149, "{answered} of 150 answers");
    }
}

/// Panics unless of these requests most pass the tunnel devices by, both ways, on both nodes.
#[track_caller]
fn assert_devices_are_passed_by(lab: &Lab, nodes: &[&str], asking: &Asking, what: &str) {
    let counted = || nodes.iter().map(|node| fast_packets(lab, node)).collect::<Vec<_>>();
    // The interfaces of a new pod are looked at a moment later.
    lab.wait_until(&format!("{what}: packets go the fast way"), Duration::from_secs(10), || {
        let before = counted();
        asking.asks_often();
        counted().iter().zip(before).all(|(now, before)| *now > before + 100.0)
    });
    let devices = || nodes.iter().map(|node| of_device(lab.node(node))).collect::<Vec<_>>();
    let (before, fast) = (devices(), counted());
    let mut answered = 0;
    for _ in 0..400 {
        answered += u32::from(asking.asks());
    }
    assert!(answered >= 399, "{what}: {answered} of 400 answers");
    for (at, after) in devices().iter().enumerate() {
        let node = nodes[at];
        for way in 0..2 {
            // Each lease is renewed by a packet, and nodes ask each other whether they live.
            let passed = after[way] - before[at][way];
            assert!(passed < 150.0, "{what}: {passed} packets through the device on {node}, {before:?} {after:?}");
        }
        assert!(fast_packets(lab, node) >= fast[at] + 300.0, "{what}: few fast packets on {node}");
    }
}

fn passes_by(lab: &Lab) {
    let (owner, _) = owner_and_other(lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    for server in SERVERS {
        assert_devices_are_passed_by(lab, &["n1", &owner], &Asking::new(&pod, server), &server.to_string());
    }
    lab.assert_nothing_leaked();
}

#[test]
fn tunnel_packets_pass_the_tunnel_device_by_on_both_nodes() {
    passes_by(&scene(FAST));
}

#[test]
fn ipv6_tunnel_packets_pass_the_tunnel_device_by_on_both_nodes() {
    passes_by(&Lab::builder().ipv6_tunnel().node_arguments(FAST).scene());
}

/// Switches off what lets the sum of a packet be computed later, so that each is on the wire as it is sent.
fn sums_at_once(host: &Host) {
    host.run(["ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off"]);
}

/// The kernel checks what the programs have written: on the other node everything takes the kernel's own way.
fn checksums_are_right(lab: &Lab) {
    let (owner, _) = owner_and_other(lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    sums_at_once(&pod);
    sums_at_once(lab.host("ext"));
    for slow in [&*owner, "n1"] {
        let fast = if slow == "n1" { &*owner } else { "n1" };
        lab.daemon(slow).term();
        let others = lab.node_daemon_arguments(slow).into_iter().filter(|a| !a.starts_with("--fast-path-lease"));
        let arguments = others.chain(iter::once("--fast-path-lease=0".to_owned())).collect();
        lab.start_daemon(slow, lab.node(slow), arguments);
        lab.wait_ready(slow);
        for server in SERVERS {
            lab.wait_seen_as(&pod, egress_towards(server));
            let asking = Asking::new(&pod, server);
            let by_device = || {
                let [_, before] = of_device(lab.node(fast));
                asking.asks_often();
                of_device(lab.node(fast))[1] - before
            };
            lab.wait_until(&format!("{fast} writes tunnel packets"), Duration::from_secs(10), || by_device() < 80.0);
            pod.bulk(server, 3_000_000).unwrap_or_else(|e| panic!("{fast} to {server}: {e}"));
        }
        let counted = lab.node(slow).run(["nstat", "-asz", "UdpInCsumErrors", "Udp6InCsumErrors", "UdpInErrors"]);
        let errors = counted.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        assert_eq!(errors.collect::<Vec<_>>(), [0, 0, 0], "of {slow}: {counted}");
        lab.daemon(slow).term();
        lab.start_node(slow);
        lab.wait_ready(slow);
    }
    lab.assert_nothing_leaked();
}

/// The tunnel's headers are written once for many segments, which the kernel or the interface makes later.
#[test]
fn packets_that_are_still_to_be_segmented_pass_the_tunnel_device_by() {
    const SIZE: usize = 300_000_000;
    let lab = scene(FAST);
    let (owner, _) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let nodes = ["n1", &owner].map(|node| lab.node(node));
    for by_kernel in [false, true] {
        if by_kernel {
            for node in nodes {
                node.run(["ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off"]);
                node.run(["ethtool", "-K", "eth0", "tx-udp_tnl-segmentation", "off"]);
            }
        }
        for server in SERVERS {
            let sent = || {
                let (before, fast) =
                    (nodes.map(|node| of_device(node)[1]), nodes.map(|node| fast_packets(&lab, &node.name)));
                pod.bulk(server, SIZE).unwrap_or_else(|e| panic!("to {server}: {e}"));
                let by_device = [0, 1].map(|at| of_device(nodes[at])[1] - before[at]);
                (by_device, [0, 1].map(|at| fast_packets(&lab, &nodes[at].name) - fast[at]))
            };
            // The first bytes of a connection take the kernel's own way, until its tracking is told to be liberal.
            let what = format!("{server}, segments by the kernel {by_kernel}: few pass the devices");
            lab.wait_until(&what, Duration::from_secs(30), || {
                let (by_device, fast) = sent();
                println!("{what}: {by_device:?}, {fast:?} are written by the programs");
                (0..2).all(|at| fast[at] > 3.0 * by_device[at])
            });
        }
    }
    lab.assert_nothing_leaked();
}

#[test]
fn the_kernel_finds_the_checksums_of_written_tunnel_packets_right() {
    checksums_are_right(&scene(FAST));
}

#[test]
fn the_kernel_finds_the_checksums_of_written_ipv6_tunnel_packets_right() {
    checksums_are_right(&Lab::builder().ipv6_tunnel().node_arguments(FAST).scene());
}

/// Panics unless the connection ends within the time after this, and goes on after that.
#[track_caller]
fn assert_ends(asking: &Asking, what: &str, within: Duration, end: impl FnOnce(), mend: impl FnOnce()) {
    asking.asks_often();
    end();
    thread::sleep(within);
    for _ in 0..3 {
        assert!(!asking.asks(), "{what}: still answered");
    }
    mend();
    let answered = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(100));
        asking.asks()
    });
    assert!(answered, "{what}: mended, and not answered");
}

/// A scene with a pod on n1 whose connections go the fast way, and the only gateway: none takes over from it.
fn with_one_gateway(arguments: &[&str]) -> (Lab, Pod, String) {
    let (lab, pod, session, flood, owner) = going_fast(arguments);
    drop((session.stop(), flood.stop()));
    let (_, other) = owner_and_other(&lab);
    plugged(&lab, &other, false);
    // The others know.
    thread::sleep(Duration::from_secs(3));
    (lab, pod, owner)
}

#[test]
fn the_hosts_rules_for_tunnel_packets_hold_on_both_nodes() {
    let (lab, pod, owner) = with_one_gateway(&["--own-tables=false"]);
    let asking = Asking::new(&pod, EXT4.into());
    let nodes = ["n1", &*owner];
    for node in nodes.map(|name| lab.node(name)) {
        for hook in ["input", "output", "postrouting"] {
            let what = format!("{hook} on {}", node.name);
            let chain = format!("chain f {{ type filter hook {hook} priority 10; udp dport 7871 drop; }}");
            let add = || drop(node.nft(&format!("table inet firewall {{ {chain}; }}")));
            let remove = || drop(node.nft("delete table inet firewall"));
            assert_devices_are_passed_by(&lab, &nodes, &asking, &what);
            assert_ends(&asking, &what, TOLD, add, remove);
            // Nobody notices, and a lease lasts a second.
            let daemon = lab.daemon(&node.name);
            let unnoticed = || {
                daemon.suspend(true);
                add();
            };
            let mended = || {
                remove();
                daemon.suspend(false);
            };
            assert_devices_are_passed_by(&lab, &nodes, &asking, &what);
            assert_ends(&asking, &format!("{what}, daemon stopped"), LEASE, unnoticed, mended);
        }
    }
    assert_devices_are_passed_by(&lab, &nodes, &asking, "before iptables-legacy");
    let node = lab.node(&owner);
    let rule = |verb| drop(node.run(["iptables-legacy", verb, "INPUT", "-p", "udp", "--dport", "7871", "-j", "DROP"]));
    assert_ends(&asking, "iptables-legacy", LEASE, || rule("-I"), || rule("-D"));
    assert_leaves_by_egress(&pod);
}

#[test]
fn a_lease_of_the_other_nodes_mac_address_ends() {
    let (lab, pod, owner) = with_one_gateway(&[]);
    let asking = Asking::new(&pod, EXT4.into());
    assert_devices_are_passed_by(&lab, &["n1", &owner], &asking, "at first");
    let node = lab.node("n1");
    let to = format!("{} dev eth0", lab.node(&owner).ipv4());
    // It has moved to another host, as far as n1 knows: nobody answers there.
    let moved = || drop(node.ip(&format!("neigh replace {to} lladdr 02:00:00:00:99:99 nud permanent")));
    assert_ends(&asking, "another MAC address", LEASE, moved, || drop(node.ip(&format!("neigh del {to}"))));
}

#[test]
fn what_the_tunnel_device_must_see_and_no_plain_interface_takes_the_tunnel_device() {
    let (lab, pod, session, flood, owner) = going_fast(&[]);
    drop((session.stop(), flood.stop()));
    let asking = Asking::new(&pod, EXT4.into());
    let node = lab.node("n1");
    let by_device = |what: &str| {
        let said = || lab.manifests().statuses().contains(what);
        lab.wait_until("the status says so", Duration::from_secs(10), said);
        asking.asks_often();
        let ([_, before], fast) = (of_device(node), fast_packets(&lab, "n1"));
        (0..100).for_each(|_| assert!(asking.asks(), "{what}"));
        let [_, sent] = of_device(node);
        assert!(sent >= before + 95.0, "{what}: {before} {sent}");
        assert!(fast_packets(&lab, "n1") >= fast + 50.0, "{what}: the fast way goes by the device");
    };
    assert_devices_are_passed_by(&lab, &["n1", &owner], &asking, "at first");
    node.run(["tc", "qdisc", "add", "dev", "egret", "root", "pfifo"]);
    by_device("egret (it has the queueing discipline pfifo)");
    node.run(["tc", "qdisc", "del", "dev", "egret", "root"]);
    lab.wait_until("it is plain again", Duration::from_secs(10), || !lab.manifests().statuses().contains("pfifo"));
    assert_devices_are_passed_by(&lab, &["n1", &owner], &asking, "without the discipline");
    // A bridge has the node's address now, and eth0 is its port.
    let (own, own6) = (node.ipv4(), node.ipv6());
    let routes = lab.nodes().iter().filter(|other| other.name != "n1");
    let mac = node.run(["cat", "/sys/class/net/eth0/address"]);
    let mut lines = vec![
        "link add br1 type bridge".to_owned(),
        format!("link set br1 address {}", mac.trim()),
        "link set br1 up".to_owned(),
        format!("addr del {own}/24 dev eth0"),
        format!("addr del {own6}/64 dev eth0"),
        "link set eth0 master br1".to_owned(),
        format!("addr add {own}/24 dev br1"),
        format!("addr add {own6}/64 dev br1 nodad"),
    ];
    lines.extend(routes.flat_map(|other| {
        [
            format!("route replace {} via {}", other.pods4(), other.ipv4()),
            format!("route replace {} via {}", other.pods6(), other.ipv6()),
        ]
    }));
    node.ip_batch(&lines);
    let again = || asking.asks();
    lab.wait_until("it goes on by the bridge", Duration::from_secs(20), again);
    by_device("br1 (it is a virtual device of the kind bridge)");
    assert_leaves_by_egress(&pod);
}

#[test]
fn tunnel_packets_of_others_cannot_use_a_lease() {
    let (lab, pod, session, flood, owner) = going_fast(&[]);
    drop((session.stop(), flood.stop()));
    let asking = Asking::new(&pod, EXT4.into());
    let local = asking.socket.local_addr().expect("an address");
    // Another connection of the same pod and port: so its tunnel packets can be told from the forged ones.
    let (client, server) = (SocketAddr::new(pod.ipv4().into(), local.port()), SocketAddr::new(EXT4.into(), UDP_WHO));
    let id = lab.egress_id("shop/visitors");
    let (n1, n2, gateway) = (lab.node("n1"), lab.node("n2"), lab.node(&owner));
    let (to, from) = (gateway.tunnel_mac(), n1.tunnel_mac());
    let right = tunnel_payload(AS_THE_KERNEL, [&to, &from], id, client, server);
    let send = |host: &Host, mark: Option<u32>, payload: &[u8]| {
        asking.asks_often();
        lab.forget_wire();
        let socket = host.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("bind");
        if let Some(mark) = mark {
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &mark).expect("SO_MARK");
        }
        for _ in 0..20 {
            drop(socket.send_to(payload, (gateway.ipv4(), 7871)));
        }
        thread::sleep(Duration::from_millis(100));
        lab.sources(EXT4)
    };
    // From a host that is no node, from a pod, from a process of a node.
    assert!(send(lab.host("ext"), None, &right).is_empty());
    assert!(send(&lab.add_pod("n2", "office", "forger", &[]), None, &right).is_empty());
    assert!(send(n1, None, &right).is_empty());
    // By root on a node, with another egress ID, or with the MAC address of another node device.
    let tunnel = Some(0x4547_0000);
    assert!(send(n1, tunnel, &tunnel_payload(AS_THE_KERNEL, [&to, &from], id + 1, client, server)).is_empty());
    assert!(send(n1, tunnel, &tunnel_payload(AS_THE_KERNEL, [&n2.tunnel_mac(), &from], id, client, server)).is_empty());
    assert_eq!(send(n1, tunnel, &right), [EGRESS4.into()].into(), "the packet of this test is no tunnel packet");
    assert_leaves_by_egress(&pod);
}
