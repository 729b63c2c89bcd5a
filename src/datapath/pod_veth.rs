//! The host's ends of pods' interfaces.

use crate::datapath::announce::{Target, probe};
use crate::datapath::uplink::by_index;
use crate::kernel::route_socket::{RouteSocket, errno};
use crate::model::mac::Mac;
use anyhow::{Context, Result, bail};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EHOSTUNREACH, ENETUNREACH, ENODEV, ENOENT, EOPNOTSUPP};
use rtnetlink::LinkUnspec;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tokio::net::UdpSocket;

/// UDP port 9, discard (RFC 863): what is sent there means nothing to anybody.
const DISCARD: u16 = 9;
/// How often, and how long apart, a pod is looked for after it was sent something.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(15);
/// How long a pod has to answer ARP.
const ANSWER: Duration = Duration::from_millis(300);

/// The host's end of a veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// The other end's index, in the pod's network namespace.
    pub peer_index: u32,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Its own MAC address.
    pub mac: Mac,
}

/// The veth of that index; `None` if there is no such interface, or it is of another kind.
pub async fn veth_by_index(socket: &RouteSocket, index: u32) -> Result<Option<Veth>> {
    // The kernel has none such, and refuses the question.
    if i32::try_from(index).is_err() || index == 0 {
        return Ok(None);
    }
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_index(index).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(veth(&link)),
        Ok(_) => bail!("cannot look for interface {index}: the kernel answered something else"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e.context(format!("cannot look for interface {index}"))),
    }
}

/// The veth behind which the pod with `address` is: by the pod's own route, or else by the bridge that knows the
/// pod's MAC address. A pod of which the bridge has not heard for long is sent something, and looked for again.
/// `None` if the pod is not behind a veth of this host.
pub async fn find_pod_veth(socket: &RouteSocket, address: IpAddr) -> Result<Option<Veth>> {
    let context = || format!("cannot find out behind which interface {address} is");
    let mut bridge = match look(socket, address).await.with_context(context)? {
        Found::Veth(veth) => return Ok(Some(veth)),
        Found::Elsewhere => return Ok(None),
        Found::Silent { bridge } => bridge,
    };
    // Its answer, also "nobody listens there", teaches the bridge where the pod is.
    let _ = provoke(address).await;
    for _ in 0..LOOKS {
        tokio::time::sleep(BETWEEN_LOOKS).await;
        match look(socket, address).await.with_context(context)? {
            Found::Veth(veth) => return Ok(Some(veth)),
            Found::Elsewhere => return Ok(None),
            Found::Silent { bridge: still } => bridge = still,
        }
    }
    ask(socket, bridge, address).await.with_context(context)
}

/// Asks by ARP, which no packet filter holds back. Not for IPv6: a pod that is just being set up, and checks that its
/// address is unique, would take the question for somebody else's claim.
async fn ask(socket: &RouteSocket, bridge: u32, address: IpAddr) -> Result<Option<Veth>> {
    let Some(interface) = by_index(socket, bridge).await?.filter(|i| i.running && address.is_ipv4()) else {
        return Ok(None);
    };
    let target = Target { address, interface, claim: None };
    let answers = probe(std::slice::from_ref(&target), ANSWER).await?;
    let Some(mac) = answers.first().copied().flatten() else { return Ok(None) };
    let Some(port) = bridge_port(socket, bridge, mac).await? else { return Ok(None) };
    Ok(veth_by_index(socket, port).await?.filter(|v| v.master == Some(bridge)))
}

enum Found {
    Veth(Veth),
    /// On the link of a bridge, which does not know where.
    Silent {
        /// The bridge's index.
        bridge: u32,
    },
    Elsewhere,
}

async fn look(socket: &RouteSocket, address: IpAddr) -> Result<Found> {
    let Some(oif) = on_link(socket, address).await? else { return Ok(Found::Elsewhere) };
    match oif {
        // A whole network behind a veth is the host's own uplink, of a host that is itself a container.
        Link { index, single: true } => Ok(veth_by_index(socket, index).await?.map_or(Found::Elsewhere, Found::Veth)),
        Link { index, single: false } => behind_bridge(socket, index, address).await,
    }
}

async fn behind_bridge(socket: &RouteSocket, bridge: u32, address: IpAddr) -> Result<Found> {
    if !is_bridge(socket, bridge).await? {
        return Ok(Found::Elsewhere);
    }
    let Some(mac) = neighbour(socket, bridge, address).await? else { return Ok(Found::Silent { bridge }) };
    let Some(port) = bridge_port(socket, bridge, mac).await? else { return Ok(Found::Silent { bridge }) };
    let veth = veth_by_index(socket, port).await?.filter(|v| v.master == Some(bridge));
    Ok(veth.map_or(Found::Elsewhere, Found::Veth))
}

struct Link {
    index: u32,
    /// Whether the route is for this one address.
    single: bool,
}

/// Where the host would send to `address` directly, without a next hop.
async fn on_link(socket: &RouteSocket, address: IpAddr) -> Result<Option<Link>> {
    let (family, bits) = if address.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.destination_prefix_length = bits;
    // The route itself, not what follows from it.
    request.header.flags = RouteFlags::FibMatch;
    request.attributes.push(RouteAttribute::Destination(address.into()));
    let route = match socket.get(RouteNetlinkMessage::GetRoute(request)).await {
        Ok(RouteNetlinkMessage::NewRoute(route)) => route,
        Ok(_) => bail!("the kernel answered something else than a route"),
        // An `unreachable` or `blackhole` route answers so, and so does a host without IPv6.
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

/// The MAC address that the host knows for its neighbour `address`.
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

/// The port behind which the bridge has heard `mac`.
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
    // A bridge with VLANs finds it only if it is asked with the VLAN, which is not known.
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
