//! The state of this node for `egretd state`.

use super::NodeDaemon;
use crate::node::host::Counts;
use crate::node::node_state::{Desired, DesiredEgressIp, NodeState, Observed, ObservedEgressIp, Pods, SelectedPod};
use crate::node_plan::allocations::AllocationState;
use egret_nft::mac::Shown;
use std::collections::BTreeMap;

impl NodeDaemon {
    /// What is desired, and what the node observes.
    pub fn state(&mut self) -> NodeState {
        let counts = self.host.counts().unwrap_or_else(|e| {
            tracing::warn!("cannot read the kernel's counters: {e:#}");
            Counts::default()
        });
        let not_ready = self.listeners.ready.borrow().reason().map(str::to_owned);
        let pending = self.pending.rows().map(|row| (format!("{:?}", row.step), row.applies.to_owned())).collect();
        NodeState {
            node: self.options.name.clone(),
            not_ready,
            passes: self.passes,
            pending,
            desired: self.desired_state(&counts),
            observed: self.observed_state(&counts),
        }
    }

    fn desired_state(&self, counts: &Counts) -> Desired {
        let desired = self.egress.desired();
        let sent: BTreeMap<_, _> = counts.sent.iter().map(|(id, count)| (*id, count.packets)).collect();
        let egress_ips = self.view.allocations.allocations.iter().map(|(id, allocation)| {
            let traffic = match &allocation.state {
                AllocationState::Local => "local".to_owned(),
                AllocationState::Remote(mac) => Shown(*mac).to_string(),
                AllocationState::Unready(why) => format!("dropped: {why}"),
            };
            let (gateway, address) = (allocation.gateway.to_string(), allocation.address.clone());
            let owner = match &allocation.state {
                AllocationState::Remote(mac) => self.view.allocations.peers.get(mac).map(|peer| peer.node.to_string()),
                _ => None,
            };
            let (sent_packets, here) = (sent.get(id).copied(), desired.allocations.contains(id));
            (*id, DesiredEgressIp { gateway, address, traffic, owner, sent_packets, here })
        });
        Desired {
            egress_ips: egress_ips.collect(),
            health_address: desired.health,
            uplinks: desired.uplinks.iter().map(ToString::to_string).collect(),
            direct: self.view.networks.origins.iter().map(|(network, _)| network.to_string()).collect(),
        }
    }

    fn observed_state(&self, counts: &Counts) -> Observed {
        let facts = &self.facts;
        let allocations = &self.view.allocations.allocations;
        let states: BTreeMap<_, _> = self.egress.holding.states().collect();
        let seen = allocations.iter().filter_map(|(id, allocation)| {
            let (here, refused) = (allocation.is_here(*id, facts), facts.refused.get(id).cloned());
            let state = states.get(id).copied().unwrap_or_default();
            let is_default = !here && refused.is_none() && !states.contains_key(id);
            (!is_default).then(|| (*id, ObservedEgressIp { state: state.name().to_owned(), here, refused }))
        });
        let census = self.census();
        let used = self.enforced.uses.values().map(|used| SelectedPod {
            addresses: used.addresses.clone(),
            policy_chain: used.policy_chain.as_ref().map(|chain| chain.name().to_string()).unwrap_or_default(),
            egress_ids: used.allocations.iter().copied().collect(),
            isolated: used.isolated,
        });
        Observed {
            tunnel_address: self.host.tunnel_end().map(|tunnel| tunnel.local),
            addresses: facts.addresses.iter().copied().collect(),
            egress_ips: seen.collect(),
            dead_nodes: facts.dead.iter().map(ToString::to_string).collect(),
            lost_uplinks: facts
                .lost
                .iter()
                .map(|(node, uplinks)| (node.to_string(), uplinks.iter().map(ToString::to_string).collect()))
                .collect(),
            pods: Pods {
                selected: census.selected,
                isolated: census.isolated,
                free: census.free,
                unmanaged: census.unmanaged,
            },
            selected: used.collect(),
            faults: self.problems.faults.known().clone(),
            dropped_packets: counts
                .drops
                .iter()
                .filter(|(_, count)| count.packets > 0)
                .map(|(reason, count)| (reason.clone(), count.packets))
                .collect(),
        }
    }
}
