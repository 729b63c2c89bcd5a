//! Probes, and the liveness that follows from their replies.

use super::LivenessSettings;
use super::loss::Loss;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;
use tokio::time::Instant;

/// How long a dead node must answer before it counts as alive, unless no other node is alive. The kernel of a node
/// that was frozen answers before its daemon runs again. In this time the daemon detects which egress IPs others have
/// taken over, and reports that.
const PROBATION: Duration = Duration::from_millis(500);
/// A reply within this time is matched with its probe, and proves that the node was alive when it was probed.
const LATE: Duration = Duration::from_secs(5);
/// The longest time to wait for a reply. Connections do not work over a longer round trip either.
const MAX_PATIENCE: Duration = Duration::from_secs(3);
/// A dead node must answer at least this many probes before it counts as alive.
const ENOUGH: u32 = 3;

/// The round trip as TCP measures it (RFC 6298, section 2). Each reply names its probe, so that every reply is a
/// sample. Karn's algorithm is for replies that do not.
#[derive(Clone, Copy, Debug)]
struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
}

impl RoundTrip {
    fn first(sample: Duration) -> Self {
        RoundTrip { smoothed: sample, variation: sample / 2 }
    }

    fn and(self, sample: Duration) -> Self {
        RoundTrip {
            smoothed: self.smoothed * 7 / 8 + sample / 8,
            variation: self.variation * 3 / 4 + self.smoothed.abs_diff(sample) / 4,
        }
    }

    /// The time after which a reply is unlikely. `least` is the time that a busy host may take to reply.
    fn timeout(self, least: Duration) -> Duration {
        self.smoothed + (self.variation * 4).max(least)
    }
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    sequence: u16,
    asked: Instant,
    /// Whether the time for its reply is over. The reply may still arrive.
    missed: bool,
    /// Whether the line's loss includes it.
    counted: bool,
}

/// A dead node that answers again.
#[derive(Clone, Copy, Debug)]
struct Return {
    /// When the first reply arrived.
    since: Instant,
    /// When the probe was sent whose reply arrived first.
    from: Instant,
    /// The number of probes since then that were answered.
    answered: u32,
    missed: u32,
}

impl Return {
    /// At least three of five probes must be answered. A line that passes every other packet must not move egress IPs
    /// to and fro.
    fn is_over(&self, now: Instant) -> bool {
        now >= self.since + PROBATION && self.answered >= ENOUGH && self.missed * 3 <= self.answered * 2
    }
}

#[derive(Debug)]
struct ProbedNode {
    address: Ipv6Addr,
    /// When it is to be probed next.
    next: Instant,
    /// The sequence number of its next probe.
    sequence: u16,
    /// Probes without a reply, oldest first.
    open: VecDeque<Probe>,
    /// When the newest answered probe was sent.
    answered: Option<Instant>,
    /// The number of probes since then that were not answered in time.
    missed: u32,
    round_trip: Option<RoundTrip>,
    loss: Loss,
    /// Probes that were sent before are no samples of the line's loss: the node was dead then.
    alive_since: Instant,
    dead: bool,
    /// Whether it has been found neither alive nor dead. Its first reply makes it alive.
    unproven: bool,
    returning: Option<Return>,
    /// When it last answered, or was added.
    last: Instant,
}

impl ProbedNode {
    fn new(address: Ipv6Addr, unproven: bool, now: Instant) -> Self {
        ProbedNode {
            address,
            next: now,
            sequence: 0,
            open: VecDeque::new(),
            answered: None,
            missed: 0,
            round_trip: None,
            loss: Loss::default(),
            alive_since: now,
            dead: unproven,
            unproven,
            returning: None,
            last: now,
        }
    }

    /// The time after which a probe counts as missed.
    fn patience(&self, settings: &LivenessSettings) -> Duration {
        let least = settings.shortest_patience();
        match self.round_trip {
            Some(round_trip) => round_trip.timeout(least).min(MAX_PATIENCE.max(least)),
            None => settings.interval,
        }
    }

    /// The number of consecutive probes without a reply after which it is dead.
    fn probes(&self, settings: &LivenessSettings) -> u32 {
        self.loss.probes(settings.probes())
    }

    /// The time between this probe and the next one. A node that has missed a probe is probed so often that chance
    /// alone does not lose every probe.
    fn pace(&self, settings: &LivenessSettings) -> Duration {
        let unanswered = self.open.iter().filter(|q| self.answered.is_none_or(|at| q.asked > at)).count();
        match (self.dead, self.returning) {
            (true, None) => settings.interval / 2,
            (true, Some(_)) => settings.quick(),
            (false, _) if self.missed == 0 => settings.interval,
            (false, _) if unanswered < self.probes(settings) as usize => settings.quick(),
            (false, _) => settings.interval / 2,
        }
    }

    fn judge(&mut self, settings: &LivenessSettings, now: Instant) {
        let (patience, before) = (self.patience(settings), self.missed);
        for probe in self.open.iter_mut().filter(|q| !q.missed && now >= q.asked + patience) {
            probe.missed = true;
            self.missed += u32::from(self.answered.is_none_or(|at| probe.asked > at));
            if let Some(returning) = self.returning.as_mut().filter(|r| probe.asked >= r.from) {
                returning.missed += 1;
            }
        }
        let late = LATE.max(patience);
        while self.open.front().is_some_and(|q| now >= q.asked + late) {
            self.open.pop_front();
        }
        if self.missed >= self.probes(settings) {
            self.dead = true;
            self.returning = None;
        }
        if before == 0 && self.missed > 0 && !self.dead {
            self.next = self.next.min(now);
        }
    }

    /// Takes a reply that arrived at `at`. `first`: no other node is alive.
    fn take_reply(&mut self, sequence: u16, at: Instant, first: bool) {
        let Some(index) = self.open.iter().position(|q| q.sequence == sequence) else { return };
        let Some(probe) = self.open.remove(index) else { return };
        let sample = at.saturating_duration_since(probe.asked);
        self.round_trip = Some(self.round_trip.map_or(RoundTrip::first(sample), |before| before.and(sample)));
        self.last = self.last.max(at);
        if self.answered.is_none_or(|before| probe.asked > before) {
            self.answered = Some(probe.asked);
            let since = self.open.iter().filter(|q| q.missed && q.asked > probe.asked).count();
            self.missed = u32::try_from(since).unwrap_or(u32::MAX);
        }
        if !self.dead {
            self.count_loss(probe);
            return;
        }
        if let Some(returning) = &mut self.returning {
            if probe.asked >= returning.from {
                returning.answered += 1;
                returning.missed = returning.missed.saturating_sub(u32::from(probe.missed));
            }
        } else {
            // Later probes may have been missed before, if replies overtake each other.
            let missed = self.open.iter().filter(|q| q.missed && q.asked > probe.asked).count();
            let missed = u32::try_from(missed).unwrap_or(u32::MAX);
            self.returning = Some(Return { since: at, from: probe.asked, answered: 1, missed });
            self.next = self.next.min(at);
        }
        if first || self.unproven || self.returning.is_some_and(|returning| returning.is_over(at)) {
            (self.dead, self.unproven) = (false, false);
            self.returning = None;
            self.alive_since = at;
        }
    }

    /// Counts an answered probe and the missed ones before it: the node lived then, so the line lost them.
    fn count_loss(&mut self, answered: Probe) {
        let is_sample = |probe: &Probe| !probe.counted && probe.asked >= self.alive_since;
        let before = |probe: &&mut Probe| probe.missed && probe.asked < answered.asked && is_sample(probe);
        for probe in self.open.iter_mut().filter(before) {
            probe.counted = true;
            self.loss.count(true);
        }
        if is_sample(&answered) {
            self.loss.count(answered.missed);
        }
    }
}

/// The probes to nodes, or to parts of nodes, which `K` identifies.
#[derive(Debug)]
pub struct Probes<K> {
    settings: LivenessSettings,
    /// Whether a new node counts as dead until it answers for the first time.
    unproven: bool,
    nodes: BTreeMap<K, ProbedNode>,
    by_address: HashMap<Ipv6Addr, K>,
    stalled: bool,
}

impl<K: Ord + Clone> Probes<K> {
    /// Probes to nodes that count as alive when they are added.
    pub fn new(settings: LivenessSettings) -> Self {
        Probes { settings, unproven: false, nodes: BTreeMap::new(), by_address: HashMap::new(), stalled: false }
    }

    /// Probes to nodes that count as dead until they answer for the first time.
    pub fn unproven(settings: LivenessSettings) -> Self {
        Probes { unproven: true, ..Self::new(settings) }
    }

    /// Sets the nodes to probe.
    pub fn set_nodes(&mut self, wanted: &BTreeMap<K, Ipv6Addr>, now: Instant) {
        let same = |name: &K, node: &ProbedNode| wanted.get(name) == Some(&node.address);
        if self.nodes.len() == wanted.len() && self.nodes.iter().all(|(name, node)| same(name, node)) {
            return;
        }
        self.nodes.retain(|name, node| same(name, node));
        for (name, address) in wanted {
            self.nodes.entry(name.clone()).or_insert_with(|| ProbedNode::new(*address, self.unproven, now));
        }
        self.by_address = wanted.iter().map(|(name, address)| (*address, name.clone())).collect();
    }

    /// When the next probe is to be sent, or judged.
    pub fn next(&self) -> Option<Instant> {
        let of_node = |node: &ProbedNode| {
            let oldest = node.open.iter().find(|q| !q.missed);
            let due = oldest.map(|q| q.asked + node.patience(&self.settings));
            due.map_or(node.next, |due| due.min(node.next))
        };
        self.nodes.values().map(of_node).min()
    }

    /// Counts the probes whose time is over as missed. All replies that have arrived must have been taken before.
    pub fn judge(&mut self, now: Instant) {
        for node in self.nodes.values_mut() {
            node.judge(&self.settings, now);
        }
    }

    /// The addresses to probe now, with sequence numbers.
    pub fn due(&mut self, now: Instant) -> Vec<(Ipv6Addr, u16)> {
        let late = self.settings.safe_absence().max(self.settings.shortest_patience());
        let mut asked = Vec::new();
        for node in self.nodes.values_mut().filter(|node| node.next <= now) {
            self.stalled |= now - node.next > late;
            node.open.push_back(Probe { sequence: node.sequence, asked: now, missed: false, counted: false });
            asked.push((node.address, node.sequence));
            node.sequence = node.sequence.wrapping_add(1);
            node.next = now + node.pace(&self.settings);
        }
        asked
    }

    /// Takes a reply that arrived at `at`. A late one is matched with its own probe.
    pub fn answered(&mut self, from: Ipv6Addr, sequence: u16, at: Instant) {
        let alone = self.nodes.values().all(|node| node.dead);
        if let Some(node) = self.by_address.get(&from).and_then(|name| self.nodes.get_mut(name)) {
            node.take_reply(sequence, at, alone);
        }
    }

    /// The nodes that do not answer.
    pub fn dead(&self) -> BTreeSet<K> {
        self.nodes.iter().filter(|(_, node)| node.dead).map(|(name, _)| name.clone()).collect()
    }

    /// The nodes that are dead or have missed a probe.
    pub fn in_doubt(&self) -> impl Iterator<Item = &K> {
        self.nodes.iter().filter(|(_, node)| node.dead || node.missed > 0).map(|(name, _)| name)
    }

    /// Whether the node answers.
    pub fn is_alive(&self, of: &K) -> bool {
        self.nodes.get(of).is_some_and(|node| !node.dead)
    }

    /// Makes a node that has not answered yet count as found dead. It must then answer as long as other dead nodes
    /// before it is alive.
    pub fn give_up(&mut self, of: &K) {
        if let Some(node) = self.nodes.get_mut(of) {
            node.unproven = false;
        }
    }

    /// The time since the last reply of any node.
    pub fn since_last_reply(&self, now: Instant) -> Duration {
        self.nodes.values().map(|node| now.saturating_duration_since(node.last)).min().unwrap_or_default()
    }

    /// Whether a probe was so late that other nodes may have found this node dead meanwhile. Resets the answer.
    pub fn take_stall(&mut self) -> bool {
        std::mem::take(&mut self.stalled)
    }
}

#[cfg(test)]
mod tests;
