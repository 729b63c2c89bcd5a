//! Assigns allocations to nodes.

use super::allocator::Allocator;
use super::moves::{self, Reports};
use super::place::{AllocationPlace, GatewayPlace, List};
use super::rebalance;
use super::services::Announcements;
use super::unreached::{self, SourceNodes};
use crate::api::{AllocationKind, Placement};
use crate::model::Node;
use crate::model::drain::is_drained;
use crate::model::selector::Name;
use std::collections::{BTreeSet, HashMap};

/// How many allocations each node has. Nodes are given by their places among the gateway's nodes, which are sorted by
/// name.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    /// Count and place of each node.
    order: BTreeSet<(u32, usize)>,
    count: HashMap<usize, u32>,
}

impl Load {
    pub(super) fn new(places: impl IntoIterator<Item = usize>) -> Self {
        let count: HashMap<usize, u32> = places.into_iter().map(|place| (place, 0)).collect();
        Load { order: count.keys().map(|place| (0, *place)).collect(), count }
    }

    /// Counts one more allocation for the node.
    pub(super) fn add(&mut self, place: usize) {
        if let Some(count) = self.count.get_mut(&place) {
            self.order.remove(&(*count, place));
            *count += 1;
            self.order.insert((*count, place));
        }
    }

    /// The node with the fewest allocations; of several, the first by name.
    pub(super) fn least(&self) -> Option<usize> {
        self.order.first().map(|(_, place)| *place)
    }

    /// All nodes, those with the fewest allocations first.
    pub(super) fn places(&self) -> impl Iterator<Item = usize> {
        self.order.iter().map(|(_, place)| *place)
    }
}

/// Assigns each allocation to a node of its gateway. It stays on its node while that is a node of the gateway and is
/// not drained (or all nodes are), until a rebalance is requested.
pub(super) fn place(allocator: &mut Allocator) {
    let (reports, sources) = (Reports::new(allocator), SourceNodes::new(allocator));
    let mut allocations_of: List<GatewayPlace, Vec<AllocationPlace>> = allocator.gateway_pools.map(|_| Vec::new());
    for (place, allocation) in allocator.allocations.with_places() {
        allocations_of[allocation.gateway].push(place);
    }
    for (gateway, allocations) in allocations_of.into_places() {
        match allocator.gateway_pools[gateway].gateway.placement {
            Placement::Managed => {
                moves::follow_takeovers(allocator, gateway, &allocations, &reports);
                if !allocator.gateway_pools[gateway].gateway.frozen {
                    balance(allocator, gateway, &allocations, (&sources, &reports));
                }
                moves::finish(allocator, &allocations, &reports);
            }
            Placement::External => follow(allocator, gateway, &allocations),
        }
    }
}

/// The nodes of a gateway that can hold allocations.
struct Candidates<'a> {
    /// All nodes of the gateway, sorted by name.
    nodes: Vec<(&'a Name, &'a Node)>,
    /// The nodes that are not drained, or all nodes if all are drained: then allocations stay.
    open: HashMap<&'a Name, usize>,
    /// The nodes among them that an allocation can be moved to: they count as alive, and none has lost fewer of its
    /// uplinks.
    ready: HashMap<&'a Name, usize>,
}

impl<'a> Candidates<'a> {
    fn new(allocator: &Allocator<'a>, gateway: GatewayPlace) -> Self {
        let nodes = allocator.gateway_pools[gateway].nodes.clone();
        let is_drained = |node: &Node| is_drained(allocator.gateway_pools[gateway].gateway, node);
        let all_drained = nodes.iter().all(|(_, node)| is_drained(node));
        let open = nodes.iter().enumerate().filter(|(_, (_, node))| all_drained || !is_drained(node));
        let open: HashMap<&Name, usize> = open.map(|(place, (name, _))| (*name, place)).collect();
        let anybody = nodes.iter().any(|(name, _)| allocator.is_reachable(name));
        let least = open.keys().filter(|name| allocator.lives(name)).map(|name| allocator.lacks(name, gateway)).min();
        let ready = |name: &Name| {
            allocator.lives(name)
                && (allocator.is_reachable(name) || !anybody)
                && Some(allocator.lacks(name, gateway)) == least
        };
        let ready = open.iter().filter(|(name, _)| ready(name)).map(|(name, place)| (*name, *place)).collect();
        Candidates { nodes, open, ready }
    }
}

/// Assigns new allocations to the living node with the fewest. An existing allocation moves only if there is a node
/// that it can be moved to, or its node no longer belongs to the gateway.
fn balance<'a>(
    allocator: &mut Allocator<'a>,
    gateway: GatewayPlace,
    allocations: &[AllocationPlace],
    (sources, reports): (&SourceNodes<'a>, &Reports),
) {
    let candidates = Candidates::new(allocator, gateway);
    for (allocation, node) in moves::requested_moves(allocator, allocations, &candidates.ready) {
        if !sources.all_miss(allocator, allocation, &node) {
            moves::move_to(allocator, allocation, Some(node), reports);
        }
    }
    let mut load = Load::new(candidates.open.values().copied());
    let mut unplaced = Vec::new();
    for allocation in allocations {
        match allocator.allocations[*allocation].node.as_ref().and_then(|name| candidates.open.get(name)) {
            Some(place) => load.add(*place),
            None if allocator.allocations[*allocation].kind == AllocationKind::Node => {}
            None => unplaced.push(*allocation),
        }
    }
    for allocation in unplaced {
        let node = allocator.allocations[allocation].node.as_ref();
        let stays = node.is_some_and(|name| candidates.nodes.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok());
        let is_ready = |place: &usize| candidates.ready.contains_key(candidates.nodes[*place].0);
        let lives = |place: &usize| allocator.lives(candidates.nodes[*place].0);
        let siblings = siblings(allocator, allocation);
        // Of several egress IPs of a policy, as few as possible are on one node.
        let apart = |place: &usize| siblings.get(candidates.nodes[*place].0).copied().unwrap_or_default();
        let found = load.places().filter(is_ready).min_by_key(apart);
        let found =
            if node.is_some() { found } else { found.or_else(|| load.places().filter(lives).min_by_key(apart)) };
        let place = match found {
            None if stays => continue,
            found => found.or_else(|| load.least()),
        };
        moves::move_to(allocator, allocation, place.map(|place| candidates.nodes[place].0.clone()), reports);
        if let Some(place) = place {
            load.add(place);
        }
    }
    unreached::move_on(allocator, gateway, allocations, (&candidates.ready, &mut load), (sources, reports));
    if allocator.gateway_pools[gateway].gateway.rebalance {
        let ready = candidates.ready.into_keys().filter(|name| !sources.miss(name));
        rebalance::rebalance(allocator, allocations, ready, reports);
    }
}

/// How many other egress IPs of the allocation's policies each node has.
fn siblings(allocator: &Allocator, allocation: AllocationPlace) -> HashMap<Name, u32> {
    let mut counts = HashMap::new();
    for policy in allocator.users(allocation) {
        let Some(requests @ [_, _, ..]) = allocator.requests.of[policy].as_deref().ok() else { continue };
        let others = requests.iter().filter_map(|request| allocator.requests.all[*request].allocation);
        let nodes =
            others.filter(|other| *other != allocation).filter_map(|other| allocator.allocations[other].node.clone());
        nodes.for_each(|node| *counts.entry(node).or_default() += 1);
    }
    counts
}

/// External placement: the node that reports the address on an interface holds the allocation. If no node has a
/// Service's address, the node holds it that announces it, as its load balancer says.
fn follow(allocator: &mut Allocator, gateway: GatewayPlace, allocations: &[AllocationPlace]) {
    let mut reported: HashMap<u16, Vec<&Name>> = HashMap::new();
    for (name, _) in &allocator.gateway_pools[gateway].nodes {
        let node = allocator.cluster.egress_nodes.get(*name);
        for id in node.into_iter().flat_map(|node| node.of_allocations().on_interface()) {
            reported.entry(id).or_default().push(name);
        }
    }
    let of_services = allocations.iter().any(|place| allocator.allocations[*place].service.is_some());
    let announcements = of_services.then(|| Announcements::new(allocator.cluster));
    for place in allocations {
        if allocator.allocations[*place].kind == AllocationKind::Node {
            continue;
        }
        let service = allocator.allocations[*place].service.as_ref();
        let announcer = announcements.as_ref().zip(service);
        let announcer = announcer.and_then(|(all, service)| all.node_of(service, |node| allocator.lives(node)));
        let is_service = service.is_some();
        let allocation = &mut allocator.allocations[*place];
        let here =
            |name: &Name| allocator.gateway_pools[gateway].nodes.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok();
        allocation.node = match (allocation.node.take(), reported.get(&allocation.id)) {
            (_, Some(reporters)) if announcer.is_some_and(|node| reporters.contains(&node)) => announcer.cloned(),
            // While an address moves, two nodes may report it.
            (Some(node), Some(reporters)) if reporters.contains(&&node) => Some(node),
            (_, Some(reporters)) => reporters.first().map(|name| Name::clone(name)),
            (_, None) if is_service => announcer.filter(|node| here(node)).cloned(),
            (node, None) => node.filter(here),
        };
    }
}
