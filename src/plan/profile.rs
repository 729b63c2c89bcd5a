//! Profiles: the ordered list of policies that select a pod, as what is done with its packets.

use super::destination::Destination;
use super::marks::PathId;
use super::model::PolicyKey;
use super::paths::Paths;
use super::precedence::Ranked;
use crate::api::Fallback;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is done with a pod's packets to destinations outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// The pod is not known yet, and a policy could select it: nothing leaves.
    Held,
    /// The first step that covers a destination decides; what none covers leaves as if Egret were not there.
    Steps(Vec<Step>),
}

/// What one policy does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The policy.
    pub policy: PolicyKey,
    /// Its path; `None` while it has none, which is as a path that is not ready.
    pub path: Option<PathId>,
    /// What happens while the path is not ready.
    pub fallback: Fallback,
    /// What it covers; empty: everything.
    pub covers: Arc<[Destination]>,
}

impl Profile {
    /// From the policies that select a pod, the first deciding first. What comes after a policy that covers
    /// everything is left out. `None` if no policy selects the pod.
    pub fn new(policies: &[&Ranked], paths: &Paths) -> Option<Self> {
        let mut steps = Vec::new();
        for Ranked { key, policy } in policies {
            let all = policy.covers_everything();
            let covers = match &policy.egress {
                Some(rules) if !all => rules.clone(),
                _ => Arc::default(),
            };
            // `egress: []` covers nothing.
            if all || !covers.is_empty() {
                let path = paths.of_policy(key);
                steps.push(Step { policy: key.clone(), path, fallback: policy.fallback, covers });
            }
            if all {
                break;
            }
        }
        (!steps.is_empty()).then_some(Profile::Steps(steps))
    }

    /// A name that stays as long as the list of policies does: FNV-1a of their names.
    pub fn name(&self) -> String {
        let Profile::Steps(steps) = self else { return "profile-held".into() };
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for step in steps {
            for byte in step.policy.to_string().bytes().chain([0]) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        format!("profile-{hash:016x}")
    }

    /// The paths that its packets can take.
    pub fn paths(&self) -> BTreeSet<PathId> {
        match self {
            Profile::Held => BTreeSet::new(),
            Profile::Steps(steps) => steps.iter().filter_map(|s| s.path).collect(),
        }
    }
}

impl Step {
    /// Whether it covers every destination outside the cluster.
    pub fn covers_everything(&self) -> bool {
        self.covers.is_empty()
    }
}
