//! The allocations while it is being written: what is in use, what rests, what is free.

use super::cooldown::{Cooldowns, cooldown_ended_until, in_cooldown};
use super::family::{Family, addresses, overlap, pair};
use super::ids::Ids;
use super::living;
use super::pool::{Overlap, Pool, usable};
use super::request::Requests;
use crate::api::{AddressPair, AllocationKind, Placement, Users};
use crate::model::selector::Name;
use crate::model::{AddressRange, Cluster, Gateway, Node};
use ipnetwork::IpNetwork;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// A gateway, as the allocations needs it.
#[derive(Clone, Debug)]
pub(super) struct GatewayPool<'a> {
    pub(super) name: &'a Name,
    pub(super) gateway: &'a Gateway,
    /// Its nodes, by name.
    pub(super) nodes: Vec<(&'a Name, &'a Node)>,
    /// All of its pool: where what was given out may stay.
    pub(super) declared: Pool,
    /// Its pool without what earlier gateways have: where new addresses come from.
    pub(super) usable: Pool,
    /// What of it may be given to who names no address: not what is reserved for some namespaces.
    pub(super) open: Pool,
    pub(super) overlaps: Vec<Overlap>,
    /// Addresses that were given back until then have no cooldown, by the gateway's annotation.
    pub(super) ended_until: i64,
}

/// An allocation to be.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// The gateway's place.
    pub(super) gateway: usize,
    pub(super) id: u16,
    pub(super) kind: AllocationKind,
    pub(super) address: AddressPair,
    pub(super) node: Option<Name>,
    /// When its node got it.
    pub(super) since: i64,
    /// The node that holds it until its node does.
    pub(super) leaving: Option<Name>,
    /// The places of the requests that it serves.
    pub(super) requests: Vec<usize>,
}

impl Draft {
    /// One that nobody uses yet.
    pub(super) fn new(gateway: usize, id: u16, kind: AllocationKind, address: AddressPair, node: Option<Name>) -> Self {
        Draft { gateway, id, kind, address, node, since: 0, leaving: None, requests: vec![] }
    }
}

/// The cluster's own networks, as far as a controller knows them: no server outside could answer to their addresses.
fn networks_inside(cluster: &Cluster) -> impl Iterator<Item = (AddressRange, IpNetwork)> + '_ {
    let pods = cluster.nodes.values().flat_map(|node| node.pod_cidrs.iter());
    let networks = pods.chain(cluster.inside.pods.keys()).chain(cluster.inside.services.keys());
    networks.map(|network| {
        let last = match network {
            IpNetwork::V4(network) => IpAddr::V4(network.broadcast()),
            IpNetwork::V6(network) => IpAddr::V6(network.broadcast()),
        };
        (AddressRange { first: network.network(), last }, *network)
    })
}

/// The allocations while it is being written.
#[derive(Clone, Debug)]
pub(super) struct Allocator<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) now: i64,
    pub(super) gateway_pools: Vec<GatewayPool<'a>>,
    pub(super) requests: Requests<'a>,
    /// The first ones are those that were there before; new ones come in the order in which they were asked for.
    pub(super) allocations: Vec<Draft>,
    /// The allocations of pool addresses, by address.
    pub(super) held: HashMap<IpAddr, usize>,
    /// The allocations of nodes' own addresses, by address. Two gateways may have the same node.
    pub(super) held_by_nodes: HashMap<IpAddr, usize>,
    /// Nodes' own addresses. Giving one away would cut the node off.
    pub(super) node_addresses: HashMap<IpAddr, &'a Name>,
    /// Nodes that are not known to live.
    unreachable: HashSet<&'a str>,
    pub(super) ids: Ids,
    pub(super) in_cooldown: Cooldowns,
}

impl<'a> Allocator<'a> {
    /// The network of pods or Services that has the address.
    pub(super) fn inside(&self, address: IpAddr) -> Option<IpNetwork> {
        networks_inside(self.cluster).find(|(range, _)| range.contains(address)).map(|(_, network)| network)
    }

    /// A network of pods or Services that part of the range is in, and the first address of that part.
    pub(super) fn inside_range(&self, range: &AddressRange) -> Option<(IpNetwork, IpAddr)> {
        let overlaps = |other: &AddressRange| {
            other.first.is_ipv4() == range.first.is_ipv4() && other.first <= range.last && range.first <= other.last
        };
        let first = networks_inside(self.cluster).find(|(other, _)| overlaps(other));
        first.map(|(other, network)| (network, other.first.max(range.first)))
    }

    /// With nothing in use, and what rests at `now`.
    pub(super) fn open(cluster: &'a Cluster, now: i64) -> Self {
        let mut gateway_pools = Vec::new();
        let inside: Pool = networks_inside(cluster).map(|(range, _)| range).collect::<Vec<_>>().iter().collect();
        let pools = usable(cluster.gateways.values().map(|g| &**g));
        for ((name, gateway), (usable, overlaps)) in cluster.gateways.iter().zip(pools) {
            let nodes = cluster.nodes.iter().filter(|(name, node)| match gateway.frozen {
                true => gateway.status.nodes.binary_search_by(|known| (**known).cmp(name)).is_ok(),
                false => gateway.nodes.matches(&node.labels),
            });
            let nodes = nodes.map(|(name, node)| (name, &**node)).collect();
            let declared = gateway.pool.iter().collect();
            let ended_until = cooldown_ended_until(gateway).unwrap_or(i64::MIN);
            let reserved = gateway.reservations.iter().flat_map(|reserved| &reserved.addresses).collect();
            let open = usable.clone().without(&reserved).without(&inside);
            gateway_pools.push(GatewayPool { name, gateway, nodes, declared, usable, open, overlaps, ended_until });
        }
        let mut node_addresses = HashMap::new();
        for (name, node) in &cluster.nodes {
            node_addresses.extend(node.addresses.iter().map(|address| (*address, name)));
        }
        let mut allocator = Allocator {
            cluster,
            now,
            gateway_pools,
            requests: Requests::new(cluster),
            allocations: Vec::new(),
            held: HashMap::new(),
            held_by_nodes: HashMap::new(),
            node_addresses,
            unreachable: living::unreachable(cluster),
            ids: Ids::new(),
            in_cooldown: Cooldowns::default(),
        };
        for (place, gateway) in cluster.gateways.values().enumerate() {
            for (released, at) in in_cooldown(&gateway.status, now) {
                allocator.rest(place, released.id, released.address.clone(), released.policies.clone(), at);
            }
        }
        allocator
    }

    /// Whether a node answers others, as far as they tell.
    pub(super) fn lives(&self, node: &Name) -> bool {
        !self.unreachable.contains(&**node)
    }

    /// How much of its uplinks, as far as the gateway's allocations may need them, a node says that it has lost.
    pub(super) fn lacks(&self, node: &Name, gateway: usize) -> usize {
        let interface = self.gateway_pools[gateway].gateway.interface.as_deref();
        let said =
            self.cluster.egress_nodes.get(node).map(|node| node.of_allocations().lost.as_slice()).unwrap_or_default();
        said.iter().filter(|lost| lost.interface.as_deref() == interface).count()
    }

    /// Whether a node has said where its end of the tunnel is: Egret runs there, or did.
    pub(super) fn is_reachable(&self, node: &Name) -> bool {
        self.cluster.egress_nodes.get(node).is_some_and(|status| status.tunnel_mac.is_some())
    }

    /// Lets an id and its addresses rest.
    pub(super) fn rest(&mut self, gateway: usize, id: u16, address: AddressPair, policies: Users, at: i64) {
        self.ids.rest(id);
        let ended = at <= self.gateway_pools[gateway].ended_until;
        self.in_cooldown.add(gateway, id, address, policies, (at, ended), &self.requests.places);
    }

    /// Has an allocation serve a request.
    pub(super) fn assign(&mut self, allocation: usize, request: usize) {
        self.allocations[allocation].requests.push(request);
        self.requests.all[request].allocation = Some(allocation);
    }

    /// The places of the policies that use an allocation, by seniority.
    pub(super) fn users(&self, allocation: usize) -> Vec<usize> {
        let requests = self.allocations[allocation].requests.iter();
        let mut users: Vec<usize> = requests.flat_map(|d| self.requests.all[*d].policies.iter().copied()).collect();
        users.sort_unstable();
        users.dedup();
        users
    }

    /// Enters an allocation. Its id has been taken.
    pub(super) fn enter(&mut self, allocation: Draft) -> usize {
        let place = self.allocations.len();
        for address in addresses(&allocation.address) {
            match allocation.kind {
                AllocationKind::Node => self.held_by_nodes.insert(address, place),
                _ => self.held.insert(address, place),
            };
        }
        self.allocations.push(allocation);
        place
    }

    /// The node that has the address as its own, if the gateway's addresses are Egret's to place. Where something
    /// else places them, a node that has one may well tell of it.
    pub(super) fn node_with(&self, gateway: usize, address: IpAddr) -> Option<&'a Name> {
        match self.gateway_pools[gateway].gateway.placement {
            Placement::Managed => self.node_addresses.get(&address).copied(),
            Placement::External => None,
        }
    }

    /// The allocation that has the address now.
    pub(super) fn holder(&self, address: IpAddr) -> Option<usize> {
        self.held.get(&address).or_else(|| self.held_by_nodes.get(&address)).copied()
    }

    /// A free address of the family for these policies: one that they gave back a short while ago, else the first.
    pub(super) fn pick(&mut self, gateway: usize, family: Family, policies: &[usize]) -> Option<IpAddr> {
        let returned = self.in_cooldown.of(gateway, policies).into_iter().find_map(|entry| {
            let address = family.of_pair(&entry.address)?;
            let good = self.gateway_pools[gateway].open.contains(address)
                && self.holder(address).is_none()
                && self.node_with(gateway, address).is_none()
                && self.in_cooldown.until(address, policies).is_none();
            good.then_some(address)
        });
        if returned.is_some() {
            return returned;
        }
        let managed = self.gateway_pools[gateway].gateway.placement == Placement::Managed;
        let Allocator { gateway_pools, held, held_by_nodes, node_addresses, in_cooldown, .. } = self;
        gateway_pools[gateway].open.first(family, |address| {
            let in_use = held.contains_key(&address) || held_by_nodes.contains_key(&address);
            let of_node = managed && node_addresses.contains_key(&address);
            !in_use && !of_node && !in_cooldown.contains(address)
        })
    }

    /// Takes an id for a new allocation: the one that these policies gave back together with one of its addresses, else
    /// one that belongs to `name`.
    pub(super) fn new_id(
        &mut self,
        gateway: usize,
        address: &AddressPair,
        policies: &[usize],
        name: &str,
    ) -> Option<u16> {
        for entry in self.in_cooldown.of(gateway, policies) {
            let same = overlap(&entry.address, address) && !self.in_cooldown.keeps_id(entry.id, policies);
            if same && self.ids.take(entry.id) {
                return Some(entry.id);
            }
        }
        self.ids.find(&format!("{}/{name}", self.gateway_pools[gateway].name))
    }

    /// An allocation from the pool. If it has the id that its policies had until now, as when they come to name the address that they
    /// have, it stays on its node. So does an address that one policy leaves and another one names at the same time.
    pub(super) fn again(&self, gateway: usize, id: u16, kind: AllocationKind, address: AddressPair) -> Draft {
        let allocation = Draft::new(gateway, id, kind, address, None);
        let before = self.gateway_pools[gateway]
            .gateway
            .status
            .allocations
            .iter()
            .filter(|before| before.kind != AllocationKind::Node);
        match before.clone().find(|before| before.id == id) {
            Some(before) => {
                Draft { node: before.node.clone(), since: before.since, leaving: before.leaving.clone(), ..allocation }
            }
            None => match before.clone().find(|before| overlap(&before.address, &allocation.address)) {
                Some(before) => Draft { node: before.node.clone(), since: self.now, ..allocation },
                None => allocation,
            },
        }
    }

    /// A node's own address, as an allocation can have it: its first InternalIP of each family.
    pub(super) fn own_address(&self, node: &Node) -> AddressPair {
        let internal = node.addresses.iter().take(node.internal).copied();
        pair(internal.filter(|address| !self.held.contains_key(address)))
    }
}
