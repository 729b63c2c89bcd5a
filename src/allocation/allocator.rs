//! The allocator's working state: which ids and addresses are in use, in cooldown and free.

use super::address_pair::{addresses, of_pair, overlap, pair};
use super::cooldown::{Cooldowns, cooldown_ended_until, in_cooldown};
use super::ids::Ids;
use super::index::{AllocationIndex, GatewayIndex, List, PolicyIndex, RequestIndex};
use super::living;
use super::pool::{Overlap, Pool, usable};
use super::request::Requests;
use super::services::ServicesByAddress;
use super::unreached::ReportRequest;
use crate::api::{AddressPair, AllocationKind, LostUplink, Placement, ReleasedAllocation};
use crate::model::selector::Name;
use crate::model::{AddressRange, Cluster, Gateway, Node, ObjectKey};
use egret_nft::Family;
use ipnetwork::IpNetwork;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

/// A gateway with its nodes and the addresses that it may give out.
#[derive(Clone, Debug)]
pub(super) struct GatewayPool<'a> {
    pub(super) name: &'a Name,
    pub(super) gateway: &'a Gateway,
    /// The nodes of the gateway, sorted by name.
    pub(super) nodes: Vec<(&'a Name, &'a Node)>,
    /// The whole pool. Existing allocations may keep any address of it.
    pub(super) declared: Pool,
    /// The pool without the addresses that earlier gateways have. New allocations may name any address of it.
    pub(super) usable: Pool,
    /// The addresses that are given to policies that name none: `usable` without reservations and networks of the
    /// cluster.
    pub(super) open: Pool,
    pub(super) overlaps: Vec<Overlap>,
    /// Addresses that were given back until this time have no cooldown, by the annotation of the gateway.
    pub(super) ended_until: i64,
    /// The request for reports of nodes.
    pub(super) reports: ReportRequest,
}

/// An allocation that is being computed.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// The index of the gateway in `gateway_pools`.
    pub(super) gateway: GatewayIndex,
    pub(super) id: u16,
    pub(super) kind: AllocationKind,
    /// Its position among the egress IPs that its policy asks for, if it is a dedicated one.
    pub(super) ordinal: u16,
    pub(super) address: AddressPair,
    pub(super) node: Option<Name>,
    /// When the allocation was assigned to `node`, seconds since the Unix epoch.
    pub(super) since: i64,
    /// In a planned move, the node that holds the egress IP until `node` does.
    pub(super) leaving: Option<Name>,
    /// The Service whose address it is.
    pub(super) service: Option<ObjectKey>,
    /// The indices of the requests that use the allocation.
    pub(super) requests: Vec<RequestIndex>,
}

impl Draft {
    /// An allocation without requests.
    pub(super) fn new(
        gateway: GatewayIndex,
        id: u16,
        kind: AllocationKind,
        address: AddressPair,
        node: Option<Name>,
    ) -> Self {
        Draft { gateway, id, kind, ordinal: 0, address, node, since: 0, leaving: None, service: None, requests: vec![] }
    }
}

/// The networks of pods and Services that the controller knows. A server outside cannot answer to an address in them.
fn networks_inside(cluster: &Cluster) -> impl Iterator<Item = (AddressRange, IpNetwork)> + '_ {
    let pods = cluster.nodes.values().flat_map(|node| node.pod_cidrs.iter());
    let networks = pods.chain(cluster.inside.pods.keys()).chain(cluster.inside.services.keys());
    networks.map(|network| (AddressRange::from(network), *network))
}

/// The state of one computation.
#[derive(Clone, Debug)]
pub(super) struct Allocator<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) now: i64,
    pub(super) gateway_pools: List<GatewayIndex, GatewayPool<'a>>,
    pub(super) requests: Requests<'a>,
    /// The existing allocations that stay come first, then new ones in the order in which they were made.
    pub(super) allocations: List<AllocationIndex, Draft>,
    pub(super) services: ServicesByAddress<'a>,
    /// The indices of allocations of pool addresses, by address.
    pub(super) held: HashMap<IpAddr, AllocationIndex>,
    /// The indices of allocations of nodes' own addresses, by address. Two gateways may have the same node.
    pub(super) held_by_nodes: HashMap<IpAddr, AllocationIndex>,
    /// Nodes' own addresses. A node whose address is given away would be cut off.
    pub(super) node_addresses: HashMap<IpAddr, &'a Name>,
    /// Nodes that count as unreachable.
    unreachable: HashSet<&'a str>,
    pub(super) ids: Ids,
    pub(super) in_cooldown: Cooldowns,
}

impl<'a> Allocator<'a> {
    /// The network of pods or Services that contains the address.
    pub(super) fn inside(&self, address: IpAddr) -> Option<IpNetwork> {
        networks_inside(self.cluster).find(|(range, _)| range.contains(address)).map(|(_, network)| network)
    }

    /// A network of pods or Services that overlaps the range, and the first common address.
    pub(super) fn inside_range(&self, range: &AddressRange) -> Option<(IpNetwork, IpAddr)> {
        let first = networks_inside(self.cluster).find(|(other, _)| other.overlaps(range));
        first.map(|(other, network)| (network, other.first.max(range.first)))
    }

    /// A state in which nothing is allocated, with the cooldowns at `now`.
    pub(super) fn open(cluster: &'a Cluster, now: i64) -> Self {
        let mut gateway_pools = List::new();
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
            let default = addresses(&gateway.default_address).map(|a| AddressRange { first: a, last: a });
            let default: Vec<AddressRange> = default.collect();
            let reserved = gateway.reservations.iter().flat_map(|reserved| &reserved.addresses);
            let reserved = reserved.chain(&default).collect();
            let open = usable.clone().without(&reserved).without(&inside);
            let reports = ReportRequest::default();
            gateway_pools.push(GatewayPool {
                name,
                gateway,
                nodes,
                declared,
                usable,
                open,
                overlaps,
                ended_until,
                reports,
            });
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
            allocations: List::new(),
            held: HashMap::new(),
            held_by_nodes: HashMap::new(),
            services: ServicesByAddress::new(cluster),
            node_addresses,
            unreachable: living::unreachable(cluster),
            ids: Ids::new(),
            in_cooldown: Cooldowns::default(),
        };
        for index in allocator.gateway_pools.indices() {
            let status = &allocator.gateway_pools[index].gateway.status;
            for (released, at) in in_cooldown(status, now) {
                allocator.start_cooldown(index, ReleasedAllocation { at, ..released.clone() });
            }
        }
        allocator
    }

    /// Whether a node counts as alive, by the reports of the other nodes.
    pub(super) fn lives(&self, node: &Name) -> bool {
        !self.unreachable.contains(&**node)
    }

    /// How many of the uplinks and families that the gateway may need a node reports as lost.
    pub(super) fn lacks(&self, node: &Name, gateway: GatewayIndex) -> usize {
        let GatewayPool { gateway, name, .. } = &self.gateway_pools[gateway];
        let interface = gateway.uplink_name();
        let status = self.cluster.egress_nodes.get(node);
        let lost = status.map(|status| status.of_allocations().lost.as_slice()).unwrap_or_default();
        let concerns = |lost: &&LostUplink| {
            lost.interface.as_deref() == interface.as_deref() && lost.gateway.as_deref().is_none_or(|of| *of == ***name)
        };
        lost.iter().filter(concerns).count()
    }

    /// Whether a node reports a tunnel address: Egret runs there, or has run there.
    pub(super) fn is_reachable(&self, node: &Name) -> bool {
        self.cluster.egress_nodes.get(node).is_some_and(|status| status.tunnel_mac.is_some())
    }

    /// Starts the cooldown of an id and its addresses.
    pub(super) fn start_cooldown(&mut self, gateway: GatewayIndex, released: ReleasedAllocation) {
        self.ids.start_cooldown(released.id);
        let ended = released.at <= self.gateway_pools[gateway].ended_until;
        self.in_cooldown.add(gateway, released, ended, &self.requests.by_key);
    }

    /// Assigns an allocation to a request.
    pub(super) fn assign(&mut self, allocation: AllocationIndex, request: RequestIndex) {
        self.allocations[allocation].requests.push(request);
        self.requests.all[request].allocation = Some(allocation);
    }

    /// The indices of the policies that use an allocation, by seniority.
    pub(super) fn users(&self, allocation: AllocationIndex) -> Vec<PolicyIndex> {
        let requests = self.allocations[allocation].requests.iter();
        let mut users: Vec<PolicyIndex> =
            requests.flat_map(|d| self.requests.all[*d].policies.iter().copied()).collect();
        users.sort_unstable();
        users.dedup();
        users
    }

    /// Adds an allocation. Its id is taken already.
    pub(super) fn add(&mut self, allocation: Draft) -> AllocationIndex {
        let index = self.allocations.end();
        for address in addresses(&allocation.address) {
            match allocation.kind {
                AllocationKind::Node => self.held_by_nodes.insert(address, index),
                _ => self.held.insert(address, index),
            };
        }
        self.allocations.push(allocation)
    }

    /// The node that has the address as its own, if Egret places the gateway's addresses. With external placement, a
    /// node that has an address may well report it.
    pub(super) fn node_with(&self, gateway: GatewayIndex, address: IpAddr) -> Option<&'a Name> {
        match self.gateway_pools[gateway].gateway.placement {
            Placement::Managed => self.node_addresses.get(&address).copied(),
            Placement::External => None,
        }
    }

    /// The allocation that has the address now.
    pub(super) fn holder(&self, address: IpAddr) -> Option<AllocationIndex> {
        self.held.get(&address).or_else(|| self.held_by_nodes.get(&address)).copied()
    }

    /// A free address of the family for these policies: one that they gave back within the cooldown, else the first
    /// free one.
    pub(super) fn pick(&mut self, gateway: GatewayIndex, family: Family, policies: &[PolicyIndex]) -> Option<IpAddr> {
        let returned = self.in_cooldown.of(gateway, policies).into_iter().find_map(|entry| {
            let address = of_pair(family, &entry.address)?;
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

    /// Takes an id for a new allocation: the one that these policies gave back together with one of its addresses,
    /// else the first free one after the hash of `name`.
    pub(super) fn new_id(
        &mut self,
        gateway: GatewayIndex,
        address: &AddressPair,
        policies: &[PolicyIndex],
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

    /// A new allocation of pool addresses. If it has the id of an existing allocation (its policy now names the
    /// address that it had), it keeps the node. So does an address that one policy leaves while another one names it.
    pub(super) fn draft_like_before(
        &self,
        gateway: GatewayIndex,
        id: u16,
        kind: AllocationKind,
        address: AddressPair,
    ) -> Draft {
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

    /// The own address of a node, as an allocation can have it: the first InternalIP of each family.
    pub(super) fn own_address(&self, node: &Node) -> AddressPair {
        let internal = node.addresses.iter().take(node.internal).copied();
        pair(internal.filter(|address| !self.held.contains_key(address)))
    }
}
