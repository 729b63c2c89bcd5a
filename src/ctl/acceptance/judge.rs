//! What follows from the answers that pods had. Nothing here asks anybody.

use crate::api::AddressPair;
use crate::probe::{ProbeMethod, ProbeRecord};
use std::fmt;
use std::net::IpAddr;

/// A lost first packet of a TCP connection is sent again after one second (RFC 6298, 2.1).
const SENT_AGAIN: u64 = 1000;
/// So many answers in a row show that a change has arrived.
const SETTLED: usize = 3;

/// Any network loses one packet in so many.
const LOST_OF: usize = 100;

/// What one pod was told.
#[derive(Clone, Debug, Default)]
pub struct PodAnswers {
    /// Its node.
    pub node: String,
    /// The answers, in their order.
    pub answers: Vec<ProbeRecord>,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// How they are asked.
    pub method: ProbeMethod,
    /// Whether over IPv6.
    pub ipv6: bool,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", if self.ipv6 { "IPv6" } else { "IPv4" }, self.method)
    }
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The server saw another address.
    Elsewhere {
        /// The pod's node.
        node: String,
        /// Which requests.
        series: Series,
        /// The address.
        saw: IpAddr,
        /// Whether later answers were right.
        right_later: bool,
    },
    /// A request had no answer.
    NoAnswer {
        /// The pod's node.
        node: String,
        /// Which requests.
        series: Series,
        /// The error.
        error: String,
        /// Whether later answers were right.
        right_later: bool,
    },
    /// The first packet of a connection was lost.
    Slow {
        /// The pod's node.
        node: String,
        /// How long the answer took, milliseconds.
        took: u64,
    },
    /// A connection ended that should have lived on.
    Ended {
        /// The pod's node.
        node: String,
        /// The error.
        error: String,
    },
}

impl Fault {
    /// The node of the pod.
    pub fn node(&self) -> &str {
        match self {
            Fault::Elsewhere { node, .. }
            | Fault::NoAnswer { node, .. }
            | Fault::Slow { node, .. }
            | Fault::Ended { node, .. } => node,
        }
    }

    /// A sentence; `name` says what an address is.
    pub fn told(&self, name: impl Fn(IpAddr) -> String) -> String {
        match self {
            Fault::Elsewhere { node, series, saw, right_later } => {
                let later = if *right_later { "; later packets have the right one" } else { "" };
                format!("a pod on {node} was seen with {}{later} ({series})", name(*saw))
            }
            Fault::NoAnswer { node, series, error, right_later: false } => {
                format!("a pod on {node} has no answer ({series}: {error})")
            }
            Fault::NoAnswer { node, series, error, right_later: true } => {
                format!("the first packets of a pod on {node} had no answer, later ones had ({series}: {error})")
            }
            Fault::Slow { node, took } => {
                format!(
                    "the first answer to a pod on {node} took {took} ms: the first packet was lost, or the machine is slow"
                )
            }
            Fault::Ended { node, error } => format!("an open connection of a pod on {node} ended ({error})"),
        }
    }
}

/// The address of a family.
pub fn of_family(pair: &AddressPair, ipv6: bool) -> Option<IpAddr> {
    if ipv6 { pair.ipv6.map(IpAddr::from) } else { pair.ipv4.map(IpAddr::from) }
}

impl PodAnswers {
    /// The answers of one series.
    pub fn of(&self, series: Series) -> impl DoubleEndedIterator<Item = &ProbeRecord> {
        self.answers.iter().filter(move |answer| answer.method == series.method && answer.ipv6 == series.ipv6)
    }

    /// Whether each series has so many requests behind it.
    pub fn has_asked(&self, series: &[Series], times: usize) -> bool {
        series.iter().all(|series| self.of(*series).count() >= times)
    }
}

/// New pods: the first request of each series is answered, and the server sees the egress IP from then on. Also returns
/// the slowest first answer, milliseconds.
pub fn new_pods(heard: &[PodAnswers], series: &[Series], egress: &AddressPair) -> (Vec<Fault>, u64) {
    let (mut faults, mut slowest) = (Vec::new(), 0);
    for pod in heard {
        for &series in series {
            let wanted = of_family(egress, series.ipv6);
            let right = pod.of(series).filter(|answer| answer.saw.is_some() && answer.saw == wanted).count() > 0;
            faults.extend(elsewhere(pod, series, &[wanted], right));
            let Some(first) = pod.of(series).next() else { continue };
            slowest = slowest.max(first.took);
            if let Some(error) = &first.error {
                let (node, error) = (pod.node.clone(), error.clone());
                faults.push(Fault::NoAnswer { node, series, error, right_later: right });
            } else if series.method == ProbeMethod::Tcp
                && first.took >= SENT_AGAIN
                && first.resent > 0
                && first.saw == wanted
            {
                faults.push(Fault::Slow { node: pod.node.clone(), took: first.took });
            }
        }
    }
    faults.sort_by_key(rank);
    (faults, slowest)
}

/// Running pods: the server sees no address but these. With `held`, open connections live on.
pub fn running_pods(heard: &[PodAnswers], series: &[Series], allowed: &[AddressPair], held: bool) -> Vec<Fault> {
    let mut faults = Vec::new();
    for pod in heard {
        for &series in series {
            let wanted: Vec<Option<IpAddr>> = allowed.iter().map(|pair| of_family(pair, series.ipv6)).collect();
            faults.extend(elsewhere(pod, series, &wanted, false));
            let error = pod.of(series).find_map(|answer| answer.error.clone());
            if let Some(error) = error.filter(|_| held && series.method == ProbeMethod::Held) {
                faults.push(Fault::Ended { node: pod.node.clone(), error });
            }
        }
    }
    faults.sort_by_key(rank);
    faults
}

/// Pods whose policy has no gateway node: nothing arrives.
pub fn blocked_pods(heard: &[PodAnswers], series: &[Series]) -> Vec<Fault> {
    let each = heard.iter().flat_map(|pod| series.iter().filter_map(|series| elsewhere(pod, *series, &[], false)));
    each.collect()
}

/// Pods that no policy selects: never an egress IP, and answers, but for what any network loses.
pub fn unselected_pods(heard: &[PodAnswers], series: &[Series], egress: &[AddressPair]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for pod in heard {
        for &series in series {
            let node = pod.node.clone();
            let is_egress = |ip: IpAddr| egress.iter().any(|pair| of_family(pair, series.ipv6) == Some(ip));
            if let Some(saw) = pod.of(series).filter_map(|answer| answer.saw).find(|ip| is_egress(*ip)) {
                faults.push(Fault::Elsewhere { node, series, saw, right_later: false });
                continue;
            }
            let (all, lost) = (pod.of(series).count(), pod.of(series).filter(|answer| answer.error.is_some()).count());
            let error = pod.of(series).find_map(|answer| answer.error.clone());
            if let Some(error) = error.filter(|_| lost > 1 && lost * LOST_OF > all) {
                let right_later = pod.of(series).next_back().is_some_and(|answer| answer.saw.is_some());
                faults.push(Fault::NoAnswer { node, series, error, right_later });
            }
        }
    }
    faults.sort_by_key(rank);
    faults
}

fn elsewhere(pod: &PodAnswers, series: Series, allowed: &[Option<IpAddr>], right: bool) -> Option<Fault> {
    let saw = pod.of(series).filter_map(|answer| answer.saw).find(|saw| !allowed.contains(&Some(*saw)))?;
    let last = pod.of(series).rev().find_map(|answer| answer.saw);
    let right_later = right && allowed.contains(&last);
    Some(Fault::Elsewhere { node: pod.node.clone(), series, saw, right_later })
}

/// A wrong address is the worst, then no answer.
fn rank(fault: &Fault) -> u8 {
    match fault {
        Fault::Elsewhere { .. } => 0,
        Fault::NoAnswer { right_later: false, .. } => 1,
        Fault::Ended { .. } => 2,
        Fault::NoAnswer { .. } => 3,
        Fault::Slow { .. } => 4,
    }
}

/// Whether the last answers of all pods are right: `is_right` gets the address and the family.
pub fn have_settled(heard: &[PodAnswers], series: &[Series], is_right: impl Fn(IpAddr, bool) -> bool) -> bool {
    heard.iter().all(|pod| {
        series.iter().all(|series| {
            let last: Vec<&ProbeRecord> = pod.of(*series).rev().take(SETTLED).collect();
            last.len() == SETTLED && last.iter().all(|a| a.saw.is_some_and(|ip| is_right(ip, series.ipv6)))
        })
    })
}

/// What has not settled: the last answer that is wrong, or missing.
pub fn unsettled(heard: &[PodAnswers], series: &[Series], is_right: impl Fn(IpAddr, bool) -> bool) -> Option<Fault> {
    let faults = heard.iter().flat_map(|pod| {
        series.iter().filter_map(|series| {
            let last = pod.of(*series).next_back();
            let (node, series) = (pod.node.clone(), *series);
            match last.and_then(|answer| answer.saw) {
                Some(saw) if is_right(saw, series.ipv6) => None,
                Some(saw) => Some(Fault::Elsewhere { node, series, saw, right_later: false }),
                None => {
                    let error = last.map_or_else(
                        || "the pod says nothing".to_owned(),
                        |answer| answer.error.clone().unwrap_or_default(),
                    );
                    Some(Fault::NoAnswer { node, series, error, right_later: false })
                }
            }
        })
    });
    faults.min_by_key(rank)
}

/// The longest time between two answers of one series, milliseconds.
pub fn longest_pause(heard: &[PodAnswers], series: &[Series]) -> u64 {
    let of = |pod: &PodAnswers, series: Series| {
        let times: Vec<u64> = pod.of(series).filter(|a| a.saw.is_some()).map(|a| a.at + a.took).collect();
        times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max().unwrap_or(0)
    };
    heard.iter().flat_map(|pod| series.iter().map(move |series| of(pod, *series))).max().unwrap_or(0)
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
