//! What a node's kernel should hold: the plan, compiled from the cluster's state.
//!
//! In two steps, because a pod's start waits for the second: [`View`] is what does not depend on this node's pods
//! and is made once for each snapshot; [`NodePlan`] adds the pods.

pub mod allocations;
pub mod policy_chain;
pub mod why;

use crate::api::AddressPair;
use crate::model::addresses_of;
use crate::model::egress_node::EgressNode;
use crate::model::mac::Mac;
use crate::model::marks::EgressId;
use crate::model::networks::Networks;
use crate::model::precedence::PolicyIndex;
use crate::model::selector::{Labels, Name};
use crate::model::shared::{Mark, Shared};
use crate::model::{Cluster, Endpoints, Gateway, Inside, Node, ObjectKey, Policy, PolicyKey, Service};
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation, NodeAllocations, Placing};
use crate::node_plan::policy_chain::PolicyChain;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// The cluster as one node sees it, less the node's own pods.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Which policies select which pods.
    pub policies: Shared<PolicyIndex>,
    /// NodeAllocations, peers, uplinks.
    pub allocations: Shared<NodeAllocations>,
    /// What is inside the cluster.
    pub networks: Shared<Networks>,
    made_of: MadeOf,
}

/// What a view was made of.
#[derive(Clone, Debug, Default)]
struct MadeOf {
    nodes: Mark<BTreeMap<Name, Arc<Node>>>,
    namespaces: Mark<BTreeMap<Name, Labels>>,
    services: Mark<BTreeMap<ObjectKey, Arc<Service>>>,
    endpoints: Mark<BTreeMap<ObjectKey, Arc<Endpoints>>>,
    gateways: Mark<BTreeMap<Name, Arc<Gateway>>>,
    policies: Mark<BTreeMap<PolicyKey, Arc<Policy>>>,
    egress_nodes: Mark<BTreeMap<Name, Arc<EgressNode>>>,
    inside: Mark<Inside>,
    facts: Facts,
    extra: Box<[IpNetwork]>,
    local_pods: BTreeSet<IpAddr>,
}

impl View {
    /// As `node` sees the cluster. `extra` are direct destinations of the user's, `local_pods` the addresses of
    /// this node's pods.
    pub fn new(
        cluster: &Cluster,
        node: &str,
        facts: &Facts,
        extra: &[IpNetwork],
        local_pods: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        let mut view = View::default();
        view.update(cluster, node, facts, extra, local_pods.into_iter().collect());
        view
    }

    /// Brings it up to date. What follows from things that have not changed since stays the same, and
    /// [`Shared`](crate::model::shared) tells so. It is of one node always.
    pub fn update(
        &mut self,
        cluster: &Cluster,
        node: &str,
        facts: &Facts,
        extra: &[IpNetwork],
        local_pods: BTreeSet<IpAddr>,
    ) {
        let of = &self.made_of;
        let same_nodes = cluster.nodes.has(&of.nodes);
        let same_services = cluster.services.has(&of.services);
        let same_policies = cluster.policies.has(&of.policies);
        // Not two of the same at once: in a big cluster each is some megabytes.
        if !(same_policies && same_services && cluster.namespaces.has(&of.namespaces)) {
            self.policies = Shared::default();
            self.policies = PolicyIndex::new(cluster).into();
        }
        let same_allocations = cluster.gateways.has(&of.gateways) && cluster.egress_nodes.has(&of.egress_nodes);
        if !(same_nodes && same_allocations && *facts == of.facts) {
            self.look_again(cluster, node, facts);
        }
        let same_endpoints = cluster.endpoints.has(&self.made_of.endpoints);
        let same_inside = same_nodes && same_services && same_endpoints && cluster.inside.has(&self.made_of.inside);
        if !(same_inside && *extra == *self.made_of.extra && local_pods == self.made_of.local_pods) {
            self.networks = Networks::new(cluster, extra, local_pods.iter().copied()).into();
        }
        self.made_of = MadeOf {
            nodes: cluster.nodes.mark(),
            namespaces: cluster.namespaces.mark(),
            services: cluster.services.mark(),
            endpoints: cluster.endpoints.mark(),
            gateways: cluster.gateways.mark(),
            policies: cluster.policies.mark(),
            egress_nodes: cluster.egress_nodes.mark(),
            inside: cluster.inside.mark(),
            facts: facts.clone(),
            extra: extra.into(),
            local_pods,
        };
    }

    /// Looks at the allocations anew, with other facts about the same cluster.
    pub fn look_again(&mut self, cluster: &Cluster, node: &str, facts: &Facts) {
        self.allocations = Shared::default();
        self.allocations = NodeAllocations::new(cluster, node, facts).into();
        self.made_of.facts.clone_from(facts);
    }

    /// The policy chain of a pod; `labels` is `None` for a pod that the cluster does not know yet. `None` for a pod that
    /// no policy selects, or can select. A pod of which it cannot be said yet is held.
    pub fn policy_chain(&self, namespace: &str, labels: Option<&Labels>) -> Option<PolicyChain> {
        if self.policies.is_undecided_in(namespace) {
            return Some(PolicyChain::Isolated);
        }
        match labels {
            Some(labels) => PolicyChain::new(&self.policies.policies_for(namespace, labels), &self.allocations),
            None => self.policies.can_select_in(namespace).then_some(PolicyChain::Isolated),
        }
    }

    /// The policy chain of a pod, as if it were not for these policies.
    pub fn policy_chain_without(
        &self,
        namespace: &str,
        labels: &Labels,
        policies: &BTreeSet<PolicyKey>,
    ) -> Option<PolicyChain> {
        let mut others = self.policies.policies_for(namespace, labels);
        others.retain(|ranked| !policies.contains(&ranked.key));
        PolicyChain::new(&others, &self.allocations)
    }

    /// Addresses that tunnel packets may come from.
    pub fn tunnel_sources(&self) -> BTreeSet<IpAddr> {
        self.allocations.peers.values().map(|p| p.address).collect()
    }

    /// The addresses of allocations that are Egret's to place and that this node may come to hold.
    pub fn placeable(&self) -> impl Iterator<Item = (EgressId, IpAddr, &NodeAllocation)> {
        let placeable = self.allocations.allocations.iter().filter(|(_, p)| p.placing != Placing::Never);
        placeable.flat_map(|(id, p)| addresses(p).map(move |a| (*id, a, p)))
    }
}

/// An allocation's addresses, of both families.
pub fn addresses(allocation: &NodeAllocation) -> impl Iterator<Item = IpAddr> + use<> {
    addresses_of(&allocation.address)
}

/// A pod that a policy selects, as the kernel is to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// The host's end of its veth pair.
    pub interface: String,
    /// Its index.
    pub interface_index: u32,
    /// The pod's addresses: what it may send from.
    pub addresses: Vec<IpAddr>,
    /// The index in the mark that its packets get.
    pub pod_mark: u16,
    /// Name of its policy chain in [`NodePlan::policy chains`].
    pub policy_chain: Arc<str>,
}

/// Everything that the node's datapath should be. One plan differs from the next by a pod or two: the others are shared.
#[derive(Clone, Debug, Default)]
pub struct NodePlan {
    /// Selected pods by the name of their chain.
    pub pods: BTreeMap<Arc<str>, Arc<PodPlan>>,
    /// Addresses of selected pods behind interfaces that were not found.
    pub unfound: BTreeSet<IpAddr>,
    /// PolicyChains in use, by name.
    pub policy_chains: BTreeMap<Arc<str>, Arc<PolicyChain>>,
    /// Allocations that the policy chains lead to and that are ready, and where.
    pub allocations: BTreeMap<EgressId, NodeAllocation>,
    /// Allocations that are being moved here, and the nodes that still know their connections.
    pub handed: BTreeMap<EgressId, (AddressPair, Mac)>,
    /// Allocations that have just been moved away: connections that this node translates go on leaving from here until
    /// they are picked up anew.
    pub left: BTreeSet<EgressId>,
    /// The tunnel device's index.
    pub device: u32,
    /// This node's end of the tunnel: where the others' tunnel packets come to.
    pub local: Option<IpAddr>,
    /// Whether the kernel can tell of connections whose port it has changed.
    pub port_log: bool,
    /// Whether others can flush the tables, and something else is to hold the pods then.
    pub guarded: bool,
}

impl NodePlan {
    /// Allocations of this node's pods that have just been moved here, and the nodes that had them.
    pub fn came(&self) -> impl Iterator<Item = (EgressId, Mac)> {
        let is_here = |id: &EgressId| {
            self.allocations.get(id).is_some_and(|allocation| allocation.state == AllocationState::Local)
        };
        self.handed.iter().filter(move |(id, _)| is_here(id)).map(|(id, (_, mac))| (*id, *mac))
    }

    /// Has the pods held whose policies list more than the node can take: the longest lists first, so that nobody else
    /// notices. Returns how many policy chains that were.
    pub fn bound(&mut self) -> usize {
        self.bound_to(MAX_ENTRIES)
    }

    fn bound_to(&mut self, most: usize) -> usize {
        let steps = self.policy_chains.values().flat_map(|policy_chain| policy_chain.steps());
        let shapes = steps.filter(|step| !step.covers_everything()).map(|step| step.covers.shape());
        let lists: BTreeSet<(usize, &str)> = shapes.map(|shape| (shape.entries, &*shape.name)).collect();
        let mut all = 0;
        let too_long: BTreeSet<Box<str>> = lists
            .into_iter()
            .filter_map(|(entries, name)| {
                all += entries;
                (all > most).then(|| name.into())
            })
            .collect();
        let is_too_long = |policy_chain: &PolicyChain| {
            let mut listing = policy_chain.steps().iter().filter(|step| !step.covers_everything());
            !too_long.is_empty() && listing.any(|step| too_long.contains(&step.covers.shape().name))
        };
        let held = self.policy_chains.values_mut().filter(|policy_chain| is_too_long(policy_chain));
        held.map(|policy_chain| *policy_chain = Arc::new(PolicyChain::Isolated)).count()
    }

    /// Adds a pod, whose chain has this name. It is held if its policy chain's name is another one's: a name is a hash, and
    /// policies' names are chosen by those who are held to them.
    pub fn add(&mut self, view: &View, chain: Arc<str>, mut pod: Arc<PodPlan>, mut policy_chain: Arc<PolicyChain>) {
        match self.policy_chains.get(&pod.policy_chain) {
            Some(same) if *same == policy_chain => {
                self.pods.insert(chain, pod);
                return;
            }
            Some(_) => {
                policy_chain = Arc::new(PolicyChain::Isolated);
                Arc::make_mut(&mut pod).policy_chain = policy_chain.name();
            }
            None => {}
        }
        for id in policy_chain.allocations() {
            if let Some(allocation) = view.allocations.allocations.get(&id)
                && !matches!(allocation.state, AllocationState::Unready(_))
            {
                self.allocations.entry(id).or_insert_with(|| allocation.clone());
            }
        }
        self.policy_chains.entry(pod.policy_chain.clone()).or_insert(policy_chain);
        self.pods.insert(chain, pod);
    }
}

/// How many entries the sets of all lists of destinations may have together that pods of one node use. An entry takes some
/// 200 bytes of the kernel's memory.
const MAX_ENTRIES: usize = 1_000_000;

/// A pod's chain is named after its pod mark and its interface, so that a restarted daemon finds the pod mark again.
pub fn chain_name(pod_mark: u16, interface_index: u32) -> Arc<str> {
    format!("pod-{pod_mark}-{interface_index}").into()
}

/// Pod mark and interface index of a pod's chain.
pub fn parse_chain_name(name: &str) -> Option<(u16, u32)> {
    let (pod_mark, index) = name.strip_prefix("pod-")?.split_once('-')?;
    Some((pod_mark.parse().ok()?, index.parse().ok()?))
}
