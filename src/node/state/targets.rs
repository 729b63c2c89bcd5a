//! The nodes to probe for liveness.

use super::NodeDaemon;
use crate::datapath::names::{HEALTH, of_mac, of_uplink};
use crate::model::selector::Name;
use crate::node::liveness::Targets;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};

impl NodeDaemon {
    /// Sets the nodes to probe for liveness: the gateway nodes that this node's pods can use, and on a gateway node
    /// the other nodes of its gateways.
    pub(super) fn set_targets(&self) {
        let Some((device, source)) = self.host.prober() else {
            // While the tunnel is being repaired, the targets stay.
            if self.host.tunnel_end().is_some() {
                self.listeners.targets.send_replace(Targets::default());
            }
            return;
        };
        let allocations = &self.view.allocations;
        let used =
            self.enforced.uses.values().flat_map(|u| &u.allocations).filter_map(|id| allocations.allocations.get(id));
        let own = allocations.allocations.values().filter(|allocation| allocation.is_member());
        let gateways: BTreeSet<&Name> = used.chain(own).map(|allocation| &allocation.gateway).collect();
        let nodes = gateways.into_iter().filter_map(|gateway| allocations.gateway_nodes.get(gateway)).flatten();
        let others = nodes.filter(|name| ***name != *self.options.name);
        let answering = others.filter_map(|name| {
            let status = self.cluster.egress_nodes.get(name)?;
            status.answers.then_some((name.clone(), status.tunnel_mac?))
        });
        let answering: BTreeMap<Name, Mac> = answering.collect();
        let of_uplinks = |(name, mac): (&Name, &Mac)| {
            let keys = allocations.uplinks_of(name).into_iter();
            (name.clone(), keys.map(|key| (key.clone(), of_uplink(key.code(), *mac))).collect())
        };
        let uplinks = answering.iter().map(of_uplinks).collect();
        let nodes = answering.into_iter().map(|(name, mac)| (name, of_mac(HEALTH, mac))).collect();
        let new = Targets { device, source: Some(source), nodes, uplinks };
        self.listeners.targets.send_if_modified(|now| {
            let changed = *now != new;
            *now = new;
            changed
        });
    }
}
