//! A node's plan as it follows from the cluster's state alone, for people to read and tests to compare. It equals the
//! node's own plan except for what only the node knows: the interfaces of its pods, and its present state.

use super::allocations::{AllocationState, Facts};
use super::{NodePlan, PodPlan, View, chain_name};
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::tunnel_family::{self, internal};
use crate::model::{Client, Cluster, ObjectKey, Pod, addresses_of};
use egret_nft::Family;
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::sync::Arc;

/// An example index for the tunnel device; the examples for pods' interfaces follow.
const DEVICE_INDEX: u32 = 1000;

/// The cluster has no such node.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the cluster has no Node {0:?}; give the name that it has there with --node")]
pub struct NoSuchNode(String);

/// A node's expected plan.
#[derive(Debug)]
pub struct Expected {
    /// The cluster as the node sees it.
    pub view: View,
    /// Its plan.
    pub plan: NodePlan,
    /// The selected pods, by the names that stand for their interfaces.
    pub pods: BTreeMap<String, ObjectKey>,
}

impl Expected {
    /// Computes the plan of `node`, with `direct` as the destinations that no policy covers beside the cluster's own.
    ///
    /// # Errors
    /// The cluster has no such node.
    pub fn new(cluster: &Cluster, node: &str, direct: &[IpNetwork]) -> Result<Self, NoSuchNode> {
        let known = cluster.nodes.get(node).ok_or_else(|| NoSuchNode(node.to_owned()))?;
        let is_here = |pod: &Pod| pod.node.as_deref() == Some(node) && !pod.host_network && !pod.finished;
        let here: Vec<(&ObjectKey, &Arc<Pod>)> =
            cluster.pods.iter().filter(|(_, pod)| is_here(pod) && !pod.addresses.is_empty()).collect();
        let local_pods = here.iter().flat_map(|(_, pod)| pod.addresses.iter().copied());
        let view = View::new(cluster, node, &facts(cluster, node), direct, local_pods);
        let reported = cluster.egress_nodes.get(node).and_then(|status| status.tunnel_address);
        let family = tunnel_family::of_cluster(cluster);
        let local = reported.or_else(|| internal(known).find(|address| Family::of(address) == family));
        let mut plan = NodePlan { device: DEVICE_INDEX, local, port_log: true, ..NodePlan::default() };
        let mut pods = BTreeMap::new();
        for (key, pod) in here {
            let Some(policy_chain) = view.policy_chain(Client::of(key, pod)) else { continue };
            let number = pods.len() as u16 + 1;
            let (interface, index) = (format!("veth{number}"), DEVICE_INDEX + u32::from(number));
            let addresses = pod.addresses.to_vec();
            let planned = PodPlan {
                interface: interface.clone(),
                interface_index: index,
                addresses,
                pod_mark: number,
                policy_chain: policy_chain.name(),
            };
            plan.add(&view, chain_name(number, index), planned.into(), policy_chain.into());
            pods.insert(interface, key.clone());
        }
        plan.isolate_long_lists();
        let handed = view
            .allocations
            .allocations
            .iter()
            .filter_map(|(id, allocation)| Some((*id, (allocation.address.clone(), allocation.handed_by?))));
        plan.handed = handed.collect();
        let is_remote = |id: &EgressId| {
            matches!(
                view.allocations.allocations.get(id).map(|allocation| &allocation.state),
                Some(AllocationState::Remote(_))
            )
        };
        let leaving =
            cluster.allocations().filter(|entry| entry.leaving.as_deref() == Some(node)).map(|entry| entry.id);
        plan.left = leaving.filter(is_remote).collect();
        Ok(Expected { view, plan, pods })
    }
}

/// What the node knows of itself and of others, according to its own status.
pub fn facts(cluster: &Cluster, node: &str) -> Facts {
    let mut facts = Facts::default();
    facts.addresses.extend(cluster.nodes.get(node).iter().flat_map(|node| node.addresses.iter().copied()));
    if let Some(status) = cluster.egress_nodes.get(node).map(|status| status.of_allocations()) {
        let held = cluster.allocations().filter(|entry| status.held.contains(&entry.id));
        facts.addresses.extend(held.flat_map(|entry| addresses_of(&entry.address)));
        facts.taken = status.taken.iter().map(|taken| (taken.id, taken.since)).collect();
        facts.refused = status.refused.iter().map(|refused| (refused.id, refused.message.clone())).collect();
        facts.dead = status.unreachable_peers.iter().map(|name| Name::from(name.as_str())).collect();
    }
    facts
}
