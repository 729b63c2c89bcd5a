//! The allocations as one node sees them: who owns each egress IP, and what this node has to do for it.

mod allocation;
mod peer_reports;
mod viewpoint;

pub use allocation::{AllocationState, Assignment, NodeAllocation, Placing, Role};

use crate::api::Placement;
use crate::model::drain::is_drained;
use crate::model::marks::{EgressId, MAX_UPLINK};
use crate::model::networks::merged;
use crate::model::ownership::Liveness;
use crate::model::selector::Name;
use crate::model::spread::{Choice, Division};
use crate::model::uplink_key::UplinkKey;
use crate::model::{AddressRange, AddressRequest, Client, Cluster, Gateway, Policy, PolicyKey, treatment};
use egret_nft::mac::Mac;
use peer_reports::PeerReports;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use viewpoint::{Viewpoint, capacities};

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
    /// Egress IPs that this node must not use before the assign hook has brought them here.
    pub unassigned: BTreeSet<EgressId>,
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
            let most = capacities(cluster, gateway, &members, &mut liveness);
            let selected = labels.is_some_and(|l| gateway.nodes.matches(l));
            let named = gateway.status.allocations.iter().flat_map(|entry| [&entry.node, &entry.leaving]);
            let named: BTreeSet<&str> = named.flatten().map(|name| &**name).collect();
            let gone = labels.is_none();
            let mut needed = BTreeSet::new();
            let uplink = if selected || named.contains(node) { out.uplink_index(gateway) } else { Some(0) };
            let (members, ends) = (members.as_slice(), &ends);
            let viewpoint = Viewpoint { cluster, node, name, gateway, members, selected, gone, uplink, facts, ends };
            let together = viewpoint.together(&reports, &mut liveness, &most);
            for entry in &gateway.status.allocations {
                let mut allocation = viewpoint.allocation(entry, &reports, &liveness, together.as_ref());
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
            let nodes: BTreeSet<Name> = members.iter().cloned().chain(named.into_iter().map(Into::into)).collect();
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
                AddressRequest::Unspecified => Some(Choice::numbered(id, 0, allocation.choice())),
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
    pub fn is_held(&self, policy: &PolicyKey) -> bool {
        let mut allocations = self.of_policy(policy).map(|id| self.allocations.get(&id)).peekable();
        let is_held = |allocation: &NodeAllocation| {
            allocation.owner_holds && !matches!(allocation.state, AllocationState::Unready(_))
        };
        allocations.peek().is_some() && allocations.all(|allocation| allocation.is_some_and(is_held))
    }

    /// The uplinks that egress IPs need on a node that may come to hold them.
    pub fn uplinks_of(&self, node: &str) -> BTreeSet<UplinkKey> {
        let gateways = self.gateway_nodes.iter().filter(|(_, nodes)| nodes.contains(node));
        gateways.filter_map(|(gateway, _)| self.gateway_uplinks.get(gateway)).flatten().cloned().collect()
    }

    /// The index of a gateway's uplink; 0 for the main table. A mark has no room for more than [`MAX_UPLINK`]: then it
    /// is `None`.
    fn uplink_index(&mut self, gateway: &Gateway) -> Option<u16> {
        if gateway.next_hop.is_empty() {
            return Some(0);
        }
        let uplink =
            Uplink { interface: gateway.interface.clone(), next_hop: (gateway.next_hop.ipv4, gateway.next_hop.ipv6) };
        let at = self.uplinks.iter().position(|u| *u == uplink).unwrap_or(self.uplinks.len());
        if at >= usize::from(MAX_UPLINK) {
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

#[cfg(test)]
mod tests;
