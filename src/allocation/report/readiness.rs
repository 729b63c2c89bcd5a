//! Whether egress IPs are on their nodes, by what nodes report.

use crate::allocation::room::{NODES_FULL, Room};
use crate::allocation::services::Announcements;
use crate::allocation::{AllocationResult, Grant, in_words, unreachable};
use crate::api::{AllocationKind, Placement, PolicyEgressIp};
use crate::model::egress_node::OfAllocations;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::model::{Cluster, Gateway, Node, ObjectKey, PolicyKey};
use std::collections::{BTreeMap, HashMap, HashSet};

/// The reason of `Ready=False` when the node cannot hold the egress IP: another host has the address, or the node has
/// no interface for it.
pub(super) const REFUSED: &str = "AddressRefused";

/// The reason of `Ready=False` when no node of the gateway announces the Service's address.
const NOT_ANNOUNCED: &str = "AddressNotAnnounced";

/// The reason of `Ready=Unknown` when the kubelet of the node that held the egress IP reports nothing.
const STATUS_UNKNOWN: &str = "NodeStatusUnknown";

/// At most so many of a policy's egress IPs are named.
pub(super) const NAMED: usize = 3;

/// What nodes report about egress IPs and about each other.
pub(super) struct NodeReports<'a> {
    cluster: &'a Cluster,
    /// The room on the nodes of each gateway.
    rooms: HashMap<&'a Name, Room<'a>>,
    held: HashMap<&'a str, HashSet<u16>>,
    /// Why a node cannot hold an egress IP.
    refused: HashMap<(&'a str, u16), &'a str>,
    /// Nodes that count as unreachable.
    unreachable: HashSet<&'a str>,
    /// The nodes on which a policy lists too many destinations.
    pub(super) over_limit: BTreeMap<&'a PolicyKey, Vec<&'a str>>,
}

/// Whether an egress IP is on its node.
pub(super) struct Readiness {
    /// `None`: unknown.
    pub(super) is_ready: Option<bool>,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Readiness {
    fn new(is_ready: Option<bool>, reason: &'static str, message: String) -> Self {
        Readiness { is_ready, reason, message }
    }
}

pub(super) fn egress_ip((grant, readiness): (&Grant, &Readiness)) -> PolicyEgressIp {
    let ready = match readiness.is_ready {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    PolicyEgressIp {
        address: grant.address.clone(),
        ordinal: grant.ordinal,
        node: grant.node.as_deref().map(str::to_owned),
        ready: ready.to_owned(),
    }
}

/// The readiness of a policy with these egress IPs: that of the one that is worst off.
pub(super) fn together(mut each: Vec<Readiness>) -> Readiness {
    let rank = |readiness: &Readiness| readiness.is_ready.map_or(1, |is_ready| if is_ready { 2 } else { 0 });
    let (all, ready) = (each.len(), each.iter().filter(|readiness| readiness.is_ready == Some(true)).count());
    let worst = (0..all).min_by_key(|at| rank(&each[*at])).unwrap_or_default();
    if all > 1 && ready == all {
        let named: Vec<&str> = each.iter().take(NAMED).map(|readiness| readiness.message.as_str()).collect();
        let more = if all > NAMED { format!("; and {} more", all - NAMED) } else { String::new() };
        let message = named.join("; ") + &more;
        return Readiness { message, ..each.swap_remove(worst) };
    }
    let of_all = if all > 1 { format!("{ready} of {all} egress IPs are held: ") } else { String::new() };
    let worst = each.swap_remove(worst);
    Readiness { message: of_all + &worst.message, ..worst }
}

impl<'a> NodeReports<'a> {
    pub(super) fn new(cluster: &'a Cluster, outcome: &AllocationResult) -> Self {
        let nodes = || cluster.egress_nodes.iter().map(|(name, node)| (&**name, node.of_allocations()));
        let refused = |(name, allocations): (&'a str, &'a OfAllocations)| {
            allocations.refused.iter().map(move |refused| ((name, refused.id), refused.message.as_str()))
        };
        let mut over_limit: BTreeMap<&PolicyKey, Vec<&str>> = BTreeMap::new();
        for (name, allocations) in nodes().filter(|(name, _)| cluster.nodes.contains_key(*name)) {
            for policy in &allocations.over_limit {
                over_limit.entry(policy).or_default().push(name);
            }
        }
        let unreachable = unreachable(cluster);
        let room = |(name, gateway): (&'a Name, &Gateway)| {
            let allocations =
                outcome.gateways.get(name).map(|status| status.allocations.as_slice()).unwrap_or_default();
            (name, Room::new(cluster, gateway, allocations, |node| !unreachable.contains(&**node)))
        };
        NodeReports {
            cluster,
            rooms: cluster.gateways.iter().map(|(name, gateway)| room((name, &**gateway))).collect(),
            held: nodes().map(|(name, allocations)| (name, allocations.held.iter().copied().collect())).collect(),
            refused: nodes().flat_map(refused).collect(),
            unreachable,
            over_limit,
        }
    }

    /// The nodes of the gateway that count as alive.
    pub(super) fn living(&self, gateway: &Gateway, now: i64) -> Vec<&'a Name> {
        let lives = |name: &Name, node: &Node| {
            !node.is_lost(now) && !self.unreachable.contains(&**name) && self.cluster.egress_nodes.contains_key(name)
        };
        let nodes = self.cluster.nodes.iter().filter(|(_, node)| gateway.nodes.matches(&node.labels));
        nodes.filter(|(name, node)| lives(name, node)).map(|(name, _)| name).collect()
    }

    /// Whether the report of the holder that it holds the egress IP is still valid. A node that has died cannot
    /// withdraw its report. But if other nodes are alive, they would report it as unreachable, or take over.
    fn is_believed(&self, holder: &Name, grant: &Grant, living: &[&Name]) -> bool {
        if living.contains(&holder) {
            return true;
        }
        let room = self.rooms.get(&grant.gateway);
        let has_room = |node: &Name| room.is_none_or(|room| room.has_room(node));
        let takes_over = |node: &&Name| has_room(node) && !self.refused.contains_key(&(&***node, grant.id));
        // Even if its kubelet reports nothing, other nodes would report it as unreachable.
        let others_would_tell = !self.unreachable.contains(&**holder) && !living.is_empty();
        let moves = !self.is_external(grant) && grant.kind != AllocationKind::Node;
        others_would_tell || moves && living.iter().any(takes_over)
    }

    /// Whether the egress IP has external placement.
    fn is_external(&self, grant: &Grant) -> bool {
        self.cluster.gateways.get(&grant.gateway).is_some_and(|g| g.placement == Placement::External)
    }

    fn holds(&self, node: &str, allocation: u16) -> bool {
        self.held.get(node).is_some_and(|allocations| allocations.contains(&allocation))
    }

    /// The uplinks and families that the holder needs and has lost, as text.
    fn lost(&self, holder: &Name, grant: &Grant) -> String {
        let gateway = self.cluster.gateways.get(&grant.gateway);
        let interface = gateway.and_then(|gateway| gateway.uplink_name());
        let probed = gateway.map(|gateway| gateway.probed()).unwrap_or_default();
        let Some(reports) = self.cluster.egress_nodes.get(holder) else { return String::new() };
        let needs = UplinkKey::with_probes(&grant.address, interface.as_ref(), &grant.gateway, probed);
        let lost = needs.filter_map(|key| reports.of_allocations().loss(&key).map(|lost| (key, lost)));
        lost.map(|(key, lost)| format!("; it has lost {key}, and no other node has lost less: {}", lost.message))
            .collect()
    }

    /// Why a Service's address has no node, as text.
    fn not_announced(&self, grant: &Grant, service: &ObjectKey) -> String {
        let (address, gateway) = (in_words(&grant.address), &grant.gateway);
        match Announcements::new(self.cluster).node_of(service, |_| true) {
            Some(node) => format!(
                "node {node:?} announces {address} of Service {service}, and is not a node of EgressGateway {gateway:?}; \
                 make it one (spec.nodeSelector)"
            ),
            None => format!(
                "no node announces {address} of Service {service}: no node of EgressGateway {gateway:?} has it on an \
                 interface, and neither kube-vip, MetalLB nor Cilium names one; see whether its load balancer works"
            ),
        }
    }

    /// The readiness if the node does not answer and no other node has room.
    fn no_room(&self, node: &Name, grant: &Grant) -> Option<Readiness> {
        let room = self.rooms.get(&grant.gateway).filter(|room| room.is_full())?;
        let message = format!(
            "node {node:?}, which had {}, does not answer, and no other node has room for it; {}",
            in_words(&grant.address),
            room.full_nodes()
        );
        self.unreachable.contains(&**node).then(|| Readiness::new(Some(false), NODES_FULL, message))
    }

    /// Whether the egress IP is on its node. `living` has the nodes of the gateway that count as alive.
    pub(super) fn ready(&self, grant: &Grant, living: &[&Name]) -> Readiness {
        let address = in_words(&grant.address);
        let Some(node) = &grant.node else {
            if let Some(service) = &grant.service {
                return Readiness::new(Some(false), NOT_ANNOUNCED, self.not_announced(grant, service));
            }
            if let Some(room) = self.rooms.get(&grant.gateway).filter(|room| room.is_limited()) {
                let message = format!("no node has room for {address}; {}", room.full_nodes());
                return Readiness::new(Some(false), NODES_FULL, message);
            }
            let message = if self.is_external(grant) {
                format!("no node of EgressGateway {:?} has {address}; place it on one", grant.gateway)
            } else {
                format!("EgressGateway {:?} has no node; label one, or correct its nodeSelector", grant.gateway)
            };
            return Readiness::new(Some(false), "NoNode", message);
        };
        if !self.cluster.egress_nodes.contains_key(node) {
            let message = format!("node {node:?} has no status; see whether egretd runs there");
            return Readiness::new(Some(false), "NodeNotReporting", message);
        }
        let old = grant.leaving.as_ref().filter(|old| self.holds(old, grant.id));
        let holder = old.or(Some(node).filter(|node| self.holds(node, grant.id)));
        let Some(holder) = holder else {
            if let Some(full) = self.no_room(node, grant) {
                return full;
            }
            return match self.refused.get(&(&**node, grant.id)) {
                Some(why) => {
                    Readiness::new(Some(false), REFUSED, format!("node {node:?} cannot hold {address}: {why}"))
                }
                None => {
                    let message =
                        format!("node {node:?} does not hold {address} yet; if that lasts, see egretd's log there");
                    Readiness::new(Some(false), "AddressNotHeld", message)
                }
            };
        };
        if !self.is_believed(holder, grant, living) {
            if let Some(full) = self.no_room(holder, grant) {
                return full;
            }
            let message =
                format!("node {holder:?} held {address}, and its kubelet reports nothing now; see whether it runs");
            return Readiness::new(None, STATUS_UNKNOWN, message);
        }
        let lost = self.lost(holder, grant);
        let until = old.map(|_| format!(" until node {node:?} does")).unwrap_or_default();
        Readiness::new(Some(true), "AddressHeld", format!("node {holder:?} holds {address}{until}{lost}"))
    }
}
