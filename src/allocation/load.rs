//! How many allocations each node of a gateway has, and which node is to have the next one.

use crate::model::capacity::{Capacity, Quotient};
use std::collections::{BTreeSet, HashMap};

/// How many allocations each node has. Nodes are given by their indices among the gateway's nodes, which are sorted by
/// name.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    /// Where each node stands for the next allocation, and its index.
    order: BTreeSet<(Quotient, usize)>,
    nodes: HashMap<usize, OfNode>,
}

/// The allocations of one node.
#[derive(Clone, Copy, Debug, Default)]
struct OfNode {
    capacity: Capacity,
    /// All that are assigned to it.
    count: u32,
    /// Those of them that count for its maximum: not the node's own addresses.
    limited: u32,
    /// Those that it holds until another node does.
    leaving: u32,
}

impl Load {
    pub(super) fn new(nodes: impl IntoIterator<Item = (usize, Capacity)>) -> Self {
        let of = |(index, capacity)| (index, OfNode { capacity, ..OfNode::default() });
        let nodes: HashMap<usize, OfNode> = nodes.into_iter().map(of).collect();
        Load { order: nodes.iter().map(|(index, node)| (node.capacity.next(0), *index)).collect(), nodes }
    }

    fn change(&mut self, index: usize, change: impl FnOnce(&mut OfNode)) {
        if let Some(node) = self.nodes.get_mut(&index) {
            self.order.remove(&(node.capacity.next(node.count), index));
            change(node);
            self.order.insert((node.capacity.next(node.count), index));
        }
    }

    /// Counts one more allocation for the node.
    pub(super) fn add(&mut self, index: usize) {
        self.change(index, |node| {
            node.count += 1;
            node.limited += 1;
        });
    }

    /// Counts one more allocation for the node that does not count for its maximum.
    pub(super) fn add_own(&mut self, index: usize) {
        self.change(index, |node| node.count += 1);
    }

    /// Counts an allocation that the node holds until another one does.
    pub(super) fn add_leaving(&mut self, index: usize) {
        self.change(index, |node| node.leaving += 1);
    }

    /// Counts that an allocation moves from a node, which may still hold it.
    pub(super) fn move_from(&mut self, index: usize) {
        self.change(index, |node| {
            node.count = node.count.saturating_sub(1);
            node.limited = node.limited.saturating_sub(1);
            node.leaving += 1;
        });
    }

    /// Whether the node may have one more.
    pub(super) fn has_room(&self, index: usize) -> bool {
        self.nodes.get(&index).is_some_and(|node| node.capacity.has_room(node.limited + node.leaving))
    }

    /// The nodes that have more than their maximum, and how many more.
    pub(super) fn above_maximum(&self) -> Vec<(usize, u32)> {
        let excess = |node: &OfNode| node.capacity.most.map_or(0, |most| node.limited.saturating_sub(most));
        let all = self.nodes.iter().map(|(index, node)| (*index, excess(node)));
        let mut all: Vec<(usize, u32)> = all.filter(|(_, excess)| *excess > 0).collect();
        all.sort_unstable();
        all
    }

    /// The node with room that has the fewest allocations for its weight; of several, the first by name.
    pub(super) fn least(&self) -> Option<usize> {
        self.indices().next()
    }

    /// The nodes with room, those with the fewest allocations for their weight first.
    pub(super) fn indices(&self) -> impl Iterator<Item = usize> {
        self.order.iter().map(|(_, index)| *index).filter(|index| self.has_room(*index))
    }
}
