//! The egress IPs whose source ports are counted.

use super::NodeDaemon;
use crate::node::source_ports::OwnedIps;
use crate::node_plan::addresses;

impl NodeDaemon {
    /// Passes on which egress IPs this node holds, if the allocations have changed.
    pub(super) fn set_owned_ips(&mut self) {
        let allocations = &self.view.allocations;
        if allocations.has(&self.owned_of) {
            return;
        }
        self.owned_of = allocations.mark();
        let held = allocations.held.iter().filter_map(|id| Some((*id, allocations.allocations.get(id)?)));
        let owned: OwnedIps =
            held.flat_map(|(id, allocation)| addresses(allocation).map(move |address| (address, id))).collect();
        self.source_ports.set_owned(owned);
    }
}
