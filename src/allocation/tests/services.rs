//! Policies that have the address of a Service.

use crate::allocation::{COOLDOWN_SECONDS, Reason};
use crate::api::{AllocationKind, EgressNodeStatus, Placement};
use crate::fixture::{World, naming, naming_service, reservation, selector};
use crate::model::{Announcer, ObjectKey, PolicyKey};
use std::sync::Arc;

/// The address that the Service `shop/web` gets.
const WEB: &str = "192.0.2.200";

/// A cluster with a default gateway `g`, and a gateway `lb` whose addresses load balancers place on `n1` and `n2`. The
/// policy `shop/web` names the Service `web`.
fn world() -> World {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.gateway("lb", &["192.0.2.200-192.0.2.209", "2001:db8::200-2001:db8::209"], |spec| {
        (spec.placement, spec.node_selector) = (Placement::External, selector(&[]));
    });
    world.policy("shop/web", naming_service("web"));
    world
}

/// Lets a node report that it serves an egress IP whose address is on none of its interfaces.
fn serves_without_address(world: &mut World, node: &str, id: u16) {
    let (allocations, without_address) = (vec![id], vec![id]);
    let status = EgressNodeStatus { allocations, without_address, ..EgressNodeStatus::default() };
    world.cluster.egress_nodes.insert(node.into(), Arc::new(status.into()));
}

fn ready(world: &mut World, policy: &str) -> (String, String) {
    let reports = world.report();
    let conditions = &reports[&PolicyKey::from(policy)].conditions;
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    (ready.reason.clone(), ready.message.clone())
}

#[test]
fn a_policy_has_the_addresses_that_the_load_balancer_has_given_its_service() {
    let mut world = world();
    world.allocate().assert_refused("shop/web", Reason::ServiceUnknown, &["shop/web", "spec.address.service"]);
    world.service("shop/web", &[], None);
    world.allocate().assert_refused("shop/web", Reason::ServiceWithoutAddress, &["shop/web", "status.loadBalancer"]);
    world.service("shop/web", &[WEB, "2001:db8::200", "192.0.2.201"], None);
    let outcome = world.allocate();
    let grant = outcome.grant("shop/web").clone();
    assert_eq!((grant.kind, &*grant.gateway), (AllocationKind::Service, "lb"), "the gateway that can have it");
    assert_eq!(outcome.address("shop/web"), "192.0.2.200 and 2001:db8::200");
    assert_eq!(outcome.gateways["lb"].allocations[0].service.as_deref(), Some("shop/web"));
    assert_eq!(world.allocate().grant("shop/web"), &grant, "it stays");

    // The load balancer gives it another address: that is another egress IP.
    world.service("shop/web", &["192.0.2.205"], None);
    let outcome = world.allocate();
    assert_eq!(outcome.address("shop/web"), "192.0.2.205");
    assert_ne!(outcome.grant("shop/web").id, grant.id);
    // So is the address of another Service, even if it is the same one.
    world.service("shop/next", &["192.0.2.205"], None);
    world.policy("shop/web", naming_service("next"));
    let next = world.allocate();
    assert_eq!(next.grant("shop/web").service, ObjectKey::parse("shop/next"));
    world.cluster.services.remove(&ObjectKey::new("shop", "next"));
    world.allocate().assert_refused("shop/web", Reason::ServiceUnknown, &["shop/next"]);
}

#[test]
fn only_addresses_in_the_pool_of_a_gateway_with_external_placement_count() {
    let mut world = world();
    world.service("shop/web", &["198.51.100.7"], None);
    world.allocate().assert_refused("shop/web", Reason::AddressOutsidePool, &["198.51.100.7", "External"]);
    // Of a pair, the part that the pool has.
    world.service("shop/web", &["198.51.100.7", "2001:db8::200"], None);
    assert_eq!(world.allocate().address("shop/web"), "2001:db8::200");
    world.service("shop/web", &["192.0.2.50"], None);
    let mut spec = naming_service("web");
    spec.gateway = Some("g".to_owned());
    world.policy("shop/web", spec.clone());
    world.allocate().assert_refused("shop/web", Reason::GatewayNotExternal, &["\"g\"", "placement: External"]);
    spec.gateway = Some("lb".to_owned());
    world.policy("shop/web", spec);
    world.allocate().assert_refused("shop/web", Reason::AddressOutsidePool, &["192.0.2.50", "\"lb\""]);
    world.service("shop/web", &[WEB], None);
    assert_eq!(world.allocate().address("shop/web"), WEB);
}

/// A tenant may choose the address of his Service, where the load balancer lets him.
#[test]
fn a_tenant_gets_no_other_tenants_address_by_a_service() {
    let mut world = world();
    world.service("shop/web", &[WEB], None);
    world.allocate();
    world.now += 1;
    world.service("other/web", &[WEB], None);
    world.policy("other/web", naming_service("web"));
    let mut named = naming(&[WEB]);
    named.gateway = Some("lb".to_owned());
    world.policy("other/named", named);
    let outcome = world.allocate();
    assert_eq!(outcome.address("shop/web"), WEB);
    outcome.assert_refused("other/web", Reason::AddressTaken, &[WEB, "shop/web"]);
    outcome.assert_refused("other/named", Reason::AddressTaken, &[WEB, "shop/web"]);
    // Two policies of the namespace share it.
    world.policy("shop/too", naming_service("web"));
    let outcome = world.allocate();
    assert_eq!(outcome.grant("shop/too").id, outcome.grant("shop/web").id);
    world.gateway("lb", &["192.0.2.200-192.0.2.209"], |spec| {
        spec.placement = Placement::External;
        spec.reservations = vec![reservation(&[WEB], &["other"])];
    });
    world.allocate().assert_refused("shop/web", Reason::AddressReserved, &[WEB, "\"shop\""]);
}

#[test]
fn no_policy_names_the_address_of_another_namespaces_service() {
    let mut world = world();
    let mut named = naming(&[WEB]);
    named.gateway = Some("lb".to_owned());
    world.policy("early/p", named.clone());
    world.allocate().grant("early/p");
    // Who may choose his Service's address takes nothing away by it.
    world.service("other/web", &[WEB], None);
    world.allocate().grant("early/p");
    world.without_policy("early/p");
    world.policy("late/p", named.clone());
    world.allocate().assert_refused("late/p", Reason::AddressOfService, &[WEB, "other/web"]);
    world.without_policy("late/p");
    world.policy("other/p", named.clone());
    world.allocate().grant("other/p");
    world.without_policy("other/p");
    world.policy("all", named);
    world.allocate().grant("all");
}

#[test]
fn a_service_that_has_no_address_for_a_while_gets_its_own_again() {
    let mut world = world();
    world.service("shop/web", &[WEB], None);
    let id = world.allocate().grant("shop/web").id;
    let mut named = naming(&[WEB]);
    named.gateway = Some("lb".to_owned());
    world.policy("other/p", named.clone());
    world.service("shop/web", &[], None);
    for _ in 0..2 {
        let outcome = world.allocate();
        outcome.assert_refused("other/p", Reason::AddressOfService, &[WEB, "shop/web", "egret.dev/end-cooldown"]);
        outcome.assert_refused("shop/web", Reason::ServiceWithoutAddress, &[]);
        world.now += 100;
    }
    world.service("shop/web", &[WEB], None);
    assert_eq!(world.allocate().grant("shop/web").id, id, "as before");

    // Its own namespace may name it.
    world.service("shop/web", &[], None);
    world.policy("shop/named", named.clone());
    assert_eq!(world.allocate().address("shop/named"), WEB);
    world.without_policy("shop/named");
    // Later than that, and at once with the annotation, another namespace gets it: but as long as no node has had it for a
    // while, the Service's policy gets it again.
    world.now += 2 * COOLDOWN_SECONDS;
    assert_eq!(world.allocate().address("other/p"), WEB);
    world.service("shop/web", &[WEB], None);
    let outcome = world.allocate();
    assert_eq!(outcome.address("shop/web"), WEB);
    outcome.assert_refused("other/p", Reason::AddressTaken, &[WEB, "shop/web"]);
}

#[test]
fn a_service_takes_no_egress_ip_from_another_namespace_that_a_node_has_had_for_a_while() {
    let mut world = world();
    let mut named = naming(&[WEB]);
    named.gateway = Some("lb".to_owned());
    world.policy("other/p", named);
    let id = world.allocate().grant("other/p").id;
    world.holds("n1", &[id]);
    assert_eq!(world.allocate().node("other/p"), Some("n1"));
    let before = world.cluster.gateways["lb"].status.clone();
    // The load balancer has just put the address there, for a Service that it names a moment later.
    world.now += 5;
    world.service("shop/web", &[WEB], None);
    assert_eq!(world.allocate().address("shop/web"), WEB);
    // The same an hour later: it is the other policy's.
    Arc::make_mut(world.cluster.gateways.get_mut("lb").unwrap()).status = before;
    world.now += 3_600;
    let outcome = world.allocate();
    assert_eq!(outcome.address("other/p"), WEB);
    outcome.assert_refused("shop/web", Reason::AddressTaken, &[WEB, "other/p"]);
}

/// A second gateway may come, whose pool has the address too and whose name goes first.
#[test]
fn a_policy_that_names_a_service_and_no_gateway_keeps_its_gateway() {
    let mut world = world();
    world.service("shop/web", &[WEB], None);
    let id = world.allocate().grant("shop/web").id;
    world.gateway("all", &["192.0.2.192-192.0.2.199", "192.0.2.201-192.0.2.255"], |spec| {
        (spec.placement, spec.node_selector) = (Placement::External, selector(&[]));
    });
    world.service("shop/web", &["192.0.2.250", WEB], None);
    let outcome = world.allocate();
    assert_eq!((&*outcome.grant("shop/web").gateway, outcome.grant("shop/web").id), ("lb", id));
    world.policy("shop/new", naming_service("web"));
    assert_eq!(&*world.allocate().grant("shop/new").gateway, "all", "who has none yet gets the first");
}

#[test]
fn the_node_that_announces_the_address_is_the_owner() {
    let mut world = world();
    world.service("shop/web", &[WEB], None);
    assert_eq!(world.allocate().node("shop/web"), None);
    let (reason, message) = ready(&mut world, "shop/web");
    assert_eq!(reason, "AddressNotAnnounced");
    assert!(message.contains(WEB) && message.contains("MetalLB"), "{message}");

    world.announces(Announcer::Cilium, "cilium-l2announce-shop-web", "shop-web", "n1");
    world.announces(Announcer::Cilium, "cilium-l2announce-shop-other", "shop-other", "n2");
    assert_eq!(world.allocate().node("shop/web"), Some("n1"));
    world.announces(Announcer::MetalLb, "l2-1", "shop/web", "n2");
    assert_eq!(world.allocate().node("shop/web"), Some("n2"));
    world.service("shop/web", &[WEB], Some("n1"));
    let id = world.allocate().grant("shop/web").id;
    assert_eq!(world.allocate().node("shop/web"), Some("n1"));
    // What a node itself sees on an interface counts more.
    world.holds("n2", &[id]);
    assert_eq!(world.allocate().node("shop/web"), Some("n2"));
    // The node that serves it without having it says nothing about who announces it.
    serves_without_address(&mut world, "n2", id);
    assert_eq!(world.allocate().node("shop/web"), Some("n1"));
    serves_without_address(&mut world, "n1", id);
    assert_eq!(ready(&mut world, "shop/web").0, "AddressHeld");
    // While both have it, the word of the load balancer decides.
    world.holds("n1", &[id]);
    world.holds("n2", &[id]);
    assert_eq!(world.allocate().node("shop/web"), Some("n1"));

    world.service("shop/web", &[WEB], Some("n7"));
    world.cluster.egress_nodes = Default::default();
    let (reason, message) = ready(&mut world, "shop/web");
    assert_eq!(reason, "AddressNotAnnounced");
    assert!(message.contains("\"n7\"") && message.contains("spec.nodeSelector"), "{message}");
}

/// A node that died leaves its ServiceL2Status behind.
#[test]
fn of_several_statuses_the_newest_of_a_living_node_counts() {
    let mut world = world();
    world.service("shop/web", &[WEB], None);
    world.announces(Announcer::MetalLb, "l2-9", "shop/web", "n1");
    world.now += 1;
    world.announces(Announcer::MetalLb, "l2-1", "shop/web", "n2");
    assert_eq!(world.allocate().node("shop/web"), Some("n2"));
    world.now += 1;
    world.announces(Announcer::MetalLb, "l2-9", "shop/web", "n1");
    assert_eq!(world.allocate().node("shop/web"), Some("n1"));
    for node in ["n2", "n3"] {
        world.node(node, "g", &["10.0.0.2"]);
        world.misses(node, &["n1".to_owned()]);
    }
    assert_eq!(world.allocate().node("shop/web"), Some("n2"));
}
