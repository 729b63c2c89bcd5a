//! Which addresses the hook has assigned to this node, and what it is to be asked.

use super::AssignmentResult;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// The pauses after the first refusals; the last one is used for all further ones.
const PAUSES: [Duration; 6] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(30),
];

/// How long after an answer the hook is asked to confirm it.
const CONFIRM: Duration = Duration::from_secs(60);

/// What the hook has said about an address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum AssignmentState {
    /// It was asked and has not answered. `why` is its last refusal.
    Asked { why: String, refusals: usize },
    /// It has assigned the address to this node, and is asked to confirm it at `again`: another node may have asked
    /// for the address meanwhile.
    Assigned { again: Instant },
    /// It has refused, or has not answered in time.
    Refused { why: String, again: Instant, refusals: usize },
}

/// The addresses that this node has asked the hook for.
#[derive(Debug, Default)]
pub struct Assignments {
    has_hook: bool,
    states: BTreeMap<IpAddr, AssignmentState>,
    /// The addresses that this decision wants or keeps.
    wanted: BTreeSet<IpAddr>,
    ask: BTreeSet<IpAddr>,
}

/// What the hook is to be told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// The addresses to bring to this node.
    pub assign: BTreeSet<IpAddr>,
    /// The addresses that this node no longer uses.
    pub release: BTreeSet<IpAddr>,
}

impl Assignments {
    /// Without a hook, every address may be used.
    pub fn new(has_hook: bool) -> Self {
        Assignments { has_hook, ..Assignments::default() }
    }

    /// Whether there is a hook.
    pub fn has_hook(&self) -> bool {
        self.has_hook
    }

    /// Begins a decision.
    pub fn begin(&mut self) {
        self.wanted.clear();
        self.ask.clear();
    }

    /// Whether this node may use the address. If it may not yet, the hook is asked.
    pub fn want(&mut self, address: IpAddr, now: Instant) -> bool {
        if !self.has_hook {
            return true;
        }
        self.wanted.insert(address);
        let (why, refusals) = match self.states.get(&address) {
            Some(AssignmentState::Assigned { again }) => {
                if *again <= now {
                    self.states.insert(address, AssignmentState::Assigned { again: now + CONFIRM });
                    self.ask.insert(address);
                }
                return true;
            }
            Some(AssignmentState::Asked { .. }) => return false,
            Some(AssignmentState::Refused { again, .. }) if *again > now => return false,
            Some(AssignmentState::Refused { why, refusals, .. }) => (why.clone(), *refusals),
            None => (String::new(), 0),
        };
        self.states.insert(address, AssignmentState::Asked { why, refusals });
        self.ask.insert(address);
        false
    }

    /// The address stays on this node for now; the hook is not asked.
    pub fn keep(&mut self, address: IpAddr) {
        if self.has_hook {
            self.wanted.insert(address);
        }
    }

    /// Has the hook confirm all that it has assigned: another node may have asked for it while this one was away.
    pub fn confirm(&mut self, now: Instant) {
        for state in self.states.values_mut() {
            if let AssignmentState::Assigned { again } = state {
                *again = now;
            }
        }
    }

    /// Ends the decision.
    pub fn end(&mut self) -> Requests {
        let (wanted, mut release) = (&self.wanted, BTreeSet::new());
        self.states.retain(|address, state| {
            let stays = wanted.contains(address);
            // Who was asked and has not answered is told after the answer.
            if !stays && matches!(state, AssignmentState::Assigned { .. }) {
                release.insert(*address);
            }
            stays
        });
        Requests { assign: std::mem::take(&mut self.ask), release }
    }

    /// Takes an answer. Returns whether the hook is to be told that the address is not used here: nothing wants it any
    /// more, and whether it has been assigned is not certain.
    #[must_use]
    pub fn answered(&mut self, address: IpAddr, answer: AssignmentResult, now: Instant) -> bool {
        let Some(state) = self.states.get_mut(&address) else { return true };
        let before = match state {
            AssignmentState::Asked { refusals, .. } | AssignmentState::Refused { refusals, .. } => *refusals,
            AssignmentState::Assigned { .. } => 0,
        };
        *state = match answer {
            Ok(()) => AssignmentState::Assigned { again: now + CONFIRM },
            Err(why) => {
                if before == 0 {
                    tracing::warn!(%address, "the assign hook has not brought an egress IP to this node: {why}");
                }
                let pause = PAUSES[before.min(PAUSES.len() - 1)];
                AssignmentState::Refused { why, again: now + pause, refusals: before + 1 }
            }
        };
        false
    }

    /// The addresses that the hook has refused, with its reasons.
    pub fn refused(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.states.iter().filter_map(|(address, state)| match state {
            AssignmentState::Refused { why, .. } | AssignmentState::Asked { why, refusals: 1.. } => {
                Some((*address, &**why))
            }
            AssignmentState::Asked { .. } | AssignmentState::Assigned { .. } => None,
        })
    }

    /// Whether this node may use the address, as far as the hook is concerned.
    pub fn is_assigned(&self, address: IpAddr) -> bool {
        !self.has_hook || matches!(self.states.get(&address), Some(AssignmentState::Assigned { .. }))
    }

    /// When the hook is to be asked again.
    pub fn next(&self) -> Option<Instant> {
        let again = |state: &AssignmentState| match state {
            AssignmentState::Refused { again, .. } | AssignmentState::Assigned { again } => Some(*again),
            AssignmentState::Asked { .. } => None,
        };
        self.states.values().filter_map(again).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 50));

    fn decide(assignments: &mut Assignments, wanted: bool, now: Instant) -> (bool, Requests) {
        assignments.begin();
        let usable = wanted && assignments.want(ADDRESS, now);
        (usable, assignments.end())
    }

    fn assign() -> Requests {
        Requests { assign: [ADDRESS].into(), release: BTreeSet::new() }
    }

    #[test]
    fn without_a_hook_every_address_may_be_used_and_nobody_is_asked() {
        let mut assignments = Assignments::new(false);
        assert_eq!(decide(&mut assignments, true, Instant::now()), (true, Requests::default()));
        assert_eq!(decide(&mut assignments, false, Instant::now()), (false, Requests::default()));
    }

    #[test]
    fn an_address_is_used_after_the_hook_has_assigned_it_and_released_when_it_is_not_wanted_any_more() {
        let (mut assignments, now) = (Assignments::new(true), Instant::now());
        assert_eq!(decide(&mut assignments, true, now), (false, assign()));
        assert_eq!(decide(&mut assignments, true, now), (false, Requests::default()), "it is asked once");
        assert!(!assignments.answered(ADDRESS, Ok(()), now));
        assert_eq!(decide(&mut assignments, true, now), (true, Requests::default()));
        let released = Requests { assign: BTreeSet::new(), release: [ADDRESS].into() };
        assert_eq!(decide(&mut assignments, false, now), (false, released));
        assert_eq!(decide(&mut assignments, true, now), (false, assign()), "another node may have had it");
    }

    #[test]
    fn an_assigned_address_is_confirmed_every_minute_and_after_an_absence() {
        let (mut assignments, mut now) = (Assignments::new(true), Instant::now());
        decide(&mut assignments, true, now);
        assert!(!assignments.answered(ADDRESS, Ok(()), now));
        now += CONFIRM - Duration::from_secs(1);
        assert_eq!(decide(&mut assignments, true, now), (true, Requests::default()));
        now += Duration::from_secs(1);
        assert_eq!(decide(&mut assignments, true, now), (true, assign()), "it is used meanwhile");
        assert_eq!(decide(&mut assignments, true, now), (true, Requests::default()), "it is asked once");
        assignments.confirm(now);
        assert_eq!(decide(&mut assignments, true, now), (true, assign()));
        assert!(!assignments.answered(ADDRESS, Err("another node has it".to_owned()), now));
        assert!(!decide(&mut assignments, true, now).0);
    }

    #[test]
    fn a_refusal_is_repeated_after_ever_longer_pauses_and_told_meanwhile() {
        let (mut assignments, mut now) = (Assignments::new(true), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(decide(&mut assignments, true, now), (false, assign()));
            assert!(!assignments.answered(ADDRESS, Err("no permission".to_owned()), now));
            assert_eq!(assignments.refused().collect::<Vec<_>>(), [(ADDRESS, "no permission")]);
            assert_eq!(assignments.next(), Some(now + Duration::from_secs(seconds)));
            assert_eq!(decide(&mut assignments, true, now), (false, Requests::default()));
            now += Duration::from_secs(seconds);
        }
        decide(&mut assignments, true, now);
        assert_eq!(assignments.refused().count(), 1, "it is still refused while it is asked");
        assert!(!assignments.answered(ADDRESS, Ok(()), now));
        assert_eq!((assignments.refused().count(), assignments.next()), (0, Some(now + CONFIRM)));
    }

    #[test]
    fn a_late_answer_for_an_address_that_is_not_wanted_any_more_is_followed_by_its_release() {
        let (mut assignments, now) = (Assignments::new(true), Instant::now());
        decide(&mut assignments, true, now);
        assert_eq!(decide(&mut assignments, false, now), (false, Requests::default()));
        assert!(assignments.answered(ADDRESS, Ok(()), now));
        decide(&mut assignments, true, now);
        decide(&mut assignments, false, now);
        assert!(assignments.answered(ADDRESS, Err("no answer".to_owned()), now), "it may have been assigned");
    }
}
