//! The policies of gateways that may be asked for, in a snapshot ([`crate::model::opt_in`]).

use crate::model::selector::{Name, Selector};
use crate::model::{Cluster, Policy, PolicyKey, opt_in};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Brings the policies, and what the gateways' statuses say about them, up to date. `unreadable` are gateways that may
/// be asked for and of which nothing else is known, with the namespaces that may. Returns whether anything has changed.
pub fn update<'a>(cluster: &mut Cluster, unreadable: impl Iterator<Item = (&'a Name, &'a Selector)>) -> bool {
    let mut wanted: BTreeMap<PolicyKey, Policy> = BTreeMap::new();
    for (name, gateway) in cluster.gateways.iter() {
        wanted.extend(opt_in::of_gateway(name, gateway).into_iter().flatten());
    }
    for (name, allowed) in unreadable {
        let is_known = cluster.gateways.get(name).is_some_and(|gateway| !gateway.frozen);
        if !is_known && opt_in::keys(name).iter().all(|key| !wanted.contains_key(key)) {
            wanted.extend(opt_in::policies(name, allowed));
        }
    }
    // The keys of ClusterEgressPolicies come first.
    let of_cluster = cluster.policies.keys().take_while(|key| key.namespace.is_none());
    let there: Vec<PolicyKey> = of_cluster.filter(|key| opt_in::gateway_of(key).is_some()).cloned().collect();
    let mut changed = false;
    for key in there.iter().filter(|key| !wanted.contains_key(*key)) {
        cluster.policies.remove(key);
        if cluster.policy_statuses.contains_key(key) {
            cluster.policy_statuses.remove(key);
        }
        changed = true;
    }
    for (key, policy) in wanted {
        let gateway = opt_in::gateway_of(&key).and_then(|name| cluster.gateways.get(name));
        let status = gateway.and_then(|gateway| gateway.status.opt_in.as_deref());
        if let Some(status) = status
            && cluster.policy_statuses.get(&key).is_none_or(|known| **known != *status)
        {
            let status = Arc::new(status.clone());
            cluster.policy_statuses.insert(key.clone(), status);
            changed = true;
        }
        if cluster.policies.get(&key).is_none_or(|known| **known != policy) {
            cluster.policies.insert(key, Arc::new(policy));
            changed = true;
        }
    }
    changed
}
