//! `kubectl egret status`: what is wrong, and an overview of gateways, nodes and policies.

mod facts;
mod problems;
mod text;

use super::problem::Problem;
use super::state::ClusterState;
use crate::api::EgressPolicyStatus;
use crate::model::selector::Name;
use crate::model::{Policy, PolicyKey, addresses_of};
use facts::StatusFacts;
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The state of Egret in a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// What is wrong, the worst first.
    pub problems: Vec<Problem>,
    /// The gateways by name.
    pub gateways: Vec<GatewayStatus>,
    /// The nodes by name.
    pub nodes: Vec<NodeStatus>,
    /// The policies by name.
    pub policies: Vec<PolicyStatus>,
}

/// A gateway.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// Its name.
    pub name: String,
    /// Nodes that can hold its egress IPs now.
    pub ready_nodes: usize,
    /// Nodes that match its selector.
    pub nodes: usize,
    /// Its egress IPs, a pair counts once.
    pub egress_ips: usize,
    /// Its pool, by family; a family without addresses is missing.
    pub pool: Vec<PoolUse>,
    /// Policies that use it.
    pub policies: usize,
    /// Egress IPs that no node holds now.
    pub not_held: usize,
    /// Planned moves that have not ended.
    pub moving: usize,
}

/// The use of a gateway's pool in one family.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolUse {
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// Addresses that policies have.
    pub used: usize,
    /// Addresses in cooldown.
    pub cooling_down: usize,
    /// Addresses in the pool.
    pub total: u128,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// The gateways that it is a node of.
    pub gateways: Vec<String>,
    /// What it does for Egret.
    pub role: Role,
    /// The state, in a word or two.
    pub state: NodeState,
    /// The version of its daemon, if it reports one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Since when its kernel has been in sync with the cluster's state, RFC 3339; absent if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_sync_since: Option<String>,
    /// The same, in seconds until now.
    #[serde(skip)]
    pub in_sync_for: Option<i64>,
    /// How many egress IPs it holds.
    pub egress_ips: usize,
    /// Gateway nodes that do not answer it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unreachable_peers: Vec<String>,
    /// Egress IPs must move away from it: it is drained or cordoned.
    pub drained: bool,
}

/// What a node does for Egret.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Role {
    /// It can hold egress IPs.
    Gateway,
    /// It has pods, and no gateway selects it.
    #[default]
    Source,
}

/// The state of a node's daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum NodeState {
    /// It reports, and it answers the others.
    Ready,
    /// It reports that it cannot hold any egress IP.
    Unfit,
    /// The other gateway nodes do not reach it.
    Unreachable,
    /// Its kubelet reports nothing.
    Lost,
    /// No daemon has reported.
    #[default]
    NoDaemon,
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// `namespace/name`, or `name` of a ClusterEgressPolicy.
    pub name: String,
    /// Its gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Its egress IP, or all of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress_ip: Vec<IpAddr>,
    /// The node that is to hold it; of several egress IPs, the nodes with commas between them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How many pods it selects.
    pub pods: u32,
    /// Whether its egress IP works.
    pub state: PolicyState,
}

/// The state of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum PolicyState {
    /// It has no egress IP.
    Rejected,
    /// The controller has not written its status.
    #[default]
    Pending,
    /// Its egress IP is on no node.
    NotReady,
    /// The node of its egress IP reports nothing.
    Unknown,
    /// Other policies decide for all its pods.
    Shadowed,
    /// It works.
    Ready,
}

/// The state of Egret, from the state of the cluster. With a namespace, only its policies are among the result.
pub fn status(state: &ClusterState, namespace: Option<&str>) -> Status {
    let facts = StatusFacts::new(state, namespace);
    Status {
        problems: problems::problems(&facts),
        gateways: state.cluster.gateways.keys().map(|name| facts.gateway(name)).collect(),
        nodes: state.cluster.nodes.keys().map(|name| facts.node(name)).collect(),
        policies: facts.policies().map(|(key, policy)| of_policy(&facts, key, policy)).collect(),
    }
}

fn of_policy(facts: &StatusFacts, key: &PolicyKey, policy: &Policy) -> PolicyStatus {
    let status = facts.state.cluster.policy_statuses.get(key);
    let named = || policy.gateway.as_deref().map(str::to_owned);
    PolicyStatus {
        name: key.to_string(),
        gateway: status.and_then(|status| status.gateway.clone()).or_else(named),
        egress_ip: status.map(|status| list(status)).unwrap_or_default(),
        node: status.and_then(|status| nodes(status)),
        pods: status.map_or(0, |status| status.pods),
        state: status.map_or(PolicyState::Pending, |status| state_of(status)),
    }
}

fn list(status: &EgressPolicyStatus) -> Vec<IpAddr> {
    status.all_egress_ips().into_iter().flat_map(|(address, _)| addresses_of(address)).collect()
}

/// The nodes of a policy's egress IPs, each once.
fn nodes(status: &EgressPolicyStatus) -> Option<String> {
    let nodes: BTreeSet<&str> = status.all_egress_ips().into_iter().filter_map(|(_, node)| node).collect();
    (!nodes.is_empty()).then(|| nodes.into_iter().collect::<Vec<_>>().join(","))
}

/// The state that the conditions of a policy tell.
pub fn state_of(status: &EgressPolicyStatus) -> PolicyState {
    let is = |type_: &str, is: &str| status.conditions.iter().any(|c| c.type_ == type_ && c.status == is);
    if is("Accepted", "False") {
        PolicyState::Rejected
    } else if is("Shadowed", "True") {
        // Whether its egress IP works makes no difference.
        PolicyState::Shadowed
    } else if is("Ready", "False") {
        PolicyState::NotReady
    } else if is("Ready", "Unknown") {
        PolicyState::Unknown
    } else if is("Ready", "True") {
        PolicyState::Ready
    } else {
        PolicyState::Pending
    }
}

/// The names of the gateways that a node belongs to.
fn names(gateways: &[&Name]) -> Vec<String> {
    gateways.iter().map(|name| name.to_string()).collect()
}

#[cfg(test)]
mod tests;
