//! Where egress IPs are, and whether they can be elsewhere.

use crate::allocation::unreachable;
use crate::api::{Allocation, AllocationKind, Placement};
use crate::ctl::pods::list;
use crate::ctl::state::ClusterState;
use crate::ctl::subject::Subject;
use crate::model::capacity::Capacity;
use crate::model::drain::is_drained;
use crate::model::selector::Name;
use crate::model::{Gateway, PolicyKey, addresses_of};
use anyhow::{Context, bail};
use std::net::IpAddr;

/// An egress IP, with what decides whether and where it can move.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MovableIp {
    pub(super) id: u16,
    /// The address or the pair, as text.
    pub(super) egress_ip: String,
    pub(super) gateway: Name,
    kind: AllocationKind,
    policies: Vec<PolicyKey>,
    /// The node that it is assigned to.
    pub(super) node: Option<Name>,
    pub(super) leaving: Option<Name>,
    /// The nodes that report that they hold it.
    pub(super) held_by: Vec<String>,
}

impl MovableIp {
    /// All egress IPs.
    pub(super) fn all(state: &ClusterState) -> Vec<MovableIp> {
        let cluster = &*state.cluster;
        let gateways = cluster.gateways.iter();
        let each = gateways.flat_map(|(gateway, of)| of.status.allocations.iter().map(move |a| (gateway, a)));
        let ip = |(gateway, allocation): (&Name, &crate::api::Allocation)| {
            let addresses: Vec<IpAddr> = addresses_of(&allocation.address).collect();
            let holders = cluster.egress_nodes.iter().filter(|(_, n)| n.of_allocations().held.contains(&allocation.id));
            MovableIp {
                id: allocation.id,
                egress_ip: list(&addresses),
                gateway: gateway.clone(),
                kind: allocation.kind,
                policies: allocation.policies.to_vec(),
                node: allocation.node.clone(),
                leaving: allocation.leaving.clone(),
                held_by: holders.map(|(name, _)| name.to_string()).collect(),
            }
        };
        each.map(ip).collect()
    }

    /// The egress IPs that a node holds or is assigned.
    pub(super) fn on_node(state: &ClusterState, node: &str) -> Vec<MovableIp> {
        let is_there =
            |ip: &MovableIp| ip.held_by.iter().any(|holder| holder == node) || ip.node.as_deref() == Some(node);
        MovableIp::all(state).into_iter().filter(is_there).collect()
    }

    /// The policies of this egress IP that ask for a node.
    pub(super) fn annotated(&self, state: &ClusterState) -> Vec<PolicyKey> {
        let asks = |key: &&PolicyKey| state.cluster.policies.get(*key).is_some_and(|policy| policy.move_to().is_some());
        self.policies.iter().filter(asks).cloned().collect()
    }

    /// The policies that must ask for the node. The most senior policy that asks decides, so every one that asks now
    /// asks for the new node, or, if none does, the first one.
    pub(super) fn to_annotate(&self, state: &ClusterState) -> Vec<PolicyKey> {
        let annotated = self.annotated(state);
        if annotated.is_empty() { self.policies.first().cloned().into_iter().collect() } else { annotated }
    }

    /// Why it cannot move away from a node that is drained.
    pub(super) fn cannot_leave(&self, state: &ClusterState, node: &str) -> Option<String> {
        let gateway = state.cluster.gateways.get(&self.gateway)?;
        if let Some(why) = self.is_fixed(gateway) {
            return Some(why);
        }
        let others =
            state.cluster.nodes.iter().filter(|(name, n)| ***name != *node && gateway.nodes.matches(&n.labels));
        let able = others.map(|(name, _)| name).any(|name| why_not(state, self, name).is_none());
        (!able).then(|| format!("EgressGateway {} has no other node that can hold it; label one", self.gateway))
    }

    /// Why no command can move it.
    fn is_fixed(&self, gateway: &Gateway) -> Option<String> {
        if gateway.placement == Placement::External {
            return Some("something else places it (placement: External); move it there".to_owned());
        }
        let own = "it is a node's own address (allocate: Node), which belongs to that node; to leave from another \
                   node's address, change the gateway's nodes";
        (self.kind == AllocationKind::Node).then(|| own.to_owned())
    }
}

/// The egress IP that a user names, by its address or by a policy.
///
/// # Errors
/// There is none.
pub(super) fn allocation_of(state: &ClusterState, what: &str, namespace: &str) -> anyhow::Result<MovableIp> {
    let subject = Subject::find(&state.cluster, what, namespace)?;
    let all = MovableIp::all(state).into_iter();
    let found = match &subject {
        Subject::EgressIp(address, _) => {
            let text = address.to_string();
            all.clone().find(|ip| ip.egress_ip.split(',').any(|of| of == text))
        }
        Subject::Policy(key) => all.clone().find(|ip| ip.policies.contains(key)),
        Subject::Node(name) => {
            bail!("{name} is a node; name an egress IP or a policy, or use `kubectl egret drain {name}`")
        }
    };
    found.with_context(|| format!("{what} has no egress IP now; `kubectl egret status` tells why"))
}

/// Why an egress IP cannot be on a node now, with the remedy.
pub(super) fn why_not(state: &ClusterState, ip: &MovableIp, to: &str) -> Option<String> {
    let cluster = &*state.cluster;
    let gateway = cluster.gateways.get(&ip.gateway)?;
    if let Some(why) = ip.is_fixed(gateway) {
        return Some(why);
    }
    let Some(node) = cluster.nodes.get(to) else { return Some("the cluster has no such node".to_owned()) };
    if !gateway.nodes.matches(&node.labels) {
        return Some(format!(
            "it is no node of EgressGateway {}; label it as the gateway's spec.nodeSelector asks",
            ip.gateway
        ));
    }
    if is_drained(gateway, node) {
        return Some(
            "the node is drained or cordoned; `kubectl egret drain --undo` or `kubectl uncordon` ends that".to_owned(),
        );
    }
    let Some(report) = cluster.egress_nodes.get(to) else {
        return Some("no daemon of Egret's has reported there; see whether the DaemonSet has a pod on it".to_owned());
    };
    if node.is_lost(state.now) || unreachable(cluster).contains(to) {
        return Some("the node does not answer now; see whether it and egretd run".to_owned());
    }
    let there = |a: &&Allocation| {
        a.kind != AllocationKind::Node && [&a.node, &a.leaving].into_iter().flatten().any(|node| **node == *to)
    };
    let count = gateway.status.allocations.iter().filter(there).count();
    let is_here = ip.node.as_deref() == Some(to) || ip.leaving.as_deref() == Some(to);
    let capacity = Capacity::of(gateway, node);
    if !is_here && !capacity.has_room(u32::try_from(count).unwrap_or(u32::MAX)) {
        return Some(format!(
            "the node has {count} egress IPs of EgressGateway {}, as many as it may; raise maxEgressIPs in the gateway's \
             spec.capacity, or move another one away",
            ip.gateway
        ));
    }
    let refused = report.of_allocations().refused.iter().find(|refused| refused.id == ip.id);
    refused.map(|refused| refused.message.clone())
}
