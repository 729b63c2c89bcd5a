//! Assigns allocations to nodes.

use super::allocator::Allocator;
use super::index::{AllocationIndex, GatewayIndex, List};
use super::load::Load;
use super::moves::{self, NodeReports};
use super::rebalance;
use super::services::Announcements;
use super::unreached::{self, SourceNodes};
use crate::api::{AllocationKind, Placement};
use crate::model::Node;
use crate::model::capacity::Capacity;
use crate::model::drain::is_drained;
use crate::model::selector::Name;
use std::collections::HashMap;

/// Assigns each allocation to a node of its gateway. It stays on its node while that is a node of the gateway and is
/// not drained (or all nodes are), until a rebalance is requested.
pub(super) fn place(allocator: &mut Allocator) {
    let (reports, sources) = (NodeReports::new(allocator), SourceNodes::new(allocator));
    let mut allocations_of: List<GatewayIndex, Vec<AllocationIndex>> = allocator.gateway_pools.map(|_| Vec::new());
    for (index, allocation) in allocator.allocations.indexed() {
        allocations_of[allocation.gateway].push(index);
    }
    for (gateway, allocations) in allocations_of.into_indexed() {
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
    fn new(allocator: &Allocator<'a>, gateway: GatewayIndex) -> Self {
        let nodes = allocator.gateway_pools[gateway].nodes.clone();
        let is_drained = |node: &Node| is_drained(allocator.gateway_pools[gateway].gateway, node);
        let all_drained = nodes.iter().all(|(_, node)| is_drained(node));
        let open = nodes.iter().enumerate().filter(|(_, (_, node))| all_drained || !is_drained(node));
        let open: HashMap<&Name, usize> = open.map(|(index, (name, _))| (*name, index)).collect();
        let anybody = nodes.iter().any(|(name, _)| allocator.is_reachable(name));
        let least = open.keys().filter(|name| allocator.lives(name)).map(|name| allocator.lacks(name, gateway)).min();
        let ready = |name: &Name| {
            allocator.lives(name)
                && (allocator.is_reachable(name) || !anybody)
                && Some(allocator.lacks(name, gateway)) == least
        };
        let ready = open.iter().filter(|(name, _)| ready(name)).map(|(name, index)| (*name, *index)).collect();
        Candidates { nodes, open, ready }
    }
}

/// A gateway's nodes and how much each has, while allocations are assigned to them.
struct Balance<'b, 'a> {
    allocator: &'b mut Allocator<'a>,
    candidates: &'b Candidates<'a>,
    load: Load,
    reports: &'b NodeReports<'a>,
}

impl Balance<'_, '_> {
    /// Counts what each node has.
    fn count(&mut self, allocations: &[AllocationIndex]) {
        for index in allocations {
            let allocation = &self.allocator.allocations[*index];
            let of = |node: &Option<Name>| self.candidates.open.get(node.as_ref()?).copied();
            match of(&allocation.node) {
                Some(node) if allocation.kind == AllocationKind::Node => self.load.add_own(node),
                Some(node) => self.load.add(node),
                None => {}
            }
            // It counts on both nodes until the move is finished.
            if let Some(node) = of(&allocation.leaving) {
                self.load.add_leaving(node);
            }
        }
    }

    /// Assigns an allocation to a node, or to none.
    fn assign(&mut self, allocation: AllocationIndex, to: Option<usize>) {
        let from = self.allocator.allocations[allocation].node.as_ref();
        if let Some(from) = from.and_then(|name| self.candidates.open.get(name)) {
            self.load.move_from(*from);
        }
        let node = to.map(|index| self.candidates.nodes[index].0.clone());
        moves::move_to(self.allocator, allocation, node, self.reports);
        if let Some(index) = to {
            self.load.add(index);
        }
    }

    /// The node with room, among those for which `fits`, that has the fewest allocations. Of several egress IPs of a
    /// policy, as few as possible are on one node.
    fn find(&self, allocation: AllocationIndex, fits: impl Fn(&Name) -> bool) -> Option<usize> {
        let name = |index: &usize| self.candidates.nodes[*index].0;
        let mut fitting = self.load.indices().filter(|index| fits(name(index)));
        let siblings = siblings(self.allocator, allocation);
        if siblings.is_empty() {
            return fitting.next();
        }
        fitting.min_by_key(|index| siblings.get(name(index)).copied().unwrap_or_default())
    }

    fn is_ready(&self, name: &Name) -> bool {
        self.candidates.ready.contains_key(name)
    }

    /// Moves allocations from living nodes that have more than their maximum, which was lowered, as long as others have
    /// room.
    fn relieve(&mut self, allocations: &[AllocationIndex]) {
        for (index, mut excess) in self.load.above_maximum() {
            let node = self.candidates.nodes[index].0;
            if !self.allocator.lives(node) {
                continue;
            }
            for allocation in allocations.iter().rev() {
                let entry = &self.allocator.allocations[*allocation];
                let is_here = entry.node.as_ref() == Some(node) && entry.kind != AllocationKind::Node;
                let is_wanted = moves::requested_node(self.allocator, *allocation) == Some(node);
                if excess == 0 || !is_here || entry.leaving.is_some() || is_wanted {
                    continue;
                }
                let Some(to) = self.find(*allocation, |name| self.is_ready(name)) else { break };
                self.assign(*allocation, Some(to));
                excess -= 1;
            }
        }
    }
}

/// Assigns new allocations to the living node with the fewest for its weight. An existing allocation moves only if there
/// is a node that it can be moved to, or its node no longer belongs to the gateway. While no node has room, an
/// allocation has none.
fn balance<'a>(
    allocator: &mut Allocator<'a>,
    gateway: GatewayIndex,
    allocations: &[AllocationIndex],
    (sources, reports): (&SourceNodes<'a>, &NodeReports<'a>),
) {
    let candidates = Candidates::new(allocator, gateway);
    let capacity = |index: &usize| Capacity::of(allocator.gateway_pools[gateway].gateway, candidates.nodes[*index].1);
    let load = Load::new(candidates.open.values().map(|index| (*index, capacity(index))));
    let mut balance = Balance { allocator, candidates: &candidates, load, reports };
    balance.count(allocations);
    for (allocation, node) in moves::requested_moves(balance.allocator, allocations, &candidates.ready) {
        let index = candidates.ready[&node];
        if !sources.is_unreached_by_all(balance.allocator, allocation, &node) && balance.load.has_room(index) {
            balance.assign(allocation, Some(index));
        }
    }
    balance.relieve(allocations);
    for allocation in allocations.iter().copied() {
        let entry = &balance.allocator.allocations[allocation];
        let node = entry.node.clone();
        let is_placed = node.as_ref().is_some_and(|name| candidates.open.contains_key(name));
        if is_placed || entry.kind == AllocationKind::Node {
            continue;
        }
        let stays =
            node.as_ref().is_some_and(|name| candidates.nodes.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok());
        let found = balance.find(allocation, |name| balance.is_ready(name));
        let found = match node {
            None => found.or_else(|| balance.find(allocation, |name| balance.allocator.lives(name))),
            Some(_) => found,
        };
        match found {
            None if stays => {}
            found => balance.assign(allocation, found.or_else(|| balance.load.least())),
        }
    }
    let Balance { allocator, mut load, .. } = balance;
    unreached::move_on(allocator, gateway, allocations, (&candidates.ready, &mut load), (sources, reports));
    if allocator.gateway_pools[gateway].gateway.rebalance {
        let ready = candidates.ready.iter().map(|(name, index)| (*name, *index));
        let ready = ready.filter(|(name, _)| !sources.is_unreached_by_any(name));
        rebalance::rebalance(allocator, allocations, (ready, &candidates.nodes), &mut load, reports);
    }
}

/// How many other egress IPs each node has of the allocation's most senior policy that has several.
fn siblings(allocator: &Allocator, allocation: AllocationIndex) -> HashMap<Name, u32> {
    let requests = allocator.allocations[allocation].requests.iter();
    let policies = requests.flat_map(|request| allocator.requests.all[*request].policies.iter().copied());
    let several = policies.filter(|policy| allocator.requests.of[*policy].as_ref().is_ok_and(|of| of.len() > 1));
    let mut counts = HashMap::new();
    let Some(Ok(requests)) = several.min().map(|policy| &allocator.requests.of[policy]) else { return counts };
    let others = requests.iter().filter_map(|request| allocator.requests.all[*request].allocation);
    let nodes =
        others.filter(|other| *other != allocation).filter_map(|other| allocator.allocations[other].node.clone());
    nodes.for_each(|node| *counts.entry(node).or_default() += 1);
    counts
}

/// External placement: the node that reports the address on an interface holds the allocation. If no node has a
/// Service's address, the node holds it that announces it, as its load balancer says.
fn follow(allocator: &mut Allocator, gateway: GatewayIndex, allocations: &[AllocationIndex]) {
    let mut reported: HashMap<u16, Vec<&Name>> = HashMap::new();
    for (name, _) in &allocator.gateway_pools[gateway].nodes {
        let node = allocator.cluster.egress_nodes.get(*name);
        for id in node.into_iter().flat_map(|node| node.of_allocations().on_interface()) {
            reported.entry(id).or_default().push(name);
        }
    }
    let of_services = allocations.iter().any(|index| allocator.allocations[*index].service.is_some());
    let announcements = of_services.then(|| Announcements::new(allocator.cluster));
    for index in allocations {
        if allocator.allocations[*index].kind == AllocationKind::Node {
            continue;
        }
        let service = allocator.allocations[*index].service.as_ref();
        let announcer = announcements.as_ref().zip(service);
        let announcer = announcer.and_then(|(all, service)| all.node_of(service, |node| allocator.lives(node)));
        let is_service = service.is_some();
        let now = allocator.now;
        let allocation = &mut allocator.allocations[*index];
        let had_none = allocation.node.is_none();
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
        // Since when some node has had it.
        if had_none && allocation.node.is_some() {
            allocation.since = now;
        }
    }
}
