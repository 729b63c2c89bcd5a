//! What CNIs lay: masquerade by each tool that writes it, and an overlay between the nodes. Needs root.

use lab::fault_injection::{dies, owner_and_other};
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::topology::{Masquerade, NodeSpec};
use lab::{Lab, Pod, Pods, VISITOR};

/// The scene with all masquerade by one tool: pods that a policy selects leave from the egress IP, others from their
/// node's address, which is the masquerade's.
fn masqueraded_by(masquerade: Masquerade) {
    let by = |spec| NodeSpec { masquerade, ..spec };
    let nodes = vec![
        by(NodeSpec::new("n1", 11, Pods::Routed)),
        by(NodeSpec::new("n2", 12, Pods::Bridged)),
        by(NodeSpec::gateway("g1", 21, Pods::Routed)),
        by(NodeSpec::gateway("g2", 22, Pods::Bridged)),
    ];
    let lab = Lab::builder().nodes(nodes).scene();
    for node in lab.nodes() {
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR);
        assert_leaves_by_egress(&pod);
    }
    lab.assert_nothing_leaked();
    for node in lab.nodes() {
        assert_leaves_by_node(&lab.add_pod(&node.name, "shop", &format!("other-{}", node.name), &[]));
    }
}

#[test]
fn pods_that_nft_masquerades_leave_from_the_egress_ip() {
    masqueraded_by(Masquerade::Nftables);
}

#[test]
fn pods_that_iptables_nft_masquerades_leave_from_the_egress_ip() {
    masqueraded_by(Masquerade::IptablesNft);
}

#[test]
fn pods_that_iptables_legacy_masquerades_leave_from_the_egress_ip() {
    masqueraded_by(Masquerade::IptablesLegacy);
}

/// As flannel lays it: routes by way of addresses whose neighbours and forwarding entries are known.
fn vxlan(lab: &Lab) {
    let mac = |node: &lab::Node| format!("02:f1:00:00:00:{:02x}", node.number);
    let via = |node: &lab::Node| format!("10.244.{}.0", node.number);
    for node in lab.nodes() {
        node.ip_batch(&[
            format!(
                "link add flannel.1 address {} mtu 1450 type vxlan id 1 local {} dev eth0 dstport 8472 nolearning",
                mac(node),
                node.ipv4()
            ),
            format!("addr add {}/32 dev flannel.1", via(node)),
            "link set flannel.1 up".into(),
        ]);
        for other in lab.nodes().iter().filter(|other| other.name != node.name) {
            node.ip(&format!("neigh replace {} lladdr {} dev flannel.1 nud permanent", via(other), mac(other)));
            let (mac, to) = (mac(other), other.ipv4().to_string());
            node.run(["bridge", "fdb", "append", &mac, "dev", "flannel.1", "dst", &to]);
            node.ip(&format!("route replace {} via {} dev flannel.1 onlink", other.pods4(), via(other)));
        }
    }
}

#[test]
fn pods_leave_from_the_egress_ip_beside_an_overlay_of_vxlan() {
    let lab = Lab::builder().build();
    vxlan(&lab);
    let lab = lab.with_scene();
    let pods: Vec<Pod> =
        lab.nodes().iter().map(|n| lab.add_pod(&n.name, "shop", &format!("visitor-{}", n.name), VISITOR)).collect();
    lab.assert_carries(&pods);
    let (owner, other) = owner_and_other(&lab);
    let others: Vec<Pod> = pods.into_iter().filter(|pod| pod.node.name != owner).collect();
    dies(&lab, &owner, &other, &others);
    lab.assert_nothing_leaked();
}
