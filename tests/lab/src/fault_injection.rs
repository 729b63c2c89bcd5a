//! What happens to gateways' nodes, on purpose or not, and who has an egress address then.

use super::scene::{VISITOR, assert_leaves_by_egress};
use super::topology::{EXT4, Node, NodeSpec, Pods};
use super::{EGRESS4, Lab, Pod, machine, manifests, server};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The nodes that have the scene's IPv4 address.
pub fn holders(lab: &Lab) -> Vec<String> {
    let has = |n: &&Arc<Node>| n.ip("-o addr").contains(&format!(" {EGRESS4}/32 "));
    lab.nodes().iter().filter(has).map(|n| n.name.clone()).collect()
}

/// The node that has the scene's address, and the other gateway node.
#[track_caller]
pub fn owner_and_other(lab: &Lab) -> (String, String) {
    let holders = holders(lab);
    let [owner] = holders.as_slice() else { panic!("{EGRESS4} is on {holders:?}") };
    let other = if owner == "g1" { "g2" } else { "g1" };
    (owner.clone(), other.to_owned())
}

/// Waits until the egress IP is on that node alone.
#[track_caller]
pub fn wait_holder(lab: &Lab, node: &str) {
    lab.wait_for("the address is on", &vec![node.to_owned()], || holders(lab));
}

/// Panics if the egress IP is not on that node alone, at any moment of this time. `meanwhile` is what else must hold.
#[track_caller]
pub fn assert_stays(lab: &Lab, node: &str, time: Duration, mut meanwhile: impl FnMut()) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        assert_eq!(holders(lab), [node], "after {:?}", begin.elapsed());
        meanwhile();
        thread::sleep(Duration::from_millis(50));
    }
}

/// Takes a node off the network, or puts it back.
pub fn plugged(lab: &Lab, node: &str, in_: bool) {
    lab.host("fab").ip(&format!("link set p-{node} {}", if in_ { "up" } else { "down" }));
}

/// Lets nothing pass at the fabric that these rules drop, each without its verdict: `iifname "p-g1"`. No rules: all
/// passes.
pub fn cut(lab: &Lab, rules: &[String]) {
    let rules: String = rules.iter().map(|rule| format!("  {rule} drop\n")).collect();
    lab.host("fab").nft(&format!(
        "add table bridge cut\ndelete table bridge cut\n\
         table bridge cut {{\n chain pass {{\n  type filter hook forward priority 0;\n{rules} }}\n}}\n"
    ));
}

/// Everything of a node, which keeps its carrier.
pub fn all_of(node: &str) -> Vec<String> {
    ["iifname", "oifname"].map(|way| format!("{way} \"p-{node}\"")).into()
}

/// The tunnel between two nodes.
pub fn tunnel_between(a: &str, b: &str) -> Vec<String> {
    [(a, b), (b, a)].map(|(from, to)| format!("iifname \"p-{from}\" oifname \"p-{to}\" udp dport 7871")).into()
}

/// The owner's link goes down: how long the first of the pods waits until it is answered again. Returns when the other
/// node has the address and each pod leaves from it.
#[track_caller]
pub fn dies(lab: &Lab, owner: &str, other: &str, pods: &[Pod]) -> Duration {
    plugged(lab, owner, false);
    let gap = answered_after(&pods[0], Instant::now());
    println!("new packets are answered after {gap:?}");
    wait_holder(lab, other);
    // Each source node finds out by itself.
    for pod in pods {
        answered_after(pod, Instant::now());
    }
    pods.iter().for_each(assert_leaves_by_egress);
    gap
}

/// A scene with one node and three gateway nodes, and a pod on the node.
pub fn three_gateways() -> (Lab, Pod) {
    let nodes = ["n1", "g1", "g2", "g3"].into_iter().zip([11, 21, 22, 23]);
    let nodes = nodes.map(|(name, last)| match name {
        "n1" => NodeSpec::new(name, last, Pods::Routed),
        _ => NodeSpec::gateway(name, last, Pods::Routed),
    });
    let lab = Lab::builder().nodes(nodes.collect()).scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    (lab, pod)
}

/// Changes a node's labels.
pub fn label(lab: &Lab, node: &str, labels: &[(&str, &str)]) {
    let mut object = manifests::node(lab.node(node));
    for (key, value) in labels {
        object["metadata"]["labels"][key] = (*value).into();
    }
    lab.manifests().write_object(&format!("node-{node}.yaml"), &object);
}

/// What `kubectl cordon` and `kubectl uncordon` do.
pub fn cordoned(lab: &Lab, node: &str, cordoned: bool) {
    let mut object = manifests::node(lab.node(node));
    object["spec"]["unschedulable"] = cordoned.into();
    lab.manifests().write_object(&format!("node-{node}.yaml"), &object);
}

/// How long after `begin` the pod is answered again, by UDP packets every 10 ms.
pub fn answered_after(pod: &Pod, begin: Instant) -> Duration {
    answered_by_after(pod, EXT4, begin)
}

/// The same by another server.
pub fn answered_by_after(pod: &Pod, by: Ipv4Addr, begin: Instant) -> Duration {
    let socket = pod.udp_socket((by, server::UDP_WHO).into()).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout");
    loop {
        assert!(begin.elapsed() < Duration::from_secs(20), "{} gets no answer", pod.name);
        if socket.send(b"who").is_ok() && machine::receive(&socket, &mut [0; 64]).is_ok() {
            return begin.elapsed();
        }
    }
}

/// How many allocations [`thousand_allocations`] has.
pub const THOUSAND: usize = 1000;

/// A lab whose pods of namespace `shop` all leave by the first of a thousand allocations. All are on `g1`; `g2` has
/// none.
pub fn thousand_allocations() -> Lab {
    let lab = Lab::builder().build();
    // Addresses beyond the nodes' network: who asks for them is on the link all the same.
    lab.host("ext").ip_batch(&["route add 198.18.0.0/16 dev eth0".into(), "route add 2001:db8:3::/64 dev eth0".into()]);
    let gateway = manifests::gateway("default", &["198.18.4.0-198.18.7.255", "2001:db8:3::1000-2001:db8:3::13ff"]);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  interface: eth0\n"));
    let destination = |i: usize| match i {
        0 => String::new(),
        i => format!(
            "\n  egress: [{{ to: [{{ ipBlock: {{ cidr: 10.9.{}.{}/32 }} }}] }}]\n  priority: 1",
            i / 256,
            i % 256
        ),
    };
    let policy = |i| manifests::policy("shop", &format!("p{i}"), &format!("podSelector: {{}}{}", destination(i)));
    lab.write_manifest("policies.yaml", &(0..THOUSAND).map(policy).collect::<String>());
    lab.add_namespace("shop", &[]);
    label(&lab, "g2", &[("egret.dev/gateway", "no")]);
    lab.start();
    lab.wait_for("addresses on g1:", &THOUSAND, || held(&lab, "g1"));
    label(&lab, "g2", &[]);
    lab
}

/// How many of [`thousand_allocations`]' IPv4 addresses a node has.
pub fn held(lab: &Lab, node: &str) -> usize {
    lab.node(node).ip("-o addr show dev eth0").matches("198.18.").count()
}
