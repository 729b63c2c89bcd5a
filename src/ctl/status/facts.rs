//! What follows from the state of the cluster about its gateways and nodes.

use super::{GatewayStatus, NodeState, NodeStatus, PoolUse, Role, names};
use crate::allocation::{COOLDOWN_SECONDS, unreachable};
use crate::api::{AddressPair, AllocationKind};
use crate::ctl::state::ClusterState;
use crate::model::drain::is_drained;
use crate::model::egress_node::OfAllocations;
use crate::model::selector::Name;
use crate::model::{AddressRange, Gateway, Policy, PolicyKey};
use jiff::Timestamp;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// See the module.
pub(super) struct StatusFacts<'a> {
    pub(super) state: &'a ClusterState,
    namespace: Option<&'a str>,
    unreachable: HashSet<&'a str>,
    /// The nodes of each gateway, sorted.
    pub(super) members: BTreeMap<&'a Name, Vec<&'a Name>>,
    /// The gateways of each node.
    gateways_of: HashMap<&'a Name, Vec<&'a Name>>,
    /// The nodes that hold each egress IP.
    pub(super) holders: HashMap<u16, Vec<&'a Name>>,
}

impl<'a> StatusFacts<'a> {
    pub(super) fn new(state: &'a ClusterState, namespace: Option<&'a str>) -> Self {
        let cluster = &*state.cluster;
        let mut members: BTreeMap<&Name, Vec<&Name>> = BTreeMap::new();
        let mut gateways_of: HashMap<&Name, Vec<&Name>> = HashMap::new();
        for (name, gateway) in cluster.gateways.iter() {
            let nodes = cluster.nodes.iter().filter(|(_, node)| gateway.nodes.matches(&node.labels));
            let nodes: Vec<&Name> = nodes.map(|(name, _)| name).collect();
            nodes.iter().for_each(|node| gateways_of.entry(node).or_default().push(name));
            members.insert(name, nodes);
        }
        let mut holders: HashMap<u16, Vec<&Name>> = HashMap::new();
        for (name, node) in cluster.egress_nodes.iter() {
            for id in &node.of_allocations().held {
                holders.entry(*id).or_default().push(name);
            }
        }
        StatusFacts { state, namespace, unreachable: unreachable(cluster), members, gateways_of, holders }
    }

    /// The policies that were asked for.
    pub(super) fn policies(&self) -> impl Iterator<Item = (&'a PolicyKey, &'a Arc<Policy>)> + use<'a> {
        let namespace = self.namespace;
        let wanted = move |key: &PolicyKey| namespace.is_none_or(|n| key.namespace.as_deref() == Some(n));
        self.state.cluster.policies.iter().filter(move |(key, _)| wanted(key))
    }

    /// The state of a node's daemon.
    pub(super) fn state_of(&self, name: &Name) -> NodeState {
        let cluster = &*self.state.cluster;
        let Some(status) = cluster.egress_nodes.get(name) else { return NodeState::NoDaemon };
        if cluster.nodes.get(name).is_some_and(|node| node.is_lost(self.state.now)) {
            return NodeState::Lost;
        }
        let reports_itself = status.of_allocations().unreachable_peers.iter().any(|peer| **peer == **name);
        match self.unreachable.contains(&**name) {
            true if reports_itself => NodeState::Unfit,
            true => NodeState::Unreachable,
            false => NodeState::Ready,
        }
    }

    /// What a node reports about egress IPs.
    pub(super) fn reports(&self, name: &Name) -> Option<&'a OfAllocations> {
        self.state.cluster.egress_nodes.get(name).map(|node| node.of_allocations())
    }

    /// Whether a node belongs to a gateway.
    pub(super) fn is_gateway_node(&self, name: &Name) -> bool {
        self.gateways_of.contains_key(name)
    }

    pub(super) fn gateway(&self, name: &Name) -> GatewayStatus {
        let Some(gateway) = self.state.cluster.gateways.get(name) else { return GatewayStatus::default() };
        let members = self.members.get(name).map(Vec::as_slice).unwrap_or_default();
        let allocations = &gateway.status.allocations;
        let users: HashSet<&PolicyKey> = allocations.iter().flat_map(|a| &a.policies).collect();
        GatewayStatus {
            name: name.to_string(),
            ready_nodes: members.iter().filter(|node| self.state_of(node) == NodeState::Ready).count(),
            nodes: members.len(),
            egress_ips: allocations.len(),
            pool: pool(gateway, self.state.now),
            policies: users.len(),
            not_held: allocations.iter().filter(|a| !self.holders.contains_key(&a.id)).count(),
            moving: allocations.iter().filter(|a| a.leaving.is_some()).count(),
        }
    }

    pub(super) fn node(&self, name: &Name) -> NodeStatus {
        let cluster = &*self.state.cluster;
        let gateways = self.gateways_of.get(name).map(Vec::as_slice).unwrap_or_default();
        let reports = self.reports(name);
        let in_sync_since = reports.and_then(|reports| reports.in_sync_since.as_deref());
        let drained = |gateway: &&Name| {
            let (gateway, node) = (cluster.gateways.get(*gateway), cluster.nodes.get(name));
            gateway.zip(node).is_some_and(|(gateway, node)| is_drained(gateway, node))
        };
        NodeStatus {
            name: name.to_string(),
            gateways: names(gateways),
            state: self.state_of(name),
            role: if gateways.is_empty() { Role::Source } else { Role::Gateway },
            version: reports.and_then(|reports| reports.version.as_deref()).map(str::to_owned),
            in_sync_since: in_sync_since.map(str::to_owned),
            in_sync_for: in_sync_since
                .and_then(|since| Some(self.state.now - since.parse::<Timestamp>().ok()?.as_second())),
            egress_ips: reports.map_or(0, |reports| reports.held.len()),
            unreachable_peers: reports.map(|reports| reports.unreachable_peers.clone()).unwrap_or_default(),
            drained: gateways.iter().any(drained),
        }
    }
}

/// The use of a gateway's pool.
fn pool(gateway: &Gateway, now: i64) -> Vec<PoolUse> {
    let families = [("IPv4", true), ("IPv6", false)];
    let of = |(family, is_v4): (&'static str, bool)| {
        let address = move |pair: &AddressPair| match is_v4 {
            true => pair.ipv4.is_some(),
            false => pair.ipv6.is_some(),
        };
        let total: u128 = gateway.pool.iter().filter(|range| range.first.is_ipv4() == is_v4).map(size).sum();
        let from_pool = gateway.status.allocations.iter().filter(|a| a.kind != AllocationKind::Node);
        let cooling = gateway.status.released.iter().filter(|r| r.at + COOLDOWN_SECONDS > now);
        (total > 0).then(|| PoolUse {
            family,
            used: from_pool.filter(|a| address(&a.address)).count(),
            cooling_down: cooling.filter(|r| address(&r.address)).count(),
            total,
        })
    };
    families.into_iter().filter_map(of).collect()
}

/// How many addresses a range has.
fn size(range: &AddressRange) -> u128 {
    use std::net::IpAddr::{V4, V6};
    match (range.first, range.last) {
        (V4(first), V4(last)) => u128::from(last.to_bits().saturating_sub(first.to_bits())) + 1,
        (V6(first), V6(last)) => last.to_bits().saturating_sub(first.to_bits()).saturating_add(1),
        _ => 0,
    }
}
