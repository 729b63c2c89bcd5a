use super::*;
use crate::api::Allocate;
use crate::fixture::{World, asking, naming};
use std::sync::Arc;

fn world() -> World {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("shop/visitors", naming(&["192.0.2.50"]));
    world.report();
    world.policy("shop/own", asking(Allocate::Node));
    world.node("s1", "none", &["10.0.0.9"]);
    world.report();
    world.settle();
    world.report();
    world
}

fn state(world: &World) -> ClusterState {
    ClusterState { cluster: Arc::new(world.cluster.clone()), now: world.now, ..ClusterState::default() }
}

#[test]
fn an_egress_ip_is_found_by_address_and_by_policy() {
    let state = state(&world());
    for what in ["192.0.2.50", "shop/visitors", "visitors"] {
        let ip = allocation_of(&state, what, "shop").unwrap();
        assert_eq!((ip.egress_ip.as_str(), ip.held_by.as_slice()), ("192.0.2.50", &["n1".to_owned()][..]));
        let named: Vec<String> = ip.to_annotate(&state).iter().map(ToString::to_string).collect();
        assert_eq!(named, ["shop/visitors"]);
    }
    assert!(allocation_of(&state, "n1", "shop").unwrap_err().to_string().contains("kubectl egret drain n1"));
}

#[test]
fn a_node_that_cannot_hold_it_is_refused_with_the_reason() {
    let mut world = world();
    let why = |world: &World, what: &str, to: &str| {
        let state = state(world);
        why_not(&state, &allocation_of(&state, what, "shop").unwrap(), to)
    };
    assert_eq!(why(&world, "visitors", "n2"), None);
    assert!(why(&world, "visitors", "s1").unwrap().contains("no node of EgressGateway g; label it"));
    assert!(why(&world, "visitors", "none").unwrap().contains("no such node"));
    assert!(why(&world, "own", "n2").unwrap().contains("allocate: Node"));
    world.misses("n1", &["n2".to_owned()]);
    assert!(why(&world, "visitors", "n2").unwrap().contains("does not answer"));
    let state = state(&world);
    let ip = allocation_of(&state, "visitors", "shop").unwrap();
    assert!(ip.cannot_leave(&state, "n1").unwrap().contains("no other node that can hold it"));
}
