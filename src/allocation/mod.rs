//! The allocator: which policy gets which egress IP, and which node holds it.
//!
//! [`allocate`] computes all allocations from the existing ones and from what policies request now. An existing
//! allocation stays as it is while it is requested and valid. Everything else is decided by age and name alone, so
//! that two controllers that see the same cluster compute the same allocations.

mod address_pair;
mod allocator;
mod close;
mod cooldown;
mod decision;
mod grant;
mod ids;
mod index;
mod living;
mod load;
mod moves;
mod placement;
mod pool;
mod probes;
mod quota;
mod rebalance;
pub mod report;
mod request;
mod retain;
mod room;
mod services;
mod unreached;
mod versions;

pub use cooldown::COOLDOWN_SECONDS;
pub use decision::{Decision, Grant, Grants, Reason, Rejection};

use crate::api::EgressGatewayStatus;
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey};
use std::collections::BTreeMap;

pub use living::unreachable;

pub(super) use address_pair::in_words;

/// The result of [`allocate`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AllocationResult {
    /// The new status of each gateway, with its allocations.
    pub gateways: BTreeMap<Name, EgressGatewayStatus>,
    /// The decision for each policy.
    pub decisions: BTreeMap<PolicyKey, Decision>,
    /// When the next cooldown ends, seconds since the Unix epoch: the time to allocate again.
    pub next_release: Option<i64>,
    /// When nodes' reports are to be looked at again, seconds since the Unix epoch.
    pub next_reports: Option<i64>,
}

impl AllocationResult {
    /// The gateway of a policy's allocations; `None` if the policy has none.
    pub fn gateway_of(&self, policy: &PolicyKey) -> Option<&Name> {
        match self.decisions.get(policy)? {
            Decision::Granted(grants) => Some(&grants.first.gateway),
            Decision::Rejected(_) | Decision::Direct => None,
        }
    }
}

/// Computes all allocations. `now` is in seconds since the Unix epoch.
pub fn allocate(cluster: &Cluster, now: i64) -> AllocationResult {
    let mut allocator = allocator::Allocator::open(cluster, now);
    retain::retain(&mut allocator);
    let rejections = grant::grant(&mut allocator);
    placement::place(&mut allocator);
    close::close(allocator, &rejections)
}

#[cfg(test)]
mod tests;
