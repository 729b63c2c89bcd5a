//! Allocations that change their node. What a node has taken over from a dead one stays with it; what is moved on purpose
//! stays with the old node until the new one says that it has it.

use super::allocator::Allocator;
use crate::api::AllocationKind;
use crate::model::ownership::{self, Liveness, Standing};
use crate::model::selector::Name;
use std::collections::{HashMap, HashSet};

/// What nodes say that they have.
pub(super) struct Reports<'a> {
    held: HashMap<&'a str, HashSet<u16>>,
    taken: HashMap<(u16, i64), Vec<&'a str>>,
}

impl<'a> Reports<'a> {
    pub(super) fn new(allocator: &Allocator<'a>) -> Self {
        let mut reports = Reports { held: HashMap::new(), taken: HashMap::new() };
        for (name, status) in
            allocator.cluster.egress_nodes.iter().filter(|(n, _)| allocator.cluster.nodes.contains_key(*n))
        {
            let said = status.of_allocations();
            reports.held.insert(name, said.held.iter().copied().collect());
            for taken in &said.taken {
                reports.taken.entry((taken.id, taken.since)).or_default().push(name);
            }
        }
        reports
    }

    pub(super) fn holds(&self, node: &str, id: u16) -> bool {
        self.held.get(node).is_some_and(|allocations| allocations.contains(&id))
    }
}

/// The allocations follow a node that has taken an allocation over. What was said of older allocations counts no more.
pub(super) fn follow_takeovers(allocator: &mut Allocator, gateway: usize, allocations: &[usize], reports: &Reports) {
    for place in allocations
        .iter()
        .filter(|place| allocator.allocations[**place].kind != AllocationKind::Node)
        .collect::<Vec<_>>()
    {
        let allocation = &allocator.allocations[*place];
        let of_gateway = |name: &&str| allocator.gateway_pools[gateway].nodes.iter().any(|(n, _)| ***n == **name);
        let takers = reports.taken.get(&(allocation.id, allocation.since)).map(Vec::as_slice).unwrap_or_default();
        let takers: Vec<&str> = takers.iter().copied().filter(of_gateway).collect();
        let standing = Standing {
            id: allocation.id,
            node: allocation.node.as_deref(),
            leaving: None,
            arrived: true,
            takers: &takers,
            members: &[],
            needs: &[],
        };
        // All nodes see the same one of several as the owner.
        let taker: Option<Name> = ownership::owner(standing, &Liveness::default()).map(Into::into);
        if taker.is_some() && taker != allocation.node {
            give(allocator, *place, taker, None);
        }
    }
}

/// The allocations that a policy kinds on another of these nodes, and on which. An allocation that is a node's own address cannot
/// move.
pub(super) fn asked_for(
    allocator: &Allocator,
    allocations: &[usize],
    nodes: &HashMap<&Name, usize>,
) -> Vec<(usize, Name)> {
    let asked = |place: &usize| {
        let allocation = &allocator.allocations[*place];
        let wanted = wish(allocator, *place)?;
        let moves = allocation.kind != AllocationKind::Node
            && allocation.node.as_ref() != Some(wanted)
            && nodes.contains_key(wanted);
        moves.then(|| (*place, wanted.clone()))
    };
    allocations.iter().filter_map(asked).collect()
}

/// The node that an allocation is wanted on. Of several policies with the same allocation, the most senior one that says something
/// decides.
pub(super) fn wish<'b>(allocator: &'b Allocator, allocation: usize) -> Option<&'b Name> {
    let policies = allocator.allocations[allocation]
        .requests
        .iter()
        .flat_map(|request| &allocator.requests.all[*request].policies);
    let asking = policies.min_by_key(|p| (allocator.requests.requesters[**p].policy.move_to().is_none(), **p))?;
    allocator.requests.requesters[*asking].policy.move_to()
}

/// Gives an allocation another node. If an old one says that it has it, it keeps it until the new one does.
pub(super) fn move_to(allocator: &mut Allocator, place: usize, node: Option<Name>, reports: &Reports) {
    let allocation = &allocator.allocations[place];
    let old = [allocation.node.clone(), allocation.leaving.clone()].into_iter().flatten();
    let leaving = old.into_iter().find(|old| reports.holds(old, allocation.id) && node.as_ref() != Some(old));
    give(allocator, place, node.clone(), leaving.filter(|_| node.is_some()));
}

fn give(allocator: &mut Allocator, place: usize, node: Option<Name>, leaving: Option<Name>) {
    let now = allocator.now;
    let allocation = &mut allocator.allocations[place];
    if allocation.node != node {
        allocation.since = now.max(allocation.since + 1);
    }
    (allocation.node, allocation.leaving) = (node, leaving);
}

/// Ends the moves that are over: the new node has the allocation, or the old one has it no more.
pub(super) fn finish(allocator: &mut Allocator, allocations: &[usize], reports: &Reports) {
    for place in allocations {
        let allocation = &mut allocator.allocations[*place];
        let arrived = allocation.node.as_ref().is_none_or(|node| reports.holds(node, allocation.id));
        if arrived || allocation.leaving.as_ref().is_some_and(|old| !reports.holds(old, allocation.id)) {
            allocation.leaving = None;
        }
    }
}
