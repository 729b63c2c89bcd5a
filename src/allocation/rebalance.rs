//! Evening out how many allocations each of a gateway's nodes has, where that is asked for.
//!
//! As few allocations as can be are moved, and each as any planned move: the old node has it until the new one does. Not many
//! are on their way at once, so that a big gateway is not all in motion; the next ones follow when these have arrived.

use super::allocator::Allocator;
use super::moves::{self, Reports};
use crate::api::AllocationKind;
use crate::model::selector::Name;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// So many of a gateway's allocations are on their way at once.
pub(super) const AT_ONCE: usize = 16;

/// What is on a node.
#[derive(Default)]
struct Burden {
    allocations: usize,
    /// Those that may be moved.
    loose: Vec<usize>,
}

/// Moves some of a gateway's allocations from where there are the most to where there are the fewest; `nodes` can take part.
/// A node that cannot hold what it has gets nothing. Allocations that policies kind where they are stay, and so do nodes' own
/// addresses.
pub(super) fn rebalance<'a>(
    allocator: &mut Allocator,
    allocations: &[usize],
    nodes: impl Iterator<Item = &'a Name>,
    reports: &Reports,
) {
    let able = |name: &&Name| {
        allocator.cluster.egress_nodes.get(*name).is_none_or(|status| status.of_allocations().refused.is_empty())
    };
    let mut burdens: BTreeMap<Name, Burden> =
        nodes.filter(able).map(|name| (name.clone(), Burden::default())).collect();
    let mut on_the_way = 0;
    for place in allocations {
        let allocation = &allocator.allocations[*place];
        let Some(node) = &allocation.node else { continue };
        let Some(burden) = burdens.get_mut(node) else { continue };
        burden.allocations += 1;
        on_the_way += usize::from(allocation.leaving.is_some() && !reports.holds(node, allocation.id));
        let wanted_here = moves::wish(allocator, *place) == Some(node);
        if !wanted_here && allocation.leaving.is_none() && allocation.kind != AllocationKind::Node {
            burden.loose.push(*place);
        }
    }
    for _ in on_the_way..AT_ONCE {
        let fewest =
            burdens.iter().min_by_key(|(_, burden)| burden.allocations).map(|(name, b)| (name.clone(), b.allocations));
        let most = burdens.iter_mut().filter(|(_, burden)| !burden.loose.is_empty());
        let most = most.max_by_key(|(name, burden)| (burden.allocations, Reverse((*name).clone())));
        let (Some((to, fewest)), Some((_, from))) = (fewest, most) else { return };
        if from.allocations < fewest + 2 {
            return;
        }
        let Some(allocation) = from.loose.pop() else { return };
        from.allocations -= 1;
        if let Some(burden) = burdens.get_mut(&to) {
            burden.allocations += 1;
        }
        moves::move_to(allocator, allocation, Some(to), reports);
    }
}
