//! Quotas: how much of a gateway the policies of one namespace may have together.

use super::decision::{Reason, Rejection};
use super::index::{List, PolicyIndex};
use super::request::{Kind, Requester};
use crate::api::{AddressPair, NamespaceQuota};
use crate::model::selector::Name;
use crate::model::{Cluster, Gateway, Namespaces};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What a policy asks for: the gateway's name, the gateway and the kinds of the requests.
pub(super) type Asked<'a> = (&'a Name, &'a Gateway, &'a [Kind]);

/// The policies that exceed the quota of their namespace, by index, with the rejection. `asks` has, by the index of
/// the policy, the gateway's name, the gateway and the kinds of the requests.
pub(super) fn exceeded(
    cluster: &Cluster,
    requesters: &List<PolicyIndex, Requester>,
    asks: &List<PolicyIndex, Option<Asked>>,
) -> HashMap<PolicyIndex, Rejection> {
    let mut groups: BTreeMap<(&Name, &Name), Vec<PolicyIndex>> = BTreeMap::new();
    for ((index, requester), ask) in requesters.indexed().zip(asks.iter()) {
        if let (Some((name, gateway, _)), Namespaces::One(namespace)) = (ask, &requester.policy.namespaces)
            && gateway.quota != NamespaceQuota::default()
        {
            groups.entry((name, namespace)).or_default().push(index);
        }
    }
    let mut rejections = HashMap::new();
    for ((name, namespace), mut indices) in groups {
        // Policies that were accepted in their current generation come first: a policy that grows is refused itself,
        // and no younger one.
        indices.sort_by_key(|index| (!is_accepted(cluster, &requesters[*index]), *index));
        let mut used = Used::default();
        for index in indices {
            let Some((_, gateway, kinds)) = asks[index] else { continue };
            if let Err(limit) = used.add(gateway, kinds, requesters[index].policy.listed_destinations()) {
                let message = format!(
                    "namespace {namespace:?} would have more than {limit}, which is its quota of EgressGateway \
                     {name:?} (spec.namespaceQuota); remove a policy or some of what it asks for, or have the quota \
                      raised"
                );
                rejections.insert(index, Rejection::new(Reason::QuotaExceeded, message));
            }
        }
    }
    rejections
}

/// Whether the policy was accepted in its current generation.
fn is_accepted(cluster: &Cluster, requester: &Requester) -> bool {
    let conditions = cluster.policy_statuses.get(requester.key).map(|status| status.conditions.as_slice());
    conditions.unwrap_or_default().iter().any(|condition| {
        condition.type_ == "Accepted"
            && condition.status == "True"
            && condition.observed_generation == requester.policy.generation()
    })
}

/// The limit of a quota that would be exceeded.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Exceeded {
    #[error("{0} policies")]
    Policies(u32),
    #[error("{0} egress IPs")]
    Addresses(u32),
    #[error("{0} networks, exceptions and ports in its policies' egress")]
    Destinations(u32),
}

/// What a namespace uses.
#[derive(Default)]
struct Used<'a> {
    policies: usize,
    dedicated: usize,
    named: HashSet<&'a AddressPair>,
    destinations: usize,
}

impl<'a> Used<'a> {
    /// Adds a policy.
    ///
    /// # Errors
    /// The namespace would exceed its quota.
    fn add(&mut self, gateway: &Gateway, kinds: &'a [Kind], destinations: usize) -> Result<(), Exceeded> {
        let quota = &gateway.quota;
        let exceeds = |count: usize, limit: Option<u32>| limit.filter(|limit| count > *limit as usize);
        let dedicated = kinds.iter().filter(|kind| matches!(kind, Kind::Dedicated(_) | Kind::Pooled)).count();
        let named = kinds.iter().filter(|kind| !kind.is_default_of(gateway)).filter_map(Kind::named);
        let named: Vec<&AddressPair> = named.filter(|pair| !self.named.contains(pair)).collect();
        let addresses = self.dedicated + self.named.len() + dedicated + named.len();
        if let Some(limit) = exceeds(self.policies + 1, quota.policies) {
            return Err(Exceeded::Policies(limit));
        }
        // A policy that takes no address is not refused for the addresses of others.
        if let Some(limit) = exceeds(addresses, quota.addresses).filter(|_| dedicated > 0 || !named.is_empty()) {
            return Err(Exceeded::Addresses(limit));
        }
        if let Some(limit) = exceeds(self.destinations + destinations, quota.destinations).filter(|_| destinations > 0)
        {
            return Err(Exceeded::Destinations(limit));
        }
        self.policies += 1;
        self.dedicated += dedicated;
        self.named.extend(named);
        self.destinations += destinations;
        Ok(())
    }
}
