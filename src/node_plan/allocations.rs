//! The allocations as one node sees them: who owns each egress IP, and what this node has to do for it.

mod allocation;
mod peer_reports;

pub use allocation::{AllocationState, Assignment, NodeAllocation, Placing, Role};

use crate::api::{Allocation, AllocationKind, Placement};
use crate::model::bandwidth::Bandwidth;
use crate::model::drain::is_drained;
use crate::model::marks::{EgressId, MAX_INDEX};
use crate::model::networks::merged;
use crate::model::ownership::{self, Liveness, OwnershipInputs};
use crate::model::selector::Name;
use crate::model::spread::{Choice, Division, Near};
use crate::model::uplink_key::UplinkKey;
use crate::model::{AddressRange, AddressRequest, Client, Cluster, Gateway, Policy, PolicyKey, treatment};
use allocation::is_here;
use arcstr::literal;
use egret_nft::mac::Mac;
use peer_reports::PeerReports;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What a node knows about itself and about the liveness of others, besides the cluster's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// All addresses of the node.
    pub addresses: BTreeSet<IpAddr>,
    /// Egress IPs that could not be put onto the uplink, with the reason.
    pub refused: BTreeMap<EgressId, String>,
    /// Gateway nodes that do not answer. It includes this node while it cannot hold egress IPs.
    pub dead: BTreeSet<Name>,
    /// The uplinks and families that answering gateway nodes, including this one, have lost.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// Egress IPs that this node holds although it has lost one of their families.
    pub partial: BTreeSet<EgressId>,
    /// Egress IPs that this node has taken over, with the `since` of the allocation at that time.
    pub taken: BTreeMap<EgressId, i64>,
    /// Egress IPs that are being put onto the uplink: no other host on the link has them.
    pub coming: BTreeSet<EgressId>,
    /// Egress IPs that this node relinquished, because another node had taken them over while this one could not
    /// know.
    pub relinquished: BTreeSet<EgressId>,
}

/// A route out other than the main table's: a next hop that a gateway names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uplink {
    /// The interface that the next hop is behind, where the gateway names one.
    pub interface: Option<Name>,
    /// The routers, where the gateway names them.
    pub next_hop: (Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>),
}

/// The tunnel address of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node.
    pub node: Name,
    /// Where tunnel packets are sent.
    pub address: IpAddr,
    /// Whether the node belongs to a gateway.
    pub is_gateway: bool,
}

/// The allocations among which a policy's pods have one each.
pub type Choices = SmallVec<[Choice<EgressId>; 1]>;

/// All allocations, and the peers of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeAllocations {
    /// The allocations by egress ID.
    pub allocations: BTreeMap<EgressId, NodeAllocation>,
    /// The allocations of each policy, sorted by policy.
    of_policy: Box<[(PolicyKey, EgressId)]>,
    /// The uplinks, by index minus one.
    pub uplinks: Vec<Uplink>,
    /// The nodes that this node exchanges tunnel packets with, by tunnel MAC: the gateway nodes, and for a gateway
    /// node all nodes.
    pub peers: BTreeMap<Mac, Peer>,
    /// Whether this node belongs to a gateway.
    pub is_gateway: bool,
    /// The nodes that can hold the egress IPs of each gateway.
    pub gateway_nodes: BTreeMap<Name, BTreeSet<Name>>,
    /// The uplinks that the egress IPs of each gateway need.
    pub gateway_uplinks: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// The egress IPs that this node holds now, sorted. The node reports them in its status.
    pub held: BTreeSet<EgressId>,
    /// Those of `held` whose address is on no interface of this node: something else announces it from here.
    pub without_address: BTreeSet<EgressId>,
    /// The pools of all gateways whose addresses Egret places, sorted and merged. Only an owner sends from such an
    /// address.
    pub pools: Vec<AddressRange>,
}

impl NodeAllocations {
    /// The allocations as `node` sees them.
    pub fn new(cluster: &Cluster, node: &str, facts: &Facts) -> Self {
        let mut out = NodeAllocations::default();
        let (mut allocations, mut of_policy) = (Vec::new(), Vec::new());
        let labels = cluster.nodes.get(node).map(|n| &n.labels);
        let ends = tunnel_ends(cluster);
        let reports = PeerReports::new(cluster, node, facts);
        let (dead, lost) = (facts.dead.clone(), facts.lost.clone());
        let mut liveness = Liveness { dead, lost, ..Liveness::default() };
        for (name, gateway) in &cluster.gateways {
            let members: Vec<Name> = cluster
                .nodes
                .iter()
                .filter(|(_, n)| gateway.nodes.matches(&n.labels))
                .map(|(n, _)| n.clone())
                .collect();
            let drained = |name: &&Name| cluster.nodes.get(*name).is_some_and(|node| is_drained(gateway, node));
            liveness.drained = members.iter().filter(drained).cloned().collect();
            let selected = labels.is_some_and(|l| gateway.nodes.matches(l));
            let named = gateway.status.allocations.iter().flat_map(|entry| [&entry.node, &entry.leaving]);
            let named: BTreeSet<&str> = named.flatten().map(|name| &**name).collect();
            let gone = labels.is_none();
            let mut needed = BTreeSet::new();
            let uplink = if selected || named.contains(node) { out.uplink_index(gateway) } else { Some(0) };
            for entry in &gateway.status.allocations {
                let (members, ends) = (members.as_slice(), &ends);
                let viewpoint =
                    Viewpoint { cluster, node, name, gateway, members, selected, gone, uplink, facts, ends };
                let mut allocation = viewpoint.allocation(entry, &reports, &liveness);
                if allocation.is_member() {
                    let policies = entry.policies.iter().filter_map(|key| Some((key, &**cluster.policies.get(key)?)));
                    allocation.dscp = treatment::dscp(policies.clone()).map(|(dscp, _)| dscp);
                    let bandwidth = treatment::bandwidth(policies).map(|(bandwidth, _)| bandwidth);
                    allocation.bandwidth = bandwidth.unwrap_or_default();
                }
                if allocation.state == AllocationState::Local
                    && allocation.is_member()
                    && !facts.coming.contains(&entry.id)
                {
                    out.held.insert(entry.id);
                    if !allocation.is_managed() && !allocation.is_here(entry.id, facts) {
                        out.without_address.insert(entry.id);
                    }
                }
                out.is_gateway |= allocation.is_member();
                let (interface, probed) = (allocation.interface.as_ref(), gateway.probed());
                needed.extend(UplinkKey::with_probes(&allocation.address, interface, name, probed));
                for policy in &entry.policies {
                    of_policy.push((policy.clone(), entry.id));
                }
                allocations.push((entry.id, allocation));
            }
            out.is_gateway |= selected;
            let nodes: BTreeSet<Name> = members.into_iter().chain(named.into_iter().map(Into::into)).collect();
            out.gateway_nodes.insert(name.clone(), nodes);
            out.gateway_uplinks.insert(name.clone(), needed);
        }
        of_policy.sort();
        out.of_policy = of_policy.into();
        let managed = cluster.gateways.values().filter(|gateway| gateway.placement == Placement::Managed);
        out.pools = merged(managed.flat_map(|gateway| gateway.pool.iter().copied()).collect());
        out.allocations = allocations.into_iter().collect();
        let gateway_nodes: BTreeSet<&str> = out.gateway_nodes.values().flatten().map(|n| &**n).collect();
        for End { node: name, mac, address } in ends.values().filter(|end| **end.node != *node) {
            let is_gateway = gateway_nodes.contains(&***name);
            if out.is_gateway || is_gateway {
                out.peers.insert(*mac, Peer { node: Name::clone(name), address: *address, is_gateway });
            }
        }
        out
    }

    /// The allocations of a policy that it requests now. After a policy has changed, the controller may not have given
    /// it another address yet. Its pods no longer use the old one, and pods that it selects only since then never did.
    pub fn of(&self, key: &PolicyKey, policy: &Policy) -> Choices {
        let choices = self.of_policy(key).filter_map(|id| {
            let allocation = self.allocations.get(&id)?;
            if policy.gateway.as_ref().is_some_and(|gateway| *gateway != allocation.gateway) {
                return None;
            }
            match &policy.address {
                AddressRequest::Explicit(pairs) => {
                    let ordinal = pairs.iter().position(|pair| *pair == allocation.address)?;
                    Some(Choice::named(id, u16::try_from(ordinal).ok()?, &allocation.address, allocation.choice()))
                }
                AddressRequest::Service(service) => {
                    let is_its = allocation.service.as_deref().is_some_and(|text| service.is(text));
                    is_its.then(|| Choice::numbered(id, 0, allocation.choice()))
                }
                AddressRequest::Allocate(_, count) => {
                    let choice = Choice::numbered(id, allocation.ordinal, allocation.choice());
                    (allocation.ordinal < *count).then_some(choice)
                }
                AddressRequest::Direct => None,
            }
        });
        choices.collect()
    }

    /// The allocations of a policy that new connections of the pod can have.
    pub fn chosen(&self, key: &PolicyKey, policy: &Policy, pod: Client<'_>) -> Vec<EgressId> {
        Division::from(policy).all(&self.of(key, policy), pod)
    }

    /// The allocations that list the policy.
    fn of_policy(&self, policy: &PolicyKey) -> impl Iterator<Item = EgressId> {
        let first = self.of_policy.partition_point(|(key, _)| key < policy);
        self.of_policy[first..].iter().take_while(move |(key, _)| key == policy).map(|(_, id)| *id)
    }

    /// Whether the policy has egress IPs and nodes hold all of them.
    pub fn is_placed(&self, policy: &PolicyKey) -> bool {
        let mut allocations = self.of_policy(policy).map(|id| self.allocations.get(&id)).peekable();
        let is_placed =
            |allocation: &NodeAllocation| allocation.placed && !matches!(allocation.state, AllocationState::Unready(_));
        allocations.peek().is_some() && allocations.all(|allocation| allocation.is_some_and(is_placed))
    }

    /// The uplinks that egress IPs need on a node that may come to hold them.
    pub fn uplinks_of(&self, node: &str) -> BTreeSet<UplinkKey> {
        let gateways = self.gateway_nodes.iter().filter(|(_, nodes)| nodes.contains(node));
        gateways.filter_map(|(gateway, _)| self.gateway_uplinks.get(gateway)).flatten().cloned().collect()
    }

    /// The index of a gateway's uplink; 0 for the main table. A mark has no room for more than [`MAX_INDEX`]: then it
    /// is `None`.
    fn uplink_index(&mut self, gateway: &Gateway) -> Option<u16> {
        if gateway.next_hop.is_empty() {
            return Some(0);
        }
        let uplink =
            Uplink { interface: gateway.interface.clone(), next_hop: (gateway.next_hop.ipv4, gateway.next_hop.ipv6) };
        let at = self.uplinks.iter().position(|u| *u == uplink).unwrap_or(self.uplinks.len());
        if at >= usize::from(MAX_INDEX) {
            return None;
        }
        if at == self.uplinks.len() {
            self.uplinks.push(uplink);
        }
        Some(at as u16 + 1)
    }
}

/// The tunnel address and MAC of a node.
struct End<'a> {
    node: &'a Name,
    mac: Mac,
    address: IpAddr,
}

/// The tunnel ends of all nodes, as they report them. A status whose node no longer exists is ignored.
fn tunnel_ends(cluster: &Cluster) -> BTreeMap<&str, End<'_>> {
    let mut ends = BTreeMap::new();
    for (name, status) in &cluster.egress_nodes {
        if let (Some(mac), Some(address), true) =
            (status.tunnel_mac, status.tunnel_address, cluster.nodes.contains_key(name))
        {
            ends.insert(&**name, End { node: name, mac, address });
        }
    }
    ends
}

/// The point of view from which allocations of one gateway are computed.
struct Viewpoint<'a> {
    cluster: &'a Cluster,
    node: &'a str,
    name: &'a Name,
    gateway: &'a Gateway,
    members: &'a [Name],
    /// Whether this node matches the gateway's nodeSelector.
    selected: bool,
    /// Whether this node no longer exists in the cluster: other nodes take over what it holds, and ignore its status.
    gone: bool,
    /// `None`: this node has no index left for the next hop of the gateway.
    uplink: Option<u16>,
    facts: &'a Facts,
    ends: &'a BTreeMap<&'a str, End<'a>>,
}

impl Viewpoint<'_> {
    fn allocation(&self, entry: &Allocation, reports: &PeerReports, liveness: &Liveness) -> NodeAllocation {
        let Viewpoint { node, gateway, facts, .. } = *self;
        let here = is_here(&entry.address, entry.id, facts);
        let external = gateway.placement == Placement::External;
        let managed = !external && entry.kind != AllocationKind::Node;
        let by_allocations = entry.node.as_deref() == Some(node);
        let leaves = entry.leaving.as_deref() == Some(node);
        let member = self.selected || managed && (by_allocations || leaves || here);

        let takers: Vec<&str> = match () {
            () if external => self.reporters(entry, reports, liveness, here),
            () if managed => reports.takers(entry),
            () => Vec::new(),
        };
        let (interface, probed) = (gateway.interface.as_ref(), gateway.probed());
        let needs: Vec<UplinkKey> = UplinkKey::with_probes(&entry.address, interface, self.name, probed).collect();
        let standing = OwnershipInputs {
            id: entry.id,
            node: entry.node.as_deref(),
            leaving: entry.leaving.as_deref().filter(|_| managed),
            arrived: entry.node.as_deref().is_some_and(|n| reports.holds(n, entry.id, here)),
            takers: &takers,
            // An address that Egret does not place does not move with the allocation.
            members: if managed { self.members } else { &[] },
            needs: if managed { &needs } else { &[] },
        };
        let owner = ownership::owner(standing, liveness);
        let mine = owner == Some(node);
        let arriving = by_allocations && standing.leaving.is_some() && liveness.is_alive(node);
        let placing = match owner {
            _ if !managed || !member => Placing::Never,
            _ if self.gone => Placing::Leave,
            _ if arriving && !standing.arrived => Placing::TakeHanded,
            Some(_) if mine && standing.leaving.is_some_and(|old| liveness.is_alive(old)) => Placing::TakeHanded,
            Some(_) if mine => Placing::Take,
            Some(other) if !reports.holds(other, entry.id, false) && !reports.refuses(other, entry.id) => Placing::Keep,
            None if entry.node.is_some() => Placing::Keep,
            _ => Placing::Leave,
        };
        let state = if mine && facts.relinquished.contains(&entry.id) {
            // The status of the node that took over has not arrived. It must be the first one in the order of the
            // allocation, without this node.
            let mut without = liveness.clone();
            without.dead.insert(node.into());
            self.state(entry, ownership::owner(standing, &without), member, here)
        } else {
            self.state(entry, owner, member, here)
        };
        let unready = matches!(state, AllocationState::Unready(_));
        let announces = entry.service.is_some() && state == AllocationState::Local;
        let refused = facts.refused.contains_key(&entry.id);
        let from = standing.leaving.filter(|old| by_allocations && *old != node && liveness.is_alive(old));
        let role = match () {
            () if !member => Role::Source,
            () if self.uplink.is_some() && if managed { !refused } else { !unready } => Role::Translator,
            () => Role::Member,
        };
        let assignment = match () {
            () if by_allocations => Assignment::Here,
            // An address that the host has on its own was not taken over by Egret.
            () if mine && managed && here && !refused && !leaves => Assignment::TakenOver,
            () => Assignment::Elsewhere,
        };
        NodeAllocation {
            gateway: self.name.clone(),
            address: entry.address.clone(),
            service: entry.service.clone(),
            state,
            role,
            placement: if managed { Placement::Managed } else { Placement::External },
            handed_by: from.and_then(|old| self.ends.get(old)).map(|end| end.mac),
            answers_ping: managed && gateway.answer_ping,
            ordinal: entry.ordinal,
            placed: owner.is_some_and(|owner| reports.holds(owner, entry.id, here)) || announces,
            is_held: reports.any_holds(entry.id, here),
            near: Near::of(self.cluster, node, owner),
            placing,
            assignment,
            since: entry.since,
            interface: gateway.interface.clone(),
            probed,
            dscp: None,
            bandwidth: Bandwidth::default(),
            uplink: self.uplink.unwrap_or_default(),
        }
    }

    /// External placement: this node if it has the address on an interface. Otherwise the nodes that report so, unless
    /// the node that the allocation names is one of them.
    fn reporters<'b>(
        &'b self,
        entry: &Allocation,
        reports: &PeerReports,
        liveness: &Liveness,
        here: bool,
    ) -> Vec<&'b str> {
        if here && self.selected {
            return vec![self.node];
        }
        let has = |name: &&str| liveness.is_alive(name) && reports.has_address(name, entry.id, here);
        if entry.node.as_deref().is_some_and(|node| has(&node)) {
            return Vec::new();
        }
        self.members.iter().map(|name| &**name).filter(has).collect()
    }

    fn state(&self, entry: &Allocation, owner: Option<&str>, member: bool, here: bool) -> AllocationState {
        let name = self.name;
        let unready = |text: String| AllocationState::Unready(text.into());
        let (managed, external) = (entry.kind != AllocationKind::Node, self.gateway.placement == Placement::External);
        match owner {
            None => unready(match &entry.node {
                None if let Some(service) = &entry.service => {
                    format!("no node of gateway {name} announces the address of Service {service}")
                }
                None => format!(
                    "gateway {name} has no node for it; label a node so that it matches the gateway's nodeSelector"
                ),
                Some(node) if managed && !external => {
                    format!("node {node} does not answer, nor does any other node of gateway {name}")
                }
                Some(node) => format!("node {node} does not answer, and its address is on no other node"),
            }),
            Some(owner) if owner == self.node => match self.facts.refused.get(&entry.id) {
                Some(why) => unready(why.clone()),
                None if self.uplink.is_none() => unready(format!(
                    "node {owner} already has {MAX_INDEX} next hops of gateways, the most that are possible"
                )),
                // The node may announce a Service's address that is on no interface.
                None if external && !here && entry.service.is_none() => {
                    AllocationState::Unready(literal!("its address is on no node of the gateway"))
                }
                None if !member => unready(format!("this node no longer belongs to gateway {name}")),
                None if managed && !external && !here && !self.facts.coming.contains(&entry.id) => {
                    // Until the address is here, packets go to the node before, as they did.
                    let before = entry.node.as_deref().and_then(|node| self.ends.get(node));
                    before.filter(|_| entry.node.as_deref() != Some(self.node)).map_or_else(
                        || AllocationState::Unready(literal!("its address is being put onto the uplink")),
                        |end| AllocationState::Remote(end.mac),
                    )
                }
                None => AllocationState::Local,
            },
            Some(owner) => match self.ends.get(owner) {
                Some(end) => AllocationState::Remote(end.mac),
                None => unready(format!("node {owner} has not reported its tunnel address; is egretd running there?")),
            },
        }
    }
}

#[cfg(test)]
mod tests;
