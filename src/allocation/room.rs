//! The room for egress IPs on a gateway's nodes, where these have a maximum.

use super::address_pair::in_words;
use crate::api::{Allocation, AllocationKind, Placement};
use crate::model::capacity::{Capacity, MAX_EGRESS_IPS};
use crate::model::condition::Conditions;
use crate::model::drain::is_drained;
use crate::model::selector::Name;
use crate::model::text::few;
use crate::model::{Cluster, Gateway};
use std::collections::BTreeMap;

/// The reason of a condition when no node has room for an egress IP.
pub(super) const NODES_FULL: &str = "NodesFull";
/// The reason when egress IPs would have no node if one node died.
const NO_ROOM_FOR_FAILOVER: &str = "NoRoomForFailover";
/// At most so many nodes are named.
const NAMED: usize = 4;

/// The room on the nodes of a gateway.
#[derive(Clone, Debug, Default)]
pub(super) struct Room<'a> {
    nodes: BTreeMap<&'a Name, OfNode>,
    /// The annotations that are no numbers, with their nodes.
    invalid: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct OfNode {
    /// The egress IPs that are assigned to it, or leave it, without its own addresses.
    count: u32,
    most: Option<u32>,
    /// Whether it lives, and can take egress IPs over.
    lives: bool,
    /// Whether it is drained while others are not: it takes over as the last resort, and gets nothing else.
    is_drained: bool,
}

impl OfNode {
    /// How many more it can have; `None`: any number.
    fn room(&self) -> Option<u32> {
        self.most.map(|most| most.saturating_sub(self.count))
    }
}

impl<'a> Room<'a> {
    /// The room that is left beside these allocations. `lives` says which nodes count as alive.
    pub(super) fn new(
        cluster: &'a Cluster,
        gateway: &Gateway,
        allocations: &[Allocation],
        lives: impl Fn(&Name) -> bool,
    ) -> Self {
        let members = cluster.nodes.iter().filter(|(_, node)| gateway.nodes.matches(&node.labels));
        let members: Vec<_> = members.filter(|_| gateway.placement == Placement::Managed).collect();
        let all_drained = members.iter().all(|(_, node)| is_drained(gateway, node));
        let mut room = Room::default();
        for (name, node) in members {
            let (lives, is_drained) = (lives(name), is_drained(gateway, node) && !all_drained);
            room.nodes.insert(name, OfNode { count: 0, most: Capacity::of(gateway, node).most, lives, is_drained });
            room.invalid.extend(node.capacity.invalid.map(|key| format!("{key} of node {name:?}")));
        }
        for allocation in allocations.iter().filter(|allocation| allocation.kind != AllocationKind::Node) {
            for node in [&allocation.node, &allocation.leaving].into_iter().flatten() {
                room.nodes.get_mut(node).into_iter().for_each(|of| of.count += 1);
            }
        }
        room
    }

    /// Whether any node has a maximum.
    pub(super) fn is_limited(&self) -> bool {
        self.nodes.values().any(|of| of.most.is_some())
    }

    /// Whether the node may have one more egress IP.
    pub(super) fn has_room(&self, node: &Name) -> bool {
        self.nodes.get(node).is_none_or(|of| of.room() != Some(0))
    }

    /// Whether the gateway has nodes that live, and all of them are full.
    pub(super) fn is_full(&self) -> bool {
        let mut living = self.nodes.values().filter(|of| of.lives).peekable();
        living.peek().is_some() && living.all(|of| of.room() == Some(0))
    }

    /// The full nodes, and what to do.
    pub(super) fn full_nodes(&self) -> String {
        let full = self.nodes.iter().filter(|(_, of)| of.lives && of.room() == Some(0));
        let full = full.map(|(name, of)| format!("{name} ({} of {})", of.count, of.most.unwrap_or_default()));
        format!(
            "nodes with all egress IPs that they may have: {}; raise maxEgressIPs in the gateway's spec.capacity (or the \
             annotation {} of a Node), or add a node",
            few(full, NAMED),
            MAX_EGRESS_IPS
        )
    }

    /// How much room these nodes have together; `None`: there is no limit.
    fn room_of(&self, which: impl Fn(&Name, &OfNode) -> bool) -> Option<u32> {
        let those = self.nodes.iter().filter(|(name, of)| which(name, of));
        those.map(|(_, of)| of.room()).try_fold(0u32, |sum, room| Some(sum.saturating_add(room?)))
    }

    /// The egress IPs that no node holds for want of room: those that are assigned to none, and those of dead nodes for
    /// which the others have no room.
    fn without_node<'b>(&self, allocations: &'b [Allocation]) -> Vec<&'b Allocation> {
        let managed = allocations.iter().filter(|allocation| allocation.kind != AllocationKind::Node);
        let (unassigned, assigned): (Vec<_>, Vec<_>) = managed.partition(|allocation| allocation.node.is_none());
        let is_dead = |node: &Name| self.nodes.get(node).is_some_and(|of| !of.lives);
        let orphans = assigned
            .into_iter()
            .filter(|allocation| [&allocation.node, &allocation.leaving].into_iter().flatten().all(is_dead));
        let room = self.room_of(|_, of| of.lives).map_or(usize::MAX, |room| room as usize);
        let some_live = self.nodes.values().any(|of| of.lives);
        unassigned.into_iter().chain(orphans.skip(room)).filter(|_| some_live).collect()
    }

    /// Adds the condition `RoomLeft` of a gateway whose nodes have a maximum.
    pub(super) fn add_condition(&self, conditions: &mut Conditions, allocations: &[Allocation]) {
        let ignored = match self.invalid.as_slice() {
            [] => String::new(),
            some => format!("; ignored, because it is not a number in its bounds: {}", few(some, NAMED)),
        };
        if !self.is_limited() {
            if !ignored.is_empty() {
                conditions.add("RoomLeft", true, "NoMaximum", format!("its nodes have no maximum{ignored}"));
            }
            return;
        }
        let without = self.without_node(allocations);
        if !without.is_empty() {
            let addresses = few(without.iter().map(|allocation| in_words(&allocation.address)), 3);
            let message = format!("no node holds {addresses}, and traffic is blocked; {}{ignored}", self.full_nodes());
            conditions.add("RoomLeft", false, NODES_FULL, message);
            return;
        }
        let lacks = |(name, of): (&&Name, &OfNode)| {
            let others = self.room_of(|other, of| of.lives && !of.is_drained && other != *name)?;
            let lacks = of.count.saturating_sub(others);
            (of.lives && lacks > 0).then_some((lacks, std::cmp::Reverse(Name::clone(name))))
        };
        match self.nodes.iter().filter_map(lacks).max() {
            Some((lacks, std::cmp::Reverse(name))) => {
                let message = format!(
                    "if node {name:?} dies, the others have no room for {lacks} of its egress IPs, whose traffic is then \
                     blocked; {}{ignored}",
                    self.full_nodes()
                );
                conditions.add("RoomLeft", false, NO_ROOM_FOR_FAILOVER, message);
            }
            None => {
                let room = self
                    .room_of(|_, of| of.lives && !of.is_drained)
                    .map_or_else(|| "any number of".to_owned(), |room| room.to_string());
                let message = format!("its nodes have room for {room} more egress IPs{ignored}");
                conditions.add("RoomLeft", true, "RoomLeft", message);
            }
        }
    }
}
