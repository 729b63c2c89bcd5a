//! Spreads allocations over the nodes of a gateway by their weights, where the annotation asks for it.
//!
//! As few allocations as possible are moved, each as a planned move: the old node holds the egress IP until the new
//! one does. Only some are moved at once, so that a big gateway is not moved all together. The next ones follow when
//! these have arrived.

use super::allocator::Allocator;
use super::index::AllocationIndex;
use super::load::Load;
use super::moves::{self, NodeReports};
use crate::api::AllocationKind;
use crate::model::Node;
use crate::model::capacity::{Capacity, Quotient};
use crate::model::selector::Name;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// How many allocations of a gateway may be moving at once.
pub(super) const MAX_MOVING: usize = 16;

/// The allocations of one node.
struct NodeLoad {
    /// The index of the node among the gateway's.
    index: usize,
    capacity: Capacity,
    allocations: u32,
    /// The indices of those that may be moved.
    movable: Vec<AllocationIndex>,
}

impl NodeLoad {
    /// Where it stands for one more allocation.
    fn next(&self) -> Quotient {
        self.capacity.next(self.allocations)
    }

    /// Where it stood for its last allocation.
    fn last(&self) -> Quotient {
        self.capacity.next(self.allocations.saturating_sub(1))
    }
}

/// Moves some allocations from the nodes with the most to the nodes with the fewest, by weight. Only `ready` nodes take
/// part, of which `load` says which have room, and of those only nodes that can hold all that they have. Allocations that
/// policies request on their node stay, and so do nodes' own addresses.
pub(super) fn rebalance<'a>(
    allocator: &mut Allocator,
    allocations: &[AllocationIndex],
    (ready, nodes): (impl Iterator<Item = (&'a Name, usize)>, &[(&Name, &Node)]),
    load: &mut Load,
    reports: &NodeReports,
) {
    let able = |name: &Name| {
        allocator.cluster.egress_nodes.get(name).is_none_or(|status| status.of_allocations().refused.is_empty())
    };
    let Some(gateway) = allocations.first().map(|first| allocator.allocations[*first].gateway) else { return };
    let of = |(name, index): (&Name, usize)| {
        let capacity = Capacity::of(allocator.gateway_pools[gateway].gateway, nodes[index].1);
        (name.clone(), NodeLoad { index, capacity, allocations: 0, movable: Vec::new() })
    };
    let mut loads: BTreeMap<Name, NodeLoad> = ready.filter(|(name, _)| able(name)).map(of).collect();
    let mut moving = 0;
    for index in allocations {
        let allocation = &allocator.allocations[*index];
        let Some(node) = &allocation.node else { continue };
        let Some(load) = loads.get_mut(node) else { continue };
        load.allocations += 1;
        moving += usize::from(allocation.leaving.is_some() && !reports.holds(node, allocation.id));
        let wanted_here = moves::requested_node(allocator, *index) == Some(node);
        if !wanted_here && allocation.leaving.is_none() && allocation.kind != AllocationKind::Node {
            load.movable.push(*index);
        }
    }
    for _ in moving..MAX_MOVING {
        let open = loads.iter().filter(|(_, of)| load.has_room(of.index));
        let fewest = open.min_by_key(|(_, of)| of.next()).map(|(name, of)| (name.clone(), of.next()));
        let most = loads.iter_mut().filter(|(_, of)| !of.movable.is_empty());
        let most = most.max_by_key(|(name, of)| (of.last(), Reverse((*name).clone())));
        let (Some((to, next)), Some((_, from))) = (fewest, most) else { return };
        if from.last() <= next {
            return;
        }
        let Some(allocation) = from.movable.pop() else { return };
        from.allocations -= 1;
        load.move_from(from.index);
        if let Some(of) = loads.get_mut(&to) {
            of.allocations += 1;
            load.add(of.index);
        }
        moves::move_to(allocator, allocation, Some(to), reports);
    }
}
