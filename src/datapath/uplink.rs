//! Uplinks: the interfaces by which egress IPs leave the host.

use crate::datapath::addresses::{LocalAddress, local_addresses};
use crate::datapath::names::{DEVICE, is_devices_own};
use crate::datapath::route_socket::{RouteSocket, errno};
use crate::datapath::vlan::{self, Vlan};
use crate::model::uplink_key::{BETWEEN_INTERFACES, DEFAULT_ROUTE, interfaces_of};
use anyhow::{Context, Result, bail};
use egret_nft::mac::Mac;
use ipnetwork::IpNetwork;
use netlink_packet_route::link::{InfoKind, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{ENODEV, ENOENT};
use rtnetlink::LinkUnspec;
use std::collections::HashMap;
use std::net::IpAddr;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The interface index.
    pub ifindex: u32,
    /// The interface name.
    pub name: String,
    /// The MAC address, if it has six bytes.
    pub mac: Option<Mac>,
    /// The MTU, in bytes.
    pub mtu: u32,
    /// Whether it is up and has a carrier.
    pub running: bool,
    /// What it has to do with a VRF.
    pub vrf: Vrf,
}

/// What an interface has to do with a VRF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vrf {
    /// Nothing.
    #[default]
    None,
    /// It is in a VRF: the kernel routes what comes in by it by the VRF's table.
    Inside {
        /// The index of the VRF's device.
        device: u32,
    },
    /// It is the device of a VRF, which has no link.
    Itself,
}

/// A snapshot of the host's addresses and default routes, to find the interfaces of many addresses.
#[derive(Debug)]
pub struct Uplinks<'a> {
    socket: &'a RouteSocket,
    /// The host's own addresses, whose networks may contain an egress IP.
    networks: Vec<LocalAddress>,
    /// By family, IPv4 first; read at the first use.
    default_routes: [Option<Option<u32>>; 2],
    /// Read at the first use.
    vlans: Option<Vec<Vlan>>,
    by_name: HashMap<Box<str>, Option<Interface>>,
    by_index: HashMap<u32, Option<Interface>>,
}

impl Interface {
    /// Whether it is in a VRF.
    pub fn is_in_vrf(&self) -> bool {
        matches!(self.vrf, Vrf::Inside { .. })
    }
}

impl<'a> Uplinks<'a> {
    /// Reads the host's addresses.
    pub async fn read(socket: &'a RouteSocket) -> Result<Self> {
        let tunnel = by_name(socket, DEVICE).await?.map(|i| i.ifindex);
        let mut networks = local_addresses(socket).await?;
        networks.retain(|a| !a.is_ours() && !is_devices_own(a.address) && Some(a.ifindex) != tunnel);
        let (by_name, by_index) = (HashMap::new(), HashMap::new());
        Ok(Uplinks { socket, networks, default_routes: [None; 2], vlans: None, by_name, by_index })
    }

    /// Finds the uplink of `address`: the first of the interfaces with the given names, or the VLAN on it, if names are given,
    /// else the one whose network contains the address, else the one of the main table's default route. The name
    /// [`DEFAULT_ROUTE`] stands for the last one.
    ///
    /// # Errors
    /// There is no such interface, or it is a VRF's device; the text says what to do.
    pub async fn find(&mut self, address: IpAddr, interface: Option<&str>) -> Result<Interface> {
        let found = self.find_any(address, interface).await?;
        if found.vrf == Vrf::Itself {
            let name = found.name;
            bail!(
                "{name:?} is the device of a VRF, where {address} cannot be announced; name the interface in this VRF that \
                 leads to the network of {address}"
            );
        }
        Ok(found)
    }

    async fn find_any(&mut self, address: IpAddr, interface: Option<&str>) -> Result<Interface> {
        let by_default_route = interface == Some(DEFAULT_ROUTE.as_str());
        if let Some(names) = interface.filter(|_| !by_default_route) {
            return match self.named(names, address.is_ipv4()).await? {
                Some((interface, None)) => Ok(interface),
                Some((parent, Some(id))) => self.on_vlan(&parent, id).await,
                None if interfaces_of(names).any(|(name, _)| name == DEFAULT_ROUTE.as_str()) => {
                    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                    bail!("this node has no default {family} route for {address}; name the gateway's interface")
                }
                None => {
                    let names: Vec<&str> = interfaces_of(names).map(|(name, _)| name).collect();
                    let names = names.join(&BETWEEN_INTERFACES.to_string());
                    bail!(
                        "this node has no interface {names:?} for {address}; name one that each node of the gateway has, \
                         list those of all nodes in interfaces, or leave the interface out"
                    )
                }
            };
        }
        let holds = |a: &&LocalAddress| {
            a.address.is_ipv4() == address.is_ipv4()
                && IpNetwork::new(a.address, a.prefix).is_ok_and(|n| n.contains(address))
        };
        let networks = self.networks.iter().filter(|_| !by_default_route);
        let on_link = networks.filter(holds).max_by_key(|a| (a.prefix, std::cmp::Reverse(a.ifindex)));
        let ifindex = match on_link {
            Some(a) => a.ifindex,
            None => self.default_route(address.is_ipv4()).await?.with_context(|| {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                let missing = if by_default_route { "" } else { "none whose network contains it, and " };
                format!(
                    "this node has no interface for {address}: {missing}no default {family} route; name the gateway's \
                     interface"
                )
            })?,
        };
        let interface = self.indexed(ifindex).await?;
        interface.with_context(|| format!("interface {ifindex}, for {address}, has just vanished"))
    }

    /// The first of the interfaces that the name of an uplink stands for, and the number of the VLAN on it, if one is meant.
    ///
    /// # Errors
    /// The interfaces cannot be read.
    pub async fn named(&mut self, uplink: &str, ipv4: bool) -> Result<Option<(Interface, Option<u16>)>> {
        for (name, vlan) in interfaces_of(uplink) {
            let found = if name == DEFAULT_ROUTE.as_str() {
                match self.default_route(ipv4).await? {
                    Some(ifindex) => self.indexed(ifindex).await?,
                    None => None,
                }
            } else {
                if !self.by_name.contains_key(name) {
                    self.by_name.insert(name.into(), by_name(self.socket, name).await?);
                }
                self.by_name[name].clone()
            };
            if let Some(interface) = found {
                return Ok(Some((interface, vlan)));
            }
        }
        Ok(None)
    }

    async fn on_vlan(&mut self, parent: &Interface, id: u16) -> Result<Interface> {
        let vlans = match &mut self.vlans {
            Some(vlans) => vlans,
            none => none.insert(vlan::all(self.socket).await?),
        };
        let ifindex = vlans.iter().find(|vlan| vlan.is_of(parent.ifindex, id)).map(|vlan| vlan.ifindex);
        let interface = match ifindex {
            Some(ifindex) => self.indexed(ifindex).await?,
            None => None,
        };
        interface.with_context(|| format!("{} has no interface of the VLAN {id} yet", parent.name))
    }

    async fn indexed(&mut self, ifindex: u32) -> Result<Option<Interface>> {
        if !self.by_index.contains_key(&ifindex) {
            self.by_index.insert(ifindex, by_index(self.socket, ifindex).await?);
        }
        Ok(self.by_index[&ifindex].clone())
    }

    /// Returns why this host cannot use `address` as an egress IP, or `None` if it can.
    pub fn unusable(&self, address: IpAddr) -> Option<String> {
        const REMEDY: &str = "take it out of the gateway's spec.addresses";
        self.networks.iter().find_map(|own| {
            if own.address == address {
                return Some(format!(
                    "{address} is this node's own address, and programs that listen there would lose it; {REMEDY}"
                ));
            }
            // In an IPv4 /31 network, hosts use both addresses (RFC 3021). IPv6 has no broadcast address.
            let IpNetwork::V4(network) = IpNetwork::new(own.address, own.prefix).ok()? else { return None };
            let what = match address {
                IpAddr::V4(a) if network.prefix() < 31 && a == network.broadcast() => "broadcast address",
                IpAddr::V4(a) if network.prefix() < 31 && a == network.network() => "network address",
                _ => return None,
            };
            let network = format!("{}/{}", network.network(), network.prefix());
            Some(format!("{address} is the {what} of this node's network {network}, and no host can have it; {REMEDY}"))
        })
    }

    /// The networks on an interface's link, of one family.
    pub fn on_link(&self, ifindex: u32, ipv4: bool) -> impl Iterator<Item = IpNetwork> {
        let of_interface = move |a: &&LocalAddress| a.ifindex == ifindex && a.address.is_ipv4() == ipv4;
        let networks = self.networks.iter().filter(of_interface);
        let networks = networks.filter_map(|a| IpNetwork::new(a.address, a.prefix).ok());
        let networks = networks.filter(move |n| n.prefix() < if ipv4 { 32 } else { 128 });
        networks.filter_map(|n| IpNetwork::new(n.network(), n.prefix()).ok())
    }

    async fn default_route(&mut self, ipv4: bool) -> Result<Option<u32>> {
        let at = usize::from(!ipv4);
        match self.default_routes[at] {
            Some(known) => Ok(known),
            None => Ok(*self.default_routes[at].insert(default_route(self.socket, ipv4).await?)),
        }
    }
}

/// The interface of that name, if there is one.
pub async fn by_name(socket: &RouteSocket, name: &str) -> Result<Option<Interface>> {
    // For a longer name the kernel returns another error (IFNAMSIZ, include/uapi/linux/if.h).
    if name.is_empty() || name.len() > 15 {
        return Ok(None);
    }
    get(socket, LinkUnspec::new_with_name(name).build()).await.with_context(|| format!("interface {name:?}"))
}

/// The interface of that index, if there is one.
pub async fn by_index(socket: &RouteSocket, ifindex: u32) -> Result<Option<Interface>> {
    if ifindex == 0 {
        return Ok(None);
    }
    get(socket, LinkUnspec::new_with_index(ifindex).build()).await.with_context(|| format!("interface {ifindex}"))
}

async fn get(socket: &RouteSocket, request: LinkMessage) -> Result<Option<Interface>> {
    match socket.get(RouteNetlinkMessage::GetLink(request)).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(parse(&link))),
        Ok(_) => bail!("the kernel's response is no link message"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

fn parse(link: &LinkMessage) -> Interface {
    let flags = link.header.flags;
    let mut interface = Interface {
        ifindex: link.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        running: flags.contains(LinkFlags::Up | LinkFlags::Running),
        vrf: Vrf::None,
    };
    let (mut device, mut is_inside) = (0, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(bytes) => interface.mac = Mac::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Controller(index) => device = *index,
            LinkAttribute::LinkInfo(all) => {
                is_inside = all.contains(&LinkInfo::PortKind(InfoPortKind::Vrf));
                if all.contains(&LinkInfo::Kind(InfoKind::Vrf)) {
                    interface.vrf = Vrf::Itself;
                }
            }
            _ => {}
        }
    }
    if is_inside {
        interface.vrf = Vrf::Inside { device };
    }
    interface
}

/// The index of the interface of the main table's best default route.
async fn default_route(socket: &RouteSocket, ipv4: bool) -> Result<Option<u32>> {
    let family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut filter = RouteMessage::default();
    filter.header.address_family = family;
    filter.header.table = RouteHeader::RT_TABLE_MAIN;
    filter.header.kind = RouteType::Unicast;
    let routes = socket
        .dump(RouteNetlinkMessage::GetRoute(filter), |m| match m {
            RouteNetlinkMessage::NewRoute(r)
                if r.header.address_family == family && r.header.destination_prefix_length == 0 =>
            {
                let dead = r.header.flags.intersects(RouteFlags::Dead | RouteFlags::Linkdown);
                candidate(&r).map(|(metric, oif)| (dead, metric, oif))
            }
            _ => None,
        })
        .await;
    match routes {
        Ok(routes) => Ok(routes.into_iter().min().map(|(_, _, oif)| oif)),
        Err(e) if errno(&e) == Some(ENOENT) => Ok(None),
        Err(e) => Err(e.context("cannot read the main routing table")),
    }
}

/// A default route's metric and interface. If it has several next hops, the interface is that of the first one that can
/// be used.
fn candidate(route: &RouteMessage) -> Option<(u32, u32)> {
    let (mut metric, mut oif) = (0, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Priority(p) => metric = *p,
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::MultiPath(hops) => {
                let unusable = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
                let is_usable = |hop: &&RouteNextHop| !hop.flags.intersects(unusable);
                let hop = hops.iter().find(is_usable).or(hops.first());
                oif = oif.or(hop.map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    Some((metric, oif?))
}
