//! What each policy is told of itself: its address, its node, its pods, and whether it works.

mod coverage;
mod notices;

pub use notices::{Notice, of_gateway, of_policy};

use super::condition::Conditions;
use super::ledger::{Grant, Outcome, Verdict, in_words};
use super::model::{Cluster, MOVE_TO, PolicyKey};
use super::precedence::{PolicyIndex, Ranked};
use crate::api::{EgressPolicyStatus, PathKind, Placement};
use coverage::Coverage;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// The reason of a policy that is not ready because its node cannot hold its address: somebody else has it, or the node
/// has no interface for it.
const REFUSED: &str = "AddressRefused";

/// Why nodes cannot hold paths, by node and path.
type Refused<'a> = HashMap<(&'a str, u16), &'a str>;

/// The status of each policy. `now` is in seconds since the Unix epoch.
pub fn report(cluster: &Cluster, outcome: &Outcome, now: i64) -> BTreeMap<PolicyKey, EgressPolicyStatus> {
    let use_of = uses(cluster);
    let held: HashMap<&str, HashSet<u16>> = cluster
        .egress_nodes
        .iter()
        .map(|(name, node)| (&**name, node.of_paths().held.iter().copied().collect()))
        .collect();
    let refused: Refused = cluster
        .egress_nodes
        .iter()
        .flat_map(|(name, node)| node.of_paths().refused.iter().map(move |r| ((&**name, r.id), r.message.as_str())))
        .collect();
    let mut statuses = BTreeMap::new();
    for (key, policy) in &cluster.policies {
        let Some(verdict) = outcome.verdicts.get(key) else { continue };
        let previous = cluster.policy_statuses.get(key).map(|s| s.conditions.as_slice()).unwrap_or_default();
        let mut conditions = Conditions::new(previous, policy.generation(), now);
        let mut status = EgressPolicyStatus::default();
        match verdict {
            Verdict::Refused(refusal) => {
                conditions.add("Accepted", false, refusal.reason, refusal.message.as_str());
                conditions.add("Ready", false, "NotAccepted", "it has no address; see the condition Accepted");
            }
            Verdict::Granted(grant) => {
                status.addresses = Some(grant.address.clone());
                status.node = grant.node.as_deref().map(str::to_owned);
                conditions.add("Accepted", true, "Accepted", accepted(grant));
                let (is_true, reason, mut message) = ready(cluster, &held, &refused, grant);
                if let Some(wanted) = policy.move_to().filter(|wanted| grant.node.as_ref() != Some(wanted)) {
                    message += &format!(
                        "; {MOVE_TO} asks for node {wanted:?}, which cannot have it now: it is no node of the gateway, \
                         is drained, does not answer, or a policy with the same path asks for another"
                    );
                }
                conditions.add("Ready", is_true, reason, message);
            }
        }
        let usage = use_of.get(key);
        status.pods = usage.map_or(0, |u| u.pods);
        match usage {
            None => conditions.add("Shadowed", false, "NoPods", "it selects no pod now"),
            Some(Usage { in_the_open: true, .. }) => {
                conditions.add("Shadowed", false, "NotShadowed", "it decides for some traffic of its pods");
            }
            Some(usage) => conditions.add("Shadowed", true, "Shadowed", shadowed(&usage.shadowed_by)),
        }
        status.conditions = conditions.finish();
        statuses.insert(key.clone(), status);
    }
    for (key, unreadable) in &cluster.unreadable {
        let previous = cluster.policy_statuses.get(key).map(|s| s.conditions.as_slice()).unwrap_or_default();
        let mut conditions = Conditions::new(previous, unreadable.generation, now);
        conditions.add("Accepted", false, "Invalid", unreadable.message.as_str());
        // What stands for it until it is mended, if anything does.
        let status = statuses.entry(key.clone()).or_default();
        if status.conditions.is_empty() {
            conditions.add("Ready", false, "NotAccepted", "it has no address; see the condition Accepted");
        }
        status.conditions.retain(|c| c.type_ != "Accepted");
        status.conditions.splice(0..0, conditions.finish());
    }
    statuses
}

fn accepted(grant: &Grant) -> String {
    let whose = match grant.kind {
        PathKind::Explicit => "as it asks for",
        PathKind::Dedicated => "its own",
        PathKind::Shared => "shared",
        PathKind::Node => "the node's own",
    };
    let note = grant.note.as_ref().map(|note| format!("; {note}")).unwrap_or_default();
    format!("it leaves from {} ({whose}) through EgressGateway {:?}{note}", in_words(&grant.address), grant.gateway)
}

/// Whether the path's node says that it holds it: status, reason and message.
fn ready(
    cluster: &Cluster,
    held: &HashMap<&str, HashSet<u16>>,
    refused: &Refused,
    grant: &Grant,
) -> (bool, &'static str, String) {
    let address = in_words(&grant.address);
    let Some(node) = &grant.node else {
        let external = cluster.gateways.get(&grant.gateway).is_some_and(|g| g.placement == Placement::External);
        let message = if external {
            format!("no node of EgressGateway {:?} has {address}; place it on one", grant.gateway)
        } else {
            format!("EgressGateway {:?} has no node; label one, or mend its nodeSelector", grant.gateway)
        };
        return (false, "NoNode", message);
    };
    if !cluster.egress_nodes.contains_key(node) {
        let message = format!("node {node:?} says nothing of itself; see whether egretd runs there");
        return (false, "NodeNotReporting", message);
    }
    let holds = |node: &str| held.get(node).is_some_and(|paths| paths.contains(&grant.id));
    if let Some(old) = grant.leaving.as_ref().filter(|old| holds(old)) {
        return (true, "AddressHeld", format!("node {old:?} holds {address} until node {node:?} does"));
    }
    if holds(node) {
        return (true, "AddressHeld", format!("node {node:?} holds {address}"));
    }
    if let Some(why) = refused.get(&(&**node, grant.id)) {
        return (false, REFUSED, format!("node {node:?} cannot hold {address}: {why}"));
    }
    let message = format!("node {node:?} does not hold {address} yet; if that lasts, see egretd's log there");
    (false, "AddressNotHeld", message)
}

fn shadowed(by: &BTreeSet<&PolicyKey>) -> String {
    let names: Vec<String> = by.iter().take(3).map(|key| key.to_string()).collect();
    let more = match by.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "for each of its pods, policies that go before it decide for all its destinations: {}{more}; \
         raise its priority, or narrow theirs",
        names.join(", ")
    )
}

/// Where a policy is of use.
#[derive(Default)]
struct Usage<'a> {
    /// How many pods it selects.
    pods: u32,
    /// Whether it decides for some destination of some pod.
    in_the_open: bool,
    /// The policies that decide in its stead.
    shadowed_by: BTreeSet<&'a PolicyKey>,
}

/// Where each policy that selects a pod is of use.
fn uses(cluster: &Cluster) -> HashMap<&PolicyKey, Usage<'_>> {
    let index = PolicyIndex::new(cluster);
    // Pods with the same policies differ in nothing here, and there are many of them.
    let mut profiles: BTreeMap<Vec<&PolicyKey>, (Vec<&Ranked>, u32)> = BTreeMap::new();
    for (key, pod) in &cluster.pods {
        if pod.host_network || pod.finished {
            continue;
        }
        let policies = index.policies_for(&key.namespace, &pod.labels);
        let keys = policies.iter().map(|r| &r.key).collect();
        profiles.entry(keys).or_insert((policies, 0)).1 += 1;
    }
    let mut uses: HashMap<&PolicyKey, Usage> = HashMap::new();
    for (policies, pods) in profiles.values() {
        let mut coverage = Coverage::default();
        for ranked in policies {
            // The index is of this cluster, and its keys live shorter.
            let Some((key, policy)) = cluster.policies.get_key_value(&ranked.key) else { continue };
            let usage = uses.entry(key).or_default();
            usage.pods += pods;
            match coverage.covers(policy) {
                Some(by) => usage.shadowed_by.extend(by),
                None => usage.in_the_open = true,
            }
            coverage.add(key, policy);
        }
    }
    uses
}

#[cfg(test)]
mod tests;
