//! The node daemon's interface to the kernel: it brings each part of the datapath in sync, in an order in which
//! nothing leaks meanwhile.

mod counters;
mod egress_ips;
mod extras;
mod ifbs;
mod peers;
mod programs;
mod routed;
mod routing;
mod tunnel_device;
mod vlans;

pub use counters::Counts;
pub use egress_ips::{Desired, UplinkStatus};
use ifbs::Ifbs;
pub use peers::Faults;
use programs::Programs;
use tunnel_device::Entrance;
pub use tunnel_device::TunnelEgress;
use vlans::Vlans;

use crate::datapath::addresses::{self, LocalAddress};
use crate::datapath::foreign_programs;
use crate::datapath::names::*;
use crate::datapath::pod_veth::{self, Veth};
use crate::datapath::route_socket::RouteSocket;
use crate::datapath::routes::RouteKind;
use crate::datapath::ruleset::{self, PeerIndexes, Ruleset, SharedSets};
use crate::datapath::tunnel::Tunnel;
use crate::datapath::underlay::Underlay;
use crate::model::marks::{EgressId, MAX_PEER, Marks};
use crate::node_plan::allocations::Facts;
use crate::node_plan::{NodePlan, View, parse_chain_name};
use anyhow::{Context, Result};
use egret_cni::quarantine::Quarantine;
use egret_nft::Nftables;
use egret_nft::mac;
use egret_nft::table::{Chain, TableName};
use ipnetwork::IpNetwork;
use routed::RouteDevice;
use routing::Routing;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// A table's name and its chains by name.
pub type Chains = (TableName, BTreeMap<Arc<str>, Arc<Chain>>);

/// The sockets to the kernel, and the state that was last applied.
pub struct Host {
    pub routes: RouteSocket,
    nft: Nftables,
    quarantine: Quarantine,
    programs: Programs,
    marks: Marks,
    peers: PeerIndexes,
    shared: SharedSets,
    ruleset: Option<Ruleset>,
    /// The state last applied, to skip what has not changed; `None` if unknown.
    routing: Option<Routing>,
    egress_ips: Option<Digest>,
    route_device: RouteDevice,
    vlans: Vlans,
    /// The addresses for which this node answers no ARP; `None` if unknown.
    unanswered: Option<BTreeSet<Ipv4Addr>>,
    uplinks: BTreeSet<u32>,
    /// See [`NodePlan::from_vrf`].
    from_vrf: Option<Vec<IpNetwork>>,
    forwarding: Option<Digest>,
    tunnel: Option<(Tunnel, u32)>,
    entrance: Entrance,
    ifbs: Ifbs,
    /// Whether the table for bridged pods that come by ifb devices may be there.
    had_limited: bool,
    /// Whether the kernel supports the flush guard.
    can_guard: bool,
    underlay: Option<Underlay>,
    /// Whether the routes may have changed since they were read.
    underlay_is_stale: bool,
    faults: PartFaults,
    /// Whether the kernel is assumed to support the log of changed ports.
    port_log: bool,
    /// Whether the kernel can choose by a connection's hash, as far as is known.
    hashes: bool,
    /// Whether the kernel takes the limits of bandwidths, as far as is known.
    limits: bool,
    /// Whether the kernel takes tables of the family bridge, as far as is known.
    bridges: bool,
    /// Whether a warning was logged that it does not support the log of changed ports.
    port_log_missed: bool,
}

/// The faults of each part.
#[derive(Debug, Default)]
struct PartFaults {
    peers: Faults,
    routes: Faults,
    addresses: Faults,
    vlans: Faults,
}

/// A hash of an applied state, instead of a copy of maybe ten thousand entries. After a collision, once in 2^64, the
/// state is outdated until everything is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Digest(u64);

impl Digest {
    fn new(of: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        Digest(hasher.finish())
    }
}

impl Host {
    /// Opens the sockets and reads the peer indexes of an earlier daemon, which connection marks contain. With
    /// `own_tables`, the daemon owns the tables, where the kernel supports that. `fast_path`: the daemon's own programs may
    /// be at veths.
    pub fn open(marks: Marks, own_tables: bool, egress: TunnelEgress, fast_path: bool) -> Result<Self> {
        let mut nft = Nftables::open().context("nf_tables")?;
        if own_tables && !nft.own_tables().context("nf_tables")? {
            tracing::warn!(
                "this kernel cannot keep others from flushing Egret's tables (Linux 6.9 can): `nft flush ruleset`, and so a \
                 restart of nftables.service, interrupts selected pods for some milliseconds, and while egretd is away opens \
                 them"
            );
        }
        let ifbs = Ifbs::open().context("ifb devices")?;
        let entrance = Entrance::new(egress, &mut nft)?;
        let had_limited = !nft.counters(ruleset::BRIDGE).context("nf_tables")?.is_empty();
        let can_guard = nft.can_end_with_socket().context("nf_tables")?;
        let mut peers = PeerIndexes::new();
        for (key, data) in nft.elements(ruleset::INET, ruleset::set::PEER).context("nf_tables")?.iter() {
            if let (Ok(mac), Some(mark)) = (mac::Mac::try_from(key.bytes.as_slice()), ruleset::mark_of(&data)) {
                peers.insert(mac, (mark & u32::from(MAX_PEER)) as u16);
            }
        }
        Ok(Host {
            routes: RouteSocket::open()?,
            nft,
            quarantine: Quarantine::open().context("quarantine")?,
            programs: Programs::open(fast_path).context("eBPF at veths")?,
            marks,
            peers,
            shared: SharedSets::default(),
            ruleset: None,
            routing: None,
            egress_ips: None,
            route_device: RouteDevice::Unknown,
            vlans: Vlans::default(),
            unanswered: None,
            uplinks: BTreeSet::new(),
            from_vrf: None,
            forwarding: None,
            tunnel: None,
            entrance,
            ifbs,
            had_limited,
            can_guard,
            underlay: None,
            underlay_is_stale: false,
            faults: PartFaults::default(),
            port_log: true,
            hashes: true,
            limits: true,
            bridges: true,
            port_log_missed: false,
        })
    }

    /// The pod marks and interface indexes of the pods' chains in the kernel.
    pub fn pod_marks(&mut self) -> Result<Vec<(u16, u32)>> {
        let chains = self.nft.chains(ruleset::INET).context("nf_tables")?;
        Ok(chains.iter().filter_map(|name| parse_chain_name(name)).collect())
    }

    /// The upper half of an earlier daemon's connection marks, if its tables exist.
    pub fn connection_base(&mut self) -> Result<Option<u16>> {
        for set in [ruleset::set::EGRESS_ID_OUT, ruleset::set::BACK] {
            let elements = self.nft.elements(ruleset::INET, set).context("nf_tables")?;
            if let Some(mark) = elements.iter().find_map(|(key, _)| ruleset::mark_in(&key)) {
                return Ok(Some((mark >> 16) as u16));
            }
        }
        Ok(None)
    }

    /// Makes the next reconciliation read everything from the kernel.
    pub fn invalidate(&mut self) {
        self.nft.invalidate();
        self.programs.invalidate();
        self.ifbs.invalidate();
        self.entrance.try_again();
        // A kernel module may have been loaded since the log was rejected.
        (self.port_log, self.hashes, self.limits, self.bridges) = (true, true, true, true);
        self.routing = None;
        self.egress_ips = None;
        (self.route_device, self.unanswered) = (RouteDevice::Unknown, None);
        self.vlans.invalidate();
        self.forwarding = None;
        self.tunnel = None;
        self.underlay_is_stale = true;
    }

    /// Makes the next reconciliation read rules and routes.
    pub fn invalidate_routing(&mut self) {
        self.programs.invalidate_rules();
        self.routing = None;
    }

    /// The tunnel device, if it is in sync.
    pub fn tunnel_end(&self) -> Option<&Tunnel> {
        self.tunnel.as_ref().map(|(tunnel, _)| tunnel)
    }

    /// The index of the tunnel device, if it is in sync.
    pub fn tunnel_index(&self) -> Option<u32> {
        self.tunnel.as_ref().map(|(_, index)| *index)
    }

    /// Whether packets are to enter the tunnel by a pair of veths, and why.
    pub fn uses_veths(&self) -> Option<&'static str> {
        self.entrance.reason()
    }

    /// Makes the next reconciliation look for an ifb device at this interface, if it is a selected pod's veth.
    pub fn invalidate_ifb(&mut self, index: u32) {
        self.ifbs.invalidate_one(index);
    }

    /// Whether devices, routes or tables of the way into the tunnel are not yet as the pods need them.
    pub fn is_entrance_unsettled(&self) -> bool {
        self.ruleset.as_ref().is_some_and(|ruleset| self.entrance.is_unsettled(ruleset.plan().way))
    }

    /// The indexes of the veths of selected pods.
    pub fn veths(&self) -> impl Iterator<Item = u32> {
        self.ruleset.iter().flat_map(|ruleset| ruleset.veths())
    }

    /// The netlink ports of the sockets with which this daemon makes changes.
    pub fn ports(&self) -> BTreeSet<u32> {
        [self.routes.port(), self.nft.port(), self.quarantine.port(), self.programs.port()].into()
    }

    /// The indexes of the interfaces with egress IPs.
    pub fn uplinks(&self) -> impl Iterator<Item = u32> {
        self.uplinks.iter().copied()
    }

    /// The indexes of the interfaces by which another program's eBPF could send selected pods' packets, if there is any.
    pub fn ways_out(&self) -> impl Iterator<Item = u32> {
        let routes = self.routing.iter().filter_map(|routing| routing.tables.get(&TABLE_REDIRECTED)).flatten();
        let interfaces = routes.filter_map(|route| match route.kind {
            RouteKind::Broadcast { oif } => Some(oif),
            _ => None,
        });
        interfaces.filter(|_| self.programs.are_there())
    }

    /// The routes to the other nodes' ends of the tunnel, as they were last read.
    pub fn underlay(&self) -> Option<&Underlay> {
        self.underlay.as_ref()
    }

    /// Makes the next reconciliation read the routes to the other nodes' ends of the tunnel.
    pub fn invalidate_underlay(&mut self) {
        self.underlay_is_stale = true;
    }

    /// Makes the next reconciliation read the nftables tables.
    pub fn invalidate_tables(&mut self) {
        self.nft.invalidate();
    }

    /// Whether Egret's tables exist.
    pub fn has_tables(&mut self) -> Result<bool> {
        Ok(!self.nft.chains(ruleset::INET).context("nf_tables")?.is_empty())
    }

    /// Whether another program had changed the tables, and they were repaired, since the last call.
    pub fn tables_were_changed_by_others(&mut self) -> bool {
        self.nft.were_changed_by_others()
    }

    /// The faults of single nodes, networks and addresses. All else is in sync.
    pub fn faults(&self) -> Faults {
        let PartFaults { peers, routes, addresses, vlans } = &self.faults;
        [peers, routes, addresses, vlans].into_iter().flatten().map(|(of, why)| (of.clone(), why.clone())).collect()
    }

    /// The other nodes' indexes in connection marks.
    pub fn peer_indexes(&self) -> &PeerIndexes {
        &self.peers
    }

    /// Whether the tunnel carries IPv6.
    fn speaks_ipv6(&self) -> bool {
        self.tunnel.as_ref().is_some_and(|(tunnel, _)| tunnel.ipv6)
    }

    /// The tunnel device's index, and the address from which this node sends liveness probes. `None` if the tunnel
    /// carries no IPv6.
    pub fn prober(&self) -> Option<(u32, Ipv6Addr)> {
        let (tunnel, device) = self.tunnel.as_ref()?;
        tunnel.ipv6.then(|| (*device, of_mac(PROBER, tunnel.mac)))
    }

    /// Computes peer indexes and shared sets from a new view.
    pub fn view(&mut self, view: &View) {
        self.peers.retain(|mac, _| view.allocations.peers.contains_key(mac));
        if view.allocations.is_gateway {
            let taken: HashSet<u16> = self.peers.values().copied().collect();
            let mut free = (1..=MAX_PEER).filter(|i| !taken.contains(i));
            for mac in view.allocations.peers.keys() {
                if !self.peers.contains_key(mac)
                    && let Some(index) = free.next()
                {
                    self.peers.insert(*mac, index);
                }
            }
        }
        self.shared = ruleset::shared_sets(view, &self.peers, self.marks, &self.shared);
        if !self.limits {
            self.shared = self.shared.without_limits();
        }
    }

    /// Brings the nftables tables in sync, in one transaction. Returns how many changes that took.
    pub fn tables(&mut self, mut plan: NodePlan) -> Result<usize> {
        // First, as a pod's packets must not take another program's way while nothing decides on them.
        let blocked = self.programs.block_redirects(plan.pods.values())?;
        let limited = self.ifbs.of(plan.pods.values())?;
        self.entrance.set_ifbs(!limited.is_empty());
        self.had_limited |= !limited.is_empty();
        plan.limited = (self.had_limited && self.bridges).then_some(limited);
        let Some((tunnel, device)) = &self.tunnel else { return Ok(blocked) };
        (plan.local, plan.port_log) = (Some(tunnel.local), self.port_log);
        plan.way = self.entrance.way(*device);
        plan.device = self.entrance.device(*device, Some(plan.way));
        plan.foreign_marks = foreign_programs::writes_marks();
        plan.from_vrf.clone_from(&self.from_vrf);
        plan.flush_guard = self.can_guard && !self.nft.owns_tables();
        if !self.hashes {
            plan = plan.without_hashes();
        }
        let ruleset = Ruleset::new(plan, &self.shared, self.marks, self.ruleset.as_ref());
        let (ruleset, changes) = match self.nft.apply(ruleset.tables()) {
            Ok(changes) => (ruleset, changes),
            Err(e) => self.apply_without_extras(ruleset.plan(), e)?,
        };
        self.ruleset = Some(ruleset);
        Ok(changes + blocked)
    }

    /// The chains of Egret's tables, as they were last applied.
    pub fn chains(&self) -> Vec<Chains> {
        let tables = self.ruleset.iter().flat_map(|ruleset| ruleset.tables());
        tables.map(|(name, table)| (*name, table.chains.clone())).collect()
    }

    /// The node's own addresses, as facts for the view.
    pub async fn facts(&self, refused: BTreeMap<EgressId, String>) -> Result<Facts> {
        let all = addresses::local_addresses(&self.routes).await?;
        let of_all_nodes = DEVICES_OF_SERVICES.map(|name| nix::net::if_::if_nametoindex(name).ok());
        let is_own = |a: &&LocalAddress| !a.tentative && !of_all_nodes.contains(&Some(a.ifindex));
        let addresses = all.iter().filter(is_own).filter(|a| !a.address.is_loopback()).map(|a| a.address);
        Ok(Facts { addresses: addresses.filter(|a| !is_devices_own(*a)).collect(), refused, ..Facts::default() })
    }

    /// The veth with this index, if there is one.
    pub async fn veth(&self, index: u32) -> Result<Option<Veth>> {
        pod_veth::veth_by_index(&self.routes, index).await
    }

    /// The host's end of a pod's veth pair, if the veth with this index has this peer.
    pub async fn interface(&self, index: u32, peer_index: u32) -> Result<Option<super::pods::Interface>> {
        let veth = self.veth(index).await?;
        let veth = veth.filter(|v| v.peer_index == peer_index);
        Ok(veth.map(|v| super::pods::Interface { name: v.name, index, peer_index }))
    }

    /// Puts addresses into quarantine. Addresses that are in quarantine already are not an error.
    pub fn quarantine<'a>(&mut self, addresses: impl IntoIterator<Item = &'a IpAddr>) -> Result<()> {
        addresses.into_iter().try_for_each(|a| self.quarantine.add(a)).context("quarantine")
    }

    /// The addresses in quarantine.
    pub fn quarantined(&mut self) -> Result<BTreeSet<IpAddr>> {
        self.quarantine.addresses().context("quarantine")
    }

    /// Lifts quarantines.
    pub fn lift_quarantines(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<()> {
        for address in addresses {
            self.quarantine.lift(address).with_context(|| format!("quarantine of {address}"))?;
            tracing::info!(%address, "quarantine lifted");
        }
        Ok(())
    }
}
