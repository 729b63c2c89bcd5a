//! Changes of policies, of gateways, and of where egress IPs are.

use super::egress::falls_back;
use super::{Change, Computed};
use crate::api::{Condition, EgressGatewayStatus, EgressPolicyStatus};
use crate::ctl::pods::list;
use crate::ctl::status::{PolicyState, state_of};
use crate::model::{PolicyKey, addresses_of};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The policies whose state or egress IP changes.
pub(super) fn policies(before: &Computed, after: &Computed) -> Vec<Change> {
    let keys: BTreeSet<&PolicyKey> = before.reports.keys().chain(after.reports.keys()).collect();
    let each = keys.into_iter().filter_map(|key| policy(before, after, key));
    each.collect()
}

fn policy(before: &Computed, after: &Computed, key: &PolicyKey) -> Option<Change> {
    let object = format!("{} {key}", if key.namespace.is_some() { "EgressPolicy" } else { "ClusterEgressPolicy" });
    let change = |worse: bool, message: String| Some(Change { object: object.clone(), worse, message });
    let (old, new) = (before.reports.get(key), after.reports.get(key));
    let (Some(new), policy) = (new, after.cluster.policies.get(key)) else {
        let address = old.map(addresses).unwrap_or_default();
        return change(
            false,
            format!(
                "is deleted{}",
                if address.is_empty() { String::new() } else { format!(", {address} is given back") }
            ),
        );
    };
    let state = decided(new);
    let was = old.map(decided);
    let words = |status: &EgressPolicyStatus, state| match state {
        PolicyState::Rejected => {
            let passes = policy.is_some_and(|policy| falls_back(policy.fallback));
            let traffic = if passes { "and is passed over" } else { "and its pods' traffic is blocked" };
            format!("is rejected, {traffic}: {}", message(&status.conditions, "Accepted"))
        }
        PolicyState::Shadowed => format!("is shadowed: {}", message(&status.conditions, "Shadowed")),
        _ if policy.is_some_and(|policy| policy.is_direct()) => "lets what it covers leave directly".to_owned(),
        _ => format!("has {} from EgressGateway {}", addresses(status), status.gateway.as_deref().unwrap_or_default()),
    };
    match was {
        None => change(state != PolicyState::Ready, format!("is new; it {}", words(new, state))),
        Some(was) if was != state => change(state < was, format!("{} (now {})", words(new, state), word(was))),
        Some(_) if old.map(addresses) != Some(addresses(new)) && state != PolicyState::Rejected => change(
            false,
            format!("changes from {} to {}", old.map(address_or_direct).unwrap_or_default(), address_or_direct(new)),
        ),
        Some(_) => None,
    }
}

/// The state without what only nodes can tell.
fn decided(status: &EgressPolicyStatus) -> PolicyState {
    let is_shadowed = status.conditions.iter().any(|c| c.type_ == "Shadowed" && c.status == "True");
    match state_of(status) {
        PolicyState::Rejected => PolicyState::Rejected,
        _ if is_shadowed => PolicyState::Shadowed,
        _ => PolicyState::Ready,
    }
}

fn word(state: PolicyState) -> &'static str {
    match state {
        PolicyState::Rejected => "rejected",
        PolicyState::Shadowed => "shadowed",
        _ => "in force",
    }
}

fn addresses(status: &EgressPolicyStatus) -> String {
    let all: Vec<IpAddr> = status.all_egress_ips().into_iter().flat_map(|(address, _)| addresses_of(address)).collect();
    list(&all)
}

fn address_or_direct(status: &EgressPolicyStatus) -> String {
    Some(addresses(status)).filter(|text| !text.is_empty()).unwrap_or_else(|| "direct".to_owned())
}

fn message(conditions: &[Condition], type_: &str) -> String {
    conditions.iter().find(|c| c.type_ == type_).map(|c| c.message.clone()).unwrap_or_default()
}

/// The gateways whose conditions change.
pub(super) fn gateways(before: &Computed, after: &Computed) -> Vec<Change> {
    let names: BTreeSet<_> = before.outcome.gateways.keys().chain(after.outcome.gateways.keys()).collect();
    let mut all = Vec::new();
    for name in names {
        let object = format!("EgressGateway {name}");
        let (old, new) = (before.outcome.gateways.get(name), after.outcome.gateways.get(name));
        let mut add = |worse, message: String| all.push(Change { object: object.clone(), worse, message });
        match (old, new) {
            (_, None) => add(true, "is deleted; its policies have no egress IP".to_owned()),
            (None, Some(new)) => add(false, format!("is new, with {} nodes{}", new.nodes.len(), bad(new))),
            (Some(old), Some(new)) => conditions(old, new, add),
        }
    }
    all
}

fn bad(status: &EgressGatewayStatus) -> String {
    let bad = status.conditions.iter().filter(|c| c.status == "False");
    bad.map(|c| format!("; {}: {}", c.reason, c.message)).collect()
}

fn conditions(old: &EgressGatewayStatus, new: &EgressGatewayStatus, mut add: impl FnMut(bool, String)) {
    for condition in &new.conditions {
        let was = old.conditions.iter().find(|c| c.type_ == condition.type_);
        if was.is_some_and(|was| (&was.status, &was.reason) == (&condition.status, &condition.reason)) {
            continue;
        }
        let what =
            if condition.type_ == "AddressesLeft" && condition.status == "False" { "its pool runs out: " } else { "" };
        add(condition.status != "True", format!("{what}{}: {}", condition.reason, condition.message));
    }
    if old.nodes != new.nodes {
        let gone: Vec<&String> = old.nodes.iter().filter(|node| !new.nodes.contains(node)).collect();
        let more: Vec<&String> = new.nodes.iter().filter(|node| !old.nodes.contains(node)).collect();
        let listed = |what: &str, nodes: &[&String]| match nodes {
            [] => String::new(),
            some => format!("{what} {}", some.iter().map(|node| node.as_str()).collect::<Vec<_>>().join(", ")),
        };
        let parts = [listed("loses", &gone), listed("gains", &more)].into_iter().filter(|part| !part.is_empty());
        add(new.nodes.is_empty(), format!("{} of its nodes", parts.collect::<Vec<_>>().join(" and ")));
    }
}

/// Egress IPs that are assigned to another node.
pub(super) fn moves(before: &Computed, after: &Computed) -> Vec<Change> {
    let of = |computed: &Computed| -> BTreeMap<u16, (String, Option<String>)> {
        let all = computed.outcome.gateways.values().flat_map(|status| &status.allocations);
        let each = all.map(|a| {
            let addresses: Vec<IpAddr> = addresses_of(&a.address).collect();
            (a.id, (list(&addresses), a.node.as_deref().map(str::to_owned)))
        });
        each.collect()
    };
    let (old, new) = (of(before), of(after));
    let moved = new.into_iter().filter_map(|(id, (address, node))| {
        let (was_address, was) = old.get(&id)?;
        let is_same = *was_address == address && *was == node;
        let name = |node: &Option<String>| node.clone().unwrap_or_else(|| "no node".to_owned());
        let then = if node.is_some() { "its connections continue" } else { "its traffic is blocked" };
        let message = format!("moves from {} to {}; {then}", name(was), name(&node));
        (!is_same && *was_address == address).then(|| Change { object: address, worse: node.is_none(), message })
    });
    moved.collect()
}
