//! `egretd why`: explains in words how a pod's packets leave the cluster. It asks the same index, in the same order,
//! as the rules of the pod's node.

mod decision;
mod destination;
mod egress_ip;
mod policies;

use crate::model::destination::comma_separated;
use crate::model::opt_in;
use crate::model::precedence::{PolicyIndex, Ranked};
use crate::model::selector::Labels;
use crate::model::target::Target;
use crate::model::{ASKED_GATEWAY, Client, Cluster, ObjectKey, PolicyKey};
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::policy_chain::PolicyChain;
use ipnetwork::IpNetwork;

/// The error of [`why`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the cluster has no pod {0}; write NAMESPACE/NAME")]
pub struct NoSuchPod(String);

/// Some lines of text about a pod, or, with a target, about its packets to that target. `direct` are the destinations
/// that the user has excluded from all policies, beside the cluster's own networks.
///
/// # Errors
/// The cluster has no such pod.
pub fn why(
    cluster: &Cluster,
    key: &ObjectKey,
    target: Option<Target>,
    direct: &[IpNetwork],
) -> Result<String, NoSuchPod> {
    let pod = cluster.pods.get(key).ok_or_else(|| NoSuchPod(key.to_string()))?;
    let labels: Vec<String> = pod.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut lines = vec![format!(
        "pod {key} on node {}, {}, {}",
        pod.node.as_deref().unwrap_or("(none yet)"),
        list(&pod.addresses, "no address yet"),
        list(&labels, "no labels"),
    )];
    let index = PolicyIndex::new(cluster);
    let policies = index.policies_for(&key.namespace, &pod.labels);
    let isolated =
        PolicyChain::new(&policies, &NodeAllocations::default(), Client::of(key, pod)) == Some(PolicyChain::Isolated);
    let effect = "only its traffic inside the cluster passes";
    if pod.host_network {
        lines.push("It uses its host's network: no policy selects it, and it leaves from its node's address.".into());
    } else if pod.finished {
        lines.push("It has ended.".into());
    } else if index.is_undecided_in(&key.namespace) {
        lines.push(format!(
            "A policy selects namespaces by label, and the namespace {} is not known yet: the pod is isolated, \
             {effect}.",
            key.namespace
        ));
    } else if policies.is_empty() {
        lines.push("No policy selects it: it leaves as if Egret were not there.".into());
    } else if isolated {
        let guessed = policies.iter().find(|r| r.policy.guessed.rank || r.policy.guessed.egress);
        let reason = match guessed {
            Some(Ranked { key, .. }) => format!(
                "{} cannot be read, and it is unknown whether this or another policy of the pod decides",
                named(key)
            ),
            None => {
                let over = policies.iter().filter(|ranked| ranked.over_quota).map(|ranked| named(&ranked.key));
                let over = comma_separated(&over.collect::<Vec<_>>());
                format!("The policies of its namespace list too many destinations together, {over} among them")
            }
        };
        lines.push(format!("{reason}: the pod is isolated, {effect}."));
    } else {
        match target {
            None => lines.extend(policies::explain_all(cluster, (key, pod), &policies)),
            Some(target) => lines.extend(destination::explain(cluster, (key, pod), &policies, target, direct)),
        }
    }
    lines.extend(asks_in_vain(cluster, key, &pod.labels, &policies));
    lines.push(String::new());
    Ok(lines.join("\n"))
}

fn named(key: &PolicyKey) -> String {
    if let Some(gateway) = opt_in::gateway_of(key) {
        return format!("EgressGateway {gateway}, which may be asked for (spec.optIn),");
    }
    let kind = if key.namespace.is_some() { "EgressPolicy" } else { "ClusterEgressPolicy" };
    format!("{kind} {key}")
}

/// Why a pod that asks for a gateway does not get it, if no policy that selects it is of that gateway.
fn asks_in_vain(cluster: &Cluster, key: &ObjectKey, labels: &Labels, policies: &[&Ranked]) -> Option<String> {
    let namespace = cluster.namespaces.get(&key.namespace);
    let (who, asked) = match labels.get(ASKED_GATEWAY) {
        Some(asked) => ("It", asked),
        None => ("Its namespace", namespace?.get(ASKED_GATEWAY)?),
    };
    if policies.iter().any(|ranked| ranked.policy.gateway.as_ref() == Some(asked)) {
        return None;
    }
    let why = match cluster.gateways.get(asked) {
        None => "there is no such gateway".to_owned(),
        Some(gateway) if !gateway.opt_in => {
            "that one may not be asked for (spec.optIn), and no policy grants it".to_owned()
        }
        Some(_) => format!("its namespaceSelector does not match the labels of namespace {}", key.namespace),
    };
    Some(format!("{who} asks for EgressGateway {asked:?} ({ASKED_GATEWAY}) in vain: {why}."))
}

fn list<T: ToString>(all: &[T], none: &str) -> String {
    if all.is_empty() { none.to_owned() } else { comma_separated(all) }
}

#[cfg(test)]
mod tests;
