//! Policy chains: the ordered policies that select a pod, as steps.

use crate::api::{ExistingConnections, Fallback};
use crate::model::covers::Covers;
use crate::model::fnv::fnv1a;
use crate::model::marks::EgressId;
use crate::model::precedence::{Ranked, passed_over};
use crate::model::spread::Division;
use crate::model::{Client, PolicyKey};
use crate::node_plan::allocations::NodeAllocations;
use std::net::IpAddr;
use std::sync::Arc;

/// What happens to packets of a pod to destinations outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyChain {
    /// The pod's policies are not known yet, or exceed a limit: nothing leaves the cluster.
    Isolated,
    /// The first step that covers the destination decides. A packet that no step covers leaves as if Egret were not
    /// there.
    Steps(Vec<PolicyStep>),
}

/// What one policy does with packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyStep {
    /// The policy.
    pub policy: PolicyKey,
    /// Where covered packets go.
    pub action: PolicyAction,
    /// The other allocations of the policy, if it has several: the pod does not use them, but its connections that have
    /// one of them keep it.
    pub others: Box<[EgressId]>,
    /// With `spread: Connection`: the allocations among which new connections have one each, by their hash, at least two.
    /// Otherwise none.
    pub by_connection: Box<[EgressId]>,
    /// What happens to connections that began before the policy.
    pub existing_connections: ExistingConnections,
    /// The covered destinations; empty: all.
    pub covers: Arc<Covers>,
}

/// Where the packets that a policy covers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// They leave as if Egret were not there.
    Direct,
    /// They leave from an egress IP.
    EgressIp {
        /// The allocation; `None` while the policy has none. It is then treated as one that is not ready.
        allocation: Option<EgressId>,
        /// What happens to packets while the egress IP is not ready.
        fallback: Fallback,
    },
}

impl PolicyChain {
    /// Makes the policy chain of a pod from the policies that select it, in order of precedence; `None` if no policy
    /// gives it an egress IP. Policies may be [passed over](passed_over). Those after one that covers everything are
    /// left out.
    ///
    /// The pod is isolated if one of the policies exceeds the limit of its namespace, or if one cannot be read and it
    /// is therefore unknown which policy decides.
    pub fn new(policies: &[&Ranked], allocations: &NodeAllocations, pod: Client<'_>) -> Option<Self> {
        let mut steps = Vec::new();
        let with_choices = policies.iter().map(|ranked| (*ranked, allocations.of(&ranked.key, &ranked.policy)));
        let in_force =
            with_choices.filter(|(ranked, choices)| passed_over(ranked, policies, !choices.is_empty()).is_none());
        let policies: Vec<_> = in_force.collect();
        if policies.len() > 1 && policies.iter().any(|(ranked, _)| ranked.policy.guessed.rank) {
            return Some(PolicyChain::Isolated);
        }
        for (at, (Ranked { key, policy, over_quota }, choices)) in policies.iter().enumerate() {
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
                let division = Division::from(&**policy);
                let (allocation, by_connection) = (division.one(choices, pod), division.by_connection(choices));
                let action = match policy.is_direct() {
                    true => PolicyAction::Direct,
                    false => PolicyAction::EgressIp { allocation, fallback: policy.fallback },
                };
                let others =
                    choices.iter().map(|choice| choice.of).filter(|other| Some(*other) != allocation).collect();
                // The rule by hash leads to an egress IP or drops. While none is ready, the rules after it fall back.
                let falls_back =
                    policy.fallback == Fallback::NodeAddress && !choices.iter().any(|choice| choice.state.is_ready);
                let chooses = by_connection.len() > 1 && !falls_back;
                let by_connection = if chooses { by_connection.into() } else { Box::default() };
                let existing_connections = policy.existing_connections;
                steps.push(PolicyStep {
                    policy: key.clone(),
                    action,
                    others,
                    by_connection,
                    existing_connections,
                    covers,
                });
            }
            if all {
                break;
            }
        }
        // A pod that only direct policies select is left alone.
        steps.iter().any(|step| step.action != PolicyAction::Direct).then_some(PolicyChain::Steps(steps))
    }

    /// The name: FNV-1a of the policies' names, so it stays as long as the list of policies does. Of policies with several
    /// egress IPs, the pod's one is part of it.
    pub fn name(&self) -> Arc<str> {
        let PolicyChain::Steps(steps) = self else { return "policy-isolated".into() };
        let chosen = |step: &PolicyStep| match step.others.is_empty() || !step.by_connection.is_empty() {
            true => String::new(),
            false => format!("{}\0", step.allocation().unwrap_or_default()),
        };
        let names: String = steps.iter().map(|step| format!("{}\0{}", step.policy, chosen(step))).collect();
        format!("policy-{:016x}", fnv1a(names.bytes())).into()
    }

    /// The steps; none for an isolated pod.
    pub fn steps(&self) -> &[PolicyStep] {
        match self {
            PolicyChain::Isolated => &[],
            PolicyChain::Steps(steps) => steps,
        }
    }

    /// The step that decides for packets to `address`, outside the cluster, of the IP protocol `protocol` and to
    /// `port` (if they have ports).
    pub fn step_for(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> Option<&PolicyStep> {
        self.steps().iter().find(|step| step.covers.has(address, protocol, port))
    }

    /// The same where the kernel cannot choose by a connection's hash: each connection has the first allocation.
    pub fn without_hash(&self) -> Self {
        let mut other = self.clone();
        if let PolicyChain::Steps(steps) = &mut other {
            steps.iter_mut().for_each(|step| step.by_connection = Box::default());
        }
        other
    }

    /// Whether the kernel has to choose by a connection's hash.
    pub fn needs_hash(&self) -> bool {
        self.steps().iter().any(|step| !step.by_connection.is_empty())
    }

    /// The allocations that its packets may use.
    pub fn allocations(&self) -> impl Iterator<Item = EgressId> {
        self.steps().iter().flat_map(|step| step.allocation().into_iter().chain(step.others.iter().copied()))
    }
}

impl PolicyStep {
    /// The allocation of its policy that new connections use.
    pub fn allocation(&self) -> Option<EgressId> {
        match self.action {
            PolicyAction::Direct => None,
            PolicyAction::EgressIp { allocation, .. } => allocation,
        }
    }

    /// Whether its packets leave from the node's address while the egress IP is not ready.
    pub fn falls_back(&self) -> bool {
        matches!(self.action, PolicyAction::EgressIp { fallback: Fallback::NodeAddress, .. })
    }

    /// Whether the step covers every destination outside the cluster.
    pub fn covers_everything(&self) -> bool {
        self.covers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{CLIENT, selector};
    use crate::model::destination::{Destination, Ports};
    use crate::model::{Guessed, Metadata};
    use crate::node_plan::{NodePlan, PodPlan, View, chain_name};

    fn policy(name: &str, ports: u16) -> Ranked {
        let spec = crate::api::EgressPolicySpec { pod_selector: Some(selector(&[])), ..Default::default() };
        let mut policy = crate::model::Policy::namespaced("a", &spec, Metadata::default()).unwrap();
        let port = |first| Ports { protocol: crate::api::Protocol::Tcp, first, last: first };
        // Neighbours would be one entry.
        let covers = Destination { networks: Box::default(), ports: (1..=ports).map(|n| port(2 * n)).collect() };
        policy.egress = Some(Arc::new(vec![covers].into()));
        Ranked { key: PolicyKey::from(format!("a/{name}").as_str()), policy: Arc::new(policy), over_quota: false }
    }

    /// Adds a pod whose policy chain has this name.
    fn add_pod(plan: &mut NodePlan, pod_mark: u16, name: Arc<str>, policy_chain: PolicyChain) {
        let interface_index = u32::from(pod_mark);
        let pod = PodPlan { interface: "v".into(), interface_index, addresses: vec![], pod_mark, policy_chain: name };
        plan.add(&View::default(), chain_name(pod_mark, interface_index), pod.into(), policy_chain.into());
    }

    #[test]
    fn a_policy_over_the_limit_of_its_namespace_isolates_its_pods() {
        let mut all = ["p", "q", "r", "s", "t"].map(|name| policy(name, 1_000));
        let policy_chain =
            |all: &[Ranked]| PolicyChain::new(&all.iter().collect::<Vec<_>>(), &NodeAllocations::default(), CLIENT);
        assert!(matches!(policy_chain(&all), Some(PolicyChain::Steps(steps)) if steps.len() == 5));
        all[4].over_quota = true;
        assert_eq!(policy_chain(&all), Some(PolicyChain::Isolated));
    }

    #[test]
    fn a_pod_is_isolated_if_the_deciding_policy_is_unknown() {
        let guess = |rank, egress| {
            let mut guess = policy("guess", 1);
            Arc::make_mut(&mut guess.policy).guessed = Guessed { rank, egress };
            guess
        };
        let (other, allocations) = (policy("other", 1), NodeAllocations::default());
        let is_isolated = |all: &[&Ranked]| PolicyChain::new(all, &allocations, CLIENT) == Some(PolicyChain::Isolated);
        // Alone it decides, whatever it says.
        assert!(!is_isolated(&[&guess(true, true)]));
        assert!(is_isolated(&[&guess(true, false), &other]) && is_isolated(&[&other, &guess(true, false)]));
        assert!(is_isolated(&[&guess(false, true), &other]) && !is_isolated(&[&other, &guess(false, true)]));
        assert!(!is_isolated(&[&guess(false, false), &other]));
    }

    #[test]
    fn direct_policies_are_steps_and_alone_are_no_policy_chain() {
        let direct = |name: &str| {
            let mut direct = policy(name, 1);
            Arc::make_mut(&mut direct.policy).address = crate::model::AddressRequest::Direct;
            direct
        };
        let (other, allocations) = (policy("other", 1), NodeAllocations::default());
        assert_eq!(PolicyChain::new(&[&direct("p"), &direct("q")], &allocations, CLIENT), None);
        let policy_chain = PolicyChain::new(&[&direct("p"), &other], &allocations, CLIENT).unwrap();
        let actions: Vec<PolicyAction> = policy_chain.steps().iter().map(|step| step.action).collect();
        assert_eq!(
            actions,
            [PolicyAction::Direct, PolicyAction::EgressIp { allocation: None, fallback: Fallback::Block }]
        );
        // It is unknown whether it decides before the one that cannot be read.
        let mut guess = policy("guess", 1);
        Arc::make_mut(&mut guess.policy).guessed.rank = true;
        assert_eq!(PolicyChain::new(&[&direct("p"), &guess], &allocations, CLIENT), Some(PolicyChain::Isolated));
    }

    #[test]
    fn the_longest_lists_beyond_the_limit_of_a_node_isolate_their_pods_and_no_others() {
        let mut plan = NodePlan::default();
        for (pod_mark, name, ports) in [(1, "short", 10), (2, "long", 30), (3, "longest", 40)] {
            let policy_chain = PolicyChain::new(&[&policy(name, ports)], &NodeAllocations::default(), CLIENT).unwrap();
            add_pod(&mut plan, pod_mark, policy_chain.name(), policy_chain);
        }
        let isolated = |plan: &NodePlan| plan.policy_chains.values().filter(|c| ***c == PolicyChain::Isolated).count();
        let entries = |ports| policy("p", ports).policy.egress.as_ref().unwrap().shape().entries;
        let all: usize = [10, 30, 40].map(entries).iter().sum();
        assert!(plan.isolate_beyond(all).is_empty() && isolated(&plan) == 0);
        assert_eq!(plan.isolate_beyond(all - 1), ["a/longest"].map(PolicyKey::from).into());
        assert_eq!(isolated(&plan), 1);
        assert_eq!(plan.isolate_beyond(entries(10)), ["a/long"].map(PolicyKey::from).into());
    }

    #[test]
    fn a_pod_is_isolated_if_policy_chains_have_the_same_name() {
        let allocations = NodeAllocations::default();
        let [one, other] = ["p", "q"].map(|name| PolicyChain::new(&[&policy(name, 1)], &allocations, CLIENT).unwrap());
        let mut plan = NodePlan::default();
        for (pod_mark, policy_chain) in [(1, &one), (2, &one), (3, &other)] {
            add_pod(&mut plan, pod_mark, one.name(), policy_chain.clone());
        }
        let policy_chains: Vec<&PolicyChain> =
            plan.pods.values().map(|pod| &*plan.policy_chains[&pod.policy_chain]).collect();
        assert_eq!(policy_chains, [&one, &one, &PolicyChain::Isolated]);
    }
}
