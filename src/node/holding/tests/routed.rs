//! Egress IPs that the nodes' own routers announce.

use super::*;
use crate::api::Announce;
use crate::model::uplink_key::DEFAULT_ROUTE;

/// The same fixture, with a gateway of `announce: Route`.
fn routed() -> Fixture {
    let mut fixture = Fixture::new();
    fixture.world.gateway("g", &[ADDRESS], |spec| {
        spec.default = true;
        spec.announce = Announce::Route;
    });
    fixture.uplinks_now = by_route(true);
    fixture.holding = Holding::new(SETTINGS, fixture.now - Duration::from_secs(60));
    fixture
}

fn by_route(running: bool) -> UplinkStatus {
    UplinkStatus::of_named(&DEFAULT_ROUTE, &interface(running), &[ADDRESS.parse().unwrap()])
}

/// The tunnel MAC address of the other node.
const OTHER_NODE: Mac = [2, 0, 0, 0, 0, 2];

#[test]
fn a_routed_egress_ip_is_taken_when_no_other_node_holds_it_and_counts_as_coming() {
    let mut fixture = routed();
    assert!(fixture.decide().ask.contains(&fixture.id), "the other nodes are asked");
    assert!(!fixture.is_here());
    fixture.take_probe_result(None);
    let decision = fixture.decide();
    assert!(fixture.is_here() && decision.desired.moving.is_empty(), "no other node holds it");
    fixture.holding.returned(fixture.now);
    assert!(fixture.decide().ask.contains(&fixture.id) && fixture.is_here(), "it was away");
    fixture.take_probe_result(Some(OTHER_NODE));
    fixture.decide();
    assert!(!fixture.is_here(), "the other node has taken it over");
    assert!(fixture.facts.refused[&fixture.id].contains("has taken it over"));
}

#[test]
fn a_node_that_thinks_the_owner_dead_asks_it_before_a_takeover() {
    let mut fixture = routed();
    fixture.other_takes_it();
    fixture.facts.dead.insert("n2".into());
    fixture.world.cluster.egress_nodes.remove("n2");
    assert!(fixture.decide().ask.contains(&fixture.id) && !fixture.is_here(), "this node may be the one that was away");
    fixture.take();
    assert_eq!(fixture.holding.taken_over(), [fixture.id].into());
}

#[test]
fn a_routed_egress_ip_is_withdrawn_as_soon_as_another_node_holds_it() {
    let mut fixture = routed();
    fixture.decide();
    fixture.take();
    fixture.other_takes_it();
    fixture.decide();
    assert!(!fixture.is_here(), "routers would send to both");
}

#[test]
fn a_node_that_no_other_reaches_withdraws_routed_egress_ips_and_asks_when_it_is_back() {
    let mut fixture = routed();
    fixture.decide();
    fixture.take();
    fixture.holding.set_alone(true);
    fixture.decide();
    assert!(!fixture.is_here());
    assert!(fixture.facts.relinquished.contains(&fixture.id));
    assert!(fixture.decide().ask.is_empty(), "nobody could answer");
    fixture.holding.set_alone(false);
    fixture.holding.returned(fixture.now);
    assert!(fixture.decide().ask.is_empty(), "requests may be lost");
    assert_eq!(fixture.holding.next().unwrap() - fixture.now, RETURN);
    fixture.pass(2001);
    assert!(fixture.decide().ask.contains(&fixture.id), "the other node may have taken it over");
    assert!(!fixture.is_here());
    fixture.take();
}

#[test]
fn the_only_node_of_a_gateway_keeps_routed_egress_ips_whoever_reaches_it() {
    let mut fixture = routed();
    fixture.world.without_node("n2");
    fixture.decide();
    fixture.take();
    fixture.holding.set_alone(true);
    fixture.decide();
    assert!(fixture.is_here());
}

#[test]
fn a_routed_egress_ip_goes_with_the_interface_of_the_default_route() {
    let mut fixture = routed();
    fixture.decide();
    fixture.take();
    fixture.uplinks_now = by_route(false);
    assert!(!fixture.decide().desired.health);
    fixture.now = fixture.holding.next().unwrap();
    fixture.decide();
    assert!(!fixture.is_here());
    fixture.uplinks_now = by_route(true);
    fixture.decide();
    fixture.pass(2001);
    assert!(fixture.decide().ask.contains(&fixture.id));
    fixture.take();
}
