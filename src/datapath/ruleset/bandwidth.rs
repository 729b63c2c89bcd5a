//! The bandwidth of this node's egress IPs: a named limit for each direction, which one rule finds in a map. Packets
//! beyond it are dropped. Without a limit of a direction there is no chain for it.
//!
//! What pods send is found by the mark of their allocation, when it leaves. What they receive is found by the egress
//! IP, before translation is undone, and passes here packet by packet, whatever the chain `prerouting` does with it.

use super::{base, counter, set};
use crate::datapath::names::DEVICE_GROUP;
use crate::model::bandwidth::BitRate;
use crate::model::marks::{EgressId, Marks};
use crate::node_plan::addresses;
use crate::node_plan::allocations::NodeAllocation;
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, Data, DataType, Elements, Key, Limit, SetKind, hook};
use std::collections::BTreeMap;
use std::sync::Arc;

/// After connection tracking, which tells Egret's connections from the node's own (an egress IP may be the node's
/// address), and before translation is undone.
const INGRESS: i32 = -150;
/// After the chain that writes DSCPs.
const EGRESS: i32 = 302;
/// What the bucket holds in addition to a second's bytes: the longest packet (`IP_MAX_MTU`). Packets that were received
/// together may come as one of this length (GRO).
const BURST: u32 = 65_536;

/// The sets and maps of limits.
pub(super) const SETS: [&str; 6] = [
    set::LIMIT_EGRESS,
    set::BEYOND_EGRESS,
    set::LIMIT_INGRESS[0],
    set::LIMIT_INGRESS[1],
    set::BEYOND_INGRESS[0],
    set::BEYOND_INGRESS[1],
];

/// The direction of packets, as seen from the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Pods send them.
    Egress,
    /// Pods receive them.
    Ingress,
}

/// The limits, and the maps that lead to them.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// The limits by name.
    pub(super) limits: BTreeMap<Arc<str>, Limit>,
    /// The sets and maps, with their kinds.
    pub(super) sets: Vec<(&'static str, SetKind, Elements)>,
    /// The sets that count the packets beyond the limits, with the allocation of each element.
    pub(super) beyond: Vec<(&'static str, Direction, BTreeMap<Key, EgressId>)>,
}

/// The limits of these allocations.
pub(super) fn limits(allocations: &[(EgressId, &NodeAllocation)]) -> Limits {
    let mut out = Limits::default();
    let sent = allocations.iter().filter_map(|(id, allocation)| Some((*id, allocation.bandwidth.egress?)));
    let sent: Vec<_> = sent.map(|(id, rate)| (u32::from(id).into(), id, out.limit("egress", id, rate))).collect();
    out.put([set::LIMIT_EGRESS, set::BEYOND_EGRESS], Direction::Egress, DataType::Mark, sent);
    for (at, ip) in Family::BOTH.into_iter().enumerate() {
        let key = if at == 0 { DataType::Ipv4 } else { DataType::Ipv6 };
        let mut received = Vec::new();
        for (id, allocation) in allocations {
            if let Some(rate) = allocation.bandwidth.ingress {
                let of_family = addresses(allocation).filter(|address| ip.has(address));
                received.extend(of_family.map(|address| (address.into(), *id, out.limit("ingress", *id, rate))));
            }
        }
        out.put([set::LIMIT_INGRESS[at], set::BEYOND_INGRESS[at]], Direction::Ingress, key, received);
    }
    out
}

impl Limits {
    /// Adds the limit of an allocation, and returns its name. The kernel cannot change a limit, so the name has the
    /// number. Both families of an egress IP have the same limit.
    fn limit(&mut self, direction: &str, id: EgressId, rate: BitRate) -> Arc<str> {
        let limit = Limit { rate: rate.bytes(), burst: BURST };
        let name: Arc<str> = format!("{direction}-{id}-{}", limit.rate).into();
        self.limits.insert(name.clone(), limit);
        name
    }

    /// Adds a map of limits, and the set that counts what is beyond them. A map without elements does not exist.
    fn put(
        &mut self,
        [map, beyond]: [&'static str; 2],
        direction: Direction,
        key: DataType,
        limits: Vec<(Key, EgressId, Arc<str>)>,
    ) {
        if limits.is_empty() {
            return;
        }
        let counted = limits.iter().map(|(key, _, _)| (*key, Data::None)).collect();
        self.sets.push((beyond, SetKind::plain(key, None).counted(), counted));
        self.beyond.push((beyond, direction, limits.iter().map(|(key, id, _)| (*key, *id)).collect()));
        let limits = limits.into_iter().map(|(key, _, name)| (key, Data::Object(name))).collect();
        self.sets.push((map, SetKind::plain(key, Some(DataType::Limit)), limits));
    }
}

/// The chains of the directions and families that have limits. `has` tells whether there is a map.
pub(super) fn chains(marks: Marks, from_vrf: bool, has: impl Fn(&str) -> bool) -> Vec<(&'static str, Chain)> {
    let of_egret = || Rule::new().ct_mark(marks.connection_mask(), marks.connection(0));
    let dropped = || Rule::new().counter(counter::BANDWIDTH).drop();
    let mut chains = Vec::new();
    if has(set::LIMIT_EGRESS) {
        let leaving = of_egret().oif_group_not(DEVICE_GROUP);
        let beyond = leaving.beyond_limit_of_mark(marks.egress_id_mask(), set::LIMIT_EGRESS);
        let counted = Rule::new().mark_in_set(marks.egress_id_mask(), set::BEYOND_EGRESS);
        let limit = Chain::new(base("filter", hook::POSTROUTING, EGRESS), vec![beyond.goto("beyond-egress")]);
        chains.extend([("limit-egress", limit), ("beyond-egress", Chain::new(None, vec![counted, dropped()]))]);
    }
    let families = || Family::BOTH.into_iter().enumerate().filter(|(at, _)| has(set::LIMIT_INGRESS[*at]));
    if families().next().is_some() {
        let beyond = |(at, ip): (usize, Family)| of_egret().beyond_limit_of_daddr(ip, set::LIMIT_INGRESS[at]);
        let counted = families().map(|(at, ip)| Rule::new().daddr_in_set(ip, set::BEYOND_INGRESS[at]));
        let limit = families().map(beyond).map(|rule| rule.goto("beyond-ingress"));
        // The packet was counted when it passed the hook for the first time.
        let again = from_vrf.then(|| Rule::new().from_vrf().accept());
        let limit = Chain::new(base("filter", hook::PREROUTING, INGRESS), again.into_iter().chain(limit).collect());
        let beyond = Chain::new(None, counted.chain([dropped()]).collect());
        chains.extend([("limit-ingress", limit), ("beyond-ingress", beyond)]);
    }
    chains
}
