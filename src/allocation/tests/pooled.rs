//! Policies that have an egress IP of their own while the pool has one.

use crate::allocation::Reason;
use crate::api::{Allocate, AllocationKind, NamespaceQuota};
use crate::fixture::{World, asking};

/// A world in which these policies ask one after the other.
fn world(pool: &[&str], policies: &[&str]) -> World {
    let mut world = World::new(pool);
    for policy in policies {
        world.policy(policy, asking(Allocate::Pooled));
        world.now += 1;
    }
    world
}

#[test]
fn policies_have_their_own_egress_ips_and_share_the_least_used_ones_when_none_is_left() {
    let mut world = world(&["192.0.2.50-192.0.2.51"], &["a/1", "b/2", "c/3", "d/4", "a/5"]);
    let outcome = world.allocate();
    let addresses = ["a/1", "b/2", "c/3", "d/4", "a/5"].map(|policy| outcome.address(policy));
    assert_eq!(addresses, ["192.0.2.50", "192.0.2.51", "192.0.2.50", "192.0.2.51", "192.0.2.50"]);
    assert_eq!(outcome.grant("c/3").kind, AllocationKind::Pooled);
    assert_eq!(outcome.grant("c/3").shared_with.as_deref(), Some("a/1, a/5"));
    assert_eq!(outcome.gateways["g"].allocations.len(), 2);
    let left = outcome.gateways["g"].conditions.iter().find(|condition| condition.type_ == "AddressesLeft").unwrap();
    assert_eq!(left.status, "True", "{}", left.message);
    assert_eq!(world.allocate().decisions, outcome.decisions, "they stay");

    // Who shares keeps what it has, also when another address is free.
    world.without_policy("b/2");
    world.without_policy("d/4");
    world.allocate();
    world.now += 1000;
    let after = world.allocate();
    assert_eq!(["a/1", "c/3", "a/5"].map(|policy| after.address(policy)), ["192.0.2.50"; 3]);
    world.policy("e/6", asking(Allocate::Pooled));
    assert_eq!(world.allocate().address("e/6"), "192.0.2.51");
}

#[test]
fn a_pool_without_egress_ips_of_such_policies_is_exhausted() {
    let mut world = world(&["192.0.2.50"], &[]);
    world.policy("a/own", asking(Allocate::Dedicated));
    world.policy("b/pooled", asking(Allocate::Pooled));
    world.allocate().assert_refused("b/pooled", Reason::PoolExhausted, &["no IPv4 address left"]);
    world.without_policy("a/own");
    world.allocate();
    world.now += 1000;
    assert_eq!(world.allocate().address("b/pooled"), "192.0.2.50");
}

#[test]
fn a_pair_is_shared_as_a_whole_and_quotas_count_it() {
    let mut world = world(&["192.0.2.50-192.0.2.51", "2001:db8::50"], &["a/1", "a/2", "a/3"]);
    let outcome = world.allocate();
    assert_eq!(["a/1", "a/2", "a/3"].map(|policy| outcome.address(policy)), ["192.0.2.50 and 2001:db8::50"; 3]);
    world.gateway("g", &["192.0.2.50-192.0.2.51", "2001:db8::50"], |spec| {
        spec.default = true;
        spec.namespace_quota = Some(NamespaceQuota { addresses: Some(2), ..NamespaceQuota::default() });
    });
    world.allocate().assert_refused("a/3", Reason::QuotaExceeded, &["2 egress IPs"]);
}
