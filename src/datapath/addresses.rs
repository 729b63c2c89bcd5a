//! Egress addresses on their uplinks, and what other addresses the host has.
//!
//! An address is ours if it carries our protocol number (`IFA_PROTO`, Linux 5.18). All others are the host's or
//! somebody else's and are never touched.

use crate::datapath::names::{PROTOCOL, is_devices_own};
use crate::datapath::sysctl;
use crate::kernel::route_socket::{Change, RouteSocket};
use anyhow::{Context, Result, anyhow};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EADDRNOTAVAIL, ENODEV};
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// A lifetime without end (`INFINITY_LIFE_TIME`, include/net/addrconf.h).
const FOREVER: u32 = u32::MAX;

/// How many addresses are placed before they are told of.
const AT_ONCE: usize = 64;

/// An egress address and the index of the interface that is to have it.
pub type Placed = (IpAddr, u32);

/// An address that the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    /// The address.
    pub address: IpAddr,
    /// The length of its network's prefix.
    pub prefix: u8,
    /// The index of the interface that has it.
    pub ifindex: u32,
    /// Who put it there (`IFA_PROTO`); 0 if nobody says so.
    pub protocol: u8,
    /// Whether the host leaves it alone as a source of its own packets (IPv6 only).
    pub deprecated: bool,
    /// Whether it cannot be used yet or any more: its uniqueness is being checked, or it was found not to be unique.
    pub tentative: bool,
}

impl LocalAddress {
    /// Whether Egret put it there.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }

    fn placed(&self) -> Placed {
        (self.address, self.ifindex)
    }

    /// Whether it is as [`sync`] makes it.
    fn is_right(&self) -> bool {
        self.prefix == host_prefix(self.address) && (self.address.is_ipv4() || self.deprecated)
    }
}

/// What [`sync`] did and found.
#[derive(Debug, Default)]
pub struct Changes {
    /// Put on, or put right.
    pub added: Vec<Placed>,
    /// Taken off.
    pub removed: Vec<Placed>,
    /// Wanted, and there already on the interface of that index, but not Egret's: left alone.
    pub foreign: Vec<Placed>,
    /// Wanted and refused by the kernel.
    pub refused: Vec<(Placed, anyhow::Error)>,
    /// Not wanted, and the kernel does not take them off.
    pub stuck: Vec<(Placed, anyhow::Error)>,
}

/// Places the egress addresses `wanted`, and takes off what else carries our protocol number; the tunnel device's own
/// addresses stay. An address that the host has without us, on whichever interface, is left as it is.
///
/// # Errors
/// The host's addresses cannot be read.
pub async fn sync(socket: &RouteSocket, wanted: &BTreeSet<Placed>) -> Result<Changes> {
    sync_and_tell(socket, wanted, |_| ()).await
}

/// As [`sync`], and tells of those that were added, some at a time, as soon as they are there. It takes the kernel
/// about 1 ms to give an interface its thousandth IPv6 address, for each brings a multicast group; those of IPv4 come
/// first.
///
/// # Errors
/// As [`sync`].
pub async fn sync_and_tell(
    socket: &RouteSocket,
    wanted: &BTreeSet<Placed>,
    mut added: impl FnMut(&[Placed]),
) -> Result<Changes> {
    let there = local_addresses(socket).await?;
    let mut by_address: HashMap<IpAddr, Vec<&LocalAddress>> = HashMap::new();
    for a in &there {
        by_address.entry(a.address).or_default().push(a);
    }
    let mut changes = Changes::default();
    let (mut new, mut old) = (Vec::new(), Vec::new());
    for &placed in wanted {
        let (address, ifindex) = placed;
        let same = by_address.get(&address).map(Vec::as_slice).unwrap_or_default();
        if let Some(foreign) = same.iter().find(|a| !a.is_ours()) {
            changes.foreign.push(foreign.placed());
            continue;
        }
        match same.iter().find(|a| a.placed() == placed && a.prefix == host_prefix(address)) {
            Some(a) if a.is_right() => {}
            Some(_) => new.push((placed, add(address, ifindex, NLM_F_REPLACE))),
            None => new.push((placed, add(address, ifindex, NLM_F_EXCL))),
        }
    }
    for ours in there.iter().filter(|a| a.is_ours() && !is_devices_own(a.address)) {
        if ours.prefix != host_prefix(ours.address) {
            // The kernel would not have it twice.
            if let Err(e) = socket.apply(vec![delete(ours)]).await {
                changes.stuck.push((ours.placed(), e));
            }
        } else if !wanted.contains(&ours.placed()) {
            old.push(ours);
        }
    }
    // In the order of `wanted`: IPv4 addresses sort before IPv6 ones.
    let mut new = new.into_iter().peekable();
    while new.peek().is_some() {
        let (some, additions): (Vec<Placed>, Vec<Change>) = new.by_ref().take(AT_ONCE).unzip();
        let before = changes.added.len();
        for (placed, result) in some.into_iter().zip(socket.apply_each(additions).await?) {
            match result {
                Ok(_) => changes.added.push(placed),
                Err(e) => changes.refused.push((placed, e)),
            }
        }
        added(&changes.added[before..]);
    }
    // After the new ones: an address that moves to another interface is never away.
    let removals = socket.apply_each(old.iter().map(|address| delete(address)).collect()).await?;
    for (address, result) in old.into_iter().zip(removals) {
        match result {
            Ok(true) => changes.removed.push(address.placed()),
            Ok(false) => {}
            Err(e) => changes.stuck.push((address.placed(), e)),
        }
    }
    if !changes.added.is_empty() {
        take_back_what_cannot_be_known_again(socket, &mut changes).await?;
    }
    Ok(changes)
}

/// A kernel before 5.18 drops the protocol number without a word. An address that we could not take off again later
/// must not stay.
async fn take_back_what_cannot_be_known_again(socket: &RouteSocket, changes: &mut Changes) -> Result<()> {
    let there = local_addresses(socket).await?;
    let added: BTreeSet<Placed> = changes.added.iter().copied().collect();
    for unknown in there.iter().filter(|a| !a.is_ours() && added.contains(&a.placed())) {
        if let Err(e) = socket.apply(vec![delete(unknown)]).await {
            changes.stuck.push((unknown.placed(), e));
        }
        changes.added.retain(|placed| *placed != unknown.placed());
        let error = anyhow!("this kernel does not keep who has placed an address (IFA_PROTO); Linux 5.18 does");
        changes.refused.push((unknown.placed(), error));
    }
    Ok(())
}

/// All addresses of this network namespace.
pub async fn local_addresses(socket: &RouteSocket) -> Result<Vec<LocalAddress>> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        if family == AddressFamily::Inet6 && !sysctl::ipv6()? {
            break;
        }
        let mut filter = AddressMessage::default();
        filter.header.family = family;
        let read = socket
            .dump(RouteNetlinkMessage::GetAddress(filter), |m| match m {
                RouteNetlinkMessage::NewAddress(a) if a.header.family == family => parse(&a),
                _ => None,
            })
            .await;
        all.extend(read.context("cannot read the host's addresses")?);
    }
    Ok(all)
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn parse(message: &AddressMessage) -> Option<LocalAddress> {
    let (mut local, mut address, mut protocol) = (None, None, 0);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface, the other one is the peer's.
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Protocol(p) => protocol = u8::from(*p),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    Some(LocalAddress {
        address: local.or(address)?,
        prefix: message.header.prefix_len,
        ifindex: message.header.index,
        protocol,
        deprecated: flags.contains(AddressFlags::Deprecated),
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
    })
}

fn message(address: IpAddr, prefix: u8, ifindex: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = prefix;
    message.header.index = ifindex;
    message.attributes.push(AddressAttribute::Local(address));
    message
}

fn add(address: IpAddr, ifindex: u32, flag: u16) -> Change {
    let mut wanted = message(address, host_prefix(address), ifindex);
    wanted.attributes.push(AddressAttribute::Address(address));
    wanted.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    if address.is_ipv4() {
        // The kernel passes over it when it looks for a source, for the host's own packets and for a CNI's masquerade
        // (`inet_select_addr`, net/ipv4/devinet.c), and answers ARP for it all the same.
        wanted.header.scope = AddressScope::Host;
    } else {
        // The owner was asked for before, and detection would hold the address back for a second. There is no network
        // behind a single address.
        wanted.header.flags = AddressHeaderFlags::Nodad;
        wanted.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        let mut lifetimes = CacheInfo::default();
        lifetimes.ifa_valid = FOREVER;
        lifetimes.ifa_preferred = 0;
        wanted.attributes.push(AddressAttribute::CacheInfo(lifetimes));
    }
    Change {
        message: RouteNetlinkMessage::NewAddress(wanted),
        flags: NLM_F_CREATE | flag,
        done_already: &[],
        about: format!("put the egress address {address} on interface {ifindex}"),
    }
}

fn delete(address: &LocalAddress) -> Change {
    Change {
        message: RouteNetlinkMessage::DelAddress(message(address.address, address.prefix, address.ifindex)),
        flags: 0,
        done_already: &[EADDRNOTAVAIL, ENODEV],
        about: format!("take {}/{} off interface {}", address.address, address.prefix, address.ifindex),
    }
}
