//! The owner of an egress IP. Every node computes it from the same cluster state, without a vote and without
//! messages.
//!
//! The node that the allocation names is the owner while it is alive. When it dies, the first living node in the
//! order of the allocation takes over. Each allocation has another order, so that the egress IPs of a dead node
//! spread over all remaining nodes. When the dead node is back, an egress IP stays with the node that took it over,
//! and the controller changes the allocation accordingly.
//!
//! A node whose uplink has lost a family that the egress IP needs gives way to a node that has lost fewer of them. If
//! no node has lost fewer, the egress IP stays.

use crate::model::fnv::{self, fnv1a};
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use std::collections::{BTreeMap, BTreeSet};

/// The state of the nodes, as far as this node knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Liveness {
    /// Nodes that do not answer.
    pub dead: BTreeSet<Name>,
    /// Drained nodes: they take nothing over.
    pub drained: BTreeSet<Name>,
    /// Living nodes that have lost families of their uplinks.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
}

impl Liveness {
    /// Whether a node answers, or was not probed.
    pub fn is_alive(&self, node: &str) -> bool {
        !self.dead.contains(node)
    }

    /// How many of the needed uplinks a node has lost.
    fn lacks(&self, node: &str, needs: &[UplinkKey]) -> usize {
        self.lost.get(node).map_or(0, |lost| needs.iter().filter(|need| lost.contains(*need)).count())
    }
}

/// What determines the owner of an allocation.
#[derive(Clone, Copy, Debug)]
pub struct OwnershipInputs<'a> {
    /// The allocation.
    pub id: EgressId,
    /// The node that the allocation names.
    pub node: Option<&'a str>,
    /// In a planned move, the node that holds the egress IP until `node` does.
    pub leaving: Option<&'a str>,
    /// Whether `node` reports that it holds the egress IP.
    pub arrived: bool,
    /// Nodes that report that they have taken it over from `node`.
    pub takers: &'a [&'a str],
    /// The gateway's nodes, which may take over when `node` is dead. If empty, no other node can be the owner.
    pub members: &'a [Name],
    /// The uplinks that its addresses need. Empty if Egret does not place them.
    pub needs: &'a [UplinkKey],
}

impl<'a> OwnershipInputs<'a> {
    /// The smallest number of needed uplinks that a living candidate has lost; `None` if lost uplinks do not matter.
    /// A drained node takes nothing over, even if it has lost fewer. A planned move is to finish, whatever is lost.
    fn least_lost(&self, liveness: &Liveness) -> Option<usize> {
        if self.leaving.is_some() || liveness.lost.is_empty() {
            return None;
        }
        let open = self.members.iter().map(|name| &**name).filter(|name| !liveness.drained.contains(*name));
        let all = self.node.into_iter().chain(self.takers.iter().copied()).chain(open);
        all.filter(|node| liveness.is_alive(node)).map(|node| liveness.lacks(node, self.needs)).min()
    }
}

/// The owner of an egress IP; `None` if no candidate is alive.
pub fn owner<'a>(allocation: OwnershipInputs<'a>, liveness: &Liveness) -> Option<&'a str> {
    let least = allocation.least_lost(liveness);
    let alive = |node: &&str| {
        liveness.is_alive(node) && least.is_none_or(|least| liveness.lacks(node, allocation.needs) <= least)
    };
    let takers = allocation.takers.iter().copied().filter(alive).filter(|taker| allocation.node != Some(taker));
    if let Some(taker) = takers.max_by_key(|node| rank(node, allocation.id)) {
        return Some(taker);
    }
    // An allocation without an assigned node has no candidate owner: the gateway has no node.
    let node = allocation.node?;
    // `node` may have been drained and found dead before it was assigned again, and may not count as alive yet.
    let leaving = allocation.leaving.filter(alive).filter(|_| !allocation.arrived || !alive(&node));
    leaving.or(Some(node).filter(alive)).or_else(|| {
        let others = allocation.members.iter().map(|name| &**name).filter(|name| *name != node).filter(alive);
        others.max_by_key(|name| (!liveness.drained.contains(*name), rank(name, allocation.id)))
    })
}

/// The rank of a node in the order of an allocation; the highest is first.
fn rank(node: &str, id: EgressId) -> (u64, &str) {
    (fnv::rank(fnv1a(node.bytes()), id.into()), node)
}

#[cfg(test)]
mod tests;
