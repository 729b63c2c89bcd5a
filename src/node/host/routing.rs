//! The routing rules, and the routes of Egret's tables.

use super::{Faults, Host};
use crate::datapath::names::*;
use crate::datapath::redirected;
use crate::datapath::routes::{self, METRIC_LAST, Route, RouteKind};
use crate::datapath::rules::{self, Only, Rule};
use crate::datapath::uplink::{Interface, Uplinks, Vrf, by_index};
use crate::model::networks::Networks;
use crate::node_plan::View;
use crate::node_plan::allocations::Uplink;
use anyhow::Result;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// The rules and routes that are desired, or that were last applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Routing {
    rules: BTreeSet<Rule>,
    pub(super) tables: BTreeMap<u32, BTreeSet<Route>>,
}

impl Host {
    /// Brings rules and routes in sync. Returns how many changes that took.
    pub async fn routing(&mut self, view: &View) -> Result<usize> {
        let Some(tunnel) = self.tunnel_index() else { return Ok(0) };
        let device = self.entrance.device(tunnel, self.ruleset.as_ref().map(|ruleset| ruleset.plan().way));
        let wanted = self.wanted_routing(view, device).await?;
        if self.routing.as_ref() == Some(&wanted) {
            return Ok(0);
        }
        let (mut changes, mut faults) = (0, Faults::new());
        for (table, routes) in &wanted.tables {
            let applied = routes::sync_each(&self.routes, *table, routes).await?;
            changes += applied.changes;
            for ((network, metric), e) in applied.refused {
                // Without the fallback route, packets that must be dropped would use the main table. Any other route
                // is one network's or one gateway's next hop, which is then unreachable.
                if metric == METRIC_LAST || *table == TABLE_REQUEST && network.prefix() == 0 {
                    return Err(e);
                }
                let of = if *table > TABLE_UPLINK { "next hop" } else { "network" };
                faults.insert(format!("{of} {network}, table {table}"), format!("{e:#}"));
            }
        }
        self.from_vrf = wanted.rules.iter().any(|rule| rule.priority == RULE_FROM_VRF).then(|| {
            let to = wanted.rules.iter().filter_map(|rule| rule.only.as_ref().map(|only| only.to));
            to.collect::<BTreeSet<_>>().into_iter().collect()
        });
        changes += rules::sync(&self.routes, &wanted.rules).await?;
        self.entrance.routed(device);
        // Empty the tables of former uplinks after the rules that led to them are removed.
        for table in self.routing.iter().flat_map(|r| r.tables.keys()).filter(|t| !wanted.tables.contains_key(t)) {
            changes += routes::sync(&self.routes, *table, &BTreeSet::new()).await?;
        }
        self.routing = faults.is_empty().then_some(wanted);
        self.faults.routes = faults;
        Ok(changes)
    }

    async fn wanted_routing(&self, view: &View, device: u32) -> Result<Routing> {
        let marks = self.marks;
        let rule =
            |priority, mark, mask, table| Rule { priority, mark, mask, table, without_default: false, only: None };
        let mut redirected = only_direct(&view.networks, RouteKind::Unreachable);
        redirected.extend(redirected::no_way_out(&self.routes).await?);
        let mut routing = Routing {
            rules: [
                rule(RULE_REQUEST, marks.request(), marks.kind_mask(), TABLE_REQUEST),
                rule(RULE_REPLY, marks.reply(), marks.kind_and_index_mask(), TABLE_REPLY),
                // A pod mark that `prerouting` did not clear, and the flush guard's mark, which may come with an
                // egress ID.
                rule(RULE_FLUSH_GUARD, marks.pod_mark_kind(), marks.pod_mark_mask(), TABLE_FLUSH_GUARD),
                rule(RULE_FLUSH_GUARD, marks.undecided(), marks.kind_and_index_mask(), TABLE_FLUSH_GUARD),
            ]
            .into(),
            tables: [
                (TABLE_REQUEST, request_table(&view.networks, device)),
                (TABLE_REPLY, view.networks.pods.iter().map(|n| via_tunnel_next_hop(*n, device)).collect()),
                (TABLE_QUARANTINE, only_direct(&view.networks, RouteKind::Unreachable)),
                (TABLE_FLUSH_GUARD, flush_guard_table(view)),
                (TABLE_REDIRECTED, redirected),
            ]
            .into(),
        };
        for (at, uplink) in view.allocations.uplinks.iter().enumerate() {
            let index = at as u16 + 1;
            let table = TABLE_UPLINK + u32::from(index);
            routing.rules.insert(rule(RULE_UPLINK, marks.uplink(index), marks.kind_and_index_mask(), table));
            let (routes, in_vrf) = self.uplink_table(uplink, &view.networks).await;
            routing.tables.insert(table, routes);
            if !in_vrf.is_empty() {
                // Source validation may look up the server with the mark, which must be found in the VRF's table: the
                // main table's default route does not count.
                let from_vrf = rule(RULE_FROM_VRF, marks.reply_here(), marks.kind_and_index_mask(), TABLE_MAIN);
                routing.rules.insert(Rule { without_default: true, ..from_vrf });
            }
            // IPv6 has no source validation.
            for to in view.networks.pods.iter().filter(|network| network.is_ipv4()) {
                // The packet may have the uplink's mark there, or none.
                let to_vrf = rule(RULE_TO_VRF, 0, marks.kind_mask(), TABLE_MAIN);
                let only = in_vrf.iter().map(|iif| Some(Only { iif: iif.clone(), to: *to }));
                routing.rules.extend(only.map(|only| Rule { only, ..to_vrf.clone() }));
            }
        }
        Ok(routing)
    }

    /// The routes of a gateway with a next hop of its own: packets leave by that next hop or not at all, and
    /// destinations on the interface's link are reached directly. A family without a next hop uses the main table.
    /// Pods' networks are `throw` routes, as in the [`request_table`]. Also returns the names of the interfaces that
    /// are in a VRF, and of the VRFs.
    async fn uplink_table(&self, uplink: &Uplink, networks: &Networks) -> (BTreeSet<Route>, BTreeSet<Arc<str>>) {
        let mut in_vrf = BTreeSet::new();
        let mut routes: BTreeSet<Route> = networks.pods.iter().map(|n| throw(*n)).collect();
        let hops = [(EVERYTHING4, uplink.next_hop.0.map(IpAddr::V4)), (EVERYTHING6, uplink.next_hop.1.map(IpAddr::V6))];
        for (dst, hop) in hops {
            let Some(hop) = hop else { continue };
            routes.insert(Route { dst, kind: RouteKind::Unreachable, metric: METRIC_LAST });
            let interface = async {
                let mut uplinks = Uplinks::read(&self.routes).await?;
                let interface = uplinks.find(hop, uplink.interface.as_deref()).await?;
                let on_link: Vec<IpNetwork> = uplinks.on_link(interface.ifindex, hop.is_ipv4()).collect();
                anyhow::Ok((interface, on_link))
            };
            let interface = interface.await;
            if let Ok((Interface { name, vrf: Vrf::Inside { device }, .. }, _)) = &interface {
                // Which of both the kernel compares in source validation depends on its version.
                let device = by_index(&self.routes, *device).await.ok().flatten();
                in_vrf.extend(
                    [Some(&**name), device.as_ref().map(|device| &*device.name)].into_iter().flatten().map(Arc::from),
                );
            }
            match interface {
                // The kernel rejects a route by an interface that is down.
                Ok((interface, _)) if !interface.running => {
                    tracing::warn!(%hop, interface = interface.name, "a gateway's next hop cannot be used: its interface is down");
                }
                Ok((interface, on_link)) => {
                    let oif = interface.ifindex;
                    let kind = RouteKind::Unicast { gateway: Some(hop), oif, onlink: true };
                    routes.insert(Route { dst, kind, metric: 0 });
                    let kind = RouteKind::Unicast { gateway: None, oif, onlink: false };
                    // Networks of pods on the link stay `throw` routes.
                    let on_link = on_link.into_iter().filter(|network| !networks.pods.contains(network));
                    routes.extend(on_link.map(|dst| Route { dst, kind, metric: 0 }));
                }
                Err(e) => tracing::warn!(%hop, "a gateway's next hop cannot be used: {e:#}"),
            }
        }
        (routes, in_vrf)
    }
}

const EVERYTHING4: IpNetwork = match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
    Some(all) => IpNetwork::V4(all),
    None => unreachable!(),
};
const EVERYTHING6: IpNetwork = match Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0) {
    Some(all) => IpNetwork::V6(all),
    None => unreachable!(),
};

fn via_tunnel_next_hop(dst: IpNetwork, device: u32) -> Route {
    let tunnel_next_hop = if dst.is_ipv4() { IpAddr::V4(TUNNEL_NEXT_HOP4) } else { IpAddr::V6(TUNNEL_NEXT_HOP6) };
    // TUNNEL_NEXT_HOP6 is link-local, and so on the link of any interface.
    Route {
        dst,
        kind: RouteKind::Unicast { gateway: Some(tunnel_next_hop), oif: device, onlink: dst.is_ipv4() },
        metric: 0,
    }
}

fn last_resort(kind: RouteKind) -> BTreeSet<Route> {
    [EVERYTHING4, EVERYTHING6].map(|dst| Route { dst, kind, metric: METRIC_LAST }).into()
}

/// Routes everything to the tunnel next hop. Pods' networks are `throw` routes to the main table: source validation
/// looks up a pod's own address with the mark, and must find it at its veth.
fn request_table(networks: &Networks, device: u32) -> BTreeSet<Route> {
    let mut routes = last_resort(RouteKind::Unreachable);
    routes.insert(via_tunnel_next_hop(EVERYTHING4, device));
    routes.insert(via_tunnel_next_hop(EVERYTHING6, device));
    routes.extend(networks.pods.iter().map(|n| throw(*n)));
    routes
}

/// Routes to direct networks only. A quarantined pod gets an ICMP error, because a quarantine may last. Packets that
/// the flush guard blocks are dropped, so that the sender sends them again.
fn only_direct(networks: &Networks, last: RouteKind) -> BTreeSet<Route> {
    let mut routes = last_resort(last);
    routes.extend(networks.networks.iter().map(|n| throw(*n)));
    routes
}

/// As [`only_direct`], and to the other nodes' ends of the tunnel. The kernel looks up a tunnel packet's way with the mark
/// of the packet inside, and that of what nodes ask each other looks like a pod mark, as it has no egress ID.
fn flush_guard_table(view: &View) -> BTreeSet<Route> {
    let mut routes = only_direct(&view.networks, RouteKind::Blackhole);
    let ends = view.allocations.peers.values().map(|peer| peer.address);
    routes.extend(ends.filter(|end| !view.networks.is_direct(*end)).map(|end| throw(end.into())));
    routes
}

fn throw(dst: IpNetwork) -> Route {
    Route { dst, kind: RouteKind::Throw, metric: 0 }
}
