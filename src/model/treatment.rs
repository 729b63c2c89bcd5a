//! What policies ask for about the packets of their egress IP, besides the address. It holds for the egress IP: on the
//! owner, a connection's mark has no room for more than the egress ID.

use super::bandwidth::Bandwidth;
use super::{Policy, PolicyKey};

/// The value that holds for an egress IP, and the policy that gives it: the oldest of its policies that gives one. If
/// policies of several namespaces share the egress IP, only ClusterEgressPolicies count, so that no tenant treats
/// another one's packets.
pub fn given<'a, T>(
    policies: impl Iterator<Item = (&'a PolicyKey, &'a Policy)> + Clone,
    of: impl Fn(&Policy) -> Option<T>,
) -> Option<(T, &'a PolicyKey)> {
    let first = policies.clone().next()?.0;
    let is_shared = policies.clone().any(|(key, _)| key.namespace != first.namespace);
    let counts = policies.filter(|(key, _)| !is_shared || key.namespace.is_none());
    let given = counts.filter_map(|(key, policy)| Some((policy.created, key, of(policy)?)));
    given.min_by_key(|(created, key, _)| (*created, *key)).map(|(_, key, value)| (value, key))
}

/// The DSCP of an egress IP, see [`given`].
pub fn dscp<'a>(policies: impl Iterator<Item = (&'a PolicyKey, &'a Policy)> + Clone) -> Option<(u8, &'a PolicyKey)> {
    given(policies, |policy| policy.dscp)
}

/// The bandwidth of an egress IP, see [`given`].
pub fn bandwidth<'a>(
    policies: impl Iterator<Item = (&'a PolicyKey, &'a Policy)> + Clone,
) -> Option<(Bandwidth, &'a PolicyKey)> {
    given(policies, |policy| policy.bandwidth)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::EgressPolicySpec;
    use crate::model::Metadata;

    /// The DSCP of these policies, each with its creation time and DSCP.
    fn of(policies: &[(&str, i64, Option<u8>)]) -> Option<(u8, String)> {
        let policy = |(key, created, dscp): &(&str, i64, Option<u8>)| {
            let spec = EgressPolicySpec { pod_selector: Some(Default::default()), dscp: *dscp, ..Default::default() };
            let metadata = Metadata { created: Some(*created), ..Metadata::default() };
            (PolicyKey::from(*key), Policy::namespaced("a", &spec, metadata).expect("a policy"))
        };
        let policies: Vec<_> = policies.iter().map(policy).collect();
        dscp(policies.iter().map(|(key, policy)| (key, policy))).map(|(dscp, key)| (dscp, key.to_string()))
    }

    #[test]
    fn the_oldest_policy_that_gives_a_value_counts() {
        let all = [("a/b", 2, Some(46)), ("a/none", 1, None), ("a/young", 3, Some(10)), ("a/a", 2, Some(0))];
        assert_eq!(of(&all), Some((0, "a/a".into())));
        assert_eq!(of(&all[..3]), Some((46, "a/b".into())));
        assert_eq!(of(&all[1..2]), None);
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn no_tenant_treats_another_ones_packets() {
        assert_eq!(of(&[("a/p", 1, Some(46)), ("b/p", 2, None)]), None);
        let all = [("a/p", 1, Some(46)), ("b/p", 2, None), ("old", 3, Some(10)), ("young", 4, Some(11))];
        assert_eq!(of(&all), Some((10, "old".into())));
    }
}
