//! The fast path (`--fast-path-lease`): established connections past nf_tables, and never otherwise than by its rules.
//! Needs root, and Linux 6.6 with BTF.

use lab::fault_injection::{dies, owner_and_other};
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::server::ECHO;
use lab::survival::{assert_live, sessions};
use lab::{EGRESS4, EXT4, Flood, Lab, Pod, SERVERS, Session, VISITOR, machine};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

mod programs;
mod tunnel;

const FAST: &[&str] = &["--fast-path-lease=1s"];
/// The longest time for which a connection goes on as before: a lease, and what a loaded machine adds.
const LEASE: Duration = Duration::from_millis(1300);
/// The time in which a notification ends all leases.
const TOLD: Duration = Duration::from_millis(500);

fn scene(arguments: &[&str]) -> Lab {
    Lab::builder().node_arguments(arguments).scene()
}

fn fast_packets(lab: &Lab, node: &str) -> f64 {
    lab.metrics(node).get("egret_node_fast_path_packets_total", &[]).expect("the metric")
}

/// Packets that were sent to the server and came back, each a connection's next.
fn flood(pod: &Pod) -> Flood {
    pod.flood(EXT4, Duration::from_millis(2), false)
}

/// Waits until packets go the fast way on all these nodes.
#[track_caller]
fn wait_fast(lab: &Lab, nodes: &[&str]) {
    for node in nodes {
        let before = fast_packets(lab, node);
        let fast = || fast_packets(lab, node) > before + 20.0;
        lab.wait_until(&format!("packets go the fast way on {node}"), Duration::from_secs(10), fast);
    }
}

/// A scene with a pod on n1 and two connections of it that go the fast way, and the owner's name.
fn going_fast(arguments: &[&str]) -> (Lab, Pod, Session, Flood, String) {
    let lab = scene(&[FAST, arguments].concat());
    let (owner, _) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let (session, flood) = (pod.session(EXT4).expect("a session"), flood(&pod));
    wait_fast(&lab, &["n1", &owner]);
    (lab, pod, session, flood, owner)
}

#[test]
fn bytes_go_the_fast_way_both_ways_as_they_are() {
    let lab = scene(FAST);
    let (owner, _) = owner_and_other(&lab);
    for node in ["n1", "n2", &owner] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        let before = [node, &owner].map(|node| fast_packets(&lab, node));
        for server in SERVERS {
            // Long enough for leases to end in between.
            for size in [200_000_000, 5_000_000] {
                pod.bulk(server, size).unwrap_or_else(|e| panic!("{node} to {server}: {e}"));
            }
        }
        let sent = [node, &owner].map(|node| fast_packets(&lab, node));
        // Bridged pods' packets come in by the bridge, and take the kernel's own way on their node.
        assert!(node == "n2" || sent[0] > before[0] + 100.0, "{node}: {before:?} {sent:?}");
        assert!(sent[1] > before[1] + 100.0, "the owner, of a pod on {node}: {before:?} {sent:?}");
        assert_leaves_by_egress(&pod);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn the_counters_of_an_allocation_contain_each_packet_once() {
    let (lab, pod, session, going, owner) = going_fast(&[]);
    assert!(session.stop().broken.is_none());
    assert_eq!(going.stop().lost(), 0);
    let id = lab.egress_id("shop/visitors").to_string();
    let counted = |node: &str, role: &str| {
        let labels = [("allocation", &*id), ("role", role)];
        let metrics = lab.metrics(node);
        ["packets", "bytes"]
            .map(|what| metrics.get(&format!("egret_node_allocation_{what}_total"), &labels).unwrap_or_default())
    };
    let before = [counted("n1", "source"), counted(&owner, "gateway")];
    let fast_before = ["n1", &owner].map(|node| fast_packets(&lab, node));
    let report = pod.flood(EXT4, Duration::from_millis(2), false);
    thread::sleep(Duration::from_secs(3));
    let report = report.stop();
    assert_eq!(report.lost(), 0, "{report:?}");
    let after = [counted("n1", "source"), counted(&owner, "gateway")];
    let fast = ["n1", &owner].map(|node| fast_packets(&lab, node));
    for at in 0..2 {
        assert!(
            fast[at] - fast_before[at] > report.sent as f64 / 2.0,
            "most went the fast way: {fast:?} {fast_before:?}"
        );
        let [packets, bytes] = [0, 1].map(|what| after[at][what] - before[at][what]);
        assert_eq!(packets, report.sent as f64, "{before:?} {after:?}");
        // IP and UDP headers, and three bytes.
        assert_eq!(bytes, report.sent as f64 * 31.0, "{before:?} {after:?}");
    }
}

/// Ends something, and panics unless nothing comes to the server from the egress IP afterwards.
#[track_caller]
fn assert_ends(lab: &Lab, what: &str, within: Duration, end: impl FnOnce()) {
    end();
    thread::sleep(within);
    lab.forget_wire();
    thread::sleep(Duration::from_secs(1));
    let sources = lab.sources(EXT4);
    assert!(!sources.contains(&EGRESS4.into()), "{what}: still from {sources:?}");
}

#[test]
fn the_end_of_a_policy_ends_what_went_fast() {
    let (lab, pod, _session, _flood, _) = going_fast(&[]);
    assert_ends(&lab, "no policy", TOLD, || lab.remove_manifest("policy.yaml"));
    lab.wait_seen_as(&pod, pod.node.ipv4());
}

#[test]
fn a_rule_of_the_hosts_firewall_ends_what_went_fast_on_either_node() {
    for on_owner in [false, true] {
        let (lab, _pod, _session, _flood, owner) = going_fast(&[]);
        let node = lab.node(if on_owner { &owner } else { "n1" });
        assert_ends(&lab, &node.name, TOLD, || {
            node.nft("table inet firewall { chain f { type filter hook forward priority 0; meta l4proto { tcp, udp } drop; }; }");
        });
        lab.assert_nothing_arrives();
        node.nft("delete table inet firewall");
        wait_fast(&lab, &["n1", &owner]);
    }
}

#[test]
fn a_firewall_of_iptables_legacy_is_not_passed_by() {
    let (lab, _pod, _session, _flood, owner) = going_fast(&[]);
    let node = lab.node(&owner);
    assert_ends(&lab, &node.name, LEASE, || drop(node.run(["iptables-legacy", "-I", "FORWARD", "-j", "DROP"])));
    lab.assert_nothing_arrives();
}

#[test]
fn with_the_daemon_stopped_leases_end_by_themselves() {
    for on_owner in [false, true] {
        let (lab, pod, _session, _flood, owner) = going_fast(&["--own-tables=false"]);
        let name = if on_owner { owner.clone() } else { "n1".to_owned() };
        let daemon = lab.daemon(&name);
        daemon.suspend(true);
        let set = if on_owner { "rx" } else { "egress_id_out" };
        assert_ends(&lab, set, LEASE, || drop(lab.node(&name).nft(&format!("flush map inet egret {set}"))));
        lab.assert_nothing_arrives();
        daemon.suspend(false);
        lab.wait_until("the map is back", Duration::from_secs(40), || pod.udp_who(EXT4).is_ok());
    }
}

#[test]
fn a_routing_rule_or_route_that_goes_ends_what_went_fast() {
    let (lab, _pod, _session, _flood, _) = going_fast(&[]);
    let daemon = lab.daemon("n1");
    // Nobody puts it back.
    daemon.suspend(true);
    assert_ends(&lab, "the rule", LEASE, || drop(lab.node("n1").ip("rule del priority 72")));
    lab.assert_nothing_arrives();
    daemon.suspend(false);
    wait_fast(&lab, &["n1"]);
    daemon.suspend(true);
    assert_ends(&lab, "the route", LEASE, || drop(lab.node("n1").ip("route del default table 7871")));
    lab.assert_nothing_arrives();
    daemon.suspend(false);
}

#[test]
fn daemons_that_are_killed_lose_nothing_and_leave_no_program() {
    let (lab, _pod, session, flood, owner) = going_fast(&[]);
    for node in ["n1", &owner] {
        let daemon = lab.daemon(node);
        let loaded = programs::of(&daemon).programs;
        assert!(programs::any_is_loaded(&loaded), "{node}: {loaded:?}");
        daemon.kill9();
        lab.wait_until("the programs have gone", Duration::from_secs(5), || !programs::any_is_loaded(&loaded));
        thread::sleep(Duration::from_millis(300));
        daemon.restart();
        lab.wait_ready(node);
        wait_fast(&lab, &[node]);
    }
    let report = session.stop();
    assert!(report.broken.is_none() && report.longest_silence < Duration::from_millis(900), "{report:?}");
    let report = flood.stop();
    assert_eq!(report.lost(), 0, "{report:?}");
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

#[test]
fn the_owners_death_moves_connections_that_went_fast() {
    let lab = scene(FAST);
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    wait_fast(&lab, &["n1", &owner]);
    let gap = dies(&lab, &owner, &other, &pods);
    assert!(gap < Duration::from_secs(3), "{gap:?}");
    wait_fast(&lab, &["n1", &other]);
    assert_live("the owner's death", going_on);
    lab.assert_nothing_leaked();
}

#[test]
fn a_pod_cannot_use_another_ones_lease() {
    let (lab, pod, _session, flood, owner) = going_fast(&[]);
    let forger = lab.add_pod("n1", "shop", "forger", VISITOR);
    let outsider = lab.add_pod("n1", "office", "outsider", &[]);
    // So that neighbours are known and forged packets are sent at once.
    assert_leaves_by_egress(&forger);
    assert_leaves_by_node(&outsider);
    // The victim's connection, which it does not use meanwhile: its lease lasts a second.
    let socket = pod.udp_socket(SocketAddr::new(EXT4.into(), lab::server::UDP_WHO)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    let ask = || {
        socket.send(b"who").expect("send");
        let _ = machine::receive(&socket, &mut [0; 64]);
    };
    (0..100).for_each(|_| ask());
    flood.stop();
    for from in [&forger, &outsider] {
        from.ip(&format!("addr add {}/32 dev eth0", pod.ipv4()));
        let own: IpAddr = pod.ipv4().into();
        let port = socket.local_addr().expect("an address").port();
        let forged = from.within(|| UdpSocket::bind((own, port))).expect("bind");
        (0..40).for_each(|_| ask());
        lab.forget_wire();
        for _ in 0..20 {
            let _ = forged.send_to(b"forged", (EXT4, lab::server::UDP_WHO));
        }
        thread::sleep(Duration::from_millis(100));
        let udp = lab.sources(EXT4);
        assert!(udp.is_subset(&BTreeSet::from([EGRESS4.into()])), "{udp:?}");
        let spoofed = lab.metrics("n1").dropped("spoofed");
        assert!(spoofed.is_some_and(|n| n >= 20.0), "{}: {spoofed:?}", from.name);
    }
    assert_leaves_by_egress(&pod);
    assert_ne!(owner, "n1");
}

#[test]
fn rules_that_must_see_every_packet_close_the_fast_path_and_the_node_says_so() {
    let (lab, _pod, _session, _flood, _) = going_fast(&[]);
    let node = lab.node("n1");
    let open = || lab.metrics("n1").get("egret_node_fast_path_open", &[]) == Some(1.0);
    assert!(open());
    for (objects, rule) in [
        ("", "limit rate 1000/second accept"),
        ("", "quota over 10000 mbytes drop"),
        (
            "set m { type ipv4_addr; flags dynamic; timeout 1m; };",
            "add @m { ip saddr limit rate over 1000/second } drop",
        ),
        ("limit a { rate over 1000/second; };", "limit name ip saddr map { 192.0.2.99 : \"a\" } drop"),
    ] {
        let chain = format!("chain f {{ type filter hook forward priority 5; {rule}; }};");
        node.nft(&format!("table inet others {{ {objects} {chain} }}"));
        lab.wait_until(rule, Duration::from_secs(15), || !open());
        let said = || lab.manifests().statuses().contains("chain f of table others must see every packet");
        lab.wait_until("the status says why", Duration::from_secs(10), said);
        node.nft("delete table inet others");
        lab.wait_until("it is open again", Duration::from_secs(15), open);
    }
    wait_fast(&lab, &["n1"]);
}

#[test]
fn a_setting_for_which_all_packets_must_be_seen_closes_it_though_nobody_is_notified() {
    let (lab, _pod, _session, _flood, owner) = going_fast(&[]);
    let open = || lab.metrics("n1").get("egret_node_fast_path_open", &[]) == Some(1.0);
    let node = lab.node("n1");
    node.sysctl(&["net.netfilter.nf_conntrack_acct=1"]);
    lab.wait_until("counting closes it", Duration::from_secs(8), || !open());
    node.sysctl(&["net.netfilter.nf_conntrack_acct=0"]);
    lab.wait_until("it is open again", Duration::from_secs(8), open);
    wait_fast(&lab, &["n1", &owner]);
    node.run(["iptables-legacy", "-t", "mangle", "-A", "FORWARD", "-j", "ACCEPT"]);
    lab.wait_until("iptables-legacy closes it", Duration::from_secs(8), || !open());
}

#[test]
fn a_gateway_can_do_without_the_fast_path() {
    let (lab, _pod, _session, _flood, owner) = going_fast(&[]);
    let gateway = lab::manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &gateway.replace("spec:\n", "spec:\n  fastPath: Off\n"));
    let said = || lab.manifests().statuses().matches("with fastPath: Off").count() >= 2;
    lab.wait_until("the nodes say so", Duration::from_secs(10), said);
    thread::sleep(LEASE);
    let fast = || ["n1", &owner].map(|node| fast_packets(&lab, node));
    let before = fast();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(fast(), before);
    assert_eq!(lab.metrics("n1").get("egret_node_fast_path_open", &[]), Some(1.0), "of other gateways");
    lab.write_manifest("gateway.yaml", &gateway);
    wait_fast(&lab, &["n1", &owner]);
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

/// The packets of a policy's egress IP that the gateways' rules have seen.
fn by_rules(lab: &Lab, policy: &str) -> u64 {
    let element = format!("{:#010x} counter packets ", lab.egress_id(policy));
    let seen = |gateway: &str| {
        let map = lab.node(gateway).nft("list map inet egret rx");
        let after = map.split(&element).nth(1).and_then(|after| after.split(' ').next()?.parse::<u64>().ok());
        after.unwrap_or_default()
    };
    ["g1", "g2"].into_iter().map(seen).sum()
}

#[test]
fn a_dscp_or_a_bandwidth_of_one_egress_ip_leaves_the_fast_path_to_the_others() {
    let (lab, _pod, _session, flooded, owner) = going_fast(&[]);
    assert_eq!(flooded.stop().lost(), 0);
    for (treatment, value) in [("dscp", "46"), ("bandwidth", "{ egress: 900Mbit, ingress: 900Mbit }")] {
        let spec = format!(
            "podSelector: {{ matchLabels: {{ app: rich }} }}\n  \
             address: {{ ipv4: 192.0.2.56, ipv6: \"2001:db8::56\" }}\n  {treatment}: {value}"
        );
        lab.write_manifest("rich.yaml", &lab::manifests::policy("shop", "rich", &spec));
        let rich = lab.add_pod("n1", "shop", &format!("rich-{treatment}"), &[("app", "rich")]);
        lab.wait_seen_as(&rich, [192, 0, 2, 56]);
        let treated = || lab.manifests().statuses().contains("1 egress IPs have a DSCP");
        lab.wait_until("the gateways know", Duration::from_secs(10), treated);
        wait_fast(&lab, &["n1", &owner]);
        let before = by_rules(&lab, "shop/rich");
        let report = flood(&rich);
        thread::sleep(Duration::from_secs(2));
        let report = report.stop();
        assert_eq!(report.lost(), 0, "{report:?}");
        assert_eq!(by_rules(&lab, "shop/rich") - before, report.sent, "its rule sees each packet");
        wait_fast(&lab, &["n1", &owner]);
        rich.delete();
    }
}

#[test]
fn a_filter_for_what_a_pod_sends_keeps_its_packets_off_the_fast_way() {
    let (lab, pod, session, _flood, _) = going_fast(&[]);
    let node = lab.node("n1");
    node.run(["tc", "qdisc", "add", "dev", &pod.host_interface(), "clsact"]);
    thread::sleep(Duration::from_secs(1));
    let before = fast_packets(&lab, "n1");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(fast_packets(&lab, "n1"), before);
    node.run(["tc", "qdisc", "del", "dev", &pod.host_interface(), "clsact"]);
    wait_fast(&lab, &["n1"]);
    assert!(session.stop().broken.is_none());
}

#[test]
fn another_programs_filter_at_the_tunnel_device_sees_every_packet() {
    let (lab, pod, session, flood, owner) = going_fast(&[]);
    let node = lab.node(&owner);
    node.run(["tc", "qdisc", "add", "dev", "egret", "clsact"]);
    let status = || lab.manifests().statuses();
    lab.wait_until("the status says why", Duration::from_secs(10), || status().contains("another program filters"));
    thread::sleep(LEASE);
    // What passes the device by, it does not count.
    let seen = || {
        let links: serde_json::Value = serde_json::from_str(&node.ip("-j -s link show egret")).expect("JSON");
        links[0]["stats64"]["rx"]["packets"].as_u64().expect("a counter")
    };
    let (before, fast) = (seen(), fast_packets(&lab, &owner));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(fast_packets(&lab, &owner), fast, "{}", status());
    let flooded = flood.stop();
    let (after, sent) = (seen(), flooded.sent as f64);
    assert!(after - before > 100, "of some 1000 packets, it saw {}", after - before);
    assert_eq!(flooded.lost(), 0, "of {sent}");
    node.run(["tc", "qdisc", "del", "dev", "egret", "clsact"]);
    let flood = self::flood(&pod);
    wait_fast(&lab, &["n1", &owner]);
    assert_eq!(flood.stop().lost(), 0);
    assert!(session.stop().broken.is_none());
}

#[test]
fn connections_end_as_without_the_fast_path() {
    let (lab, pod, session, flood, owner) = going_fast(&[]);
    let port = session.stop().local.port();
    assert_eq!(flood.stop().lost(), 0);
    for node in ["n1", &owner] {
        let closed = || {
            let entries = lab.node(node).run(["conntrack", "-L", "-p", "tcp", "--orig-src", &pod.ipv4().to_string()]);
            entries
                .lines()
                .filter(|line| line.contains(&format!("sport={port} ")))
                .all(|line| line.contains("TIME_WAIT") || line.contains("CLOSE"))
        };
        lab.wait_until(&format!("connection tracking on {node} knows of the end"), Duration::from_secs(3), closed);
    }
}

/// Seconds until the entry of the pod's connection from this port expires on a node; `None`: there is none.
fn expires(lab: &Lab, node: &str, pod: &Pod, port: u16) -> Option<u32> {
    let entries = lab.node(node).run(["conntrack", "-L", "-p", "tcp", "--orig-src", &pod.ipv4().to_string()]);
    let entry = entries.lines().find(|line| line.contains(&format!("sport={port} ")))?;
    assert!(entry.contains(" ESTABLISHED "), "{entry}");
    entry.split_whitespace().nth(2)?.parse().ok()
}

#[test]
fn a_connection_that_was_fast_and_is_idle_is_tracked_as_long_as_any_other() {
    let lab = scene(FAST);
    for node in lab.nodes() {
        node.sysctl(&[
            "net.netfilter.nf_conntrack_tcp_timeout_unacknowledged=15",
            "net.netfilter.nf_conntrack_tcp_timeout_max_retrans=15",
            "net.netfilter.nf_conntrack_tcp_timeout_close=1",
        ]);
        // Daemons look at these settings as often as they look at connections.
        lab.daemon(&node.name).kill9();
        lab.daemon(&node.name).restart();
        lab.wait_ready(&node.name);
    }
    let (owner, _) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let before = ["n1", &owner].map(|node| fast_packets(&lab, node));
    // Data is on its way all the time: connection tracking, which sees a packet a second, sees its end not acknowledged.
    let mut stream = pod.within(|| TcpStream::connect((EXT4, ECHO))).expect("a connection");
    let port = stream.local_addr().expect("a port").port();
    let sent = {
        let mut stream = stream.try_clone().expect("a socket");
        thread::spawn(move || {
            let begun = Instant::now();
            let mut sent = 0;
            while begun.elapsed() < Duration::from_secs(4) {
                stream.write_all(&[7; 16384]).expect("sent");
                sent += 16384;
            }
            sent
        })
    };
    let mut buffer = [0; 65536];
    let mut back = 0;
    while !sent.is_finished() {
        back += stream.read(&mut buffer).expect("bytes");
    }
    let sent = sent.join().expect("the sender");
    while back < sent {
        back += stream.read(&mut buffer).expect("the rest");
    }
    for (node, before) in ["n1", &owner].into_iter().zip(before) {
        assert!(fast_packets(&lab, node) > before + 100.0, "packets went the fast way on {node}");
    }
    thread::sleep(Duration::from_secs(25));
    for node in ["n1", &owner] {
        let left = expires(&lab, node, &pod, port);
        assert!(left > Some(3600), "{node}: {left:?}");
    }
    stream.write_all(b"still there").expect("sent");
    stream.read_exact(&mut [0; 11]).expect("and back");
    // Slow packets do not shorten it again, once their data is acknowledged.
    for node in ["n1", &owner] {
        let is_long = || expires(&lab, node, &pod, port) > Some(3600);
        lab.wait_until(&format!("the timeout on {node} is long again"), Duration::from_secs(10), is_long);
    }
}
