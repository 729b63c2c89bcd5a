//! The gateway's part: who lives, which addresses are here, and what the link says of them.

use super::Node;
use crate::datapath::announce::{self, Claim};
use crate::datapath::names::HEALTH;
use crate::datapath::names::{of_mac, of_uplink};
use crate::model::drain::has_drain_label;
use crate::model::fnv::fnv1a;
use crate::model::mac::Mac;
use crate::model::marks::PathId;
use crate::model::selector::Name;
use crate::node::host::{Look, Wish};
use crate::node::liveness::{Seen, Targets};
use crate::node::moved::Moved;
use crate::node_plan::addresses;
use crate::node_plan::allocations::{Facts, Path, PathState};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// How long the link has to say that somebody has an address.
const ASK: Duration = Duration::from_millis(100);
/// The same for an address that is used for the first time. Who answers later than this, while the link is asked again,
/// has it all the same, and this node gives it up. Of one that another node had, which may be frozen and come to, that
/// would be too late: its connections would have come here.
const ASK_NEW: Duration = Duration::from_millis(20);
/// Of more addresses than this the answers may take longer, were it only for their number.
const FEW: usize = 64;
/// A link that cannot be asked is asked again after this long.
const UNASKABLE: Duration = Duration::from_millis(500);

/// A node hands over for as long after a path has been moved to it: others may not have heard of it yet, and send to
/// the old node what servers answer to this one.
const HANDOVER: Duration = Duration::from_secs(1);

/// What the link said.
#[derive(Debug)]
pub enum Heard {
    /// Of some paths' addresses, when it was asked.
    Answers {
        /// The paths.
        paths: BTreeSet<PathId>,
        /// Who answered for each address; `None`: it could not be asked.
        answers: Option<Vec<(PathId, IpAddr, Option<Mac>)>>,
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
        self.look_again();
    }

    /// The link has answered.
    pub fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Answers { answers: Some(answers), .. } => {
                self.holding.heard(answers, &self.view, &self.facts, Instant::now());
            }
            Heard::Answers { paths, answers: None } => self.holding.unheard(paths),
            Heard::Claim { address, by, claim } => self.claimed(address, by, claim),
        }
        self.base = true;
    }

    /// A node that others reach asks for an address, and no other node reaches this one: what is here is of no use to
    /// them, and that one can serve.
    fn claimed(&mut self, address: IpAddr, by: Mac, claim: Claim) {
        let paths = &self.view.paths.paths;
        let of_address = paths.iter().find(|(_, path)| path.managed && addresses(path).any(|a| a == address));
        if let Some((id, path)) = of_address.filter(|_| self.seen.alone)
            && path.is_here(*id, &self.facts)
            && claim == claim_of(*id, path)
        {
            self.holding.claimed(*id, address, by, Instant::now());
        }
    }

    /// While no other node reaches this one, listens whether one that others reach asks for what is here.
    fn listen_for_claims(&mut self, look: &Look) {
        let interfaces = if self.seen.alone { look.askable() } else { BTreeMap::new() };
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
            if let Err(e) = announce::hear_claims(&interfaces, tell).await {
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
        match [self.holding.next(), handovers, left, self.known_faults.next(), of_pods].into_iter().flatten().min() {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// It is due.
    pub fn is_due(&mut self) {
        self.base = true;
    }

    /// Computes the paths anew: who lives, or what this node knows of itself, has changed.
    pub(super) fn look_again(&mut self) {
        self.facts.dead.clone_from(&self.seen.dead);
        self.facts.lost.clone_from(&self.seen.lost);
        self.holding.note(&self.options.name.as_str().into(), &mut self.facts);
        if !self.stale {
            self.view.look_again(&self.cluster, &self.options.name, &self.facts);
            self.host.view(&self.view);
        }
        self.base = true;
    }

    /// Brings the addresses on this node in step. Returns how many changes it took.
    pub(super) async fn bring_addresses_in_step(&mut self) -> Result<usize> {
        let mut look = self.host.look(&self.view).await?;
        let now = Instant::now();
        if self.holding.judge(&look, self.odd_family.as_deref(), now) {
            self.look_again();
        }
        // A cordoned node goes on answering: where no other is left, it is better than none.
        let drained = self.cluster.nodes.get(&*self.options.name).is_some_and(|node| has_drain_label(node));
        let mut decision = self.holding.decide(&self.view, &self.facts, &look, drained, now);
        decision.wish.paths.retain(|id| !look.unusable.contains_key(id));
        decision.wish.moving.retain(|id| !look.unusable.contains_key(id));
        if self.facts.partial != decision.partial {
            self.facts.partial.clone_from(&decision.partial);
            self.look_again();
        }
        let few = decision.new.len() <= FEW;
        let (new, others) = decision.ask.into_iter().partition(|id| few && decision.new.contains(id));
        self.ask(&look, new, &[ASK_NEW, ASK]);
        self.ask(&look, others, &[ASK]);
        self.listen_for_claims(&look);
        self.note_handovers(now);
        let mut changes = self.prepare(&decision.wish)?;
        self.host.announce_ahead(&self.view, &look, &self.facts.coming);
        let (placed, mut refused) = self.host.place(&self.view, &look, &decision.wish).await?;
        refused.extend(std::mem::take(&mut look.unusable));
        changes += placed;
        if std::mem::take(&mut self.announce_again) {
            // Of what it would take, others are told nothing before it is here.
            let is_here =
                |id: &&PathId| self.view.paths.paths.get(id).is_some_and(|path| path.is_here(**id, &self.facts));
            let inherited = self.holding.inherited().iter().filter(is_here).copied().collect();
            self.host.announce_again(&self.view, &look, &inherited);
        }
        self.here = decision.wish.paths;
        let mut facts = self.host.facts(refused).await?;
        facts.dead.clone_from(&self.facts.dead);
        facts.lost.clone_from(&self.facts.lost);
        facts.partial.clone_from(&self.facts.partial);
        self.note_since(&facts);
        facts.taken = self.taken(&facts);
        facts.yielded = self.holding.yielded();
        for (id, why) in self.holding.refused() {
            facts.refused.entry(id).or_insert(why);
        }
        if facts != self.facts {
            self.facts = facts;
            self.look_again();
            // Of what has just come here, the view knows only now that it is this node's.
            self.facts.taken = self.taken(&self.facts);
        }
        Ok(changes)
    }

    /// What must be in the tables before addresses come here. This node's pods need not wait for them: to place a
    /// thousand takes the kernel a second. What is moved here on purpose comes with connections that the old node knows.
    fn prepare(&mut self, wish: &Wish) -> Result<usize> {
        let paths = &self.view.paths.paths;
        let comes = |id: &PathId| paths.get(id).is_some_and(|path| !path.is_here(*id, &self.facts));
        let all: BTreeSet<PathId> = wish.paths.iter().copied().filter(comes).collect();
        if all.is_empty() {
            return Ok(0);
        }
        let coming: BTreeSet<PathId> = all.difference(&wish.moving).copied().collect();
        if !coming.is_empty() {
            self.facts.coming = coming;
            self.look_again();
            self.here.extend(&wish.paths);
        }
        let (changes, _) = self.bring_tables_in_step()?;
        self.bring_connections_in_step();
        Ok(changes)
    }

    /// Connections of paths that have come here or gone from here are picked up anew.
    pub(super) fn bring_connections_in_step(&mut self) {
        // First: what is forgotten here because its path has gone has not ended.
        self.set_roles();
        let moved = Moved::new(&self.view, &self.here);
        if self.moved.as_ref().is_none_or(|before| moved.needs_cleaning(before)) {
            let handed_over = self.handed.keys().chain(self.left.keys()).copied().collect();
            moved.clone().clean(self.options.marks, handed_over, &self.changed_ports, &self.cleaning);
        }
        self.moved = Some(moved);
    }

    /// Notes which paths are being moved here or from here, and forgets what was.
    fn note_handovers(&mut self, now: Instant) {
        self.handed.retain(|id, (_, until)| *until > now && self.view.paths.paths.contains_key(id));
        let by = self.view.paths.paths.iter().filter_map(|(id, path)| Some((*id, path.handed_by?)));
        self.handed.extend(by.map(|(id, mac)| (id, (mac, now + HANDOVER))));
        self.left.retain(|_, until| *until > now);
        // A node that has lost its uplink cannot let anything go on.
        if let Some(before) = self.moved.as_ref().filter(|_| self.holding.is_fit()) {
            let remote = self.view.paths.paths.iter().filter(|(_, path)| matches!(path.state, PathState::Remote(_)));
            let left = remote.map(|(id, _)| *id).filter(|id| before.was_local(*id));
            self.left.extend(left.map(|id| (id, now + HANDOVER)));
        }
    }

    /// Notes as of which ledger each address is here.
    fn note_since(&mut self, facts: &Facts) {
        let here = |id: &PathId, path: &Path| path.managed && path.is_here(*id, facts);
        let paths = &self.view.paths.paths;
        self.since.retain(|id, _| paths.get(id).is_some_and(|path| here(id, path)));
        for (id, path) in paths.iter().filter(|(id, path)| here(id, path)) {
            let since = self.since.entry(*id).or_insert(path.since);
            if path.by_ledger {
                *since = path.since;
            }
        }
    }

    /// The paths that this node has taken over, as the ledger is now. If the ledger has come to name another node while
    /// the address was here, that one has taken the path over from this node, which does not hear it. Two that do not
    /// hear each other must not claim a path by turns, and have the ledger follow them.
    fn taken(&self, facts: &Facts) -> BTreeMap<PathId, i64> {
        let paths = self.view.paths.paths.iter().filter(|(_, path)| path.managed && !path.by_ledger);
        let paths = paths.filter(|(id, path)| {
            let claims = path.taken_over && self.since.get(id) == Some(&path.since);
            path.is_here(**id, facts) && (claims || facts_taken(&self.facts, **id) == Some(path.since))
        });
        paths.map(|(id, path)| (*id, path.since)).collect()
    }

    /// Asks the link who has the addresses of paths, and tells each time that it has been silent for so long.
    fn ask(&self, look: &Look, paths: BTreeSet<PathId>, patience: &'static [Duration]) {
        if paths.is_empty() {
            return;
        }
        let (ids, mut targets): (Vec<PathId>, Vec<_>) = look.targets(&self.view, &paths).into_iter().unzip();
        // Who is reached by nobody claims nothing.
        for (id, target) in ids.iter().zip(&mut targets).filter(|_| self.seen.reached) {
            target.claim = self.view.paths.paths.get(id).map(|path| claim_of(*id, path));
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
                let _ = heard.send(Heard::Answers { paths: paths.clone(), answers });
            }
        });
    }

    /// Says whom to ask whether they live: the nodes that paths of this node's pods can go through, and for a
    /// gateway's node the others of its gateways.
    pub(super) fn set_targets(&self) {
        let Some((device, source)) = self.host.asking() else {
            // While the tunnel is being mended, nothing is known of others.
            if self.host.tunnel_end().is_some() {
                self.listeners.targets.send_replace(Targets::default());
            }
            return;
        };
        let paths = &self.view.paths;
        let used = self.uses.values().flat_map(|u| &u.paths).filter_map(|id| paths.paths.get(id));
        let own = paths.paths.values().filter(|path| path.member);
        let gateways: BTreeSet<&Name> = used.chain(own).map(|path| &path.gateway).collect();
        let nodes = gateways.into_iter().filter_map(|gateway| paths.gateway_nodes.get(gateway)).flatten();
        let others = nodes.filter(|name| ***name != *self.options.name);
        let answering = others.filter_map(|name| {
            let status = self.cluster.egress_nodes.get(name)?;
            status.answers.then_some((name.clone(), status.tunnel_mac?))
        });
        let answering: BTreeMap<Name, Mac> = answering.collect();
        let of_uplinks = |(name, mac): (&Name, &Mac)| {
            let keys = paths.uplinks_of(name).into_iter();
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

/// By what a question for a path's address is known as another node's: hosts that speak to nothing but the link do not
/// know it. It is no secret of those that read the cluster's objects.
fn claim_of(id: PathId, path: &Path) -> Claim {
    let [.., a, b, c, d, e, f] = fnv1a(path.gateway.bytes().chain(id.to_be_bytes())).to_be_bytes();
    // All zeros are no claim.
    [a, b, c, d, e, f | 1]
}

fn facts_taken(facts: &Facts, id: PathId) -> Option<i64> {
    facts.taken.get(&id).copied()
}
