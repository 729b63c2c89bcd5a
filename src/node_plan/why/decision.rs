//! Explains what the policies of a pod decide for a destination outside the cluster.

use super::egress_ip::{EgressIp, of_pod};
use super::named;
use super::policies::passed_over;
use crate::api::{AllocationKind, BlockedAllocation, Fallback, Placement};
use crate::model::egress_node::OfAllocations;
use crate::model::marks::EgressId;
use crate::model::precedence::Ranked;
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey, Pod, PolicyKey, addresses_of};
use std::net::{IpAddr, SocketAddr};

/// What the policies of a pod decide for a destination outside the cluster.
pub(super) fn decided(
    cluster: &Cluster,
    named_pod: (&ObjectKey, &Pod),
    policies: &[&Ranked],
    target: Target,
) -> Vec<String> {
    let (_, pod) = named_pod;
    let mut lines = Vec::new();
    let by_port = |ranked: &&&Ranked| target.port.is_none() && covers_by_port(ranked, target.address);
    let passed_over = passed_over(cluster, policies);
    let in_force = policies.iter().filter(|ranked| passed_over(ranked).is_none());
    let decides = in_force.clone().find(|ranked| covers(ranked, &target));
    let before = in_force.take_while(|ranked| decides.is_none_or(|decides| decides.key != ranked.key));
    for Ranked { key, .. } in before.filter(by_port) {
        lines.push(format!(
            "{} covers some ports there; name one, as in {}/tcp",
            named(key),
            SocketAddr::new(target.address, 443)
        ));
    }
    let Some(decides @ Ranked { key, policy, .. }) = decides else {
        let other_ports = if lines.is_empty() { "" } else { ", by other ports," };
        lines.push(format!("{target}{other_ports} is covered by no policy: it leaves as if Egret were not there."));
        return lines;
    };
    if policy.is_direct() {
        lines.push(format!("{target} leaves as if Egret were not there: {} decides (action: Direct).", named(key)));
        return lines;
    }
    let EgressIp { id, address, has_allocation, ready, which } = of_pod(cluster, named_pod, decides, target);
    let by_route = address.filter(|_| ready.as_ref().is_some_and(|ready| ready.status != "False"));
    let by_route = by_route.filter(|_| is_routed(cluster, id));
    let outcome = match policy.fallback {
        Fallback::Block => "is blocked",
        Fallback::NodeAddress => "leaves from the node's address (fallback: NodeAddress)",
    };
    lines.push(match (address, ready) {
        (Some(_), _) if let Some((node, blocked)) = blocked(cluster, pod, (key, id), target) => {
            format!("{target} {outcome}: {} decides, and from the pod's node {node:?} {blocked}.", named(key))
        }
        (Some(_), Some(ready)) if ready.status == "True" && is_egress_ip(cluster, target.address) => {
            format!(
                "{target} is blocked: it is an egress IP. {} decides; packets to an egress IP are dropped unless \
                 they answer traffic that left from it.",
                named(key)
            )
        }
        (Some(_), _) if let Some((node, blocked)) = blocked_at_owner(cluster, id, target) => {
            format!("{target} is blocked: {} decides, and on its owner, node {node:?}, {blocked}.", named(key))
        }
        (Some(address), Some(ready)) if ready.status == "True" => {
            format!("{target} leaves from {address}{which}: {} decides, and {}.", named(key), ready.message)
        }
        (None, Some(ready)) if ready.status == "True" && has_allocation => {
            format!("{target} is blocked: {} decides, and its egress IP has no address of that family.", named(key))
        }
        (Some(address), Some(ready)) if ready.status == "Unknown" => {
            let otherwise = match policy.fallback {
                Fallback::Block => "else it is blocked",
                Fallback::NodeAddress => "else from the node's address (fallback: NodeAddress)",
            };
            format!(
                "{target} leaves from {address}{which} if the gateway is alive, {otherwise}: {} decides, and {}.",
                named(key),
                ready.message
            )
        }
        (_, ready) => {
            let reason =
                ready.map_or("the controller has not written its status yet".to_owned(), |ready| ready.message);
            format!("{target} {outcome}: {} decides, and it is not ready: {reason}", named(key))
        }
    });
    lines.extend(by_route.map(|address| {
        format!(
            "Its gateway has announce: Route: answers come if the router on that node announces {address}, which is on the \
             device egret-ip there."
        )
    }));
    lines
}

/// Whether the nodes' own routers announce an allocation's egress IP.
fn is_routed(cluster: &Cluster, allocation: Option<EgressId>) -> bool {
    let routed = cluster.gateways.values().filter(|gateway| gateway.is_routed());
    let mut allocations = routed.flat_map(|gateway| &gateway.status.allocations);
    allocation.is_some_and(|id| allocations.any(|allocation| allocation.id == id))
}

/// What a node does with pods of a policy that lists too many destinations for it.
const OVER_LIMIT: &str = "all that leaves the cluster is dropped: the policy lists too many destinations for one node";

/// The report of the pod's own node that it blocks traffic of the policy's egress IP: the node and its message.
fn blocked<'a>(
    cluster: &'a Cluster,
    pod: &'a Pod,
    (policy, allocation): (&PolicyKey, Option<EgressId>),
    target: Target,
) -> Option<(&'a str, &'a str)> {
    let node = pod.node.as_deref()?;
    let of_allocations = cluster.egress_nodes.get(node)?.of_allocations();
    if of_allocations.over_limit.contains(policy) {
        return Some((node, OVER_LIMIT));
    }
    Some((node, message_about(of_allocations, allocation?, target)?))
}

/// The report of the owner that it blocks traffic of the policy's egress IP: the node and its message.
fn blocked_at_owner(cluster: &Cluster, allocation: Option<EgressId>, target: Target) -> Option<(&str, &str)> {
    let allocation = allocation?;
    let holders = cluster.egress_nodes.iter().filter(|(_, node)| node.of_allocations().held.contains(&allocation));
    let mut reports =
        holders.filter_map(|(name, node)| Some((&**name, message_about(node.of_allocations(), allocation, target)?)));
    reports.next()
}

fn message_about(of_allocations: &OfAllocations, allocation: EgressId, target: Target) -> Option<&str> {
    let family = if target.address.is_ipv4() { "IPv4" } else { "IPv6" };
    let is_of = |blocked: &&BlockedAllocation| blocked.family.as_deref().is_none_or(|of| of == family);
    of_allocations
        .blocked
        .iter()
        .filter(|blocked| blocked.id == allocation)
        .find(is_of)
        .map(|blocked| &*blocked.message)
}

/// Whether the address is an egress IP that Egret places.
fn is_egress_ip(cluster: &Cluster, address: IpAddr) -> bool {
    let managed = cluster.gateways.values().filter(|gateway| gateway.placement == Placement::Managed);
    let allocations = managed
        .flat_map(|gateway| &gateway.status.allocations)
        .filter(|allocation| allocation.kind != AllocationKind::Node);
    allocations.into_iter().any(|allocation| addresses_of(&allocation.address).any(|a| a == address))
}

fn covers(ranked: &Ranked, target: &Target) -> bool {
    let destinations = ranked.policy.egress.as_deref().map(|covers| &**covers).unwrap_or_default();
    ranked.policy.covers_everything() || destinations.iter().any(|d| target.is_in(d))
}

fn covers_by_port(ranked: &Ranked, address: IpAddr) -> bool {
    let destinations = ranked.policy.egress.as_deref().map(|covers| &**covers).unwrap_or_default();
    destinations.iter().any(|d| !d.ports.is_empty() && d.has_address(address))
}
