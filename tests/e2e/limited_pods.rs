//! Pods that the CNI plugin `bandwidth` limits: a filter at the veth redirects what they send to an ifb device, and it comes
//! in by the veth again. Needs root.

use lab::fault_injection::owner_and_other;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, egress_towards};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{Bulk, EXT4, EXT6, Lab, Pod, SERVERS, VISITOR};
use serde_json::json;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// After this time a daemon has read the whole state of the kernel again.
const READ_BACK: Duration = Duration::from_secs(35);
/// Bits a second that a limited pod may send, and in one burst.
const RATE: u32 = 40_000_000;
const BURST: u32 = 4_000_000;

/// Whether the plugin `bandwidth` is called before Egret's.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Before,
    After,
}

/// A pod that may send at [`RATE`], as with the annotation `kubernetes.io/egress-bandwidth`.
fn limited(lab: &Lab, node: &str, name: &str, order: Order) -> Pod {
    let mut pod = lab.sandbox(node, "shop", name, VISITOR);
    let plugins = pod.conflist.json["plugins"].as_array_mut().expect("a conflist has plugins");
    let egret = plugins.iter().position(|plugin| plugin["type"] == "egret-cni").expect("Egret's plugin");
    let at = if order == Order::Before { egret } else { egret + 1 };
    plugins.insert(at, json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}));
    pod.runtime.capabilities = json!({"bandwidth": {"egressRate": RATE, "egressBurst": BURST}});
    pod.attach().unwrap_or_else(|e| panic!("ADD of {name} on {node}: {e}"));
    pod
}

fn has_pair(lab: &Lab, node: &str) -> bool {
    lab.node(node).ip("-br link").contains("egret-out")
}

#[test]
fn limited_pods_on_every_node_leave_from_the_egress_ip_and_within_their_limit() {
    let lab = Lab::scene();
    let nodes = ["n1", "n2", "g1", "g2"];
    let pods = nodes.map(|node| limited(&lab, node, &format!("limited-{node}"), Order::Before));
    for pod in &pods {
        assert_leaves_by_egress(pod);
        for server in SERVERS {
            pod.ping(server).unwrap_or_else(|e| panic!("{} by ICMP to {server}: {e}", pod.name));
        }
        pod.check().unwrap_or_else(|e| panic!("CHECK of {}: {e}", pod.name));
        // What is not limited leaves as before.
        assert_leaves_by_egress(&lab.add_pod(&pod.node.name, "shop", &format!("free-{}", pod.name), VISITOR));
    }
    let [far, ..] = &pods;
    let upload: Bulk = far.upload(IpAddr::V4(EXT4)).expect("a connection");
    let sunk = || lab.server("ext").lock().expect("a lock").sunk();
    sleep(Duration::from_secs(1));
    let (before, begin) = (sunk(), Instant::now());
    sleep(Duration::from_secs(2));
    let rate = (sunk() - before) as f64 * 8.0 / begin.elapsed().as_secs_f64();
    assert!(rate < f64::from(RATE) * 1.3 && rate > f64::from(RATE) * 0.3, "{rate} bits a second");
    assert_eq!(upload.stop(), None);
    lab.assert_nothing_leaked();
    for node in nodes {
        assert_leaves_by_node(&lab.add_pod(node, "office", &format!("other-{node}"), &[]));
    }
}

/// The conflist of another program may have the plugin behind Egret's.
#[test]
fn a_pod_that_is_limited_later_is_blocked_until_its_way_is_known() {
    let lab = Lab::scene();
    for node in ["n1", "n2", "g1"] {
        let pod = limited(&lab, node, &format!("late-{node}"), Order::After);
        lab.wait_until("the daemon knows the ifb device", Duration::from_secs(5), || pod.udp_who(EXT4).is_ok());
        assert_leaves_by_egress(&pod);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn a_limited_pod_cannot_send_with_another_pods_address() {
    let lab = Lab::scene();
    lab.write_rich();
    for node in ["n1", "n2", "g1"] {
        let rich = lab.add_pod(node, "shop", &format!("rich-{node}"), &[("app", "rich")]);
        lab.wait_seen_as(&rich, [192, 0, 2, 56]);
        let forger = limited(&lab, node, &format!("forger-{node}"), Order::Before);
        assert_leaves_by_egress(&forger);
        lab.forget_wire();
        let before = lab.metrics(node).dropped("spoofed").unwrap_or_default();
        for (address, server) in [(IpAddr::from(rich.ipv4()), IpAddr::from(EXT4)), (rich.ipv6().into(), EXT6.into())] {
            forger.send_as(address, server);
        }
        sleep(Duration::from_millis(50));
        lab.assert_nothing_arrives();
        let dropped = lab.metrics(node).dropped("spoofed").unwrap_or_default() - before;
        assert!(dropped >= 2.0, "{node}: {dropped}");
    }
}

#[test]
fn the_way_into_the_tunnel_changes_with_the_first_and_the_last_limited_pod_and_connections_live() {
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    let others = ["n1", "n2", "g1", "g2"].map(|node| lab.add_pod(node, "shop", &format!("free-{node}"), VISITOR));
    let going_on = sessions(&others);
    let floods: Vec<_> = others.iter().map(|p| p.flood(EXT4, Duration::from_millis(5), false)).collect();
    for _ in 0..3 {
        let pods: Vec<Pod> =
            ["n1", "n2", "g1", "g2"].map(|node| limited(&lab, node, &format!("limited-{node}"), Order::Before)).into();
        for pod in &pods {
            assert_leaves_by_egress(pod);
            assert!(has_pair(&lab, &pod.node.name), "{}", pod.node.name);
            let routes = pod.node.ip("route show table 7871");
            assert!(routes.contains("dev egret-out"), "{}: {routes}", pod.node.name);
        }
        pods.into_iter().for_each(Pod::delete);
        for node in ["n1", "n2", "g1", "g2"] {
            lab.wait_until("the pair is gone", Duration::from_secs(5), || !has_pair(&lab, node));
            let routes = lab.node(node).ip("route show table 7871");
            assert!(!routes.contains("dev egret-out") && routes.contains("dev egret"), "{node}: {routes}");
        }
    }
    others.iter().for_each(assert_leaves_by_egress);
    for flood in floods {
        let report = flood.stop();
        // Six changes on its node.
        assert!(report.lost() <= 12, "{report:?}");
    }
    assert_short(assert_live("limited pods come and go", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn a_limited_pod_survives_the_owners_death_and_the_daemons_and_is_blocked_without_a_part() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2"].map(|node| limited(&lab, node, &format!("limited-{node}"), Order::Before));
    pods.iter().for_each(assert_leaves_by_egress);
    for pod in &pods {
        let node = &pod.node.name;
        let taken: [(&str, &dyn Fn()); 3] = [
            ("the pair's rules", &|| drop(pod.node.nft("flush chain netdev egret into-tunnel"))),
            ("the pair", &|| drop(pod.node.ip("link delete egret-out"))),
            ("the bridge's rules", &|| drop(pod.node.nft("flush chain bridge egret prerouting"))),
        ];
        // A routed pod's packets do not pass the bridge.
        for (what, take) in &taken[..if node == "n2" { 3 } else { 2 }] {
            let daemon = lab.daemon(node);
            daemon.kill9();
            // The kernel has what it needs.
            assert_leaves_by_egress(pod);
            take();
            lab.forget_wire();
            println!("{node} without {what}");
            assert_blocked(pod);
            lab.assert_nothing_arrives();
            daemon.restart();
            lab.wait_ready(node);
            assert_leaves_by_egress(pod);
            take();
            lab.wait_until(&format!("{what} is back"), READ_BACK, || pod.udp_who(EXT4).is_ok());
            assert_leaves_by_egress(pod);
        }
    }
    lab.daemon(&owner).kill9();
    lab.node(&owner).ip("link set eth0 down");
    for pod in &pods {
        let seen = |server: IpAddr| pod.udp_who(server).ok() == Some(egress_towards(server));
        lab.wait_until("the other node has taken over", Duration::from_secs(10), || SERVERS.into_iter().all(seen));
        assert_leaves_by_egress(pod);
    }
    assert_ne!(owner, other);
    lab.assert_nothing_leaked();
}

/// A pod's limit must not cost the others their rules.
#[test]
fn a_pair_that_cannot_be_made_blocks_limited_pods_alone() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    node.ip("link add egret-out type bridge");
    let free = lab.add_pod("n1", "shop", "free", VISITOR);
    let pod = limited(&lab, "n1", "limited", Order::Before);
    let late = lab.add_pod("n1", "shop", "late", VISITOR);
    [&free, &late].into_iter().for_each(assert_leaves_by_egress);
    assert_blocked(&pod);
    lab.wait_ready("n1");
    lab.assert_nothing_leaked();
    node.ip("link delete egret-out");
    lab.wait_until("the pair is there", READ_BACK, || pod.udp_who(EXT4).is_ok());
    [&pod, &free, &late].into_iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}
