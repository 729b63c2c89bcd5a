//! Allocations as one node sees them: who owns each, and what that makes of the node.

mod peer_reports;

use crate::api::{AddressPair, Allocation, AllocationKind, Placement};
use crate::model::drain::is_drained;
use crate::model::mac::Mac;
use crate::model::marks::{EgressId, MAX_INDEX};
use crate::model::networks::merged;
use crate::model::ownership::{self, Liveness, Standing};
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::model::{AddressRange, AddressRequest, Cluster, Gateway, Policy, PolicyKey};
use arcstr::literal;
use peer_reports::PeerReports;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What a node knows of itself and of the others' being alive, beside the cluster's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Every address that the node has now.
    pub addresses: BTreeSet<IpAddr>,
    /// Allocations whose address could not be put onto the uplink, and why.
    pub refused: BTreeMap<EgressId, String>,
    /// Gateways' nodes that do not answer; this one among them if it cannot hold an address now.
    pub dead: BTreeSet<Name>,
    /// What gateways' nodes that answer have lost; this one among them.
    pub lost: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// Allocations that this node serves while it has lost a family that they have.
    pub partial: BTreeSet<EgressId>,
    /// Allocations that this node has taken over, and `since` of the allocations' entry at that time.
    pub taken: BTreeMap<EgressId, i64>,
    /// Allocations whose address is being put onto the uplink now: nobody else on the link has it.
    pub coming: BTreeSet<EgressId>,
    /// Allocations that this node had and gave up, because another one had taken them over while it could not know.
    pub relinquished: BTreeSet<EgressId>,
}

/// One allocation of the allocations, from where this node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAllocation {
    /// The gateway it belongs to.
    pub gateway: Name,
    /// The address that servers see.
    pub address: AddressPair,
    /// Where packets go.
    pub state: AllocationState,
    /// Whether this node may come to own it, and so has the allocation's address translation ready.
    pub member: bool,
    /// Whether the address is Egret's to place.
    pub managed: bool,
    /// Whether this node translates what comes for it. A member does so before it owns the allocation and while it takes it
    /// over, so that nothing but the address is missing; not if the address is somebody else's.
    pub translates: bool,
    /// Whether this node answers echo requests to the address while it has it.
    pub answers_ping: bool,
    /// The node that holds it until this one does, if it is being moved here on purpose.
    pub handed_by: Option<Mac>,
    /// Whether the node that has the allocation says that its address is there.
    pub placed: bool,
    /// What becomes of the address on this node.
    pub placing: Placing,
    /// Whether the allocations name this node.
    pub by_allocations: bool,
    /// Whether this node owns it in place of the allocations' node, which is dead or was.
    pub taken_over: bool,
    /// `since` of the allocations' entry.
    pub since: i64,
    /// The interface that is to have the address, where the gateway names one.
    pub interface: Option<Name>,
    /// The uplink by which it leaves from here, see [`NodeAllocations::uplinks`]; 0 is the main table.
    pub uplink: u16,
}

impl NodeAllocation {
    /// The uplinks that its addresses need, if these are Egret's to place.
    pub fn needs(&self) -> impl Iterator<Item = UplinkKey> + use<> {
        let needs = UplinkKey::of(&self.address, self.interface.as_ref());
        needs.take(if self.managed { usize::MAX } else { 0 })
    }

    /// Whether its addresses are on this node: all of them, or those whose family this node has not lost.
    pub fn is_here(&self, id: EgressId, facts: &Facts) -> bool {
        is_here(&self.address, id, facts)
    }
}

fn is_here(address: &AddressPair, id: EgressId, facts: &Facts) -> bool {
    let here = |a: IpAddr| facts.addresses.contains(&a);
    let mut all = address.ipv4.map(IpAddr::V4).into_iter().chain(address.ipv6.map(IpAddr::V6));
    if facts.partial.contains(&id) { all.any(here) } else { all.all(here) }
}

/// What becomes of an allocation's address on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// It is not this node's business.
    Never,
    /// It is to be on the uplink. `ask`: unless somebody else on the link has it.
    Take {
        /// Not if the allocation is moved on purpose: the old node answers until this one has it.
        ask: bool,
    },
    /// Another node is to have it. If it is here it stays until that one has it.
    Keep,
    /// Another node has it.
    Leave,
}

/// Where an allocation's packets go from this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllocationState {
    /// Through the tunnel, to the node with this MAC address.
    Remote(Mac),
    /// Out of this node.
    Local,
    /// Nowhere, and why.
    Unready(Name),
}

/// A way out that is not the main table's: a gateway's own next hop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uplink {
    /// The interface that the next hop is behind, where the gateway names one.
    pub interface: Option<Name>,
    /// The routers, where the gateway names them.
    pub next_hop: (Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>),
}

/// Another node's end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node.
    pub node: Name,
    /// Where tunnel packets are sent.
    pub address: IpAddr,
    /// Whether it is one of some gateway's nodes.
    pub is_gateway: bool,
}

/// All allocations, and the nodes that this one speaks to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeAllocations {
    /// By id.
    pub allocations: BTreeMap<EgressId, NodeAllocation>,
    /// Which allocation a policy has, sorted by the policy.
    of_policy: Box<[(PolicyKey, EgressId)]>,
    /// Uplinks by index less one.
    pub uplinks: Vec<Uplink>,
    /// The tunnel's other ends that this node speaks to, by MAC: the gateways' nodes, and for a gateway's node all.
    pub peers: BTreeMap<Mac, Peer>,
    /// Whether this node is one of some gateway's.
    pub is_gateway: bool,
    /// The nodes that each gateway's allocations can go through.
    pub gateway_nodes: BTreeMap<Name, BTreeSet<Name>>,
    /// The uplinks that each gateway's allocations need.
    pub gateway_uplinks: BTreeMap<Name, BTreeSet<UplinkKey>>,
    /// Allocations that this node holds now, sorted: what it says of itself.
    pub held: BTreeSet<EgressId>,
    /// The pools of all gateways whose addresses Egret places, sorted and merged: who sends from one is an owner.
    pub pools: Vec<AddressRange>,
}

impl NodeAllocations {
    /// As `node` sees them.
    pub fn new(cluster: &Cluster, node: &str, facts: &Facts) -> Self {
        let mut out = NodeAllocations::default();
        let (mut allocations, mut of_policy) = (Vec::new(), Vec::new());
        let labels = cluster.nodes.get(node).map(|n| &n.labels);
        let ends = tunnel_ends(cluster);
        let said = PeerReports::new(cluster, node, facts);
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
                let scene =
                    Scene { node, name, gateway, members: &members, selected, gone, uplink, facts, ends: &ends };
                let allocation = scene.allocation(entry, &said, &liveness);
                if allocation.state == AllocationState::Local && allocation.member && !facts.coming.contains(&entry.id)
                {
                    out.held.insert(entry.id);
                }
                out.is_gateway |= allocation.member;
                needed.extend(UplinkKey::of(&allocation.address, allocation.interface.as_ref()));
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

    /// The allocation that the allocations give a policy, if it is what the policy asks for. A policy that was changed asks for another
    /// address than the controller has given it until now, and its pods do not leave from that one any more; those that it
    /// selects since never did.
    pub fn of(&self, key: &PolicyKey, policy: &Policy) -> Option<EgressId> {
        let id = self.of_policy(key)?;
        let allocation = self.allocations.get(&id)?;
        let of_its_gateway = policy.gateway.as_ref().is_none_or(|gateway| *gateway == allocation.gateway);
        let asked_for = match &policy.address {
            AddressRequest::Explicit(pair) => *pair == allocation.address,
            AddressRequest::Allocate(_) => true,
        };
        (of_its_gateway && asked_for).then_some(id)
    }

    /// The allocation of a policy, if the allocations give it one.
    fn of_policy(&self, policy: &PolicyKey) -> Option<EgressId> {
        self.of_policy.binary_search_by(|(key, _)| key.cmp(policy)).ok().map(|at| self.of_policy[at].1)
    }

    /// Whether the policy has an egress IP, and a node has it.
    pub fn is_placed(&self, policy: &PolicyKey) -> bool {
        let allocation = self.of_policy(policy).and_then(|id| self.allocations.get(&id));
        allocation
            .is_some_and(|allocation| allocation.placed && !matches!(allocation.state, AllocationState::Unready(_)))
    }

    /// What allocations need of a node's uplinks, if they come to it.
    pub fn uplinks_of(&self, node: &str) -> BTreeSet<UplinkKey> {
        let gateways = self.gateway_nodes.iter().filter(|(_, nodes)| nodes.contains(node));
        gateways.filter_map(|(gateway, _)| self.gateway_uplinks.get(gateway)).flatten().cloned().collect()
    }

    /// 0 for the main table's route. A mark has no room for more than [`MAX_INDEX`].
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

/// A node's end of the tunnel.
struct End<'a> {
    node: &'a Name,
    mac: Mac,
    address: IpAddr,
}

/// Each node's end of the tunnel, as it says itself. What a node left behind that is no more is passed over.
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

/// Where an allocation is looked at from.
struct Scene<'a> {
    node: &'a str,
    name: &'a Name,
    gateway: &'a Gateway,
    members: &'a [Name],
    /// Whether the node is one of the gateway's.
    selected: bool,
    /// Whether the cluster has this node no more: others take what it has, and hear nothing that it says.
    gone: bool,
    /// `None`: the node has as many next hops as there can be, and not this one.
    uplink: Option<u16>,
    facts: &'a Facts,
    ends: &'a BTreeMap<&'a str, End<'a>>,
}

impl Scene<'_> {
    fn allocation(&self, entry: &Allocation, said: &PeerReports, liveness: &Liveness) -> NodeAllocation {
        let Scene { node, gateway, facts, .. } = *self;
        let here = is_here(&entry.address, entry.id, facts);
        let external = gateway.placement == Placement::External;
        let managed = !external && entry.kind != AllocationKind::Node;
        let by_allocations = entry.node.as_deref() == Some(node);
        let leaves = entry.leaving.as_deref() == Some(node);
        let member = self.selected || managed && (by_allocations || leaves || here);

        let takers: Vec<&str> = match () {
            () if external => self.reporters(entry, said, liveness, here),
            () if managed => said.takers(entry),
            () => Vec::new(),
        };
        let needs: Vec<UplinkKey> = UplinkKey::of(&entry.address, gateway.interface.as_ref()).collect();
        let standing = Standing {
            id: entry.id,
            node: entry.node.as_deref(),
            leaving: entry.leaving.as_deref().filter(|_| managed),
            arrived: entry.node.as_deref().is_some_and(|n| said.holds(n, entry.id, here)),
            takers: &takers,
            // An address that is not Egret's to place does not move with the allocation.
            members: if managed { self.members } else { &[] },
            needs: if managed { &needs } else { &[] },
        };
        let owner = ownership::owner(standing, liveness);
        let mine = owner == Some(node);
        let arriving = by_allocations && standing.leaving.is_some() && liveness.is_alive(node);
        let placing = match owner {
            _ if !managed || !member => Placing::Never,
            _ if self.gone => Placing::Leave,
            _ if arriving && !standing.arrived => Placing::Take { ask: false },
            Some(_) if mine => Placing::Take { ask: standing.leaving.is_none_or(|o| !liveness.is_alive(o)) },
            Some(other) if !said.holds(other, entry.id, false) && !said.refuses(other, entry.id) => Placing::Keep,
            None if entry.node.is_some() => Placing::Keep,
            _ => Placing::Leave,
        };
        let state = if mine && facts.relinquished.contains(&entry.id) {
            // Who took it over has not been heard of; it must be the first of the allocation's order but this node.
            let mut without = liveness.clone();
            without.dead.insert(node.into());
            self.state(entry, ownership::owner(standing, &without), member, here)
        } else {
            self.state(entry, owner, member, here)
        };
        let unready = matches!(state, AllocationState::Unready(_));
        let refused = facts.refused.contains_key(&entry.id);
        let from = standing.leaving.filter(|old| by_allocations && *old != node && liveness.is_alive(old));
        NodeAllocation {
            gateway: self.name.clone(),
            address: entry.address.clone(),
            state,
            member,
            managed,
            handed_by: from.and_then(|old| self.ends.get(old)).map(|end| end.mac),
            answers_ping: managed && gateway.answer_ping,
            translates: member && self.uplink.is_some() && if managed { !refused } else { !unready },
            placed: owner.is_some_and(|owner| said.holds(owner, entry.id, here)),
            placing,
            by_allocations,
            // What the host has on its own, Egret has not taken.
            taken_over: mine && managed && here && !refused && !by_allocations && !leaves,
            since: entry.since,
            interface: gateway.interface.clone(),
            uplink: self.uplink.unwrap_or_default(),
        }
    }

    /// Where something else places the addresses: this node if it has this one, else those that say so, unless the
    /// allocations' node is one of them.
    fn reporters<'b>(
        &'b self,
        entry: &Allocation,
        said: &PeerReports,
        liveness: &Liveness,
        here: bool,
    ) -> Vec<&'b str> {
        if here && self.selected {
            return vec![self.node];
        }
        let has = |name: &&str| liveness.is_alive(name) && said.holds(name, entry.id, here);
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
                    "node {owner} has {MAX_INDEX} next hops of gateways already, and no room for another"
                )),
                None if external && !here => {
                    AllocationState::Unready(literal!("its address is on no node of the gateway"))
                }
                None if !member => unready(format!("this node is no longer one of gateway {name}'s")),
                None if managed && !here && !self.facts.coming.contains(&entry.id) => {
                    // As it was until the address is here: packets for the node before are lost as they were.
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
                None => unready(format!(
                    "node {owner} has not said where its end of the tunnel is; is egretd running there?"
                )),
            },
        }
    }
}

#[cfg(test)]
mod tests;
