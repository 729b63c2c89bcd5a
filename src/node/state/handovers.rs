//! The handovers of planned moves to this node and away from it.

use crate::model::marks::EgressId;
use crate::node::moved::Moved;
use crate::node_plan::View;
use crate::node_plan::allocations::{AllocationState, NodeAllocation};
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// How long a node hands over packets after an allocation has moved to it. Other nodes may still send packets of the
/// connections to the old node, while servers reply to this one.
const HANDOVER: Duration = Duration::from_secs(1);

/// The same for an egress IP that routers announce. A withdrawn route takes its way through the network, and until then
/// routers send to the old node, some of them to both.
const ROUTED_HANDOVER: Duration = Duration::from_secs(5);

/// The handovers that are in progress.
#[derive(Debug, Default)]
pub struct Handovers {
    /// Allocations that move or just moved to this node: the former owner, and until when packets are handed over to
    /// it.
    to_here: BTreeMap<EgressId, (Mac, Instant)>,
    /// Allocations that just moved away, and until when their connections may continue through this node.
    from_here: BTreeMap<EgressId, Instant>,
    /// Allocations that routers announce and that move or just moved away: the next owner, and until when this node serves their
    /// connections and hands over to it the packets of connections that it does not know.
    withdrawn: BTreeMap<EgressId, (Mac, Instant)>,
}

impl Handovers {
    /// Records new handovers, and drops those that are over. `before` is the translation before this pass; `None` if
    /// this node cannot forward packets of egress IPs that it held, because it has no uplink.
    pub fn update(&mut self, view: &View, before: Option<&Moved>, now: Instant) {
        let allocations = &view.allocations.allocations;
        self.to_here.retain(|id, (_, until)| *until > now && allocations.contains_key(id));
        let by = allocations.iter().filter_map(|(id, allocation)| {
            let time = if allocation.routed { ROUTED_HANDOVER } else { HANDOVER };
            Some((*id, (allocation.handed_by?, now + time)))
        });
        self.to_here.extend(by);
        self.withdrawn.retain(|id, (_, until)| {
            let is_elsewhere = |a: &NodeAllocation| a.routed && a.state != AllocationState::Local;
            *until > now && allocations.get(id).is_some_and(is_elsewhere)
        });
        // Source nodes may learn of the next owner before this node does.
        let leaving = allocations.iter().filter(|(_, allocation)| allocation.routed);
        let leaving = leaving.filter_map(|(id, a)| Some((*id, (a.handed_to?, now + ROUTED_HANDOVER))));
        self.withdrawn.extend(leaving);
        self.from_here.retain(|_, until| *until > now);
        if let Some(before) = before {
            for (id, allocation) in allocations.iter().filter(|(id, _)| before.was_local(**id)) {
                let AllocationState::Remote(owner) = allocation.state else { continue };
                self.from_here.insert(*id, now + HANDOVER);
                if allocation.routed {
                    self.withdrawn.insert(*id, (owner, now + ROUTED_HANDOVER));
                }
            }
        }
    }

    /// When the next handover is over.
    pub fn next(&self) -> Option<Instant> {
        let with_nodes = self.to_here.values().chain(self.withdrawn.values());
        with_nodes.map(|(_, until)| *until).chain(self.from_here.values().copied()).min()
    }

    /// The allocations that move or just moved to this node, with their former owners.
    pub fn to_here(&self) -> impl Iterator<Item = (EgressId, Mac)> {
        self.to_here.iter().map(|(id, (mac, _))| (*id, *mac))
    }

    /// The allocations that this node still serves although it has withdrawn their routes, with their new owners.
    pub fn withdrawn(&self) -> impl Iterator<Item = (EgressId, Mac)> {
        self.withdrawn.iter().map(|(id, (mac, _))| (*id, *mac))
    }

    /// The former owner of an allocation that moves or just moved to this node.
    pub fn former_owner(&self, id: EgressId) -> Option<Mac> {
        self.to_here.get(&id).map(|(mac, _)| *mac)
    }

    /// The allocations that just moved away.
    pub fn moved_away(&self) -> BTreeSet<EgressId> {
        self.from_here.keys().copied().collect()
    }

    /// The allocations in a handover, in either direction.
    pub fn all(&self) -> BTreeSet<EgressId> {
        self.to_here.keys().chain(self.from_here.keys()).copied().collect()
    }
}
