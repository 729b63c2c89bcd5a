//! The routes in Egret's own routing tables. Egret owns a table as a whole and removes other routes from it.

use crate::datapath::names::{self, PROTOCOL};
use crate::datapath::route_socket::{Applied, Change, RouteSocket, errno};
use crate::datapath::sysctl;
use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{ENODEV, ENOENT, ESRCH};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The metric of a fallback route, behind all other routes: the one that Documentation/networking/vrf.rst gives an
/// `unreachable` default route.
pub const METRIC_LAST: u32 = 4_278_198_272;
/// The metric of an IPv6 route without one (`IP6_RT_PRIO_USER`, include/net/ip6_route.h).
const IP6_RT_PRIO_USER: u32 = 1024;
/// How often a table is read at most. After a replacement it must be read again to see what remains.
const ROUNDS: usize = 4;

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The destinations.
    pub dst: IpNetwork,
    /// What the route does with a packet.
    pub kind: RouteKind,
    /// The metric; the kernel takes the route with the lowest one. 0 is the kernel's default.
    pub metric: u32,
}

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// Forwards it.
    Unicast {
        /// The next hop; `None` if the destinations are on the link.
        gateway: Option<IpAddr>,
        /// The interface's index.
        oif: u32,
        /// Treats the next hop as on the link, even if no network of the interface contains it.
        onlink: bool,
    },
    /// Continues with the routing rules behind the one that led to this table.
    Throw,
    /// Drops it and sends an ICMP error.
    Unreachable,
    /// Drops them.
    Blackhole,
    /// Sends them to all hosts of the interface's link. No packet is to use it: see `datapath/redirected.rs`.
    Broadcast {
        /// The interface's index.
        oif: u32,
    },
}

/// Makes these the only routes of `table`, for both families, and returns how many changes it made. Additions and
/// replacements come before removals, so that the table is never without a route. On a host without IPv6, IPv6 routes
/// are ignored.
///
/// # Errors
/// The table cannot be read, or the kernel rejected a change; the other changes have been made.
pub async fn sync(socket: &RouteSocket, table: u32, routes: &BTreeSet<Route>) -> Result<usize> {
    sync_each(socket, table, routes).await?.all()
}

/// As [`sync`], and returns the destinations and metrics of the routes whose changes failed.
///
/// # Errors
/// The table cannot be read.
pub async fn sync_each(
    socket: &RouteSocket,
    table: u32,
    routes: &BTreeSet<Route>,
) -> Result<Applied<(IpNetwork, u32)>> {
    let ipv6 = sysctl::ipv6()?;
    let wanted: BTreeSet<Route> =
        routes.iter().filter(|r| ipv6 || r.dst.is_ipv4()).map(|r| r.as_the_kernel_has_it()).collect();
    let mut all = Applied { changes: 0, refused: Vec::new() };
    for _ in 0..ROUNDS {
        let mut there = read(socket, table, AddressFamily::Inet).await?;
        if ipv6 {
            there.extend(read(socket, table, AddressFamily::Inet6).await?);
        }
        let mut missing = wanted.clone();
        let mut wrong = Vec::new();
        for (route, message) in there {
            // Of two equal routes the second is removed.
            if !route.is_some_and(|r| missing.remove(&r)) {
                wrong.push(message);
            }
        }
        let replaced: BTreeSet<_> = missing.iter().map(|r| (r.dst, r.metric)).collect();
        let mut changes: Vec<((IpNetwork, u32), Change)> =
            missing.iter().map(|r| ((r.dst, r.metric), add(table, r))).collect();
        let before = wrong.len();
        // The kernel ignores the type when it deletes an IPv6 route. A deletion of the replaced route would also
        // match the new one, so what remains is left to the next round.
        wrong.retain(|m| !replaced.contains(&(destination(m), metric(m))));
        let again = wrong.len() < before;
        changes.extend(wrong.into_iter().map(|m| ((destination(&m), metric(&m)), delete(table, m))));
        let applied = socket.apply_keyed(changes).await?;
        all.changes += applied.changes;
        all.refused = applied.refused;
        if !again {
            break;
        }
    }
    Ok(all)
}

/// The numbers of Egret's tables that contain routes of Egret's, including those of an earlier run.
pub async fn tables(socket: &RouteSocket) -> Result<BTreeSet<u32>> {
    let mut tables = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        if family == AddressFamily::Inet6 && !sysctl::ipv6()? {
            break;
        }
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.protocol = PROTOCOL.into();
        let found = socket
            .dump(RouteNetlinkMessage::GetRoute(filter), |m| match m {
                RouteNetlinkMessage::NewRoute(r) if r.header.protocol == RouteProtocol::from(PROTOCOL) => {
                    r.attributes.iter().find_map(|a| if let RouteAttribute::Table(t) = a { Some(*t) } else { None })
                }
                _ => None,
            })
            .await
            .context("cannot read the routing tables")?;
        tables.extend(found.into_iter().filter(|table| names::is_own_table(*table)));
    }
    Ok(tables)
}

impl Route {
    fn as_the_kernel_has_it(&self) -> Route {
        let mut route = *self;
        // The network address has no host bits. Both values are valid by construction.
        route.dst = IpNetwork::new(self.dst.network(), self.dst.prefix()).unwrap_or(self.dst);
        if route.metric == 0 && !route.dst.is_ipv4() {
            route.metric = IP6_RT_PRIO_USER;
        }
        route
    }
}

async fn read(socket: &RouteSocket, table: u32, family: AddressFamily) -> Result<Vec<(Option<Route>, RouteMessage)>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = family;
    filter.attributes.push(RouteAttribute::Table(table));
    let read = socket
        .dump(RouteNetlinkMessage::GetRoute(filter), |m| match m {
            RouteNetlinkMessage::NewRoute(r)
                if r.header.address_family == family && r.attributes.contains(&RouteAttribute::Table(table)) =>
            {
                Some((parse(&r), r))
            }
            _ => None,
        })
        .await;
    match read {
        // A table exists from its first route on.
        Err(e) if errno(&e) == Some(ENOENT) => Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read routing table {table}")),
    }
}

/// Parses a route of Egret's; `None` if the route has another origin or further attributes.
fn parse(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.protocol != RouteProtocol::from(PROTOCOL) || header.tos != 0 || header.source_prefix_length != 0 {
        return None;
    }
    let (mut gateway, mut oif) = (None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => oif = *index,
            RouteAttribute::Gateway(a) => gateway = Some(ip(a)?),
            RouteAttribute::Table(_)
            | RouteAttribute::Destination(_)
            | RouteAttribute::Priority(_)
            | RouteAttribute::CacheInfo(_)
            | RouteAttribute::Preference(_) => {}
            _ => return None,
        }
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast { gateway, oif, onlink: header.flags.contains(RouteFlags::Onlink) },
        // For IPv6 the kernel reports the loopback interface as the outgoing one; it is ignored.
        RouteType::Throw => RouteKind::Throw,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Broadcast => RouteKind::Broadcast { oif },
        _ => return None,
    };
    Some(Route { dst: destination(message), kind, metric: metric(message) })
}

fn destination(message: &RouteMessage) -> IpNetwork {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Destination(d) = a { ip(d) } else { None })
        .unwrap_or(any);
    IpNetwork::new(address, message.header.destination_prefix_length).unwrap_or(address.into())
}

fn metric(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Priority(p) = a { Some(*p) } else { None })
        .unwrap_or(0)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn add(table: u32, route: &Route) -> Change {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = if route.dst.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    header.destination_prefix_length = route.dst.prefix();
    header.protocol = PROTOCOL.into();
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(table));
    if route.dst.prefix() > 0 {
        attributes.push(RouteAttribute::Destination(route.dst.network().into()));
    }
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    match route.kind {
        RouteKind::Unicast { gateway, oif, onlink } => {
            header.kind = RouteType::Unicast;
            attributes.push(RouteAttribute::Oif(oif));
            match gateway {
                Some(a) => attributes.push(RouteAttribute::Gateway(a.into())),
                None => header.scope = RouteScope::Link,
            }
            if onlink {
                header.flags |= RouteFlags::Onlink;
            }
        }
        RouteKind::Throw => header.kind = RouteType::Throw,
        RouteKind::Unreachable => header.kind = RouteType::Unreachable,
        RouteKind::Blackhole => header.kind = RouteType::BlackHole,
        RouteKind::Broadcast { oif } => {
            (header.kind, header.scope) = (RouteType::Broadcast, RouteScope::Link);
            attributes.push(RouteAttribute::Oif(oif));
        }
    }
    Change {
        message: RouteNetlinkMessage::NewRoute(message),
        // Atomically replaces a route with the same destination and metric.
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        done_already: &[],
        about: format!("add the route {} ({:?}, metric {}) to table {table}", route.dst, route.kind, route.metric),
    }
}

fn delete(table: u32, mut message: RouteMessage) -> Change {
    let about = format!("remove the route {} from table {table}", destination(&message));
    message.header.flags = RouteFlags::empty();
    let by_nexthop_id = message.attributes.iter().any(|a| matches!(a, RouteAttribute::NhId(_)));
    message.attributes.retain(|a| match a {
        RouteAttribute::Table(_)
        | RouteAttribute::Destination(_)
        | RouteAttribute::Source(_)
        | RouteAttribute::Priority(_)
        | RouteAttribute::NhId(_) => true,
        // The kernel reports the next hop's id and its attributes, and accepts only one of the two.
        RouteAttribute::Oif(_) | RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
            !by_nexthop_id
        }
        _ => false,
    });
    Change { message: RouteNetlinkMessage::DelRoute(message), flags: 0, done_already: &[ESRCH, ENODEV, ENOENT], about }
}
