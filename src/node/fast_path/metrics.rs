//! The fast path's metrics.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The fast path's metrics. Clones share the values.
#[derive(Clone, Debug, Default)]
pub struct FastPathMetrics {
    open: Gauge,
    /// Packets that went the fast way.
    pub packets: Counter,
}

impl FastPathMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "fast_path_open",
            "1 while packets of established connections go the fast way, otherwise 0; the node's EgressNode says why",
            self.open.clone(),
        );
        registry.register(
            "fast_path_packets",
            "Packets of pods to egress IPs' destinations that went the fast way; the counters by allocation contain them",
            self.packets.clone(),
        );
    }

    pub(super) fn set_open(&self, open: bool) {
        self.open.set(open.into());
    }
}
