//! What the assign hook is told, and what it answers.

use super::{LinkMessage, NodeDaemon};
use crate::model::marks::EgressId;
use crate::node::assign::{Action, AssignmentResult, HookRequest, Requests};
use crate::node_plan::addresses;
use crate::node_plan::allocations::NodeAllocation;
use egret_nft::mac::Shown;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use tokio::time::Instant;

impl NodeDaemon {
    /// Sends what a decision has found, the releases last.
    pub(super) fn tell_hook(&mut self, requests: Requests) {
        let Requests { assign, release } = requests;
        if assign.is_empty() && release.is_empty() {
            return;
        }
        let mut of: HashMap<IpAddr, EgressId> = HashMap::new();
        for (id, allocation) in &self.view.allocations.allocations {
            for address in addresses(allocation) {
                of.entry(address).or_insert(*id);
            }
        }
        assign.into_iter().for_each(|address| self.ask_hook(Action::Assign, address, of.get(&address)));
        release.into_iter().for_each(|address| self.ask_hook(Action::Release, address, of.get(&address)));
    }

    fn ask_hook(&mut self, action: Action, address: IpAddr, id: Option<&EgressId>) {
        let allocation = id.and_then(|id| self.view.allocations.allocations.get(id));
        let interface = allocation.and_then(|allocation| self.egress.uplinks.interface(address, allocation));
        let request = HookRequest {
            action,
            address,
            node: self.options.name.clone(),
            gateway: allocation.map(|a: &NodeAllocation| a.gateway.to_string()).unwrap_or_default(),
            interface: interface.map(|interface| interface.name.clone()).unwrap_or_default(),
            mac: interface.and_then(|i| i.mac).map(|mac| Shown(mac).to_string()).unwrap_or_default(),
        };
        let answers = self.listeners.link.clone();
        if let Some(hook) = &mut self.assign_hook {
            hook.send(request, move |address, answer| {
                // Without a receiver the daemon is ending.
                let _ = answers.send(LinkMessage::Assigned { address, answer });
            });
        }
    }

    /// Takes an answer of the hook.
    pub(super) fn hook_answered(&mut self, address: IpAddr, answer: AssignmentResult) {
        if self.egress.holding.hook_answered(address, answer, Instant::now()) {
            self.tell_hook(Requests { assign: BTreeSet::new(), release: [address].into() });
        }
    }

    /// The egress IPs that the hook does not bring to this node, with the reasons.
    pub(super) fn refused_by_hook(&self) -> BTreeMap<EgressId, String> {
        let refused: BTreeMap<IpAddr, String> = self.egress.holding.refused_by_hook().collect();
        if refused.is_empty() {
            return BTreeMap::new();
        }
        let all = self.view.allocations.allocations.iter();
        let why = |allocation| addresses(allocation).find_map(|address| refused.get(&address).cloned());
        all.filter(|(id, allocation)| !allocation.is_here(**id, &self.facts))
            .filter_map(|(id, allocation)| Some((*id, why(allocation)?)))
            .collect()
    }
}
