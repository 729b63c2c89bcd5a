//! What a daemon that is told to stop does first.
//!
//! A stop leaves everything as it is: the kernel goes on, and the daemon is back in a moment. It is another thing where the
//! node itself is going: `kubectl drain` waits for no pod of a DaemonSet, and the kubelet stops those when the machine
//! shuts down. The egress IPs of a node that is cordoned, labelled to be drained, or deleted are handed over first, as long
//! as there is a node to hand them to.

use super::Node;
use crate::model::drain::is_drained;
use crate::node_plan::allocations::{NodeAllocation, Placing};
use std::time::Duration;
use tokio::time::Instant;

/// So long the handover may take. `terminationGracePeriodSeconds` in `install/node.yaml` is longer.
const HANDOVER: Duration = Duration::from_secs(20);

/// A daemon that was told to stop.
pub struct Stopping {
    since: Instant,
    /// How many egress IPs there were to hand over.
    pending: usize,
}

impl Stopping {
    /// When it stops, come what may.
    pub fn deadline(&self) -> Instant {
        self.since + HANDOVER
    }
}

impl Node {
    /// It was told to stop.
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

    /// Whether it may stop now.
    pub fn has_stopped(&self, stopping: &Stopping) -> bool {
        let (pending, after) = (self.to_hand_over(), stopping.since.elapsed());
        if pending > 0 && Instant::now() < stopping.deadline() {
            return false;
        }
        if pending > 0 {
            tracing::warn!(
                pending,
                ?after,
                "stopping with egress IPs that no other node has taken; does the controller run? Their connections stand \
                 still until a node finds this one dead"
            );
        } else if stopping.pending > 0 {
            tracing::info!(egress_ips = stopping.pending, ?after, "handed over; stopping");
        }
        true
    }

    /// How many egress IPs are here that are to go, and can.
    fn to_hand_over(&self) -> usize {
        let allocations = self
            .view
            .allocations
            .allocations
            .iter()
            .filter(|(id, allocation)| allocation.managed && allocation.is_here(**id, &self.facts));
        let here =
            allocations.map(|(_, allocation)| allocation).filter(|allocation| allocation.placing != Placing::Never);
        here.filter(|allocation| self.is_left_by(allocation) && self.has_taker(allocation)).count()
    }

    /// Whether an allocation is to leave this node.
    fn is_left_by(&self, allocation: &NodeAllocation) -> bool {
        let (node, gateway) =
            (self.cluster.nodes.get(&*self.options.name), self.cluster.gateways.get(&*allocation.gateway));
        node.is_none_or(|node| gateway.is_some_and(|gateway| is_drained(gateway, node)))
    }

    /// Whether there is a node to hand an allocation to: one that answers and is not to be left itself.
    fn has_taker(&self, allocation: &NodeAllocation) -> bool {
        let Some(gateway) = self.cluster.gateways.get(&*allocation.gateway) else { return false };
        let others = self.cluster.nodes.iter().filter(|(name, _)| ***name != *self.options.name);
        others.filter(|(_, node)| gateway.nodes.matches(&node.labels) && !is_drained(gateway, node)).any(|(name, _)| {
            !self.facts.dead.contains(name) && self.cluster.egress_nodes.get(name).is_some_and(|status| status.answers)
        })
    }
}
