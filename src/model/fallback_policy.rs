//! The fallback policy: it stands for a policy that was in force and cannot be read now, when its last good state is
//! not known because the daemon has been restarted since.
//!
//! The gateway's allocations still list the egress IP of the policy, and its pods keep using that one. Unknown
//! destinations count as all destinations, so that no destination sees another address. If another policy selects the
//! same pods and might decide in its place, these pods are isolated. A policy that the allocations do not list was
//! never in force, and has no fallback policy.

use crate::api::{Allocate, Allocation, AllocationKind, ExistingConnections, Fallback, Spread};
use crate::model::covers::Covers;
use crate::model::opt_in;
use crate::model::selector::Name;
use crate::model::selector::Selector;
use crate::model::{AddressRequest, Cluster, Guessed, Namespaces, ObjectKey, PodMatch, Policy, PolicyKey, Tier};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The parts of an invalid policy that can be read. A missing part means everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadableParts {
    /// The namespaces of a ClusterEgressPolicy.
    pub namespaces: Selector,
    /// The pods in them; `None`: it cannot be read.
    pub pods: Option<PodMatch>,
    /// `spec.tier`; `None`: it cannot be read.
    pub tier: Option<Tier>,
    /// `spec.priority`; `None`: it cannot be read.
    pub priority: Option<i32>,
    /// `metadata.creationTimestamp`, as in [`Policy`].
    pub created: Option<i64>,
    /// `spec.egress`; the outer `None`: it cannot be read.
    pub egress: Option<Option<Arc<Covers>>>,
}

/// The fallback policy, if the allocations list the policy.
pub fn fallback_policy(cluster: &Cluster, key: &PolicyKey, readable: &ReadableParts) -> Option<Policy> {
    cluster.gateways.iter().find_map(|(name, gateway)| {
        let allocations = gateway.status.allocations.iter().filter(|allocation| allocation.policies.contains(key));
        from_allocations(key, name, &allocations.collect::<Vec<_>>(), readable)
    })
}

/// The fallback policy of a policy that a gateway lists on these allocations; `None` if they are none. If the gateway does
/// not exist, the traffic of its pods is blocked.
pub fn from_allocations(
    key: &PolicyKey,
    gateway: &Name,
    allocations: &[&Allocation],
    readable: &ReadableParts,
) -> Option<Policy> {
    let first = allocations.first()?;
    let count = allocations.iter().map(|allocation| allocation.ordinal + 1).max()?;
    Some(Policy {
        namespaces: match &key.namespace {
            Some(namespace) => Namespaces::One(namespace.clone()),
            None => Namespaces::Selected(Box::new(readable.namespaces.clone())),
        },
        pods: readable.pods.clone().unwrap_or_else(|| PodMatch::Labels(Selector::default())),
        gateway: Some(gateway.clone()),
        egress: readable.egress.clone().flatten(),
        // The same request as before, so that the controller keeps the allocations.
        address: match first.kind {
            AllocationKind::Explicit => {
                AddressRequest::Explicit(allocations.iter().map(|a| a.address.clone()).collect())
            }
            // What has an egress IP of an unknown kind is blocked, whatever it asks for.
            AllocationKind::Dedicated | AllocationKind::Unknown => AddressRequest::Allocate(Allocate::Dedicated, count),
            AllocationKind::Shared => AddressRequest::Allocate(Allocate::Shared, 1),
            AllocationKind::Pooled => AddressRequest::Allocate(Allocate::Pooled, 1),
            AllocationKind::Node => AddressRequest::Allocate(Allocate::Node, 1),
            AllocationKind::Service => match first.service.as_deref().and_then(ObjectKey::parse) {
                Some(service) => AddressRequest::Service(service),
                None => AddressRequest::Explicit([first.address.clone()].into()),
            },
        },
        spread: Spread::default(),
        preference: Box::default(),
        dscp: None,
        bandwidth: None,
        fallback: Fallback::Block,
        existing_connections: ExistingConnections::Keep,
        tier: readable.tier.unwrap_or_default(),
        priority: readable.priority.unwrap_or_default(),
        created: readable.created.unwrap_or(i64::MAX),
        guessed: Guessed {
            rank: readable.tier.is_none() || readable.priority.is_none(),
            egress: readable.egress.is_none(),
        },
        for_controller: None,
    })
}

/// The policies that the allocations list and the cluster does not have.
pub fn listed_only(cluster: &Cluster) -> BTreeSet<PolicyKey> {
    let listed = cluster.allocations().flat_map(|allocation| &allocation.policies);
    // Gateways' own policies are no objects that the source could show later.
    let listed = listed.filter(|key| opt_in::gateway_of(key).is_none());
    listed.filter(|key| !cluster.policies.contains_key(*key)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, asking, naming, selector};
    use std::sync::Arc;

    /// Replaces all policies by their fallback policies.
    fn replace_by_fallback_policies(world: &mut World, readable: &ReadableParts) {
        world.cluster.policies = Default::default();
        for key in listed_only(&world.cluster) {
            let policy = fallback_policy(&world.cluster, &key, readable).unwrap();
            world.cluster.policies.insert(key, Arc::new(policy));
        }
    }

    #[test]
    fn fallback_policies_keep_all_allocations() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        world.policy("a/named", naming(&["192.0.2.57"]));
        world.policy("a/own", asking(Allocate::Dedicated));
        world.policy("a/shared", asking(Allocate::Shared));
        world.policy("b/shared", asking(Allocate::Shared));
        world.policy("a/pooled", asking(Allocate::Pooled));
        world.policy("a/nodes", asking(Allocate::Node));
        world.policy("everywhere", asking(Allocate::Dedicated));
        world.allocate();
        world.settle();
        let before = world.allocate().gateways;
        replace_by_fallback_policies(&mut world, &ReadableParts::default());
        assert_eq!(world.cluster.policies.len(), 7);
        world.now += 3600;
        let after = world.allocate().gateways;
        assert_eq!(after["g"].allocations, before["g"].allocations);
        assert!(after["g"].released.is_empty());
    }

    #[test]
    fn a_policy_that_was_never_in_force_has_no_fallback_policy() {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", naming(&["192.0.2.51"]));
        world.allocate();
        assert!(listed_only(&world.cluster).is_empty());
        assert_eq!(fallback_policy(&world.cluster, &"a/p".into(), &ReadableParts::default()), None);
    }

    #[test]
    fn readable_parts_are_used() {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", naming(&["192.0.2.50"]));
        world.allocate();
        let pods = || PodMatch::Labels(Selector::try_from(&selector(&[("app", "x")])).unwrap());
        let readable = ReadableParts {
            pods: Some(pods()),
            tier: Some(Tier::Admin),
            priority: Some(7),
            created: Some(3),
            ..ReadableParts::default()
        };
        let policy = fallback_policy(&world.cluster, &"a/p".into(), &readable).unwrap();
        assert_eq!((policy.pods, policy.priority, policy.created, policy.egress), (pods(), 7, 3, None));
        assert_eq!((policy.tier, policy.guessed.rank), (Tier::Admin, false));
    }
}
