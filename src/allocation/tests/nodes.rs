use crate::allocation::Reason;
use crate::api::{Allocate, EgressGatewayStatus, FamilyUsage};
use crate::fixture::{World, asking, naming};
use crate::model::PolicyKey;
use std::sync::Arc;

#[test]
fn allocations_are_spread_over_the_gateways_nodes_and_stay() {
    let mut world = World::new(&["192.0.2.0/24"]);
    for i in 0..5 {
        world.policy(&format!("a/p{i}"), asking(Allocate::Dedicated));
    }
    let before = world.allocate();
    let nodes: Vec<_> = (0..5).map(|i| before.node(&format!("a/p{i}")).unwrap()).collect();
    assert_eq!(nodes, ["n1", "n2", "n1", "n2", "n1"]);
    assert_eq!(before.gateways["g"].nodes, ["n1", "n2"]);

    world.node("n0", "g", &["10.0.0.3"]);
    let outcome = world.allocate();
    assert_eq!(outcome.decisions, before.decisions, "a new node draws nothing to itself");
    world.policy("a/p5", asking(Allocate::Dedicated));
    assert_eq!(world.allocate().node("a/p5"), Some("n0"));
}

#[test]
fn an_allocation_of_a_removed_node_moves_and_keeps_id_and_address() {
    let mut world = World::new(&["192.0.2.0/24"]);
    world.policy("a/p", naming(&["192.0.2.7"]));
    let before = world.allocate().grant("a/p").clone();
    assert_eq!(before.node.as_deref(), Some("n1"));
    world.without_node("n1");
    let outcome = world.allocate();
    assert_eq!(outcome.node("a/p"), Some("n2"));
    assert_eq!((outcome.grant("a/p").id, &outcome.grant("a/p").address), (before.id, &before.address));
    world.without_node("n2");
    let outcome = world.allocate();
    assert_eq!(outcome.node("a/p"), None);
    assert_eq!(outcome.grant("a/p").id, before.id);
    let ready = &outcome.gateways["g"].conditions[1];
    assert_eq!((&*ready.status, &*ready.reason), ("False", "NoNode"));
    world.node("n1", "g", &["10.0.0.1"]);
    assert_eq!(world.allocate().node("a/p"), Some("n1"));
}

#[test]
fn node_allocations_have_the_nodes_own_addresses() {
    let mut world = World::new(&[]);
    for i in 0..4 {
        world.policy(&format!("a/p{i}"), asking(Allocate::Node));
    }
    let outcome = world.allocate();
    assert_eq!(outcome.gateways["g"].allocations.len(), 2);
    assert_eq!(outcome.address("a/p0"), "10.0.0.1 and fd00::1");
    assert_eq!(outcome.address("a/p1"), "10.0.0.2 and fd00::2");
    assert_eq!(outcome.grant("a/p0").id, outcome.grant("a/p2").id);

    world.without_node("n1");
    let moved = world.allocate();
    assert_eq!(moved.grant("a/p0"), outcome.grant("a/p1"), "its policies join the other node's allocation");
    assert_eq!(moved.grant("a/p1"), outcome.grant("a/p1"));
    assert_eq!(moved.gateways["g"].released.len(), 1);

    world.without_node("n2");
    world.allocate().assert_refused("a/p0", Reason::NoNode, &["\"g\"", "label a node"]);
}

#[test]
fn a_policy_that_returns_to_a_node_gets_the_same_allocation() {
    let mut world = World::new(&[]);
    world.policy("a/p0", asking(Allocate::Node));
    world.policy("a/p1", asking(Allocate::Node));
    let before = world.allocate().grant("a/p1").clone();
    world.without_policy("a/p0");
    world.without_policy("a/p1");
    world.allocate();
    world.policy("a/p1", asking(Allocate::Node));
    assert_eq!(*world.allocate().grant("a/p1"), before);
}

#[test]
fn a_node_of_two_gateways_serves_both() {
    let mut world = World::new(&[]);
    world.gateway("h", &[], |spec| spec.node_selector = crate::fixture::selector(&[("gateway", "g")]));
    world.policy("a/p", asking(Allocate::Node));
    world.policy("a/q", crate::api::EgressPolicySpec { gateway: Some("h".into()), ..asking(Allocate::Node) });
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/p"), outcome.address("a/q"));
    assert_ne!(outcome.grant("a/p").id, outcome.grant("a/q").id);
    assert_eq!(world.allocate(), outcome);
}

#[test]
fn with_external_placement_the_node_with_the_address_holds_the_allocation() {
    let mut world = World::new(&[]);
    world.external("g", &["192.0.2.50-192.0.2.51"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("a/q", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    let id = outcome.grant("a/p").id;
    assert_eq!(outcome.node("a/p"), None, "no node has it yet");
    world.holds("n2", &[id]);
    world.holds("elsewhere", &[outcome.grant("a/q").id]);
    let outcome = world.allocate();
    assert_eq!((outcome.node("a/p"), outcome.node("a/q")), (Some("n2"), None));
    world.holds("n1", &[id]);
    assert_eq!(world.allocate().node("a/p"), Some("n2"), "both have it: it stays");
    world.holds("n2", &[]);
    assert_eq!(world.allocate().node("a/p"), Some("n1"));
    world.holds("n1", &[]);
    assert_eq!(world.allocate().node("a/p"), Some("n1"), "nobody has it: it stays");
    world.without_node("n1");
    assert_eq!(world.allocate().node("a/p"), None);
}

#[test]
fn a_policy_moves_its_allocation_by_hand_to_a_node_of_the_gateway() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    let before = world.allocate().node("a/p").unwrap().to_owned();
    let other = ["n1", "n2"].into_iter().find(|n| *n != before).unwrap();
    let ask = |world: &mut World, node: Option<&str>| {
        let policy = world.cluster.policies.get_mut(&PolicyKey::from("a/p")).unwrap();
        Arc::make_mut(policy).for_controller.get_or_insert_default().move_to = node.map(Into::into);
        world.allocate().node("a/p").unwrap().to_owned()
    };
    assert_eq!(ask(&mut world, Some("nowhere")), before);
    assert_eq!(ask(&mut world, Some(other)), other);
    assert_eq!(ask(&mut world, None), other, "it stays");
    assert_eq!(ask(&mut world, Some(&before)), before);
}

#[test]
fn a_gateway_counts_its_nodes_and_the_use_of_its_pool() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::/64"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.policy("a/q", asking(Allocate::Dedicated));
    world.policy("a/node", asking(Allocate::Node));
    let status = |world: &mut World| world.allocate().gateways["g"].clone();
    let first = status(&mut world);
    let not_ready = |status: &EgressGatewayStatus| status.not_ready_nodes.join(" ");
    assert_eq!((first.node_count, first.ready_nodes, not_ready(&first)), (2, 0, "n1 n2".into()), "none reports");
    let of = |total, used, cooling_down| Some(FamilyUsage { total, used, cooling_down });
    // The node's own address is not from the pool.
    assert_eq!((first.usage.ipv4, first.usage.ipv6), (of(10, 2, 0), of(i64::MAX, 1, 0)));

    world.settle();
    let second = status(&mut world);
    assert_eq!((second.node_count, second.ready_nodes, not_ready(&second)), (2, 2, String::new()));
    world.misses("n1", &["n2".to_owned()]);
    world.without_policy("a/q");
    let third = status(&mut world);
    assert_eq!((third.node_count, third.ready_nodes, not_ready(&third)), (2, 1, "n2".into()), "n1 does not reach n2");
    assert_eq!((third.usage.ipv4, third.usage.ipv6), (of(10, 1, 1), of(i64::MAX, 0, 1)));
    world.gateway("g", &[], |_| {});
    assert!(status(&mut world).usage.is_empty());
}
