//! Whether the gateways' nodes live: asked of their kernels through the tunnel, again and again.
//!
//! A task of its own asks and hears; the daemon is told only what changes.
//!
//! A node answers at one address while all of its uplinks work, and at one more for each uplink's family that works.
//! While it answers at the first, that is all that is asked; a node that has lost a family costs others some probes
//! more.

mod probes;

use crate::datapath::echo::Echo;
use crate::datapath::names::DEVICE;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use probes::Probes;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv6Addr;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// How nodes are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Between probes to a node that answers.
    pub interval: Duration,
    /// How many times this long, the first time at half the pace, a node must be silent before it counts as dead.
    pub misses: u32,
}

impl Settings {
    /// No less than it takes to find a node dead.
    pub fn detection(&self) -> Duration {
        self.interval * (self.misses + 1)
    }

    /// How long at least an answer is waited for, however short the round trip: a busy host answers late.
    fn shortest_patience(&self) -> Duration {
        self.interval / 5
    }

    /// Between probes to a node that is in doubt.
    fn quick(&self) -> Duration {
        self.interval / 6
    }

    /// How many probes in a row must be missed before a node counts as dead. With seven of them, a line that loses
    /// 5 % in each direction loses all once in a thousand hours; three would be lost ten times an hour.
    fn probes(&self) -> u32 {
        (self.misses * 3).saturating_sub(2).max(1)
    }

    /// Longer than a node can be away without anybody's finding it dead.
    pub fn safe_absence(&self) -> Duration {
        // The first probe may come at once; the others come within half the time for each further miss.
        self.interval / 2 * (self.misses - 1)
    }
}

/// Whom to ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// The tunnel device's index; it is another one after the device was made anew.
    pub device: u32,
    /// The address to ask from.
    pub source: Option<Ipv6Addr>,
    /// The nodes' health addresses.
    pub nodes: BTreeMap<Name, Ipv6Addr>,
    /// What allocations need of each node's uplinks, and where it answers for each.
    pub uplinks: BTreeMap<Name, BTreeMap<UplinkKey, Ipv6Addr>>,
}

/// What was found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerLiveness {
    /// Nodes that do not answer.
    pub dead: BTreeSet<Name>,
    /// What others have lost of their uplinks.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// Nobody answers, and nobody asks this node either.
    pub alone: bool,
    /// Somebody answers, or has asked this node since nobody does.
    pub reached: bool,
    /// How often this node has come back from where it could not know what the others did: it was frozen, or alone.
    pub returns: u64,
}

/// Asks, until nobody wants to know any more.
pub async fn watch(settings: Settings, mut targets: watch::Receiver<Targets>, seen: watch::Sender<PeerLiveness>) {
    let mut probes = Probes::new(settings);
    let mut uplinks = Probes::unproven(settings);
    let mut echo: Option<Echo> = None;
    let mut wanted = Targets::default();
    let mut told = PeerLiveness::default();
    let mut reachability = Reachability::default();
    loop {
        let next = [probes.next(), uplinks.next()].into_iter().flatten().min();
        tokio::select! {
            changed = targets.changed() => if changed.is_err() { return },
            () = heard(&echo) => {}
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
        }
        let new = targets.borrow_and_update().clone();
        if (new.device, new.source) != (wanted.device, wanted.source) {
            echo = None;
        }
        wanted = new;
        let now = Instant::now();
        probes.set_nodes(&wanted.nodes, now);
        // However busy the daemon was: what came meanwhile came before the judgement.
        take(&mut echo, now, |from, sequence, at| {
            probes.answered(from, sequence, at);
            uplinks.answered(from, sequence, at);
        });
        probes.judge(now);
        uplinks.set_nodes(&wanted.of_uplinks(probes.in_doubt()), now);
        uplinks.judge(now);
        let mut due = probes.due(now);
        due.extend(uplinks.due(now));
        if !due.is_empty() && echo.is_none() {
            echo = open(&wanted);
        }
        for (address, sequence) in due {
            // What this host cannot send is not answered either.
            if let Some(echo) = &echo {
                let _ = echo.request(address, sequence);
            }
        }
        let (dead, lost) = tell_apart(&probes, &mut uplinks, &wanted);
        let mut new = PeerLiveness { dead, lost, ..told.clone() };
        let nobody = !new.dead.is_empty() && new.dead.len() == wanted.nodes.len();
        new.reached = reachability.is_reached(nobody);
        new.alone = !new.reached && probes.silent_for(now) > settings.detection();
        new.returns += u64::from(probes.take_stall()) + u64::from(told.alone && !new.alone);
        if new != told {
            tell(&told, &new);
            told = new;
            seen.send_replace(told.clone());
        }
    }
}

/// An address that stands for uplinks of a node's: several whose codes are the same have one.
type OfUplink = (Name, Ipv6Addr);

impl Targets {
    /// Where these nodes answer for their uplinks.
    fn of_uplinks<'a>(&self, nodes: impl Iterator<Item = &'a Name>) -> BTreeMap<OfUplink, Ipv6Addr> {
        let known = nodes.filter_map(|name| self.uplinks.get_key_value(name));
        known.flat_map(|(name, of)| of.values().map(|address| ((name.clone(), *address), *address))).collect()
    }
}

/// The nodes that are dead, and what those have lost that do not answer for all of their uplinks.
fn tell_apart(
    nodes: &Probes<Name>,
    uplinks: &mut Probes<OfUplink>,
    targets: &Targets,
) -> (BTreeSet<Name>, BTreeMap<Name, BTreeSet<UplinkKey>>) {
    let (mut dead, mut lost) = (nodes.dead(), BTreeMap::new());
    dead.retain(|name| {
        let Some(of) = targets.uplinks.get(name) else { return true };
        let silent = of.iter().filter(|(_, address)| !uplinks.is_alive(&(name.clone(), **address)));
        let silent: BTreeSet<UplinkKey> = silent.map(|(key, _)| key.clone()).collect();
        let is_dead = silent.len() == of.len();
        if is_dead {
            of.values().for_each(|address| uplinks.give_up(&(name.clone(), *address)));
        } else if !silent.is_empty() {
            lost.insert(name.clone(), silent);
        }
        is_dead
    });
    (dead, lost)
}

/// Whether others ask for this node, while it hears of nobody.
#[derive(Debug, Default)]
struct Reachability {
    /// How often it had been asked when it began.
    before: Option<Option<u64>>,
}

impl Reachability {
    /// Whether others reach this node. That they do not is certain only when that has lasted longer than they would
    /// have left this node unasked by chance.
    fn is_reached(&mut self, nobody_answers: bool) -> bool {
        if !nobody_answers {
            self.before = None;
            return true;
        }
        let now = asked();
        *self.before.get_or_insert(now) != now
    }
}

fn tell(before: &PeerLiveness, now: &PeerLiveness) {
    for node in now.dead.difference(&before.dead) {
        tracing::warn!(%node, "the node does not answer: its allocations are other nodes' now");
    }
    for node in before.dead.difference(&now.dead) {
        tracing::info!(%node, "the node answers again");
    }
    for (node, lost) in now.lost.iter().filter(|(node, lost)| before.lost.get(*node) != Some(*lost)) {
        let lost = lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        tracing::warn!(%node, lost, "the node's uplink has lost a family");
    }
    for node in before.lost.keys().filter(|node| !now.lost.contains_key(*node) && !now.dead.contains(*node)) {
        tracing::info!(%node, "the node's uplink has all families again");
    }
    if now.alone && !before.alone {
        tracing::warn!("no other node answers, and none asks for this one");
    }
}

fn open(targets: &Targets) -> Option<Echo> {
    match Echo::open(targets.device, targets.source?) {
        Ok(echo) => Some(echo),
        Err(e) => {
            tracing::warn!("other nodes cannot be asked whether they live: {e:#}");
            None
        }
    }
}

/// Waits until there may be an answer. What is wrong with the socket, taking the answer tells.
async fn heard(echo: &Option<Echo>) {
    match echo {
        Some(echo) => drop(echo.readable().await),
        None => std::future::pending().await,
    }
}

fn take(echo: &mut Option<Echo>, now: Instant, mut answered: impl FnMut(Ipv6Addr, u16, Instant)) {
    let Some(open) = echo else { return };
    loop {
        match open.reply() {
            Ok(Some(answer)) => {
                let at = now.checked_sub(answer.waited).unwrap_or(now);
                answered(answer.from, answer.sequence, at);
            }
            Ok(None) => return,
            Err(e) => {
                tracing::warn!("answers of other nodes cannot be heard: {e}");
                *echo = None;
                return;
            }
        }
    }
}

/// How many echo requests have come through the tunnel, as the kernel counts them.
fn asked() -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/net/dev_snmp6/{DEVICE}")).ok()?;
    let line = text.lines().find(|line| line.split_whitespace().next() == Some("Icmp6InEchos"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
