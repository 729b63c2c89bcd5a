//! The delay with which a new policy takes effect on a running pod.
//!
//! A new egress IP is not usable at once: the controller allocates it, and a node takes it and reports that. A pod
//! that is being started waits for it. A running pod would be blocked, and its new connections would wait for TCP to
//! repeat the SYN after a second. So a running pod keeps its policies until the egress IP is usable, at most for
//! [`GRACE`], and only if nothing else has changed for it: where a policy replaces another one, the pod must not
//! leave as if there were none.

use crate::model::Client;
use crate::model::precedence::Ranked;
use crate::node_plan::View;
use crate::node_plan::policy_chain::PolicyChain;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The longest time that a new policy is delayed while its egress IP is not usable.
const GRACE: Duration = Duration::from_secs(1);
/// A pod that has been known for less than this is a new one. Its policy may be older than the pod, and may have
/// reached this node later.
const RUNNING: Duration = Duration::from_secs(5);

/// The policies in force for one pod, and the delay of new ones.
#[derive(Debug, Default)]
pub struct PolicyDelay {
    /// The policies in force when the pod was last evaluated.
    in_force: Box<[Ranked]>,
    /// Since when the pod has not been isolated.
    open: Option<Instant>,
    /// When the delayed policies are in force at the latest.
    until: Option<Instant>,
}

impl PolicyDelay {
    /// The pod's policy chain without the policies that are delayed.
    pub fn policy_chain(&mut self, view: &View, pod: Client<'_>, now: Instant) -> Option<PolicyChain> {
        let policy_chain = view.policy_chain(pod);
        if policy_chain == Some(PolicyChain::Isolated) {
            *self = PolicyDelay::default();
            return policy_chain;
        }
        let policies = pod.labels.map(|labels| view.policies.policies_for(pod.namespace, labels)).unwrap_or_default();
        let open = *self.open.get_or_insert(now);
        let before = std::mem::take(&mut self.in_force);
        let was_open = now >= open + RUNNING;
        let is_same = |a: &Ranked, b: &Ranked| Arc::ptr_eq(&a.policy, &b.policy) || a.policy == b.policy;
        let stays = |old: &Ranked| policies.iter().any(|now| now.key == old.key && is_same(now, old));
        let mut waiting = BTreeSet::new();
        if was_open && before.iter().all(stays) && self.until.is_none_or(|until| now < until) {
            // One with `action: Direct` waits for nothing.
            let new = policies.iter().filter(|now| !now.policy.is_direct()).map(|now| &now.key);
            let new = new.filter(|key| before.iter().all(|old| old.key != **key));
            waiting.extend(new.filter(|key| !view.allocations.is_held(key)).cloned());
        }
        self.in_force = policies.iter().filter(|now| !waiting.contains(&now.key)).map(|now| (*now).clone()).collect();
        self.until = (!waiting.is_empty()).then(|| self.until.unwrap_or(now + GRACE));
        if waiting.is_empty() { policy_chain } else { view.policy_chain_without(pod, &waiting) }
    }

    /// When the pod is to be evaluated again.
    pub fn next(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests;
