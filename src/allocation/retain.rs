//! Keeps existing allocations while they are requested and valid.

use super::address_pair::{addresses, of_pair, overlap, pair};
use super::allocator::{Allocator, Draft};
use super::index::{GatewayIndex, RequestIndex};
use super::request::Kind;
use crate::api::{AddressPair, Allocation, AllocationKind, ReleasedAllocation, Sharing};
use crate::model::ObjectKey;
use crate::model::selector::Name;
use egret_nft::Family;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// A load balancer may put an address onto a node before it says that it is a Service's. An egress IP that a node has had
/// for less than this gives way to the Service's policy, seconds.
const SERVICE_GRACE_SECONDS: i64 = 60;

/// What an allocation gives back at time `at`.
fn released(allocation: &Allocation, address: AddressPair, at: i64) -> ReleasedAllocation {
    let Allocation { id, policies, service, .. } = allocation;
    ReleasedAllocation { id: *id, address, at, policies: policies.clone(), service: service.clone() }
}

/// Keeps the allocations that stay, and starts the cooldown of the others.
pub(super) fn retain(allocator: &mut Allocator) {
    let of_services = requested_by_services(allocator);
    // Pool addresses come first: where a node has taken a pool address as its own, the pool allocation is older.
    for nodes_own in [false, true] {
        for gateway in allocator.gateway_pools.indices() {
            let gateway_pool = allocator.gateway_pools[gateway].gateway;
            let mut allocations: Vec<&Allocation> = gateway_pool
                .status
                .allocations
                .iter()
                .filter(|p| (p.kind == AllocationKind::Node) == nodes_own)
                .collect();
            allocations.sort_by_key(|p| p.id);
            for allocation in allocations {
                let stays = if nodes_own {
                    node_allocation(allocator, gateway, allocation)
                } else {
                    !is_displaced(allocator, gateway, allocation, &of_services)
                        && pool_allocation(allocator, gateway, allocation)
                };
                if !stays {
                    let released = released(allocation, allocation.address.clone(), allocator.now);
                    allocator.start_cooldown(gateway, released);
                }
            }
        }
    }
    complete(allocator);
}

/// The namespaces of the Services by which policies have addresses, by gateway and address.
type OfServices = HashMap<(GatewayIndex, IpAddr), Name>;

fn requested_by_services(allocator: &Allocator) -> OfServices {
    let named = allocator.requests.all.iter().filter_map(|request| match &request.kind {
        Kind::Service(service, pair) => Some((request.gateway, service, pair)),
        _ => None,
    });
    named
        .flat_map(|(gateway, service, pair)| addresses(pair).map(move |a| ((gateway, a), service.namespace.clone())))
        .collect()
}

/// Whether an allocation gives way to the policy of a Service that has its address. A tenant may have named an address of
/// the load balancer's in advance, while no Service had it. What a node has held for a while stays: who may choose the
/// address of his Service takes nothing away by it.
fn is_displaced(
    allocator: &Allocator,
    gateway: GatewayIndex,
    allocation: &Allocation,
    of_services: &OfServices,
) -> bool {
    let known = allocator.gateway_pools[gateway].gateway;
    let held_for = allocator.now.saturating_sub(allocation.since);
    let is_held = allocation.node.is_some() && !(0..SERVICE_GRACE_SECONDS).contains(&held_for);
    if allocation.kind != AllocationKind::Explicit || is_held || known.sharing == Sharing::Cluster {
        return false;
    }
    let theirs = addresses(&allocation.address).find_map(|address| of_services.get(&(gateway, address)));
    let is_of = |namespace: &Name| allocation.policies.iter().any(|key| key.namespace.as_ref() == Some(namespace));
    let is_clusters = || allocation.policies.iter().any(|key| key.namespace.is_none());
    theirs.is_some_and(|namespace| !is_of(namespace) && !is_clusters())
}

/// The requests to the gateway, still without an allocation, of the policies that this allocation lists.
fn requests_of<'b>(
    allocator: &'b Allocator,
    gateway: GatewayIndex,
    allocation: &'b Allocation,
) -> impl Iterator<Item = RequestIndex> + 'b {
    let indices = allocation.policies.iter().filter_map(|name| allocator.requests.by_key.get(name));
    let requests = indices.filter_map(|index| allocator.requests.of[*index].as_ref().ok()).flatten().copied();
    requests.filter(move |d| {
        let request = &allocator.requests.all[*d];
        request.gateway == gateway && request.allocation.is_none()
    })
}

fn pool_allocation(allocator: &mut Allocator, gateway: GatewayIndex, allocation: &Allocation) -> bool {
    let fitting = requests_of(allocator, gateway, allocation).filter(|d| {
        match (&allocator.requests.all[*d].kind, allocation.kind) {
            (Kind::Explicit(pair), AllocationKind::Explicit) => *pair == allocation.address,
            (Kind::Service(service, pair), AllocationKind::Service) => {
                *pair == allocation.address && allocation.service.as_deref().is_some_and(|text| service.is(text))
            }
            (Kind::Shared, AllocationKind::Shared) | (Kind::Pooled, AllocationKind::Pooled) => true,
            (Kind::Dedicated(ordinal), AllocationKind::Dedicated) => *ordinal == allocation.ordinal,
            _ => false,
        }
    });
    // The most senior request keeps it, if the gateway no longer shares addresses across namespaces. Policies share one of
    // a pool whatever their namespaces.
    let mut fitting: BTreeSet<RequestIndex> = fitting.collect();
    let Some(first) = fitting.first().copied() else { return false };
    fitting.retain(|request| *request == first || allocation.kind == AllocationKind::Pooled);
    let is_named = matches!(allocation.kind, AllocationKind::Explicit | AllocationKind::Service);
    let may_keep = |address: &IpAddr| {
        let reserved =
            || allocator.gateway_pools[gateway].gateway.reservations.iter().any(|reserved| reserved.contains(*address));
        allocator.gateway_pools[gateway].declared.contains(*address) && (is_named || !reserved())
    };
    let (kept, lost): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses(&allocation.address).partition(|address| may_keep(address) && !allocator.held.contains_key(address));
    // A policy that names a pair needs all of it. Any other one keeps half a pair while a new half is looked for.
    if kept.is_empty() || (is_named && !lost.is_empty()) || !allocator.ids.take(allocation.id) {
        return false;
    }
    if !lost.is_empty() {
        allocator.start_cooldown(gateway, released(allocation, pair(lost), allocator.now));
    }
    let index = allocator.add(Draft {
        gateway,
        id: allocation.id,
        kind: allocation.kind,
        ordinal: allocation.ordinal,
        address: pair(kept),
        node: allocation.node.clone(),
        since: allocation.since,
        leaving: allocation.leaving.clone(),
        service: allocation.service.as_deref().and_then(ObjectKey::parse),
        requests: vec![],
    });
    for request in fitting {
        allocator.assign(index, request);
    }
    true
}

fn node_allocation(allocator: &mut Allocator, gateway: GatewayIndex, allocation: &Allocation) -> bool {
    let nodes = &allocator.gateway_pools[gateway].nodes;
    let Some((name, node)) =
        allocation.node.as_deref().and_then(|n| nodes.iter().find(|(name, _)| &***name == n).copied())
    else {
        return false;
    };
    let requests: BTreeSet<RequestIndex> =
        requests_of(allocator, gateway, allocation).filter(|d| allocator.requests.all[*d].kind == Kind::Node).collect();
    let address = allocator.own_address(node);
    // With another address it is a new allocation: connections over the old address cannot survive.
    if requests.is_empty() || !overlap(&address, &allocation.address) || !allocator.ids.take(allocation.id) {
        return false;
    }
    let index = allocator.add(Draft {
        gateway,
        id: allocation.id,
        kind: AllocationKind::Node,
        ordinal: 0,
        address,
        node: Some(name.clone()),
        since: allocation.since,
        leaving: None,
        service: None,
        requests: vec![],
    });
    for request in requests {
        allocator.assign(index, request);
    }
    true
}

/// Adds the missing half of a pair: the pool has got a second family, or has lost an address.
fn complete(allocator: &mut Allocator) {
    for request in allocator.requests.all.indices() {
        let Some(index) = allocator.requests.all[request].allocation else { continue };
        let given = [AllocationKind::Dedicated, AllocationKind::Shared, AllocationKind::Pooled];
        if !given.contains(&allocator.allocations[index].kind) {
            continue;
        }
        let gateway = allocator.allocations[index].gateway;
        for family in Family::BOTH {
            if of_pair(family, &allocator.allocations[index].address).is_some()
                || !allocator.gateway_pools[gateway].open.has(family)
            {
                continue;
            }
            let policies = std::mem::take(&mut allocator.requests.all[request].policies);
            if let Some(address) = allocator.pick(gateway, family, &policies) {
                allocator.held.insert(address, index);
                let allocation = &mut allocator.allocations[index];
                allocation.address = pair(addresses(&allocation.address).chain([address]));
            }
            allocator.requests.all[request].policies = policies;
        }
    }
}
