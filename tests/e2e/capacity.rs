//! Gateway nodes with weights and a maximum of egress IPs: who takes over, and what is blocked. Needs root.

use lab::fault_injection::plugged;
use lab::scene::assert_blocked;
use lab::survival::{assert_live, assert_short, sessions};
use lab::topology::{NodeSpec, Pods};
use lab::{EXT4, EXT6, Lab, Pod, manifests};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
const GATEWAYS: [&str; 3] = ["g1", "g2", "g3"];

/// The egress IP number `n`, of both families.
fn egress_ip(n: u8) -> [IpAddr; 2] {
    let digits = u16::from_str_radix(&(50 + n).to_string(), 16).expect("digits");
    [[192, 0, 2, 50 + n].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, digits].into()]
}

/// The policies 1 to `count`, each with an egress IP of its own for the pods with its number.
fn policies(count: u8) -> String {
    let policy = |n: u8| {
        let [ipv4, ipv6] = egress_ip(n);
        let spec = format!(
            "podSelector: {{ matchLabels: {{ number: \"{n}\" }} }}\n  address: {{ ipv4: {ipv4}, ipv6: \"{ipv6}\" }}"
        );
        manifests::policy("shop", &format!("p{n}"), &spec)
    };
    (1..=count).map(policy).collect()
}

fn write_gateway(lab: &Lab, capacity: &str) {
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  capacity: {capacity}\n"));
}

/// A node and three gateway nodes with this capacity, and so many policies.
fn lab(capacity: &str, count: u8) -> Lab {
    let mut nodes = vec![NodeSpec::new("n1", 11, Pods::Routed)];
    nodes.extend(GATEWAYS.into_iter().zip(21..).map(|(name, last)| NodeSpec::gateway(name, last, Pods::Routed)));
    let lab = Lab::builder().nodes(nodes).build();
    write_gateway(&lab, capacity);
    lab.add_namespace("shop", &[]);
    lab.write_manifest("policies.yaml", &policies(count));
    lab.start();
    lab
}

fn annotate(lab: &Lab, node: &str, annotations: Value) {
    let mut object = manifests::node(lab.node(node));
    object["metadata"]["annotations"] = annotations;
    lab.manifests().write_object(&format!("node-{node}.yaml"), &object);
}

/// The numbers of the egress IPs that each gateway node has, of both families.
fn held(lab: &Lab, count: u8) -> BTreeMap<&'static str, Vec<u8>> {
    let of = |node: &'static str| {
        let text = lab.node(node).ip("-o addr");
        let has = |n: &u8| {
            let [ipv4, ipv6] = egress_ip(*n);
            text.contains(&format!(" {ipv4}/32 ")) && text.contains(&format!(" {ipv6}/128 "))
        };
        (node, (1..=count).filter(has).collect())
    };
    GATEWAYS.into_iter().map(of).collect()
}

/// Waits until the nodes, in the order of their names, have so many egress IPs.
fn wait_counts(lab: &Lab, count: u8, wanted: [usize; 3]) {
    lab.wait_for("egress IPs of each gateway node:", &wanted, || {
        let held = held(lab, count);
        GATEWAYS.map(|node| held[node].len())
    });
}

fn pods(lab: &Lab, count: u8) -> Vec<Pod> {
    (1..=count).map(|n| lab.add_pod("n1", "shop", &format!("pod-{n}"), &[("number", &n.to_string())])).collect()
}

#[track_caller]
fn assert_leaves(pod: &Pod, n: u8) {
    for (server, wanted) in [EXT4.into(), EXT6.into()].into_iter().zip(egress_ip(n)) {
        let server: IpAddr = server;
        assert_eq!(pod.who(server).ok(), Some(wanted), "{} to {server}", pod.name);
        assert_eq!(pod.udp_who_patiently(server).ok(), Some(wanted), "{} to {server} by UDP", pod.name);
    }
}

fn status(lab: &Lab, path: &str) -> String {
    std::fs::read_to_string(lab.manifests().path().join("status").join(path)).unwrap_or_default()
}

#[test]
fn a_full_node_takes_nothing_over_and_what_has_no_room_is_blocked_until_there_is_some() {
    let lab = lab("[{ nodeSelector: {}, maxEgressIPs: 2 }]", 5);
    wait_counts(&lab, 5, [2, 2, 1]);
    let pods = pods(&lab, 5);
    lab.wait_until("all leave", PATIENCE, || pods.iter().all(|pod| pod.who(EXT4).is_ok() && pod.who(EXT6).is_ok()));
    (1..).zip(&pods).for_each(|(n, pod)| assert_leaves(pod, n));
    lab.wait_until("the gateway warns", PATIENCE, || {
        status(&lab, "egressgateways/default.yaml").contains("NoRoomForFailover")
    });

    // g1 dies: of its two, one finds room on g3, and g2 is full.
    let before = held(&lab, 5);
    let lost = &before["g1"];
    let others = (1..).zip(&pods).filter(|(n, _)| !lost.contains(n));
    let live = others.flat_map(|(_, pod)| sessions(std::slice::from_ref(pod))).collect();
    plugged(&lab, "g1", false);
    lab.wait_until("one was taken over", PATIENCE, || held(&lab, 5)["g3"].len() == 2);
    thread::sleep(Duration::from_secs(3));
    let after = held(&lab, 5);
    assert_eq!(after["g2"], before["g2"], "nothing else moves");
    assert!(before["g3"].iter().all(|n| after["g3"].contains(n)), "{before:?} {after:?}");
    let blocked: Vec<u8> = lost.iter().copied().filter(|n| !after["g3"].contains(n)).collect();
    let [blocked] = blocked.as_slice() else { panic!("{blocked:?} are on no node") };
    for (n, pod) in (1..).zip(&pods) {
        if n == *blocked { assert_blocked(pod) } else { assert_leaves(pod, n) }
    }
    assert_short(assert_live("another node died", live), 150);
    let [ipv4, _] = egress_ip(*blocked);
    lab.wait_until("the gateway says which one", PATIENCE, || {
        let text = status(&lab, "egressgateways/default.yaml");
        text.contains("NodesFull") && text.contains(&ipv4.to_string()) && text.contains("g2 (2 of 2), g3 (2 of 2)")
    });
    lab.wait_until("its policy says so", PATIENCE, || {
        status(&lab, &format!("egresspolicies/shop/p{blocked}.yaml")).contains("NodesFull")
    });

    // The administrator gives one node more room.
    annotate(&lab, "g2", json!({"egret.dev/max-egress-ips": "3"}));
    lab.wait_until("the last one was taken over", PATIENCE, || held(&lab, 5)["g2"].len() == 3);
    lab.wait_seen_as(&pods[usize::from(*blocked) - 1], ipv4);
    (1..).zip(&pods).for_each(|(n, pod)| assert_leaves(pod, n));

    // What is back takes nothing away.
    plugged(&lab, "g1", true);
    thread::sleep(Duration::from_secs(3));
    wait_counts(&lab, 5, [0, 3, 2]);
    (1..).zip(&pods).for_each(|(n, pod)| assert_leaves(pod, n));
    let node = [lab.node("n1").ipv4().into(), lab.node("n1").ipv6().into()];
    for (server, node) in lab::SERVERS.into_iter().zip(node) {
        assert!(!lab.sources(server).contains(&node), "packets to {server} as the node");
    }
}

#[test]
fn egress_ips_follow_weights_and_leave_a_node_whose_maximum_is_lowered() {
    let lab = lab("[{ nodeSelector: { matchLabels: { kubernetes.io/hostname: g1 } }, weight: 4 }]", 6);
    wait_counts(&lab, 6, [4, 1, 1]);
    let pods = pods(&lab, 6);
    lab.wait_until("all leave", PATIENCE, || pods.iter().all(|pod| pod.who(EXT4).is_ok() && pod.who(EXT6).is_ok()));
    let live = sessions(&pods);
    annotate(&lab, "g1", json!({"egret.dev/max-egress-ips": "1"}));
    lab.wait_until("g1 has one", PATIENCE, || held(&lab, 6)["g1"].len() == 1);
    let after = held(&lab, 6);
    assert_eq!(after["g2"].len() + after["g3"].len(), 5, "{after:?}");
    thread::sleep(Duration::from_secs(2));
    assert_short(assert_live("a maximum was lowered", live), 150);
    (1..).zip(&pods).for_each(|(n, pod)| assert_leaves(pod, n));
    // Who dies now leaves nothing to the node that is full.
    plugged(&lab, "g3", false);
    lab.wait_until("g2 has the others", PATIENCE, || held(&lab, 6)["g2"].len() == 5);
    assert_eq!(held(&lab, 6)["g1"].len(), 1);
    (1..).zip(&pods).for_each(|(n, pod)| lab.wait_seen_as(pod, egress_ip(n)[0]));
    (1..).zip(&pods).for_each(|(n, pod)| assert_leaves(pod, n));
}
