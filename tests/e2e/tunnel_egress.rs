//! The way into the tunnel that kernels before Linux 5.16 need: a pair of veths before its device.
//! `EGRET_TUNNEL_EGRESS=veth make e2e` runs all scenarios that way.

use lab::fault_injection::{cordoned, dies, owner_and_other, wait_holder};
use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EXT4, Lab, Pod, SERVERS, VISITOR};
use std::time::Duration;

/// After this time a daemon has read the whole state of the kernel again.
const READ_BACK: Duration = Duration::from_secs(35);

const BY_VETHS: &[&str] = &["--tunnel-egress=veth", "--own-tables=false"];

/// A scene in which every node has the pair, with a pod on each.
fn by_veths() -> (Lab, Vec<Pod>) {
    let lab = Lab::builder().node_arguments(BY_VETHS).scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    (lab, pods.into())
}

#[test]
fn pods_on_every_node_leave_by_the_pair_of_veths() {
    let (lab, pods) = by_veths();
    for pod in &pods {
        assert_leaves_by_egress(pod);
        for server in SERVERS {
            pod.ping(server).unwrap_or_else(|e| panic!("{} by ICMP to {server}: {e}", pod.name));
        }
    }
    for node in lab.nodes() {
        let chain = node.nft("list chain netdev egret into-tunnel");
        assert!(chain.contains("hook ingress device \"egret-hop\"") && chain.contains("policy drop"), "{chain}");
        assert!(node.ip("route show table 7871").contains("dev egret-out"), "{}", node.name);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn the_owners_death_moves_connections_that_came_by_veths() {
    let (lab, pods) = by_veths();
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    let going_on = sessions(&others);
    let gap = dies(&lab, &owner, &other, &others);
    assert!(gap < Duration::from_secs(3), "{gap:?}");
    assert_live("the owner's death", going_on);
    lab.assert_nothing_leaked();
}

#[test]
fn a_planned_move_hands_packets_over_by_veths() {
    let _machine = lab::turn::alone();
    let (lab, pods) = by_veths();
    let (owner, other) = owner_and_other(&lab);
    let going_on = sessions(&pods);
    let floods: Vec<_> = pods.iter().map(|p| p.flood(EXT4, Duration::from_millis(5), false)).collect();
    for (from, to) in [(&owner, &other), (&other, &owner), (&owner, &other)] {
        cordoned(&lab, from, true);
        wait_holder(&lab, to);
        std::thread::sleep(Duration::from_millis(500));
        cordoned(&lab, from, false);
        std::thread::sleep(Duration::from_millis(1500));
    }
    pods.iter().for_each(assert_leaves_by_egress);
    for flood in floods {
        let report = flood.stop();
        assert!(report.lost() * 100 < report.sent, "of three moves, each of which would lose more: {report:?}");
    }
    assert_short(assert_live("cordoned", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn whatever_is_taken_away_of_the_pair_blocks_and_comes_back() {
    let (lab, pods) = by_veths();
    let (owner, _) = owner_and_other(&lab);
    let pod = pods.iter().find(|pod| pod.node.name == "n1").expect("a pod on n1");
    let node = lab.node("n1");
    assert_leaves_by_egress(pod);
    let taken: [(&str, &dyn Fn()); 6] = [
        ("the chain's rules", &|| drop(node.nft("flush chain netdev egret into-tunnel"))),
        ("the table", &|| drop(node.nft("delete table netdev egret"))),
        ("the pair", &|| drop(node.ip("link delete egret-out"))),
        ("the peer", &|| drop(node.ip("link set egret-hop down"))),
        ("the tunnel device", &|| drop(node.ip("link delete egret"))),
        ("the neighbours", &|| drop(node.ip("neighbour flush dev egret-out nud permanent"))),
    ];
    for (what, take) in taken {
        // Nobody puts it back.
        let daemon = lab.daemon("n1");
        daemon.kill9();
        take();
        lab.forget_wire();
        println!("without {what}");
        assert_blocked(pod);
        lab.assert_nothing_arrives();
        daemon.restart();
        lab.wait_ready("n1");
        assert_leaves_by_egress(pod);
        // The daemon notices it, or reads it back.
        take();
        lab.wait_until(&format!("{what} is back"), READ_BACK, || pod.udp_who(EXT4).is_ok());
        assert_leaves_by_egress(pod);
    }
    assert_ne!(owner, "n1");
    lab.assert_nothing_leaked();
}

/// A node's kernel is replaced by a newer one, or the flag is changed.
#[test]
fn a_daemon_that_changes_the_way_keeps_connections_and_leaves_nothing_of_the_other() {
    let lab = Lab::scene();
    let pods = ["n1", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    for way in ["veth", "hook", "veth", "auto"] {
        for node in ["n1", "g1", "g2"] {
            lab.daemon(node).kill9();
            let arguments = lab.node_daemon_arguments(node).into_iter();
            let arguments = arguments.chain([format!("--tunnel-egress={way}")]).collect();
            lab.start_daemon(node, lab.node(node), arguments);
            lab.wait_ready(node);
            let links = lab.node(node).ip("-br link");
            assert_eq!(links.contains("egret-out"), way == "veth", "{way}: {links}");
        }
        pods.iter().for_each(assert_leaves_by_egress);
    }
    assert_live("the way into the tunnel changed", going_on);
    lab.assert_nothing_leaked();
}
