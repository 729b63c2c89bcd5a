//! Nodes with weights and a maximum of egress IPs.

use crate::allocation::AllocationResult;
use crate::api::{Allocate, Condition, NodeCapacity};
use crate::fixture::{World, asking, selector};
use crate::model::drain::DRAIN_LABEL;
use crate::model::{Node, PolicyKey};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const POOL: &[&str] = &["192.0.2.0/24", "2001:db8::/64"];

/// A cluster with a gateway of these nodes, each with a weight and a maximum by its annotations.
fn world(nodes: &[(u16, Option<u32>)], policies: usize) -> World {
    let mut world = World::new(POOL);
    world.cluster.nodes.clear();
    for (i, (weight, most)) in nodes.iter().enumerate() {
        let name = format!("n{i}");
        world.node(&name, "g", &[&format!("10.0.0.{i}")]);
        capacity(&mut world, &name, *weight, *most);
    }
    (0..policies).for_each(|i| world.policy(&format!("a/p{i:03}"), asking(Allocate::Dedicated)));
    world.settle();
    world.allocate();
    world.settle();
    world
}

fn node<'w>(world: &'w mut World, name: &str) -> &'w mut Node {
    Arc::make_mut(world.cluster.nodes.get_mut(name).unwrap())
}

fn capacity(world: &mut World, name: &str, weight: u16, most: Option<u32>) {
    let capacity = &mut node(world, name).capacity;
    (capacity.weight, capacity.most) = (Some(weight), most);
}

/// How many allocations each node has; `-`: no node.
fn counts(world: &World) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for allocation in &world.cluster.gateways["g"].status.allocations {
        let node = allocation.node.as_deref().unwrap_or("-").to_owned();
        *counts.entry(node).or_default() += 1;
    }
    counts
}

fn of(world: &World, node: &str) -> u32 {
    counts(world).get(node).copied().unwrap_or_default()
}

fn room(outcome: &AllocationResult) -> Condition {
    let conditions = &outcome.gateways["g"].conditions;
    conditions.iter().find(|condition| condition.type_ == "RoomLeft").unwrap().clone()
}

#[track_caller]
fn assert_room(outcome: &AllocationResult, status: &str, reason: &str, words: &[&str]) {
    let Condition { status: is, reason: why, message, .. } = room(outcome);
    assert_eq!((&*is, &*why), (status, reason), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

fn dies(world: &mut World, node: &str) {
    let others: Vec<String> = world.cluster.nodes.keys().map(|name| name.to_string()).collect();
    for other in others.iter().filter(|name| *name != node) {
        world.misses(other, &[node.to_owned()]);
    }
}

proptest! {
    #[test]
    fn counts_follow_the_weights_and_stay_within_the_maxima(
        nodes in prop::collection::vec((1..9u16, prop::option::of(0..9u32)), 1..6), policies in 0..50usize,
    ) {
        let world = world(&nodes, policies);
        let counts = counts(&world);
        let of = |i: usize| counts.get(&format!("n{i}")).copied().unwrap_or_default();
        let sum: u16 = nodes.iter().map(|(weight, _)| weight).sum();
        let (all, unlimited) = (policies as f64, nodes.iter().all(|(_, most)| most.is_none()));
        for (i, (weight, most)) in nodes.iter().enumerate() {
            prop_assert!(most.is_none_or(|most| of(i) <= most), "{counts:?}");
            let part = f64::from(*weight) / f64::from(sum);
            // Each count is rounded; so the sum, and with it a node's part of it, is off by half for each node.
            let off = 0.5 + part * nodes.len() as f64 / 2.0;
            prop_assert!(!unlimited || (f64::from(of(i)) - part * all).abs() <= off, "{nodes:?} {counts:?}");
        }
        let is_full = |i: usize| nodes[i].1.is_some_and(|most| of(i) == most);
        prop_assert!(!counts.contains_key("-") || (0..nodes.len()).all(is_full), "{nodes:?} {counts:?}");
    }

    #[test]
    fn rebalancing_ends_where_the_weights_say(
        nodes in prop::collection::vec((1..9u16, prop::option::of(0..20u32)), 1..5), policies in 0..40usize,
    ) {
        let fresh = counts(&world(&nodes, policies));
        // All begin on the first node.
        let mut world = world(&[(1, None)], policies);
        for (i, (weight, most)) in nodes.iter().enumerate() {
            world.node(&format!("n{i}"), "g", &[&format!("10.0.0.{i}")]);
            capacity(&mut world, &format!("n{i}"), *weight, *most);
        }
        Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).rebalance = true;
        world.settle();
        for _ in 0..20 {
            world.allocate();
            world.settle();
        }
        // What has no room elsewhere stays, above the maximum.
        let mut expected = fresh;
        let left = expected.remove("-").unwrap_or_default();
        *expected.entry("n0".to_owned()).or_default() += left;
        expected.retain(|_, count| *count > 0);
        let (is, total) = (counts(&world), nodes.iter().map(|(weight, _)| u32::from(*weight)).sum::<u32>());
        for (name, count) in &is {
            let wanted = expected.get(name).copied().unwrap_or_default();
            // Equal quotients may be on either node.
            prop_assert!(count.abs_diff(wanted) <= 1, "{nodes:?}: {is:?}, not {expected:?} of {total}");
        }
    }
}

#[test]
fn while_no_node_has_room_an_egress_ip_has_no_node_and_gets_one_as_soon_as_there_is_room() {
    let mut world = world(&[(1, Some(2)), (1, Some(1))], 4);
    assert_eq!(counts(&world), [("-".to_owned(), 1), ("n0".to_owned(), 2), ("n1".to_owned(), 1)].into());
    let words = ["192.0.2.3", "n0 (2 of 2), n1 (1 of 1)", "spec.capacity", "egret.dev/max-egress-ips"];
    assert_room(&world.allocate(), "False", "NodesFull", &words);
    let reports = world.report();
    let ready = reports[&PolicyKey::from("a/p003")].conditions.iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((&*ready.status, &*ready.reason), ("False", "NodesFull"), "{}", ready.message);
    assert!(ready.message.contains("n0 (2 of 2)"), "{}", ready.message);
    assert_eq!(world.allocate().gateways, world.allocate().gateways, "nothing goes on changing");

    world.without_policy("a/p001");
    world.allocate();
    world.settle();
    assert_eq!(of(&world, "-"), 0);
    world.policy("a/p001", asking(Allocate::Dedicated));
    world.allocate();
    assert_eq!(of(&world, "-"), 1);
    capacity(&mut world, "n1", 1, Some(2));
    world.allocate();
    assert_eq!((of(&world, "-"), of(&world, "n1")), (0, 2));
    // Nodes' own addresses do not count.
    world.policy("a/own", asking(Allocate::Node));
    assert!(world.allocate().node("a/own").is_some());
}

#[test]
fn the_condition_warns_before_a_death_takes_egress_ips_away() {
    let mut world = world(&[(1, Some(3)), (1, Some(3)), (1, Some(3))], 6);
    assert_room(&world.allocate(), "True", "RoomLeft", &["room for 3 more"]);
    world.policy("a/one-more", asking(Allocate::Dedicated));
    assert_room(&world.allocate(), "False", "NoRoomForFailover", &["\"n0\" dies", "no room for 1"]);
    world.gateway("g", POOL, |spec| spec.default = true);
    for node in ["n0", "n1", "n2"] {
        capacity(&mut world, node, 1, None);
    }
    assert!(!world.allocate().gateways["g"].conditions.iter().any(|c| c.type_ == "RoomLeft"));
}

#[test]
fn an_egress_ip_of_a_dead_node_that_no_other_has_room_for_is_reported() {
    let mut world = world(&[(1, Some(2)), (1, Some(2))], 4);
    dies(&mut world, "n1");
    assert_room(&world.allocate(), "False", "NodesFull", &["n0 (2 of 2)"]);
    let reports = world.report();
    let of_dead = world.cluster.gateways["g"].status.allocations.iter().find(|a| a.node.as_deref() == Some("n1"));
    let ready = reports[&of_dead.unwrap().policies[0]].conditions.iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((&*ready.status, &*ready.reason), ("False", "NodesFull"), "{}", ready.message);
    assert!(ready.message.contains("\"n1\", which had") && ready.message.contains("n0 (2 of 2)"), "{}", ready.message);
}

#[test]
fn a_lowered_maximum_moves_what_is_too_much_if_there_is_room() {
    let mut world = world(&[(1, None), (1, Some(3))], 6);
    assert_eq!((of(&world, "n0"), of(&world, "n1")), (3, 3));
    capacity(&mut world, "n1", 1, Some(1));
    let outcome = world.allocate();
    let moving = outcome.gateways["g"].allocations.iter().filter(|a| a.leaving.is_some());
    assert!(moving.clone().all(|a| (a.node.as_deref(), a.leaving.as_deref()) == (Some("n0"), Some("n1"))));
    assert_eq!((moving.count(), of(&world, "n1")), (2, 1));
    world.settle();
    capacity(&mut world, "n0", 1, Some(2));
    world.allocate();
    world.settle();
    assert_eq!((of(&world, "n0"), of(&world, "n1")), (5, 1), "no egress IP is taken away from a node that serves it");
}

#[test]
fn drains_and_requested_moves_respect_the_maximum() {
    let mut world = world(&[(1, None), (1, Some(2))], 5);
    assert_eq!((of(&world, "n0"), of(&world, "n1")), (3, 2));
    let policy = world.cluster.policies.get_mut(&PolicyKey::from("a/p000")).unwrap();
    Arc::make_mut(policy).for_controller.get_or_insert_default().move_to = Some("n1".into());
    assert_eq!(world.allocate().node("a/p000"), Some("n0"));
    let reports = world.report();
    let ready = reports[&PolicyKey::from("a/p000")].conditions.iter().find(|c| c.type_ == "Ready").unwrap();
    assert!(ready.message.contains("is full"), "{}", ready.message);
    capacity(&mut world, "n1", 1, Some(4));
    assert_eq!(world.allocate().node("a/p000"), Some("n1"));
    world.settle();
    node(&mut world, "n0").labels = [("gateway", "g"), (DRAIN_LABEL, "true")].into_iter().collect();
    world.allocate();
    world.settle();
    assert_eq!((of(&world, "n0"), of(&world, "n1")), (1, 4), "what has no place elsewhere stays on the drained node");
}

#[test]
fn a_maximum_of_zero_keeps_egress_ips_away_and_a_gateway_selects_nodes_by_label() {
    let mut world = World::new(POOL);
    let entry = |labels: &[(&str, &str)], most| NodeCapacity {
        node_selector: selector(labels),
        weight: None,
        max_egress_ips: Some(most),
    };
    world.gateway("g", POOL, |spec| {
        (spec.default, spec.capacity) = (true, vec![entry(&[("size", "none")], 0), entry(&[], 7)]);
    });
    node(&mut world, "n1").labels = [("gateway", "g"), ("size", "none")].into_iter().collect();
    (0..7).for_each(|i| world.policy(&format!("a/p{i}"), asking(Allocate::Dedicated)));
    world.allocate();
    assert_eq!(counts(&world), [("n2".to_owned(), 7)].into());
}
