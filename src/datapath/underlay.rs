//! The underlay: by which interfaces tunnel packets leave for the other nodes, and how large they may be there.

use crate::datapath::addresses::local_addresses;
use crate::datapath::route_socket::{RouteSocket, errno};
use crate::datapath::uplink::by_index;
use anyhow::{Context, Result, bail};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The kernel's routes to the other nodes' tunnel addresses.
#[derive(Clone, Debug)]
pub struct Underlay {
    local: IpAddr,
    peers: BTreeMap<IpAddr, RouteToPeer>,
    /// The interfaces by index, with their MTU in bytes.
    interfaces: BTreeMap<u32, u32>,
    mtu: u32,
}

/// The interfaces and MTU of a route to a peer.
#[derive(Clone, Debug, Default)]
struct RouteToPeer {
    /// The interfaces; several if the route has several next hops.
    interfaces: Vec<u32>,
    /// The route's own MTU in bytes, if it has one.
    mtu: Option<u32>,
}

impl Underlay {
    /// Looks up the routes from `local` to each of `peers`. Results in `known` for the same address are reused.
    ///
    /// # Errors
    /// The host does not have the address `local`, or the kernel cannot be asked.
    pub async fn read(
        socket: &RouteSocket,
        local: IpAddr,
        peers: impl IntoIterator<Item = IpAddr>,
        known: Option<Underlay>,
    ) -> Result<Underlay> {
        let mut before = known.filter(|k| k.local == local).map(|k| k.peers).unwrap_or_default();
        let mut routes = BTreeMap::new();
        for peer in peers.into_iter().filter(|p| p.is_ipv4() == local.is_ipv4()) {
            let route = match before.remove(&peer) {
                Some(route) => route,
                None => route(socket, local, peer).await?,
            };
            routes.insert(peer, route);
        }
        let Some(holder) = local_addresses(socket).await?.into_iter().find(|a| a.address == local) else {
            bail!("this host does not have the tunnel address {local}; give one that it has (`ip address`)");
        };
        let mut interfaces = BTreeMap::new();
        for index in routes.values().flat_map(|r| &r.interfaces) {
            if !interfaces.contains_key(index)
                && let Some(interface) = by_index(socket, *index).await?
            {
                interfaces.insert(*index, interface.mtu);
            }
        }
        // Without other nodes nothing is sent, and any size is right.
        if interfaces.is_empty() {
            let gone = || format!("the interface with the tunnel address {local} has just vanished");
            interfaces.insert(holder.ifindex, by_index(socket, holder.ifindex).await?.with_context(gone)?.mtu);
        }
        let of_routes = routes.values().filter_map(|r| r.mtu);
        let mtu = interfaces.values().copied().chain(of_routes).min().unwrap_or_default();
        Ok(Underlay { local, peers: routes, interfaces, mtu })
    }

    /// The largest packet, in bytes, that all of the routes carry.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// This node's tunnel address.
    pub fn local(&self) -> IpAddr {
        self.local
    }

    /// The indexes of the interfaces by which tunnel packets leave, and the MTU of each when it was read.
    pub fn interfaces(&self) -> &BTreeMap<u32, u32> {
        &self.interfaces
    }

    /// The index of the interface to each other node. Nodes to which there are several, or none, are left out.
    pub fn interface_of_each(&self) -> BTreeMap<IpAddr, u32> {
        let only = |route: &RouteToPeer| {
            let (first, others) = route.interfaces.split_first()?;
            others.iter().all(|index| index == first).then_some(*first)
        };
        self.peers.iter().filter_map(|(peer, route)| Some((*peer, only(route)?))).collect()
    }

    /// The other nodes' tunnel addresses.
    pub fn peers(&self) -> impl ExactSizeIterator<Item = IpAddr> {
        self.peers.keys().copied()
    }
}

/// The route's entry in the routing table, without what path MTU discovery has learned about one destination. Such an
/// entry expires after minutes, and the tunnel device's MTU would change with it.
async fn route(socket: &RouteSocket, local: IpAddr, peer: IpAddr) -> Result<RouteToPeer> {
    let mut request = RouteMessage::default();
    request.header.address_family = if peer.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    request.header.destination_prefix_length = if peer.is_ipv4() { 32 } else { 128 };
    request.header.source_prefix_length = request.header.destination_prefix_length;
    request.header.flags = RouteFlags::FibMatch;
    request.attributes = vec![RouteAttribute::Destination(address(peer)), RouteAttribute::Source(address(local))];
    match socket.get(RouteNetlinkMessage::GetRoute(request)).await {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Ok(parse(&route)),
        Ok(_) => bail!("route to {peer}: the kernel's response is no route message"),
        // There is no route (ENETUNREACH), or the route rejects packets (EHOSTUNREACH, EACCES, EINVAL). This peer is
        // unreachable and does not limit the MTU.
        Err(e) if errno(&e).is_some() => Ok(RouteToPeer::default()),
        Err(e) => Err(e.context(format!("route to {peer}"))),
    }
}

fn parse(route: &RouteMessage) -> RouteToPeer {
    let mut found = RouteToPeer::default();
    // Nothing leaves by the other types: unreachable, prohibit, and local if this host has the address, too.
    if route.header.kind != RouteType::Unicast {
        return found;
    }
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => found.interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => found.interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
            RouteAttribute::Metrics(metrics) => {
                found.mtu = metrics.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
            }
            _ => {}
        }
    }
    found.mtu = found.mtu.filter(|mtu| *mtu > 0);
    found
}

fn address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(a) => RouteAddress::Inet(a),
        IpAddr::V6(a) => RouteAddress::Inet6(a),
    }
}
