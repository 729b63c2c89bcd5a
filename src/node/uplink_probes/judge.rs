//! The state of one gateway's probes of one family on this node, computed from answers and times alone.
//!
//! The uplink is lost only if the probes fail here and succeed on another node over a whole later period. If the target
//! is dead, or its network, the probes fail on all nodes, nobody learns of a success, and nothing moves. It makes no
//! difference how far apart the nodes notice it.

use egret_nft::mac::Mac;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// Probes in an interval while no target answers, so that chance alone does not lose all of them.
const QUICK: u32 = 5;
/// The time that an answer takes at most on a slow line. Probes sent later than that ago count as not answered.
const ROUND_TRIP: Duration = Duration::from_millis(500);
/// How many times longer than a failure the probes must be free of one before a loss ends.
const RECOVERY: u32 = 3;

/// How often a gateway's targets are probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbeSettings {
    /// The interval between two probes of a target.
    pub interval: Duration,
    /// The number of intervals without an answer after which the probes have failed.
    pub misses: u32,
}

impl ProbeSettings {
    /// How old the newest answered probe is when the probes have failed: it is one interval old when the next one is
    /// sent.
    fn longest_without_answer(&self) -> Duration {
        self.interval * (self.misses + 1) + ROUND_TRIP
    }

    /// The number of unanswered probes without which the probes have not failed: after a pause of the daemon, a long
    /// time without an answer alone says nothing.
    fn least_unanswered(&self) -> usize {
        2 * self.misses as usize
    }

    /// The length of the period in which another node's probes must succeed, while all of this node's fail.
    fn proof(&self) -> Duration {
        self.interval * self.misses
    }

    /// The time without a failure after which a loss ends.
    fn recovery(&self) -> Duration {
        self.interval * self.misses * RECOVERY
    }
}

/// What the probes say about the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// No target has answered yet, and the probes have not failed.
    Unproven,
    /// A target answers.
    Succeeds,
    /// No target answers, and no other node's probes are known to succeed.
    Fails,
    /// The probes have failed while another node's succeeded. It lasts until they have succeeded for a while.
    Lost,
}

/// A period in which another node's probes succeed. The times are those at which its answered probes were sent.
#[derive(Clone, Copy, Debug)]
struct Proof {
    first: Instant,
    last: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    settings: ProbeSettings,
    /// When each target is to be probed next.
    next: Vec<Instant>,
    begin: Instant,
    /// When the newest answered probe was sent.
    answered: Option<Instant>,
    /// When probes were sent since then, oldest first; no more of them than the state needs.
    unanswered: VecDeque<Instant>,
    /// Since when the probes have failed.
    failed: Option<Instant>,
    /// Other nodes' successes since then.
    proofs: BTreeMap<Mac, Proof>,
    lost: bool,
    /// The oldest probe of the time without a failure that ends a loss.
    recovering: Option<Instant>,
}

impl Judge {
    /// The state at the daemon's start, or when the probes were set. `lost`: an earlier daemon had found the uplink
    /// lost.
    pub fn new(settings: ProbeSettings, targets: usize, lost: bool, now: Instant) -> Self {
        Judge {
            settings,
            // One after the other, not all at once.
            next: (0..targets).map(|i| now + settings.interval / 4 * i as u32 / targets as u32).collect(),
            begin: now,
            answered: None,
            unanswered: VecDeque::new(),
            failed: None,
            proofs: BTreeMap::new(),
            lost,
            recovering: None,
        }
    }

    /// The state after the last call of [`judge`](Self::judge).
    pub fn state(&self) -> ProbeState {
        match (self.lost, self.failed, self.answered) {
            (true, ..) => ProbeState::Lost,
            (false, Some(_), _) => ProbeState::Fails,
            (false, None, Some(_)) => ProbeState::Succeeds,
            (false, None, None) => ProbeState::Unproven,
        }
    }

    /// When the newest answered probe was sent, if the probes succeed: what other nodes may take for a proof.
    pub fn success(&self) -> Option<Instant> {
        self.answered.filter(|_| self.state() == ProbeState::Succeeds)
    }

    /// When a target is to be probed next.
    pub fn next(&self) -> Option<Instant> {
        self.next.iter().min().copied()
    }

    /// The targets to probe now.
    pub fn due(&mut self, now: Instant) -> Vec<usize> {
        let pace = self.pace(now);
        let due: Vec<usize> = (0..self.next.len()).filter(|i| self.next[*i] <= now).collect();
        for &target in &due {
            if now - self.next[target] > self.settings.interval {
                // The daemon has paused. Answers may have been lost meanwhile.
                self.proofs.clear();
            }
            self.next[target] = now + pace;
            // The oldest ones decide.
            if self.unanswered.len() < self.settings.least_unanswered() * self.next.len() {
                self.unanswered.push_back(now);
            }
        }
        due
    }

    /// Takes the answer to the probe that was sent at `sent`.
    pub fn answered(&mut self, sent: Instant) {
        if self.answered.is_some_and(|before| sent <= before) {
            return;
        }
        self.answered = Some(sent);
        while self.unanswered.front().is_some_and(|at| *at <= sent) {
            self.unanswered.pop_front();
        }
        if self.lost {
            self.recovering.get_or_insert(sent);
        }
    }

    /// Takes another node's report that its newest answered probe was sent at `at`.
    pub fn proven(&mut self, by: Mac, at: Instant) {
        if self.failed.is_some_and(|failed| at >= failed) {
            let proof = self.proofs.entry(by).or_insert(Proof { first: at, last: at });
            proof.last = proof.last.max(at);
        }
    }

    /// Whether other nodes are to be asked whether their probes succeed.
    pub fn asks(&self) -> bool {
        self.state() == ProbeState::Fails
    }

    /// Updates the state. All answers that have arrived must have been taken before. Returns whether it has changed.
    pub fn judge(&mut self, now: Instant) -> bool {
        let before = self.state();
        if self.has_failed(now) {
            self.failed.get_or_insert(now);
            self.recovering = None;
            let proof = self.settings.proof();
            self.lost |= self.proofs.values().any(|of| of.last.saturating_duration_since(of.first) >= proof);
        } else {
            self.failed = None;
            self.proofs.clear();
        }
        let since = self.recovering.zip(self.answered).map(|(from, last)| last.saturating_duration_since(from));
        if self.lost && since.is_some_and(|since| since >= self.settings.recovery()) {
            (self.lost, self.recovering) = (false, None);
        }
        self.state() != before
    }

    fn has_failed(&self, now: Instant) -> bool {
        let without_answer = now.saturating_duration_since(self.answered.unwrap_or(self.begin));
        let late = self.unanswered.iter().take_while(|sent| **sent + ROUND_TRIP <= now).count();
        without_answer >= self.settings.longest_without_answer() && late >= self.settings.least_unanswered()
    }

    /// A lost uplink is probed at the plain interval: its egress IPs are elsewhere.
    fn pace(&self, now: Instant) -> Duration {
        let without_answer = now.saturating_duration_since(self.answered.unwrap_or(self.begin));
        let in_doubt = without_answer >= self.settings.interval * 2 && !self.lost;
        if in_doubt { self.settings.interval / QUICK } else { self.settings.interval }
    }
}

#[cfg(test)]
mod tests;
