//! Which addresses this node takes, keeps and lets go.
//!
//! Before it takes one it asks the link whether somebody has it. It lets one go when the node that is to have it says
//! that it does, or when it finds out that another one has taken it over while it could not know: it was frozen, or
//! cut off. What it cannot use, its uplink being down, it gives up before the others take it.

mod fitness;

use super::host::{Desired, UplinkStatus};
use super::liveness::Settings;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation, Placing};
use crate::node_plan::{View, addresses};
use egret_nft::mac::{Mac, Shown};
use fitness::Fitness;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// How many addresses are named in one line of the log.
const NAMED: usize = 6;
/// How long an address stays when another node has it: others may send to this one until they have heard.
const GRACE: Duration = Duration::from_millis(300);
/// Who answered for an address is asked again after this long, at first and then. At first it may be a node that is
/// about to give it up.
const AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(2)];
/// What "at first" is.
const AT_FIRST: Duration = Duration::from_secs(5);
/// What another node claims is not asked for again before this and [`AGAIN`].
const CLAIMED: Duration = Duration::from_secs(5);
/// A node that has nothing of what the allocations give it does not say that it is fit, so that nobody sends to it who
/// cannot hear that others have taken all over. Longer than this it is not out of service for it.
const WITHHELD: Duration = Duration::from_secs(60);

/// Somebody who answers for an address.
#[derive(Clone, Copy, Debug)]
struct Answer {
    address: IpAddr,
    mac: Mac,
    first: Instant,
    last: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Holding {
    settings: Settings,
    started: Instant,
    fitness: Fitness,
    /// Nobody else has these addresses: it was asked.
    cleared: BTreeMap<EgressId, BTreeSet<IpAddr>>,
    answered: BTreeMap<EgressId, Answer>,
    /// It is being asked for them.
    asking: BTreeSet<EgressId>,
    /// The allocations that there were when it was decided last, sorted; `None` before.
    known: Option<Vec<EgressId>>,
    /// What is here is to be asked for.
    verify: bool,
    /// Somebody answered for what is here.
    lost: BTreeSet<EgressId>,
    /// Another node has them: when they go.
    going: BTreeMap<EgressId, Instant>,
    /// Egress IPs that are assigned to this node, and that it gave up: `since` of the allocation, and the time.
    relinquished: BTreeMap<EgressId, (i64, Instant)>,
    /// What this node has taken over from others.
    taken_from_the_dead: BTreeSet<EgressId>,
    next: Option<Instant>,
}

/// What is to be done now.
#[derive(Debug, Default)]
pub struct Decision {
    /// What is to be on this node.
    pub desired: Desired,
    /// Allocations for whose addresses the link is to be asked.
    pub ask: BTreeSet<EgressId>,
    /// Those of them that were not allocated before: no node of Egret has held them.
    pub new: BTreeSet<EgressId>,
    /// Allocations that are to be here without a family that this node has lost.
    pub partial: BTreeSet<EgressId>,
}

/// What a decision is made of.
struct Scene<'a> {
    uplinks_now: &'a UplinkStatus,
    facts: &'a Facts,
    /// Whether what is here is to be asked for.
    verify: bool,
    now: Instant,
}

impl Holding {
    /// Of a daemon that has just started: what is here may have been another's for long.
    pub fn new(settings: Settings, now: Instant) -> Self {
        Holding {
            settings,
            started: now,
            fitness: Fitness::default(),
            cleared: BTreeMap::new(),
            answered: BTreeMap::new(),
            asking: BTreeSet::new(),
            known: None,
            verify: true,
            lost: BTreeSet::new(),
            going: BTreeMap::new(),
            relinquished: BTreeMap::new(),
            taken_from_the_dead: BTreeSet::new(),
            next: None,
        }
    }

    /// This node was frozen or cut off: others may have taken over what it has.
    pub fn returned(&mut self) {
        self.verify = true;
    }

    /// Whether this node can hold addresses. Returns whether that has changed.
    /// `apart`: why no other node reaches this one, where that is known.
    pub fn judge(&mut self, uplinks_now: &UplinkStatus, apart: Option<&str>, now: Instant) -> bool {
        self.fitness.judge(uplinks_now, apart, now)
    }

    /// Whether it can.
    pub fn is_fit(&self) -> bool {
        self.fitness.unfit_since().is_none()
    }

    /// The uplinks that it cannot use, and why.
    pub fn lost(&self) -> impl Iterator<Item = (&UplinkKey, &str)> {
        self.fitness.lost()
    }

    /// What this node is to count as: not alive, or what it has lost of its uplinks.
    pub fn note(&self, node: &Name, facts: &mut Facts) {
        if !self.is_fit() {
            facts.dead.insert(node.clone());
        } else if self.lost().next().is_some() {
            facts.lost.insert(node.clone(), self.lost().map(|(key, _)| key.clone()).collect());
        }
    }

    /// When [`decide`](Self::decide) is to be asked again, if nothing else happens.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Decides what is to be here.
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
        self.forget(allocations);
        let verify = std::mem::take(&mut self.verify);
        let mut of_allocations: BTreeSet<UplinkKey> = BTreeSet::new();
        let mut has_of_allocations = false;
        for (id, allocation) in allocations.iter().filter(|(_, allocation)| allocation.placing != Placing::Never) {
            let here = allocation.is_here(*id, facts) || uplinks_now.is_served(allocation, facts);
            if !here {
                self.lost.remove(id);
            }
            let give_up = self.is_to_give_up(allocation, now);
            if here && (self.lost.contains(id) || give_up && self.gives_up(allocation)) {
                self.give(*id, allocation, now);
                continue;
            }
            let stays = match allocation.placing {
                // Where there is no link to ask, the attempt to place it says why.
                Placing::Take { ask } => {
                    let ask = ask && uplinks_now.can_ask(allocation);
                    let scene = Scene { uplinks_now, facts, verify, now };
                    self.takes(*id, allocation, here, ask, &scene, &mut decision)
                }
                Placing::Keep => here,
                Placing::Leave => here && self.is_in_grace_period(*id, now),
                Placing::Never => false,
            };
            if !matches!(allocation.placing, Placing::Take { .. }) {
                self.cleared.remove(id);
                self.answered.remove(id);
                // After a start, it may be that only this node thinks that another one has it.
                if here && verify && uplinks_now.can_ask(allocation) {
                    decision.ask.insert(*id);
                }
            }
            if stays {
                has_of_allocations |= allocation.by_allocations;
                of_allocations.extend(allocation.needs().filter(|_| allocation.by_allocations));
                decision.desired.allocations.insert(*id);
                self.note_partial(*id, allocation, uplinks_now, facts, &mut decision);
            }
        }
        decision.ask.retain(|id| self.asking.insert(*id));
        if let Some(known) = self.known.replace(allocations.keys().copied().collect()) {
            decision.new = decision.ask.iter().copied().filter(|id| known.binary_search(id).is_err()).collect();
        }
        let relinquished = self.relinquished.iter().filter(|(_, (_, at))| now - *at < WITHHELD);
        let relinquished: BTreeSet<UplinkKey> =
            relinquished.filter_map(|(id, _)| allocations.get(id)).flat_map(NodeAllocation::needs).collect();
        let withheld = !relinquished.is_empty() && !has_of_allocations;
        let usable =
            self.fitness.works().iter().filter(|key| of_allocations.contains(*key) || !relinquished.contains(*key));
        decision.desired.uplinks = usable.cloned().collect();
        let holds =
            allocations.values().any(|allocation| allocation.state == AllocationState::Local && allocation.member);
        let left = drained && !holds && decision.desired.allocations.is_empty();
        decision.desired.health = view.allocations.is_gateway && self.is_fit() && !withheld && !left;
        decision
    }

    /// Whether the address of an allocation that is to be here shall be placed.
    fn takes(
        &mut self,
        id: EgressId,
        allocation: &NodeAllocation,
        here: bool,
        ask: bool,
        scene: &Scene,
        decision: &mut Decision,
    ) -> bool {
        let Scene { uplinks_now, facts, verify, now } = *scene;
        self.going.remove(&id);
        if !allocation.by_allocations && ask {
            self.taken_from_the_dead.insert(id);
        }
        if !ask {
            // Who answered may be the node that hands it over.
            self.answered.remove(&id);
            self.relinquished.remove(&id);
            decision.desired.moving.insert(id);
            return true;
        }
        let cleared = self.cleared.get(&id);
        let is_unasked = |a: IpAddr| {
            uplinks_now.is_usable(a, allocation)
                && !facts.addresses.contains(&a)
                && cleared.is_none_or(|set| !set.contains(&a))
        };
        let unasked = addresses(allocation).any(is_unasked);
        // A family that was lost is back, or new: what goes by the other one goes on meanwhile.
        let some = here || addresses(allocation).any(|a| facts.addresses.contains(&a));
        if here || cleared.is_some() && (some || !unasked) {
            self.answered.remove(&id);
            self.relinquished.remove(&id);
            if here && verify || some && unasked {
                decision.ask.insert(id);
            }
            return true;
        }
        if !self.is_fit() {
            return false;
        }
        let due = self.answered.get(&id).map(|a| a.last + AGAIN[usize::from(now - a.first > AT_FIRST)]);
        match due {
            Some(due) if due > now => self.wake_at(Some(due)),
            _ => drop(decision.ask.insert(id)),
        }
        false
    }

    /// Whether an address that another node has stays a little longer.
    fn is_in_grace_period(&mut self, id: EgressId, now: Instant) -> bool {
        // After a start, nobody has been found dead yet, and who is said to have it may be.
        let known = self.started + self.settings.detection() + Duration::from_millis(500);
        let at = *self.going.entry(id).or_insert_with(|| known.max(now + GRACE));
        self.wake_at(Some(at).filter(|at| *at > now));
        at > now
    }

    /// Notes which of an allocation's addresses are not to be here yet, and whether it is here without one of them.
    fn note_partial(
        &mut self,
        id: EgressId,
        allocation: &NodeAllocation,
        uplinks_now: &UplinkStatus,
        facts: &Facts,
        decision: &mut Decision,
    ) {
        let is_missing = |a: &IpAddr| !facts.addresses.contains(a);
        let missing = addresses(allocation).filter(is_missing).count();
        let some_are_here = missing > 0 && missing < addresses(allocation).count();
        if !uplinks_now.is_partial(allocation) && !some_are_here {
            return;
        }
        decision.partial.insert(id);
        if let Some(cleared) = self.cleared.get_mut(&id) {
            cleared.retain(|address| uplinks_now.is_usable(*address, allocation));
        }
        if !decision.desired.moving.contains(&id) {
            let cleared = self.cleared.get(&id);
            let unasked =
                addresses(allocation).filter(is_missing).filter(|a| cleared.is_none_or(|set| !set.contains(a)));
            decision.desired.unasked.extend(unasked);
        }
    }

    /// Whether others find out now that this node cannot use what an allocation needs.
    fn is_to_give_up(&mut self, allocation: &NodeAllocation, now: Instant) -> bool {
        let since = self.fitness.unfit_since().into_iter().chain(self.fitness.lost_since(allocation.needs())).min();
        let at = since.map(|since| since + self.settings.safe_absence());
        self.wake_at(at.filter(|at| *at > now));
        at.is_some_and(|at| at <= now)
    }

    /// Whether a node that cannot use an address gives it up: where it cannot be reached anyway, or if another one
    /// can.
    fn gives_up(&self, allocation: &NodeAllocation) -> bool {
        self.fitness.is_cut_off() || matches!(allocation.state, AllocationState::Remote(_))
    }

    fn give(&mut self, id: EgressId, allocation: &NodeAllocation, now: Instant) {
        self.cleared.remove(&id);
        self.taken_from_the_dead.remove(&id);
        if allocation.by_allocations {
            self.relinquished.insert(id, (allocation.since, now));
        }
    }

    fn wake_at(&mut self, at: Option<Instant>) {
        self.next = [self.next, at].into_iter().flatten().min();
    }

    /// Forgets allocations that are gone, and those that newer allocations assign to another node.
    fn forget(&mut self, allocations: &BTreeMap<EgressId, NodeAllocation>) {
        let there = |id: &EgressId| allocations.get(id).is_some_and(|allocation| allocation.placing != Placing::Never);
        self.cleared.retain(|id, _| there(id));
        self.answered.retain(|id, _| there(id));
        self.lost.retain(there);
        self.going.retain(|id, _| allocations.get(id).is_some_and(|allocation| allocation.placing == Placing::Leave));
        self.taken_from_the_dead.retain(|id| {
            allocations
                .get(id)
                .is_some_and(|allocation| matches!(allocation.placing, Placing::Take { .. } | Placing::Keep))
        });
        self.relinquished.retain(|id, (since, _)| {
            allocations.get(id).is_some_and(|allocation| allocation.by_allocations && allocation.since == *since)
        });
    }

    /// What the link said. Of an allocation that is here and that somebody else has, this node lets go.
    pub fn heard(&mut self, asked: Vec<(EgressId, IpAddr, Option<Mac>)>, view: &View, facts: &Facts, now: Instant) {
        let mut taken: BTreeMap<EgressId, (IpAddr, Mac)> = BTreeMap::new();
        let mut silent: BTreeMap<EgressId, BTreeSet<IpAddr>> = BTreeMap::new();
        for (id, address, mac) in asked {
            let silent = silent.entry(id).or_default();
            match mac {
                Some(mac) => drop(taken.insert(id, (address, mac))),
                None => drop(silent.insert(address)),
            }
        }
        let mut news: Vec<String> = Vec::new();
        for (id, silent) in silent {
            self.asking.remove(&id);
            let allocation = view.allocations.allocations.get(&id);
            if allocation.is_some_and(|allocation| allocation.placing == Placing::Take { ask: false }) {
                continue;
            }
            let here = allocation.is_some_and(|allocation| allocation.is_here(id, facts));
            match taken.get(&id) {
                None => self.cleared.entry(id).or_default().extend(silent),
                Some((address, mac)) => {
                    let before = self.answered.get(&id).map(|a| a.first);
                    let answer = Answer { address: *address, mac: *mac, first: before.unwrap_or(now), last: now };
                    if before.is_none() {
                        news.push(format!("{address} at {}", Shown(*mac)));
                    }
                    self.answered.insert(id, answer);
                    self.cleared.remove(&id);
                    if here {
                        self.lost.insert(id);
                    }
                }
            }
        }
        if !news.is_empty() {
            let (count, more) = (news.len(), if news.len() > NAMED { ", ..." } else { "" });
            news.truncate(NAMED);
            tracing::warn!(count, "somebody else on the link has egress addresses: {}{more}", news.join(", "));
        }
    }

    /// Another node, which others reach, asks for what is here. This node gives it up, and does not ask for it before that
    /// one has had the time to take it.
    pub fn claimed(&mut self, id: EgressId, address: IpAddr, by: Mac, now: Instant) {
        let who = if by == Mac::default() { String::new() } else { format!(" at {}", Shown(by)) };
        tracing::warn!(%address, "no node reaches this one, and one that others reach{who} asks for the egress IP: given up");
        self.lost.insert(id);
        self.cleared.remove(&id);
        self.answered.insert(id, Answer { address, mac: by, first: now, last: now + CLAIMED });
    }

    /// The link could not be asked: it is tried again.
    pub fn unheard(&mut self, ids: BTreeSet<EgressId>) {
        for id in ids {
            self.asking.remove(&id);
        }
    }

    /// What this node should hold and cannot, and why.
    pub fn refused(&self) -> impl Iterator<Item = (EgressId, String)> {
        self.answered.iter().map(|(id, Answer { address, mac, .. })| {
            let why = format!(
                "{address} is somebody else's: {} answers for it on the link; it comes here as soon as nobody does; see \
                 who that is, or take the address out of the gateway's spec.addresses",
                Shown(*mac)
            );
            (*id, why)
        })
    }

    /// What the allocations give this node, and it gave up.
    pub fn relinquished(&self) -> BTreeSet<EgressId> {
        self.relinquished.keys().copied().collect()
    }

    /// What this node has taken over from others.
    pub fn taken_from_the_dead(&self) -> &BTreeSet<EgressId> {
        &self.taken_from_the_dead
    }
}

#[cfg(test)]
mod tests;
