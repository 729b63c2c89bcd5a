//! Keeps the host from answering ARP for egress IPs that its router announces.
//!
//! Linux answers ARP for all of its addresses on all interfaces (`arp_process`, net/ipv4/arp.c), and sends ARP requests
//! from the source address of the packet that waits (`arp_solicit`), which is an egress IP in no network of the link:
//! routers ignore such requests. Both ask the routing table `local` what is an address of this host. A `blackhole` route
//! for the egress IP, in front of the kernel's own route, makes it an address on an interface that is none of the host's:
//! routers redistribute it, and nobody answers for it. Packets need nothing else: those of connections are translated
//! before they are routed, and others are dropped. The route has no device, so that it stays when the device goes down.
//!
//! For IPv6, the kernel answers for the addresses of the interface only (`ndisc_recv_ns`, `ndisc_solicit`).

use crate::datapath::names::{PROTOCOL, TABLE_LOCAL};
use crate::datapath::route_socket::{Change, RouteSocket};
use anyhow::{Context, Result};
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ESRCH};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// The addresses that have such a route.
///
/// # Errors
/// The table cannot be read.
pub async fn read(socket: &RouteSocket) -> Result<BTreeSet<Ipv4Addr>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    filter.header.kind = RouteType::BlackHole;
    filter.header.protocol = PROTOCOL.into();
    filter.attributes.push(RouteAttribute::Table(TABLE_LOCAL));
    let found = socket
        .dump(RouteNetlinkMessage::GetRoute(filter), |m| match m {
            RouteNetlinkMessage::NewRoute(route) => address(&route),
            _ => None,
        })
        .await;
    Ok(found.context("cannot read the routing table local")?.into_iter().collect())
}

/// Adds the routes. Returns how many there were not before.
///
/// # Errors
/// The kernel's refusal.
pub async fn add(socket: &RouteSocket, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Result<usize> {
    let added = addresses.into_iter().map(|address| Change {
        message: RouteNetlinkMessage::NewRoute(route(address)),
        // Without NLM_F_APPEND, the kernel puts the route in front of others with the same destination.
        flags: NLM_F_CREATE,
        done_already: &[EEXIST],
        about: format!("add a blackhole route for {address} to the table local"),
    });
    socket.apply(added.collect()).await
}

/// Removes the routes. Returns how many there were.
///
/// # Errors
/// The kernel's refusal.
pub async fn remove(socket: &RouteSocket, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Result<usize> {
    let removed = addresses.into_iter().map(|address| Change {
        message: RouteNetlinkMessage::DelRoute(route(address)),
        flags: 0,
        done_already: &[ESRCH],
        about: format!("remove the blackhole route for {address} from the table local"),
    });
    socket.apply(removed.collect()).await
}

fn route(address: Ipv4Addr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 32;
    message.header.protocol = PROTOCOL.into();
    message.header.kind = RouteType::BlackHole;
    message.attributes = vec![RouteAttribute::Table(TABLE_LOCAL), RouteAttribute::Destination(address.into())];
    message
}

/// The destination of such a route; `None`: it is another one.
fn address(message: &RouteMessage) -> Option<Ipv4Addr> {
    let header = &message.header;
    let is_ours = header.protocol == RouteProtocol::from(PROTOCOL) && header.kind == RouteType::BlackHole;
    let is_local = message.attributes.contains(&RouteAttribute::Table(TABLE_LOCAL));
    if !is_ours || !is_local || header.destination_prefix_length != 32 {
        return None;
    }
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })
}
