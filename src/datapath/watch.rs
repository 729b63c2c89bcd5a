//! Netlink notifications about changes by other programs that concern Egret. The events are coarse: they tell the
//! daemon what to read again.
//!
//! On a busy node, routes, neighbours and interfaces change all the time. Notifications that do not concern Egret are
//! discarded here without a copy, and a burst becomes one event of each kind.

use crate::datapath::filters::{TCA_KIND, TCMSG};
use crate::datapath::ifb;
use crate::datapath::names::{
    ADDRESS_METRIC, DEVICE, FLUSH_GUARD, HOP_DEVICE, OUT_DEVICE, PROTOCOL, ROUTE_DEVICE, RULE_QUARANTINE_REDIRECTED,
    RULE_TO_VRF, TABLE, TABLE_LOCAL, TABLE_MAIN, is_own_table,
};
use egret_nft::mac::Mac;
use egret_nft::netlink::{Message, NETLINK_NETFILTER, NETLINK_ROUTE, attributes, messages};
use ipnetwork::IpNetwork;
use netlink_sys::{AsyncSocket, SocketAddr, TokioSocket};
use nix::libc::{AF_INET, AF_UNSPEC, ENOBUFS, IFF_RUNNING, IFF_UP};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::task::{Context, Poll, ready};

/// Multicast groups, include/uapi/linux/rtnetlink.h: links, neighbours, filters, addresses, routes and rules of both
/// families, and the IPv4 settings of interfaces.
const ROUTE_GROUPS: [u32; 10] = [1, 3, 4, 5, 9, 7, 11, 8, 19, 24];
/// `NFNLGRP_NFTABLES`, include/uapi/linux/netfilter/nfnetlink.h.
const NFNLGRP_NFTABLES: u32 = 7;
/// Message types, include/uapi/linux/rtnetlink.h.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_NEWNETCONF: u16 = 80;
/// `NFNL_SUBSYS_NFTABLES << 8`, and `NFT_MSG_NEWGEN` in it, which ends every transaction of every program.
const NFTABLES: u16 = 10 << 8;
const NFT_MSG_NEWGEN: u16 = NFTABLES | 15;
/// Attribute types, each of its own message type.
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_RT_PRIORITY: u16 = 9;
const IFA_PROTO: u16 = 11;
const RTA_DST: u16 = 1;
const RTA_TABLE: u16 = 15;
const FRA_PRIORITY: u16 = 6;
const NDA_LLADDR: u16 = 2;
const NETCONFA_IFINDEX: u16 = 1;
/// The index of the settings for all interfaces.
const NETCONFA_IFINDEX_ALL: u32 = u32::MAX;
/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE`, `NFTA_SET_TABLE`, ...: all of them 1.
const NFTA_TABLE: u16 = 1;
/// Lengths of `struct ifinfomsg`, `ifaddrmsg`, `rtmsg`, `ndmsg`, `fib_rule_hdr`, `netconfmsg` (padded), `nfgenmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
const RTMSG: usize = 12;
const NDMSG: usize = 12;
const FIB_RULE_HDR: usize = 12;
const NETCONFMSG: usize = 4;
const NFGENMSG: usize = 4;
/// The largest datagram of the kernel (`NLMSG_GOODSIZE`, and messages that nf_tables joins).
pub(super) const DATAGRAM: usize = 128 * 1024;
/// The receive buffer, bytes: room for notifications while the daemon is busy. It takes memory only then.
const RECEIVE_BUFFER: usize = 4 << 20;

/// What another program has changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ForeignChange {
    /// Notifications were lost, and anything may have changed.
    Everything,
    /// The tunnel device or its settings. When a device goes, its routes go without a notification.
    Tunnel,
    /// The tunnel device's neighbours or forwarding entries.
    Neighbours,
    /// Routes in Egret's tables, or an uplink went up or down, which may remove routes without a notification.
    Routes,
    /// An uplink lost or regained its carrier, or a default route of the host was added or removed.
    Uplinks,
    /// A route to another node's end of the tunnel, or the MTU or state of an interface by which tunnel packets leave.
    Underlay,
    /// Routing rules with Egret's priorities.
    Rules,
    /// Addresses on an uplink, or egress IPs on any interface, or the device for those that a router announces.
    Addresses,
    /// The nftables tables with Egret's name.
    Nftables,
    /// A filter of packets that may redirect them to an ifb device.
    Filters {
        /// The index of its interface.
        index: u32,
    },
    /// A veth was removed.
    VethGone {
        /// The index that it had.
        index: u32,
    },
}

/// What concerns the daemon, besides objects with Egret's names and numbers.
#[derive(Clone, Debug, Default)]
pub struct Interest {
    /// The netlink ports of the daemon's own sockets, whose changes cause no events.
    pub own_ports: BTreeSet<u32>,
    /// The indexes of the interfaces by which tunnel packets leave, and their MTU in bytes; the tunnel's depends on them.
    pub underlay: BTreeMap<u32, u32>,
    /// The other nodes' ends of the tunnel.
    pub peers: BTreeSet<IpAddr>,
    /// The indices of the gateways' uplinks.
    pub uplinks: BTreeSet<u32>,
    /// The egress IPs, including those that another program places.
    pub addresses: BTreeSet<IpAddr>,
}

/// Receives the kernel's notifications, in the network namespace in which it was opened.
pub struct Watch {
    route: TokioSocket,
    netfilter: TokioSocket,
    buffer: Box<[u8]>,
    /// The tunnel device's index, 0 if there is none.
    device: u32,
    /// As `device`, of the device that leads to it.
    out: u32,
    /// Whether each uplink had a carrier in its last notification.
    running: HashMap<u32, bool>,
    interest: Interest,
}

impl Watch {
    /// Starts to receive. The sockets queue notifications until the first [`Watch::next`].
    ///
    /// # Errors
    /// A socket cannot be opened.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        Ok(Watch {
            route: listen(NETLINK_ROUTE, &ROUTE_GROUPS)?,
            netfilter: listen(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
            buffer: vec![0; DATAGRAM].into(),
            device: nix::net::if_::if_nametoindex(DEVICE).unwrap_or(0),
            out: nix::net::if_::if_nametoindex(OUT_DEVICE).unwrap_or(0),
            running: HashMap::new(),
            interest: Interest::default(),
        })
    }

    /// Sets what concerns the daemon from now on.
    pub fn set_interest(&mut self, interest: Interest) {
        self.interest = interest;
    }

    /// Waits for changes and returns the pending events, each kind once. It is cancel-safe.
    ///
    /// # Errors
    /// A socket failed.
    pub async fn next(&mut self) -> io::Result<BTreeSet<ForeignChange>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<BTreeSet<ForeignChange>>> {
        let mut events = BTreeSet::new();
        let Watch { route, netfilter, buffer, device, out, running, interest } = self;
        running.retain(|index, _| interest.uplinks.contains(index));
        let mut filter = Filter { device, out, running, interest, events: &mut events };
        // Each loop ends when the socket is empty, or when tokio's budget of this task is used up.
        while let Poll::Ready(read) = poll_receive(route, buffer, cx) {
            filter.datagram(read?, buffer, Filter::route);
        }
        while let Poll::Ready(read) = poll_receive(netfilter, buffer, cx) {
            filter.datagram(read?, buffer, Filter::nftables);
        }
        if events.is_empty() { Poll::Pending } else { Poll::Ready(Ok(events)) }
    }
}

pub(super) fn listen(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    let raw = socket.socket_mut();
    // With CAP_NET_ADMIN the size may exceed net.core.rmem_max. With a smaller buffer, losses cause more reading.
    let _ = setsockopt(&raw.as_fd(), sockopt::RcvBufForce, &RECEIVE_BUFFER);
    raw.bind(&SocketAddr::new(0, 0))?;
    groups.iter().try_for_each(|group| raw.add_membership(*group))?;
    Ok(socket)
}

/// Reads one datagram and returns its length; `None` if the kernel dropped some.
pub(super) fn poll_receive(
    socket: &TokioSocket,
    buffer: &mut [u8],
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<usize>>> {
    let all = buffer.len();
    let mut room = buffer;
    match ready!(socket.poll_recv(cx, &mut room)) {
        Ok(()) => Poll::Ready(Ok(Some(all - room.len()))),
        Err(e) if e.raw_os_error() == Some(ENOBUFS) => Poll::Ready(Ok(None)),
        Err(e) => Poll::Ready(Err(e)),
    }
}

struct Filter<'a> {
    device: &'a mut u32,
    out: &'a mut u32,
    running: &'a mut HashMap<u32, bool>,
    interest: &'a Interest,
    events: &'a mut BTreeSet<ForeignChange>,
}

impl Filter<'_> {
    fn datagram(
        &mut self,
        read: Option<usize>,
        buffer: &[u8],
        each: impl Fn(&mut Self, &Message<'_>) -> Option<ForeignChange>,
    ) {
        let whole = read.is_some_and(|length| {
            let parsed = messages(&buffer[..length.min(buffer.len())], |m| {
                let news = each(self, &m);
                if m.port == 0 || !self.interest.own_ports.contains(&m.port) {
                    self.events.extend(news);
                }
            });
            parsed.is_ok()
        });
        if !whole {
            self.events.insert(ForeignChange::Everything);
        }
    }

    fn route(&mut self, m: &Message<'_>) -> Option<ForeignChange> {
        match m.kind {
            RTM_NEWLINK | RTM_DELLINK => self.link(m),
            RTM_NEWADDR | RTM_DELADDR => self.address(m),
            RTM_NEWROUTE | RTM_DELROUTE => {
                let table = attribute(m, RTMSG, RTA_TABLE).and_then(number).unwrap_or(u32::from(*m.payload.get(4)?));
                let is_own = *m.payload.get(5)? == PROTOCOL;
                if is_own_table(table) || table == TABLE_LOCAL && is_own {
                    return Some(ForeignChange::Routes);
                }
                if self.leads_to_a_peer(m) {
                    self.events.insert(ForeignChange::Underlay);
                }
                let default = table == TABLE_MAIN && *m.payload.get(1)? == 0;
                if default && !self.interest.uplinks.is_empty() {
                    return Some(ForeignChange::Uplinks);
                }
                None
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => {
                let on_device = self.is_own(number(m.payload.get(4..8)?)?);
                // A neighbour entry without a MAC address is only an attempt to resolve it.
                let known = attribute(m, NDMSG, NDA_LLADDR).is_some_and(|mac| mac.len() == size_of::<Mac>());
                (on_device && known).then_some(ForeignChange::Neighbours)
            }
            RTM_NEWRULE | RTM_DELRULE => {
                let priority = attribute(m, FIB_RULE_HDR, FRA_PRIORITY).and_then(number)?;
                (RULE_QUARANTINE_REDIRECTED..=RULE_TO_VRF).contains(&priority).then_some(ForeignChange::Rules)
            }
            RTM_NEWTFILTER | RTM_DELTFILTER => {
                let kind = attribute(m, TCMSG, TCA_KIND).map(trim)?;
                let index = number(m.payload.get(4..8)?)?;
                let may_redirect = ifb::KINDS.iter().any(|(name, _)| name.as_bytes() == kind);
                may_redirect.then_some(ForeignChange::Filters { index })
            }
            RTM_NEWNETCONF => {
                let index = attribute(m, NETCONFMSG, NETCONFA_IFINDEX).and_then(number)?;
                let all = *self.device != 0 && index == NETCONFA_IFINDEX_ALL;
                (self.is_own(index) || all).then_some(ForeignChange::Tunnel)
            }
            _ => None,
        }
    }

    fn link(&mut self, m: &Message<'_>) -> Option<ForeignChange> {
        // A bridge sends the same messages about its ports, with AF_BRIDGE, and RTM_DELLINK when a port leaves it.
        if i32::from(*m.payload.first()?) != AF_UNSPEC {
            return None;
        }
        let index = number(m.payload.get(4..8)?)?;
        let name = attribute(m, IFINFOMSG, IFLA_IFNAME).map(trim)?;
        if name == DEVICE.as_bytes() || index == *self.device {
            let here = m.kind == RTM_NEWLINK && name == DEVICE.as_bytes();
            *self.device = if here { index } else { 0 };
            return Some(ForeignChange::Tunnel);
        }
        if name == OUT_DEVICE.as_bytes() || name == HOP_DEVICE.as_bytes() || self.is_own(index) {
            let is_out = name == OUT_DEVICE.as_bytes();
            if is_out || index == *self.out {
                *self.out = if is_out && m.kind == RTM_NEWLINK { index } else { 0 };
            }
            return Some(ForeignChange::Tunnel);
        }
        if ROUTE_DEVICE.iter().any(|own| name == own.as_bytes()) {
            return Some(ForeignChange::Addresses);
        }
        if let Some(was) = self.interest.underlay.get(&index) {
            let mtu = attribute(m, IFINFOMSG, IFLA_MTU).and_then(number);
            let changed: u32 = number(m.payload.get(12..16)?)?;
            // When it goes down, its IPv4 routes go without a notification (`fib_sync_down_dev`).
            if mtu.is_some_and(|mtu| mtu != *was) || m.kind == RTM_DELLINK || changed & IFF_UP as u32 != 0 {
                self.events.insert(ForeignChange::Underlay);
            }
        }
        if self.interest.uplinks.contains(&index) {
            let (flags, changed) = (number(m.payload.get(8..12)?)?, number(m.payload.get(12..16)?)?);
            let running = m.kind == RTM_NEWLINK && flags & IFF_RUNNING as u32 != 0;
            if self.running.insert(index, running) != Some(running) {
                self.events.insert(ForeignChange::Uplinks);
            }
            let news = m.kind == RTM_DELLINK || changed & IFF_UP as u32 != 0;
            return news.then_some(ForeignChange::Routes);
        }
        let info = attribute(m, IFINFOMSG, IFLA_LINKINFO)?;
        let veth = attributes(info).any(|(kind, value)| kind == IFLA_INFO_KIND && trim(value) == b"veth");
        (m.kind == RTM_DELLINK && veth).then_some(ForeignChange::VethGone { index })
    }

    /// Whether this is the tunnel device's index, or that of the device that leads to it.
    fn is_own(&self, index: u32) -> bool {
        index != 0 && (index == *self.device || index == *self.out)
    }

    fn leads_to_a_peer(&self, m: &Message<'_>) -> bool {
        let (Some(family), Some(prefix)) = (m.payload.first(), m.payload.get(1)) else { return false };
        let ipv4 = i32::from(*family) == AF_INET;
        let unspecified = if ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let destination = attribute(m, RTMSG, RTA_DST).and_then(ip).unwrap_or(unspecified);
        let Ok(network) = IpNetwork::new(destination, *prefix) else { return false };
        let mut behind = self.interest.peers.range(network.network()..=network.broadcast());
        behind.next().is_some()
    }

    fn address(&self, m: &Message<'_>) -> Option<ForeignChange> {
        let index = number(m.payload.get(4..8)?)?;
        let (mut local, mut address, mut ours) = (None, None, false);
        for (kind, value) in attributes(m.payload.get(IFADDRMSG..)?) {
            match kind {
                IFA_LOCAL => local = ip(value),
                IFA_ADDRESS => address = ip(value),
                IFA_PROTO => ours |= value == [PROTOCOL],
                IFA_RT_PRIORITY => ours |= number(value) == Some(ADDRESS_METRIC),
                _ => {}
            }
        }
        if self.is_own(index) {
            // The device's own address concerns the tunnel. Health addresses are synchronised like egress IPs.
            return Some(if ours { ForeignChange::Addresses } else { ForeignChange::Tunnel });
        }
        let wanted = local.or(address).is_some_and(|a| self.interest.addresses.contains(&a));
        (ours || wanted || self.interest.uplinks.contains(&index)).then_some(ForeignChange::Addresses)
    }

    fn nftables(&mut self, m: &Message<'_>) -> Option<ForeignChange> {
        if m.kind & 0xff00 != NFTABLES || m.kind == NFT_MSG_NEWGEN {
            return None;
        }
        let table = trim(attribute(m, NFGENMSG, NFTA_TABLE)?);
        [TABLE, FLUSH_GUARD].map(str::as_bytes).contains(&table).then_some(ForeignChange::Nftables)
    }
}

fn attribute<'a>(m: &Message<'a>, header: usize, wanted: u16) -> Option<&'a [u8]> {
    attributes(m.payload.get(header..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn trim(text: &[u8]) -> &[u8] {
    text.split(|b| *b == 0).next().unwrap_or_default()
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(|b| Ipv4Addr::from(b).into())
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(|b| Ipv6Addr::from(b).into()))
        .ok()
}
