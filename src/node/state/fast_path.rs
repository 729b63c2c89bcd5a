//! What the fast path must know, and what it reports.

use super::Node;
use crate::node::fast_path::{Status, Wanted};
use crate::node_plan::allocations::NodeAllocation;

impl Node {
    /// Passes on which interfaces packets come in by, and whether any may go the fast way.
    pub(super) fn set_fast_path(&self) {
        let Some(fast_path) = &self.fast_path else { return };
        let closed = if self.host.uses_veths() {
            Some("packets enter the tunnel by a pair of veths")
        } else if !self.egress.handovers.all().is_empty() {
            // Packets are copied to another node, which still knows their connections.
            Some("an egress IP is being moved")
        } else if self.view.allocations.allocations.values().any(NodeAllocation::is_treated) {
            // The chains that do this see every packet.
            Some("an egress IP that may be on this node has a DSCP or a bandwidth")
        } else {
            None
        };
        let marks = self.options.marks;
        let peers = self.host.peer_indexes().iter().map(|(mac, index)| (marks.connection_of_peer(*index), *mac));
        fast_path.set(Wanted {
            closed,
            tunnel: self.host.tunnel_index().unwrap_or_default(),
            pods: self.host.veths().collect(),
            uplinks: self.host.uplinks().collect(),
            peers: peers.collect(),
        });
    }

    /// Whether packets go the fast way; `None` if they are not to.
    pub(super) fn fast_path_status(&self) -> Option<Status> {
        self.fast_path.as_ref().map(|fast_path| fast_path.status())
    }

    /// Whether that has changed since the last call.
    pub(super) fn fast_path_has_changed(&mut self) -> bool {
        self.fast_path.as_mut().is_some_and(|fast_path| fast_path.has_changed())
    }

    /// Adds the packets that went the fast way to the metrics.
    pub(super) fn count_fast_packets(&mut self) {
        match self.fast_path.as_ref().map(|fast_path| fast_path.counts()) {
            Some(Ok(counts)) => self.metrics.fast_counts(counts),
            Some(Err(e)) => tracing::warn!("{e:#}"),
            None => {}
        }
    }
}
