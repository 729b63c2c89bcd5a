//! Refusals by the kernel that no other try changes: it lacks a part. Such a step is tried again at growing intervals;
//! other failures keep their quick retries.

use super::steps::Step;
use crate::check::{self, Part};
use crate::datapath::route_socket::errno;
use crate::datapath::{rules, veth_pair};
use anyhow::{Result, anyhow};
use nix::libc::{EAFNOSUPPORT, ENOENT, ENOSYS, EOPNOTSUPP, EPFNOSUPPORT, EPROTONOSUPPORT};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a refusal is tried again without a pause. `ENOENT` can also mean a device that has just gone.
const QUICK: Duration = Duration::from_secs(3);
/// The first pause. Each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The steps that the kernel refuses.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    steps: BTreeMap<Step, Refusal>,
    /// Whether a step has failed in this pass for another reason.
    other_failure: bool,
    /// The failure that was logged last.
    logged: Option<String>,
}

#[derive(Debug)]
struct Refusal {
    error: String,
    since: Instant,
    /// The present pause; zero while it is tried again without one.
    pause: Duration,
    /// When the next try is due.
    again: Instant,
    /// What the kernel lacks, and the remedy: empty while there is no pause.
    words: String,
}

impl Refusals {
    /// Begins a pass.
    pub(super) fn begin(&mut self) {
        self.other_failure = false;
    }

    /// The refusal of a step that is not to be tried yet.
    pub(super) fn paused(&self, step: Step, now: Instant) -> Option<anyhow::Error> {
        let refusal = self.steps.get(&step).filter(|refusal| now < refusal.again)?;
        Some(anyhow!(refusal.error.clone()))
    }

    /// Ends all pauses: what was refused may have been something that has just gone.
    pub(super) fn end_pauses(&mut self, now: Instant) {
        self.steps.values_mut().for_each(|refusal| refusal.again = now);
    }

    /// Takes the result of a step. `words` says what the kernel lacks.
    pub(super) fn note<T>(&mut self, step: Step, result: &Result<T>, now: Instant, words: impl FnOnce(&str) -> String) {
        let error = match result {
            Err(e) if is_lasting(e) => format!("{e:#}"),
            other => {
                self.other_failure |= other.is_err();
                self.steps.remove(&step);
                return;
            }
        };
        let Some(refusal) = self.steps.get_mut(&step).filter(|refusal| refusal.error == error) else {
            let new = Refusal { error, since: now, pause: Duration::ZERO, again: now, words: String::new() };
            self.steps.insert(step, new);
            return;
        };
        if now < refusal.since + QUICK {
            return;
        }
        if refusal.pause.is_zero() {
            refusal.words = Some(words(&error)).filter(|words| !words.is_empty()).unwrap_or(error);
        }
        refusal.pause = (refusal.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        refusal.again = now + refusal.pause;
    }

    /// What the kernel lacks, if it refuses a step for good.
    pub(super) fn lasting(&self) -> Option<&str> {
        self.steps.values().map(|refusal| refusal.words.as_str()).find(|words| !words.is_empty())
    }

    /// Whether all that has failed waits for the end of a pause.
    pub(super) fn are_paused(&self, now: Instant) -> bool {
        !self.other_failure && !self.steps.is_empty() && self.steps.values().all(|refusal| now < refusal.again)
    }

    /// Whether this failure of a pass is to be logged: a refusal once, others each time.
    pub(super) fn is_news(&mut self, failure: Option<&str>) -> bool {
        let Some(failure) = failure else {
            self.logged = None;
            return false;
        };
        let known = self.lasting().is_some() && !self.other_failure && self.logged.as_deref() == Some(failure);
        self.logged = Some(failure.to_owned());
        !known
    }
}

/// Whether the kernel answers the same as long as it has the same features: an unknown kind of device, family or hook
/// (`EOPNOTSUPP`, ...), an unknown expression or chain type, whose module is not there either (`ENOENT`:
/// `nft_expr_type_get`, `nf_tables_chain_type_lookup`).
fn is_lasting(error: &anyhow::Error) -> bool {
    matches!(errno(error), Some(EOPNOTSUPP | EPROTONOSUPPORT | EPFNOSUPPORT | EAFNOSUPPORT | ENOSYS | ENOENT))
}

/// What the kernel lacks that has refused a step with `error`: the words of `egretd check`.
pub(super) fn words(step: Step, error: &str) -> String {
    match step {
        Step::Tunnel | Step::TunnelEntrance if error.contains(veth_pair::REFUSED) => {
            check::lacking(Part::TunnelVeths, error)
        }
        Step::Tunnel => check::lacking(Part::Tunnel, error),
        Step::Routing if error.contains(rules::IPV6) => check::lacking(Part::RoutingIpv6, error),
        Step::Routing => check::lacking(Part::RoutingIpv4, error),
        Step::Tables | Step::TablesAhead => check::lacking(Part::Tables, error),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use egret_nft::netlink::Error;

    fn refused(errno: i32) -> Result<()> {
        Err(Error::Kernel { errno, message: String::new(), sequence: 0 }).context("nf_tables rejects the datapath")
    }

    fn lacks(_: &str) -> String {
        "netdev egress chain".to_owned()
    }

    #[test]
    fn what_the_kernel_lacks_is_lasting_and_what_passes_is_not() {
        for (errno, lasting) in [
            (nix::libc::EOPNOTSUPP, true),
            (nix::libc::ENOENT, true),
            (nix::libc::EAFNOSUPPORT, true),
            (nix::libc::EBUSY, false),
            (nix::libc::EPERM, false),
            (nix::libc::ENOMEM, false),
            (nix::libc::EINTR, false),
        ] {
            assert_eq!(is_lasting(&refused(errno).unwrap_err()), lasting, "{errno}");
        }
        assert!(!is_lasting(&anyhow!("the cluster has no Node")));
    }

    #[test]
    fn the_words_name_what_was_refused() {
        let veths = format!("{}: cannot create the devices: Unknown device type", veth_pair::REFUSED);
        for (step, error, need) in [
            (Step::Tunnel, "VXLAN 7871 from 10.0.0.1: Unknown device type", "VXLAN: "),
            (Step::Tunnel, &veths, "veth: "),
            (Step::Routing, "cannot add the IPv4 routing rule 71: not supported", "policy routing, IPv4: "),
            (Step::Routing, "cannot add the IPv6 routing rule 71: not supported", "policy routing, IPv6: "),
        ] {
            let words = words(step, error);
            assert!(words.starts_with(need) && words.contains(error), "{words}");
        }
    }

    #[test]
    fn a_lasting_refusal_backs_off_to_a_minute() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let (mut now, mut tries) = (start, Vec::new());
        while now < start + Duration::from_secs(300) {
            if refusals.paused(Step::Tables, now).is_none() {
                tries.push(now);
                refusals.note(Step::Tables, &refused(nix::libc::EOPNOTSUPP), now, lacks);
            }
            now += Duration::from_millis(75);
        }
        let quick = tries.iter().filter(|at| **at < start + QUICK).count();
        assert_eq!(quick, 40, "every pass tries at first");
        assert!(tries.len() < 55, "{} tries in five minutes", tries.len());
        let last: Vec<Duration> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(last.last().is_some_and(|pause| (60..61).contains(&pause.as_secs())), "{last:?}");
        assert_eq!(refusals.lasting(), Some("netdev egress chain"));
        assert!(refusals.are_paused(tries[tries.len() - 1]));
    }

    #[test]
    fn another_error_and_a_success_end_the_pause() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let later = start + QUICK;
        for now in [start, later] {
            refusals.note(Step::Tables, &refused(nix::libc::EOPNOTSUPP), now, lacks);
        }
        assert!(refusals.paused(Step::Tables, later).is_some());
        assert!(refusals.paused(Step::Tunnel, later).is_none());
        assert!(refusals.paused(Step::Tables, later + FIRST_PAUSE).is_none());
        refusals.note(Step::Tables, &refused(nix::libc::EBUSY), later, lacks);
        assert!(refusals.paused(Step::Tables, later).is_none());
        assert!(!refusals.are_paused(later));
        assert_eq!(refusals.lasting(), None);
        refusals.begin();
        refusals.note(Step::Tables, &Ok(()), later, lacks);
        assert!(!refusals.are_paused(later));
    }

    #[test]
    fn a_lasting_refusal_is_logged_once_and_again_when_it_changes() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        assert!(refusals.is_news(Some("not yet")) && refusals.is_news(Some("not yet")));
        for now in [start, start + QUICK] {
            refusals.note(Step::Tables, &refused(nix::libc::EOPNOTSUPP), now, lacks);
        }
        assert!(refusals.is_news(Some("refused")));
        assert!(!refusals.is_news(Some("refused")));
        assert!(refusals.is_news(Some("refused otherwise")));
        assert!(!refusals.is_news(None));
        assert!(refusals.is_news(Some("refused otherwise")));
    }
}
