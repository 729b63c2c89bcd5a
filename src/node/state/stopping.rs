//! The handover before a stop.
//!
//! Usually a stop changes nothing: the kernel continues, and the daemon is back in a moment. If the node itself goes,
//! the daemon must hand over first: `kubectl drain` does not wait for pods of a DaemonSet, and the kubelet stops
//! those when the machine shuts down. So the egress IPs of a node that is cordoned, labelled to be drained, or
//! deleted are handed over, if another node can take them.

use super::NodeDaemon;
use crate::model::drain::is_drained;
use crate::node_plan::allocations::{NodeAllocation, Placing};
use std::time::Duration;
use tokio::time::Instant;

/// The longest time of the handover. `terminationGracePeriodSeconds` in `install/node.yaml` is longer.
const HANDOVER: Duration = Duration::from_secs(20);

/// A stop in progress.
pub struct Stopping {
    since: Instant,
    /// The number of egress IPs to hand over at its start.
    pending: usize,
}

impl Stopping {
    /// When the daemon stops at the latest.
    pub fn deadline(&self) -> Instant {
        self.since + HANDOVER
    }
}

impl NodeDaemon {
    /// Starts the stop.
    pub fn stop(&self) -> Stopping {
        let pending = self.to_hand_over();
        if pending > 0 {
            tracing::info!(
                pending,
                "stopping after the handover: this node is going, and other nodes take its egress IPs"
            );
        }
        Stopping { since: Instant::now(), pending }
    }

    /// Whether the daemon may end now.
    pub fn has_stopped(&self, stopping: &Stopping) -> bool {
        let (pending, after) = (self.to_hand_over(), stopping.since.elapsed());
        if pending > 0 && Instant::now() < stopping.deadline() {
            return false;
        }
        if pending > 0 {
            tracing::warn!(
                pending,
                ?after,
                "stopping with egress IPs that no other node has taken; does the controller run? Their connections stall \
                 until a node detects that this one is down"
            );
        } else if stopping.pending > 0 {
            tracing::info!(egress_ips = stopping.pending, ?after, "handed over; stopping");
        }
        true
    }

    /// The number of egress IPs on this node that are to move and can.
    fn to_hand_over(&self) -> usize {
        let allocations = self
            .view
            .allocations
            .allocations
            .iter()
            .filter(|(id, allocation)| allocation.is_managed() && allocation.is_here(**id, &self.facts));
        let here =
            allocations.map(|(_, allocation)| allocation).filter(|allocation| allocation.placing != Placing::Never);
        here.filter(|allocation| self.is_left_by(allocation) && self.has_taker(allocation)).count()
    }

    /// Whether an allocation is to move away from this node.
    fn is_left_by(&self, allocation: &NodeAllocation) -> bool {
        let (node, gateway) =
            (self.cluster.nodes.get(&*self.options.name), self.cluster.gateways.get(&*allocation.gateway));
        node.is_none_or(|node| gateway.is_some_and(|gateway| is_drained(gateway, node)))
    }

    /// Whether another node can take the allocation: it answers probes and is not being drained itself.
    fn has_taker(&self, allocation: &NodeAllocation) -> bool {
        let Some(gateway) = self.cluster.gateways.get(&*allocation.gateway) else { return false };
        let others = self.cluster.nodes.iter().filter(|(name, _)| ***name != *self.options.name);
        others.filter(|(_, node)| gateway.nodes.matches(&node.labels) && !is_drained(gateway, node)).any(|(name, _)| {
            !self.facts.dead.contains(name) && self.cluster.egress_nodes.get(name).is_some_and(|status| status.answers)
        })
    }
}
