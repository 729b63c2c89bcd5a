//! The egress IPs on their uplinks, and the host's other addresses.
//!
//! Egret's addresses carry its protocol number (`IFA_PROTO`, Linux 5.18) and its metric, which older kernels store, too.
//! Other addresses are never changed.

use crate::datapath::names::{ADDRESS_METRIC, PROTOCOL, is_devices_own};
use crate::datapath::route_socket::{Change, ChangeResult, RouteSocket};
use crate::datapath::sysctl;
use anyhow::{Context, Result, anyhow};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EADDRNOTAVAIL, ENODEV};
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// An unlimited lifetime (`INFINITY_LIFE_TIME`, include/net/addrconf.h).
const FOREVER: u32 = u32::MAX;

/// Addresses per batch; after each batch the caller is notified.
const AT_ONCE: usize = 64;

/// An egress IP and the index of its interface.
pub type InterfaceAddress = (IpAddr, u32);

/// An address of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    /// The address.
    pub address: IpAddr,
    /// The prefix length of its network.
    pub prefix: u8,
    /// The index of its interface.
    pub ifindex: u32,
    /// The protocol number of the program that added it (`IFA_PROTO`); 0 if unknown.
    pub protocol: u8,
    /// The metric of its routes (`IFA_RT_PRIORITY`); 0 if it has none.
    pub metric: u32,
    /// Whether the host avoids it as a source of its own packets (IPv6 only).
    pub deprecated: bool,
    /// Whether it is unusable: duplicate address detection is running or has failed.
    pub tentative: bool,
}

impl LocalAddress {
    /// Whether Egret added it.
    pub fn is_ours(&self) -> bool {
        // Before Linux 5.18, the protocol number is 0.
        self.protocol == PROTOCOL
            || self.protocol == 0 && self.metric == ADDRESS_METRIC && self.prefix == host_prefix(self.address)
    }

    fn interface_address(&self) -> InterfaceAddress {
        (self.address, self.ifindex)
    }

    /// Whether it has the prefix and flags that [`sync`] gives.
    fn is_right(&self) -> bool {
        self.prefix == host_prefix(self.address) && (self.address.is_ipv4() || self.deprecated)
    }
}

/// The result of [`sync`].
#[derive(Debug, Default)]
pub struct Changes {
    /// Addresses that were added or corrected.
    pub added: Vec<InterfaceAddress>,
    /// Addresses that were removed.
    pub removed: Vec<InterfaceAddress>,
    /// Desired addresses that another program has added to the interface of that index; they are unchanged.
    pub foreign: Vec<InterfaceAddress>,
    /// Desired addresses that the kernel rejected.
    pub refused: Vec<(InterfaceAddress, anyhow::Error)>,
    /// Addresses that could not be removed.
    pub stuck: Vec<(InterfaceAddress, anyhow::Error)>,
}

/// Adds the egress IPs `wanted` to their interfaces, and removes the other addresses that are Egret's
/// ([`LocalAddress::is_ours`]), except the tunnel device's own ones. A wanted address that another program has added, to any interface, is left as
/// it is.
///
/// # Errors
/// The host's addresses cannot be read.
pub async fn sync(socket: &RouteSocket, wanted: &BTreeSet<InterfaceAddress>) -> Result<Changes> {
    sync_and_tell(socket, wanted, None, |_| ()).await
}

/// As [`sync`], where `routed` is the index of the interface whose addresses a router announces, and calls `added` after each batch with the addresses that were added. The kernel takes about 1 ms to
/// add an interface's thousandth IPv6 address, because each one joins a multicast group. IPv4 addresses come first.
///
/// # Errors
/// As [`sync`].
pub async fn sync_and_tell(
    socket: &RouteSocket,
    wanted: &BTreeSet<InterfaceAddress>,
    routed: Option<u32>,
    mut added: impl FnMut(&[InterfaceAddress]),
) -> Result<Changes> {
    let there = local_addresses(socket).await?;
    let mut by_address: HashMap<IpAddr, Vec<&LocalAddress>> = HashMap::new();
    for a in &there {
        by_address.entry(a.address).or_default().push(a);
    }
    let mut changes = Changes::default();
    let (mut new, mut old) = (Vec::new(), Vec::new());
    for &placed in wanted {
        let (address, _) = placed;
        let same = by_address.get(&address).map(Vec::as_slice).unwrap_or_default();
        if let Some(foreign) = same.iter().find(|a| !a.is_ours()) {
            changes.foreign.push(foreign.interface_address());
            continue;
        }
        match same.iter().find(|a| a.interface_address() == placed && a.prefix == host_prefix(address)) {
            Some(a) if a.is_right() => {}
            Some(_) => new.push((placed, add(placed, routed, NLM_F_REPLACE))),
            None => new.push((placed, add(placed, routed, NLM_F_EXCL))),
        }
    }
    for ours in there.iter().filter(|a| a.is_ours() && !is_devices_own(a.address)) {
        if ours.prefix != host_prefix(ours.address) {
            // The kernel rejects the same address with another prefix.
            if let Err(e) = socket.apply(vec![delete(ours)]).await {
                changes.stuck.push((ours.interface_address(), e));
            }
        } else if !wanted.contains(&ours.interface_address()) {
            old.push(ours);
        }
    }
    // In the order of `wanted`: IPv4 addresses sort before IPv6 ones.
    let mut new = new.into_iter().peekable();
    while new.peek().is_some() {
        let (some, additions): (Vec<InterfaceAddress>, Vec<Change>) = new.by_ref().take(AT_ONCE).unzip();
        let before = changes.added.len();
        for (placed, outcome) in some.into_iter().zip(socket.apply_each(additions).await?) {
            match outcome {
                ChangeResult::Made | ChangeResult::DoneAlready => changes.added.push(placed),
                ChangeResult::Refused(e) => changes.refused.push((placed, e)),
            }
        }
        added(&changes.added[before..]);
    }
    // Removals come after the additions, so that an address that moves to another interface is always present.
    let removals = socket.apply_each(old.iter().map(|address| delete(address)).collect()).await?;
    for (address, outcome) in old.into_iter().zip(removals) {
        match outcome {
            ChangeResult::Made => changes.removed.push(address.interface_address()),
            ChangeResult::DoneAlready => {}
            ChangeResult::Refused(e) => changes.stuck.push((address.interface_address(), e)),
        }
    }
    if !changes.added.is_empty() {
        remove_unrecognisable(socket, &mut changes).await?;
    }
    Ok(changes)
}

/// Removes added addresses that cannot be recognised. A kernel silently drops attributes that it does not know, and Egret
/// could not remove such an address later.
async fn remove_unrecognisable(socket: &RouteSocket, changes: &mut Changes) -> Result<()> {
    let there = local_addresses(socket).await?;
    let added: BTreeSet<InterfaceAddress> = changes.added.iter().copied().collect();
    for unknown in there.iter().filter(|a| !a.is_ours() && added.contains(&a.interface_address())) {
        if let Err(e) = socket.apply(vec![delete(unknown)]).await {
            changes.stuck.push((unknown.interface_address(), e));
        }
        changes.added.retain(|placed| *placed != unknown.interface_address());
        let error = anyhow!("this kernel stores neither the protocol nor the metric of an address; Linux 4.18 does");
        changes.refused.push((unknown.interface_address(), error));
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
        all.extend(local_addresses_of(socket, family).await?);
    }
    Ok(all)
}

/// The addresses of one family in this network namespace.
pub async fn local_addresses_of(socket: &RouteSocket, family: AddressFamily) -> Result<Vec<LocalAddress>> {
    let mut filter = AddressMessage::default();
    filter.header.family = family;
    let read = socket
        .dump(RouteNetlinkMessage::GetAddress(filter), |m| match m {
            RouteNetlinkMessage::NewAddress(a) if a.header.family == family => parse(&a),
            _ => None,
        })
        .await;
    read.context("cannot read the host's addresses")
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn parse(message: &AddressMessage) -> Option<LocalAddress> {
    let (mut local, mut address, mut protocol, mut metric) = (None, None, 0, 0);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface, `Address` is the peer's address.
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Protocol(p) => protocol = u8::from(*p),
            AddressAttribute::RoutePriority(priority) => metric = *priority,
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    Some(LocalAddress {
        address: local.or(address)?,
        prefix: message.header.prefix_len,
        ifindex: message.header.index,
        protocol,
        metric,
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

fn add((address, ifindex): InterfaceAddress, routed: Option<u32>, flag: u16) -> Change {
    let mut wanted = message(address, host_prefix(address), ifindex);
    wanted.attributes.push(AddressAttribute::Address(address));
    wanted.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    wanted.attributes.push(AddressAttribute::RoutePriority(ADDRESS_METRIC));
    if address.is_ipv4() {
        // With host scope, the kernel does not select the address as a source of the host's own packets or of a CNI's
        // masquerade (`inet_select_addr`, net/ipv4/devinet.c), and still answers ARP for it.
        wanted.header.scope = AddressScope::Host;
    } else {
        // The daemon has probed the address before, and duplicate address detection would delay it by a second. A
        // single address needs no route to a network. Where a router is to announce it, it has one: FRR takes no address
        // without (`ZEBRA_IFA_NOPREFIXROUTE`, from FRR 10 on).
        wanted.header.flags = AddressHeaderFlags::Nodad;
        let without_route = if routed == Some(ifindex) { AddressFlags::empty() } else { AddressFlags::Noprefixroute };
        wanted.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | without_route));
        let mut lifetimes = CacheInfo::default();
        lifetimes.ifa_valid = FOREVER;
        lifetimes.ifa_preferred = 0;
        wanted.attributes.push(AddressAttribute::CacheInfo(lifetimes));
    }
    Change {
        message: RouteNetlinkMessage::NewAddress(wanted),
        flags: NLM_F_CREATE | flag,
        done_already: &[],
        about: format!("add the egress IP {address} to interface {ifindex}"),
    }
}

fn delete(address: &LocalAddress) -> Change {
    Change {
        message: RouteNetlinkMessage::DelAddress(message(address.address, address.prefix, address.ifindex)),
        flags: 0,
        done_already: &[EADDRNOTAVAIL, ENODEV],
        about: format!("remove {}/{} from interface {}", address.address, address.prefix, address.ifindex),
    }
}
