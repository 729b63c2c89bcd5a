//! The gateway's part: who lives, which addresses are here, and what the link says of them.

use super::Node;
use crate::datapath::announce::{self, Claim};
use crate::datapath::names::HEALTH;
use crate::datapath::names::{of_mac, of_uplink};
use crate::model::drain::has_drain_label;
use crate::model::fnv::fnv1a;
use crate::model::mac::Mac;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::node::host::{Desired, UplinkStatus};
use crate::node::liveness::{Seen, Targets};
use crate::node::moved::Moved;
use crate::node_plan::addresses;
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// How long the link has to say that somebody has an address.
const ASK: Duration = Duration::from_millis(100);
/// The same for an address that is used for the first time. Who answers later than this, while the link is asked
/// again, has it all the same, and this node gives it up. Of one that another node had, which may be frozen and come
/// to, that would be too late: its connections would have come here.
const ASK_NEW: Duration = Duration::from_millis(20);
/// Of more addresses than this the answers may take longer, were it only for their number.
const FEW: usize = 64;
/// A link that cannot be asked is asked again after this long.
const UNASKABLE: Duration = Duration::from_millis(500);

/// A node hands over for as long after an allocation has been moved to it: others may not have heard of it yet, and
/// send to the old node what servers answer to this one.
const HANDOVER: Duration = Duration::from_secs(1);

/// What the link said.
#[derive(Debug)]
pub enum Heard {
    /// Of some allocations' addresses, when it was asked.
    Answers {
        /// The allocations.
        allocations: BTreeSet<EgressId>,
        /// Who answered for each address; `None`: it could not be asked.
        answers: Option<Vec<(EgressId, IpAddr, Option<Mac>)>>,
    },
    /// Somebody asked for an address, and claims it.
    Claim {
        /// The address.
        address: IpAddr,
        /// Who asked; all zeros where the question does not say.
        by: Mac,
        /// What the question says beside.
        claim: Claim,
    },
}

impl Node {
    /// Nodes have died or come back.
    pub fn seen(&mut self, seen: Seen) {
        if seen.returns != self.seen.returns {
            self.holding.returned();
        }
        let back = self.seen.dead.difference(&seen.dead).next().is_some();
        // Who was frozen may have answered for what was taken over from it, before it has found out.
        self.announce_again |= back;
        self.seen = seen;
        self.update_allocations();
    }

    /// The link has answered.
    pub fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Answers { answers: Some(answers), .. } => {
                self.holding.heard(answers, &self.view, &self.facts, Instant::now());
            }
            Heard::Answers { allocations, answers: None } => self.holding.unheard(allocations),
            Heard::Claim { address, by, claim } => self.claimed(address, by, claim),
        }
        self.base = true;
    }

    /// A node that others reach asks for an address, and no other node reaches this one: what is here is of no use to
    /// them, and that one can serve.
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

    /// While no other node reaches this one, listens whether one that others reach asks for what is here.
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
                tracing::warn!("it cannot be heard whether others ask for egress addresses: {e:#}");
                tokio::time::sleep(UNASKABLE).await;
            }
        });
        self.claims = Some((on, task.abort_handle()));
    }

    /// Waits until something is to be done about this node's addresses.
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

    /// It is due.
    pub fn is_due(&mut self) {
        self.base = true;
    }

    /// Computes the allocations anew: who lives, or what this node knows of itself, has changed.
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

    /// Brings the addresses on this node in sync. Returns how many changes it took.
    pub(super) async fn reconcile_addresses(&mut self) -> Result<usize> {
        let mut uplinks_now = self.host.look(&self.view).await?;
        let now = Instant::now();
        if self.holding.judge(&uplinks_now, self.odd_family.as_deref(), now) {
            self.update_allocations();
        }
        // A cordoned node goes on answering: where no other is left, it is better than none.
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
        self.ask(&uplinks_now, new, &[ASK_NEW, ASK]);
        self.ask(&uplinks_now, others, &[ASK]);
        self.listen_for_claims(&uplinks_now);
        self.note_handovers(now);
        let mut changes = self.prepare(&decision.desired)?;
        self.host.announce_ahead(&self.view, &uplinks_now, &self.facts.coming);
        let (placed, mut refused) = self.host.place(&self.view, &uplinks_now, &decision.desired).await?;
        refused.extend(std::mem::take(&mut uplinks_now.unusable));
        changes += placed;
        if std::mem::take(&mut self.announce_again) {
            // Of what it would take, others are told nothing before it is here.
            let is_here = |id: &&EgressId| {
                self.view
                    .allocations
                    .allocations
                    .get(id)
                    .is_some_and(|allocation| allocation.is_here(**id, &self.facts))
            };
            let taken_from_the_dead = self.holding.taken_from_the_dead().iter().filter(is_here).copied().collect();
            self.host.announce_again(&self.view, &uplinks_now, &taken_from_the_dead);
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
            // Of what has just come here, the view knows only now that it is this node's.
            self.facts.taken = self.taken(&self.facts);
        }
        Ok(changes)
    }

    /// What must be in the tables before addresses come here. This node's pods need not wait for them: to place a
    /// thousand takes the kernel a second. What is moved here on purpose comes with connections that the old node
    /// knows.
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

    /// Connections of allocations that have come here or gone from here are picked up anew.
    pub(super) fn reconcile_connections(&mut self) {
        // First: what is forgotten here because its allocation has gone has not ended.
        self.set_roles();
        let moved = Moved::new(&self.view, &self.here);
        if self.moved.as_ref().is_none_or(|before| moved.needs_cleaning(before)) {
            let handed_over = self.handed.keys().chain(self.left.keys()).copied().collect();
            moved.clone().clean(self.options.marks, handed_over, &self.changed_ports, &self.cleaning);
        }
        self.moved = Some(moved);
    }

    /// Notes which allocations are being moved here or from here, and forgets what was.
    fn note_handovers(&mut self, now: Instant) {
        self.handed.retain(|id, (_, until)| *until > now && self.view.allocations.allocations.contains_key(id));
        let by =
            self.view.allocations.allocations.iter().filter_map(|(id, allocation)| Some((*id, allocation.handed_by?)));
        self.handed.extend(by.map(|(id, mac)| (id, (mac, now + HANDOVER))));
        self.left.retain(|_, until| *until > now);
        // A node that has lost its uplink cannot let anything go on.
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

    /// Notes as of which allocations each address is here.
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

    /// The allocations that this node has taken over, as the allocations are now. If the allocations have come to
    /// name another node while the address was here, that one has taken the allocation over from this node, which
    /// does not hear it. Two that do not hear each other must not claim an allocation by turns, and have the
    /// allocations follow them.
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

    /// Asks the link who has the addresses of allocations, and tells each time that it has been silent for so long.
    fn ask(&self, uplinks_now: &UplinkStatus, allocations: BTreeSet<EgressId>, patience: &'static [Duration]) {
        if allocations.is_empty() {
            return;
        }
        let (ids, mut targets): (Vec<EgressId>, Vec<_>) =
            uplinks_now.targets(&self.view, &allocations).into_iter().unzip();
        // Who is reached by nobody claims nothing.
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
                        tracing::warn!("the link cannot be asked who has egress addresses: {e:#}");
                        tokio::time::sleep(UNASKABLE).await;
                        None
                    }
                };
                // The daemon ends if nobody listens.
                let _ = heard.send(Heard::Answers { allocations: allocations.clone(), answers });
            }
        });
    }

    /// Says whom to ask whether they live: the nodes that allocations of this node's pods can go through, and for a
    /// gateway's node the others of its gateways.
    pub(super) fn set_targets(&self) {
        let Some((device, source)) = self.host.asking() else {
            // While the tunnel is being mended, nothing is known of others.
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

/// By what a question for an allocation's address is known as another node's: hosts that speak to nothing but the
/// link do not know it. It is no secret of those that read the cluster's objects.
fn claim_of(id: EgressId, allocation: &NodeAllocation) -> Claim {
    let [.., a, b, c, d, e, f] = fnv1a(allocation.gateway.bytes().chain(id.to_be_bytes())).to_be_bytes();
    // All zeros are no claim.
    [a, b, c, d, e, f | 1]
}

fn facts_taken(facts: &Facts, id: EgressId) -> Option<i64> {
    facts.taken.get(&id).copied()
}
