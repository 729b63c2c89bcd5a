//! Which node has an allocation, computed by every node alike from what all of them see: no vote, no messenger.
//!
//! The allocations' node has it while it lives. When it dies, the first living node of the allocation's own order takes it: each
//! allocation has another order, so that a dead node's allocations spread over all that are left. What was taken over stays where
//! it is when the dead node comes back; the allocations follow.
//!
//! A node whose uplink has lost a family that the allocation needs gives way to one that has lost fewer of them. What nobody can
//! do better is no reason to move.

use crate::model::fnv::fnv1a;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use std::collections::{BTreeMap, BTreeSet};

/// What nodes are believed to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Liveness {
    /// They do not answer.
    pub dead: BTreeSet<Name>,
    /// They are to get nothing new.
    pub drained: BTreeSet<Name>,
    /// They live, and have lost some of their uplinks' families.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
}

impl Liveness {
    /// Whether a node answers, or nobody has asked it.
    pub fn is_alive(&self, node: &str) -> bool {
        !self.dead.contains(node)
    }

    /// How many of these a node has lost.
    fn lacks(&self, node: &str, needs: &[UplinkKey]) -> usize {
        self.lost.get(node).map_or(0, |lost| needs.iter().filter(|need| lost.contains(*need)).count())
    }
}

/// An allocation, as far as its owner follows from it.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// The allocation.
    pub id: EgressId,
    /// The allocations' node.
    pub node: Option<&'a str>,
    /// The node that holds it until `node` does, if it is being moved on purpose.
    pub leaving: Option<&'a str>,
    /// Whether `node` says that it holds it.
    pub arrived: bool,
    /// Nodes that say that they have taken it over from `node`.
    pub takers: &'a [&'a str],
    /// The gateway's nodes, which may have it when `node` is dead. Nobody else can if there are none.
    pub members: &'a [Name],
    /// The uplinks that its addresses need. None if they are not Egret's to place.
    pub needs: &'a [UplinkKey],
}

impl<'a> Standing<'a> {
    /// The least that a living node has lost of what the allocation needs, among those that may have it. `None`: that decides
    /// nothing. Who is drained gets nothing new, also if it has lost less; and what is moved on purpose is to arrive.
    fn least_lost(&self, liveness: &Liveness) -> Option<usize> {
        if self.leaving.is_some() || liveness.lost.is_empty() {
            return None;
        }
        let open = self.members.iter().map(|name| &**name).filter(|name| !liveness.drained.contains(*name));
        let all = self.node.into_iter().chain(self.takers.iter().copied()).chain(open);
        all.filter(|node| liveness.is_alive(node)).map(|node| liveness.lacks(node, self.needs)).min()
    }
}

/// The node that has an allocation. `None`: nobody is left.
pub fn owner<'a>(allocation: Standing<'a>, liveness: &Liveness) -> Option<&'a str> {
    let least = allocation.least_lost(liveness);
    let alive = |node: &&str| {
        liveness.is_alive(node) && least.is_none_or(|least| liveness.lacks(node, allocation.needs) <= least)
    };
    let takers = allocation.takers.iter().copied().filter(alive).filter(|taker| allocation.node != Some(taker));
    if let Some(taker) = takers.max_by_key(|node| rank(node, allocation.id)) {
        return Some(taker);
    }
    // Whom the allocations name nobody for, nobody takes: there is no node that may.
    let node = allocation.node?;
    // Who was drained and is to have the allocation now may have been found dead, and not alive again yet.
    let leaving = allocation.leaving.filter(alive).filter(|_| !allocation.arrived || !alive(&node));
    leaving.or(Some(node).filter(alive)).or_else(|| {
        let others = allocation.members.iter().map(|name| &**name).filter(|name| *name != node).filter(alive);
        others.max_by_key(|name| (!liveness.drained.contains(*name), rank(name, allocation.id)))
    })
}

/// How early a node comes in an allocation's order; the highest is the first (rendezvous hashing, Thaler and Ravishankar 1998).
fn rank(node: &str, id: EgressId) -> (u64, &str) {
    let name = fnv1a(node.bytes());
    // The finaliser of SplitMix64: FNV alone mixes the last letters badly, and names of nodes differ in them.
    let mut mixed = name ^ (u64::from(id) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31), node)
}

#[cfg(test)]
mod tests;
