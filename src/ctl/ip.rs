//! `kubectl egret ip`: what an address is: the policy, the owner and the pods behind an egress IP.

use super::output::{Show, View, count, few};
use super::pods::{PodEgress, PolicyOfPod, pods};
use super::state::ClusterState;
use super::subject::{Subject, of_policies};
use crate::allocation::COOLDOWN_SECONDS;
use crate::api::{AllocationKind, Placement};
use crate::cluster::PodsOf;
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey, addresses_of};
use jiff::Timestamp;
use serde::Serialize;
use std::fmt::Write;
use std::net::IpAddr;

/// How many pods are named.
const NAMED: usize = 20;

/// What an address is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ip {
    /// The address.
    pub address: IpAddr,
    /// Allocations that have it; several only by a mistake that the gateways' conditions name.
    pub allocations: Vec<OfAllocation>,
    /// If no policy has it: what it is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// An allocation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OfAllocation {
    /// The gateway.
    pub gateway: String,
    /// How it was chosen.
    pub kind: AllocationKind,
    /// The egress ID.
    pub id: u16,
    /// The node that is to hold it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Since when that node, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// In a planned move, the node that holds it until `node` does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaving: Option<String>,
    /// The nodes that report that they hold it.
    pub held_by: Vec<String>,
    /// The policies.
    pub policies: Vec<String>,
    /// The pods that leave from it now.
    pub pods: Vec<PodEgress>,
}

/// The pods that have to be read for an address. If it is no egress IP, it may be a pod's.
pub fn pods_of(cluster: &Cluster, address: IpAddr) -> PodsOf {
    match Subject::find(cluster, &address.to_string(), "") {
        Ok(subject) => of_policies(cluster, subject.policies().unwrap_or_default()),
        Err(_) => PodsOf::All,
    }
}

/// What an address is.
pub fn ip(state: &ClusterState, address: IpAddr) -> Ip {
    let cluster = &*state.cluster;
    let mut found = Vec::new();
    for (gateway, of) in cluster.gateways.iter() {
        for allocation in of.status.allocations.iter().filter(|a| addresses_of(&a.address).any(|of| of == address)) {
            let holders = cluster.egress_nodes.iter().filter(|(_, n)| n.of_allocations().held.contains(&allocation.id));
            let policies: Vec<PolicyKey> = allocation.policies.to_vec();
            let subject = Subject::EgressIp(address, policies.clone());
            let decides = |pod: &PodEgress| {
                let is_of = |p: &PolicyOfPod| policies.iter().any(|key| key.to_string() == p.name);
                pod.policies.iter().any(|p| p.decides && is_of(p) && p.egress_ip.contains(&address))
            };
            let since = Timestamp::from_second(allocation.since).ok().filter(|_| allocation.since > 0);
            found.push(OfAllocation {
                gateway: gateway.to_string(),
                kind: allocation.kind,
                id: allocation.id,
                node: allocation.node.as_deref().map(str::to_owned),
                since: since.map(|since| since.to_string()),
                leaving: allocation.leaving.as_deref().map(str::to_owned),
                held_by: holders.map(|(name, _)| name.to_string()).collect(),
                policies: policies.iter().map(ToString::to_string).collect(),
                pods: pods(state, Some(&subject), None).pods.into_iter().filter(decides).collect(),
            });
        }
    }
    let notes = if found.is_empty() { notes(state, address) } else { Vec::new() };
    Ip { address, allocations: found, notes }
}

/// What an address is that no policy has.
fn notes(state: &ClusterState, address: IpAddr) -> Vec<String> {
    let cluster = &*state.cluster;
    let mut notes = Vec::new();
    for (name, gateway) in cluster.gateways.iter() {
        let released = gateway.status.released.iter().filter(|r| addresses_of(&r.address).any(|of| of == address));
        for released in released.filter(|r| r.at + COOLDOWN_SECONDS > state.now) {
            notes.push(format!(
                "It was given back by {} and is in cooldown for {} s more; a policy that asks again gets it back.",
                few(&released.policies, 3),
                released.at + COOLDOWN_SECONDS - state.now
            ));
        }
        if gateway.pool.iter().any(|range| range.contains(address)) {
            let placed = if gateway.placement == Placement::External { ", which something else places" } else { "" };
            notes.push(format!("It is in the pool of EgressGateway {name}{placed}, and no policy has it."));
        }
        if gateway.reservations.iter().any(|reserved| reserved.contains(address)) {
            notes.push(format!("EgressGateway {name} reserves it for the policies of some namespaces that name it."));
        }
    }
    let node: Option<&Name> = cluster.nodes.iter().find(|(_, n)| n.addresses.contains(&address)).map(|(name, _)| name);
    notes.extend(node.map(|name| format!("It is an address of node {name}.")));
    let pod = cluster.pods.iter().find(|(_, pod)| pod.addresses.contains(&address) && !pod.finished);
    notes.extend(pod.map(|(key, pod)| match pod.host_network {
        true => format!("It is an address of pod {key}, which uses its node's network."),
        false => format!("It is the address of pod {key}; `kubectl egret why {key}` tells how it leaves the cluster."),
    }));
    if notes.is_empty() {
        notes.push("It is in no gateway's pool, and neither a node's nor a pod's.".to_owned());
    }
    notes
}

impl Show for Ip {
    fn text(&self, view: View) -> String {
        let mut out = String::new();
        for note in &self.notes {
            let _ = writeln!(out, "{}: {note}", self.address);
        }
        for of in &self.allocations {
            let since = of.since.as_deref().map(|since| format!(" since {since}")).unwrap_or_default();
            let held = match of.held_by.as_slice() {
                [] => "held by no node now".to_owned(),
                some => format!("held by {}", few(some, 3)),
            };
            let leaving = of.leaving.as_deref().map(|old| format!(", moving away from {old}")).unwrap_or_default();
            let _ = writeln!(
                out,
                "{}: egress IP of EgressGateway {} ({:?}, id {}), assigned to {}{since}{leaving}, {held}",
                self.address,
                of.gateway,
                of.kind,
                of.id,
                of.node.as_deref().unwrap_or("no node")
            );
            let most = if view.wide { usize::MAX } else { NAMED };
            let _ = writeln!(out, "policies: {}", few(&of.policies, most));
            let names: Vec<String> = of.pods.iter().map(|pod| pod.pod.clone()).collect();
            let named = if names.is_empty() { String::new() } else { format!(": {}", few(&names, most)) };
            let _ = writeln!(out, "{} from it now{named}", count(names.len(), "pod leaves", "pods leave"));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, naming};
    use std::sync::Arc;

    #[test]
    fn an_address_is_explained() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        world.policy("shop/visitors", naming(&["192.0.2.50"]));
        world.policy("shop/gone", naming(&["192.0.2.58"]));
        world.pod("shop", "visitor", &[]);
        world.report();
        world.settle();
        world.without_policy("shop/gone");
        world.report();
        let state =
            ClusterState { cluster: Arc::new(world.cluster.clone()), now: world.now + 60, ..ClusterState::default() };
        let text = |address: &str| ip(&state, address.parse().unwrap()).text(View::default());
        let used = text("192.0.2.50");
        for words in [
            "EgressGateway g (Explicit, id ",
            "held by n",
            "policies: shop/visitors",
            "1 pod leaves from it now: shop/visitor",
        ] {
            assert!(used.contains(words), "{words:?} is not in {used}");
        }
        assert!(
            text("192.0.2.58").contains("given back by shop/gone and is in cooldown for 540 s"),
            "{}",
            text("192.0.2.58")
        );
        assert!(text("192.0.2.59").contains("in the pool of EgressGateway g, and no policy has it"));
        assert!(text("10.0.0.1").contains("an address of node n1"));
        assert!(text("203.0.113.9").contains("in no gateway's pool"));
    }
}
