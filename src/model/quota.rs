//! A limit for the destinations that the policies of one namespace list. They take memory on every node that runs
//! pods of the namespace.

use crate::model::covers::Covers;
use crate::model::{Policy, PolicyKey};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// How many combinations of a network and a range of ports the EgressPolicies of a namespace may list together.
const MAX_ENTRIES: usize = 200_000;

/// The reason of the condition `Ready` when the policies of the namespace list too much.
pub(crate) const REASON: &str = "TooManyDestinations";

/// By how much a policy exceeds the limit of its namespace. Its `Display` is a message for users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over {
    /// Combinations that the policy lists.
    listed: usize,
    /// Combinations that older policies of the namespace list.
    before: usize,
}

/// The youngest policies of each namespace that exceed the limit. Older ones are not affected. ClusterEgressPolicies,
/// which administrators write, do not count.
pub fn over(policies: &BTreeMap<PolicyKey, Arc<Policy>>) -> BTreeMap<&PolicyKey, Over> {
    over_limit(policies, MAX_ENTRIES)
}

fn over_limit(policies: &BTreeMap<PolicyKey, Arc<Policy>>, limit: usize) -> BTreeMap<&PolicyKey, Over> {
    let mut of_namespaces: BTreeMap<&str, Vec<(i64, &PolicyKey, &Covers)>> = BTreeMap::new();
    for (key, policy) in policies {
        if let (Some(namespace), Some(covers)) = (&key.namespace, &policy.egress) {
            of_namespaces.entry(namespace).or_default().push((policy.created, key, covers));
        }
    }
    let mut over = BTreeMap::new();
    for mut of_namespace in of_namespaces.into_values() {
        // Most namespaces are far below the limit, so the exact count is not needed.
        if of_namespace.iter().map(|(.., covers)| covers.entries_at_most()).fold(0, usize::saturating_add) <= limit {
            continue;
        }
        of_namespace.sort_unstable_by_key(|(created, key, _)| (*created, *key));
        let mut before = 0;
        for (_, key, covers) in of_namespace {
            let listed = covers.shape().entries;
            if before + listed > limit {
                over.insert(key, Over { listed, before });
            } else {
                before += listed;
            }
        }
    }
    over
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "it makes {} combinations of a network and ports, older policies of its namespace make {}, and at most \
             {MAX_ENTRIES} are allowed: the pods that it selects are isolated; list fewer destinations, or use wider \
              networks",
            self.listed, self.before
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::EgressPolicySpec;
    use crate::fixture::{World, naming};

    fn spec(networks: u8) -> EgressPolicySpec {
        let block = |n| crate::api::IpBlock { cidr: format!("203.0.113.{}/32", 2 * n), except: vec![] };
        let to = (0..networks).map(|n| crate::api::EgressPeer { ip_block: block(n) }).collect();
        EgressPolicySpec { egress: Some(vec![crate::api::EgressRule { to, ports: vec![] }]), ..naming(&["192.0.2.50"]) }
    }

    #[test]
    fn only_the_youngest_policies_of_a_namespace_exceed_its_limit() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        for (name, networks) in [("a/z-first", 6), ("a/second", 5), ("a/fits", 4), ("b/other", 9), ("cluster", 50)] {
            world.policy(name, spec(networks));
            world.now += 1;
        }
        let policies = &world.cluster.policies;
        let entries = |key: &str| policies[&PolicyKey::from(key)].egress.as_ref().unwrap().shape().entries;
        let over = |limit| over_limit(policies, limit).into_keys().map(ToString::to_string).collect::<Vec<_>>();
        let [first, second, fits] = ["a/z-first", "a/second", "a/fits"].map(entries);
        assert!(fits < second && second < first);
        assert_eq!(over(entries("b/other").max(first + fits)), ["a/second"]);
        assert_eq!(over(fits - 1), ["a/fits", "a/second", "a/z-first", "b/other"]);
        assert_eq!(super::over(policies), BTreeMap::new());
    }
}
