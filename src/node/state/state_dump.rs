//! The state of this node for `egretd state`.

use super::Node;
use crate::node::node_state::{Desired, DesiredEgressIp, NodeState, Observed, ObservedEgressIp, Pods, SelectedPod};
use crate::node_plan::allocations::AllocationState;
use egret_nft::mac::Shown;
use std::collections::BTreeMap;

impl Node {
    /// What is desired, and what the node observes.
    pub fn state(&self) -> NodeState {
        let not_ready = self.listeners.ready.borrow().reason().map(str::to_owned);
        let pending = self.pending.rows().map(|row| (format!("{:?}", row.step), row.applies.to_owned())).collect();
        NodeState {
            node: self.options.name.clone(),
            not_ready,
            passes: self.passes,
            pending,
            desired: self.desired_state(),
            observed: self.observed_state(),
        }
    }

    fn desired_state(&self) -> Desired {
        let desired = self.egress.desired();
        let egress_ips = self.view.allocations.allocations.iter().map(|(id, allocation)| {
            let traffic = match &allocation.state {
                AllocationState::Local => "local".to_owned(),
                AllocationState::Remote(mac) => Shown(*mac).to_string(),
                AllocationState::Unready(why) => format!("dropped: {why}"),
            };
            let (gateway, address) = (allocation.gateway.to_string(), allocation.address.clone());
            (*id, DesiredEgressIp { gateway, address, traffic, here: desired.allocations.contains(id) })
        });
        Desired {
            egress_ips: egress_ips.collect(),
            health_address: desired.health,
            uplinks: desired.uplinks.iter().map(ToString::to_string).collect(),
            direct: self.view.networks.origins.iter().map(|(network, _)| network.to_string()).collect(),
        }
    }

    fn observed_state(&self) -> Observed {
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
        }
    }
}
