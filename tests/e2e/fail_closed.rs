//! Nothing leaks: whatever is removed or broken, no packet of a selected pod leaves with another address. Forged
//! packets are in `spoofing.rs`. Needs root.

use lab::fault_injection::owner_and_other;
use lab::kernel::difference;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, egress_towards, visitors};
use lab::{EGRESS4, EGRESS6, EXT4, Lab, Node, Pod, SERVERS, Server, VISITOR, machine, manifests};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn a_daemon_killed_under_traffic_loses_nothing_leaks_nothing_and_doubles_nothing() {
    let lab = Lab::scene();
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let (owner, _) = owner_and_other(&lab);
    let killed: Vec<&Node> = ["n1", "n2", &owner].into_iter().map(|n| &**lab.node(n)).collect();
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
        // From the first log lines of its start until long after it.
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
fn with_the_daemon_away_free_pods_start_and_others_are_quarantined_until_it_is_back() {
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
        lab.assert_nothing_arrives();
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
    lab.assert_nothing_arrives();
    for pod in &pods {
        let metrics = lab.metrics(&pod.node.name);
        assert!(metrics.dropped("blocked").is_some_and(|n| n >= 4.0), "{}: {metrics:?}", pod.node.name);
        assert_eq!(metrics.dropped("leaked"), Some(0.0), "{}", pod.node.name);
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
    lab.assert_nothing_arrives();
}

/// Packets of old and new connections, without waiting for replies.
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
            machine::receive(socket, &mut [0; 64]).expect("an answer");
        }
        Probes { pod, old }
    }

    fn send(&self) {
        for _ in 0..2 {
            // A send that the kernel rejects counts as dropped.
            self.old.iter().for_each(|s| drop(s.send(b"who")));
            for server in SERVERS {
                let new = self.pod.udp_socket(SocketAddr::new(server, lab::server::UDP_WHO));
                drop(new.and_then(|s| s.send(b"who")));
            }
        }
    }
}

/// The packets that the server received from other addresses than the policy's, after a round of probes.
fn leaks(lab: &Lab, probes: &[Probes]) -> Vec<String> {
    probes.iter().for_each(Probes::send);
    thread::sleep(Duration::from_millis(20));
    let mut leaks = Vec::new();
    for server in SERVERS {
        let mut sources = lab.sources(server);
        sources.remove(&egress_towards(server));
        sources.remove(&second_towards(server));
        if !sources.is_empty() {
            leaks.push(format!("packets to {server} came from {sources:?}"));
            lab.forget_wire();
        }
    }
    leaks
}

/// The second egress IP of a policy that has two.
fn second_towards(server: IpAddr) -> IpAddr {
    match server {
        IpAddr::V4(_) => [192, 0, 2, 51].into(),
        IpAddr::V6(_) => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x51].into(),
    }
}

/// All nodes with pods, because a missing rule on one of them may open the way for another one's pods.
const ALL: [&str; 4] = ["n1", "n2", "g1", "g2"];

#[test]
fn each_rule_route_or_element_removed_with_routed_pods_leaks_nothing_and_is_restored() {
    remove_each_thing(&Lab::scene(), &ALL, "n1");
}

#[test]
fn each_rule_route_or_element_removed_with_bridged_pods_leaks_nothing_and_is_restored() {
    remove_each_thing(&Lab::scene(), &ALL, "n2");
}

#[test]
fn each_rule_route_or_element_removed_on_the_owner_leaks_nothing_and_is_restored() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    remove_each_thing(&lab, &ALL, &owner);
}

#[test]
fn no_removed_rule_opens_a_policy_with_destinations() {
    let lab = Lab::scene();
    let to = "egress:\n  - to: [{ ipBlock: { cidr: 198.51.100.0/24 } }, { ipBlock: { cidr: 192.0.2.0/24, except: [192.0.2.99/32] } }]\n  \
              - to: [{ ipBlock: { cidr: \"2001:db8::/64\" } }]\n    ports: [{ protocol: TCP }, { protocol: UDP, port: 1, endPort: 65000 }]\n";
    lab.write_manifest("policy.yaml", &(visitors() + "  " + to));
    let other = lab.add_pod("n2", "shop", "visitor", VISITOR);
    lab.wait_until("192.0.2.99 is not covered", Duration::from_secs(10), || {
        lab.node("n2").nft("list table inet egret").contains("192.0.2.100-")
    });
    assert_leaves_by_egress(&other);
    remove_each_thing(&lab, &["n1"], "n1");
}

#[test]
fn no_removed_rule_opens_a_policy_whose_connections_have_several_egress_ips() {
    let lab = Lab::scene();
    let pairs =
        "addresses: [{ ipv4: 192.0.2.50, ipv6: \"2001:db8::50\" }, { ipv4: 192.0.2.51, ipv6: \"2001:db8::51\" }]";
    let spec = format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  {pairs}\n  spread: Connection");
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "visitors", &spec));
    let other = lab.add_pod("n2", "shop", "visitor", VISITOR);
    lab.wait_seen_as(&other, second_towards(SERVERS[0]));
    remove_each_thing(&lab, &["n1"], "n1");
}

/// Removes each rule, set, route and device of Egret's on the node, one after another while the daemon is stopped,
/// and checks what the server sees of the pods on `pods`. Then the daemon must restore it.
fn remove_each_thing(lab: &Lab, pods: &[&str], name: &str) {
    let probes: Vec<Probes> =
        pods.iter().map(|n| Probes::new(lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR))).collect();
    lab.forget_wire();
    let mut leaked = Vec::new();
    let node = lab.node(name);
    let whole = node.egret_state();
    let daemon = lab.daemon(name);
    daemon.kill9();
    let mut harm: Vec<(Vec<String>, String)> = Vec::new();
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    for (kind, set) in node.egret_sets() {
        let command = words(format!("nft flush {kind} {set}"));
        // The lists of policies: the kernel refuses to remove them while rules use them.
        if set.contains('-') {
            let refused = node.try_run(command);
            assert!(String::from_utf8_lossy(&refused.stderr).contains("busy"), "{name}: {set}: {refused:?}");
            continue;
        }
        harm.push((command, format!("the elements of {set}")));
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
        // Handles change when the daemon restores a rule, so rules are found by their texts.
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
        // A gateway node whose device was missing again and again may count as dead until it has answered.
        lab.wait_seen_as(&probe.pod, EGRESS4);
        if !lab.sources(SERVERS[0]).contains(&second_towards(SERVERS[0])) {
            assert_leaves_by_egress(&probe.pod);
        }
    }
    assert!(leaked.is_empty(), "{leaked:#?}");
}

/// The command that deletes the rule that `what` (`place: text`) describes.
fn rule_again(node: &Node, what: &str) -> Option<Vec<String>> {
    let (place, text) = what.split_once(": ")?;
    let chain: Vec<&str> = place.split(' ').take(3).collect();
    let found =
        node.egret_rules().into_iter().find(|r| r.text == text && r.place.starts_with(&(chain.join(" ") + " ")))?;
    let words = ["nft", "delete", "rule"].into_iter().chain(found.place.split(' '));
    Some(words.map(str::to_owned).collect())
}

#[test]
fn a_running_daemon_restores_what_is_removed_by_hand() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let node = lab.node("n1");
    let whole = node.egret_state();
    for command in [
        "nft flush map inet egret egress_id_out",
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
