//! Policies that begin for pods that run already.
//!
//! A new egress IP takes a moment: the controller gives it out, a node takes it and says so. A pod that is being started
//! waits for that; one that runs would stand still, and its new connections wait for the second after which TCP sends
//! a SYN again. So it goes on as before until the egress IP is there, and not longer than [`GRACE`]. That is so only if
//! nothing else has changed for the pod: where a policy takes another one's place, nothing may leave as if there were
//! none.

use crate::model::precedence::Ranked;
use crate::model::selector::Labels;
use crate::node_plan::View;
use crate::node_plan::policy_chain::PolicyChain;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a policy that begins leaves a pod as it was, while its egress IP is not there yet.
const GRACE: Duration = Duration::from_secs(1);
/// A pod that has been open for less than this is a new one: its policy may have been there before it, and its node may
/// have heard of it later.
const RUNNING: Duration = Duration::from_secs(5);

/// The policies that hold one pod, and those that have just begun.
#[derive(Debug, Default)]
pub struct Beginning {
    /// Those that selected it when it was judged last, and are in force.
    in_force: Box<[Ranked]>,
    /// Since when it has not been held.
    open: Option<Instant>,
    /// When those that wait for their egress IPs are in force, come what may.
    until: Option<Instant>,
}

impl Beginning {
    /// What holds the pod now; `labels` as for [`View::policy chain`].
    pub fn policy_chain(
        &mut self,
        view: &View,
        namespace: &str,
        labels: Option<&Labels>,
        now: Instant,
    ) -> Option<PolicyChain> {
        let policy_chain = view.policy_chain(namespace, labels);
        if policy_chain == Some(PolicyChain::Isolated) {
            *self = Beginning::default();
            return policy_chain;
        }
        let policies = labels.map(|labels| view.policies.policies_for(namespace, labels)).unwrap_or_default();
        let open = *self.open.get_or_insert(now);
        let before = std::mem::take(&mut self.in_force);
        let was_open = now >= open + RUNNING;
        let is_same = |a: &Ranked, b: &Ranked| Arc::ptr_eq(&a.policy, &b.policy) || a.policy == b.policy;
        let stays = |old: &Ranked| policies.iter().any(|now| now.key == old.key && is_same(now, old));
        let mut waiting = BTreeSet::new();
        if was_open && before.iter().all(stays) && self.until.is_none_or(|until| now < until) {
            let new = policies.iter().map(|now| &now.key).filter(|key| before.iter().all(|old| old.key != **key));
            waiting.extend(new.filter(|key| !view.allocations.is_placed(key)).cloned());
        }
        self.in_force = policies.iter().filter(|now| !waiting.contains(&now.key)).map(|now| (*now).clone()).collect();
        self.until = (!waiting.is_empty()).then(|| self.until.unwrap_or(now + GRACE));
        if waiting.is_empty() { policy_chain } else { view.policy_chain_without(namespace, labels?, &waiting) }
    }

    /// When the pod is to be judged again, if nothing else happens.
    pub fn next(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests;
