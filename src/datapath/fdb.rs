//! The forwarding database of the tunnel device: it maps nodes' tunnel MAC addresses to their underlay addresses.

use crate::datapath::route_socket::{Applied, Change, RouteSocket};
use anyhow::{Context, Result};
use egret_nft::mac::{Mac, Shown};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::ENOENT;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An entry as the kernel returns it.
struct Entry {
    mac: Mac,
    to: Option<IpAddr>,
    permanent: bool,
}

/// Makes `nodes`, tunnel MAC address to underlay address, the only entries of the VXLAN device `ifindex`. Returns how
/// many changes it made.
///
/// # Errors
/// The forwarding database cannot be read, or the kernel rejected a change; the other changes have been made.
pub async fn sync(socket: &RouteSocket, ifindex: u32, nodes: &BTreeMap<Mac, IpAddr>) -> Result<usize> {
    sync_each(socket, ifindex, nodes).await?.all()
}

/// As [`sync`], and returns the MAC addresses whose changes failed.
///
/// # Errors
/// The forwarding database cannot be read.
pub async fn sync_each(socket: &RouteSocket, ifindex: u32, nodes: &BTreeMap<Mac, IpAddr>) -> Result<Applied<Mac>> {
    let entries = read(socket, ifindex).await?;
    let wanted = |e: &Entry| e.to.is_some() && nodes.get(&e.mac) == e.to.as_ref();
    let mut correct: Vec<Mac> = entries.iter().filter(|e| wanted(e) && e.permanent).map(|e| e.mac).collect();
    correct.sort_unstable();
    // A deletion without a destination deletes all entries of the MAC address, so it comes before the additions.
    let (without_destination, wrong): (Vec<&Entry>, Vec<&Entry>) =
        entries.iter().filter(|e| !wanted(e)).partition(|e| e.to.is_none());
    let mut changes: Vec<(Mac, Change)> =
        without_destination.into_iter().map(|e| (e.mac, delete(ifindex, e))).collect();
    let missing = nodes.iter().filter(|(mac, _)| correct.binary_search(mac).is_err());
    changes.extend(missing.map(|(mac, to)| (*mac, add(ifindex, *mac, *to))));
    // An addition replaces one destination of an existing entry; further ones may remain.
    changes.extend(wrong.into_iter().map(|e| (e.mac, delete(ifindex, e))));
    socket.apply_keyed(changes).await
}

async fn read(socket: &RouteSocket, ifindex: u32) -> Result<Vec<Entry>> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Bridge;
    // With strict checking, the kernel dumps this interface's entries only (`rtnl_fdb_dump`, net/core/rtnetlink.c).
    filter.header.ifindex = ifindex;
    socket
        .dump(RouteNetlinkMessage::GetNeighbour(filter), |m| match m {
            RouteNetlinkMessage::NewNeighbour(n)
                if n.header.ifindex == ifindex && n.header.flags.contains(NeighbourFlags::Own) =>
            {
                entry(&n)
            }
            _ => None,
        })
        .await
        .context("cannot read the tunnel's forwarding database")
}

fn entry(message: &NeighbourMessage) -> Option<Entry> {
    let mut mac = None;
    let mut to = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            // The message's family is AF_BRIDGE, so the crate leaves the address as bytes.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                to = <[u8; 4]>::try_from(bytes.as_slice())
                    .map(|b| Ipv4Addr::from(b).into())
                    .or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(|b| Ipv6Addr::from(b).into()))
                    .ok();
            }
            _ => {}
        }
    }
    Some(Entry { mac: mac?, to, permanent: message.header.state == NeighbourState::Permanent })
}

fn message(ifindex: u32, mac: Mac, to: Option<IpAddr>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = ifindex;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.extend(to.map(|to| NeighbourAttribute::Destination(to.into())));
    message
}

fn add(ifindex: u32, mac: Mac, to: IpAddr) -> Change {
    Change {
        message: RouteNetlinkMessage::NewNeighbour(message(ifindex, mac, Some(to))),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        done_already: &[],
        about: format!("add {} at {to} to the tunnel's forwarding database", Shown(mac)),
    }
}

fn delete(ifindex: u32, entry: &Entry) -> Change {
    Change {
        message: RouteNetlinkMessage::DelNeighbour(message(ifindex, entry.mac, entry.to)),
        flags: 0,
        done_already: &[ENOENT],
        about: format!("remove {} from the tunnel's forwarding database", Shown(entry.mac)),
    }
}
