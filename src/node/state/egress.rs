//! The egress IPs on this node: the steps from the state of the uplinks to the addresses on them.

use super::NodeDaemon;
use super::handovers::Handovers;
use super::link::ClaimListener;
use super::steps::Input;
use crate::model::drain::has_drain_label;
use crate::model::marks::EgressId;
use crate::node::holding::{Decision, Holding};
use crate::node::host::{Desired, UplinkStatus};
use crate::node::liveness::PeerLiveness;
use crate::node_plan::allocations::{Assignment, Facts, NodeAllocation};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// How long to wait for an answer to a probe.
const ASK: Duration = Duration::from_millis(100);
/// How long to wait if the address is used for the first time. A host that answers later, to the second probe, keeps
/// the address, and this node gives it up. For an address of another node, which may be frozen and return, that would
/// be too late, because its connections would have moved.
const ASK_NEW: Duration = Duration::from_millis(20);
/// The largest number of addresses for which the short wait is used. The answers for more addresses take longer.
const FEW: usize = 64;

/// The egress IPs on this node.
#[derive(Debug)]
pub(super) struct Egress {
    pub(super) holding: Holding,
    /// The uplinks when they were last read.
    pub(super) uplinks: UplinkStatus,
    /// The last decision.
    decision: Decision,
    pub(super) handovers: Handovers,
    claims: ClaimListener,
    /// The allocations whose egress IPs are on this node.
    pub(super) here: BTreeSet<EgressId>,
    /// For each egress IP on this node, `since` of its allocation when it was added, or when the allocation last
    /// named this node.
    since: BTreeMap<EgressId, i64>,
    /// The takeovers that the metrics have counted, with `since` of the allocation.
    pub(super) counted: BTreeMap<EgressId, i64>,
}

impl Egress {
    /// `taken`: what an earlier daemon has taken over.
    pub(super) fn new(holding: Holding, taken: BTreeMap<EgressId, i64>) -> Self {
        Egress {
            holding,
            uplinks: UplinkStatus::default(),
            decision: Decision::default(),
            handovers: Handovers::default(),
            claims: ClaimListener::default(),
            here: BTreeSet::new(),
            since: BTreeMap::new(),
            counted: taken,
        }
    }

    /// The desired addresses of the last decision.
    pub(super) fn desired(&self) -> &Desired {
        &self.decision.desired
    }
}

impl NodeDaemon {
    /// Takes a change of other nodes' liveness.
    pub fn set_liveness(&mut self, liveness: PeerLiveness) {
        if liveness.returns != self.liveness.returns {
            self.egress.holding.returned(Instant::now());
        }
        // A node that was frozen may have answered for a taken-over egress IP before it noticed.
        if self.liveness.dead.difference(&liveness.dead).next().is_some() {
            self.pending.raise(Input::PeerReturned);
        }
        self.egress.holding.set_alone(liveness.alone);
        self.liveness = liveness;
        self.pending.raise(Input::Liveness);
        self.pending.raise(Input::Host);
    }

    /// The step [`Uplinks`](super::steps::Step::Uplinks).
    pub(super) async fn read_uplinks(&mut self) -> Result<()> {
        self.egress.uplinks = self.host.uplink_status(&self.view).await?;
        self.egress.holding.set_probed(self.probed_uplinks());
        let apart = self.problems.tunnel_family.as_deref();
        if self.egress.holding.judge(&self.egress.uplinks, apart, Instant::now()) {
            self.pending.raise(Input::Facts);
        }
        Ok(())
    }

    /// The step [`Decision`](super::steps::Step::Decision).
    pub(super) fn decide(&mut self) {
        // A cordoned node continues to answer probes, because it serves if no other node is left.
        let drained = self.cluster.nodes.get(&*self.options.name).is_some_and(|node| has_drain_label(node));
        let Egress { holding, uplinks, .. } = &mut self.egress;
        let mut decision = holding.decide(&self.view, &self.facts, uplinks, drained, Instant::now());
        decision.desired.allocations.retain(|id| !uplinks.unusable.contains_key(id));
        decision.desired.moving.retain(|id| !uplinks.unusable.contains_key(id));
        let unassigned = holding.unassigned(&self.view, &self.facts);
        if self.facts.partial != decision.partial || self.facts.unassigned != unassigned {
            self.facts.partial.clone_from(&decision.partial);
            self.facts.unassigned = unassigned;
            self.pending.raise(Input::Facts);
        }
        let few = decision.new.len() <= FEW;
        let (new, others) =
            std::mem::take(&mut decision.ask).into_iter().partition(|id| few && decision.new.contains(id));
        let hook = std::mem::take(&mut decision.hook);
        self.egress.decision = decision;
        self.tell_hook(hook);
        self.probe_or_ask(new, &[ASK_NEW, ASK]);
        self.probe_or_ask(others, &[ASK]);
        self.egress.claims.listen(self.liveness.alone, &self.egress.uplinks, &self.listeners.link);
    }

    /// Probes the link, or asks the nodes that could hold what routers announce.
    fn probe_or_ask(&self, allocations: BTreeSet<EgressId>, timeouts: &'static [Duration]) {
        let is_routed = |id: &EgressId| self.view.allocations.allocations.get(id).is_some_and(|a| a.routed);
        let (routed, others) = allocations.into_iter().partition(is_routed);
        self.ask_holders(routed, timeouts);
        self.probe(others, timeouts);
    }

    /// The step [`Handovers`](super::steps::Step::Handovers).
    pub(super) fn update_handovers(&mut self) {
        // Without its uplink this node cannot forward the remaining packets.
        let before = self.connections.moved().filter(|_| self.egress.holding.is_fit());
        self.egress.handovers.update(&self.view, before, Instant::now());
    }

    /// The step [`Coming`](super::steps::Step::Coming). In a planned move, the old node still knows the connections,
    /// so its egress IP does not count as coming.
    pub(super) fn find_coming(&mut self) {
        let desired = &self.egress.decision.desired;
        let allocations = &self.view.allocations.allocations;
        let comes = |id: &EgressId| allocations.get(id).is_some_and(|allocation| !allocation.is_here(*id, &self.facts));
        let all: BTreeSet<EgressId> = desired.allocations.iter().copied().filter(comes).collect();
        if all.is_empty() {
            return;
        }
        let coming: BTreeSet<EgressId> = all.difference(&desired.moving).copied().collect();
        if !coming.is_empty() {
            self.egress.here.extend(&desired.allocations);
            self.facts.coming = coming;
            self.pending.raise(Input::Facts);
        }
        self.pending.raise(Input::Coming);
    }

    /// The step [`Addresses`](super::steps::Step::Addresses). Returns the number of changes.
    pub(super) async fn sync_addresses(&mut self) -> Result<usize> {
        let Egress { uplinks, decision, .. } = &self.egress;
        self.host.announce_ahead(&self.view, uplinks, &self.facts.coming);
        let (changes, mut refused) = self.host.sync_egress_ips(&self.view, uplinks, &decision.desired).await?;
        refused.extend(uplinks.unusable.clone());
        self.egress.here = decision.desired.allocations.clone();
        let mut facts = self.host.facts(refused).await?;
        facts.dead.clone_from(&self.facts.dead);
        facts.lost.clone_from(&self.facts.lost);
        facts.partial.clone_from(&self.facts.partial);
        facts.unassigned.clone_from(&self.facts.unassigned);
        self.note_since(&facts);
        facts.taken = self.taken(&facts);
        facts.relinquished = self.egress.holding.relinquished();
        for (id, why) in self.egress.holding.refused().chain(self.refused_by_hook()) {
            facts.refused.entry(id).or_insert(why);
        }
        if facts != self.facts {
            self.facts = facts;
            self.pending.raise(Input::Facts);
            self.pending.raise(Input::Addresses);
        }
        Ok(changes)
    }

    /// The step [`Announcements`](super::steps::Step::Announcements).
    pub(super) fn announce_again(&self) {
        // Only egress IPs that are on this node are announced.
        let allocations = &self.view.allocations.allocations;
        let is_here = |id: &EgressId| allocations.get(id).is_some_and(|a| a.is_here(*id, &self.facts));
        let taken_over = self.egress.holding.taken_over().into_iter().filter(is_here).collect();
        self.host.announce_again(&self.view, &self.egress.uplinks, &taken_over);
    }

    /// The step [`TakenOver`](super::steps::Step::TakenOver). The view contains the egress IPs that have just been
    /// added only now.
    pub(super) fn find_taken_over(&mut self) {
        self.facts.taken = self.taken(&self.facts);
    }

    /// Records `since` of the allocation of each egress IP on this node.
    fn note_since(&mut self, facts: &Facts) {
        let here =
            |id: &EgressId, allocation: &NodeAllocation| allocation.is_managed() && allocation.is_here(*id, facts);
        let allocations = &self.view.allocations.allocations;
        let since = &mut self.egress.since;
        since.retain(|id, _| allocations.get(id).is_some_and(|allocation| here(id, allocation)));
        for (id, allocation) in allocations.iter().filter(|(id, allocation)| here(id, allocation)) {
            let since = since.entry(*id).or_insert(allocation.since);
            if allocation.is_assigned_here() {
                *since = allocation.since;
            }
        }
    }

    /// The allocations that this node has taken over. If an allocation has come to name another node while the egress
    /// IP was here, that node has taken it over from this one, which does not receive its messages. Two nodes that do
    /// not reach each other must not claim an allocation alternately.
    fn taken(&self, facts: &Facts) -> BTreeMap<EgressId, i64> {
        let allocations = self.view.allocations.allocations.iter();
        let others = allocations.filter(|(_, allocation)| allocation.is_managed() && !allocation.is_assigned_here());
        let taken = others.filter(|(id, allocation)| {
            let claims =
                allocation.assignment == Assignment::TakenOver && self.egress.since.get(id) == Some(&allocation.since);
            let before = self.facts.taken.get(id) == Some(&allocation.since);
            allocation.is_here(**id, facts) && (claims || before)
        });
        taken.map(|(id, allocation)| (*id, allocation.since)).collect()
    }
}
