//! Permanent neighbour entries of the tunnel device: other nodes' tunnel addresses and their MAC addresses. Nothing
//! in the tunnel resolves addresses.

use crate::datapath::names::{PROBER, is_health};
use crate::datapath::route_socket::{Applied, Change, RouteSocket};
use anyhow::{Context, Result};
use egret_nft::mac::{Mac, Shown};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::ENOENT;
use std::collections::BTreeMap;
use std::net::Ipv6Addr;

/// Makes `nodes` the only neighbours of the device `ifindex` in the networks of nodes' tunnel addresses. Returns how
/// many changes it made, and which ones failed.
///
/// # Errors
/// The neighbours cannot be read.
pub async fn sync(socket: &RouteSocket, ifindex: u32, nodes: &BTreeMap<Ipv6Addr, Mac>) -> Result<Applied<Ipv6Addr>> {
    let there = read(socket, ifindex).await?;
    let mut changes = Vec::new();
    for (address, mac) in nodes {
        if there.get(address) != Some(&Some(*mac)) {
            changes.push((*address, add(ifindex, *address, *mac)));
        }
    }
    changes.extend(there.keys().filter(|a| !nodes.contains_key(a)).map(|a| (*a, delete(ifindex, *a))));
    socket.apply_keyed(changes).await
}

/// The nodes' addresses among the neighbours, each with its MAC address if the entry is permanent.
async fn read(socket: &RouteSocket, ifindex: u32) -> Result<BTreeMap<Ipv6Addr, Option<Mac>>> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Inet6;
    // A dump of neighbours takes the interface as an attribute (`neigh_valid_dump_req`, net/core/neighbour.c).
    filter.attributes.push(NeighbourAttribute::IfIndex(ifindex));
    let found = socket
        .dump(RouteNetlinkMessage::GetNeighbour(filter), |m| match m {
            RouteNetlinkMessage::NewNeighbour(n) if n.header.ifindex == ifindex => entry(&n),
            _ => None,
        })
        .await;
    Ok(found.context("cannot read the tunnel's neighbours")?.into_iter().collect())
}

fn entry(message: &NeighbourMessage) -> Option<(Ipv6Addr, Option<Mac>)> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some(*a),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    let address = address.filter(|a| PROBER.contains(*a) || is_health(*a))?;
    Some((address, mac.filter(|_| message.header.state == NeighbourState::Permanent)))
}

fn message(ifindex: u32, address: Ipv6Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = ifindex;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    message
}

fn add(ifindex: u32, address: Ipv6Addr, mac: Mac) -> Change {
    let mut wanted = message(ifindex, address);
    wanted.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    Change {
        message: RouteNetlinkMessage::NewNeighbour(wanted),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        done_already: &[],
        about: format!("add {address} at {} to the tunnel's neighbours", Shown(mac)),
    }
}

fn delete(ifindex: u32, address: Ipv6Addr) -> Change {
    Change {
        message: RouteNetlinkMessage::DelNeighbour(message(ifindex, address)),
        flags: 0,
        done_already: &[ENOENT],
        about: format!("remove {address} from the tunnel's neighbours"),
    }
}
