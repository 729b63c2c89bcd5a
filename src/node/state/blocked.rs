//! The allocations that are blocked on this node, with the reasons.

use super::NodeDaemon;
use crate::api::BlockedAllocation;
use crate::model::marks::EgressId;
use crate::node::forwarding::{self, FirstPackets};
use crate::node_plan::allocations::AllocationState;
use std::collections::BTreeSet;

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

impl NodeDaemon {
    /// Allocations that this node's pods use and that are not ready, and allocations that this node owns and whose
    /// connections it does not forward.
    pub(super) fn blocked(&self) -> Vec<BlockedAllocation> {
        let allocations = &self.view.allocations;
        let used: BTreeSet<EgressId> =
            self.enforced.uses.values().flat_map(|used| &used.allocations).copied().collect();
        let unready = used.iter().filter_map(|id| match &allocations.allocations.get(id)?.state {
            AllocationState::Unready(why) => {
                Some(BlockedAllocation { id: *id, family: None, message: why.to_string() })
            }
            AllocationState::Local | AllocationState::Remote(_) => None,
        });
        let closed = self.closed();
        let unforwarded = allocations.held.iter().flat_map(|id| {
            let families = closed.clone().filter(|at| {
                let address = allocations.allocations.get(id).map(|allocation| &allocation.address);
                address.is_some_and(|pair| if *at == 0 { pair.ipv4.is_some() } else { pair.ipv6.is_some() })
            });
            let blocked = |at: usize| BlockedAllocation {
                id: *id,
                family: Some(FAMILIES[at].to_owned()),
                message: forwarding::message(at),
            };
            families.map(blocked)
        });
        unready.chain(unforwarded).collect()
    }

    fn closed(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        let closed = self.forwarding.closed();
        [0, 1].into_iter().filter(move |at| closed[*at])
    }

    /// Takes the forwarding counters. Returns whether the status changes.
    pub(super) fn forwarding_changed(&mut self, first: [FirstPackets; 2]) -> bool {
        if !self.forwarding.update(first) {
            return false;
        }
        for at in self.closed() {
            tracing::warn!(family = FAMILIES[at], "{}", forwarding::message(at));
        }
        if self.closed().next().is_none() {
            tracing::info!("new connections are forwarded again");
        }
        true
    }
}
