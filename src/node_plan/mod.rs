//! The desired state of one node, compiled from the cluster's state.
//!
//! It is made in two steps, because a pod's start waits for the second. [`View`] does not depend on the pods of this
//! node, and is made once for each snapshot. [`NodePlan`] adds the pods.

pub mod allocations;
pub mod expected;
pub mod policy_chain;
pub mod why;

use crate::api::AddressPair;
use crate::model::addresses_of;
use crate::model::bandwidth::Bandwidth;
use crate::model::egress_node::EgressNode;
use crate::model::marks::EgressId;
use crate::model::networks::Networks;
use crate::model::precedence::PolicyIndex;
use crate::model::selector::{Labels, Name};
use crate::model::shared::{Mark, Shared};
use crate::model::{Client, Cluster, Endpoints, Gateway, Inside, Node, ObjectKey, Policy, PolicyKey, Service};
use crate::node_plan::allocations::{AllocationState, Facts, NodeAllocation, NodeAllocations, Placing};
use crate::node_plan::policy_chain::PolicyChain;
use egret_nft::mac::Mac;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// The cluster as one node sees it, without the pods of the node.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The policies, with an index that finds those that select a pod.
    pub policies: Shared<PolicyIndex>,
    /// The allocations, peers and uplinks.
    pub allocations: Shared<NodeAllocations>,
    /// The networks inside the cluster.
    pub networks: Shared<Networks>,
    inputs: ViewInputs,
}

/// The inputs that a view was made from.
#[derive(Clone, Debug, Default)]
struct ViewInputs {
    nodes: Mark<BTreeMap<Name, Arc<Node>>>,
    namespaces: Mark<BTreeMap<Name, Labels>>,
    services: Mark<BTreeMap<ObjectKey, Arc<Service>>>,
    endpoints: Mark<BTreeMap<ObjectKey, Arc<Endpoints>>>,
    gateways: Mark<BTreeMap<Name, Arc<Gateway>>>,
    policies: Mark<BTreeMap<PolicyKey, Arc<Policy>>>,
    treatments: Treatments,
    egress_nodes: Mark<BTreeMap<Name, Arc<EgressNode>>>,
    inside: Mark<Inside>,
    facts: Facts,
    extra: Box<[IpNetwork]>,
    local_pods: BTreeSet<IpAddr>,
}

/// All policies with what [`treatment`](crate::model::treatment) reads of them; none if no policy asks for a treatment.
type Treatments = Arc<[(PolicyKey, i64, Option<u8>, Option<Bandwidth>)]>;

fn treatments(cluster: &Cluster) -> Treatments {
    if cluster.policies.values().all(|policy| policy.dscp.is_none() && policy.bandwidth.is_none()) {
        return Arc::default();
    }
    let of = |(key, policy): (&PolicyKey, &Arc<Policy>)| (key.clone(), policy.created, policy.dscp, policy.bandwidth);
    cluster.policies.iter().map(of).collect()
}

impl View {
    /// The view of `node`. `extra` are the direct destinations that the user lists, `local_pods` the addresses of
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

    /// Updates the view, which always belongs to the same node. A part whose inputs have not changed stays the same
    /// value, which [`Shared`](crate::model::shared) can compare.
    pub fn update(
        &mut self,
        cluster: &Cluster,
        node: &str,
        facts: &Facts,
        extra: &[IpNetwork],
        local_pods: BTreeSet<IpAddr>,
    ) {
        let of = &self.inputs;
        let same_nodes = cluster.nodes.has(&of.nodes);
        let same_services = cluster.services.has(&of.services);
        let same_policies = cluster.policies.has(&of.policies);
        // The old index is dropped before the new one is built: in a big cluster each takes some megabytes.
        if !(same_policies && same_services && cluster.namespaces.has(&of.namespaces)) {
            self.policies = Shared::default();
            self.policies = PolicyIndex::new(cluster).into();
        }
        let same_allocations = cluster.gateways.has(&of.gateways) && cluster.egress_nodes.has(&of.egress_nodes);
        // Allocations take nothing else from policies, which change more often than gateways.
        let treatments = if same_policies { of.treatments.clone() } else { treatments(cluster) };
        if !(same_nodes && same_allocations && *facts == of.facts && treatments == of.treatments) {
            self.update_allocations(cluster, node, facts);
        }
        let same_endpoints = cluster.endpoints.has(&self.inputs.endpoints);
        let same_inside = same_nodes && same_services && same_endpoints && cluster.inside.has(&self.inputs.inside);
        if !(same_inside && *extra == *self.inputs.extra && local_pods == self.inputs.local_pods) {
            self.networks = Networks::new(cluster, extra, local_pods.iter().copied()).into();
        }
        self.inputs = ViewInputs {
            nodes: cluster.nodes.mark(),
            namespaces: cluster.namespaces.mark(),
            services: cluster.services.mark(),
            endpoints: cluster.endpoints.mark(),
            gateways: cluster.gateways.mark(),
            policies: cluster.policies.mark(),
            treatments,
            egress_nodes: cluster.egress_nodes.mark(),
            inside: cluster.inside.mark(),
            facts: facts.clone(),
            extra: extra.into(),
            local_pods,
        };
    }

    /// Computes the allocations again, with other facts about the same cluster.
    pub fn update_allocations(&mut self, cluster: &Cluster, node: &str, facts: &Facts) {
        self.allocations = Shared::default();
        self.allocations = NodeAllocations::new(cluster, node, facts).into();
        self.inputs.facts.clone_from(facts);
    }

    /// The policy chain of a pod; `None` if no policy selects it. A pod that the cluster does not know yet has no labels.
    /// A pod whose policies cannot be determined yet is isolated.
    pub fn policy_chain(&self, pod: Client<'_>) -> Option<PolicyChain> {
        if self.policies.is_undecided_in(pod.namespace) {
            return Some(PolicyChain::Isolated);
        }
        match pod.labels {
            Some(labels) => {
                PolicyChain::new(&self.policies.policies_for(pod.namespace, labels), &self.allocations, pod)
            }
            None => self.policies.can_select_in(pod.namespace).then_some(PolicyChain::Isolated),
        }
    }

    /// The policy chain of a pod without these policies; `None` also for a pod without labels.
    pub fn policy_chain_without(&self, pod: Client<'_>, policies: &BTreeSet<PolicyKey>) -> Option<PolicyChain> {
        let mut others = self.policies.policies_for(pod.namespace, pod.labels?);
        others.retain(|ranked| !policies.contains(&ranked.key));
        PolicyChain::new(&others, &self.allocations, pod)
    }

    /// The addresses that tunnel packets may come from.
    pub fn tunnel_sources(&self) -> BTreeSet<IpAddr> {
        self.allocations.peers.values().map(|p| p.address).collect()
    }

    /// The egress IPs that Egret places and that this node may come to hold.
    pub fn candidates(&self) -> impl Iterator<Item = (EgressId, IpAddr, &NodeAllocation)> {
        let candidates = self.allocations.allocations.iter().filter(|(_, p)| p.placing != Placing::Never);
        candidates.flat_map(|(id, p)| addresses(p).map(move |a| (*id, a, p)))
    }
}

/// The addresses of an allocation, IPv4 first.
pub fn addresses(allocation: &NodeAllocation) -> impl Iterator<Item = IpAddr> + use<> {
    addresses_of(&allocation.address)
}

/// A selected pod, as the kernel is to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// The name of the host's end of the pod's veth pair.
    pub interface: String,
    /// The index of that interface.
    pub interface_index: u32,
    /// The addresses of the pod: its packets may have no other source.
    pub addresses: Vec<IpAddr>,
    /// The index in its pod mark.
    pub pod_mark: u16,
    /// The name of its policy chain in [`NodePlan::policy_chains`].
    pub policy_chain: Arc<str>,
}

/// The desired state of the node's datapath. Two consecutive plans differ by a pod or two, and share the others.
#[derive(Clone, Debug, Default)]
pub struct NodePlan {
    /// Selected pods by the name of their nftables chain.
    pub pods: BTreeMap<Arc<str>, Arc<PodPlan>>,
    /// Addresses of selected pods whose interface was not found.
    pub unfound: BTreeSet<IpAddr>,
    /// The policy chains in use, by name.
    pub policy_chains: BTreeMap<Arc<str>, Arc<PolicyChain>>,
    /// The allocations that the policy chains use and that are ready.
    pub allocations: BTreeMap<EgressId, NodeAllocation>,
    /// In planned moves to this node: the allocations, and the nodes that still know their connections.
    pub handed: BTreeMap<EgressId, (AddressPair, Mac)>,
    /// Allocations that have just moved away: connections that this node translates keep leaving from here until the
    /// next owner picks them up.
    pub left: BTreeSet<EgressId>,
    /// The index of the device that leads into the tunnel.
    pub device: u32,
    /// How packets come from there to the other nodes.
    pub way: TunnelWay,
    /// The indexes of selected pods' interfaces whose packets come by ifb devices; `None` if there never were any.
    pub limited: Option<BTreeSet<u32>>,
    /// The address that other nodes send tunnel packets to.
    pub local: Option<IpAddr>,
    /// Whether the kernel can report connections whose port it has changed.
    pub port_log: bool,
    /// Whether another program writes whole marks that have Egret's bits.
    pub foreign_marks: bool,
    /// If packets to egress IPs come in by interfaces in VRFs: the networks of pods that have routing rules for source
    /// validation.
    pub from_vrf: Option<Vec<IpNetwork>>,
    /// Whether others can flush the tables, and something else is to hold the pods then.
    pub flush_guard: bool,
}

/// Where the tunnel next hop's MAC address is replaced by the next node's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TunnelWay {
    /// At the egress hook of the tunnel device, into which packets are routed (Linux 5.16).
    #[default]
    EgressHook,
    /// On a pair of veths, into which packets are routed, and which leads to the tunnel device.
    Veths {
        /// The index of the tunnel device.
        tunnel: u32,
    },
    /// Both chains are there. Packets are routed into the pair of veths, because some of them pass no egress hook.
    Both {
        /// The index of the tunnel device.
        tunnel: u32,
    },
}

impl TunnelWay {
    /// Whether a chain is at the egress hook of the tunnel device.
    pub fn has_hook(self) -> bool {
        !matches!(self, TunnelWay::Veths { .. })
    }

    /// The index of the tunnel device if a chain is on the pair of veths.
    pub fn by_veths(self) -> Option<u32> {
        match self {
            TunnelWay::EgressHook => None,
            TunnelWay::Veths { tunnel } | TunnelWay::Both { tunnel } => Some(tunnel),
        }
    }
}

impl NodePlan {
    /// The allocations that this node's pods use and that have just moved here, with the nodes that held them before.
    pub fn moved_here(&self) -> impl Iterator<Item = (EgressId, Mac)> {
        let is_here = |id: &EgressId| {
            let is_here = |a: &NodeAllocation| a.state == AllocationState::Local && a.handed_to.is_none();
            self.allocations.get(id).is_some_and(is_here)
        };
        self.handed.iter().filter(move |(id, _)| is_here(id)).map(|(id, (_, mac))| (*id, *mac))
    }

    /// The same where the kernel cannot choose among several egress IPs by a connection's hash.
    pub fn without_hashes(&self) -> Self {
        let mut other = self.clone();
        for policy_chain in other.policy_chains.values_mut().filter(|policy_chain| policy_chain.needs_hash()) {
            *policy_chain = Arc::new(policy_chain.without_hash());
        }
        other
    }

    /// Whether the kernel has to choose by connections' hashes.
    pub fn needs_hashes(&self) -> bool {
        self.policy_chains.values().any(|policy_chain| policy_chain.needs_hash())
    }

    /// Isolates the pods whose policies list more than the node can take. The longest lists go first, so that no
    /// other pod is affected. Returns the policies with these lists.
    pub fn isolate_long_lists(&mut self) -> BTreeSet<PolicyKey> {
        self.isolate_beyond(MAX_ENTRIES)
    }

    fn isolate_beyond(&mut self, most: usize) -> BTreeSet<PolicyKey> {
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
        let mut policies = BTreeSet::new();
        if too_long.is_empty() {
            return policies;
        }
        for policy_chain in self.policy_chains.values_mut() {
            let steps = policy_chain.steps().iter().filter(|step| !step.covers_everything());
            let over = steps.filter(|step| too_long.contains(&step.covers.shape().name));
            let over: Vec<PolicyKey> = over.map(|step| step.policy.clone()).collect();
            if !over.is_empty() {
                *policy_chain = Arc::new(PolicyChain::Isolated);
                policies.extend(over);
            }
        }
        policies
    }

    /// Adds a pod with its nftables chain and its policy chain. The pod is isolated if another policy chain has the
    /// same name: names are hashes of policy names, which tenants choose.
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

/// How many entries all sets of destinations on one node may have together. An entry takes some 200 bytes of kernel
/// memory.
const MAX_ENTRIES: usize = 1_000_000;

/// The name of a pod's chain. It has the index of the pod mark and the interface index, so that a restarted daemon finds
/// the pod mark again.
pub fn chain_name(pod_mark: u16, interface_index: u32) -> Arc<str> {
    format!("pod-{pod_mark}-{interface_index}").into()
}

/// Parses the index of the pod mark and the interface index from the name of a pod's chain.
pub fn parse_chain_name(name: &str) -> Option<(u16, u32)> {
    let (pod_mark, index) = name.strip_prefix("pod-")?.split_once('-')?;
    Some((pod_mark.parse().ok()?, index.parse().ok()?))
}
