//! The host's ends of pods' veth pairs.

use crate::datapath::announce::{LinkAddress, probe};
use crate::datapath::pod_netns;
use crate::datapath::route_socket::{RouteSocket, errno};
use crate::datapath::uplink::by_index;
use anyhow::{Context, Result, bail};
use egret_nft::mac::Mac;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EHOSTUNREACH, ENETUNREACH, ENODEV, ENOENT, EOPNOTSUPP};
use rtnetlink::LinkUnspec;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tokio::net::UdpSocket;

/// UDP port 9, discard (RFC 863): a datagram to it has no effect.
const DISCARD: u16 = 9;
/// How often a pod is looked up after it was sent a datagram.
const LOOKUPS: u32 = 20;
const LOOKUP_INTERVAL: Duration = Duration::from_millis(15);
/// How long to wait for a pod's ARP reply.
const ARP_TIMEOUT: Duration = Duration::from_millis(300);

/// The host's end of a veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    /// The interface name.
    pub name: String,
    /// The interface index.
    pub index: u32,
    /// The other end's index, in the pod's network namespace.
    pub peer_index: u32,
    /// The index of the bridge of which it is a port.
    pub master: Option<u32>,
    /// The MAC address of the host's end.
    pub mac: Mac,
}

/// The veth with this index; `None` if there is no such interface or it is of another kind.
pub async fn veth_by_index(socket: &RouteSocket, index: u32) -> Result<Option<Veth>> {
    // The kernel rejects a request with such an index.
    if i32::try_from(index).is_err() || index == 0 {
        return Ok(None);
    }
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_index(index).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(veth(&link)),
        Ok(_) => bail!("cannot read interface {index}: the kernel's response is no link message"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e.context(format!("cannot read interface {index}"))),
    }
}

/// Finds the veth of the pod with `address`: by the pod's own route, else by the bridge that knows the pod's MAC
/// address. If the bridge's entry has expired, the pod is sent a datagram and looked up again. Where no route leads to it,
/// by the addresses in the namespaces behind the veths. `None` if the pod is not behind a veth of this host.
pub async fn find_pod_veth(socket: &RouteSocket, address: IpAddr) -> Result<Option<Veth>> {
    let context = || format!("cannot find the interface of the pod {address}");
    let mut bridge = match locate(socket, address).await.with_context(context)? {
        Location::Veth(veth) => return Ok(Some(veth)),
        Location::Elsewhere => return pod_netns::find(address).with_context(context),
        Location::Unlearned { bridge } => bridge,
    };
    // From the pod's answer, which may be an ICMP error, the bridge learns the pod's port.
    let _ = provoke(address).await;
    for _ in 0..LOOKUPS {
        tokio::time::sleep(LOOKUP_INTERVAL).await;
        match locate(socket, address).await.with_context(context)? {
            Location::Veth(veth) => return Ok(Some(veth)),
            Location::Elsewhere => return Ok(None),
            Location::Unlearned { bridge: same } => bridge = same,
        }
    }
    probe_by_arp(socket, bridge, address).await.with_context(context)
}

/// Probes the pod by ARP, which no IP packet filter blocks. IPv6 pods are not probed: a pod that is being set up and
/// checks its address for uniqueness would take the probe for another host's claim.
async fn probe_by_arp(socket: &RouteSocket, bridge: u32, address: IpAddr) -> Result<Option<Veth>> {
    let Some(interface) = by_index(socket, bridge).await?.filter(|i| i.running && address.is_ipv4()) else {
        return Ok(None);
    };
    let target = LinkAddress { address, interface, claim: None };
    let answers = probe(std::slice::from_ref(&target), ARP_TIMEOUT).await?;
    let Some(mac) = answers.first().copied().flatten() else { return Ok(None) };
    let Some(port) = bridge_port(socket, bridge, mac).await? else { return Ok(None) };
    Ok(veth_by_index(socket, port).await?.filter(|v| v.master == Some(bridge)))
}

enum Location {
    Veth(Veth),
    /// The address is on a bridge's link, and the bridge has no entry for it.
    Unlearned {
        /// The bridge's index.
        bridge: u32,
    },
    Elsewhere,
}

async fn locate(socket: &RouteSocket, address: IpAddr) -> Result<Location> {
    let Some(oif) = on_link(socket, address).await? else { return Ok(Location::Elsewhere) };
    match oif {
        // If a veth has a whole network behind it, the host is itself a container and the veth is its uplink.
        Link { index, single: true } => {
            Ok(veth_by_index(socket, index).await?.map_or(Location::Elsewhere, Location::Veth))
        }
        Link { index, single: false } => behind_bridge(socket, index, address).await,
    }
}

async fn behind_bridge(socket: &RouteSocket, bridge: u32, address: IpAddr) -> Result<Location> {
    if !is_bridge(socket, bridge).await? {
        return Ok(Location::Elsewhere);
    }
    let Some(mac) = neighbour(socket, bridge, address).await? else { return Ok(Location::Unlearned { bridge }) };
    let Some(port) = bridge_port(socket, bridge, mac).await? else { return Ok(Location::Unlearned { bridge }) };
    let veth = veth_by_index(socket, port).await?.filter(|v| v.master == Some(bridge));
    Ok(veth.map_or(Location::Elsewhere, Location::Veth))
}

struct Link {
    index: u32,
    /// Whether the route is for this one address.
    single: bool,
}

/// The interface by which the host sends to `address` directly, without a next hop.
async fn on_link(socket: &RouteSocket, address: IpAddr) -> Result<Option<Link>> {
    let (family, bits) = if address.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.destination_prefix_length = bits;
    // Return the matching route itself, not the result of the lookup.
    request.header.flags = RouteFlags::FibMatch;
    request.attributes.push(RouteAttribute::Destination(address.into()));
    let route = match socket.get(RouteNetlinkMessage::GetRoute(request)).await {
        Ok(RouteNetlinkMessage::NewRoute(route)) => route,
        Ok(_) => bail!("the kernel's response is no route"),
        // An `unreachable` or `blackhole` route causes these errors, and so does a host without IPv6.
        Err(e) if errno(&e).is_some_and(|e| [ENETUNREACH, EHOSTUNREACH, EOPNOTSUPP].contains(&e)) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let mut index = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => return Ok(None),
            _ => {}
        }
    }
    let single = route.header.destination_prefix_length == bits;
    Ok(index.filter(|_| route.header.kind == RouteType::Unicast).map(|index| Link { index, single }))
}

async fn is_bridge(socket: &RouteSocket, index: u32) -> Result<bool> {
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_index(index).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(kind(&link) == Some(&InfoKind::Bridge)),
        Err(e) if errno(&e) != Some(ENODEV) => Err(e),
        _ => Ok(false),
    }
}

/// The MAC address in the host's neighbour entry of `address`.
async fn neighbour(socket: &RouteSocket, ifindex: u32, address: IpAddr) -> Result<Option<Mac>> {
    let mut request = NeighbourMessage::default();
    request.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    request.header.ifindex = ifindex;
    request.attributes.push(NeighbourAttribute::Destination(address.into()));
    match socket.get(RouteNetlinkMessage::GetNeighbour(request)).await {
        Ok(RouteNetlinkMessage::NewNeighbour(n))
            if !matches!(n.header.state, NeighbourState::Failed | NeighbourState::Incomplete) =>
        {
            Ok(link_layer(&n))
        }
        Err(e) if errno(&e) != Some(ENOENT) => Err(e),
        _ => Ok(None),
    }
}

/// The bridge port at which the bridge has learned `mac`.
async fn bridge_port(socket: &RouteSocket, bridge: u32, mac: Mac) -> Result<Option<u32>> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.attributes.push(NeighbourAttribute::Controller(bridge));
    let mut one = request.clone();
    one.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    match socket.get(RouteNetlinkMessage::GetNeighbour(one)).await {
        Ok(RouteNetlinkMessage::NewNeighbour(n)) => return Ok(Some(n.header.ifindex).filter(|i| *i != bridge)),
        Err(e) if errno(&e) != Some(ENOENT) => return Err(e),
        _ => {}
    }
    // A bridge with VLANs finds an entry only by its VLAN, which is unknown here, so all entries are read.
    let ports = socket
        .dump(RouteNetlinkMessage::GetNeighbour(request), |m| match m {
            RouteNetlinkMessage::NewNeighbour(n) if n.header.ifindex != bridge && link_layer(&n) == Some(mac) => {
                Some(n.header.ifindex)
            }
            _ => None,
        })
        .await?;
    Ok(ports.first().copied())
}

async fn provoke(address: IpAddr) -> std::io::Result<()> {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).await?.send_to(&[], (address, DISCARD)).await.map(|_| ())
}

fn link_layer(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
        _ => None,
    })
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().find_map(|i| if let LinkInfo::Kind(kind) = i { Some(kind) } else { None })
        }
        _ => None,
    })
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    if kind(link) != Some(&InfoKind::Veth) {
        return None;
    }
    let mut veth =
        Veth { name: String::new(), index: link.header.index, peer_index: 0, master: None, mac: Mac::default() };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => veth.name.clone_from(name),
            LinkAttribute::Link(peer) => veth.peer_index = *peer,
            LinkAttribute::Controller(master) => veth.master = Some(*master).filter(|m| *m != 0),
            LinkAttribute::Address(bytes) => veth.mac = Mac::try_from(bytes.as_slice()).unwrap_or_default(),
            _ => {}
        }
    }
    Some(veth)
}
