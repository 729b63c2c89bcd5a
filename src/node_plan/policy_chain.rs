//! PolicyChains: the ordered list of policies that select a pod, as what is done with its packets.

use crate::api::{ExistingConnections, Fallback};
use crate::model::PolicyKey;
use crate::model::covers::Covers;
use crate::model::fnv::fnv1a;
use crate::model::marks::EgressId;
use crate::model::precedence::Ranked;
use crate::model::precedence::is_passed_over;
use crate::node_plan::allocations::NodeAllocations;
use std::net::IpAddr;
use std::sync::Arc;

/// What is done with a pod's packets to destinations outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyChain {
    /// The pod is not known yet, and a policy could select it: nothing leaves.
    Isolated,
    /// The first step that covers a destination decides; what none covers leaves as if Egret were not there.
    Steps(Vec<Step>),
}

/// What one policy does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The policy.
    pub policy: PolicyKey,
    /// Its allocation; `None` while it has none, which is as an allocation that is not ready.
    pub allocation: Option<EgressId>,
    /// What happens while the allocation is not ready.
    pub fallback: Fallback,
    /// What happens to connections that began before it.
    pub existing_connections: ExistingConnections,
    /// What it covers; empty: everything.
    pub covers: Arc<Covers>,
}

impl PolicyChain {
    /// From the policies that select a pod, the first deciding first; some are [passed over](is_passed_over). What comes
    /// after a policy that covers everything is left out. `None` if no policy selects the pod. One with a policy that lists
    /// too much is held, and one of which it is not known which policy decides, for one of several cannot be read.
    pub fn new(policies: &[&Ranked], allocations: &NodeAllocations) -> Option<Self> {
        let mut steps = Vec::new();
        let with_allocation = policies.iter().map(|ranked| (*ranked, allocations.of(&ranked.key, &ranked.policy)));
        let in_force =
            with_allocation.filter(|(ranked, allocation)| !is_passed_over(&ranked.policy, allocation.is_some()));
        let policies: Vec<_> = in_force.collect();
        if policies.len() > 1 && policies.iter().any(|(ranked, _)| ranked.policy.guessed.rank) {
            return Some(PolicyChain::Isolated);
        }
        for (at, (Ranked { key, policy, over_quota }, allocation)) in policies.iter().enumerate() {
            if *over_quota || policy.guessed.egress && at + 1 < policies.len() {
                return Some(PolicyChain::Isolated);
            }
            let all = policy.covers_everything();
            let covers = match &policy.egress {
                Some(rules) if !all => rules.clone(),
                _ => Arc::default(),
            };
            // `egress: []` covers nothing.
            if all || !covers.is_empty() {
                let (fallback, existing_connections) = (policy.fallback, policy.existing_connections);
                steps.push(Step {
                    policy: key.clone(),
                    allocation: *allocation,
                    fallback,
                    existing_connections,
                    covers,
                });
            }
            if all {
                break;
            }
        }
        (!steps.is_empty()).then_some(PolicyChain::Steps(steps))
    }

    /// A name that stays as long as the list of policies does: FNV-1a of their names.
    pub fn name(&self) -> Arc<str> {
        let PolicyChain::Steps(steps) = self else { return "policy-held".into() };
        let names: String = steps.iter().map(|step| format!("{}\0", step.policy)).collect();
        format!("policy-{:016x}", fnv1a(names.bytes())).into()
    }

    /// Its steps; one that is held has none.
    pub fn steps(&self) -> &[Step] {
        match self {
            PolicyChain::Isolated => &[],
            PolicyChain::Steps(steps) => steps,
        }
    }

    /// The step that decides for packets to this address, which is outside the cluster, of this IP protocol and to this
    /// port, if they have ports.
    pub fn step_for(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> Option<&Step> {
        self.steps().iter().find(|step| step.covers.has(address, protocol, port))
    }

    /// The allocations that its packets can take.
    pub fn allocations(&self) -> impl Iterator<Item = EgressId> {
        self.steps().iter().filter_map(|s| s.allocation)
    }
}

impl Step {
    /// Whether it covers every destination outside the cluster.
    pub fn covers_everything(&self) -> bool {
        self.covers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::selector;
    use crate::model::destination::{Destination, Ports};
    use crate::model::{Guessed, Metadata};
    use crate::node_plan::{NodePlan, PodPlan, View, chain_name};

    fn policy(name: &str, ports: u16) -> Ranked {
        let spec = crate::api::EgressPolicySpec { pod_selector: Some(selector(&[])), ..Default::default() };
        let mut policy = crate::model::Policy::namespaced("a", &spec, Metadata::default()).unwrap();
        let port = |first| Ports { protocol: crate::api::Protocol::Tcp, first, last: first };
        let covers = Destination { networks: Box::default(), ports: (1..=ports).map(port).collect() };
        policy.egress = Some(Arc::new(vec![covers].into()));
        Ranked { key: PolicyKey::from(format!("a/{name}").as_str()), policy: Arc::new(policy), over_quota: false }
    }

    #[test]
    fn a_pod_with_a_policy_over_its_namespaces_quota_is_held() {
        let mut all = ["p", "q", "r", "s", "t"].map(|name| policy(name, 1_000));
        let policy_chain =
            |all: &[Ranked]| PolicyChain::new(&all.iter().collect::<Vec<_>>(), &NodeAllocations::default());
        assert!(matches!(policy_chain(&all), Some(PolicyChain::Steps(steps)) if steps.len() == 5));
        all[4].over_quota = true;
        assert_eq!(policy_chain(&all), Some(PolicyChain::Isolated));
    }

    #[test]
    fn a_pod_of_which_nobody_knows_which_policy_decides_is_held() {
        let guess = |rank, egress| {
            let mut guess = policy("guess", 1);
            Arc::make_mut(&mut guess.policy).guessed = Guessed { rank, egress };
            guess
        };
        let (other, allocations) = (policy("other", 1), NodeAllocations::default());
        let is_held = |all: &[&Ranked]| PolicyChain::new(all, &allocations) == Some(PolicyChain::Isolated);
        // Alone it decides, whatever it said.
        assert!(!is_held(&[&guess(true, true)]));
        assert!(is_held(&[&guess(true, false), &other]) && is_held(&[&other, &guess(true, false)]));
        assert!(is_held(&[&guess(false, true), &other]) && !is_held(&[&other, &guess(false, true)]));
        assert!(!is_held(&[&guess(false, false), &other]));
    }

    #[test]
    fn a_policy_chain_is_not_another_one_for_its_name() {
        let allocations = NodeAllocations::default();
        let [one, other] = ["p", "q"].map(|name| PolicyChain::new(&[&policy(name, 1)], &allocations).unwrap());
        let mut plan = NodePlan::default();
        for (pod_mark, policy_chain) in [(1, &one), (2, &one), (3, &other)] {
            let interface_index = u32::from(pod_mark);
            let pod = PodPlan {
                interface: "v".into(),
                interface_index,
                addresses: vec![],
                pod_mark,
                policy_chain: one.name(),
            };
            plan.add(&View::default(), chain_name(pod_mark, interface_index), pod.into(), policy_chain.clone().into());
        }
        let policy_chains: Vec<&PolicyChain> =
            plan.pods.values().map(|pod| &*plan.policy_chains[&pod.policy_chain]).collect();
        assert_eq!(policy_chains, [&one, &one, &PolicyChain::Isolated]);
    }
}
