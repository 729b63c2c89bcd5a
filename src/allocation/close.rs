//! The result: the status of each gateway, and the decision for each policy.

use super::AllocationResult;
use super::address_pair::{addresses, of_pair, pair};
use super::allocator::{Allocator, GatewayPool};
use super::cooldown::{COOLDOWN_SECONDS, cooldown_ended_until};
use super::decision::{Decision, Grant, Grants, Reason, Rejection};
use super::index::{AllocationIndex, GatewayIndex, PolicyIndex, RequestIndex};
use super::probes;
use super::report::ports::{FEW_PORTS, PORTS_NEARLY_EXHAUSTED, PortReports};
use super::request::{Kind, Requester};
use super::room::Room;
use crate::api::{
    Allocation, AllocationKind, Condition, EgressGatewayStatus, FamilyUsage, PoolUsage, ReleasedAllocation,
};
use crate::model::condition::Conditions;
use crate::model::selector::Name;
use crate::model::{END_COOLDOWN, Node};
use egret_nft::Family;
use ipnetwork::IpNetwork;
use std::collections::HashMap;
use std::net::IpAddr;

/// Turns the finished state into the result. `rejections` has the requests without an allocation, by index.
pub(super) fn close(allocator: Allocator, rejections: &HashMap<RequestIndex, Rejection>) -> AllocationResult {
    let mut outcome = AllocationResult::default();
    for ((index, requester), request) in allocator.requests.requesters.indexed().zip(allocator.requests.of.iter()) {
        let decision = match request {
            Err(rejection) => Decision::Rejected(rejection.clone()),
            Ok(requests) => decide(&allocator, index, requests, rejections),
        };
        outcome.decisions.insert(requester.key.clone(), decision);
    }

    let ports = PortReports::new(allocator.cluster);
    let mut statuses = allocator.gateway_pools.map(|_| EgressGatewayStatus::default());
    for (index, allocation) in allocator.allocations.indexed() {
        let users = allocator.users(index).into_iter();
        let mut users: Vec<&Requester> = users.map(|p| &allocator.requests.requesters[p]).collect();
        users.sort_unstable_by_key(|requester| &requester.name);
        statuses[allocation.gateway].allocations.push(Allocation {
            id: allocation.id,
            kind: allocation.kind,
            ordinal: allocation.ordinal,
            address: allocation.address.clone(),
            node: allocation.node.clone(),
            since: allocation.since,
            leaving: allocation.leaving.clone(),
            service: allocation.service.as_ref().map(|service| service.to_string().into()),
            policies: users.into_iter().map(|requester| requester.key.clone()).collect(),
        });
    }
    for entry in &allocator.in_cooldown.entries {
        // An address that is in use again has no cooldown.
        let address = pair(addresses(&entry.address).filter(|a| allocator.holder(*a).is_none()));
        if !address.is_empty() || !allocator.ids.is_live(entry.id) {
            statuses[entry.gateway].released.push(ReleasedAllocation {
                id: entry.id,
                address,
                policies: entry.policies.clone(),
                at: entry.at,
                service: entry.service.clone(),
            });
        }
    }
    for (gateway_pool, (index, mut status)) in allocator.gateway_pools.iter().zip(statuses.into_indexed()) {
        status.nodes = gateway_pool.nodes.iter().map(|(name, _)| name.to_string()).collect();
        status.allocations.sort_by_key(|allocation| allocation.id);
        status.released.sort_by_key(|r| (r.at, r.id, r.address.ipv4, r.address.ipv6));
        count_nodes(&allocator, gateway_pool, &mut status);
        status.usage = usage(gateway_pool, &status);
        status.conditions = conditions(&allocator, index, gateway_pool, &status, rejections, &ports);
        let next = status.released.first().map(|released| released.at + COOLDOWN_SECONDS);
        status.reports_requested_at = gateway_pool.reports.requested_at;
        // It follows from the policies' statuses, which are computed after this.
        status.opt_in = gateway_pool.gateway.status.opt_in.clone();
        outcome.next_reports = [outcome.next_reports, gateway_pool.reports.due].into_iter().flatten().min();
        outcome.next_release = [outcome.next_release, next].into_iter().flatten().min();
        outcome.gateways.insert(gateway_pool.name.clone(), status);
    }
    outcome
}

/// Notes how many nodes the gateway has, and which of them cannot hold an egress IP now.
fn count_nodes(allocator: &Allocator, gateway_pool: &GatewayPool, status: &mut EgressGatewayStatus) {
    let is_ready = |name: &Name, node: &Node| {
        allocator.cluster.egress_nodes.contains_key(name) && allocator.lives(name) && !node.is_lost(allocator.now)
    };
    let not_ready = gateway_pool.nodes.iter().filter(|(name, node)| !is_ready(name, node));
    status.not_ready_nodes = not_ready.map(|(name, _)| name.to_string()).collect();
    let count = |nodes: &[String]| u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    status.node_count = count(&status.nodes);
    status.ready_nodes = status.node_count.saturating_sub(count(&status.not_ready_nodes));
}

/// The decision for a policy with these requests, each of which is granted or rejected.
fn decide(
    allocator: &Allocator,
    requester: PolicyIndex,
    requests: &[RequestIndex],
    rejections: &HashMap<RequestIndex, Rejection>,
) -> Decision {
    let granted = (0..).zip(requests).filter_map(|(ordinal, request)| {
        let allocation = allocator.requests.all[*request].allocation?;
        Some(Grant { ordinal, ..grant_of(allocator, requester, *request, allocation) })
    });
    let mut granted = granted.collect::<Vec<_>>().into_iter();
    let missing = requests.iter().filter(|request| allocator.requests.all[**request].allocation.is_none());
    let missing = missing.filter_map(|request| rejections.get(request)).next().cloned();
    match (granted.next(), missing) {
        (Some(first), missing) => {
            Decision::Granted(Grants { first, others: granted.collect(), asked: requests.len(), missing })
        }
        (None, Some(rejection)) => Decision::Rejected(rejection),
        (None, None) => Decision::Direct,
    }
}

fn grant_of(allocator: &Allocator, requester: PolicyIndex, request: RequestIndex, index: AllocationIndex) -> Grant {
    let allocation = &allocator.allocations[index];
    let gateway_pool = &allocator.gateway_pools[allocation.gateway];
    // The default address is shared by design, as that of `allocate: Shared` is.
    let may_be_shared = allocation.address != gateway_pool.gateway.default_address
        && matches!(allocation.kind, AllocationKind::Explicit | AllocationKind::Service | AllocationKind::Pooled);
    Grant {
        gateway: gateway_pool.name.clone(),
        id: allocation.id,
        ordinal: 0,
        kind: allocation.kind,
        service: allocation.service.clone(),
        address: allocation.address.clone(),
        node: allocation.node.clone(),
        leaving: allocation.leaving.clone(),
        shared_with: may_be_shared.then(|| shared_with(allocator, requester, index)).flatten(),
        note: note(allocator, request, index),
    }
}

/// The other policies that use an allocation, the most senior first. Only the first three are named, so that a new
/// user does not change the status of all others.
fn shared_with(allocator: &Allocator, requester: PolicyIndex, allocation: AllocationIndex) -> Option<String> {
    let others: Vec<PolicyIndex> = allocator.users(allocation).into_iter().filter(|user| *user != requester).collect();
    let names = others.iter().take(3).map(|user| allocator.requests.requesters[*user].name.as_str());
    let more = if others.len() > 3 { " and others" } else { "" };
    (!others.is_empty()).then(|| names.collect::<Vec<_>>().join(", ") + more)
}

/// A remark for users about a granted allocation.
fn note(allocator: &Allocator, request: RequestIndex, index: AllocationIndex) -> Option<String> {
    let (allocation, request) = (&allocator.allocations[index], &allocator.requests.all[request]);
    if !matches!(request.kind, Kind::Dedicated(_) | Kind::Shared | Kind::Pooled) {
        return None;
    }
    let gateway_pool = &allocator.gateway_pools[allocation.gateway];
    for entry in allocator.in_cooldown.of(allocation.gateway, &request.policies) {
        // The address may belong to another policy by now, and then leaves the released entry at the next
        // computation.
        let left_pool = |a: &IpAddr| {
            !gateway_pool.declared.contains(*a)
                && !allocator.node_addresses.contains_key(a)
                && allocator.holder(*a).is_none()
        };
        if let Some(lost) = addresses(&entry.address).find(left_pool) {
            return Some(format!("{lost} is no longer in the gateway's pool, so the policy no longer uses it"));
        }
    }
    let lacking = Family::BOTH
        .into_iter()
        .find(|family| gateway_pool.open.has(*family) && of_pair(*family, &allocation.address).is_none())?;
    Some(format!(
        "the gateway has no {lacking} address left for it, so its {lacking} traffic is blocked; \
         add addresses to the gateway's spec.addresses"
    ))
}

fn add_accepted(conditions: &mut Conditions, allocator: &Allocator, gateway_pool: &GatewayPool) {
    let defaults: Vec<&str> =
        allocator.gateway_pools.iter().filter(|other| other.gateway.default).map(|other| &**other.name).collect();
    if let Some(fault) = &gateway_pool.gateway.fault {
        conditions.add("Accepted", false, "Invalid", format!("{fault}; {}", gateway_pool.gateway.while_invalid()));
    } else if let Some(overlap) = gateway_pool.overlaps.first() {
        let range = if overlap.first == overlap.last {
            overlap.first.to_string()
        } else {
            format!("{}-{}", overlap.first, overlap.last)
        };
        let more = match gateway_pool.overlaps.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more ranges)"),
        };
        let message = format!(
            "{range} is also in the pool of EgressGateway {:?}, which keeps it{more}; take it out of one of the pools",
            allocator.gateway_pools[overlap.with].name
        );
        conditions.add("Accepted", false, "PoolOverlap", message);
    } else if let Some((network, address)) = inside(allocator, gateway_pool) {
        let message = format!(
            "{address} is in {network}, a network of the cluster's pods or Services, and is not given to policies; \
             take it out of spec.addresses"
        );
        conditions.add("Accepted", false, "PoolInCluster", message);
    } else if gateway_pool.gateway.default && defaults.len() > 1 {
        let message = format!(
            "several gateways are the default one: {}; policies that name no gateway get no egress IP from them unless \
             they had one; leave default: true on one",
            defaults.join(", ")
        );
        conditions.add("Accepted", false, "SeveralDefaultGateways", message);
    } else if let Err(text) = cooldown_ended_until(gateway_pool.gateway) {
        let message = format!(
            "no other gateway has its addresses; the annotation {END_COOLDOWN} is ignored, because {text:?} is not a \
             time; write it like {}",
            "2026-01-31T12:00:00Z"
        );
        conditions.add("Accepted", true, "Accepted", message);
    } else {
        conditions.add("Accepted", true, "Accepted", "no other gateway has its addresses");
    }
}

fn add_ready(conditions: &mut Conditions, allocator: &Allocator, gateway_pool: &GatewayPool) {
    let matching = match gateway_pool.nodes.len() {
        1 => "1 node matches".to_owned(),
        n => format!("{n} nodes match"),
    };
    if gateway_pool.nodes.is_empty() {
        let message = "no node matches spec.nodeSelector; label a node, or correct the selector";
        conditions.add("Ready", false, "NoNode", message);
    } else if gateway_pool.nodes.iter().all(|(name, node)| node.is_lost(allocator.now) || !allocator.lives(name)) {
        let message = format!("{matching}, and none of them is known to be alive; see whether they run");
        conditions.add_unknown("Ready", "NodesUnreachable", message);
    } else {
        conditions.add("Ready", true, "NodesMatch", matching);
    }
}

/// `exhausted`: the rejection of a request, because the pool has no address for it.
fn add_addresses_left(
    conditions: &mut Conditions,
    gateway_pool: &GatewayPool,
    status: &EgressGatewayStatus,
    exhausted: Option<&Rejection>,
) {
    match exhausted {
        Some(rejection) => conditions.add("AddressesLeft", false, Reason::PoolExhausted, rejection.message.as_str()),
        None if gateway_pool.declared.is_empty() => {
            conditions.add("AddressesLeft", true, "NoPool", "the gateway has no pool")
        }
        None if gateway_pool.usable.is_empty() => {
            let message = "its whole pool belongs to other gateways; add addresses to spec.addresses";
            conditions.add("AddressesLeft", false, Reason::PoolEmpty, message);
        }
        None => conditions.add("AddressesLeft", true, "AddressesLeft", in_use(gateway_pool, status.usage)),
    }
}

fn conditions(
    allocator: &Allocator,
    index: GatewayIndex,
    gateway_pool: &GatewayPool,
    status: &EgressGatewayStatus,
    rejections: &HashMap<RequestIndex, Rejection>,
    ports: &PortReports,
) -> Vec<Condition> {
    let mut conditions =
        Conditions::new(&gateway_pool.gateway.status.conditions, gateway_pool.gateway.generation, allocator.now);
    add_accepted(&mut conditions, allocator, gateway_pool);
    add_ready(&mut conditions, allocator, gateway_pool);
    let of_gateway = allocator.requests.all.indexed().filter(|(_, request)| request.gateway == index);
    let exhausted = of_gateway.filter_map(|(d, _)| rejections.get(&d)).find(|r| r.reason == Reason::PoolExhausted);
    add_addresses_left(&mut conditions, gateway_pool, status, exhausted);
    let lives = |node: &Name| allocator.lives(node);
    let room = Room::new(allocator.cluster, gateway_pool.gateway, &status.allocations, lives);
    room.add_condition(&mut conditions, &status.allocations);
    probes::add_condition(&mut conditions, allocator, gateway_pool);
    if let Some(message) = ports.of_gateway(&status.allocations) {
        conditions.add(PORTS_NEARLY_EXHAUSTED, true, FEW_PORTS, message);
    }
    conditions.finish()
}

/// A network of pods or Services that overlaps the gateway's pool, and the first common address.
fn inside(allocator: &Allocator, gateway_pool: &GatewayPool) -> Option<(IpNetwork, IpAddr)> {
    gateway_pool.gateway.pool.iter().find_map(|range| allocator.inside_range(range))
}

/// How much of the pool is in use.
fn usage(gateway_pool: &GatewayPool, status: &EgressGatewayStatus) -> PoolUsage {
    let of = |family: Family| {
        let pool = |pair| of_pair(family, pair).is_some_and(|address| gateway_pool.usable.contains(address));
        let used = status.allocations.iter().filter(|p| p.kind != AllocationKind::Node && pool(&p.address)).count();
        let cooling = status.released.iter().filter(|r| pool(&r.address) && r.at > gateway_pool.ended_until).count();
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        gateway_pool.usable.has(family).then(|| FamilyUsage {
            total: i64::try_from(gateway_pool.usable.size(family)).unwrap_or(i64::MAX),
            used: number(used),
            cooling_down: number(cooling),
        })
    };
    PoolUsage { ipv4: of(Family::V4), ipv6: of(Family::V6) }
}

/// `IPv4: 3 of 10 in use, 1 in cooldown`.
fn in_use(gateway_pool: &GatewayPool, usage: PoolUsage) -> String {
    let families = [(Family::V4, usage.ipv4), (Family::V6, usage.ipv6)];
    let families = families.into_iter().filter_map(|(family, usage)| {
        let FamilyUsage { used, cooling_down, .. } = usage?;
        Some(format!("{family}: {used} of {} in use, {cooling_down} in cooldown", gateway_pool.usable.size(family)))
    });
    families.collect::<Vec<_>>().join("; ")
}
