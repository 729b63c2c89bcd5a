//! What policies' statuses say about the treatment of their egress IPs' packets.

use crate::allocation::{AllocationResult, Decision};
use crate::model::bandwidth::Bandwidth;
use crate::model::{Cluster, Policy, PolicyKey, treatment};
use std::collections::HashMap;
use std::fmt::Display;

/// What holds for one egress IP, with the policies that give it.
#[derive(Clone, Copy, Default)]
pub(super) struct Treatment<'a> {
    dscp: Option<(u8, &'a PolicyKey)>,
    bandwidth: Option<(Bandwidth, &'a PolicyKey)>,
}

/// The treatments of egress IPs by id.
pub(super) fn treatments<'a>(cluster: &'a Cluster, outcome: &AllocationResult) -> HashMap<u16, Treatment<'a>> {
    let mut users: HashMap<u16, Vec<(&PolicyKey, &Policy)>> = HashMap::new();
    if cluster.policies.values().all(|policy| policy.dscp.is_none() && policy.bandwidth.is_none()) {
        return HashMap::new();
    }
    for (key, policy) in &cluster.policies {
        if let Some(Decision::Granted(grants)) = outcome.decisions.get(key) {
            grants.iter().for_each(|grant| users.entry(grant.id).or_default().push((key, policy)));
        }
    }
    let of = |users: Vec<(&'a PolicyKey, &'a Policy)>| Treatment {
        dscp: treatment::dscp(users.iter().copied()),
        bandwidth: treatment::bandwidth(users.iter().copied()),
    };
    users.into_iter().map(|(id, users)| (id, of(users))).collect()
}

impl Treatment<'_> {
    /// What the status of one of its policies says.
    pub(super) fn text(&self, key: &PolicyKey, policy: &Policy) -> String {
        text(key, "DSCP", self.dscp, policy.dscp) + &text(key, "a bandwidth of", self.bandwidth, policy.bandwidth)
    }
}

/// `given` is what holds, and the policy that gives it; `own` is what this policy gives.
fn text<T: Display + PartialEq>(key: &PolicyKey, what: &str, given: Option<(T, &PolicyKey)>, own: Option<T>) -> String {
    match (given, own) {
        (None, None) => String::new(),
        (None, Some(own)) => format!(
            "; its packets do not have {what} {own}, because policies of several namespaces have its egress IP: ask for an \
             egress IP of its own, or for a ClusterEgressPolicy with it"
        ),
        (Some((given, of)), own) if of == key || own.as_ref() == Some(&given) => {
            format!("; its packets have {what} {given}")
        }
        (Some((given, of)), Some(own)) => {
            format!(
                "; its packets have {what} {given} and not {own}, because {of} has the same egress IP and goes first"
            )
        }
        (Some((given, of)), None) => format!("; its packets have {what} {given} by {of}, which has the same egress IP"),
    }
}
