//! Why a pod's packets leave the cluster as they do, in words: by the same index, in the same order, as the rules of its
//! node.

use crate::api::{AllocationKind, BlockedAllocation, EgressPolicyStatus, ExistingConnections, Fallback, Placement};
use crate::model::addresses_of;
use crate::model::backends::{Behind, Door, behind};
use crate::model::destination::in_a_row;
use crate::model::egress_node::OfAllocations;
use crate::model::marks::EgressId;
use crate::model::networks::Networks;
use crate::model::precedence::is_passed_over;
use crate::model::precedence::{PolicyIndex, Ranked};
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey, Pod, PolicyKey, Tier};
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::policy_chain::PolicyChain;
use ipnetwork::IpNetwork;
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// That there is nothing to explain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the cluster has no pod {0}; write NAMESPACE/NAME")]
pub struct NoSuchPod(String);

/// Some lines about a pod, or, with a target, about what becomes of packets that go there. `direct` are destinations of the
/// user's that no policy covers, beside the cluster's own.
///
/// # Errors
/// The cluster has no such pod.
pub fn why(
    cluster: &Cluster,
    key: &ObjectKey,
    target: Option<Target>,
    direct: &[IpNetwork],
) -> Result<String, NoSuchPod> {
    let pod = cluster.pods.get(key).ok_or_else(|| NoSuchPod(key.to_string()))?;
    let labels: Vec<String> = pod.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut lines = vec![format!(
        "pod {key} on node {}, {}, {}",
        pod.node.as_deref().unwrap_or("(none yet)"),
        list(&pod.addresses, "no address yet"),
        list(&labels, "no labels"),
    )];
    let index = PolicyIndex::new(cluster);
    let policies = index.policies_for(&key.namespace, &pod.labels);
    let held = PolicyChain::new(&policies, &NodeAllocations::default()) == Some(PolicyChain::Held);
    let nothing = "so only what stays inside the cluster leaves the pod";
    if pod.host_network {
        lines.push("It is on its host's network: no policy selects it, and it leaves from its node's address.".into());
    } else if pod.finished {
        lines.push("It has ended.".into());
    } else if index.is_undecided_in(&key.namespace) {
        lines.push(format!(
            "A policy goes by labels of namespaces, and the namespace {} is not known: the pod is held, {nothing}.",
            key.namespace
        ));
    } else if policies.is_empty() {
        lines.push("No policy selects it: it leaves as if Egret were not there.".into());
    } else if held {
        let guessed = policies.iter().find(|r| r.policy.guessed.rank || r.policy.guessed.egress);
        let reason = match guessed {
            Some(Ranked { key, .. }) => format!(
                "{} cannot be read, and it is not known whether it or another policy of the pod decides",
                named(key)
            ),
            None => {
                let over = policies.iter().filter(|ranked| ranked.over_quota).map(|ranked| named(&ranked.key));
                let over = in_a_row(&over.collect::<Vec<_>>());
                format!("The policies of its namespace list too many destinations together, {over} among them")
            }
        };
        lines.push(format!("{reason}: the pod is held, {nothing}."));
    } else {
        match target {
            None => lines.extend(all(cluster, &policies)),
            Some(target) => lines.extend(one(cluster, pod, &policies, target, direct)),
        }
    }
    lines.push(String::new());
    Ok(lines.join("\n"))
}

/// What each of a pod's policies does.
fn all(cluster: &Cluster, policies: &[&Ranked]) -> Vec<String> {
    let mut lines = vec![
        "What stays inside the cluster goes direct. Of the rest, the first policy that covers the destination decides:"
            .to_owned(),
    ];
    let passed_over = passed_over(cluster);
    let everything = policies.iter().position(|r| r.policy.covers_everything() && !passed_over(r));
    for (at, ranked) in policies.iter().enumerate() {
        let Ranked { key, policy, .. } = ranked;
        let covers = match &policy.egress {
            Some(destinations) if !policy.covers_everything() => list(destinations, "nothing"),
            _ => "everything".to_owned(),
        };
        let tier = match policy.tier {
            Tier::ByPriority => String::new(),
            tier => format!("tier {tier:?}, "),
        };
        lines.push(format!("{}. {}, {tier}priority {}, covers {covers}", at + 1, named(key), policy.priority));
        if passed_over(ranked) {
            lines.push("   it is passed over: it has no address, and says fallback: NodeAddress".to_owned());
        }
        if everything.is_some_and(|everything| at > everything) {
            lines.push("   it never decides: one before it covers everything".to_owned());
            continue;
        }
        let status = cluster.policy_statuses.get(key);
        let conditions = status.iter().flat_map(|status| &status.conditions);
        let conditions = conditions.filter(|c| ["Accepted", "Ready"].contains(&&*c.type_));
        lines.extend(conditions.map(|c| format!("   {}={}: {}", c.type_, c.status, c.message)));
        if status.is_none() {
            lines.push("   the controller has said nothing of it yet".to_owned());
        }
        if policy.existing_connections == ExistingConnections::End {
            lines.push("   connections that began before it are ended (existingConnections: End)".into());
        }
        if policy.fallback == Fallback::NodeAddress {
            lines
                .push("   while it is not ready, packets leave from the node's address (fallback: NodeAddress)".into());
        }
    }
    if everything.is_none() {
        lines.push("What none of them covers leaves as if Egret were not there.".to_owned());
    }
    lines
}

/// What becomes of a pod's packets to one destination.
fn one(cluster: &Cluster, pod: &Pod, policies: &[&Ranked], target: Target, direct: &[IpNetwork]) -> Vec<String> {
    // As its node does: it knows of its own pods, and of others' networks.
    let neighbours = cluster.pods.values().filter(|other| other.node == pod.node);
    let networks = Networks::new(cluster, direct, neighbours.flat_map(|pod| pod.addresses.iter().copied()));
    match behind(cluster, pod.node.as_deref(), &target) {
        Some(behind) => through(cluster, pod, policies, target, &networks, &behind),
        None if networks.is_direct(target.address) => vec![goes_direct(cluster, &networks, target)],
        None => decided(cluster, pod, policies, target),
    }
}

/// Why a destination is direct.
fn goes_direct(cluster: &Cluster, networks: &Networks, target: Target) -> String {
    let origin = networks.origins.iter().find(|(network, _)| network.contains(target.address));
    let origin = match origin {
        Some((network, of)) => format!("in {network}, from {of}"),
        None if cluster.api_servers().any(|address| address == target.address) => {
            "an API server's address, an endpoint of the Service default/kubernetes".to_owned()
        }
        None => "an address of a node, a Service or a pod, or link-local or multicast".to_owned(),
    };
    format!("{target} goes direct: it is {origin}, and no policy covers what is inside the cluster.")
}

/// What becomes of packets to an address of a Service.
fn through(
    cluster: &Cluster,
    pod: &Pod,
    policies: &[&Ranked],
    target: Target,
    networks: &Networks,
    Behind { service, door, endpoints }: &Behind,
) -> Vec<String> {
    let outside: Vec<Target> = endpoints.iter().filter(|e| !networks.is_direct(e.address)).copied().collect();
    let mut lines = Vec::new();
    match door {
        Door::OtherNode => {
            let node = "that node's kube-proxy sends it on, and endpoints outside the cluster see that node's address";
            return vec![format!(
                "{target} goes direct: it is a port of the Service {service} at another node; {node}."
            )];
        }
        // The Service's address itself counts where kube-proxy does not replace it.
        _ if networks.is_direct(target.address) && outside.is_empty() => {
            lines.push(goes_direct(cluster, networks, target));
            let told = match endpoints.as_slice() {
                [] => "of which no endpoints are known".to_owned(),
                _ => format!("whose endpoints are inside the cluster: {}", few(endpoints)),
            };
            lines.push(format!("It is an address of the Service {service}, {told}."));
        }
        _ if endpoints.is_empty() => {
            lines.push(format!("It is an address of the Service {service}, of which no endpoints are known."));
            lines.extend(decided(cluster, pod, policies, target));
        }
        _ => {
            lines.push(format!(
                "{target} is an address of the Service {service}. kube-proxy has replaced it by an endpoint's when policies \
                 decide (not in its mode IPVS: there it goes direct, see docs/limits.md):"
            ));
            let inside: Vec<Target> = endpoints.iter().filter(|e| !outside.contains(e)).copied().collect();
            if !inside.is_empty() {
                lines.push(format!("{} goes direct: inside the cluster.", few(&inside)));
            }
            for endpoint in outside.iter().take(FEW) {
                lines.extend(decided(cluster, pod, policies, *endpoint));
            }
            if outside.len() > FEW {
                lines.push(format!("and {} more endpoints outside the cluster", outside.len() - FEW));
            }
        }
    }
    lines
}

/// How many of a Service's endpoints are told.
const FEW: usize = 8;

fn few(endpoints: &[Target]) -> String {
    let more = endpoints.len().saturating_sub(FEW);
    let shown: Vec<String> = endpoints.iter().take(FEW).map(|e| e.address.to_string()).collect();
    in_a_row(&shown) + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

/// What policies decide for a destination outside the cluster.
fn decided(cluster: &Cluster, pod: &Pod, policies: &[&Ranked], target: Target) -> Vec<String> {
    let mut lines = Vec::new();
    let by_port = |ranked: &&&Ranked| target.port.is_none() && covers_by_port(ranked, target.address);
    let passed_over = passed_over(cluster);
    let in_force = policies.iter().filter(|ranked| !passed_over(ranked));
    let decides = in_force.clone().find(|ranked| covers(ranked, &target));
    let before = in_force.take_while(|ranked| decides.is_none_or(|decides| decides.key != ranked.key));
    for Ranked { key, .. } in before.filter(by_port) {
        lines.push(format!(
            "{} covers some ports there; name one, as in {}/tcp",
            named(key),
            SocketAddr::new(target.address, 443)
        ));
    }
    let Some(Ranked { key, policy, .. }) = decides else {
        let other_ports = if lines.is_empty() { "" } else { ", by other ports," };
        lines.push(format!("{target}{other_ports} is covered by no policy: it leaves as if Egret were not there."));
        return lines;
    };
    let status = cluster.policy_statuses.get(key);
    let address = status.and_then(|status| address_towards(status, target.address));
    let ready = status.and_then(|s| s.conditions.iter().find(|c| c.type_ == "Ready"));
    let has_allocation = status.is_some_and(|status| status.addresses.is_some());
    let becomes = match policy.fallback {
        Fallback::Block => "is blocked",
        Fallback::NodeAddress => "leaves from the node's address (fallback: NodeAddress)",
    };
    lines.push(match (address, ready) {
        (Some(_), _) if let Some((node, blocked)) = blocked(cluster, pod, key, target) => {
            format!("{target} {becomes}: {} decides, and from the pod's node {node:?} {blocked}.", named(key))
        }
        (Some(_), Some(ready)) if ready.status == "True" && is_egress_ip(cluster, target.address) => {
            format!(
                "{target} is blocked: it is an egress IP. {} decides; what comes to an egress IP is dropped unless it answers \
                 what has left from there, and what a pod sends to the gateway's node itself is, too.",
                named(key)
            )
        }
        (Some(_), _) if let Some((node, blocked)) = blocked_at_owner(cluster, key, target) => {
            format!("{target} is blocked: {} decides, and on its owner, node {node:?}, {blocked}.", named(key))
        }
        (Some(address), Some(ready)) if ready.status == "True" => {
            format!("{target} leaves from {address}: {} decides, and {}.", named(key), ready.message)
        }
        (None, Some(ready)) if ready.status == "True" && has_allocation => {
            format!("{target} is blocked: {} decides, and its allocation has no address of that family.", named(key))
        }
        (Some(address), Some(ready)) if ready.status == "Unknown" => {
            let otherwise = match policy.fallback {
                Fallback::Block => "else it is blocked",
                Fallback::NodeAddress => "else from the node's address (fallback: NodeAddress)",
            };
            format!(
                "{target} leaves from {address} if the gateway lives, {otherwise}: {} decides, and {}.",
                named(key),
                ready.message
            )
        }
        (_, ready) => {
            let reason = ready.map_or("the controller has said nothing of it yet", |ready| &ready.message);
            format!("{target} {becomes}: {} decides, and it is not ready: {reason}", named(key))
        }
    });
    lines
}

/// What the pod's own node says of the policy's allocation, if packets on it lead nowhere from there.
fn blocked<'a>(cluster: &'a Cluster, pod: &'a Pod, policy: &PolicyKey, target: Target) -> Option<(&'a str, &'a str)> {
    let node = pod.node.as_deref()?;
    let of_allocations = cluster.egress_nodes.get(node)?.of_allocations();
    Some((node, of_family(of_allocations, allocation_of(cluster, policy)?, target)?))
}

/// What the node that holds the policy's allocation says of it, if packets on it do not leave there.
fn blocked_at_owner<'a>(cluster: &'a Cluster, policy: &PolicyKey, target: Target) -> Option<(&'a str, &'a str)> {
    let allocation = allocation_of(cluster, policy)?;
    let holders = cluster.egress_nodes.iter().filter(|(_, node)| node.of_allocations().held.contains(&allocation));
    let mut told =
        holders.filter_map(|(name, node)| Some((&**name, of_family(node.of_allocations(), allocation, target)?)));
    told.next()
}

fn allocation_of(cluster: &Cluster, policy: &PolicyKey) -> Option<EgressId> {
    let mut allocations = cluster.gateways.values().flat_map(|gateway| &gateway.status.allocations);
    allocations.find(|allocation| allocation.policies.contains(policy)).map(|allocation| allocation.id)
}

fn of_family(of_allocations: &OfAllocations, allocation: EgressId, target: Target) -> Option<&str> {
    let family = if target.address.is_ipv4() { "IPv4" } else { "IPv6" };
    let is_of = |blocked: &&BlockedAllocation| blocked.family.as_deref().is_none_or(|of| of == family);
    of_allocations
        .blocked
        .iter()
        .filter(|blocked| blocked.id == allocation)
        .find(is_of)
        .map(|blocked| &*blocked.message)
}

/// Tells which policies decide nothing for their pods' node, by the allocations that it goes by.
fn passed_over(cluster: &Cluster) -> impl Fn(&Ranked) -> bool + use<> {
    let allocations = cluster.gateways.values().flat_map(|gateway| &gateway.status.allocations);
    let listed: HashSet<PolicyKey> = allocations.flat_map(|allocation| allocation.policies.iter().cloned()).collect();
    move |Ranked { key, policy, .. }| is_passed_over(policy, listed.contains(key))
}

/// Whether it is an egress IP that Egret places.
fn is_egress_ip(cluster: &Cluster, address: IpAddr) -> bool {
    let managed = cluster.gateways.values().filter(|gateway| gateway.placement == Placement::Managed);
    let allocations = managed
        .flat_map(|gateway| &gateway.status.allocations)
        .filter(|allocation| allocation.kind != AllocationKind::Node);
    allocations.into_iter().any(|allocation| addresses_of(&allocation.address).any(|a| a == address))
}

fn address_towards(status: &EgressPolicyStatus, target: IpAddr) -> Option<IpAddr> {
    let pair = status.addresses.as_ref()?;
    if target.is_ipv4() { pair.ipv4.map(IpAddr::V4) } else { pair.ipv6.map(IpAddr::V6) }
}

fn covers(ranked: &Ranked, target: &Target) -> bool {
    let destinations = ranked.policy.egress.as_deref().map(|covers| &**covers).unwrap_or_default();
    ranked.policy.covers_everything() || destinations.iter().any(|d| target.is_in(d))
}

fn covers_by_port(ranked: &Ranked, address: IpAddr) -> bool {
    let destinations = ranked.policy.egress.as_deref().map(|covers| &**covers).unwrap_or_default();
    destinations.iter().any(|d| !d.ports.is_empty() && d.has_address(address))
}

fn named(key: &PolicyKey) -> String {
    let kind = if key.namespace.is_some() { "EgressPolicy" } else { "ClusterEgressPolicy" };
    format!("{kind} {key}")
}

fn list<T: ToString>(all: &[T], none: &str) -> String {
    if all.is_empty() { none.to_owned() } else { in_a_row(all) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::report::report;
    use crate::api::{EgressPeer, EgressPolicySpec, EgressPort, EgressRule, IpBlock, Protocol};
    use crate::fixture::{World, naming};
    use crate::model::{Endpoints, Front, Service, ServicePort};
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

    fn asked(world: &World, target: &str) -> String {
        let target = (!target.is_empty()).then(|| target.parse().unwrap());
        why(&world.cluster, &ObjectKey::new("shop", "visitor"), target, &["198.51.100.0/24".parse().unwrap()]).unwrap()
    }

    #[track_caller]
    fn says(text: &str, words: &[&str]) {
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
    }

    #[test]
    fn all_policies_of_a_pod_are_told_in_the_order_in_which_they_decide() {
        let text = asked(&settled(world()), "");
        says(&text, &["pod shop/visitor on node n1, 10.9.0.1", "app=visitor"]);
        let names =
            text.find("1. EgressPolicy shop/names, priority 7, covers UDP 53 of 203.0.113.0/24 without 203.0.113.7/32");
        let rest = text.find(
            "2. EgressPolicy shop/rest, priority 0, covers everything\n   Accepted=True: it leaves from 192.0.2.50",
        );
        let late = text.find("3. ClusterEgressPolicy late, priority 0, covers everything\n   it never decides");
        assert!(names.is_some() && names < rest && rest < late, "{text}");
        says(&asked(&world(), ""), &["the controller has said nothing of it yet"]);
    }

    #[test]
    fn what_becomes_of_a_destination_is_told() {
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
                "2001:db8::1 is blocked: EgressPolicy shop/rest decides, and its allocation has no address of that family",
            ),
            ("10.0.0.1", "10.0.0.1 goes direct"),
            ("10.9.0.2", "10.9.0.2 goes direct"),
            ("10.9.0.3", "10.9.0.3 leaves from 192.0.2.50"),
            ("198.51.100.9", "goes direct: it is in 198.51.100.0/24, from --direct"),
            ("224.0.0.1", "goes direct"),
            // Another policy's egress IP, and its own.
            (
                "192.0.2.51:22",
                "192.0.2.51, TCP port 22, is blocked: it is an egress IP. EgressPolicy shop/rest decides",
            ),
            ("192.0.2.50:22", "is blocked: it is an egress IP"),
            ("192.0.2.99:22", "leaves from 192.0.2.50"),
        ] {
            says(&asked(&world, target), &[words]);
        }
    }

    #[test]
    fn a_service_goes_where_its_endpoints_are() {
        let mut world = settled(world());
        let port = ServicePort { name: "db".into(), protocol: Protocol::Tcp, port: 5432, node_port: Some(30432) };
        let front = Front { addresses: ["198.18.0.9".parse().unwrap()].into(), ports: [port].into() };
        for (name, address, endpoints) in [
            ("outside", "10.96.0.9", &["203.0.113.9", "10.9.0.1"][..]),
            ("inside", "10.96.0.8", &["10.9.0.1"]),
            ("kubernetes", "10.96.0.1", &["203.0.113.6"]),
        ] {
            let front = Some(Box::new(if name == "outside" { front.clone() } else { Front::default() }));
            let service = Service { cluster_ips: [address.parse().unwrap()].into(), front, ..Service::default() };
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
            // Not a port of the Service's.
            ("198.18.0.9:80", &["198.18.0.9, TCP port 80, leaves from 192.0.2.50"]),
            ("10.0.0.1:30432", &["an address of the Service default/outside", decided]),
            ("10.0.0.2:30432", &["goes direct: it is a port of the Service default/outside at another node"]),
            ("10.96.0.8", &["10.96.0.8 goes direct", "whose endpoints are inside the cluster: 10.9.0.1"]),
            ("10.96.0.1:443", &["10.96.0.1, TCP port 443, goes direct", "inside the cluster: 203.0.113.6"]),
            ("203.0.113.6", &["203.0.113.6 goes direct: it is an API server's address"]),
        ] {
            says(&asked(&world, target), words);
        }
    }

    #[test]
    fn what_the_pods_own_node_says_of_the_allocation_counts() {
        let mut world = settled(world());
        let id =
            world.cluster.gateways["g"].status.allocations.iter().find(|p| p.policies.contains(&"shop/rest".into()));
        let blocked = BlockedAllocation { id: id.unwrap().id, family: None, message: "node n2 does not answer".into() };
        let node = world.cluster.egress_nodes.get_mut("n1").unwrap();
        Arc::make_mut(node).of_allocations_mut().blocked = vec![blocked];
        let words = "9.9.9.9 is blocked: EgressPolicy shop/rest decides, and from the pod's node \"n1\" node n2 does not answer.";
        says(&asked(&world, "9.9.9.9"), &[words]);
    }

    #[test]
    fn whose_gateway_nobody_hears_may_be_blocked() {
        let mut world = settled(world());
        for node in ["n1", "n2"] {
            Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).lost_since = Some(0);
        }
        let world = settled(world);
        says(&asked(&world, "9.9.9.9"), &["9.9.9.9 leaves from 192.0.2.50 if the gateway lives, else it is blocked: "]);
        says(&asked(&world, ""), &["Ready=Unknown: node \"n1\" held 192.0.2.50"]);
    }

    #[test]
    fn what_is_covered_for_some_ports_only_is_not_said_to_be_covered_by_none() {
        let mut world = world();
        world.without_policy("shop/rest");
        world.without_policy("late");
        says(
            &asked(&world, "203.0.113.9"),
            &["covers some ports there", "203.0.113.9, by other ports, is covered by no"],
        );
    }

    #[test]
    fn who_is_not_ready_is_blocked_or_let_go_as_its_policy_says() {
        let mut world = world();
        says(&asked(&world, "9.9.9.9"), &["9.9.9.9 is blocked: EgressPolicy shop/rest decides, and it is not ready"]);
        world.policy("shop/rest", EgressPolicySpec { fallback: Fallback::NodeAddress, ..naming(&["192.0.2.50"]) });
        // While nobody has given it an address, the next one decides.
        says(&asked(&world, "9.9.9.9"), &["9.9.9.9 is blocked: ClusterEgressPolicy late decides"]);
        says(&asked(&world, ""), &["EgressPolicy shop/rest, priority 0, covers everything\n   it is passed over"]);
        world.allocate();
        says(&asked(&world, "9.9.9.9"), &["9.9.9.9 leaves from the node's address (fallback: NodeAddress)"]);
        for policy in ["shop/rest", "shop/names", "late"] {
            world.without_policy(policy);
        }
        says(&asked(&world, "9.9.9.9"), &["No policy selects it"]);
        let nobody = why(&world.cluster, &ObjectKey::new("shop", "nobody"), None, &[]);
        assert_eq!(nobody.unwrap_err().to_string(), "the cluster has no pod shop/nobody; write NAMESPACE/NAME");
    }
}
