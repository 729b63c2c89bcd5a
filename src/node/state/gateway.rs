//! The gateway part of the state: the liveness of nodes, the egress IPs on this node, and the probes for them.

use super::Node;
use crate::datapath::announce::{self, Claim};
use crate::datapath::names::HEALTH;
use crate::datapath::names::{of_mac, of_uplink};
use crate::model::drain::has_drain_label;
use crate::model::fnv::fnv1a;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::node::host::{Desired, UplinkStatus};
use crate::node::liveness::{Seen, Targets};
use crate::node::moved::Moved;
use crate::node_plan::addresses;
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation};
use anyhow::Result;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
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
/// The pause after a failed probe.
const UNASKABLE: Duration = Duration::from_millis(500);

/// How long a node hands over packets after an allocation has moved to it. Other nodes may still send packets of the
/// connections to the old node, while servers reply to this one.
const HANDOVER: Duration = Duration::from_secs(1);

/// A message from the link.
#[derive(Debug)]
pub enum Heard {
    /// The result of a probe.
    Answers {
        allocations: BTreeSet<EgressId>,
        /// The MAC address that answered for each address; `None` if the probe failed.
        answers: Option<Vec<(EgressId, IpAddr, Option<Mac>)>>,
    },
    /// Another node's probe with a claim.
    Claim {
        /// The probed address.
        address: IpAddr,
        /// The sender's MAC address; all zeros if the probe does not contain it.
        by: Mac,
        claim: Claim,
    },
}

impl Node {
    /// Takes a change of other nodes' liveness.
    pub fn seen(&mut self, seen: Seen) {
        if seen.returns != self.seen.returns {
            self.holding.returned();
        }
        let back = self.seen.dead.difference(&seen.dead).next().is_some();
        // A node that was frozen may have answered for a taken-over egress IP before it noticed.
        self.announce_again |= back;
        self.seen = seen;
        self.update_allocations();
    }

    /// Takes a message from the link.
    pub fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Answers { answers: Some(answers), .. } => {
                self.holding.probed(answers, &self.view, &self.facts, Instant::now());
            }
            Heard::Answers { allocations, answers: None } => self.holding.probe_failed(allocations),
            Heard::Claim { address, by, claim } => self.claimed(address, by, claim),
        }
        self.base = true;
    }

    /// Handles a claim for an egress IP on this node. If no other node reaches this one, the egress IP is of no use
    /// here, and the claiming node, which others reach, can serve it.
    fn claimed(&mut self, address: IpAddr, by: Mac, claim: Claim) {
        let allocations = &self.view.allocations.allocations;
        let of_address = allocations
            .iter()
            .find(|(_, allocation)| allocation.managed && addresses(allocation).any(|a| a == address));
        if let Some((id, allocation)) = of_address.filter(|_| self.seen.alone)
            && allocation.is_here(*id, &self.facts)
            && claim == claim_of(*id, allocation)
        {
            self.holding.claimed(*id, address, by, Instant::now());
        }
    }

    /// Listens for claims while no other node reaches this one.
    fn listen_for_claims(&mut self, uplinks_now: &UplinkStatus) {
        let interfaces = if self.seen.alone { uplinks_now.askable() } else { BTreeMap::new() };
        let listens = self.claims.as_ref().filter(|(_, task)| !task.is_finished()).map(|(on, _)| on);
        if listens.is_some_and(|on| on.iter().eq(interfaces.keys())) || listens.is_none() && interfaces.is_empty() {
            return;
        }
        if let Some((_, task)) = self.claims.take() {
            task.abort();
        }
        if interfaces.is_empty() {
            return;
        }
        let (on, interfaces) = (interfaces.keys().copied().collect(), interfaces.into_values().collect::<Vec<_>>());
        let heard = self.listeners.heard.clone();
        let task = tokio::spawn(async move {
            let tell = |address, by, claim| drop(heard.send(Heard::Claim { address, by, claim }));
            if let Err(e) = announce::listen_for_claims(&interfaces, tell).await {
                tracing::warn!("cannot listen for other nodes' claims of egress IPs: {e:#}");
                tokio::time::sleep(UNASKABLE).await;
            }
        });
        self.claims = Some((on, task.abort_handle()));
    }

    /// Waits for the next deadline of addresses, handovers, faults or pods.
    pub async fn due(&self) {
        let handovers = self.handed.values().map(|(_, until)| *until).min();
        let left = self.left.values().copied().min();
        let of_pods = self.pods.next();
        let told = [self.known_faults.next(), self.unreachable.next()];
        match [self.holding.next(), handovers, left, of_pods].into_iter().chain(told).flatten().min() {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Makes the next reconciliation cover addresses and routes.
    pub fn mark_due(&mut self) {
        self.base = true;
    }

    /// Computes the node's allocations again, after a change of the liveness of nodes or of this node's facts.
    pub(super) fn update_allocations(&mut self) {
        self.facts.dead.clone_from(&self.seen.dead);
        self.facts.lost.clone_from(&self.seen.lost);
        self.holding.note(&self.options.name.as_str().into(), &mut self.facts);
        if !self.stale {
            self.view.update_allocations(&self.cluster, &self.options.name, &self.facts);
            self.host.view(&self.view);
        }
        self.base = true;
    }

    /// Brings the addresses on this node in sync. Returns the number of changes.
    pub(super) async fn reconcile_addresses(&mut self) -> Result<usize> {
        let mut uplinks_now = self.host.uplink_status(&self.view).await?;
        let now = Instant::now();
        if self.holding.judge(&uplinks_now, self.odd_family.as_deref(), now) {
            self.update_allocations();
        }
        // A cordoned node continues to answer probes, because it serves if no other node is left.
        let drained = self.cluster.nodes.get(&*self.options.name).is_some_and(|node| has_drain_label(node));
        let mut decision = self.holding.decide(&self.view, &self.facts, &uplinks_now, drained, now);
        decision.desired.allocations.retain(|id| !uplinks_now.unusable.contains_key(id));
        decision.desired.moving.retain(|id| !uplinks_now.unusable.contains_key(id));
        if self.facts.partial != decision.partial {
            self.facts.partial.clone_from(&decision.partial);
            self.update_allocations();
        }
        let few = decision.new.len() <= FEW;
        let (new, others) = decision.ask.into_iter().partition(|id| few && decision.new.contains(id));
        self.probe(&uplinks_now, new, &[ASK_NEW, ASK]);
        self.probe(&uplinks_now, others, &[ASK]);
        self.listen_for_claims(&uplinks_now);
        self.note_handovers(now);
        let mut changes = self.prepare(&decision.desired)?;
        self.host.announce_ahead(&self.view, &uplinks_now, &self.facts.coming);
        let (placed, mut refused) = self.host.place(&self.view, &uplinks_now, &decision.desired).await?;
        refused.extend(std::mem::take(&mut uplinks_now.unusable));
        changes += placed;
        if std::mem::take(&mut self.announce_again) {
            // Only egress IPs that are on this node are announced.
            let is_here = |id: &&EgressId| {
                self.view
                    .allocations
                    .allocations
                    .get(id)
                    .is_some_and(|allocation| allocation.is_here(**id, &self.facts))
            };
            let taken_over = self.holding.taken_over().into_iter().filter(|id| is_here(&id)).collect();
            self.host.announce_again(&self.view, &uplinks_now, &taken_over);
        }
        self.here = decision.desired.allocations;
        let mut facts = self.host.facts(refused).await?;
        facts.dead.clone_from(&self.facts.dead);
        facts.lost.clone_from(&self.facts.lost);
        facts.partial.clone_from(&self.facts.partial);
        self.note_since(&facts);
        facts.taken = self.taken(&facts);
        facts.relinquished = self.holding.relinquished();
        for (id, why) in self.holding.refused() {
            facts.refused.entry(id).or_insert(why);
        }
        if facts != self.facts {
            self.facts = facts;
            self.update_allocations();
            // The view contains the egress IPs that have just been added only now.
            self.facts.taken = self.taken(&self.facts);
        }
        Ok(changes)
    }

    /// Updates the tables before egress IPs are added. So this node's pods need not wait for the addresses, of which
    /// the kernel adds a thousand in a second. In a planned move, the old node still knows the connections.
    fn prepare(&mut self, desired: &Desired) -> Result<usize> {
        let allocations = &self.view.allocations.allocations;
        let comes = |id: &EgressId| allocations.get(id).is_some_and(|allocation| !allocation.is_here(*id, &self.facts));
        let all: BTreeSet<EgressId> = desired.allocations.iter().copied().filter(comes).collect();
        if all.is_empty() {
            return Ok(0);
        }
        let coming: BTreeSet<EgressId> = all.difference(&desired.moving).copied().collect();
        if !coming.is_empty() {
            self.facts.coming = coming;
            self.update_allocations();
            self.here.extend(&desired.allocations);
        }
        let (changes, _) = self.reconcile_tables()?;
        self.reconcile_connections();
        Ok(changes)
    }

    /// Cleans connection tracking after egress IPs have moved to this node or away from it.
    pub(super) fn reconcile_connections(&mut self) {
        // First set the roles: the connections of an egress IP that has moved away are deleted here and have not
        // ended.
        self.set_roles();
        let moved = Moved::new(&self.view, &self.here);
        if self.moved.as_ref().is_none_or(|before| moved.needs_cleaning(before)) {
            let handed_over = self.handed.keys().chain(self.left.keys()).copied().collect();
            moved.clone().clean(self.options.marks, handed_over, &self.changed_ports, &self.cleaning);
        }
        self.moved = Some(moved);
    }

    /// Records the handovers to and from this node, and drops those that are over.
    fn note_handovers(&mut self, now: Instant) {
        self.handed.retain(|id, (_, until)| *until > now && self.view.allocations.allocations.contains_key(id));
        let by =
            self.view.allocations.allocations.iter().filter_map(|(id, allocation)| Some((*id, allocation.handed_by?)));
        self.handed.extend(by.map(|(id, mac)| (id, (mac, now + HANDOVER))));
        self.left.retain(|_, until| *until > now);
        // Without its uplink this node cannot forward the remaining packets.
        if let Some(before) = self.moved.as_ref().filter(|_| self.holding.is_fit()) {
            let remote = self
                .view
                .allocations
                .allocations
                .iter()
                .filter(|(_, allocation)| matches!(allocation.state, AllocationState::Remote(_)));
            let left = remote.map(|(id, _)| *id).filter(|id| before.was_local(*id));
            self.left.extend(left.map(|id| (id, now + HANDOVER)));
        }
    }

    /// Records `since` of the allocation of each egress IP on this node.
    fn note_since(&mut self, facts: &Facts) {
        let here = |id: &EgressId, allocation: &NodeAllocation| allocation.managed && allocation.is_here(*id, facts);
        let allocations = &self.view.allocations.allocations;
        self.since.retain(|id, _| allocations.get(id).is_some_and(|allocation| here(id, allocation)));
        for (id, allocation) in allocations.iter().filter(|(id, allocation)| here(id, allocation)) {
            let since = self.since.entry(*id).or_insert(allocation.since);
            if allocation.by_allocations {
                *since = allocation.since;
            }
        }
    }

    /// The allocations that this node has taken over. If an allocation has come to name another node while the egress
    /// IP was here, that node has taken it over from this one, which does not receive its messages. Two nodes that do
    /// not reach each other must not claim an allocation alternately.
    fn taken(&self, facts: &Facts) -> BTreeMap<EgressId, i64> {
        let allocations = self
            .view
            .allocations
            .allocations
            .iter()
            .filter(|(_, allocation)| allocation.managed && !allocation.by_allocations);
        let allocations = allocations.filter(|(id, allocation)| {
            let claims = allocation.taken_over && self.since.get(id) == Some(&allocation.since);
            allocation.is_here(**id, facts) && (claims || facts_taken(&self.facts, **id) == Some(allocation.since))
        });
        allocations.map(|(id, allocation)| (*id, allocation.since)).collect()
    }

    /// Probes the addresses of allocations in the background, once with each of the timeouts, and reports each result.
    fn probe(&self, uplinks_now: &UplinkStatus, allocations: BTreeSet<EgressId>, patience: &'static [Duration]) {
        if allocations.is_empty() {
            return;
        }
        let (ids, mut targets): (Vec<EgressId>, Vec<_>) =
            uplinks_now.targets(&self.view, &allocations).into_iter().unzip();
        // A node that no other node reaches claims nothing.
        for (id, target) in ids.iter().zip(&mut targets).filter(|_| self.seen.reached) {
            target.claim = self.view.allocations.allocations.get(id).map(|allocation| claim_of(*id, allocation));
        }
        let heard = self.listeners.heard.clone();
        tokio::spawn(async move {
            for patience in patience {
                let answers = match announce::probe(&targets, *patience).await {
                    Ok(macs) => {
                        let each = ids.iter().zip(&targets).zip(macs);
                        Some(each.map(|((id, target), mac)| (*id, target.address, mac)).collect())
                    }
                    Err(e) => {
                        tracing::warn!("cannot probe egress IPs on the link: {e:#}");
                        tokio::time::sleep(UNASKABLE).await;
                        None
                    }
                };
                // Without a receiver the daemon is ending.
                let _ = heard.send(Heard::Answers { allocations: allocations.clone(), answers });
            }
        });
    }

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
        let used = self.uses.values().flat_map(|u| &u.allocations).filter_map(|id| allocations.allocations.get(id));
        let own = allocations.allocations.values().filter(|allocation| allocation.member);
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

/// The claim by which other nodes recognise a probe for an allocation's egress IP as an Egret node's. Hosts that know
/// only the link do not know it; those that can read the cluster's objects do.
fn claim_of(id: EgressId, allocation: &NodeAllocation) -> Claim {
    let [.., a, b, c, d, e, f] = fnv1a(allocation.gateway.bytes().chain(id.to_be_bytes())).to_be_bytes();
    // All zeros are no claim.
    [a, b, c, d, e, f | 1]
}

fn facts_taken(facts: &Facts, id: EgressId) -> Option<i64> {
    facts.taken.get(&id).copied()
}
