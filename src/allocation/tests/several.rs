//! Policies with several egress IPs.

use crate::allocation::{AllocationResult, Decision, Grants, Reason};
use crate::api::{Allocate, EgressPolicySpec, NamespaceQuota};
use crate::fixture::{World, asking, naming, naming_several};
use crate::model::PolicyKey;
use std::collections::BTreeSet;

fn counting(count: u16) -> EgressPolicySpec {
    EgressPolicySpec { address_count: Some(count), ..asking(Allocate::Dedicated) }
}

fn grants<'a>(outcome: &'a AllocationResult, key: &str) -> &'a Grants {
    match &outcome.decisions[&PolicyKey::from(key)] {
        Decision::Granted(grants) => grants,
        other => panic!("{key}: {other:?}"),
    }
}

/// The egress IPs of a policy, in its order.
fn addresses(outcome: &AllocationResult, key: &str) -> Vec<String> {
    grants(outcome, key).iter().map(|grant| crate::allocation::in_words(&grant.address)).collect()
}

#[test]
fn named_egress_ips_are_shared_with_policies_that_name_one_of_them() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", naming_several(["192.0.2.52", "192.0.2.51"]));
    world.policy("a/q", naming(&["192.0.2.51"]));
    let outcome = world.allocate();
    assert_eq!(addresses(&outcome, "a/p"), ["192.0.2.52", "192.0.2.51"]);
    assert_eq!(grants(&outcome, "a/p").others[0].id, outcome.grant("a/q").id);
    assert_eq!(outcome.gateways["g"].allocations.len(), 2);
}

#[test]
fn allocated_egress_ips_keep_their_places_when_the_policy_asks_for_more_or_fewer() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    world.policy("a/p", counting(3));
    let three = addresses(&world.allocate(), "a/p");
    assert_eq!(three.iter().collect::<BTreeSet<_>>().len(), 3);
    assert!(three.iter().all(|pair| pair.contains(" and ")), "{three:?}");
    world.policy("a/p", counting(4));
    assert_eq!(addresses(&world.allocate(), "a/p")[..3], three);
    world.policy("a/p", counting(2));
    let outcome = world.allocate();
    assert_eq!(addresses(&outcome, "a/p"), three[..2]);
    assert_eq!(outcome.gateways["g"].released.len(), 2);
    world.policy("a/p", counting(3));
    assert_eq!(addresses(&world.allocate(), "a/p"), three, "in its cooldown the third is given back");
}

#[test]
fn the_egress_ips_of_a_policy_are_on_different_nodes() {
    let mut world = World::new(&["192.0.2.50-192.0.2.99"]);
    world.node("n3", "g", &["10.0.0.3"]);
    // n1 has two more than the others have.
    world.policy("a/first", asking(Allocate::Dedicated));
    world.settle();
    world.policy("a/p", counting(3));
    world.policy("a/q", naming_several(["192.0.2.90", "192.0.2.91", "192.0.2.92"]));
    let outcome = world.allocate();
    for key in ["a/p", "a/q"] {
        let nodes: BTreeSet<_> = grants(&outcome, key).iter().map(|grant| grant.node.clone()).collect();
        assert_eq!(nodes.len(), 3, "{key}: {nodes:?}");
    }
}

#[test]
fn a_policy_keeps_what_it_can_have_and_is_told_what_it_lacks() {
    let mut world = World::new(&["192.0.2.50-192.0.2.52"]);
    world.policy("a/p", counting(4));
    world.policy("b/q", naming_several(["192.0.2.50", "192.0.2.60"]));
    let outcome = world.allocate();
    let (p, q) = (grants(&outcome, "a/p"), grants(&outcome, "b/q"));
    assert_eq!((p.count(), p.asked, p.missing.as_ref().unwrap().reason), (2, 4, Reason::PoolExhausted));
    assert_eq!((q.count(), q.asked, q.missing.as_ref().unwrap().reason), (1, 2, Reason::AddressOutsidePool));
    let status = &world.report()[&PolicyKey::from("b/q")];
    let accepted = status.conditions.iter().find(|c| c.type_ == "Accepted").unwrap();
    assert_eq!((&*accepted.status, &*accepted.reason), ("False", "AddressOutsidePool"));
    assert!(accepted.message.starts_with("it has 1 of 2 egress IPs"), "{}", accepted.message);
    world.gateway("g", &["192.0.2.50-192.0.2.69"], |spec| spec.default = true);
    let outcome = world.allocate();
    assert!(["a/p", "b/q"].iter().all(|key| grants(&outcome, key).missing.is_none()));
}

#[test]
fn each_egress_ip_counts_in_the_quota() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    let quota = NamespaceQuota { addresses: Some(3), ..NamespaceQuota::default() };
    world.gateway("g", &["192.0.2.50-192.0.2.59"], |spec| {
        (spec.default, spec.namespace_quota) = (true, Some(quota));
    });
    world.policy("a/p", counting(4));
    world.policy("b/p", naming_several(["192.0.2.55", "192.0.2.56"]));
    world.now += 1;
    world.policy("b/q", counting(2));
    world.policy("b/r", naming(&["192.0.2.55"]));
    let outcome = world.allocate();
    outcome.assert_refused("a/p", Reason::QuotaExceeded, &["3 egress IPs"]);
    outcome.assert_refused("b/q", Reason::QuotaExceeded, &["3 egress IPs"]);
    assert_eq!(outcome.grant("b/r").id, outcome.grant("b/p").id, "a shared one counts once");
}

#[test]
fn a_status_lists_all_egress_ips_and_is_ready_when_all_of_them_are() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", naming_several(["192.0.2.52", "192.0.2.51"]));
    world.allocate();
    world.settle();
    let key = PolicyKey::from("a/p");
    let ready = |world: &mut World| {
        let status = world.report().remove(&key).unwrap();
        let ready = status.conditions.iter().find(|c| c.type_ == "Ready").unwrap().clone();
        (status, ready)
    };
    let (status, condition) = ready(&mut world);
    assert_eq!((status.address_count, status.egress_ips.len()), (2, 2));
    assert_eq!(status.addresses, Some(status.egress_ips[0].address.clone()));
    assert_eq!(condition.status, "True");
    assert!(condition.message.contains("192.0.2.52; node") && condition.message.contains("192.0.2.51"));
    let lost = status.egress_ips[1].node.clone().unwrap();
    world.holds(&lost, &[]);
    let (status, condition) = ready(&mut world);
    let each: Vec<&str> = status.egress_ips.iter().map(|of| of.ready.as_str()).collect();
    assert_eq!(each, ["True", "False"]);
    assert_eq!((&*condition.status, &*condition.reason), ("False", "AddressNotHeld"));
    assert!(condition.message.starts_with("1 of 2 egress IPs are held: "), "{}", condition.message);
}
