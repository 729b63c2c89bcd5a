//! What the fast path must know, and what it reports.

use super::NodeDaemon;
use crate::node::fast_path::{Slow, Status, TunnelEnd, Wanted};
use crate::node_plan::addresses;

impl NodeDaemon {
    /// Passes on which interfaces packets come in by, and whether any may go the fast way.
    pub(super) fn set_fast_path(&self) {
        let Some(fast_path) = &self.fast_path else { return };
        let by_veths = self.host.uses_veths();
        let closed = if by_veths.is_some() {
            by_veths
        } else if !self.egress.handovers.all().is_empty() {
            // Packets are copied to another node, which still knows their connections.
            Some("an egress IP is being moved")
        } else {
            None
        };
        let marks = self.options.marks;
        let peers = self.host.peer_indexes().iter().map(|(mac, index)| (marks.connection_of_peer(*index), *mac));
        fast_path.set(Wanted {
            closed,
            tunnel: self.tunnel_end(),
            nodes: self.host.underlay().map(|underlay| underlay.interface_of_each()).unwrap_or_default(),
            pods: self.host.veths().collect(),
            uplinks: self.host.uplinks().collect(),
            peers: peers.collect(),
            slow: self.slow(),
        });
    }

    fn tunnel_end(&self) -> Option<TunnelEnd> {
        let (tunnel, device) = (self.host.tunnel_end()?, self.host.tunnel_index()?);
        Some(TunnelEnd { device, local: tunnel.local, port: tunnel.port, vni: tunnel.vni, mac: tunnel.mac })
    }

    /// The egress IPs with a DSCP or a bandwidth, whose chains see every packet, and those of gateways without a fast path.
    fn slow(&self) -> Slow {
        let mut slow = Slow::default();
        for (id, allocation) in &self.view.allocations.allocations {
            if allocation.is_treated() || !allocation.fast_path {
                slow.ids.insert(*id);
                slow.addresses.extend(addresses(allocation));
            }
        }
        slow
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
