//! Packets that another program's eBPF takes from a pod's veth straight to an interface, past nf_tables.
//!
//! Cilium's host routing does this: its program at the veth redirects packets, and neither Egret's chain on the veth nor
//! any hook of netfilter sees them, not even the egress hook of the interface by which they leave (`nf_skip_egress`). But
//! it asks the routing tables, with the packet's own source address, in one of two ways:
//!
//! - `bpf_redirect_neigh` to an interface that the program knows (`__bpf_redirect_neigh_v4`, net/core/filter.c). It looks
//!   up how a packet leaves that has not come in (`iif lo`), which forwarded packets never match. With an interface, the
//!   kernel takes a failed IPv4 look-up for a destination on the link (`ip_route_output_key_hash_rcu`). So the table has a
//!   route by each interface, of type `broadcast`, which the helper rejects.
//! - `bpf_fib_lookup` first, as a packet that comes in by the veth, without its mark. What nf_tables lets pass may look the
//!   same, and so does a reply in reverse-path filtering. So these rules are for pods whose packets do not arrive at
//!   nf_tables (`datapath/arrival.rs`).
//!
//! Both tables have the cluster's networks alone.

use crate::datapath::addresses::local_addresses_of;
use crate::datapath::names::{DEVICE, RULE_FOUND_BY_PROGRAM, RULE_REDIRECTED, TABLE_QUARANTINE, TABLE_REDIRECTED};
use crate::datapath::route_socket::RouteSocket;
use crate::datapath::routes::{Route, RouteKind};
use anyhow::{Context, Result};
use egret_cni::source_rule::{OUTGOING, Source, SourceRules, sources};
use egret_nft::netlink::{NETLINK_ROUTE, Socket};
use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

/// For `bpf_redirect_neigh`, and for `bpf_fib_lookup`.
const RULES: [SourceRules; 2] = [
    SourceRules { priority: RULE_REDIRECTED, table: TABLE_REDIRECTED, unmarked: false },
    SourceRules { priority: RULE_FOUND_BY_PROGRAM, table: TABLE_QUARANTINE, unmarked: true },
];

/// The pods whose redirected packets are to be blocked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted([BTreeSet<Source>; 2]);

impl Wanted {
    /// Adds a pod's address. `veth` is the name of the host's end of its veth pair if its packets may not arrive at
    /// nf_tables.
    pub fn add(&mut self, address: IpAddr, veth: Option<&str>) {
        let [redirected, found] = &mut self.0;
        redirected.insert(Source { address, interface: Some(OUTGOING.into()) });
        found.extend(veth.map(|name| Source { address, interface: Some(name.into()) }));
    }
}

/// The rules of pods whose redirected packets are blocked.
pub struct Redirected {
    socket: Socket,
    /// The rules that are there; `None` if another program may have changed them.
    there: Option<Wanted>,
}

impl Redirected {
    /// Opens a socket in this network namespace.
    ///
    /// # Errors
    /// A netlink socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Redirected { socket: Socket::open(NETLINK_ROUTE)?, there: None })
    }

    /// The socket's netlink port, which is in the kernel's notifications about changes made with this socket.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Makes the next call read the rules.
    pub fn invalidate(&mut self) {
        self.there = None;
    }

    /// Blocks redirected packets of these pods to destinations outside the cluster, before those of others are let pass.
    /// Returns the number of changes.
    ///
    /// # Errors
    /// The rules cannot be read or changed.
    pub fn block(&mut self, wanted: &Wanted) -> Result<usize> {
        self.sync(wanted).context("the routing rules for packets that an eBPF program redirects")
    }

    fn sync(&mut self, wanted: &Wanted) -> Result<usize> {
        let socket = &mut self.socket;
        let there = match self.there.take() {
            Some(there) => there,
            None => Wanted(sources(RULES, socket)?),
        };
        let mut changes = 0;
        for ((rules, wanted), there) in RULES.iter().zip(&wanted.0).zip(&there.0) {
            wanted.difference(there).try_for_each(|source| rules.add(socket, source))?;
            there.difference(wanted).try_for_each(|source| rules.delete(socket, source))?;
            changes += wanted.symmetric_difference(there).count();
        }
        self.there = Some(wanted.clone());
        Ok(changes)
    }
}

/// The routes by which IPv4 packets cannot be redirected: one for each interface with an address, as these are the ones
/// that lead anywhere.
///
/// # Errors
/// The host's addresses cannot be read.
pub async fn no_way_out(socket: &RouteSocket) -> Result<BTreeSet<Route>> {
    let tunnel = nix::net::if_::if_nametoindex(DEVICE).ok();
    let all = local_addresses_of(socket, AddressFamily::Inet).await?;
    let leads_out = all.iter().filter(|a| !a.address.is_loopback() && Some(a.ifindex) != tunnel);
    let interfaces: BTreeSet<u32> = leads_out.map(|a| a.ifindex).collect();
    Ok(interfaces.into_iter().filter_map(by).collect())
}

fn by(interface: u32) -> Option<Route> {
    let dst = IpNetwork::new(Ipv4Addr::UNSPECIFIED.into(), 0).ok()?;
    // Each has a metric of its own: the kernel keeps one route for a destination and a metric.
    Some(Route { dst, kind: RouteKind::Broadcast { oif: interface }, metric: interface })
}
