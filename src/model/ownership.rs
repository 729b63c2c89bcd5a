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
//!
//! Where nodes have a maximum of egress IPs, [`owners`] computes the owners of all of a gateway's egress IPs together. A
//! node that is full takes nothing over; if all are, the egress IP has no owner.

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
    /// Nodes that hold as many of the gateway's egress IPs as they may: they take nothing over.
    pub full: BTreeSet<Name>,
    /// The weights of the gateway's nodes, where they are not 1.
    pub weights: BTreeMap<Name, u16>,
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
        let is_open = |name: &&str| !liveness.drained.contains(*name) && !liveness.full.contains(*name);
        let open = self.members.iter().map(|name| &**name).filter(is_open);
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
        let others = others.filter(|name| !liveness.full.contains(*name));
        let weight = |name: &str| liveness.weights.get(name).copied().unwrap_or(1);
        others.max_by_key(|name| (!liveness.drained.contains(*name), weighted_rank(name, allocation.id, weight(name))))
    })
}

/// The owners of all of a gateway's allocations, where nodes hold no more egress IPs than `most`.
///
/// What nodes hold, and what they report to have taken over, counts first. Then each of the other allocations, in the
/// order of their ids, gets the first node of its order that has room. So a report of a takeover that followed this
/// changes nothing for the other allocations, and nodes that have not got it yet compute the same. Afterwards
/// `liveness.full` has the nodes that are full.
pub fn owners<'a>(
    allocations: &BTreeMap<EgressId, OwnershipInputs<'a>>,
    liveness: &mut Liveness,
    most: &BTreeMap<Name, u32>,
) -> BTreeMap<EgressId, Option<&'a str>> {
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    let (mut owners, mut orphans) = (BTreeMap::new(), Vec::new());
    liveness.full.clear();
    for (id, allocation) in allocations {
        let next = owner(*allocation, liveness);
        // The owner among the nodes that have it already: the living one, whatever it has lost.
        let now = owner(OwnershipInputs { members: &[], needs: &[], ..*allocation }, liveness);
        let coming = allocation.node.filter(|_| allocation.leaving.is_some());
        let both: BTreeSet<&str> = now.into_iter().chain(coming).collect();
        both.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        if next.is_some() && next == now {
            owners.insert(*id, next);
        } else {
            orphans.push((*id, allocation, now));
        }
    }
    let is_full =
        |counts: &BTreeMap<&str, u32>, name: &str, most: u32| counts.get(name).copied().unwrap_or_default() >= most;
    let full = most.iter().filter(|(name, most)| is_full(&counts, name, **most));
    liveness.full = full.map(|(name, _)| name.clone()).collect();
    for (id, allocation, now) in orphans {
        let owner = owner(*allocation, liveness);
        owners.insert(id, owner);
        let Some(name) = owner.filter(|_| owner != now) else { continue };
        *counts.entry(name).or_default() += 1;
        if let Some((name, most)) = most.get_key_value(name)
            && is_full(&counts, name, *most)
        {
            liveness.full.insert(name.clone());
        }
    }
    owners
}

/// The rank of a node that may take an allocation over. A node with a greater weight has as many ranks, of which the
/// highest counts.
fn weighted_rank(node: &str, id: EgressId, weight: u16) -> (u64, &str) {
    let name = fnv1a(node.bytes());
    // An id has 14 bits.
    let ranks = (0..weight.max(1)).map(|n| fnv::rank(name, u64::from(id) | u64::from(n) << 16));
    (ranks.max().unwrap_or_default(), node)
}

/// The rank of a node in the order of an allocation; the highest is first.
fn rank(node: &str, id: EgressId) -> (u64, &str) {
    (fnv::rank(fnv1a(node.bytes()), id.into()), node)
}

#[cfg(test)]
mod tests;
