//! Spreads allocations evenly over the nodes of a gateway, where the annotation asks for it.
//!
//! As few allocations as possible are moved, each as a planned move: the old node holds the egress IP until the new
//! one does. Only some are moved at once, so that a big gateway is not moved all together. The next ones follow when
//! these have arrived.

use super::allocator::Allocator;
use super::moves::{self, Reports};
use super::place::AllocationPlace;
use crate::api::AllocationKind;
use crate::model::selector::Name;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// How many allocations of a gateway may be moving at once.
pub(super) const MAX_MOVING: usize = 16;

/// The allocations of one node.
#[derive(Default)]
struct NodeLoad {
    allocations: usize,
    /// The places of those that may be moved.
    movable: Vec<AllocationPlace>,
}

/// Moves some allocations from the nodes with the most to the nodes with the fewest. Only `nodes` take part, and of
/// those only nodes that can hold all that they have. Allocations that policies request on their node stay, and so do
/// nodes' own addresses.
pub(super) fn rebalance<'a>(
    allocator: &mut Allocator,
    allocations: &[AllocationPlace],
    nodes: impl Iterator<Item = &'a Name>,
    reports: &Reports,
) {
    let able = |name: &&Name| {
        allocator.cluster.egress_nodes.get(*name).is_none_or(|status| status.of_allocations().refused.is_empty())
    };
    let mut loads: BTreeMap<Name, NodeLoad> =
        nodes.filter(able).map(|name| (name.clone(), NodeLoad::default())).collect();
    let mut moving = 0;
    for place in allocations {
        let allocation = &allocator.allocations[*place];
        let Some(node) = &allocation.node else { continue };
        let Some(load) = loads.get_mut(node) else { continue };
        load.allocations += 1;
        moving += usize::from(allocation.leaving.is_some() && !reports.holds(node, allocation.id));
        let wanted_here = moves::requested_node(allocator, *place) == Some(node);
        if !wanted_here && allocation.leaving.is_none() && allocation.kind != AllocationKind::Node {
            load.movable.push(*place);
        }
    }
    for _ in moving..MAX_MOVING {
        let fewest =
            loads.iter().min_by_key(|(_, load)| load.allocations).map(|(name, b)| (name.clone(), b.allocations));
        let most = loads.iter_mut().filter(|(_, load)| !load.movable.is_empty());
        let most = most.max_by_key(|(name, load)| (load.allocations, Reverse((*name).clone())));
        let (Some((to, fewest)), Some((_, from))) = (fewest, most) else { return };
        if from.allocations < fewest + 2 {
            return;
        }
        let Some(allocation) = from.movable.pop() else { return };
        from.allocations -= 1;
        if let Some(load) = loads.get_mut(&to) {
            load.allocations += 1;
        }
        moves::move_to(allocator, allocation, Some(to), reports);
    }
}
