use crate::allocation::Reason;
use crate::api::{Allocate, AllocationKind, EgressPolicySpec};
use crate::fixture::{World, asking, naming, pair, selector};
use crate::model::AddressRange;
use std::net::IpAddr;
use std::sync::Arc;

#[test]
fn a_gateway_must_exist() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", EgressPolicySpec { gateway: Some("nope".into()), ..asking(Allocate::Dedicated) });
    world.allocate().assert_refused("a/p", Reason::GatewayUnknown, &["\"nope\"", "one of: g"]);
    world.cluster.gateways.clear();
    world.allocate().assert_refused("a/p", Reason::GatewayUnknown, &["\"nope\"", "create it"]);
}

#[test]
fn without_a_name_there_must_be_one_default_gateway() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/old", asking(Allocate::Dedicated));
    let before = world.allocate().grant("a/old").clone();
    world.gateway("h", &["192.0.2.60"], |spec| spec.default = true);
    world.policy("a/new", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    assert_eq!(*outcome.grant("a/old"), before, "a second default gateway takes nothing away");
    outcome.assert_refused("a/new", Reason::SeveralDefaultGateways, &["g, h", "default: true"]);
    assert_eq!(outcome.gateways["h"].conditions[0].reason, "SeveralDefaultGateways");

    world.gateway("g", &["192.0.2.50"], |_| {});
    world.gateway("h", &["192.0.2.60"], |_| {});
    world.allocate().assert_refused("a/new", Reason::NoDefaultGateway, &["default: true"]);
}

#[test]
fn a_namespace_has_a_default_gateway_of_its_own() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.gateway("h", &["192.0.2.60-192.0.2.69"], |_| {});
    let default = |world: &mut World, gateway: &str| {
        world.cluster.namespaces.insert("a".into(), [("egret.dev/default-gateway", gateway)].into_iter().collect());
    };
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("a/named", EgressPolicySpec { gateway: Some("g".into()), ..asking(Allocate::Dedicated) });
    world.policy("b/p", asking(Allocate::Dedicated));
    world.policy("everywhere", asking(Allocate::Dedicated));
    default(&mut world, "h");
    let outcome = world.allocate();
    let gateway = |policy: &str| outcome.grant(policy).gateway.to_string();
    assert_eq!(["a/p", "a/named", "b/p", "everywhere"].map(gateway), ["h", "g", "g", "g"]);
    default(&mut world, "nope");
    world.allocate().assert_refused("a/p", Reason::GatewayUnknown, &["\"nope\"", "egret.dev/default-gateway"]);
    // It is no right to use the gateway.
    default(&mut world, "h");
    world.gateway("h", &["192.0.2.60"], |spec| spec.namespace_selector = Some(selector(&[("team", "sales")])));
    world.allocate().assert_refused("a/p", Reason::NamespaceNotAllowed, &["\"h\""]);
}

#[test]
fn a_gateway_may_be_for_some_namespaces_only() {
    let mut world = World::new(&[]);
    world.gateway("g", &["192.0.2.50-192.0.2.59"], |spec| {
        spec.default = true;
        spec.namespace_selector = Some(selector(&[("egress", "yes")]));
    });
    world.cluster.namespaces.insert("a".into(), [("egress", "yes")].into_iter().collect());
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("b/p", asking(Allocate::Dedicated));
    world.policy("cluster-wide", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    outcome.grant("a/p");
    outcome.grant("cluster-wide");
    outcome.assert_refused("b/p", Reason::NamespaceNotAllowed, &["\"b\"", "\"g\"", "label the namespace"]);
}

#[test]
fn a_named_address_must_be_in_the_pool() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50", "2001:db8::1"]));
    world.allocate().assert_refused("a/p", Reason::AddressOutsidePool, &["2001:db8::1", "\"g\""]);
}

#[test]
fn an_empty_or_exhausted_pool_is_a_rejection() {
    let mut world = World::new(&[]);
    world.policy("a/p", asking(Allocate::Shared));
    world.allocate().assert_refused("a/p", Reason::PoolEmpty, &["allocate: Node"]);
    world.gateway("g", &["192.0.2.50-192.0.2.59", "2001:db8::50"], |spec| spec.default = true);
    world.policy("a/q", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    outcome.assert_refused("a/q", Reason::PoolExhausted, &["IPv6", "all 1 are", "allocate: Shared"]);
    let left = outcome.gateways["g"].conditions.iter().find(|c| c.type_ == "AddressesLeft").unwrap();
    assert_eq!((&*left.status, &*left.reason), ("False", "PoolExhausted"));
    assert_eq!(outcome.gateways["g"].allocations.len(), 1, "no half of a pair is kept for it");
}

#[test]
fn the_cluster_has_16383_allocations() {
    let mut world = World::new(&["10.1.0.0/16"]);
    for i in 0..16384 {
        world.policy(&format!("a/p{i:05}"), asking(Allocate::Dedicated));
    }
    world.allocate().assert_refused("a/p16383", Reason::NoIdLeft, &["16383", "Shared"]);
}

#[test]
fn a_gateway_of_which_only_the_allocations_are_known_keeps_them_and_gives_out_nothing() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/own", asking(Allocate::Dedicated));
    world.policy("a/named", naming(&["192.0.2.55"]));
    world.policy("a/nodes", asking(Allocate::Node));
    world.allocate();
    world.settle();
    let before = world.allocate().gateways["g"].clone();
    assert!(
        before.allocations.len() == 3 && before.allocations.iter().all(|allocation| allocation.node.is_some()),
        "{before:?}"
    );
    // Another gateway's pool has the address of the allocations.
    world.gateway("z", &["192.0.2.50-192.0.2.70"], |_| {});
    world.gateway("g", &[], |spec| spec.node_selector = selector(&[("no", "node")]));
    let gateway = Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap());
    let addresses = before.allocations.iter().filter(|allocation| allocation.kind != AllocationKind::Node);
    let addresses = addresses.filter_map(|allocation| allocation.address.ipv4.map(IpAddr::V4));
    gateway.pool = addresses.map(|address| AddressRange { first: address, last: address }).collect();
    gateway.pool.sort();
    (gateway.frozen, gateway.fault, gateway.status) = (true, Some("two ranges overlap".into()), before.clone().into());
    world.policy("a/new", EgressPolicySpec { gateway: Some("g".into()), ..naming(&["192.0.2.56"]) });
    world.policy("b/new", EgressPolicySpec { gateway: Some("z".into()), ..asking(Allocate::Dedicated) });
    world.now += 3600;
    let outcome = world.allocate();
    let after = &outcome.gateways["g"];
    assert_eq!(
        (&after.allocations, &after.nodes, &after.released),
        (&before.allocations, &before.nodes, &before.released)
    );
    let accepted = &after.conditions[0];
    assert_eq!((&*accepted.status, &*accepted.reason), ("False", "Invalid"));
    assert!(accepted.message.starts_with("two ranges overlap; its last good state is not known"), "{accepted:?}");
    outcome.assert_refused("a/new", Reason::GatewayInvalid, &["\"g\"", "corrected"]);
    assert_eq!(outcome.grant("b/new").address, pair(&["192.0.2.51"]));
}
