//! What happened when, and so which sources a packet could have. Times are since the lab was built.
//!
//! The model does not know when a node hears of a change: from the moment that it is written until the node's daemon
//! has run for [`HEARD`] without a break, the old and the new state are both allowed, and what lies between them.

use super::model::{Allowed, Policies, SERVERS, namespace};
use super::step::{DAEMONS, NODES};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// A daemon that has run so long, undisturbed, has heard of what was written before, and has done it. The pause of a
/// policy that begins is a second, that of a slow machine the rest.
pub const HEARD: Duration = Duration::from_secs(5);

/// A pod from its making to its end.
#[derive(Clone, Debug)]
pub struct Life {
    /// Its number.
    pub pod: usize,
    /// The number of its node.
    pub node: usize,
    /// From when on it has which `app`.
    pub apps: Vec<(Duration, &'static str)>,
    /// Its object is gone, and its record could be too: nothing is promised.
    pub lost: Option<Duration>,
}

/// See the module.
#[derive(Default)]
pub struct Timeline {
    policies: Vec<(Duration, Policies)>,
    /// Of each daemon, when it began or ceased to run.
    runs: BTreeMap<&'static str, Vec<(Duration, bool)>>,
    /// When somebody flushed a node's tables.
    flushes: Vec<(Duration, usize)>,
    /// All pods there were, by incarnation.
    pub lives: Vec<Life>,
}

impl Timeline {
    /// The policies as they are now.
    pub fn now(&self) -> Policies {
        self.policies.last().map(|(_, p)| p.clone()).unwrap_or_default()
    }

    /// From now on the policies are these.
    pub fn change(&mut self, at: Duration, change: impl FnOnce(&mut Policies)) {
        let mut policies = self.now();
        change(&mut policies);
        self.policies.push((at, policies));
    }

    /// A daemon begins or ceases to run.
    pub fn runs(&mut self, at: Duration, daemon: &'static str, runs: bool) {
        self.runs.entry(daemon).or_default().push((at, runs));
    }

    /// Since when the daemon has run without a break; `None`: it does not.
    pub fn running_since(&self, daemon: &str) -> Option<Duration> {
        let (at, runs) = *self.runs.get(daemon)?.last()?;
        runs.then_some(at)
    }

    /// Whether everybody has heard of all that was written before `at`.
    pub fn all_heard(&self, at: Duration, now: Duration) -> bool {
        DAEMONS.iter().all(|d| self.running_since(d).is_some_and(|since| since.max(at) + HEARD < now))
    }

    /// Somebody flushed a node's tables.
    pub fn flushed(&mut self, at: Duration, node: usize) {
        self.flushes.push((at, node));
    }

    /// When something was written last.
    pub fn last_change(&self) -> Duration {
        let apps = self.lives.iter().flat_map(|life| life.apps.iter().map(|(at, _)| *at));
        self.policies.iter().map(|(at, _)| *at).chain(apps).max().unwrap_or_default()
    }

    /// From when on the node has heard of what was written at `at`.
    fn heard(&self, node: usize, at: Duration) -> Duration {
        let runs = self.runs.get(NODES[node]).map(Vec::as_slice).unwrap_or_default();
        for (i, (from, up)) in runs.iter().enumerate() {
            let until = runs.get(i + 1).map_or(Duration::MAX, |(next, _)| *next);
            let heard = (*from).max(at) + HEARD;
            if *up && heard < until {
                return heard;
            }
        }
        Duration::MAX
    }

    /// Those of a list of states that a node could hold at a time between the two.
    fn possible<'a, T>(
        &self,
        states: &'a [(Duration, T)],
        node: usize,
        [from, to]: [Duration; 2],
    ) -> &'a [(Duration, T)] {
        let first = states.iter().rposition(|(at, _)| self.heard(node, *at) <= from).unwrap_or(0);
        let end = states.iter().position(|(at, _)| *at > to).unwrap_or(states.len());
        states.get(first..end).unwrap_or_default()
    }

    /// What a packet may be seen as that belongs to a flow begun at the first time and arrived at the second. `None`:
    /// anything.
    pub fn allowed(&self, incarnation: usize, server: usize, span: [Duration; 2]) -> Option<Allowed> {
        let life = &self.lives[incarnation];
        if life.lost.is_some_and(|lost| lost <= span[1]) || self.open(life.node, span) {
            return None;
        }
        let mut allowed = Allowed::default();
        let none = [(Duration::ZERO, Policies::default())];
        let policies = if self.policies.is_empty() { &none[..] } else { &self.policies };
        let mut policies = self.possible(policies, life.node, span).to_vec();
        if self.policies.first().is_some_and(|(at, _)| self.heard(life.node, *at) > span[0]) {
            policies.push(none[0].clone());
        }
        for (_, app) in self.possible(&life.apps, life.node, span) {
            for (_, policies) in &policies {
                allowed.join(&policies.allow(namespace(life.pod), app, server));
            }
        }
        Some(allowed)
    }

    /// Whether a node that the pod's packets come by was open: somebody had flushed its tables, and its daemon could
    /// not yet have put them back.
    fn open(&self, node: usize, [from, to]: [Duration; 2]) -> bool {
        self.flushes.iter().any(|(at, flushed)| {
            let concerns = *flushed == node || NODES[*flushed].starts_with('g');
            concerns && *at <= to && from < self.heard(*flushed, *at)
        })
    }

    /// Whether a pod must be answered now that all have heard of everything.
    pub fn answers(&self, incarnation: usize, server: usize) -> bool {
        let life = &self.lives[incarnation];
        let app = life.apps.last().map_or("", |(_, app)| app);
        self.now().answers(namespace(life.pod), app, server)
    }
}

/// The number of a server.
pub fn server(address: IpAddr) -> Option<usize> {
    SERVERS.iter().position(|s| *s == address)
}
