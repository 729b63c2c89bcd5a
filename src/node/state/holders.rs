//! Requests between nodes about egress IPs that routers announce.

use super::{LinkMessage, NodeDaemon};
use crate::model::marks::EgressId;
use crate::node::holders::{Held, ask};
use crate::node_plan::addresses;
use crate::node_plan::allocations::NodeAllocation;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

impl NodeDaemon {
    /// Sets the egress IPs about which this node answers.
    pub(super) fn set_held(&self) {
        let allocations = &self.view.allocations.allocations;
        let is_held = |(id, allocation): &(&EgressId, &NodeAllocation)| {
            allocation.routed && allocation.is_here(**id, &self.facts) && !self.facts.relinquished.contains(id)
        };
        let ids: BTreeSet<EgressId> = allocations.iter().filter(is_held).map(|(id, _)| *id).collect();
        let mac = self.host.tunnel_end().map(|tunnel| tunnel.mac).unwrap_or_default();
        let new = Held { end: self.host.prober(), mac, ids };
        self.listeners.held.send_if_modified(|now| {
            let changed = *now != new;
            *now = new;
            changed
        });
    }

    /// Asks the other nodes of the gateways for these egress IPs, in the background, once with each of the timeouts, and
    /// sends each result as that of a probe. Nodes that do not answer probes are asked, too: this node may just have
    /// returned.
    pub(super) fn ask_holders(&self, allocations: BTreeSet<EgressId>, timeouts: &'static [Duration]) {
        if allocations.is_empty() {
            return;
        }
        let all = &self.view.allocations;
        let of = allocations.iter().filter_map(|id| all.allocations.get(id));
        let gateways: BTreeSet<_> = of.map(|allocation| &allocation.gateway).collect();
        let nodes: BTreeSet<_> =
            gateways.into_iter().filter_map(|name| all.gateway_nodes.get(name)).flatten().collect();
        let peers: Vec<Mac> =
            all.peers.iter().filter(|(_, peer)| nodes.contains(&peer.node)).map(|(mac, _)| *mac).collect();
        let of_allocation = |id: &EgressId| {
            let allocation = all.allocations.get(id);
            allocation.into_iter().flat_map(addresses).map(|address| (*id, address)).collect::<Vec<_>>()
        };
        let asked: Vec<(EgressId, IpAddr)> = allocations.iter().flat_map(of_allocation).collect();
        let (end, results) = (self.host.prober(), self.listeners.link.clone());
        tokio::spawn(async move {
            for timeout in timeouts {
                let holders = ask(end, &peers, &allocations, *timeout).await.unwrap_or_else(|e| {
                    tracing::warn!("other nodes cannot be asked which egress IPs they hold: {e:#}");
                    // Without the request, the reports of other nodes decide.
                    BTreeMap::new()
                });
                let answers = Some(asked.iter().map(|(id, a)| (*id, *a, holders.get(id).copied())).collect());
                // Without a receiver the daemon is ending.
                let _ = results.send(LinkMessage::Answers { allocations: allocations.clone(), answers });
            }
        });
    }
}
