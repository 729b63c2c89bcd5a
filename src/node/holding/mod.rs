//! Which egress IPs this node takes, keeps and gives up.
//!
//! Before the node adds an egress IP, it probes the link for another host that has it. The node gives an egress IP up
//! when the next owner reports that it holds it, or when the node detects that another one has taken it over while this
//! one could not know, because it was frozen or cut off. If the node's uplink is lost, it gives its egress IPs up
//! before the other nodes take them over.

mod egress_ip;
mod fitness;
mod hook;

use super::assign::{Assignments, Requests};
use super::host::{Desired, UplinkStatus};
use super::liveness::LivenessSettings;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation, Placing};
use crate::node_plan::{View, addresses};
use egress_ip::{Cause, EgressIp, ProbeReply};
use egret_nft::mac::{Mac, Shown};
use fitness::Fitness;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

pub use egress_ip::EgressIpState;
pub use fitness::ProbedUplinks;

/// The largest number of addresses in one log line.
const NAMED: usize = 6;
/// How long an egress IP stays after another node holds it. Other nodes send to this one until they have received that
/// node's report.
const GRACE: Duration = Duration::from_millis(300);
/// The pauses before an egress IP in conflict is probed again: at first, and later. At first the host that answers may
/// be a node that is about to give the egress IP up.
const AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(2)];
/// How long the first of these pauses is used.
const AT_FIRST: Duration = Duration::from_secs(5);
/// An egress IP that another node claims is not probed before this and [`AGAIN`].
const CLAIMED: Duration = Duration::from_secs(5);
/// A node that has just got its uplink back, or that others reach again, takes no egress IP that routers announce for this
/// long. Its requests to other nodes may be lost: the kernel asks for a neighbour's MAC address again after a second
/// (`retrans_time_ms`), and a switch may take as long to forward.
const RETURN: Duration = Duration::from_secs(2);
/// A node that has given up all of its allocations has no health address for this long. Source nodes that have not
/// received the reports of the takeover must not send to it.
const WITHHELD: Duration = Duration::from_secs(60);

/// The egress IPs on this node, and what the node does with them.
#[derive(Debug)]
pub struct Holding {
    settings: LivenessSettings,
    started: Instant,
    fitness: Fitness,
    /// The egress IPs that are not in their default state.
    ips: BTreeMap<EgressId, EgressIp>,
    /// The allocations at the last decision, sorted; `None` before the first one.
    known: Option<Vec<EgressId>>,
    /// Whether the next decision probes the egress IPs that are on this node.
    verify: bool,
    /// What the assign hook has said.
    assignments: Assignments,
    /// Whether no other node reaches this one.
    alone: bool,
    /// When the node last got its uplink back, or was reached again.
    returned: Option<Instant>,
    next: Option<Instant>,
}

/// What is to be done now.
#[derive(Debug, Default)]
pub struct Decision {
    /// The desired addresses of this node.
    pub desired: Desired,
    /// The allocations whose addresses are to be probed.
    pub ask: BTreeSet<EgressId>,
    /// The allocations among them that are new: no node of Egret has held them.
    pub new: BTreeSet<EgressId>,
    /// The allocations that are to be here without a family that this node has lost.
    pub partial: BTreeSet<EgressId>,
    /// What the assign hook is to be told.
    pub hook: Requests,
}

/// An egress IP that may be on this node.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    id: EgressId,
    allocation: &'a NodeAllocation,
    /// Whether it is here now.
    here: bool,
}

/// The inputs of a decision.
struct Inputs<'a> {
    uplinks_now: &'a UplinkStatus,
    facts: &'a Facts,
    /// The nodes that can hold the egress IPs of each gateway.
    gateway_nodes: &'a BTreeMap<Name, BTreeSet<Name>>,
    /// Whether the egress IPs that are on this node are probed.
    verify: bool,
    now: Instant,
}

impl Holding {
    /// The state at the daemon's start. Another node may hold the egress IPs that are on this node.
    pub fn new(settings: LivenessSettings, now: Instant) -> Self {
        Holding {
            settings,
            started: now,
            fitness: Fitness::default(),
            ips: BTreeMap::new(),
            known: None,
            verify: true,
            assignments: Assignments::default(),
            alone: false,
            returned: None,
            next: None,
        }
    }

    /// Handles the end of a time in which this node was frozen or cut off: other nodes may have taken over its egress
    /// IPs.
    pub fn returned(&mut self, now: Instant) {
        self.verify = true;
        self.returned = Some(now);
        self.assignments.confirm(now);
    }

    /// Sets whether no other node reaches this one.
    pub fn set_alone(&mut self, alone: bool) {
        self.alone = alone;
    }

    /// Updates whether this node can hold egress IPs. Returns whether that has changed. `apart` is the reason why no
    /// other node reaches this one, if there is one.
    pub fn judge(&mut self, uplinks_now: &UplinkStatus, apart: Option<&str>, now: Instant) -> bool {
        let was_fit = self.is_fit();
        let changed = self.fitness.judge(uplinks_now, apart, now);
        if !was_fit && self.is_fit() {
            self.returned = Some(now);
        }
        changed
    }

    /// Sets the uplinks of gateways with probes. They count from the next [`judge`](Self::judge) on.
    pub fn set_probed(&mut self, probed: ProbedUplinks) {
        self.fitness.set_probed(probed);
    }

    /// Whether this node can hold egress IPs.
    pub fn is_fit(&self) -> bool {
        self.fitness.unfit_since().is_none()
    }

    /// The uplinks that this node cannot use, with the reasons.
    pub fn lost(&self) -> impl Iterator<Item = (&UplinkKey, &str)> {
        self.fitness.lost()
    }

    /// Adds this node's own liveness to the facts: it is dead, or has lost some of its uplinks.
    pub fn note(&self, node: &Name, facts: &mut Facts) {
        if !self.is_fit() {
            facts.dead.insert(node.clone());
        } else if self.lost().next().is_some() {
            facts.lost.insert(node.clone(), self.lost().map(|(key, _)| key.clone()).collect());
        }
    }

    /// When the next decision is due, if nothing else happens.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Decides which addresses are to be on this node.
    pub fn decide(
        &mut self,
        view: &View,
        facts: &Facts,
        uplinks_now: &UplinkStatus,
        drained: bool,
        now: Instant,
    ) -> Decision {
        let mut decision = Decision::default();
        let allocations = &view.allocations.allocations;
        self.next = None;
        self.drop_ended(allocations);
        let verify = std::mem::take(&mut self.verify);
        let gateway_nodes = &view.allocations.gateway_nodes;
        let inputs = Inputs { uplinks_now, facts, gateway_nodes, verify, now };
        self.assignments.begin();
        // The uplinks of the egress IPs that are on this node because their allocations say so.
        let mut assigned: Option<BTreeSet<UplinkKey>> = None;
        for (id, allocation) in allocations.iter().filter(|(_, allocation)| allocation.placing != Placing::Never) {
            let here = allocation.is_here(*id, facts) || uplinks_now.is_served(allocation, facts);
            if !self.stays(Candidate { id: *id, allocation, here }, &inputs, &mut decision) {
                continue;
            }
            if allocation.is_assigned_here() {
                assigned.get_or_insert_default().extend(allocation.needs());
            }
            decision.desired.allocations.insert(*id);
            addresses(allocation).for_each(|address| self.assignments.keep(address));
            self.note_partial(*id, allocation, &inputs, &mut decision);
        }
        decision.hook = self.assignments.end();
        self.wake_at(self.assignments.next());
        let ips = &mut self.ips;
        decision.ask.retain(|id| !std::mem::replace(&mut ips.entry(*id).or_default().probing, true));
        ips.retain(|_, ip| *ip != EgressIp::default());
        if let Some(known) = self.known.replace(allocations.keys().copied().collect()) {
            decision.new = decision.ask.iter().copied().filter(|id| known.binary_search(id).is_err()).collect();
        }
        let given_up = self
            .ips
            .iter()
            .filter(|(_, ip)| matches!(ip.state, EgressIpState::Relinquished { at, .. } if now - at < WITHHELD));
        let given_up: BTreeSet<UplinkKey> =
            given_up.filter_map(|(id, _)| allocations.get(id)).flat_map(NodeAllocation::needs).collect();
        let withheld = !given_up.is_empty() && assigned.is_none();
        let assigned = assigned.unwrap_or_default();
        let usable = self.fitness.works().iter().filter(|key| assigned.contains(*key) || !given_up.contains(*key));
        decision.desired.uplinks = usable.cloned().collect();
        let by_probes = self.fitness.lost().map(|(key, _)| key).filter(|key| key.gateway.is_some());
        decision.desired.failed_probes = by_probes.cloned().collect();
        let holds =
            allocations.values().any(|allocation| allocation.state == AllocationState::Local && allocation.is_member());
        let left = drained && !holds && decision.desired.allocations.is_empty();
        decision.desired.health = view.allocations.is_gateway && self.is_fit() && !withheld && !left;
        decision
    }

    /// Whether the egress IP is to be on this node.
    fn stays(&mut self, candidate: Candidate, inputs: &Inputs, decision: &mut Decision) -> bool {
        let Candidate { id, allocation, here } = candidate;
        if !here {
            self.apply(id, Cause::Absent);
        }
        let is_lost = self.is_to_give_up(allocation, inputs.now) && self.gives_up(allocation);
        let is_lost = is_lost || self.is_apart(allocation, inputs);
        if here && (is_lost || self.ips.get(&id).is_some_and(|ip| ip.state.is_contested())) {
            self.give_up(id, allocation, inputs.now);
            return false;
        }
        let can_ask = inputs.uplinks_now.can_ask(allocation);
        if let Placing::Take | Placing::TakeHanded = allocation.placing {
            // If the link cannot be probed, the attempt to add the address says why.
            let ask = allocation.placing == Placing::Take && can_ask;
            let takes = if ask {
                self.takes(candidate, inputs, decision)
            } else {
                // A host that answers may be the node that hands it over.
                decision.desired.moving.insert(id);
                true
            };
            let takes = takes && self.is_assigned(candidate, inputs, decision);
            self.apply(id, if takes { Cause::Taken } else { Cause::NotYet });
            if !allocation.is_assigned_here() && ask {
                self.apply(id, Cause::OwnerDead);
            }
            return takes;
        }
        self.set_cleared(id, None);
        // After a start, it may be that only this node assumes that another one holds it.
        if here && inputs.verify && can_ask {
            decision.ask.insert(id);
        }
        match (allocation.placing, here) {
            (Placing::Keep, true) => {
                self.apply(id, Cause::Kept);
                true
            }
            (Placing::Leave, true) => self.is_in_grace_period(id, allocation, inputs.now),
            _ => {
                self.apply(id, Cause::Withdrawn);
                false
            }
        }
    }

    /// Whether an egress IP that this node is to take is added or kept now. Otherwise it is probed first.
    fn takes(&mut self, candidate: Candidate, inputs: &Inputs, decision: &mut Decision) -> bool {
        let Candidate { id, allocation, here } = candidate;
        let Inputs { uplinks_now, facts, verify, now, .. } = *inputs;
        let due = self.returned.map(|returned| returned + RETURN).filter(|due| *due > now);
        if allocation.routed && !here && due.is_some() {
            // What was asked before does not count.
            self.set_cleared(id, None);
            self.wake_at(due);
            return false;
        }
        let ip = self.ips.get(&id);
        let cleared = ip.and_then(|ip| ip.cleared.as_ref());
        let is_unasked = |a: IpAddr| {
            uplinks_now.is_usable(a, allocation)
                && !facts.addresses.contains(&a)
                && cleared.is_none_or(|set| !set.contains(&a))
        };
        let unasked = addresses(allocation).any(is_unasked);
        // A family that was lost has returned, or is new. The traffic of the other family goes on meanwhile.
        let some = here || addresses(allocation).any(|a| facts.addresses.contains(&a));
        if here || cleared.is_some() && (some || !unasked) {
            if here && verify || some && unasked {
                decision.ask.insert(id);
            }
            return true;
        }
        if !self.is_fit() || self.is_apart(allocation, inputs) {
            return false;
        }
        let answer = ip.and_then(|ip| ip.state.answer());
        let due = answer.map(|a| a.last + AGAIN[usize::from(now - a.first > AT_FIRST)]);
        match due {
            Some(due) if due > now => self.wake_at(Some(due)),
            _ => drop(decision.ask.insert(id)),
        }
        false
    }

    /// Whether other nodes could have taken over an egress IP that routers announce while none reaches this node. Routers
    /// may still send to this one then, and nobody on a link tells it of the other node.
    fn is_apart(&self, allocation: &NodeAllocation, inputs: &Inputs) -> bool {
        let others = inputs.gateway_nodes.get(&allocation.gateway).is_some_and(|nodes| nodes.len() > 1);
        allocation.routed && self.alone && others
    }

    /// Whether an egress IP that another node holds stays on this node for now.
    fn is_in_grace_period(&mut self, id: EgressId, allocation: &NodeAllocation, now: Instant) -> bool {
        // After a start, no node has been found dead yet, and the reported holder of the egress IP may be dead.
        let known = self.started + self.settings.detection() + Duration::from_millis(500);
        // A router that knew two ways would send to both.
        let grace = if allocation.routed { Duration::ZERO } else { GRACE };
        self.apply(id, Cause::MovedAway { until: known.max(now + grace) });
        let Some(EgressIpState::InGracePeriod { until }) = self.state(id) else { return false };
        self.wake_at(Some(until).filter(|until| *until > now));
        until > now
    }

    /// Records the addresses of an allocation that are not to be here yet, and whether the allocation is here without
    /// one of its families.
    fn note_partial(&mut self, id: EgressId, allocation: &NodeAllocation, inputs: &Inputs, decision: &mut Decision) {
        let Inputs { uplinks_now, facts, .. } = *inputs;
        let is_missing = |a: &IpAddr| !facts.addresses.contains(a);
        let missing = addresses(allocation).filter(is_missing).count();
        let some_are_here = missing > 0 && missing < addresses(allocation).count();
        if !uplinks_now.is_partial(allocation) && !some_are_here {
            return;
        }
        decision.partial.insert(id);
        let mut cleared = self.ips.get_mut(&id).and_then(|ip| ip.cleared.as_mut());
        if let Some(cleared) = &mut cleared {
            cleared.retain(|address| uplinks_now.is_usable(*address, allocation));
        }
        if !decision.desired.moving.contains(&id) {
            let unasked = addresses(allocation)
                .filter(is_missing)
                .filter(|a| cleared.as_ref().is_none_or(|cleared| !cleared.contains(a)));
            decision.desired.unasked.extend(unasked);
        }
    }

    /// Whether other nodes detect by now that this node cannot use the uplinks of an allocation.
    fn is_to_give_up(&mut self, allocation: &NodeAllocation, now: Instant) -> bool {
        let since = self.fitness.unfit_since().into_iter().chain(self.fitness.lost_since(allocation.needs())).min();
        let at = since.map(|since| since + self.settings.safe_absence());
        self.wake_at(at.filter(|at| *at > now));
        at.is_some_and(|at| at <= now)
    }

    /// Whether a node that cannot use an egress IP gives it up: the node is out of reach anyway, or another node can
    /// serve it.
    fn gives_up(&self, allocation: &NodeAllocation) -> bool {
        self.fitness.is_cut_off() || matches!(allocation.state, AllocationState::Remote(_))
    }

    fn give_up(&mut self, id: EgressId, allocation: &NodeAllocation, now: Instant) {
        self.set_cleared(id, None);
        let since = allocation.is_assigned_here().then_some(allocation.since);
        self.apply(id, Cause::GivenUp { since, at: now });
    }

    fn wake_at(&mut self, at: Option<Instant>) {
        self.next = [self.next, at].into_iter().flatten().min();
    }

    fn state(&self, id: EgressId) -> Option<EgressIpState> {
        self.ips.get(&id).map(|ip| ip.state)
    }

    /// Applies the table of transitions.
    fn apply(&mut self, id: EgressId, cause: Cause) {
        match self.ips.get_mut(&id) {
            Some(ip) => ip.apply(id, cause),
            None if EgressIpState::default().after(cause) == EgressIpState::default() => {}
            None => self.ips.entry(id).or_default().apply(id, cause),
        }
    }

    fn set_cleared(&mut self, id: EgressId, cleared: Option<BTreeSet<IpAddr>>) {
        if let Some(ip) = self.ips.get_mut(&id) {
            ip.cleared = cleared;
        }
    }

    /// Drops the states of allocations that are gone, and those that belong to an earlier version of an allocation.
    fn drop_ended(&mut self, allocations: &BTreeMap<EgressId, NodeAllocation>) {
        for (id, ip) in &mut self.ips {
            let allocation = allocations.get(id);
            let assigned =
                allocation.filter(|allocation| allocation.is_assigned_here()).map(|allocation| allocation.since);
            if let EgressIpState::Relinquished { since, .. } = ip.state
                && assigned != Some(since)
            {
                ip.apply(*id, Cause::Reassigned);
            }
            if allocation.is_none_or(|allocation| allocation.placing == Placing::Never) {
                ip.apply(*id, Cause::Ended);
                ip.cleared = None;
            }
        }
    }

    /// Takes the results of probes: for each address the MAC address that answered.
    pub fn probed(&mut self, results: Vec<(EgressId, IpAddr, Option<Mac>)>, view: &View, facts: &Facts, now: Instant) {
        let mut answered: BTreeMap<EgressId, (IpAddr, Mac)> = BTreeMap::new();
        let mut unanswered: BTreeMap<EgressId, BTreeSet<IpAddr>> = BTreeMap::new();
        for (id, address, mac) in results {
            let unanswered = unanswered.entry(id).or_default();
            match mac {
                Some(mac) => drop(answered.insert(id, (address, mac))),
                None => drop(unanswered.insert(address)),
            }
        }
        let mut conflicts: Vec<String> = Vec::new();
        for (id, unanswered) in unanswered {
            let ip = self.ips.entry(id).or_default();
            ip.probing = false;
            let allocation = view.allocations.allocations.get(&id);
            if allocation.is_some_and(|allocation| allocation.placing == Placing::TakeHanded) {
                continue;
            }
            let Some((address, mac)) = answered.get(&id).copied() else {
                ip.cleared.get_or_insert_default().extend(unanswered);
                continue;
            };
            let before = ip.state.answer().map(|answer| answer.first);
            let by_node = allocation.is_some_and(|allocation| allocation.routed);
            let answer = ProbeReply { address, mac, by_node, first: before.unwrap_or(now), last: now };
            if before.is_none() {
                conflicts.push(format!("{address} at {}", Shown(mac)));
            }
            ip.cleared = None;
            let here = allocation.is_some_and(|allocation| allocation.is_here(id, facts));
            ip.apply(id, if here { Cause::Contested(answer) } else { Cause::Answered(answer) });
        }
        if !conflicts.is_empty() {
            let (count, more) = (conflicts.len(), if conflicts.len() > NAMED { ", ..." } else { "" });
            conflicts.truncate(NAMED);
            tracing::warn!(
                count,
                "address conflict: another host on the link has egress IPs: {}{more}",
                conflicts.join(", ")
            );
        }
    }

    /// Handles the claim of another node, which others reach, for an egress IP on this node. This node gives it up,
    /// and does not probe it before the other node has had the time to take it.
    pub fn claimed(&mut self, id: EgressId, address: IpAddr, by: Mac, now: Instant) {
        let who = if by == Mac::default() { String::new() } else { format!(" at {}", Shown(by)) };
        tracing::warn!(
            %address,
            "no node reaches this one, and a node{who} that others reach claims the egress IP; given up"
        );
        self.set_cleared(id, None);
        self.apply(
            id,
            Cause::Contested(ProbeReply { address, mac: by, by_node: false, first: now, last: now + CLAIMED }),
        );
    }

    /// Handles a failed probe: the next decision tries again.
    pub fn probe_failed(&mut self, ids: BTreeSet<EgressId>) {
        for id in ids {
            if let Some(ip) = self.ips.get_mut(&id) {
                ip.probing = false;
            }
        }
    }

    /// The egress IPs that another host has, with the reason for the status.
    pub fn refused(&self) -> impl Iterator<Item = (EgressId, String)> {
        let answers = self.ips.iter().filter_map(|(id, ip)| Some((*id, ip.state.answer()?)));
        answers.map(|(id, ProbeReply { address, mac, by_node, .. })| {
            if by_node {
                let mac = Shown(mac);
                return (
                    id,
                    format!("the node with the tunnel MAC address {mac} holds {address}, and has taken it over"),
                );
            }
            let why = format!(
                "{address} is another host's: {} answers for it on the link; this node takes it as soon as no host \
                 answers; find that host, or take the address out of the gateway's spec.addresses",
                Shown(mac)
            );
            (id, why)
        })
    }

    /// The egress IPs that the allocations assign to this node, and that it gave up.
    pub fn relinquished(&self) -> BTreeSet<EgressId> {
        self.with_state(|state| matches!(state, EgressIpState::Relinquished { .. }))
    }

    /// The egress IPs that this node takes over or has taken over from other nodes.
    pub fn taken_over(&self) -> BTreeSet<EgressId> {
        self.with_state(|state| *state == EgressIpState::TakenOver)
    }

    /// The states of the egress IPs. Those that are not listed are in standby.
    pub fn states(&self) -> impl Iterator<Item = (EgressId, EgressIpState)> {
        self.ips.iter().map(|(id, ip)| (*id, ip.state))
    }

    fn with_state(&self, has: impl Fn(&EgressIpState) -> bool) -> BTreeSet<EgressId> {
        self.ips.iter().filter(|(_, ip)| has(&ip.state)).map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests;
