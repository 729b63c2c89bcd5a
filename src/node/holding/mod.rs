//! Which addresses this node takes, keeps and lets go.
//!
//! Before it takes one it asks the link whether somebody has it. It lets one go when the node that is to have it says
//! that it does, or when it finds out that another one has taken it over while it could not know: it was frozen, or
//! cut off. What it cannot use, its uplink being down, it gives up before the others take it.

mod fitness;

use super::host::{Look, Wish};
use super::liveness::Settings;
use crate::model::mac::{Mac, Shown};
use crate::model::marks::PathId;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::node_plan::allocations::{Facts, Path, PathState, Placing};
use crate::node_plan::{View, addresses};
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
/// A node that has nothing of what the ledger gives it does not say that it is fit, so that nobody sends to it who
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
    cleared: BTreeMap<PathId, BTreeSet<IpAddr>>,
    answered: BTreeMap<PathId, Answer>,
    /// It is being asked for them.
    asking: BTreeSet<PathId>,
    /// The paths that there were when it was decided last, sorted; `None` before.
    known: Option<Vec<PathId>>,
    /// What is here is to be asked for.
    verify: bool,
    /// Somebody answered for what is here.
    lost: BTreeSet<PathId>,
    /// Another node has them: when they go.
    going: BTreeMap<PathId, Instant>,
    /// The ledger gives them to this node, which gave them up: `since` of the ledger's entry, and when.
    yielded: BTreeMap<PathId, (i64, Instant)>,
    /// What this node has taken over from others.
    inherited: BTreeSet<PathId>,
    next: Option<Instant>,
}

/// What is to be done now.
#[derive(Debug, Default)]
pub struct Decision {
    /// What is to be on this node.
    pub wish: Wish,
    /// Paths for whose addresses the link is to be asked.
    pub ask: BTreeSet<PathId>,
    /// Those among them that were in no ledger before: no node of Egret's has had them.
    pub new: BTreeSet<PathId>,
    /// Paths that are to be here without a family that this node has lost.
    pub partial: BTreeSet<PathId>,
}

/// What a decision is made of.
struct Scene<'a> {
    look: &'a Look,
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
            yielded: BTreeMap::new(),
            inherited: BTreeSet::new(),
            next: None,
        }
    }

    /// This node was frozen or cut off: others may have taken over what it has.
    pub fn returned(&mut self) {
        self.verify = true;
    }

    /// Whether this node can hold addresses. Returns whether that has changed.
    /// `apart`: why no other node reaches this one, where that is known.
    pub fn judge(&mut self, look: &Look, apart: Option<&str>, now: Instant) -> bool {
        self.fitness.judge(look, apart, now)
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
    pub fn decide(&mut self, view: &View, facts: &Facts, look: &Look, drained: bool, now: Instant) -> Decision {
        let mut decision = Decision::default();
        let paths = &view.paths.paths;
        self.next = None;
        self.forget(paths);
        let verify = std::mem::take(&mut self.verify);
        let mut of_ledger: BTreeSet<UplinkKey> = BTreeSet::new();
        let mut has_of_ledger = false;
        for (id, path) in paths.iter().filter(|(_, path)| path.placing != Placing::Never) {
            let here = path.is_here(*id, facts) || look.is_served(path, facts);
            if !here {
                self.lost.remove(id);
            }
            let give_up = self.is_to_give_up(path, now);
            if here && (self.lost.contains(id) || give_up && self.gives_up(path)) {
                self.give(*id, path, now);
                continue;
            }
            let stays = match path.placing {
                // Where there is no link to ask, the attempt to place it says why.
                Placing::Take { ask } => {
                    let ask = ask && look.can_ask(path);
                    let scene = Scene { look, facts, verify, now };
                    self.takes(*id, path, here, ask, &scene, &mut decision)
                }
                Placing::Keep => here,
                Placing::Leave => here && self.lingers(*id, now),
                Placing::Never => false,
            };
            if !matches!(path.placing, Placing::Take { .. }) {
                self.cleared.remove(id);
                self.answered.remove(id);
                // After a start, it may be that only this node thinks that another one has it.
                if here && verify && look.can_ask(path) {
                    decision.ask.insert(*id);
                }
            }
            if stays {
                has_of_ledger |= path.by_ledger;
                of_ledger.extend(path.needs().filter(|_| path.by_ledger));
                decision.wish.paths.insert(*id);
                self.note_partial(*id, path, look, facts, &mut decision);
            }
        }
        decision.ask.retain(|id| self.asking.insert(*id));
        if let Some(known) = self.known.replace(paths.keys().copied().collect()) {
            decision.new = decision.ask.iter().copied().filter(|id| known.binary_search(id).is_err()).collect();
        }
        let yielded = self.yielded.iter().filter(|(_, (_, at))| now - *at < WITHHELD);
        let yielded: BTreeSet<UplinkKey> = yielded.filter_map(|(id, _)| paths.get(id)).flat_map(Path::needs).collect();
        let withheld = !yielded.is_empty() && !has_of_ledger;
        let usable = self.fitness.works().iter().filter(|key| of_ledger.contains(*key) || !yielded.contains(*key));
        decision.wish.uplinks = usable.cloned().collect();
        let holds = paths.values().any(|path| path.state == PathState::Local && path.member);
        let left = drained && !holds && decision.wish.paths.is_empty();
        decision.wish.health = view.paths.is_gateway && self.is_fit() && !withheld && !left;
        decision
    }

    /// Whether the address of a path that is to be here shall be placed.
    fn takes(
        &mut self,
        id: PathId,
        path: &Path,
        here: bool,
        ask: bool,
        scene: &Scene,
        decision: &mut Decision,
    ) -> bool {
        let Scene { look, facts, verify, now } = *scene;
        self.going.remove(&id);
        if !path.by_ledger && ask {
            self.inherited.insert(id);
        }
        if !ask {
            // Who answered may be the node that hands it over.
            self.answered.remove(&id);
            self.yielded.remove(&id);
            decision.wish.moving.insert(id);
            return true;
        }
        let cleared = self.cleared.get(&id);
        let is_unasked = |a: IpAddr| {
            look.is_usable(a, path) && !facts.addresses.contains(&a) && cleared.is_none_or(|set| !set.contains(&a))
        };
        let unasked = addresses(path).any(is_unasked);
        // A family that was lost is back, or new: what goes by the other one goes on meanwhile.
        let some = here || addresses(path).any(|a| facts.addresses.contains(&a));
        if here || cleared.is_some() && (some || !unasked) {
            self.answered.remove(&id);
            self.yielded.remove(&id);
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
    fn lingers(&mut self, id: PathId, now: Instant) -> bool {
        // After a start, nobody has been found dead yet, and who is said to have it may be.
        let known = self.started + self.settings.detection() + Duration::from_millis(500);
        let at = *self.going.entry(id).or_insert_with(|| known.max(now + GRACE));
        self.wake_at(Some(at).filter(|at| *at > now));
        at > now
    }

    /// Notes which of a path's addresses are not to be here yet, and whether it is here without one of them.
    fn note_partial(&mut self, id: PathId, path: &Path, look: &Look, facts: &Facts, decision: &mut Decision) {
        let is_missing = |a: &IpAddr| !facts.addresses.contains(a);
        let missing = addresses(path).filter(is_missing).count();
        let some_are_here = missing > 0 && missing < addresses(path).count();
        if !look.is_partial(path) && !some_are_here {
            return;
        }
        decision.partial.insert(id);
        if let Some(cleared) = self.cleared.get_mut(&id) {
            cleared.retain(|address| look.is_usable(*address, path));
        }
        if !decision.wish.moving.contains(&id) {
            let cleared = self.cleared.get(&id);
            let unasked = addresses(path).filter(is_missing).filter(|a| cleared.is_none_or(|set| !set.contains(a)));
            decision.wish.unasked.extend(unasked);
        }
    }

    /// Whether others find out now that this node cannot use what a path needs.
    fn is_to_give_up(&mut self, path: &Path, now: Instant) -> bool {
        let since = self.fitness.unfit_since().into_iter().chain(self.fitness.lost_since(path.needs())).min();
        let at = since.map(|since| since + self.settings.safe_absence());
        self.wake_at(at.filter(|at| *at > now));
        at.is_some_and(|at| at <= now)
    }

    /// Whether a node that cannot use an address gives it up: where it cannot be reached anyway, or if another one
    /// can.
    fn gives_up(&self, path: &Path) -> bool {
        self.fitness.is_cut_off() || matches!(path.state, PathState::Remote(_))
    }

    fn give(&mut self, id: PathId, path: &Path, now: Instant) {
        self.cleared.remove(&id);
        self.inherited.remove(&id);
        if path.by_ledger {
            self.yielded.insert(id, (path.since, now));
        }
    }

    fn wake_at(&mut self, at: Option<Instant>) {
        self.next = [self.next, at].into_iter().flatten().min();
    }

    /// Drops what is known of paths that are gone or are another node's by a newer ledger.
    fn forget(&mut self, paths: &BTreeMap<PathId, Path>) {
        let there = |id: &PathId| paths.get(id).is_some_and(|path| path.placing != Placing::Never);
        self.cleared.retain(|id, _| there(id));
        self.answered.retain(|id, _| there(id));
        self.lost.retain(there);
        self.going.retain(|id, _| paths.get(id).is_some_and(|path| path.placing == Placing::Leave));
        self.inherited.retain(|id| {
            paths.get(id).is_some_and(|path| matches!(path.placing, Placing::Take { .. } | Placing::Keep))
        });
        self.yielded.retain(|id, (since, _)| paths.get(id).is_some_and(|path| path.by_ledger && path.since == *since));
    }

    /// What the link said. Of a path that is here and that somebody else has, this node lets go.
    pub fn heard(&mut self, asked: Vec<(PathId, IpAddr, Option<Mac>)>, view: &View, facts: &Facts, now: Instant) {
        let mut taken: BTreeMap<PathId, (IpAddr, Mac)> = BTreeMap::new();
        let mut silent: BTreeMap<PathId, BTreeSet<IpAddr>> = BTreeMap::new();
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
            let path = view.paths.paths.get(&id);
            if path.is_some_and(|path| path.placing == Placing::Take { ask: false }) {
                continue;
            }
            let here = path.is_some_and(|path| path.is_here(id, facts));
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
    pub fn claimed(&mut self, id: PathId, address: IpAddr, by: Mac, now: Instant) {
        let who = if by == Mac::default() { String::new() } else { format!(" at {}", Shown(by)) };
        tracing::warn!(%address, "no node reaches this one, and one that others reach{who} asks for the egress IP: given up");
        self.lost.insert(id);
        self.cleared.remove(&id);
        self.answered.insert(id, Answer { address, mac: by, first: now, last: now + CLAIMED });
    }

    /// The link could not be asked: it is tried again.
    pub fn unheard(&mut self, ids: BTreeSet<PathId>) {
        for id in ids {
            self.asking.remove(&id);
        }
    }

    /// What this node should hold and cannot, and why.
    pub fn refused(&self) -> impl Iterator<Item = (PathId, String)> {
        self.answered.iter().map(|(id, Answer { address, mac, .. })| {
            let why = format!(
                "{address} is somebody else's: {} answers for it on the link; it comes here as soon as nobody does; see \
                 who that is, or take the address out of the gateway's spec.addresses",
                Shown(*mac)
            );
            (*id, why)
        })
    }

    /// What the ledger gives this node, and it gave up.
    pub fn yielded(&self) -> BTreeSet<PathId> {
        self.yielded.keys().copied().collect()
    }

    /// What this node has taken over from others.
    pub fn inherited(&self) -> &BTreeSet<PathId> {
        &self.inherited
    }
}

#[cfg(test)]
mod tests;
