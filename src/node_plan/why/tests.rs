//! Tests of the explanations.

use super::*;
use crate::allocation::report::report;
use crate::api::{
    Action, BlockedAllocation, EgressPeer, EgressPolicySpec, EgressPort, EgressRule, Fallback, IpBlock, Protocol,
};
use crate::fixture::{World, naming};
use crate::model::{Endpoints, Exposure, Service, ServicePort};
use std::sync::Arc;

fn world() -> World {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    for (pod, node, address) in
        [("visitor", "n1", "10.9.0.1"), ("beside", "n1", "10.9.0.2"), ("away", "n2", "10.9.0.3")]
    {
        world.pod("shop", pod, &[("app", pod)]);
        let pod = world.cluster.pods.get_mut(&ObjectKey::new("shop", pod)).unwrap();
        let pod = Arc::make_mut(pod);
        (pod.node, pod.addresses) = (Some(node.into()), [address.parse().unwrap()].into());
    }
    world.policy("shop/rest", naming(&["192.0.2.50"]));
    let block = IpBlock { cidr: "203.0.113.0/24".into(), except: vec!["203.0.113.7/32".into()] };
    let port = EgressPort { protocol: Protocol::Udp, port: Some(53), end_port: None };
    let rule = EgressRule { to: vec![EgressPeer { ip_block: block }], ports: vec![port] };
    let names = EgressPolicySpec { egress: Some(vec![rule]), priority: 7, ..naming(&["192.0.2.51"]) };
    world.policy("shop/names", names);
    world.policy("late", naming(&["192.0.2.52"]));
    world
}

fn settled(mut world: World) -> World {
    let outcome = world.allocate();
    world.settle();
    for (key, status) in report(&world.cluster, &outcome, world.now) {
        world.cluster.policy_statuses.insert(key, Arc::new(status));
    }
    world
}

fn explain(world: &World, target: &str) -> String {
    let target = (!target.is_empty()).then(|| target.parse().unwrap());
    why(&world.cluster, &ObjectKey::new("shop", "visitor"), target, &["198.51.100.0/24".parse().unwrap()]).unwrap()
}

#[track_caller]
fn assert_has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

#[test]
fn an_egress_ip_that_a_router_announces_is_named_with_its_device() {
    let mut world = world();
    assert!(!explain(&settled(world.clone()), "198.18.0.1").contains("egret-ip"));
    world.gateway("g", &["192.0.2.50-192.0.2.59"], |spec| {
        spec.default = true;
        spec.announce = crate::api::Announce::Route;
    });
    let text = explain(&settled(world), "198.18.0.1");
    assert_has(&text, &["announce: Route", "announces 192.0.2.50", "device egret-ip"]);
}

#[test]
fn policies_of_a_pod_are_listed_in_order_of_precedence() {
    let text = explain(&settled(world()), "");
    assert_has(&text, &["pod shop/visitor on node n1, 10.9.0.1", "app=visitor"]);
    let names =
        text.find("1. EgressPolicy shop/names, priority 7, covers UDP 53 of 203.0.113.0/24 without 203.0.113.7/32");
    let rest = text
        .find("2. EgressPolicy shop/rest, priority 0, covers everything\n   Accepted=True: it leaves from 192.0.2.50");
    let late = text.find("3. ClusterEgressPolicy late, priority 0, covers everything\n   it never decides");
    assert!(names.is_some() && names < rest && rest < late, "{text}");
    assert_has(&explain(&world(), ""), &["the controller has not written its status yet"]);
}

#[test]
fn each_destination_is_explained() {
    let world = settled(world());
    for (target, words) in [
        ("203.0.113.9:53/udp", "UDP port 53, leaves from 192.0.2.51: EgressPolicy shop/names decides"),
        ("203.0.113.9:53", "TCP port 53, leaves from 192.0.2.50: EgressPolicy shop/rest decides"),
        ("203.0.113.7:53/udp", "leaves from 192.0.2.50: EgressPolicy shop/rest decides"),
        (
            "203.0.113.9",
            "EgressPolicy shop/names covers some ports there; name one, as in 203.0.113.9:443/tcp\n203.0.113.9 leaves from 192.0.2.50",
        ),
        (
            "2001:db8::1",
            "2001:db8::1 is blocked: EgressPolicy shop/rest decides, and its egress IP has no address of that family",
        ),
        ("10.0.0.1", "10.0.0.1 goes direct"),
        ("10.9.0.2", "10.9.0.2 goes direct"),
        ("10.9.0.3", "10.9.0.3 leaves from 192.0.2.50"),
        ("198.51.100.9", "goes direct: it is in 198.51.100.0/24, from --direct"),
        ("224.0.0.1", "goes direct"),
        // Another policy's egress IP, and its own.
        ("192.0.2.51:22", "192.0.2.51, TCP port 22, is blocked: it is an egress IP. EgressPolicy shop/rest decides"),
        ("192.0.2.50:22", "is blocked: it is an egress IP"),
        ("192.0.2.99:22", "leaves from 192.0.2.50"),
    ] {
        assert_has(&explain(&world, target), &[words]);
    }
}

#[test]
fn traffic_to_a_service_is_explained_by_its_endpoints() {
    let mut world = settled(world());
    let port = ServicePort { name: "db".into(), protocol: Protocol::Tcp, port: 5432, node_port: Some(30432) };
    let exposure = Exposure { addresses: ["198.18.0.9".parse().unwrap()].into(), ports: [port].into() };
    for (name, address, endpoints) in [
        ("outside", "10.96.0.9", &["203.0.113.9", "10.9.0.1"][..]),
        ("inside", "10.96.0.8", &["10.9.0.1"]),
        ("kubernetes", "10.96.0.1", &["203.0.113.6"]),
    ] {
        let exposure = Some(Box::new(if name == "outside" { exposure.clone() } else { Exposure::default() }));
        let service = Service { cluster_ips: [address.parse().unwrap()].into(), exposure, ..Service::default() };
        let key = ObjectKey::new("default", name);
        let addresses = endpoints.iter().map(|a| a.parse().unwrap()).collect();
        let endpoints = Endpoints { service: key.clone(), addresses, ports: [("db".into(), 15432)].into() };
        world.cluster.services.insert(key.clone(), Arc::new(service));
        world.cluster.endpoints.insert(key, Arc::new(endpoints));
    }
    let decided = "203.0.113.9, TCP port 15432, leaves from 192.0.2.50: EgressPolicy shop/rest decides";
    for (target, words) in [
        ("10.96.0.9:5432", &["an address of the Service default/outside", "10.9.0.1 goes direct", decided][..]),
        ("198.18.0.9:5432", &["an address of the Service default/outside", decided]),
        // Not a port of the Service.
        ("198.18.0.9:80", &["198.18.0.9, TCP port 80, leaves from 192.0.2.50"]),
        ("10.0.0.1:30432", &["an address of the Service default/outside", decided]),
        ("10.0.0.2:30432", &["goes direct: it is a port of the Service default/outside at another node"]),
        ("10.96.0.8", &["10.96.0.8 goes direct", "whose endpoints are inside the cluster: 10.9.0.1"]),
        ("10.96.0.1:443", &["10.96.0.1, TCP port 443, goes direct", "inside the cluster: 203.0.113.6"]),
        ("203.0.113.6", &["203.0.113.6 goes direct: it is an API server's address"]),
    ] {
        assert_has(&explain(&world, target), words);
    }
}

#[test]
fn an_egress_ip_that_the_pods_node_reports_as_blocked_is_blocked() {
    let mut world = settled(world());
    let id = world.cluster.gateways["g"].status.allocations.iter().find(|p| p.policies.contains(&"shop/rest".into()));
    let blocked = BlockedAllocation { id: id.unwrap().id, family: None, message: "node n2 does not answer".into() };
    let node = world.cluster.egress_nodes.get_mut("n1").unwrap();
    Arc::make_mut(node).of_allocations_mut().blocked = vec![blocked];
    let words =
        "9.9.9.9 is blocked: EgressPolicy shop/rest decides, and from the pod's node \"n1\" node n2 does not answer.";
    assert_has(&explain(&world, "9.9.9.9"), &[words]);
}

#[test]
fn an_egress_ip_of_a_lost_gateway_may_be_blocked() {
    let mut world = settled(world());
    for node in ["n1", "n2"] {
        Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).lost_since = Some(0);
    }
    let world = settled(world);
    assert_has(
        &explain(&world, "9.9.9.9"),
        &["9.9.9.9 leaves from 192.0.2.50 if the gateway is alive, else it is blocked: "],
    );
    assert_has(&explain(&world, ""), &["Ready=Unknown: node \"n1\" held 192.0.2.50"]);
}

#[test]
fn a_destination_covered_for_some_ports_is_not_called_uncovered() {
    let mut world = world();
    world.without_policy("shop/rest");
    world.without_policy("late");
    assert_has(
        &explain(&world, "203.0.113.9"),
        &["covers some ports there", "203.0.113.9, by other ports, is covered by no"],
    );
}

#[test]
fn a_policy_that_is_not_ready_applies_its_fallback() {
    let mut world = world();
    assert_has(
        &explain(&world, "9.9.9.9"),
        &["9.9.9.9 is blocked: EgressPolicy shop/rest decides, and it is not ready"],
    );
    world.policy("shop/rest", EgressPolicySpec { fallback: Fallback::NodeAddress, ..naming(&["192.0.2.50"]) });
    // While it has no address, the next policy decides.
    assert_has(&explain(&world, "9.9.9.9"), &["9.9.9.9 is blocked: ClusterEgressPolicy late decides"]);
    assert_has(&explain(&world, ""), &["EgressPolicy shop/rest, priority 0, covers everything\n   it is passed over"]);
    world.allocate();
    assert_has(&explain(&world, "9.9.9.9"), &["9.9.9.9 leaves from the node's address (fallback: NodeAddress)"]);
    for policy in ["shop/rest", "shop/names", "late"] {
        world.without_policy(policy);
    }
    assert_has(&explain(&world, "9.9.9.9"), &["No policy selects it"]);
    let nobody = why(&world.cluster, &ObjectKey::new("shop", "nobody"), None, &[]);
    assert_eq!(nobody.unwrap_err().to_string(), "the cluster has no pod shop/nobody; write NAMESPACE/NAME");
}

#[test]
fn a_direct_policy_is_explained() {
    let mut world = world();
    let EgressPolicySpec { egress, pod_selector, .. } = naming(&["192.0.2.51"]);
    let block = IpBlock { cidr: "203.0.113.0/24".into(), except: Vec::new() };
    let rule = EgressRule { to: vec![EgressPeer { ip_block: block }], ports: Vec::new() };
    let spec = EgressPolicySpec { action: Action::Direct, pod_selector, priority: 9, ..Default::default() };
    world.policy("shop/names", EgressPolicySpec { egress: egress.or(Some(vec![rule])), ..spec });
    // A ClusterEgressPolicy selects the pod too.
    let text = explain(&settled(world.clone()), "203.0.113.9");
    assert_has(&text, &["203.0.113.9 leaves from 192.0.2.50: EgressPolicy shop/rest decides"]);
    assert_has(&explain(&settled(world.clone()), ""), &["action: Direct\n   it is passed over: it has action: Direct"]);
    world.without_policy("late");
    let text = explain(&settled(world), "203.0.113.9");
    assert_has(
        &text,
        &["203.0.113.9 leaves as if Egret were not there: EgressPolicy shop/names decides (action: Direct)."],
    );
}
