//! What a trace needs of the daemon's state.

use super::NodeDaemon;
use crate::model::trace::{Armed, EgressIp, TraceSpec};
use crate::model::{ObjectKey, addresses_of};
use crate::node::trace::{TraceContext, TraceRequest};
use crate::node_plan::allocations::AllocationState;

impl NodeDaemon {
    /// Answers a request for a trace.
    pub fn trace(&self, of: TraceRequest) {
        let request = &of.request;
        let key = ObjectKey::new(&request.namespace, &request.pod);
        let interface = self.pods.interface_of(&key, &request.source).map(|interface| interface.name.clone());
        let armed = Armed {
            node: self.options.name.clone(),
            not_ready: self.listeners.ready.borrow().reason().map(str::to_owned),
            interface,
            egress_ips: self.egress_ips_of(request),
        };
        let known = TraceContext { armed, chains: self.host.chains(), routes: self.host.routes.clone() };
        // Without a receiver, the connection has ended.
        let _ = of.response.send(known);
    }

    /// The egress IPs that a pod can have.
    fn egress_ips_of(&self, request: &TraceSpec) -> Vec<EgressIp> {
        let of_pod = self.enforced.uses.values().filter(|of| of.addresses.contains(&request.source));
        let allocations = of_pod.flat_map(|of| of.allocations.iter());
        let allocations = allocations.filter_map(|id| self.view.allocations.allocations.get(id));
        let egress_ip = allocations.map(|allocation| {
            let (node, dropped) = match &allocation.state {
                AllocationState::Local => (Some(self.options.name.clone()), None),
                AllocationState::Remote(mac) => {
                    (self.view.allocations.peers.get(mac).map(|peer| peer.node.to_string()), None)
                }
                AllocationState::Unready(why) => (None, Some(why.to_string())),
            };
            EgressIp { addresses: addresses_of(&allocation.address).collect(), node, dropped }
        });
        egress_ip.collect()
    }
}
