//! Planned moves: only to live nodes, and as few as possible.

use crate::allocation::{AllocationResult, rebalance};
use crate::api::{Allocate, Announce};
use crate::fixture::{World, asking};
use crate::model::PolicyKey;
use crate::model::drain::DRAIN_LABEL;
use crate::model::selector::Name;
use crate::model::uplink_key::DEFAULT_ROUTE;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A cluster with these nodes, which have all reported, and this number of policies with dedicated allocations.
fn world(nodes: &[&str], allocations: usize) -> World {
    let mut world = World::new(&["192.0.2.0/24", "198.51.100.0/24"]);
    world.cluster.nodes.clear();
    for (i, node) in nodes.iter().enumerate() {
        world.node(node, "g", &[&format!("10.0.0.{i}")]);
    }
    (0..allocations).for_each(|i| world.policy(&format!("a/p{i:03}"), asking(Allocate::Dedicated)));
    world.settle();
    world.allocate();
    world.settle();
    world
}

fn drain(world: &mut World, node: &str, drained: bool) {
    let value = if drained { "true" } else { "false" };
    let node = Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap());
    node.labels = [("gateway", "g"), (DRAIN_LABEL, value)].into_iter().collect();
}

fn misses(world: &mut World, node: &str, unreachable: &[&str]) {
    world.misses(node, &unreachable.iter().map(ToString::to_string).collect::<Vec<_>>());
}

fn rebalancing(world: &mut World, on: bool) {
    Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).rebalance = on;
}

/// The number of allocations of each node.
fn counts(world: &World) -> BTreeMap<String, usize> {
    let mut counts: BTreeMap<String, usize> = world.cluster.nodes.keys().map(|name| (name.to_string(), 0)).collect();
    for allocation in &world.cluster.gateways["g"].status.allocations {
        *counts.entry(allocation.node.as_ref().unwrap().to_string()).or_default() += 1;
    }
    counts
}

fn nodes_of(outcome: &AllocationResult) -> BTreeMap<u16, Option<Name>> {
    outcome.gateways["g"].allocations.iter().map(|allocation| (allocation.id, allocation.node.clone())).collect()
}

#[test]
fn a_drain_skips_a_node_that_others_do_not_reach() {
    let mut world = world(&["n1", "n2", "n3"], 1);
    misses(&mut world, "n1", &["n2"]);
    misses(&mut world, "n3", &["n2"]);
    drain(&mut world, "n1", true);
    let grant = world.allocate().grant("a/p000").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving.as_deref()), (Some("n3"), Some("n1")));
}

#[test]
fn a_drained_node_keeps_its_allocations_until_another_one_lives() {
    let mut world = world(&["n1", "n2"], 1);
    misses(&mut world, "n1", &["n2"]);
    drain(&mut world, "n1", true);
    let grant = world.allocate().grant("a/p000").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving), (Some("n1"), None));
    misses(&mut world, "n1", &[]);
    let grant = world.allocate().grant("a/p000").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving.as_deref()), (Some("n2"), Some("n1")));
}

#[test]
fn allocations_leave_a_cordoned_node_unless_its_gateway_ignores_cordons_or_no_other_node_lives() {
    let cordon = |world: &mut World, node: &str, cordoned: bool| {
        Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).cordoned = cordoned;
    };
    let ignore = |world: &mut World, ignore: bool| {
        Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).ignore_cordon = ignore;
    };
    let mut world = world(&["n1", "n2"], 1);
    cordon(&mut world, "n1", true);
    ignore(&mut world, true);
    assert_eq!(world.allocate().node("a/p000"), Some("n1"));
    ignore(&mut world, false);
    cordon(&mut world, "n2", true);
    assert_eq!(world.allocate().node("a/p000"), Some("n1"), "none would be left");
    cordon(&mut world, "n2", false);
    let grant = world.allocate().grant("a/p000").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving.as_deref()), (Some("n2"), Some("n1")));
    world.settle();
    cordon(&mut world, "n1", false);
    assert_eq!(world.allocate().node("a/p000"), Some("n2"), "nothing moves back");
    cordon(&mut world, "n1", true);
    world.policy("a/new", asking(Allocate::Dedicated));
    world.policy("a/own", asking(Allocate::Node));
    let outcome = world.allocate();
    assert_eq!((outcome.node("a/new"), outcome.node("a/own")), (Some("n2"), Some("n2")));
}

#[test]
fn a_node_without_egret_gets_no_allocation_of_another_node() {
    let mut world = world(&["n1"], 2);
    world.node("n0", "g", &["10.0.0.9"]);
    rebalancing(&mut world, true);
    drain(&mut world, "n1", true);
    assert_eq!(world.allocate().node("a/p000"), Some("n1"));
    world.settle();
    assert_eq!(world.allocate().node("a/p000"), Some("n0"));
}

#[test]
fn allocations_move_from_a_node_that_left_the_gateway() {
    let mut world = world(&["n1", "n2"], 1);
    misses(&mut world, "n1", &["n2"]);
    world.node("n1", "other", &["10.0.0.0"]);
    let grant = world.allocate().grant("a/p000").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving.as_deref()), (Some("n2"), Some("n1")), "n1 has it until n2 does");
}

#[test]
fn new_allocations_go_to_live_nodes_if_there_are_any() {
    let mut world = world(&["n1", "n2", "n3"], 0);
    misses(&mut world, "n2", &["n1"]);
    world.policy("a/new", asking(Allocate::Dedicated));
    world.policy("a/own", asking(Allocate::Node));
    let outcome = world.allocate();
    assert_eq!(outcome.node("a/own"), Some("n2"));
    assert_eq!(outcome.node("a/new"), Some("n3"));
    misses(&mut world, "n1", &["n1", "n2", "n3"]);
    misses(&mut world, "n2", &["n2"]);
    misses(&mut world, "n3", &["n3"]);
    world.policy("a/newer", asking(Allocate::Dedicated));
    assert!(world.allocate().node("a/newer").is_some(), "who is first back has it");
}

#[test]
fn an_allocation_is_moved_by_hand_to_a_live_node() {
    let mut world = world(&["n1", "n2"], 1);
    let policy = world.cluster.policies.get_mut(&PolicyKey::from("a/p000")).unwrap();
    Arc::make_mut(policy).for_controller.get_or_insert_default().move_to = Some("n2".into());
    misses(&mut world, "n1", &["n2"]);
    assert_eq!(world.allocate().node("a/p000"), Some("n1"));
    misses(&mut world, "n1", &[]);
    assert_eq!(world.allocate().node("a/p000"), Some("n2"));
}

#[test]
fn a_new_node_gets_its_share_on_request_and_not_all_at_once() {
    let mut world = world(&["n1"], 60);
    world.node("n2", "g", &["10.0.0.9"]);
    world.settle();
    let before = nodes_of(&world.allocate());
    rebalancing(&mut world, true);
    let outcome = world.allocate();
    let moving: Vec<_> =
        outcome.gateways["g"].allocations.iter().filter(|allocation| allocation.leaving.is_some()).collect();
    assert_eq!(moving.len(), rebalance::MAX_MOVING);
    assert!(
        moving
            .iter()
            .all(|allocation| (allocation.node.as_deref(), allocation.leaving.as_deref()) == (Some("n2"), Some("n1")))
    );
    assert_eq!(nodes_of(&world.allocate()), nodes_of(&outcome), "those are to arrive first");
    world.settle();
    let next = nodes_of(&world.allocate());
    assert_eq!(before.iter().filter(|(id, node)| next[id] != **node).count(), 30);
    world.settle();
    assert_eq!(nodes_of(&world.allocate()), next);
    assert_eq!(counts(&world), [("n1".to_owned(), 30), ("n2".to_owned(), 30)].into());
}

#[test]
fn requested_and_immovable_allocations_are_not_rebalanced() {
    let mut world = world(&["n1"], 4);
    for policy in ["a/p000", "a/p001", "a/p002"] {
        let policy = world.cluster.policies.get_mut(&PolicyKey::from(policy)).unwrap();
        Arc::make_mut(policy).for_controller.get_or_insert_default().move_to = Some("n1".into());
    }
    world.policy("a/own", asking(Allocate::Node));
    world.allocate();
    world.node("n2", "g", &["10.0.0.9"]);
    rebalancing(&mut world, true);
    world.settle();
    world.allocate();
    world.settle();
    assert_eq!(counts(&world), [("n1".to_owned(), 4), ("n2".to_owned(), 1)].into());
    assert_eq!(world.allocate().node("a/p003"), Some("n2"));
}

#[test]
fn a_node_that_cannot_hold_its_allocations_gets_no_more() {
    let mut world = world(&["n1"], 4);
    world.node("n2", "g", &["10.0.0.9"]);
    world.settle();
    let status = Arc::make_mut(world.cluster.egress_nodes.get_mut("n2").unwrap());
    status.of_allocations_mut().refused =
        vec![crate::api::RefusedAllocation { id: 1, message: "there is no interface bond7".into() }];
    rebalancing(&mut world, true);
    world.allocate();
    assert_eq!(counts(&world)["n2"], 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any distribution of allocations, with drained and dead nodes.
    #[test]
    fn allocations_are_balanced_by_the_fewest_moves(
        has in proptest::collection::vec(0..40usize, 1..6), drained in any::<prop::sample::Index>(),
        dead in any::<prop::sample::Index>(), is_drained in any::<bool>(), is_dead in any::<bool>(),
    ) {
        let names: Vec<String> = (0..has.len()).map(|i| format!("n{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut world = world(&names, has.iter().sum());
        let gateway = Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap());
        let given = has.iter().zip(&names).flat_map(|(n, name)| std::iter::repeat_n(name, *n));
        gateway.status.allocations.iter_mut().zip(given).for_each(|(allocation, node)| allocation.node = Some((*node).into()));
        world.settle();
        let (drained, dead) = (drained.index(names.len()), dead.index(names.len()));
        if is_dead {
            for name in names.iter().filter(|name| **name != names[dead]) {
                misses(&mut world, name, &[names[dead]]);
            }
        }
        if is_drained {
            drain(&mut world, names[drained], true);
        }
        // Allocations of drained nodes move first.
        world.allocate();
        world.settle();
        let start = counts(&world);
        let alone = names.len() == 1;
        let part = |name: &str| {
            alone || !(is_dead && name == names[dead] || is_drained && name == names[drained])
        };
        let fair: Vec<usize> = start.iter().filter(|(name, _)| part(name)).map(|(_, n)| *n).collect();
        let (all, nodes) = (fair.iter().sum::<usize>(), fair.len().max(1));
        // The nodes with the most allocations keep the remainder.
        let mut sorted = fair.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let share = |i: usize| all / nodes + usize::from(i < all % nodes);
        let needed: usize = sorted.iter().enumerate().map(|(i, n)| n.saturating_sub(share(i))).sum();

        rebalancing(&mut world, true);
        let mut moves = 0;
        for round in 0.. {
            let before = world.cluster.gateways["g"].status.allocations.clone();
            let after = world.allocate();
            let moved = before.iter().zip(&after.gateways["g"].allocations).filter(|(a, b)| a.node != b.node).count();
            prop_assert!(moved <= rebalance::MAX_MOVING);
            if moved == 0 {
                break;
            }
            moves += moved;
            prop_assert!(round < 100, "it comes to an end");
            world.settle();
        }
        prop_assert_eq!(moves, needed);
        let end = counts(&world);
        let (took_part, others): (Vec<_>, Vec<_>) = end.iter().partition(|(name, _)| part(name));
        let least = took_part.iter().map(|(_, n)| **n).min().unwrap_or_default();
        prop_assert!(took_part.iter().all(|(_, n)| **n <= least + 1), "{:?}", end);
        prop_assert!(others.iter().all(|(name, n)| start[*name] == **n), "{:?}", end);
    }
}

#[test]
fn a_node_that_has_lost_a_family_gets_no_new_allocations() {
    let mut world = world(&["n1", "n2"], 2);
    world.loses("n1", &["IPv6"]);
    rebalancing(&mut world, true);
    for i in 0..3 {
        world.policy(&format!("b/p{i}"), asking(Allocate::Dedicated));
        assert_eq!(world.allocate().node(&format!("b/p{i}")), Some("n2"));
    }
    assert_eq!(counts(&world)["n1"], 1, "what it has moves by itself, if it must");
    world.loses("n2", &["IPv6"]);
    world.policy("c/p", asking(Allocate::Dedicated));
    assert_eq!(world.allocate().node("c/p"), Some("n1"), "none has more");
}

#[test]
fn a_node_without_the_default_route_gets_no_allocations_that_routers_announce() {
    let mut world = world(&["n1", "n2"], 2);
    world.gateway("g", &["192.0.2.0/24", "198.51.100.0/24"], |spec| {
        (spec.announce, spec.default) = (Announce::Route, true);
    });
    world.loses("n1", &["IPv4"]);
    let status = Arc::make_mut(world.cluster.egress_nodes.get_mut("n1").unwrap());
    for lost in &mut status.of_allocations_mut().lost {
        lost.interface = Some(DEFAULT_ROUTE.to_string());
    }
    for i in 0..3 {
        world.policy(&format!("b/p{i}"), asking(Allocate::Dedicated));
        assert_eq!(world.allocate().node(&format!("b/p{i}")), Some("n2"));
    }
}
