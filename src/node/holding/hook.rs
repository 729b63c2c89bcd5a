//! What the assign hook has to say about egress IPs.

use super::super::assign::{AssignmentResult, Assignments};
use super::{Candidate, Decision, Holding, Inputs};
use crate::model::marks::EgressId;
use crate::node_plan::allocations::Facts;
use crate::node_plan::{View, addresses};
use std::collections::BTreeSet;
use std::net::IpAddr;
use tokio::time::Instant;

impl Holding {
    /// The same, with an assign hook if there is one.
    #[must_use]
    pub fn with_hook(mut self, has_hook: bool) -> Self {
        self.assignments = Assignments::new(has_hook);
        self
    }

    /// Whether the egress IP is to be on this node as far as the assign hook is concerned, which is asked for the addresses
    /// that the node has an uplink for. One that is here already stays while the hook confirms it; one that is not waits for
    /// the hook.
    pub(super) fn is_assigned(&mut self, candidate: Candidate, inputs: &Inputs, decision: &mut Decision) -> bool {
        let Inputs { uplinks_now, facts, now, .. } = *inputs;
        let is_here = |address: &IpAddr| facts.addresses.contains(address);
        let mut assigned = true;
        for address in addresses(candidate.allocation).filter(|a| uplinks_now.is_usable(*a, candidate.allocation)) {
            if !self.assignments.want(address, now) && !is_here(&address) {
                assigned = false;
                decision.desired.unasked.insert(address);
            }
        }
        // A family that is new, or was lost, does not take the other one away.
        let some = candidate.here || addresses(candidate.allocation).any(|a| is_here(&a));
        if !assigned && !some {
            decision.desired.moving.remove(&candidate.id);
        }
        assigned || some
    }

    /// The allocations whose egress IPs this node must not use yet, because the assign hook has not brought them here.
    pub fn unassigned(&self, view: &View, facts: &Facts) -> BTreeSet<EgressId> {
        if !self.assignments.has_hook() {
            return BTreeSet::new();
        }
        let all = view.allocations.allocations.iter().filter(|(_, allocation)| {
            allocation.is_managed()
                && allocation.is_member()
                && addresses(allocation).any(|a| !self.assignments.is_assigned(a))
        });
        all.filter(|(id, allocation)| !allocation.is_here(**id, facts)).map(|(id, _)| *id).collect()
    }

    /// Takes an answer of the assign hook. Returns whether it is to be told that the address is not used here.
    pub fn hook_answered(&mut self, address: IpAddr, answer: AssignmentResult, now: Instant) -> bool {
        self.assignments.answered(address, answer, now)
    }

    /// The addresses that the assign hook does not bring to this node, with the reason for the status.
    pub fn refused_by_hook(&self) -> impl Iterator<Item = (IpAddr, String)> {
        let refused = self.assignments.refused();
        refused
            .map(|(address, why)| (address, format!("the assign hook has not brought {address} to this node: {why}")))
    }
}
