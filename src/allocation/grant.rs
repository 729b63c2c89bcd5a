//! Grants allocations to requests that have none.

use super::address_pair::{addresses, in_words, of_pair, overlap, pair};
use super::allocator::{Allocator, Draft};
use super::cooldown::COOLDOWN_SECONDS;
use super::decision::{Reason, Rejection};
use super::index::{AllocationIndex, GatewayIndex, List, RequestIndex};
use super::load::Load;
use super::request::{Kind, Request};
use super::{services, versions};
use crate::api::{AddressPair, AllocationKind, Sharing};
use crate::model::capacity::Capacity;
use crate::model::condition::time;
use crate::model::drain::is_drained;
use crate::model::marks::MAX_EGRESS_ID;
use crate::model::{END_COOLDOWN, ObjectKey};
use egret_nft::Family;
use std::cell::LazyCell;
use std::collections::HashMap;
use std::net::IpAddr;

/// Grants allocations to the requests that have none, older ones first. Returns the rejections by the index of the
/// request.
pub(super) fn grant(allocator: &mut Allocator) -> HashMap<RequestIndex, Rejection> {
    let mut rejections = HashMap::new();
    let mut lacking = HashMap::new();
    let mut nodes: List<GatewayIndex, Option<ByNode>> = allocator.gateway_pools.map(|_| None);
    // Requests that name an address come before those that take any.
    for kind in AllocationKind::KNOWN {
        let cluster = allocator.cluster;
        let too_old = LazyCell::new(|| versions::too_old(cluster, kind));
        for request in allocator.requests.all.indices() {
            let asked = &allocator.requests.all[request];
            if asked.allocation.is_some() || asked.kind.allocation() != kind {
                continue;
            }
            if let Some(rejection) = frozen(allocator, request).or_else(|| (*too_old).clone()) {
                rejections.insert(request, rejection);
                continue;
            }
            let granted = match &allocator.requests.all[request].kind {
                Kind::Explicit(pair) => {
                    let pair = pair.clone();
                    named(allocator, request, pair, None)
                }
                Kind::Service(service, pair) => {
                    let (service, pair) = (service.clone(), pair.clone());
                    named(allocator, request, pair, Some(service))
                }
                Kind::Node => {
                    let gateway = allocator.requests.all[request].gateway;
                    let allocations = nodes[gateway].get_or_insert_with(|| ByNode::new(allocator, gateway));
                    node(allocator, request, allocations)
                }
                Kind::Shared | Kind::Dedicated(_) => pool(allocator, request, kind, &mut lacking),
                Kind::Pooled => pooled(allocator, request, &mut lacking),
            };
            match granted {
                Ok(allocation) => allocator.assign(allocation, request),
                Err(rejection) => {
                    rejections.insert(request, rejection);
                }
            }
        }
    }
    // The final allocations decide the reasons, so that the next computation gives the same ones: a named address may
    // have been given to another policy in between.
    let mut exhausted_of: HashMap<(GatewayIndex, Family), Rejection> = HashMap::new();
    for (request, rejection) in &mut rejections {
        if let Some(family) = lacking.get(request) {
            let gateway = allocator.requests.all[*request].gateway;
            *rejection = exhausted_of
                .entry((gateway, *family))
                .or_insert_with(|| exhausted(allocator, gateway, *family))
                .clone();
        }
        let Request { kind, gateway, .. } = &allocator.requests.all[*request];
        if let Some(pair) = kind.named()
            && ![Reason::GatewayInvalid, Reason::NodesTooOld].contains(&rejection.reason)
            && let Err(named) = check_named(allocator, *gateway, pair, kind.service())
        {
            *rejection = named;
        }
    }
    rejections
}

/// The rejection if the gateway gives out nothing.
fn frozen(allocator: &Allocator, request: RequestIndex) -> Option<Rejection> {
    let gateway_pool = &allocator.gateway_pools[allocator.requests.all[request].gateway];
    let message = format!(
        "the spec of EgressGateway {:?} is invalid; it gives out no egress IP until that is corrected",
        gateway_pool.name
    );
    gateway_pool.gateway.frozen.then(|| Rejection::new(Reason::GatewayInvalid, message))
}

fn no_id() -> Rejection {
    let message = format!(
        "all {MAX_EGRESS_ID} egress IDs of the cluster are in use or in cooldown; \
         let policies share egress IPs: name the same address, or use allocate: Shared"
    );
    Rejection::new(Reason::NoIdLeft, message)
}

/// Grants addresses that the policies name, themselves or by a Service.
fn named(
    allocator: &mut Allocator,
    request: RequestIndex,
    address: AddressPair,
    service: Option<ObjectKey>,
) -> Result<AllocationIndex, Rejection> {
    let (gateway, policies) =
        (allocator.requests.all[request].gateway, allocator.requests.all[request].policies.clone());
    check_named(allocator, gateway, &address, service.as_ref())?;
    let known = allocator.gateway_pools[gateway].gateway;
    if service.is_none() && address != known.default_address {
        let namespaces = &allocator.requests.requesters[policies[0]].policy.namespaces;
        allocator.services.check_foreign(known, namespaces, &address)?;
        services::check_former(&allocator.in_cooldown, (known, namespaces), &policies, &address)?;
    }
    let name = format!("Explicit/{}", in_words(&address));
    let id = allocator.new_id(gateway, &address, &policies, &name).ok_or_else(no_id)?;
    let kind = if service.is_some() { AllocationKind::Service } else { AllocationKind::Explicit };
    let draft = allocator.draft_like_before(gateway, id, kind, address);
    Ok(allocator.add(Draft { service, ..draft }))
}

/// Checks whether policies can have the addresses that they name, themselves or by a Service.
fn check_named(
    allocator: &Allocator,
    gateway: GatewayIndex,
    pair: &AddressPair,
    service: Option<&ObjectKey>,
) -> Result<(), Rejection> {
    addresses(pair).try_for_each(|address| check_one(allocator, gateway, (pair, service), address))
}

/// Why the request does not get the address that `holder` has.
fn taken(
    allocator: &Allocator,
    gateway: GatewayIndex,
    (pair, service): (&AddressPair, Option<&ObjectKey>),
    address: IpAddr,
    holder: AllocationIndex,
) -> Rejection {
    let gateway_pool = &allocator.gateway_pools[gateway];
    let own = allocator.allocations[holder].gateway == gateway;
    let allocation = &allocator.allocations[holder];
    let is_named = matches!(allocation.kind, AllocationKind::Explicit | AllocationKind::Service);
    if own && is_named && allocation.service.as_ref() == service && allocation.address == *pair {
        let message = format!(
            "{} is the egress IP of {}, and EgressGateway {:?} does not share it across namespaces (spec.sharing: \
             Namespace); name another address, or have sharing: Cluster set there",
            in_words(pair),
            allocator.requests.name_some(&allocator.users(holder)),
            gateway_pool.name
        );
        return Rejection::new(Reason::AddressNotShared, message);
    }
    let message = format!(
        "{address} is taken by {}, which leaves from {} ({:?}); name another address{}",
        allocator.requests.name_some(&allocator.users(holder)),
        in_words(&allocation.address),
        allocation.kind,
        match allocation.kind {
            AllocationKind::Explicit => {
                let among = match gateway_pool.gateway.sharing {
                    Sharing::Namespace => ", if it is of the same namespace",
                    Sharing::Cluster => "",
                };
                format!(", or exactly {} to share the egress IP{among}", in_words(&allocation.address))
            }
            _ => String::new(),
        }
    );
    Rejection::new(Reason::AddressTaken, message)
}

fn check_one(
    allocator: &Allocator,
    gateway: GatewayIndex,
    (pair, service): (&AddressPair, Option<&ObjectKey>),
    address: IpAddr,
) -> Result<(), Rejection> {
    let gateway_pool = &allocator.gateway_pools[gateway];
    if !gateway_pool.declared.contains(address) {
        let message = format!(
            "{address} is not in the pool of EgressGateway {:?}; add it to the gateway's spec.addresses, \
             or name an address that is there",
            gateway_pool.name
        );
        return Err(Rejection::new(Reason::AddressOutsidePool, message));
    }
    let default = &gateway_pool.gateway.default_address;
    if pair != default && addresses(default).any(|of_default| of_default == address) {
        let message = format!(
            "{address} is of the default egress IP of EgressGateway {:?}, {}, which all policies without an address share; \
             name exactly that, or another address",
            gateway_pool.name,
            in_words(default)
        );
        return Err(Rejection::new(Reason::AddressReserved, message));
    }
    let holder = allocator.holder(address);
    let own = holder.is_some_and(|allocation| allocator.allocations[allocation].gateway == gateway);
    if !gateway_pool.usable.contains(address) && !own {
        let with = gateway_pool.overlaps.iter().find(|o| o.first <= address && address <= o.last);
        let with = with.map(|o| allocator.gateway_pools[o.with].name.to_string()).unwrap_or_default();
        let message = format!(
            "{address} is in the pools of EgressGateways {with:?} and {:?}, and the former keeps it; \
             take it out of one of the pools, or name another address",
            gateway_pool.name
        );
        return Err(Rejection::new(Reason::AddressOutsidePool, message));
    }
    if let Some(holder) = holder {
        return Err(taken(allocator, gateway, (pair, service), address, holder));
    }
    if let Some(node) = allocator.node_with(gateway, address) {
        let message = format!(
            "{address} is an address of node {node:?}; name another one, or use allocate: Node to leave \
             from a node's own address"
        );
        return Err(Rejection::new(Reason::AddressOfNode, message));
    }
    if let Some(network) = allocator.inside(address) {
        let message = format!(
            "{address} is in {network}, a network of the cluster's pods or Services, and no server outside can \
             answer to it; name another address, and take it out of the gateway's spec.addresses"
        );
        return Err(Rejection::new(Reason::AddressInCluster, message));
    }
    Ok(())
}

/// Grants an address of each family that the pool has. If a family is exhausted, it is added to `lacking`.
fn pool(
    allocator: &mut Allocator,
    request: RequestIndex,
    kind: AllocationKind,
    lacking: &mut HashMap<RequestIndex, Family>,
) -> Result<AllocationIndex, Rejection> {
    let (gateway, policies) =
        (allocator.requests.all[request].gateway, allocator.requests.all[request].policies.clone());
    let gateway_pool = &allocator.gateway_pools[gateway];
    if gateway_pool.open.is_empty() {
        let message = if !gateway_pool.usable.is_empty() {
            format!(
                "all addresses of EgressGateway {:?} are reserved for policies that name them, or its default address; name \
                 one, or add addresses to its spec.addresses",
                gateway_pool.name
            )
        } else if gateway_pool.declared.is_empty() {
            format!(
                "EgressGateway {:?} has no addresses; add some to its spec.addresses, or use allocate: Node",
                gateway_pool.name
            )
        } else {
            format!(
                "all addresses of EgressGateway {:?} belong to other gateways; add addresses to its \
                 spec.addresses",
                gateway_pool.name
            )
        };
        return Err(Rejection::new(Reason::PoolEmpty, message));
    }
    let mut found = Vec::new();
    for family in
        Family::BOTH.into_iter().filter(|family| allocator.gateway_pools[gateway].open.has(*family)).collect::<Vec<_>>()
    {
        match allocator.pick(gateway, family, &policies) {
            Some(address) => found.push(address),
            None => {
                lacking.insert(request, family);
                return Err(Rejection::new(Reason::PoolExhausted, String::new()));
            }
        }
    }
    let address = pair(found);
    let (name, ordinal) = match allocator.requests.all[request].kind {
        Kind::Dedicated(ordinal) => (format!("Dedicated/{}", allocator.requests.requesters[policies[0]].name), ordinal),
        _ => ("Shared".to_owned(), 0),
    };
    let id = allocator.new_id(gateway, &address, &policies, &name).ok_or_else(no_id)?;
    let draft = allocator.draft_like_before(gateway, id, kind, address);
    Ok(allocator.add(Draft { ordinal, ..draft }))
}

/// Grants an address of its own, or, where the pool has none left, the egress IP of the gateway that the fewest such
/// policies have.
fn pooled(
    allocator: &mut Allocator,
    request: RequestIndex,
    lacking: &mut HashMap<RequestIndex, Family>,
) -> Result<AllocationIndex, Rejection> {
    let own = pool(allocator, request, AllocationKind::Pooled, lacking);
    let gateway = allocator.requests.all[request].gateway;
    let of_gateway = allocator
        .allocations
        .indexed()
        .filter(|(_, allocation)| allocation.gateway == gateway && allocation.kind == AllocationKind::Pooled);
    own.or_else(|rejection| match of_gateway.min_by_key(|(index, allocation)| (allocation.requests.len(), *index)) {
        Some((index, _)) => {
            lacking.remove(&request);
            Ok(index)
        }
        None => Err(rejection),
    })
}

fn exhausted(allocator: &Allocator, gateway: GatewayIndex, family: Family) -> Rejection {
    let gateway_pool = &allocator.gateway_pools[gateway];
    let cooling = allocator.in_cooldown.entries.iter().filter(|entry| !entry.ended).filter(|entry| {
        let address = of_pair(family, &entry.address);
        address.is_some_and(|a| gateway_pool.open.contains(a) && allocator.holder(a).is_none())
    });
    let until = cooling.map(|entry| entry.at).min().map(|at| {
        let (at, until) = (time(at), time(at + COOLDOWN_SECONDS));
        format!(
            "the address that was given back at {at} is free again at {until}, or at once if you annotate the \
             gateway with {END_COOLDOWN}={at}; "
        )
    });
    let message = format!(
        "EgressGateway {:?} has no {family} address left: all {} are in use, in cooldown, or nodes' own addresses; \
         {}add addresses to its spec.addresses, or let policies use allocate: Shared",
        gateway_pool.name,
        gateway_pool.open.size(family),
        until.unwrap_or_default()
    );
    Rejection::new(Reason::PoolExhausted, message)
}

/// The allocations of a gateway's nodes with their own addresses, and how many policies use each.
#[derive(Clone, Debug)]
struct ByNode {
    /// By the index of the node.
    allocations: Vec<Option<AllocationIndex>>,
    load: Load,
}

impl ByNode {
    fn new(allocator: &Allocator, gateway: GatewayIndex) -> Self {
        let nodes = &allocator.gateway_pools[gateway].nodes;
        let usable = (0..nodes.len()).filter(|index| !allocator.own_address(nodes[*index].1).is_empty());
        let (mut open, drained): (Vec<usize>, Vec<usize>) =
            usable.partition(|index| !is_drained(allocator.gateway_pools[gateway].gateway, nodes[*index].1));
        if open.iter().any(|index| allocator.lives(nodes[*index].0)) {
            open.retain(|index| allocator.lives(nodes[*index].0));
        }
        let open = if open.is_empty() { drained } else { open };
        let mut load = Load::new(open.into_iter().map(|index| (index, Capacity::default())));
        let mut allocations = vec![None; nodes.len()];
        let indices: HashMap<_, _> = nodes.iter().enumerate().map(|(index, (name, _))| (*name, index)).collect();
        for request in allocator.requests.all.iter().filter(|d| d.gateway == gateway && d.kind == Kind::Node) {
            let Some(allocation) = request.allocation else { continue };
            if let Some(index) = allocator.allocations[allocation].node.as_ref().and_then(|name| indices.get(name)) {
                allocations[*index] = Some(allocation);
                load.add(*index);
            }
        }
        ByNode { allocations, load }
    }
}

fn node(allocator: &mut Allocator, request: RequestIndex, nodes: &mut ByNode) -> Result<AllocationIndex, Rejection> {
    let (gateway, policies) =
        (allocator.requests.all[request].gateway, allocator.requests.all[request].policies.clone());
    let gateway_pool = &allocator.gateway_pools[gateway];
    let before = allocator.in_cooldown.of(gateway, &policies).into_iter().find_map(|entry| {
        let same = |index: &usize| overlap(&allocator.own_address(gateway_pool.nodes[*index].1), &entry.address);
        nodes.load.indices().find(same)
    });
    let Some(index) = before.or_else(|| nodes.load.least()) else {
        let message = if gateway_pool.nodes.is_empty() {
            format!(
                "no node matches the nodeSelector of EgressGateway {:?}; label a node, or correct the selector",
                gateway_pool.name
            )
        } else {
            format!(
                "no node of EgressGateway {:?} has an InternalIP that no allocation uses; see the nodes' \
                 status.addresses, or add addresses to the gateway's spec.addresses",
                gateway_pool.name
            )
        };
        return Err(Rejection::new(Reason::NoNode, message));
    };
    let allocation = match nodes.allocations[index] {
        Some(allocation) => allocation,
        None => {
            let (name, node) = gateway_pool.nodes[index];
            let address = allocator.own_address(node);
            let id = allocator.new_id(gateway, &address, &policies, &format!("Node/{name}")).ok_or_else(no_id)?;
            allocator.add(Draft {
                since: allocator.now,
                ..Draft::new(gateway, id, AllocationKind::Node, address, Some(name.clone()))
            })
        }
    };
    nodes.allocations[index] = Some(allocation);
    nodes.load.add(index);
    Ok(allocation)
}
