//! Egress IPs that the nodes' own routers announce (`announce: Route`), with FRR, BGP and BFD. Needs root.

use lab::fault_injection::{all_of, cordoned, cut, plugged, tunnel_between};
use lab::routed::{EGRESS, POOL, Routed, SERVERS, gateway};
use lab::survival::{assert_live, assert_short};
use lab::{Lab, Pod, VISITOR, manifests};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// Pods on these nodes.
fn visitors(lab: &Lab, nodes: &[&str]) -> Vec<Pod> {
    nodes.iter().map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR)).collect()
}

/// Counts what is said about the egress IP on the link: ARP for it or from it, and neighbour discovery of it.
fn listen(lab: &Lab) {
    let (v4, v6) = EGRESS;
    // Of both messages, the target is behind the first eight bytes (RFC 4861).
    let target = u128::from(v6);
    lab.host("fab").nft(&format!(
        "table bridge said {{
           counter by_arp {{ }}
           counter by_discovery {{ }}
           chain pass {{ type filter hook prerouting priority -301;
             iifname \"p-g*\" arp saddr ip {v4} counter name by_arp
             iifname \"p-g*\" icmpv6 type {{ nd-neighbor-advert, nd-neighbor-solicit }} @th,64,128 {target:#x} counter name by_discovery
             iifname \"p-g*\" icmpv6 type nd-neighbor-solicit ip6 saddr {v6} counter name by_discovery
           }}
         }}"
    ));
}

fn said(lab: &Lab) -> u64 {
    lab.host("fab").counted("bridge", "said")
}

#[test]
fn pods_leave_from_an_egress_ip_that_the_owners_router_announces_and_nobody_answers_arp_for() {
    let lab = Routed::without_egret(Lab::builder());
    listen(&lab);
    lab.write_manifest("gateway.yaml", &gateway());
    lab.write_manifest("policy.yaml", &lab::routed::policy());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    let pods = visitors(&lab, &["n1", "n2", "g1", "g2"]);
    pods.iter().for_each(|pod| lab.served(pod));
    lab.forget_wire();
    pods.iter().for_each(|pod| lab.assert_leaves_by_egress(pod));
    lab.assert_nothing_leaked();
    let (owner, other) = lab.owner_and_other();
    lab.wait_routed_to(&owner);
    let node = lab.node(&owner);
    let on_device = node.ip("-o addr show dev egret-ip");
    assert!(on_device.contains("198.51.100.50/32") && on_device.contains("2001:db8:51::50/128"), "{on_device}");
    assert!(node.ip("-o link show dev egret-ip").contains("NOARP"));
    assert_eq!(lab.node("n1").ip("-o link").matches("egret-ip").count(), 0, "only gateway nodes have the device");

    // A host on the link that asks for the egress IP gets no answer, and nor does one that says that it has it.
    let ext = lab.host("ext");
    let asked = ext.try_run(["arping", "-c", "2", "-w", "2", "-I", "eth0", "198.51.100.50"]);
    assert!(String::from_utf8_lossy(&asked.stdout).contains("0 packets received"), "{asked:?}");
    ext.ip_batch(&["addr add 198.51.100.50/32 dev eth0".into(), "addr add 2001:db8:51::50/128 dev eth0 nodad".into()]);
    // It gets no answer, and says so by its status.
    ext.try_run(["arping", "-c", "2", "-w", "2", "-A", "-I", "eth0", "198.51.100.50"]);
    ext.ip("route flush cache");
    // The owner resolves its next hop again, while packets with the egress IP as their source wait for it.
    node.ip("neigh flush dev eth0");
    pods.iter().for_each(|pod| lab.assert_leaves_by_egress(pod));
    lab.node(&other).ip("neigh flush dev eth0");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(said(&lab), 0, "{}", lab.host("fab").run(["nft", "list", "table", "bridge", "said"]));
    assert_eq!(lab.holders(), [owner.as_str()], "a host that has the address takes nothing away");
    ext.ip_batch(&["addr del 198.51.100.50/32 dev eth0".into(), "addr del 2001:db8:51::50/128 dev eth0".into()]);

    // Nobody outside begins a connection to it, and packets to it do not circulate.
    let connect = lab.host("far").within(|| {
        let to = (IpAddr::V4(EGRESS.0), 22).into();
        std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500)).map(drop)
    });
    assert_eq!(connect.expect_err("no connection").kind(), std::io::ErrorKind::TimedOut);
}

/// Takes the owner away while pods of other nodes have sessions. Returns the lab, the pods, the owner and the other node.
fn survives(what: &str, lose: impl FnOnce(&mut Routed, &str)) -> (Routed, Vec<Pod>, String, String) {
    let mut lab = Routed::scene();
    let (owner, other) = lab.owner_and_other();
    let pods = visitors(&lab, &["n1", "n2", &other]);
    pods.iter().for_each(|pod| lab.assert_leaves_by_egress(pod));
    let sessions = lab.sessions(&pods);
    thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    lose(&mut lab, &owner);
    let gap = lab.answered_after(&pods[0], begin);
    println!("{what}: new packets are answered after {gap:?}");
    pods.iter().for_each(|pod| lab.served(pod));
    lab.wait_routed_to(&other);
    thread::sleep(Duration::from_secs(2));
    assert_short(assert_live(what, sessions), 1500);
    assert_short(gap, 1100);
    (lab, pods, owner, other)
}

#[test]
fn connections_survive_the_lost_link_of_an_owner_whose_router_announces() {
    let (lab, pods, owner, other) = survives("link down", |lab, owner| plugged(lab, owner, false));
    let sessions = lab.sessions(&pods);
    plugged(&lab, &owner, true);
    lab.assert_stays(&other, Duration::from_secs(6));
    assert_eq!(lab.next_hops(), [lab.node(&other).ipv4().to_string()]);
    assert_short(assert_live("return", sessions), 150);
    lab.assert_nothing_leaked();
}

#[test]
fn connections_survive_the_death_of_an_owner_whose_router_announces() {
    let (lab, ..) = survives("machine gone", |lab, owner| {
        cut(lab, &all_of(owner));
        lab.daemon(owner).kill9();
        lab.frr.get_mut(owner).expect("its router").kill9();
    });
    lab.assert_nothing_leaked();
}

#[test]
fn a_planned_move_loses_nothing_while_the_router_knows_both_ways() {
    let lab = Routed::scene();
    let (owner, other) = lab.owner_and_other();
    let pods = visitors(&lab, &["n1", "n2", "g1", "g2"]);
    pods.iter().for_each(|pod| lab.assert_leaves_by_egress(pod));
    // Several sessions of each pod: the router divides them among the ways that it knows.
    let sessions: Vec<_> = (0..4).flat_map(|_| lab.sessions(&pods)).collect();
    let pace = Duration::from_millis(10);
    let flood = |fresh: bool| -> Vec<_> {
        pods.iter().flat_map(|pod| SERVERS.map(|server| pod.flood(server, pace, fresh))).collect()
    };
    let (floods, beginning) = (flood(false), flood(true));
    thread::sleep(Duration::from_millis(500));
    cordoned(&lab, &owner, true);
    let begin = Instant::now();
    let mut both = Duration::ZERO;
    while lab.holders() != [other.as_str()] || lab.next_hops() != [lab.node(&other).ipv4().to_string()] {
        assert!(begin.elapsed() < PATIENCE, "on {:?}, routed to {:?}", lab.holders(), lab.next_hops());
        if lab.next_hops().len() > 1 {
            both = begin.elapsed();
        }
    }
    println!("moved after {:?}; both ways known at {both:?}", begin.elapsed());
    thread::sleep(Duration::from_secs(6));
    assert_short(assert_live("planned move", sessions), 100);
    for flood in floods {
        let report = flood.stop();
        assert!(report.sent > 100 && report.lost() == 0, "{report:?}");
    }
    // Of connections that begin in the moment of the move, one may have to repeat its first packet.
    let lost: u64 = beginning.into_iter().map(|flood| flood.stop().lost()).sum();
    println!("{lost} first packets lost");
    assert!(lost <= 4, "{lost} first packets were lost");
    lab.assert_nothing_leaked();
}

#[test]
fn an_owner_that_no_node_reaches_withdraws_its_route_and_gets_nothing_back() {
    let lab = Routed::scene();
    let (owner, other) = lab.owner_and_other();
    let pods = visitors(&lab, &["n1", "n2", &other]);
    let sessions = lab.sessions(&pods);
    // Its router goes on: only the tunnel is cut, as if the nodes' network were another one.
    let all: Vec<String> = ["n1", "n2", &*other].iter().flat_map(|node| tunnel_between(node, &owner)).collect();
    cut(&lab, &all);
    let begin = Instant::now();
    lab.wait_for("it is on", &vec![other.clone()], || lab.holders());
    lab.wait_routed_to(&other);
    println!("one way is left after {:?}", begin.elapsed());
    assert_short(begin.elapsed(), 2500);
    pods.iter().for_each(|pod| lab.served(pod));
    cut(&lab, &[]);
    lab.assert_stays(&other, Duration::from_secs(5));
    assert_live("apart", sessions);
    lab.assert_nothing_leaked();
}

#[test]
fn what_is_removed_by_hand_of_a_routed_egress_ip_is_restored_and_opens_nothing() {
    let lab = Routed::scene();
    listen(&lab);
    let (owner, _) = lab.owner_and_other();
    let pods = visitors(&lab, &["n1", "n2", "g1", "g2"]);
    let node = lab.node(&owner);
    let state = || {
        let strip = |text: String| text.lines().filter(|l| l.contains("198.51.100") || l.contains(":51::")).count();
        (
            strip(node.ip("-4 route show table local")),
            strip(node.ip("-o addr")),
            node.ip("-o link").contains("egret-ip"),
        )
    };
    let whole = state();
    assert_eq!(whole, (2, 2, true), "{}", node.ip("-4 route show table local"));
    for command in [
        "route del blackhole 198.51.100.50 table local",
        "addr del 198.51.100.50/32 dev egret-ip",
        "addr del 2001:db8:51::50/128 dev egret-ip",
        "link set egret-ip down",
        "link set egret-ip arp on",
        "link set egret-ip-end down",
        "link del egret-ip",
    ] {
        node.ip(command);
        pods.iter().for_each(|pod| drop(pod.udp_who(SERVERS[0])));
        lab.wait_for(&format!("what there is after {command}"), &whole, state);
        lab.wait_until(&format!("the device is whole after {command}"), PATIENCE, || {
            let link = node.ip("-o link show dev egret-ip");
            link.contains("NOARP") && link.contains("LOWER_UP")
        });
        lab.wait_routed_to(&owner);
        pods.iter().for_each(|pod| lab.served(pod));
    }
    // With the daemon away the datapath stays, and nothing opens.
    lab.daemon(&owner).kill9();
    pods.iter().for_each(|pod| lab.assert_leaves_by_egress(pod));
    node.ip("addr del 198.51.100.50/32 dev egret-ip");
    pods.iter().for_each(|pod| drop(pod.udp_who(SERVERS[0])));
    lab.daemon(&owner).restart();
    lab.wait_ready(&owner);
    pods.iter().for_each(|pod| lab.served(pod));
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_that_changes_how_it_announces_moves_its_egress_ips_between_the_devices() {
    let lab = Routed::scene();
    let (owner, _) = lab.owner_and_other();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.assert_leaves_by_egress(&pod);
    let node = lab.node(&owner);
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &POOL));
    lab.wait_until("the device is gone", PATIENCE, || {
        !node.ip("-o link").contains("egret-ip") && node.ip("-o addr show dev eth0").contains("198.51.100.50/32")
    });
    assert!(!node.ip("-4 route show table local").contains("blackhole"));
    lab.write_manifest("gateway.yaml", &gateway());
    lab.wait_until("the device is back", PATIENCE, || {
        node.ip("-o link").contains("egret-ip") && !node.ip("-o addr show dev eth0").contains("198.51.100.50/32")
    });
    // FRR 8.4 sometimes does not announce an address that was on another interface a moment ago.
    let _ = pod.udp_who(SERVERS[0]);
    lab.assert_nothing_leaked();
}
