//! The liveness of gateway nodes. Their kernels answer probes through the tunnel.
//!
//! A task of its own sends the probes and receives the replies. It reports changes only.
//!
//! A node answers at its health address while all of its uplinks work, and at one more address for each uplink and
//! family that works. Only the first address is probed while it answers, so that a node that has lost a family costs
//! some more probes, and no other node does.

mod loss;
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

/// How nodes are probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LivenessSettings {
    /// The interval between probes to a node that answers.
    pub interval: Duration,
    /// A node is dead after this number of half intervals without a reply. Each has three probes.
    pub misses: u32,
}

impl LivenessSettings {
    /// An upper bound of the time in which a dead node is detected, where packets are not lost.
    pub fn detection(&self) -> Duration {
        self.interval * (self.misses + 1)
    }

    /// The shortest time to wait for a reply, however short the round trip is: a busy host replies late.
    fn shortest_patience(&self) -> Duration {
        self.interval / 5
    }

    /// The interval between probes to a node that has missed one.
    fn quick(&self) -> Duration {
        self.interval / 6
    }

    /// The number of consecutive probes without a reply after which a node is dead. A line that loses 5 % in each
    /// direction loses seven of them once in a thousand hours; it would lose three ten times an hour. A line that loses
    /// more demands more of them: see [`loss`].
    fn probes(&self) -> u32 {
        (self.misses * 3).saturating_sub(2).max(1)
    }

    /// A node that is absent for a shorter time than this is not found dead by any other node.
    pub fn safe_absence(&self) -> Duration {
        // The first probe may come at once; the others come within half the time for each further miss.
        self.interval / 2 * (self.misses - 1)
    }
}

/// The nodes to probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// The tunnel device's index. It changes when the device is created again.
    pub device: u32,
    /// The source address of the probes.
    pub source: Option<Ipv6Addr>,
    /// The nodes' health addresses.
    pub nodes: BTreeMap<Name, Ipv6Addr>,
    /// The uplinks of each node that egress IPs need, with the address at which the node answers for each.
    pub uplinks: BTreeMap<Name, BTreeMap<UplinkKey, Ipv6Addr>>,
}

/// The liveness of other nodes, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerLiveness {
    /// The nodes that do not answer.
    pub dead: BTreeSet<Name>,
    /// The uplinks that answering nodes have lost.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// Whether no other node answers, and none probes this node.
    pub alone: bool,
    /// Whether another node answers, or has probed this node since none answers.
    pub reached: bool,
    /// How many times this node has returned from a time in which it was frozen or alone, and could not receive the
    /// reports of other nodes.
    pub returns: u64,
}

/// Probes the targets until their sender is dropped, and sends each change of the liveness.
pub async fn watch(
    settings: LivenessSettings,
    mut targets: watch::Receiver<Targets>,
    changes: watch::Sender<PeerLiveness>,
) {
    let mut probes = Probes::new(settings);
    let mut uplinks = Probes::unproven(settings);
    let mut echo: Option<Echo> = None;
    let mut wanted = Targets::default();
    let mut reported = PeerLiveness::default();
    let mut reachability = Reachability::default();
    loop {
        let next = [probes.next(), uplinks.next()].into_iter().flatten().min();
        tokio::select! {
            changed = targets.changed() => if changed.is_err() { return },
            () = has_reply(&echo) => {}
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
        }
        let new = targets.borrow_and_update().clone();
        if (new.device, new.source) != (wanted.device, wanted.source) {
            echo = None;
        }
        wanted = new;
        let now = Instant::now();
        probes.set_nodes(&wanted.nodes, now);
        // Take the replies first: if the daemon was busy, they arrived in time.
        take_replies(&mut echo, now, |from, sequence, at| {
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
            // A probe that cannot be sent counts as a probe without a reply.
            if let Some(echo) = &echo {
                let _ = echo.request(address, sequence);
            }
        }
        let (dead, lost) = dead_and_lost(&probes, &mut uplinks, &wanted);
        let mut new = PeerLiveness { dead, lost, ..reported.clone() };
        let none_answers = !new.dead.is_empty() && new.dead.len() == wanted.nodes.len();
        new.reached = reachability.is_reached(none_answers);
        new.alone = !new.reached && probes.since_last_reply(now) > settings.detection();
        new.returns += u64::from(probes.take_stall()) + u64::from(reported.alone && !new.alone);
        if new != reported {
            log_changes(&reported, &new);
            reported = new;
            changes.send_replace(reported.clone());
        }
    }
}

/// A health address for uplinks of a node. Uplinks with the same code share it.
type OfUplink = (Name, Ipv6Addr);

impl Targets {
    /// The addresses at which these nodes answer for their uplinks.
    fn of_uplinks<'a>(&self, nodes: impl Iterator<Item = &'a Name>) -> BTreeMap<OfUplink, Ipv6Addr> {
        let known = nodes.filter_map(|name| self.uplinks.get_key_value(name));
        known.flat_map(|(name, of)| of.values().map(|address| ((name.clone(), *address), *address))).collect()
    }
}

/// The dead nodes, and the lost uplinks of nodes that answer for some of their uplinks only.
fn dead_and_lost(
    nodes: &Probes<Name>,
    uplinks: &mut Probes<OfUplink>,
    targets: &Targets,
) -> (BTreeSet<Name>, BTreeMap<Name, BTreeSet<UplinkKey>>) {
    let (mut dead, mut lost) = (nodes.dead(), BTreeMap::new());
    dead.retain(|name| {
        let Some(of) = targets.uplinks.get(name) else { return true };
        let unreachable = of.iter().filter(|(_, address)| !uplinks.is_alive(&(name.clone(), **address)));
        let unreachable: BTreeSet<UplinkKey> = unreachable.map(|(key, _)| key.clone()).collect();
        let is_dead = unreachable.len() == of.len();
        if is_dead {
            of.values().for_each(|address| uplinks.give_up(&(name.clone(), *address)));
        } else if !unreachable.is_empty() {
            lost.insert(name.clone(), unreachable);
        }
        is_dead
    });
    (dead, lost)
}

/// Whether other nodes probe this one while none answers it.
#[derive(Debug, Default)]
struct Reachability {
    /// The number of received probes when the other nodes stopped to answer.
    before: Option<Option<u64>>,
}

impl Reachability {
    /// Whether other nodes reach this one. That they do not is certain only after a time in which they would have
    /// probed it.
    fn is_reached(&mut self, none_answers: bool) -> bool {
        if !none_answers {
            self.before = None;
            return true;
        }
        let now = received_probes();
        *self.before.get_or_insert(now) != now
    }
}

fn log_changes(before: &PeerLiveness, now: &PeerLiveness) {
    for node in now.dead.difference(&before.dead) {
        tracing::warn!(%node, "the node does not answer; other nodes take over its egress IPs");
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
        tracing::warn!("no other node answers, and none probes this one");
    }
}

fn open(targets: &Targets) -> Option<Echo> {
    match Echo::open(targets.device, targets.source?) {
        Ok(echo) => Some(echo),
        Err(e) => {
            tracing::warn!("other nodes cannot be probed: {e:#}");
            None
        }
    }
}

/// Waits until there may be a reply. If the socket fails, [`take_replies`] returns the error.
async fn has_reply(echo: &Option<Echo>) {
    match echo {
        Some(echo) => drop(echo.readable().await),
        None => std::future::pending().await,
    }
}

fn take_replies(echo: &mut Option<Echo>, now: Instant, mut answered: impl FnMut(Ipv6Addr, u16, Instant)) {
    let Some(open) = echo else { return };
    loop {
        match open.reply() {
            Ok(Some(answer)) => {
                let at = now.checked_sub(answer.waited).unwrap_or(now);
                answered(answer.from, answer.sequence, at);
            }
            Ok(None) => return,
            Err(e) => {
                tracing::warn!("replies of other nodes cannot be received: {e}");
                *echo = None;
                return;
            }
        }
    }
}

/// The kernel's count of echo requests that arrived through the tunnel.
fn received_probes() -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/net/dev_snmp6/{DEVICE}")).ok()?;
    let line = text.lines().find(|line| line.split_whitespace().next() == Some("Icmp6InEchos"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
