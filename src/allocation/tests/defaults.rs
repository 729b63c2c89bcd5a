//! The default address of a gateway.

use crate::allocation::{Decision, Reason};
use crate::api::{Allocate, AllocationKind, EgressGatewaySpec, EgressPolicySpec, NamespaceQuota};
use crate::fixture::{World, asking, naming, pair, reservation, selector};
use crate::model::{Gateway, Metadata, PolicyKey};
use std::collections::BTreeSet;

const POOL: &[&str] = &["192.0.2.50-192.0.2.53", "2001:db8::50-2001:db8::53"];
const DEFAULT: &[&str] = &["192.0.2.50", "2001:db8::50"];

fn unspecified() -> EgressPolicySpec {
    EgressPolicySpec { pod_selector: Some(selector(&[])), ..EgressPolicySpec::default() }
}

fn world() -> World {
    let mut world = World::new(POOL);
    with_default(&mut world, Some(DEFAULT));
    world
}

fn with_default(world: &mut World, default: Option<&[&str]>) {
    world.gateway("g", POOL, |spec| {
        (spec.default, spec.default_address) = (true, default.map(pair));
        spec.namespace_quota = Some(NamespaceQuota { addresses: Some(1), ..NamespaceQuota::default() });
    });
}

#[test]
fn policies_that_name_no_egress_ip_share_the_default_address_of_their_gateway() {
    let mut world = world();
    for key in ["shop/a", "shop/b", "other/a", "everywhere"] {
        world.policy(key, unspecified());
    }
    world.policy("other/named", naming(DEFAULT));
    world.policy("other/own", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    let shared = ["shop/a", "shop/b", "other/a", "everywhere", "other/named"];
    let ids: BTreeSet<u16> = shared.iter().map(|key| outcome.grant(key).id).collect();
    assert_eq!(ids.len(), 1, "and it counts for no quota");
    let grant = outcome.grant("shop/a");
    assert_eq!((grant.kind, &grant.address, &grant.shared_with), (AllocationKind::Explicit, &pair(DEFAULT), &None));
    assert_eq!(outcome.address("other/own"), "192.0.2.51 and 2001:db8::51", "it is given to nobody");
    let reports = world.report();
    let accepted = |key: &str| {
        let conditions = &reports[&PolicyKey::from(key)].conditions;
        conditions.iter().find(|c| c.type_ == "Accepted").unwrap().message.clone()
    };
    assert!(accepted("other/a").contains("the gateway's default"), "{}", accepted("other/a"));
    assert!(accepted("other/named").contains("as it asks for"), "{}", accepted("other/named"));
}

#[test]
fn a_default_address_that_comes_later_replaces_egress_ips_of_policies_that_name_none() {
    let mut world = World::new(POOL);
    with_default(&mut world, None);
    world.policy("shop/first", unspecified());
    world.policy("shop/own", EgressPolicySpec { gateway: None, ..asking(Allocate::Shared) });
    world.policy("other/second", unspecified());
    let before = world.allocate();
    assert_eq!(before.address("shop/own"), "192.0.2.50 and 2001:db8::50");
    let first = before.grant("shop/first").clone();
    assert_eq!(first.kind, AllocationKind::Dedicated);
    with_default(&mut world, Some(&["192.0.2.50"]));
    // Somebody else has it: what is there stays.
    let outcome = world.allocate();
    outcome.assert_refused("shop/first", Reason::AddressTaken, &["shop/own"]);
    assert_eq!(outcome.address("shop/own"), before.address("shop/own"));
    with_default(&mut world, Some(&["192.0.2.53"]));
    let outcome = world.allocate();
    assert_eq!(
        (outcome.address("shop/first"), outcome.address("other/second")),
        ("192.0.2.53".into(), "192.0.2.53".into())
    );
    with_default(&mut world, None);
    assert_eq!(world.allocate().grant("shop/first").id, first.id, "it gets back what it had");
}

#[test]
fn nobody_gets_a_part_of_the_default_address() {
    let mut world = world();
    with_default(&mut world, Some(&["192.0.2.50", "2001:db8::50"]));
    world.policy("other/half", naming(&["192.0.2.50"]));
    world.policy("third/mixed", naming(&["192.0.2.51", "2001:db8::50"]));
    world.policy("shop/first", unspecified());
    let outcome = world.allocate();
    for policy in ["other/half", "third/mixed"] {
        outcome.assert_refused(policy, Reason::AddressReserved, &["default egress IP", "192.0.2.50 and 2001:db8::50"]);
    }
    assert_eq!(outcome.address("shop/first"), "192.0.2.50 and 2001:db8::50");
}

#[test]
fn a_frozen_gateway_keeps_its_default_address() {
    let mut world = world();
    world.policy("shop/a", unspecified());
    let id = world.allocate().grant("shop/a").id;
    let gateway = std::sync::Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap());
    gateway.frozen = true;
    assert_eq!(world.allocate().grant("shop/a").id, id);
    // Nothing of its spec can be read.
    std::sync::Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).default_address = Default::default();
    assert_eq!(world.allocate().grant("shop/a").id, id);
    std::sync::Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).default_address = pair(DEFAULT);
    world.policy("shop/b", unspecified());
    let outcome = world.allocate();
    assert!(
        matches!(&outcome.decisions[&PolicyKey::from("shop/b")], Decision::Granted(grants) if grants.first.id == id)
    );
}

#[test]
fn a_default_address_is_in_the_pool_and_reserved_for_nobody() {
    let refusal = |default: &[&str], reserved: &[&str]| {
        let spec = EgressGatewaySpec {
            addresses: POOL.iter().map(ToString::to_string).collect(),
            default_address: Some(pair(default)),
            reservations: vec![reservation(reserved, &["other"])],
            ..EgressGatewaySpec::default()
        };
        Gateway::new(&spec, Metadata::default()).unwrap_err().to_string()
    };
    assert!(refusal(&["192.0.2.54"], &[]).contains("spec.defaultAddress: 192.0.2.54 is not in spec.addresses"));
    assert!(refusal(&[], &[]).contains("has no address"));
    assert!(refusal(DEFAULT, &["2001:db8::50/127"]).contains("2001:db8::50 is in spec.reservations"));
}
