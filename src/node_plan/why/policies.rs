//! Explains what each policy of a pod does.

use super::egress_ip::chosen;
use super::{list, named};
use crate::api::{ExistingConnections, Fallback};
use crate::model::precedence::{self, PassedOver, Ranked};
use crate::model::{Cluster, ObjectKey, Pod, PolicyKey, Tier, addresses_of};
use std::collections::HashSet;

/// What each of a pod's policies does.
pub(super) fn explain_all(cluster: &Cluster, pod: (&ObjectKey, &Pod), policies: &[&Ranked]) -> Vec<String> {
    let mut lines = vec![
        "Traffic inside the cluster goes direct. For other traffic the first policy that covers the destination \
         decides:"
            .to_owned(),
    ];
    let passed_over = passed_over(cluster, policies);
    let everything = policies.iter().position(|r| r.policy.covers_everything() && passed_over(r).is_none());
    for (at, ranked) in policies.iter().enumerate() {
        let Ranked { key, policy, .. } = ranked;
        let covers = match &policy.egress {
            Some(destinations) if !policy.covers_everything() => list(destinations, "nothing"),
            _ => "everything".to_owned(),
        };
        let tier = match policy.tier {
            Tier::ByPriority => String::new(),
            tier => format!("tier {tier:?}, "),
        };
        let action = if policy.is_direct() { ", action: Direct" } else { "" };
        lines.push(format!("{}. {}, {tier}priority {}, covers {covers}{action}", at + 1, named(key), policy.priority));
        if let Some(why) = passed_over(ranked) {
            lines.push(format!("   it is passed over: {why}"));
        }
        if everything.is_some_and(|everything| at > everything) {
            lines.push("   it never decides: a policy before it covers everything".to_owned());
            continue;
        }
        let status = cluster.policy_statuses.get(key);
        let conditions = status.iter().flat_map(|status| &status.conditions);
        let conditions = conditions.filter(|c| ["Accepted", "Ready"].contains(&&*c.type_));
        lines.extend(conditions.map(|c| format!("   {}={}: {}", c.type_, c.status, c.message)));
        if policy.address.count() > 1 {
            lines.push(match chosen(cluster, pod, ranked) {
                Some(chosen) => format!(
                    "   the pod has {}: {}",
                    list(&addresses_of(&chosen.address).collect::<Vec<_>>(), ""),
                    chosen.which
                ),
                None => "   it has no egress IP for this pod".to_owned(),
            });
        }
        if status.is_none() {
            lines.push("   the controller has not written its status yet".to_owned());
        }
        if policy.existing_connections == ExistingConnections::End {
            let which = if policy.is_direct() { "that have an egress IP" } else { "that began before it" };
            lines.push(format!("   connections {which} are ended (existingConnections: End)"));
        }
        if policy.fallback == Fallback::NodeAddress {
            lines.push(
                "   while it is not ready, traffic leaves from the node's address (fallback: NodeAddress)".into(),
            );
        }
    }
    if everything.is_none() {
        lines.push("Traffic that none of them covers leaves as if Egret were not there.".to_owned());
    }
    lines
}

/// Returns a function that tells why one of a pod's policies is passed over, by the allocations in the gateways'
/// statuses.
pub(super) fn passed_over(cluster: &Cluster, policies: &[&Ranked]) -> impl Fn(&Ranked) -> Option<PassedOver> {
    let allocations = cluster.allocations();
    let listed: HashSet<PolicyKey> = allocations.flat_map(|allocation| allocation.policies.iter().cloned()).collect();
    move |ranked| precedence::passed_over(ranked, policies, listed.contains(&ranked.key))
}
