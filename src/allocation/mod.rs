//! The ledger: which policy has which path, which address it leaves from, which node holds it.
//!
//! [`allocate`] computes it anew from what the ledger says and what policies ask for now. What was given out stays
//! as it was while it is asked for and valid; the rest is decided by age and name alone, so that two controllers
//! that see the same cluster come to the same ledger.

mod book;
mod close;
mod demand;
mod family;
mod grant;
mod ids;
mod living;
mod moves;
mod placement;
mod pool;
mod quota;
mod rebalance;
pub mod report;
mod resting;
mod retain;
mod verdict;

pub use resting::REST_SECONDS;
pub use verdict::{Grant, Reason, Refusal, Verdict};

use crate::api::EgressGatewayStatus;
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey};
use std::collections::BTreeMap;

pub(super) use family::in_words;
pub(super) use living::silent;

/// What [`allocate`] decided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Each gateway's status, with its ledger.
    pub gateways: BTreeMap<Name, EgressGatewayStatus>,
    /// What became of each policy.
    pub verdicts: BTreeMap<PolicyKey, Verdict>,
    /// When something that rests is free again, seconds since the Unix epoch: time to allocate once more.
    pub next_release: Option<i64>,
}

impl Outcome {
    /// The gateway of which a policy has its path; `None` if it has none.
    pub fn gateway_of(&self, policy: &PolicyKey) -> Option<&Name> {
        match self.verdicts.get(policy)? {
            Verdict::Granted(grant) => Some(&grant.gateway),
            Verdict::Refused(_) => None,
        }
    }
}

/// Gives each policy its path. `now` is in seconds since the Unix epoch.
pub fn allocate(cluster: &Cluster, now: i64) -> Outcome {
    let mut book = book::Book::open(cluster, now);
    retain::retain(&mut book);
    let refused = grant::grant(&mut book);
    placement::place(&mut book);
    close::close(book, &refused)
}

#[cfg(test)]
mod tests;
