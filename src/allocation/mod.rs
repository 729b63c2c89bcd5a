//! The allocations: which policy has which allocation, which address it leaves from, which node holds it.
//!
//! [`allocate`] computes it anew from what the allocations say and what policies ask for now. What was given out stays
//! as it was while it is asked for and valid; the rest is decided by age and name alone, so that two controllers
//! that see the same cluster come to the same allocations.

mod allocator;
mod close;
mod cooldown;
mod decision;
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
mod request;
mod retain;

pub use cooldown::COOLDOWN_SECONDS;
pub use decision::{Decision, Grant, Reason, Rejection};

use crate::api::EgressGatewayStatus;
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey};
use std::collections::BTreeMap;

pub(super) use family::in_words;
pub(super) use living::unreachable;

/// What [`allocate`] decided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Each gateway's status, with its allocations.
    pub gateways: BTreeMap<Name, EgressGatewayStatus>,
    /// What became of each policy.
    pub decisions: BTreeMap<PolicyKey, Decision>,
    /// When something that rests is free again, seconds since the Unix epoch: time to allocate once more.
    pub next_release: Option<i64>,
}

impl Outcome {
    /// The gateway of which a policy has its allocation; `None` if it has none.
    pub fn gateway_of(&self, policy: &PolicyKey) -> Option<&Name> {
        match self.decisions.get(policy)? {
            Decision::Granted(grant) => Some(&grant.gateway),
            Decision::Rejected(_) => None,
        }
    }
}

/// Gives each policy its allocation. `now` is in seconds since the Unix epoch.
pub fn allocate(cluster: &Cluster, now: i64) -> Outcome {
    let mut allocator = allocator::Allocator::open(cluster, now);
    retain::retain(&mut allocator);
    let refused = grant::grant(&mut allocator);
    placement::place(&mut allocator);
    close::close(allocator, &refused)
}

#[cfg(test)]
mod tests;
