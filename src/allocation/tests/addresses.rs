use crate::allocation::{COOLDOWN_SECONDS, Reason};
use crate::api::{Allocate, AllocationKind, EgressPolicySpec};
use crate::fixture::{World, asking, naming, pair};

#[test]
fn policies_that_name_the_same_address_share_an_allocation() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50"]);
    world.policy("a/p", naming(&["192.0.2.55", "2001:db8::50"]));
    world.policy("a/q", naming(&["2001:db8::50", "192.0.2.55"]));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("a/p").id, outcome.grant("a/q").id);
    let allocations = &outcome.gateways["g"].allocations;
    assert_eq!(allocations.len(), 1);
    assert_eq!(allocations[0].policies[..], ["a/p".into(), "a/q".into()]);
    assert_eq!(allocations[0].kind, AllocationKind::Explicit);
}

#[test]
fn dedicated_takes_one_of_each_family_that_the_pool_has() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    assert_eq!(world.allocate().address("a/p"), "192.0.2.50");
    let id = world.allocate().grant("a/p").id;
    world.gateway("g", &["192.0.2.50-192.0.2.59", "2001:db8::50"], |spec| spec.default = true);
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/p"), "192.0.2.50 and 2001:db8::50", "the second family comes to the allocation");
    assert_eq!(outcome.grant("a/p").id, id);
}

#[test]
fn dedicated_does_not_take_addresses_that_others_name_at_the_same_time() {
    let mut world = World::new(&["192.0.2.50-192.0.2.51"]);
    world.policy("a/older", asking(Allocate::Dedicated));
    world.now += 1;
    world.policy("a/younger", naming(&["192.0.2.50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/older"), "192.0.2.51");
    assert_eq!(outcome.address("a/younger"), "192.0.2.50");
}

#[test]
fn shared_is_one_allocation_for_the_gateway_apart_from_dedicated_ones() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/s1", asking(Allocate::Shared));
    world.policy("a/d", asking(Allocate::Dedicated));
    world.policy("s2", asking(Allocate::Shared));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("a/s1").id, outcome.grant("s2").id);
    assert_ne!(outcome.address("a/s1"), outcome.address("a/d"));
    assert_eq!(outcome.gateways["g"].allocations.len(), 2);
}

#[test]
fn a_nodes_own_address_is_never_given_away() {
    let mut world = World::new(&["10.0.0.1-10.0.0.3"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("a/q", naming(&["10.0.0.2"]));
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/p"), "10.0.0.3");
    outcome.assert_refused("a/q", Reason::AddressOfNode, &["\"n2\"", "allocate: Node"]);
}

#[test]
fn released_addresses_cool_down_for_all_but_their_former_policies() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    let before = world.allocate().grant("a/p").clone();
    world.without_policy("a/p");
    world.policy("a/q", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    let words = ["IPv4", "spec.addresses", "1970-01-12T13:56:40Z", "egret.dev/end-cooldown=1970-01-12T13:46:40Z"];
    outcome.assert_refused("a/q", Reason::PoolExhausted, &words);
    assert_eq!(outcome.next_release, Some(world.now + COOLDOWN_SECONDS));
    let released = &outcome.gateways["g"].released;
    assert_eq!((released[0].id, &released[0].address), (before.id, &pair(&["192.0.2.50"])));

    let mut returned = world.clone();
    returned.now += COOLDOWN_SECONDS - 1;
    returned.policy("a/p", asking(Allocate::Dedicated));
    let outcome = returned.allocate();
    assert_eq!((outcome.grant("a/p").id, outcome.address("a/p")), (before.id, "192.0.2.50".into()));
    assert!(outcome.gateways["g"].released.is_empty());

    world.now += COOLDOWN_SECONDS;
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/q"), "192.0.2.50");
    assert_eq!(outcome.next_release, None);
    assert!(outcome.gateways["g"].released.is_empty());
}

#[test]
fn an_address_that_is_named_is_given_at_once_under_another_id() {
    // GitOps deletes and creates objects in either order. A namespace is renamed, or an EgressPolicy becomes a
    // ClusterEgressPolicy.
    for (old, new) in [("a/p", "a/renamed"), ("a/p", "b/p"), ("a/p", "p"), ("p", "a/p")] {
        for together in [true, false] {
            let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
            world.policy("a/other", asking(Allocate::Dedicated));
            world.policy(old, naming(&["192.0.2.55"]));
            let before = world.allocate().grant(old).clone();
            world.settle();
            world.now += 60;
            world.without_policy(old);
            if !together {
                world.allocate();
            }
            world.policy(new, naming(&["192.0.2.55"]));
            let outcome = world.allocate();
            let after = outcome.grant(new);
            assert_eq!(after.address, before.address);
            assert_ne!(after.id, before.id, "an id that a node still sends by is not another policy's");
            let released = &outcome.gateways["g"].released;
            assert_eq!((released[0].id, released[0].address.is_empty()), (before.id, true));
            if together {
                assert_eq!(after.node, before.node, "the address need not move");
            }
            // Its cooldown starts again when it is given back, for policies that accept any address.
            world.without_policy(new);
            world.policy("a/any", asking(Allocate::Dedicated));
            assert_eq!(world.allocate().address("a/any"), "192.0.2.51");
        }
    }
}

#[test]
fn an_annotation_ends_the_cooldown_of_earlier_releases() {
    let mut world = World::new(&["192.0.2.50-192.0.2.51"]);
    let annotate = |world: &mut World, text: &str| {
        let gateway = world.cluster.gateways.get_mut("g").unwrap();
        std::sync::Arc::make_mut(gateway).end_cooldown = Some(text.into());
    };
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("a/q", asking(Allocate::Dedicated));
    let before = world.allocate();
    let old = [before.grant("a/p").id, before.grant("a/q").id];
    world.without_policy("a/p");
    world.allocate();
    world.now += 10;
    world.without_policy("a/q");
    world.policy("a/r", asking(Allocate::Dedicated));
    world.policy("a/s", asking(Allocate::Dedicated));
    world.allocate().assert_refused("a/r", Reason::PoolExhausted, &["end-cooldown=1970-01-12T13:46:40Z"]);
    annotate(&mut world, "now");
    let outcome = world.allocate();
    outcome.assert_refused("a/r", Reason::PoolExhausted, &["13:56:40Z"]);
    assert!(outcome.gateways["g"].conditions[0].message.contains("\"now\""));
    annotate(&mut world, "1970-01-12T13:46:40Z");
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/r"), "192.0.2.50");
    assert!(!old.contains(&outcome.grant("a/r").id), "ids have their cooldown all the same");
    outcome.assert_refused("a/s", Reason::PoolExhausted, &["free again at 1970-01-12T13:56:50Z"]);
    assert_eq!(world.allocate(), outcome);
    annotate(&mut world, "2026-01-31T12:00:00Z");
    assert_eq!(world.allocate().address("a/s"), "192.0.2.51");
}

#[test]
fn a_second_address_comes_to_an_explicit_allocation_without_a_new_id() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    let before = world.allocate().grant("a/p").id;
    world.policy("a/p", naming(&["192.0.2.50", "2001:db8::50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("a/p").id, before);
    assert!(outcome.gateways["g"].released.is_empty());
    world.policy("a/p", naming(&["192.0.2.51", "2001:db8::50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("a/p").id, before);
    assert_eq!(outcome.gateways["g"].released[0].address, pair(&["192.0.2.50"]), "what it left rests");
}

#[test]
fn a_policy_that_names_its_present_address_stays_on_its_node() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    for name in ["a/1", "a/2", "a/3", "a/4"] {
        world.policy(name, asking(Allocate::Dedicated));
    }
    let before = world.allocate();
    world.settle();
    for name in ["a/1", "a/2", "a/3", "a/4"] {
        let grant = before.grant(name).clone();
        let ipv4 = grant.address.ipv4.unwrap().to_string();
        for spec in [naming(&[&ipv4]), asking(Allocate::Dedicated)] {
            world.now += 1;
            world.policy(name, spec);
            let after = world.allocate();
            let after = after.grant(name);
            assert_eq!((after.id, &after.node, &after.leaving), (grant.id, &grant.node, &None), "{name}");
        }
    }
}

#[test]
fn the_elder_claim_keeps_the_address() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50"]);
    world.policy("a/old", naming(&["192.0.2.50", "2001:db8::50"]));
    world.now += 1;
    world.policy("a/a-young", naming(&["192.0.2.50"]));
    world.policy("a/dedicated", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/old"), "192.0.2.50 and 2001:db8::50");
    outcome.assert_refused("a/a-young", Reason::AddressTaken, &["a/old", "2001:db8::50"]);
    outcome.assert_refused("a/dedicated", Reason::PoolExhausted, &["IPv6"]);

    // A request whose address is in the allocations is older, whatever the policy's age.
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/young", asking(Allocate::Dedicated));
    world.allocate();
    world.now -= 100;
    world.policy("a/old", naming(&["192.0.2.50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.address("a/young"), "192.0.2.50");
    outcome.assert_refused("a/old", Reason::AddressTaken, &["a/young", "Dedicated"]);
}

#[test]
fn a_pool_that_shrinks_moves_dedicated_allocations_and_rejects_named_ones() {
    let mut world = World::new(&["192.0.2.50-192.0.2.52", "2001:db8::50"]);
    world.policy("a/named", naming(&["192.0.2.50"]));
    world.policy("a/given", asking(Allocate::Dedicated));
    let before = world.allocate();
    assert_eq!(before.address("a/given"), "192.0.2.51 and 2001:db8::50");
    world.gateway("g", &["192.0.2.52", "2001:db8::50"], |spec| spec.default = true);
    let outcome = world.allocate();
    outcome.assert_refused("a/named", Reason::AddressOutsidePool, &["192.0.2.50", "spec.addresses"]);
    assert_eq!(outcome.address("a/given"), "192.0.2.52 and 2001:db8::50");
    assert_eq!(outcome.grant("a/given").id, before.grant("a/given").id, "its IPv6 connections live on");
    assert!(outcome.grant("a/given").note.as_ref().unwrap().contains("192.0.2.51"));
    assert_eq!(outcome.gateways["g"].released.len(), 2);
}

#[test]
fn overlapping_pools_belong_to_the_first_gateway_but_existing_allocations_stay() {
    let mut world = World::new(&["192.0.2.50-192.0.2.51"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    let before = world.allocate().grant("a/p").clone();
    world.gateway("a-first", &["192.0.2.50-192.0.2.60"], |_| {});
    world.policy("a/q", EgressPolicySpec { gateway: Some("a-first".into()), ..asking(Allocate::Dedicated) });
    world.policy("a/r", naming(&["192.0.2.51"]));
    let outcome = world.allocate();
    assert_eq!(*outcome.grant("a/p"), before);
    assert_eq!(outcome.address("a/q"), "192.0.2.51");
    outcome.assert_refused("a/r", Reason::AddressOutsidePool, &["\"a-first\"", "\"g\""]);
    let accepted = &outcome.gateways["g"].conditions[0];
    assert_eq!((&*accepted.type_, &*accepted.status, &*accepted.reason), ("Accepted", "False", "PoolOverlap"));
    assert!(accepted.message.contains("192.0.2.50-192.0.2.51"), "{}", accepted.message);
    assert_eq!(outcome.gateways["a-first"].conditions[0].status, "True");

    world.policy("a/s", asking(Allocate::Dedicated));
    world.allocate().assert_refused("a/s", Reason::PoolEmpty, &["\"g\"", "other gateways"]);
}

#[test]
fn duplicate_entries_of_the_allocations_are_repaired() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    world.policy("a/q", asking(Allocate::Dedicated));
    let before = world.allocate();
    for (id, address) in [(1, "192.0.2.50"), (7, "192.0.2.59"), (0, "192.0.2.51"), (20000, "192.0.2.50")] {
        let mut broken = world.clone();
        let gateway = std::sync::Arc::make_mut(broken.cluster.gateways.get_mut("g").unwrap());
        for allocation in &mut gateway.status.allocations {
            allocation.id = id;
            allocation.address = pair(&[address]);
        }
        let outcome = broken.allocate();
        let (p, q) = (outcome.grant("a/p"), outcome.grant("a/q"));
        assert!(p.id != q.id && p.address != q.address);
        assert!((1..=16383).contains(&p.id) && (1..=16383).contains(&q.id));
        assert_eq!(broken.allocate(), outcome, "and then stays as it is");
    }
    assert_eq!(world.allocate(), before);
}
