//! Sharing of egress IPs between namespaces, and quotas of namespaces.

use crate::allocation::Reason;
use crate::allocation::report::report;
use crate::api::{
    Allocate, EgressGatewaySpec, EgressPeer, EgressPolicySpec, EgressRule, IpBlock, NamespaceQuota, Sharing,
};
use crate::fixture::{World, asking, naming, reservation};
use crate::model::{Gateway, Metadata, PolicyKey};
use std::sync::Arc;

const POOL: &[&str] = &["192.0.2.50-192.0.2.59"];

fn set_sharing(world: &mut World, sharing: Sharing) {
    world.gateway("g", POOL, |spec| {
        spec.default = true;
        spec.sharing = sharing;
    });
}

#[test]
fn an_address_is_shared_across_namespaces_only_if_the_gateway_allows_it() {
    let mut world = World::new(POOL);
    world.policy("shop/first", naming(&["192.0.2.50"]));
    world.now += 1;
    world.policy("a/thief", naming(&["192.0.2.50"]));
    world.policy("everybody", naming(&["192.0.2.50"]));
    world.policy("shop/second", naming(&["192.0.2.50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("shop/first").shared_with.as_deref(), Some("shop/second"));
    assert_eq!(outcome.grant("shop/second").shared_with.as_deref(), Some("shop/first"));
    for other in ["a/thief", "everybody"] {
        outcome.assert_refused(other, Reason::AddressNotShared, &["192.0.2.50", "shop/first", "sharing: Cluster"]);
    }

    set_sharing(&mut world, Sharing::Cluster);
    let outcome = world.allocate();
    assert_eq!(outcome.grant("a/thief").id, outcome.grant("shop/first").id);
    let with = outcome.grant("shop/first").shared_with.clone().unwrap();
    assert_eq!(with, "everybody, a/thief, shop/second");

    // When sharing is no longer allowed, the oldest policy keeps the address, whatever its name.
    set_sharing(&mut world, Sharing::Namespace);
    let id = outcome.grant("shop/first").id;
    let outcome = world.allocate();
    assert_eq!(outcome.grant("shop/first").id, id);
    outcome.assert_refused("a/thief", Reason::AddressNotShared, &["shop/first"]);
    assert_eq!(world.allocate(), outcome);
    // When it gives the address up, the next policy gets it.
    for policy in ["shop/first", "shop/second", "everybody"] {
        world.without_policy(policy);
    }
    assert_eq!(world.allocate().address("a/thief"), "192.0.2.50");
}

#[test]
fn a_reserved_address_can_be_named_by_its_namespaces_only() {
    let mut world = World::new(&["192.0.2.50-192.0.2.51"]);
    world.policy("shop/given", asking(Allocate::Dedicated));
    assert_eq!(world.allocate().address("shop/given"), "192.0.2.50");
    world.gateway("g", &["192.0.2.50-192.0.2.51"], |spec| {
        spec.default = true;
        spec.reservations = vec![reservation(&["192.0.2.50"], &["shop"])];
    });
    world.policy("a/thief", naming(&["192.0.2.50"]));
    let outcome = world.allocate();
    assert_eq!(outcome.address("shop/given"), "192.0.2.51", "who names none gets none that is reserved");
    outcome.assert_refused("a/thief", Reason::AddressReserved, &["192.0.2.50", "\"a\"", "spec.reservations"]);
    world.policy("shop/named", naming(&["192.0.2.50"]));
    assert_eq!(world.allocate().address("shop/named"), "192.0.2.50");
    world.without_policy("shop/named");
    world.policy("everybody", naming(&["192.0.2.50"]));
    assert_eq!(world.allocate().address("everybody"), "192.0.2.50");
    world.policy("a/given", asking(Allocate::Dedicated));
    world.allocate().assert_refused("a/given", Reason::PoolExhausted, &["all 1 are"]);
    world.gateway("g", &["192.0.2.50-192.0.2.51"], |spec| {
        spec.default = true;
        spec.reservations = vec![reservation(&["192.0.2.0/24"], &["shop"])];
    });
    world.allocate().assert_refused("a/given", Reason::PoolEmpty, &["reserved for policies that name them"]);
}

fn with_quota(policies: Option<u32>, addresses: Option<u32>, destinations: Option<u32>) -> World {
    let mut world = World::new(POOL);
    world.gateway("g", POOL, |spec| {
        spec.default = true;
        spec.namespace_quota = Some(NamespaceQuota { policies, addresses, destinations });
    });
    world
}

fn listing(networks: usize) -> EgressPolicySpec {
    let block = |n| IpBlock { cidr: format!("203.0.113.{n}/32"), except: vec![] };
    let to = (0..networks).map(|n| EgressPeer { ip_block: block(n) }).collect();
    EgressPolicySpec { egress: Some(vec![EgressRule { to, ports: vec![] }]), ..asking(Allocate::Shared) }
}

/// Evaluates the policies, as the controller does.
fn store_reports(world: &mut World) {
    let outcome = world.allocate();
    for (key, status) in report(&world.cluster, &outcome, world.now) {
        world.cluster.policy_statuses.insert(key, Arc::new(status));
    }
}

#[test]
fn quotas_limit_a_namespaces_policies_and_addresses() {
    let mut world = with_quota(Some(2), None, None);
    for name in ["a/1", "a/2", "a/3", "b/1", "everybody", "everywhere", "all"] {
        world.policy(name, asking(Allocate::Dedicated));
        world.now += 1;
    }
    let outcome = world.allocate();
    outcome.assert_refused("a/3", Reason::QuotaExceeded, &["\"a\"", "2 policies", "\"g\"", "spec.namespaceQuota"]);
    for name in ["a/1", "a/2", "b/1", "everybody", "everywhere", "all"] {
        outcome.grant(name);
    }

    let mut world = with_quota(None, Some(2), None);
    world.policy("a/named", naming(&["192.0.2.50"]));
    world.now += 1;
    world.policy("a/again", naming(&["192.0.2.50"]));
    world.policy("a/own", asking(Allocate::Dedicated));
    world.now += 1;
    world.policy("a/more", asking(Allocate::Dedicated));
    world.policy("a/shared", asking(Allocate::Shared));
    world.policy("a/nodes", asking(Allocate::Node));
    let outcome = world.allocate();
    outcome.assert_refused("a/more", Reason::QuotaExceeded, &["2 egress IPs"]);
    for name in ["a/named", "a/again", "a/own", "a/shared", "a/nodes"] {
        outcome.grant(name);
    }
}

#[test]
fn a_policy_that_lists_too_many_destinations_is_rejected_and_the_others_stay() {
    let mut world = with_quota(None, None, Some(100));
    for (name, networks) in [("a/old", 60), ("a/young", 30)] {
        world.policy(name, listing(networks));
        world.now += 1;
    }
    store_reports(&mut world);
    world.policy("a/late", listing(20));
    world.allocate().assert_refused("a/late", Reason::QuotaExceeded, &["100 networks"]);
    world.without_policy("a/late");

    // The older policy grows.
    world.policy("a/old", listing(80));
    let old = world.cluster.policies.get_mut(&PolicyKey::from("a/old")).unwrap();
    Arc::make_mut(old).for_controller.as_mut().unwrap().generation = Some(2);
    let outcome = world.allocate();
    outcome.assert_refused("a/old", Reason::QuotaExceeded, &["\"a\""]);
    outcome.grant("a/young");
    store_reports(&mut world);
    assert_eq!(world.allocate().decisions, outcome.decisions);
}

#[test]
fn unusable_addresses_are_refused_in_a_pool() {
    let pool = |entry: &str| {
        let spec = EgressGatewaySpec { addresses: vec![entry.to_owned()], ..Default::default() };
        Gateway::new(&spec, Metadata::default()).map(|_| ()).map_err(|e| e.to_string())
    };
    for (entry, first) in [
        ("0.0.0.0/0", "0.0.0.0"),
        ("126.0.0.0-128.0.0.0", "127.0.0.0"),
        ("169.254.10.0/24", "169.254.10.0"),
        ("223.255.255.255-224.0.0.9", "224.0.0.0"),
        ("255.255.255.255", "255.255.255.255"),
        ("::-::2", "::"),
        ("::1", "::1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("fe80::1", "fe80::1"),
        ("ff02::1/128", "ff02::1"),
    ] {
        let refused = pool(entry).unwrap_err();
        assert!(refused.starts_with("spec.addresses[0]: "), "{refused}");
        assert!(refused.contains(&format!("contains {first}, which is")), "{refused}");
    }
    for entry in ["1.0.0.0-126.255.255.255", "128.0.0.0-169.253.255.255", "198.51.100.16/28", "2001:db8::/64"] {
        assert_eq!(pool(entry), Ok(()));
    }
}

#[test]
fn an_address_of_a_pod_or_a_service_is_no_egress_ip() {
    let mut world = World::new(&["10.1.0.255-10.1.1.1"]);
    let node = Arc::make_mut(world.cluster.nodes.get_mut("n1").unwrap());
    node.pod_cidrs = ["10.1.0.0/24".parse().unwrap()].into();
    world.policy("a/named", naming(&["10.1.0.255"]));
    world.policy("a/given", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    outcome.assert_refused("a/named", Reason::AddressInCluster, &["10.1.0.255", "10.1.0.0/24", "spec.addresses"]);
    assert_eq!(outcome.address("a/given"), "10.1.1.0");
    let accepted = &outcome.gateways["g"].conditions[0];
    assert_eq!((&*accepted.status, &*accepted.reason), ("False", "PoolInCluster"), "{}", accepted.message);
}
