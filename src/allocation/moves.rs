//! Allocations that change their node. After a takeover, the allocation follows the node that took it over. In a
//! planned move, the old node keeps the egress IP until the new one reports that it has it.

use super::allocator::Allocator;
use super::index::{AllocationIndex, GatewayIndex};
use crate::api::AllocationKind;
use crate::model::ownership::{self, Liveness, OwnershipInputs};
use crate::model::selector::Name;
use std::collections::{HashMap, HashSet};

/// What nodes report: the egress IPs that they hold and have taken over.
pub(super) struct NodeReports<'a> {
    held: HashMap<&'a str, HashSet<u16>>,
    taken: HashMap<(u16, i64), Vec<&'a str>>,
}

impl<'a> NodeReports<'a> {
    pub(super) fn new(allocator: &Allocator<'a>) -> Self {
        let mut reports = NodeReports { held: HashMap::new(), taken: HashMap::new() };
        for (name, status) in
            allocator.cluster.egress_nodes.iter().filter(|(n, _)| allocator.cluster.nodes.contains_key(*n))
        {
            let status = status.of_allocations();
            reports.held.insert(name, status.held.iter().copied().collect());
            for taken in &status.taken {
                reports.taken.entry((taken.id, taken.since)).or_default().push(name);
            }
        }
        reports
    }

    pub(super) fn holds(&self, node: &str, id: u16) -> bool {
        self.held.get(node).is_some_and(|allocations| allocations.contains(&id))
    }
}

/// Assigns an allocation to the node that has taken it over. A report counts only if its `since` is that of the
/// allocation.
pub(super) fn follow_takeovers(
    allocator: &mut Allocator,
    gateway: GatewayIndex,
    allocations: &[AllocationIndex],
    reports: &NodeReports,
) {
    for index in allocations
        .iter()
        .filter(|index| allocator.allocations[**index].kind != AllocationKind::Node)
        .collect::<Vec<_>>()
    {
        let allocation = &allocator.allocations[*index];
        let of_gateway = |name: &&str| allocator.gateway_pools[gateway].nodes.iter().any(|(n, _)| ***n == **name);
        let takers = reports.taken.get(&(allocation.id, allocation.since)).map(Vec::as_slice).unwrap_or_default();
        let takers: Vec<&str> = takers.iter().copied().filter(of_gateway).collect();
        let standing = OwnershipInputs {
            id: allocation.id,
            node: allocation.node.as_deref(),
            leaving: None,
            arrived: true,
            takers: &takers,
            members: &[],
            needs: &[],
        };
        // If several nodes report it, all nodes compute the same owner.
        let taker: Option<Name> = ownership::owner(standing, &Liveness::default()).map(Into::into);
        if taker.is_some() && taker != allocation.node {
            assign_node(allocator, *index, taker, None);
        }
    }
}

/// The allocations that a policy wants on another of these nodes (`egret.dev/move-to`), with that node. An allocation
/// of a node's own address cannot move.
pub(super) fn requested_moves(
    allocator: &Allocator,
    allocations: &[AllocationIndex],
    nodes: &HashMap<&Name, usize>,
) -> Vec<(AllocationIndex, Name)> {
    let requested_move = |index: &AllocationIndex| {
        let allocation = &allocator.allocations[*index];
        let wanted = requested_node(allocator, *index)?;
        let moves = allocation.kind != AllocationKind::Node
            && allocation.node.as_ref() != Some(wanted)
            && nodes.contains_key(wanted);
        moves.then(|| (*index, wanted.clone()))
    };
    allocations.iter().filter_map(requested_move).collect()
}

/// The node that policies request for an allocation. Of several policies with this allocation, the most senior one
/// that requests a node decides.
pub(super) fn requested_node<'b>(allocator: &'b Allocator, allocation: AllocationIndex) -> Option<&'b Name> {
    let policies = allocator.allocations[allocation]
        .requests
        .iter()
        .flat_map(|request| &allocator.requests.all[*request].policies);
    let asking = policies.min_by_key(|p| (allocator.requests.requesters[**p].policy.move_to().is_none(), **p))?;
    allocator.requests.requesters[*asking].policy.move_to()
}

/// Assigns an allocation to another node. If the old node reports that it holds the egress IP, it keeps it until the
/// new one does.
pub(super) fn move_to(allocator: &mut Allocator, index: AllocationIndex, node: Option<Name>, reports: &NodeReports) {
    let allocation = &allocator.allocations[index];
    let old = [allocation.node.clone(), allocation.leaving.clone()].into_iter().flatten();
    let leaving = old.into_iter().find(|old| reports.holds(old, allocation.id) && node.as_ref() != Some(old));
    assign_node(allocator, index, node.clone(), leaving.filter(|_| node.is_some()));
}

fn assign_node(allocator: &mut Allocator, index: AllocationIndex, node: Option<Name>, leaving: Option<Name>) {
    let now = allocator.now;
    let allocation = &mut allocator.allocations[index];
    if allocation.node != node {
        allocation.since = now.max(allocation.since + 1);
    }
    (allocation.node, allocation.leaving) = (node, leaving);
}

/// Ends the planned moves that are finished: the new node holds the egress IP, or the old one no longer does.
pub(super) fn finish(allocator: &mut Allocator, allocations: &[AllocationIndex], reports: &NodeReports) {
    for index in allocations {
        let allocation = &mut allocator.allocations[*index];
        let arrived = allocation.node.as_ref().is_none_or(|node| reports.holds(node, allocation.id));
        if arrived || allocation.leaving.as_ref().is_some_and(|old| !reports.holds(old, allocation.id)) {
            allocation.leaving = None;
        }
    }
}
