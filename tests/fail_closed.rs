//! Nothing leaks: whatever is away, broken or forged, no packet of a selected pod leaves with another address.

mod lab;

use lab::kernel::difference;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, egress_towards, visitors};
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, Lab, Node, Pod, Pods, SERVERS, Server, VISITOR, manifests};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// The node that holds the scene's address now.
fn owner(lab: &Lab) -> &Node {
    let has = |n: &&std::sync::Arc<Node>| n.ip("-o addr").contains(&format!(" {EGRESS4}/32 "));
    let owners: Vec<_> = lab.nodes().iter().filter(has).collect();
    assert_eq!(owners.len(), 1, "nodes that hold {EGRESS4}: {:?}", owners.iter().map(|n| &n.name).collect::<Vec<_>>());
    owners[0]
}

/// Packets that the node dropped, for a reason.
fn dropped(metrics: &lab::Metrics, reason: &str) -> f64 {
    metrics.get("egret_node_dropped_packets_total", &[("reason", reason)]).unwrap_or(0.0)
}

#[test]
fn a_daemon_killed_under_traffic_loses_nothing_leaks_nothing_and_doubles_nothing() {
    let lab = Lab::scene();
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let killed: Vec<&Node> = ["n1", "n2"].into_iter().map(|n| &**lab.node(n)).chain([owner(&lab)]).collect();
    let before: Vec<_> = killed.iter().map(|n| n.egret_state()).collect();
    let pace = Duration::from_millis(5);
    let floods: Vec<_> = pods
        .iter()
        .flat_map(|p| SERVERS.map(|server| [p.flood(server, pace, false), p.flood(server, pace, true)]))
        .flatten()
        .collect();
    let sessions: Vec<_> =
        pods.iter().flat_map(|p| SERVERS.map(|server| p.session(server).expect("a session"))).collect();
    for round in 0..8 {
        for node in &killed {
            let daemon = lab.daemon(&node.name);
            daemon.kill9();
            daemon.restart();
        }
        // From the first lines of its start to long after it.
        thread::sleep(Duration::from_millis(round * round * 10));
    }
    killed.iter().for_each(|n| lab.wait_ready(&n.name));
    thread::sleep(Duration::from_millis(300));
    for session in sessions {
        let report = session.stop();
        assert!(report.broken.is_none(), "{report:?}");
        assert!(report.longest_silence < Duration::from_millis(900), "a packet had to be repeated: {report:?}");
    }
    for flood in floods {
        let report = flood.stop();
        assert!(report.sent > 20 && report.lost() == 0, "{report:?}");
    }
    lab.assert_nothing_leaked();
    for (node, before) in killed.iter().zip(before) {
        assert_eq!(difference(&before, &node.egret_state()), "", "{}", node.name);
    }
}

#[test]
fn with_the_daemon_away_free_pods_start_and_others_are_held_until_it_is_back() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    for node in ["n1", "n2", "g1"] {
        let running = lab.add_pod(node, "shop", &format!("running-{node}"), VISITOR);
        lab.add_namespace("office", &[]);
        let daemon = lab.daemon(node);
        daemon.kill9();

        let begin = Instant::now();
        let free = lab.add_pod(node, "office", &format!("free-{node}"), VISITOR);
        assert!(begin.elapsed() < Duration::from_secs(1), "a free pod waited {:?}", begin.elapsed());
        assert_leaves_by_node(&free);
        assert_leaves_by_egress(&running);
        lab.forget_wire();

        let held = lab.add_pod(node, "shop", &format!("held-{node}"), VISITOR);
        let other = lab.add_pod(node, "shop", &format!("other-{node}"), &[("app", "other")]);
        assert_blocked(&held);
        assert_blocked(&other);
        lab.assert_silence();
        for pod in [&held, &other] {
            assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()), "{} to the cluster", pod.name);
            assert_eq!(pod.who(inside.ipv6()).ok(), Some(pod.ipv6().into()), "{} to the cluster", pod.name);
        }

        let flood = held.flood(EXT4, Duration::from_millis(10), false);
        thread::sleep(Duration::from_millis(100));
        daemon.restart();
        lab.wait_ready(node);
        lab.wait_seen_as(&held, EGRESS4);
        lab.wait_seen_as(&held, EGRESS6);
        lab.assert_nothing_leaked();
        thread::sleep(Duration::from_millis(100));
        let report = flood.stop();
        assert!(report.answered > 0, "the socket that was there before got no answer: {report:?}");
        assert_leaves_by_egress(&held);
        lab.wait_seen_as(&other, other.node.ipv4());
        assert_leaves_by_node(&other);
    }
}

#[test]
fn without_a_node_for_the_gateway_traffic_is_blocked_and_counted() {
    let lab = Lab::scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let nobody =
        manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50"]).replace("\"true\"", "\"no\"");
    lab.write_manifest("gateway.yaml", &nobody);
    for pod in &pods {
        lab.wait_until(&format!("{} is blocked", pod.name), Duration::from_secs(10), || {
            SERVERS.iter().all(|server| pod.udp_who(*server).is_err())
        });
    }
    lab.forget_wire();
    pods.iter().for_each(assert_blocked);
    assert_blocked(&lab.add_pod("n2", "shop", "new", VISITOR));
    lab.assert_silence();
    for pod in &pods {
        let metrics = lab.metrics(&pod.node.name);
        assert!(dropped(&metrics, "blocked") >= 4.0, "{}: {metrics:?}", pod.node.name);
        assert_eq!(dropped(&metrics, "leaked"), 0.0, "{}", pod.node.name);
    }
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50", "2001:db8::50"]));
    pods.iter().for_each(|p| lab.wait_seen_as(p, EGRESS4));
}

#[test]
fn a_policy_whose_gateway_does_not_exist_blocks() {
    let lab = Lab::scene();
    lab.write_manifest("policy.yaml", &visitors().replace("spec:\n", "spec:\n  gateway: nowhere\n"));
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.wait_until("the pod is blocked", Duration::from_secs(10), || pod.udp_who(EXT4).is_err());
    lab.forget_wire();
    assert_blocked(&pod);
    lab.assert_silence();
}

/// Packets of old and new connections, sent and not waited for.
struct Probes {
    pod: Pod,
    old: Vec<UdpSocket>,
}

impl Probes {
    fn new(pod: Pod) -> Probes {
        let open = |server| pod.udp_socket(SocketAddr::new(server, lab::server::UDP_WHO)).expect("a socket");
        let old: Vec<_> = SERVERS.map(open).into();
        for socket in &old {
            socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
            socket.send(b"who").expect("send");
            socket.recv(&mut [0; 64]).expect("an answer");
        }
        Probes { pod, old }
    }

    fn send(&self) {
        for _ in 0..2 {
            // That the kernel refuses to send is as good as a drop.
            self.old.iter().for_each(|s| drop(s.send(b"who")));
            for server in SERVERS {
                let new = self.pod.udp_socket(SocketAddr::new(server, lab::server::UDP_WHO));
                drop(new.and_then(|s| s.send(b"who")));
            }
        }
    }
}

/// What came to the server from other addresses than the policy's, after a round of probes.
fn leaks(lab: &Lab, probes: &[Probes]) -> Vec<String> {
    probes.iter().for_each(Probes::send);
    thread::sleep(Duration::from_millis(20));
    let mut leaks = Vec::new();
    for server in SERVERS {
        let mut sources = lab.sources(server);
        sources.remove(&egress_towards(server));
        if !sources.is_empty() {
            leaks.push(format!("packets to {server} came from {sources:?}"));
            lab.forget_wire();
        }
    }
    leaks
}

#[test]
fn whatever_single_thing_is_removed_by_hand_nothing_leaks_and_it_comes_back() {
    let lab = Lab::scene();
    let gateway = owner(&lab).name.clone();
    remove_each_thing(&lab, &["n1", "n2", "g1", "g2"], &["n1", "n2", &gateway]);
}

#[test]
fn whatever_is_removed_by_hand_does_not_open_a_policy_with_destinations() {
    let lab = Lab::scene();
    let to = "egress:\n  - to: [{ ipBlock: { cidr: 198.51.100.0/24 } }, { ipBlock: { cidr: 192.0.2.0/24, except: [192.0.2.99/32] } }]\n  \
              - to: [{ ipBlock: { cidr: \"2001:db8::/64\" } }]\n    ports: [{ protocol: TCP }, { protocol: UDP, port: 1, endPort: 65000 }]\n";
    lab.write_manifest("policy.yaml", &(visitors() + "  " + to));
    let other = lab.add_pod("n2", "shop", "visitor", VISITOR);
    lab.wait_until("192.0.2.99 is not covered", Duration::from_secs(10), || {
        lab.node("n2").nft("list table inet egret").contains("192.0.2.99")
    });
    assert_leaves_by_egress(&other);
    remove_each_thing(&lab, &["n1"], &["n1"]);
}

/// Removes each rule, set, route and device of Egret's on `nodes`, one after another and with the daemon away, and looks
/// what the server sees of pods on `pods`; then the daemon must put it back.
fn remove_each_thing(lab: &Lab, pods: &[&str], nodes: &[&str]) {
    let probes: Vec<Probes> =
        pods.iter().map(|n| Probes::new(lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR))).collect();
    lab.forget_wire();
    let mut leaked = Vec::new();
    for &name in nodes {
        let node = lab.node(name);
        let whole = node.egret_state();
        let daemon = lab.daemon(name);
        daemon.kill9();
        let mut harm: Vec<(Vec<String>, String)> = Vec::new();
        let words = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (kind, set) in node.egret_sets() {
            harm.push((words(format!("nft flush {kind} {set}")), format!("the elements of {set}")));
        }
        for rule in node.egret_rules() {
            harm.push((words(format!("nft delete rule {}", rule.place)), format!("{}: {}", rule.place, rule.text)));
        }
        for family in ["-4", "-6"] {
            for priority in [72, 73] {
                let command = format!("ip {family} rule del pref {priority}");
                harm.push((words(command.clone()), command));
            }
            for table in [7871, 7872, 7873] {
                let command = format!("ip {family} route flush table {table}");
                harm.push((words(command.clone()), command));
            }
        }
        for command in [
            "ip link set egret down",
            "ip link set egret group 0",
            "ip link del egret",
            "ip -4 address flush dev egret",
            "ip neighbour flush dev egret nud permanent",
            "ip -6 neighbour flush dev egret nud permanent",
        ] {
            harm.push((words(command.to_owned()), command.to_owned()));
        }
        for (command, what) in harm {
            // Handles change when the daemon puts a rule back; what was found at first is found by its text.
            let command =
                if command[0] == "nft" && command[1] == "delete" { rule_again(node, &what) } else { Some(command) };
            let Some(command) = command else { panic!("{name}: not put back: {what}") };
            node.run(command);
            leaked.extend(leaks(lab, &probes).into_iter().map(|l| format!("{name} without `{what}`: {l}")));
            daemon.restart();
            lab.wait_ready(name);
            lab.wait_for(&format!("what differs on {name} after the loss of {what}"), &String::new(), || {
                difference(&whole, &node.egret_state())
            });
            daemon.kill9();
        }
        daemon.restart();
        lab.wait_ready(name);
        for probe in &probes {
            // A gateway whose device was away again and again may count as dead until it has answered.
            lab.wait_seen_as(&probe.pod, EGRESS4);
            assert_leaves_by_egress(&probe.pod);
        }
    }
    assert!(leaked.is_empty(), "{leaked:#?}");
}

/// The command that deletes the rule which `what` (`place: text`) was.
fn rule_again(node: &Node, what: &str) -> Option<Vec<String>> {
    let (place, text) = what.split_once(": ")?;
    let chain: Vec<&str> = place.split(' ').take(3).collect();
    let found =
        node.egret_rules().into_iter().find(|r| r.text == text && r.place.starts_with(&(chain.join(" ") + " ")))?;
    let words = ["nft", "delete", "rule"].into_iter().chain(found.place.split(' '));
    Some(words.map(str::to_owned).collect())
}

#[test]
fn a_running_daemon_puts_back_what_is_removed_by_hand() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let node = lab.node("n1");
    let whole = node.egret_state();
    for command in [
        "nft flush map inet egret path_out",
        "nft flush map inet egret pods",
        "nft flush map netdev egret hop",
        "nft flush chain inet egret prerouting",
        "ip rule del pref 72",
        "ip -6 rule del pref 72",
        "ip route flush table 7871",
        "ip link set egret down",
        "ip link set egret group 0",
        "ip link del egret",
    ] {
        node.run(command.split(' '));
        lab.wait_for(&format!("what differs on n1 after {command}"), &String::new(), || {
            difference(&whole, &node.egret_state())
        });
        assert_leaves_by_egress(&pod);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn a_pod_cannot_send_with_another_pods_address() {
    let lab = Lab::scene();
    lab.write_manifest(
        "rich.yaml",
        &manifests::policy(
            "shop",
            "rich",
            "podSelector: { matchLabels: { app: rich } }\n  address: { ipv4: 192.0.2.56, ipv6: \"2001:db8::56\" }",
        ),
    );
    for node in ["n1", "n2", "g1"] {
        let rich = lab.add_pod(node, "shop", &format!("rich-{node}"), &[("app", "rich")]);
        lab.wait_seen_as(&rich, [192, 0, 2, 56]);
        let forger = lab.add_pod(node, "shop", &format!("forger-{node}"), VISITOR);
        let outsider = lab.add_pod(node, "office", &format!("outsider-{node}"), &[]);
        // So that neighbours are known and the forged packet goes out at once.
        assert_leaves_by_egress(&forger);
        assert_leaves_by_node(&outsider);
        lab.forget_wire();
        for pod in [&forger, &outsider] {
            for (own, server) in [(IpAddr::from(rich.ipv4()), IpAddr::from(EXT4)), (rich.ipv6().into(), EXT6.into())] {
                let length = if own.is_ipv4() { 32 } else { 128 };
                let nodad = if own.is_ipv4() { "" } else { "nodad" };
                pod.ip(&format!("addr add {own}/{length} dev eth0 {nodad}"));
                let socket = pod.within(|| UdpSocket::bind((own, 0))).expect("bind");
                let _ = socket.send_to(b"who", (server, lab::server::UDP_WHO));
                pod.ip(&format!("addr del {own}/{length} dev eth0"));
            }
        }
        thread::sleep(Duration::from_millis(50));
        lab.assert_silence();
        assert!(dropped(&lab.metrics(node), "spoofed") >= 2.0, "{node}: {:?}", lab.metrics(node));
    }
}

/// A tunnel packet: VXLAN with group-based policy (draft-smith-vxlan-group-policy), in it a UDP packet of a pod.
fn tunnel_payload(to_mac: &[u8], from_mac: &[u8], path: u16, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let udp = [&[0x30, 0x39][..], &lab::server::UDP_WHO.to_be_bytes(), &11u16.to_be_bytes(), &[0, 0], b"who"].concat();
    let mut ip = [&[0x45, 0][..], &(20 + udp.len() as u16).to_be_bytes(), &[0, 1, 0, 0, 64, 17, 0, 0]].concat();
    ip.extend(from.octets().into_iter().chain(to.octets()));
    let sum = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let vxlan = [&[0x88, 0][..], &path.to_be_bytes(), &7871u32.to_be_bytes()[1..], &[0]].concat();
    [&vxlan[..], to_mac, from_mac, &[0x08, 0x00], &ip, &udp].concat()
}

fn tunnel_mac(node: &Node) -> Vec<u8> {
    let text = node.ip("-o link show egret");
    let mac = text.split("link/ether ").nth(1).and_then(|t| t.split(' ').next()).expect("a MAC address");
    mac.split(':').map(|b| u8::from_str_radix(b, 16).expect("hexadecimal")).collect()
}

#[test]
fn tunnel_packets_from_anyone_but_a_node_are_dropped() {
    tunnel_packets_are_nodes_alone(false);
}

#[test]
fn so_are_those_over_ipv6() {
    tunnel_packets_are_nodes_alone(true);
}

fn tunnel_packets_are_nodes_alone(ipv6: bool) {
    let lab = if ipv6 { Lab::builder().ipv6_tunnel() } else { Lab::builder() }.scene();
    let victim = lab.add_pod("n1", "shop", "victim", VISITOR);
    assert_leaves_by_egress(&victim);
    let owner = owner(&lab);
    let (to_mac, from_mac) = (tunnel_mac(owner), tunnel_mac(lab.node("n1")));
    let payload = tunnel_payload(&to_mac, &from_mac, lab.path_id("shop/visitors"), victim.ipv4(), EXT4);
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
            // Some have no route to some of them.
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
            // Somebody else's: it is no node that says so.
            for (node, iptables) in lab.nodes().iter().flat_map(|node| ["iptables", "ip6tables"].map(|i| (node, i))) {
                let tunnel = ["-p", "udp", "--dport", "7871"];
                node.run([&[iptables, "-t", "raw", "-I", "PREROUTING"][..], &tunnel, &["-j", "NOTRACK"]].concat());
            }
        }
        selected.iter().chain(&others).for_each(|pod| send_from(pod));
        send_from(lab.host("ext"));
        lab.assert_silence();
    }

    // The same packet, from a node: it is as the gateway takes it.
    send_from(lab.node("n1"));
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "the packet of this test is no tunnel packet");
}

#[test]
fn where_somebody_else_clears_marks_nothing_leaks() {
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
                // What was routed already needs the mark no more, on a director.
                let who = pod.udp_who(server);
                assert!(who.is_err() || who.ok() == Some(egress_towards(server)), "{chain} on {}", nodes[0].name);
                // Answers that come too late are answered with an ICMP error.
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
fn whose_tag_somebody_else_takes_is_kept_inside() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    for node in ["n1", "n2", &owner(&lab).name] {
        let selected = lab.add_pod(node, "shop", &format!("selected-{node}"), VISITOR);
        let other = lab.add_pod(node, "office", &format!("other-{node}"), &[]);
        assert_leaves_by_egress(&selected);
        let sessions = SERVERS.map(|server| selected.session(server).expect("a session"));
        // As iptables' CONNMARK --restore-mark does it without a mask.
        lab.node(node).nft(
            "table inet other { chain restore { type filter hook prerouting priority mangle; meta mark set ct mark; }; }",
        );
        lab.forget_wire();
        if lab.node(node).spec.pods == Pods::Routed {
            // By its veth it is known again.
            assert_leaves_by_egress(&selected);
        } else {
            assert_blocked(&selected);
            assert!(dropped(&lab.metrics(node), "untagged") >= SERVERS.len() as f64, "on {node}");
        }
        for address in [IpAddr::from(inside.ipv4()), inside.ipv6().into()] {
            assert!(selected.who(address).is_ok(), "from {node} to {address}, inside the cluster");
        }
        for session in sessions {
            let report = session.stop();
            assert!(report.broken.is_none(), "what was decided before goes on: {report:?}");
        }
        let left = SERVERS.map(|server| lab.sources(server));
        assert_eq!(left, SERVERS.map(|server| [egress_towards(server)].into()), "on {node}");
        assert_leaves_by_node(&other);
        lab.node(node).nft("delete table inet other");
        assert_leaves_by_egress(&selected);
        selected.delete();
        other.delete();
    }
}
