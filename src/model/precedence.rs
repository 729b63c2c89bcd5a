//! The policies that select a pod, in the order in which they decide.

use crate::api::Fallback;
use crate::model::label_index::LabelIndex;
use crate::model::opt_in;
use crate::model::quota;
use crate::model::selector::{Labels, Name};
use crate::model::shared::Shared;
use crate::model::{Cluster, Namespaces, PodMatch, Policy, PolicyKey, Service, Tier};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// The label that every namespace has, with its name as the value,
/// <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-metadata-name>.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A policy with its name.
#[derive(Clone, Debug)]
pub struct Ranked {
    /// The name.
    pub key: PolicyKey,
    /// The policy.
    pub policy: Arc<Policy>,
    /// Whether the policies of its namespace list too many destinations and this policy exceeds the limit. Its pods
    /// are isolated.
    pub over_quota: bool,
}

fn note(policies: &mut Vec<PolicyKey>, key: &PolicyKey) {
    if policies.len() < NAMED && !policies.contains(key) {
        policies.push(key.clone());
    }
}

/// An index of all policies of a snapshot that finds those that select a pod. It is built once for each snapshot. It
/// keeps only the policies, and the Services and namespaces that they name.
#[derive(Clone, Debug, Default)]
pub struct PolicyIndex {
    /// In order of precedence. The index of a policy here is its rank.
    ranked: Box<[Ranked]>,
    /// EgressPolicies by namespace; a namespace without any is missing.
    namespaces: HashMap<Name, InNamespace>,
    /// Ranks of the ClusterEgressPolicies that select by labels, under labels of pods and of namespaces alike.
    by_labels: LabelIndex,
    /// Ranks of the ClusterEgressPolicies that select by Service, by the Service's name.
    by_service: HashMap<Name, Vec<u32>>,
    /// Ranks of all ClusterEgressPolicies, under labels of namespaces.
    by_namespace_labels: LabelIndex,
    /// Services that policies name.
    services: Services,
    /// Whether some ClusterEgressPolicy selects namespaces by other labels than their name.
    by_unknown_labels: bool,
    /// All namespaces of the snapshot.
    known: Shared<BTreeMap<Name, Labels>>,
}

/// The policies of one namespace.
#[derive(Clone, Debug, Default)]
struct InNamespace {
    by_labels: LabelIndex,
    by_service: HashMap<Name, Vec<u32>>,
    /// Whether some policy here gives egress IPs.
    has_egress_ip: bool,
}

/// Services that policies name, with an index that finds those that select a pod.
#[derive(Clone, Debug, Default)]
struct Services {
    all: Vec<(Name, Arc<Service>)>,
    /// Indices in `all`, by namespace.
    by_namespace: HashMap<Name, LabelIndex>,
}

/// How many policies are listed for a namespace.
const NAMED: usize = 3;

/// The namespaces in which policies can select pods, and give them egress IPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Namespaces in which some policy can select a pod, each with the first of these policies.
    pub selectable: BTreeMap<Name, Vec<PolicyKey>>,
    /// The first ClusterEgressPolicies that can select pods of namespaces that are not known yet.
    pub in_unknown: Vec<PolicyKey>,
    /// Known namespaces in which no policy can select a pod.
    pub free: BTreeSet<Name>,
}

impl PolicyIndex {
    /// Indexes the policies of a snapshot.
    pub fn new(cluster: &Cluster) -> Self {
        let over = quota::over(&cluster.policies);
        let ranked = |(k, p): (&PolicyKey, &Arc<Policy>)| Ranked {
            key: k.clone(),
            policy: p.clone(),
            over_quota: over.contains_key(k),
        };
        let mut ranked: Vec<Ranked> = cluster.policies.iter().map(ranked).collect();
        ranked.sort_by(|a, b| precedence(a).cmp(&precedence(b)));

        let mut index = PolicyIndex { known: cluster.namespaces.clone(), ..Self::default() };
        let mut in_namespace: HashMap<&Name, Vec<(u32, Vec<_>)>> = HashMap::new();
        let mut everywhere: Vec<(u32, Vec<_>)> = Vec::new();
        let mut reaching: Vec<(u32, Vec<_>)> = Vec::new();
        for (rank, Ranked { policy, .. }) in (0u32..).zip(&ranked) {
            if let (Namespaces::One(ns), false) = (&policy.namespaces, policy.is_direct()) {
                index.namespaces.entry(ns.clone()).or_default().has_egress_ip = true;
            }
            match (&policy.namespaces, &policy.pods) {
                (Namespaces::One(ns), PodMatch::Labels(pods)) => {
                    in_namespace.entry(ns).or_default().push((rank, pods.required_labels().collect()));
                }
                (Namespaces::One(ns), PodMatch::Services(names)) => {
                    let here = index.namespaces.entry(ns.clone()).or_default();
                    for name in names {
                        here.by_service.entry(name.clone()).or_default().push(rank);
                    }
                }
                (Namespaces::Selected(namespaces), PodMatch::Labels(pods)) => {
                    let labels = pods.required_labels().chain(namespaces.required_labels());
                    everywhere.push((rank, labels.collect()));
                }
                (Namespaces::Selected(_), PodMatch::Services(names)) => {
                    for name in names {
                        index.by_service.entry(name.clone()).or_default().push(rank);
                    }
                }
            }
            if let Namespaces::Selected(namespaces) = &policy.namespaces {
                index.by_unknown_labels |= !namespaces.decides_by_name(NAMESPACE_NAME_LABEL);
                reaching.push((rank, namespaces.required_labels().collect()));
            }
        }
        for (ns, items) in &in_namespace {
            index.namespaces.entry(Name::clone(ns)).or_default().by_labels = LabelIndex::new(items);
        }
        index.by_labels = LabelIndex::new(&everywhere);
        index.by_namespace_labels = LabelIndex::new(&reaching);
        // Where no policy gives egress IPs, it does not matter which of the others select a pod.
        index.by_unknown_labels &= ranked.iter().any(|ranked| !ranked.policy.is_direct());
        index.services = index.named_services(cluster);
        index.ranked = ranked.into();
        index
    }

    /// The policies that select a pod with these labels, in order of precedence. The caller does not ask for pods
    /// that use their node's network, nor for pods that have finished.
    pub fn policies_for(&self, namespace: &str, labels: &Labels) -> Vec<&Ranked> {
        let mut ranks = Vec::new();
        let here = self.namespaces.get(namespace);
        if let Some(here) = here {
            ranks.extend(here.by_labels.candidates(labels.iter()));
        }
        let of_namespace = self.labels_of(namespace);
        ranks.extend(self.by_labels.candidates(labels.iter().chain(of_namespace.iter())));
        ranks.retain(|rank| match &self.ranked[*rank as usize].policy.pods {
            PodMatch::Labels(pods) => pods.matches(labels),
            PodMatch::Services(_) => false,
        });
        for service in self.services.that_select(namespace, labels) {
            ranks.extend(here.and_then(|h| h.by_service.get(service)).into_iter().flatten());
            ranks.extend(self.by_service.get(service).into_iter().flatten());
        }
        ranks.sort_unstable();
        ranks.dedup();
        ranks.retain(|rank| self.reaches(*rank, &of_namespace));
        ranks.into_iter().map(|rank| &self.ranked[rank as usize]).collect()
    }

    /// All policies in order of precedence.
    pub fn all(&self) -> &[Ranked] {
        &self.ranked
    }

    /// Whether some policy can give an egress IP to a pod of the namespace: by labels that a pod may have, or by a Service that may
    /// be created.
    pub fn can_select_in(&self, namespace: &str) -> bool {
        let labels = self.labels_of(namespace);
        self.namespaces.get(namespace).is_some_and(|here| here.has_egress_ip)
            || self
                .by_namespace_labels
                .candidates(labels.iter())
                .any(|rank| self.gives(rank) && self.reaches(rank, &labels))
    }

    /// Whether a policy can select pods of namespaces that are not known yet.
    fn can_select_in_unknown(&self, policy: &Policy) -> bool {
        match &policy.namespaces {
            Namespaces::One(_) => false,
            // A selector that requires the name of a known namespace selects no other.
            Namespaces::Selected(selector) => !selector
                .required_labels()
                .any(|(key, value)| **key == *NAMESPACE_NAME_LABEL && self.known.contains_key(value)),
        }
    }

    /// Whether the policies of pods in this namespace cannot be determined yet: some policies select namespaces by
    /// label, and the labels of this one are not known.
    pub fn is_undecided_in(&self, namespace: &str) -> bool {
        self.by_unknown_labels && !self.known.contains_key(namespace)
    }

    /// The namespaces in which policies can select pods, of all that are known or have policies.
    pub fn reach(&self) -> Reach {
        let mut reach = Reach::default();
        for Ranked { key, policy, .. } in self.ranked.iter().filter(|ranked| !ranked.policy.is_direct()) {
            if let Namespaces::One(namespace) = &policy.namespaces {
                note(reach.selectable.entry(namespace.clone()).or_default(), key);
            } else if self.can_select_in_unknown(policy) {
                note(&mut reach.in_unknown, key);
            }
        }
        for namespace in self.known.keys().chain(self.namespaces.keys()) {
            let labels = self.labels_of(namespace);
            let candidates = self.by_namespace_labels.candidates(labels.iter());
            let reaching = candidates.filter(|rank| self.gives(*rank) && self.reaches(*rank, &labels));
            let reaching: Vec<u32> = reaching.take(NAMED).collect();
            if !reaching.is_empty() {
                let here = reach.selectable.entry(namespace.clone()).or_default();
                reaching.into_iter().for_each(|rank| note(here, &self.ranked[rank as usize].key));
            } else if !reach.selectable.contains_key(namespace) {
                reach.free.insert(namespace.clone());
            }
        }
        reach
    }

    /// Whether a policy applies to the namespace with these labels. An EgressPolicy is only looked up in its own
    /// namespace.
    fn reaches(&self, rank: u32, labels: &Labels) -> bool {
        match &self.ranked[rank as usize].policy.namespaces {
            Namespaces::One(_) => true,
            Namespaces::Selected(selector) => selector.matches(labels),
        }
    }

    /// Whether a policy gives egress IPs. A pod that only others select needs nothing of Egret.
    fn gives(&self, rank: u32) -> bool {
        !self.ranked[rank as usize].policy.is_direct()
    }

    fn labels_of(&self, namespace: &str) -> Cow<'_, Labels> {
        labels_or_name(self.known.get(namespace), namespace)
    }

    fn named_services(&self, cluster: &Cluster) -> Services {
        let mut services = Services::default();
        if self.by_service.is_empty() && self.namespaces.values().all(|here| here.by_service.is_empty()) {
            return services;
        }
        let mut items: HashMap<&Name, Vec<(u32, Vec<_>)>> = HashMap::new();
        let mut index = 0;
        for (key, service) in &cluster.services {
            let Some(selector) = &service.selector else { continue };
            let here = self.namespaces.get(&key.namespace);
            if self.by_service.contains_key(&key.name) || here.is_some_and(|h| h.by_service.contains_key(&key.name)) {
                items.entry(&key.namespace).or_default().push((index, selector.required_labels().collect()));
                services.all.push((key.name.clone(), service.clone()));
                index += 1;
            }
        }
        services.by_namespace = items.into_iter().map(|(ns, items)| (ns.clone(), LabelIndex::new(&items))).collect();
        services
    }
}

impl Services {
    /// The names of the Services in the namespace that select a pod with these labels.
    fn that_select(&self, namespace: &str, labels: &Labels) -> impl Iterator<Item = &Name> {
        let candidates = self.by_namespace.get(namespace);
        candidates.into_iter().flat_map(|of| of.candidates(labels.iter())).filter_map(|index| {
            let (name, service) = &self.all[index as usize];
            service.selector.as_ref().is_some_and(|s| s.matches(labels)).then_some(name)
        })
    }
}

/// The labels of a namespace. If the source does not list the namespace, the label that Kubernetes would give it.
pub(crate) fn labels_or_name<'a>(known: Option<&'a Labels>, namespace: &str) -> Cow<'a, Labels> {
    match known {
        Some(labels) => Cow::Borrowed(labels),
        None => Cow::Owned(Labels::from_iter([(NAMESPACE_NAME_LABEL, namespace)])),
    }
}

/// The sort key: upper tier, higher priority, EgressPolicy before ClusterEgressPolicy, older (without a time:
/// youngest), name.
fn precedence(r: &Ranked) -> (Tier, Reverse<i32>, bool, i64, &PolicyKey) {
    let cluster_wide = matches!(r.policy.namespaces, Namespaces::Selected(_));
    (r.policy.tier, Reverse(r.policy.priority), cluster_wide, r.policy.created, &r.key)
}

/// Whether a policy is passed over.
///
/// A policy without an egress IP, because it was rejected or is new, blocks what it covers: that traffic must not leave
/// from another address. With `fallback: NodeAddress` the next policy decides instead. Otherwise a tenant could
/// escape a ClusterEgressPolicy by asking for an address that is never given out. While a gateway is dead, its
/// policies keep their egress IPs, and so their places.
///
/// An EgressPolicy with `action: Direct` is passed over if a ClusterEgressPolicy selects the pod. Otherwise a tenant
/// could escape that one in this way too. One of tier `Admin` decides first in any case, and one with
/// `action: Direct` has nothing to escape from.
pub fn passed_over(ranked: &Ranked, of_pod: &[&Ranked], has_allocation: bool) -> Option<PassedOver> {
    let Ranked { policy, .. } = ranked;
    if policy.is_direct() {
        let is_bound = matches!(policy.namespaces, Namespaces::One(_))
            && of_pod.iter().any(|Ranked { key, policy: other, .. }| {
                // Who asks for a gateway may also exempt from it.
                opt_in::gateway_of(key).is_none()
                    && matches!(other.namespaces, Namespaces::Selected(_))
                    && other.tier != Tier::Admin
                    && !other.is_direct()
            });
        return is_bound.then_some(PassedOver::ClusterPolicy);
    }
    (!has_allocation && policy.fallback == Fallback::NodeAddress).then_some(PassedOver::NoEgressIp)
}

/// Why a policy that selects a pod is passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassedOver {
    /// It has no egress IP, and has `fallback: NodeAddress`.
    NoEgressIp,
    /// It is an EgressPolicy with `action: Direct`, and a ClusterEgressPolicy selects the pod.
    ClusterPolicy,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PassedOver::NoEgressIp => "it has no egress IP, and has fallback: NodeAddress",
            PassedOver::ClusterPolicy => {
                "it has action: Direct, and a ClusterEgressPolicy selects the pod, which no EgressPolicy exempts it from"
            }
        })
    }
}

#[cfg(test)]
mod tests;
