//! Sets and maps that follow from the view of the cluster.

use super::bandwidth::{self, Direction};
use super::{dscp, set, unless_same, value};
use crate::model::AddressRange;
use crate::model::marks::{EgressId, Marks};
use crate::model::networks;
use crate::node_plan::allocations::NodeAllocation;
use crate::node_plan::{NodePlan, View, addresses};
use egret_nft::Family;
use egret_nft::mac::Mac;
use egret_nft::table::{Bytes, Data, DataType, Elements, Key, Limit, Set, SetKind, Table};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// The sets that do not depend on this node's pods, computed once for each [`View`].
#[derive(Clone, Debug, Default)]
pub struct SharedSets {
    pub(super) sets: BTreeMap<&'static str, Set>,
    /// The DSCPs that egress IPs of this node have.
    pub(super) dscp: BTreeSet<u8>,
    /// The limits of their bandwidths.
    pub(super) limits: BTreeMap<Arc<str>, Limit>,
    beyond: Vec<(&'static str, Direction, BTreeMap<Key, EgressId>)>,
}

impl SharedSets {
    /// Whether there are limits of bandwidths.
    pub fn has_limits(&self) -> bool {
        !self.limits.is_empty()
    }

    /// The same without limits of bandwidths.
    #[must_use]
    pub fn without_limits(&self) -> Self {
        let is_of_limits = |name: &str| bandwidth::SETS.contains(&name);
        SharedSets {
            sets: self.sets.iter().filter(|(name, _)| !is_of_limits(name)).map(|(n, set)| (*n, set.clone())).collect(),
            dscp: self.dscp.clone(),
            limits: BTreeMap::new(),
            beyond: Vec::new(),
        }
    }

    /// The sets that count packets beyond bandwidths, with the allocation of each element.
    pub fn beyond_bandwidth(&self) -> impl Iterator<Item = (&'static str, Direction, &BTreeMap<Key, EgressId>)> {
        self.beyond.iter().map(|(set, direction, allocations)| (*set, *direction, allocations))
    }
}

/// The four places of four bits in a port. nf_tables compares a register with constants only (two registers: from
/// Linux 6.13 on), but it can look any registers up in a set. So a set of equal pairs tells whether two ports are
/// equal. Four bits at a time keep that set small.
pub(super) const PORT_BITS: [u16; 4] = [0xf000, 0x0f00, 0x00f0, 0x000f];

/// The peer index that this node gave to each tunnel MAC address.
pub type PeerIndexes = BTreeMap<Mac, u16>;

/// The sets that follow from the view. Those that are as in `before` share its elements.
pub fn shared_sets(view: &View, peers: &PeerIndexes, marks: Marks, before: &SharedSets) -> SharedSets {
    let mut sets = BTreeMap::new();
    let mut put = |name, kind: SetKind, elements: Elements| {
        sets.insert(name, Set { kind, elements: unless_same(elements, before.sets.get(name)) });
    };
    let allocations = &view.allocations;
    let members = || allocations.allocations.iter().filter(|(_, allocation)| allocation.is_member());
    let translating: Vec<(u16, &NodeAllocation)> =
        members().filter(|(_, allocation)| allocation.translates()).map(|(id, allocation)| (*id, allocation)).collect();
    put(
        set::RX,
        SetKind::plain(DataType::Mark, Some(DataType::Mark)).counted(),
        translating.iter().map(|(id, p)| (u32::from(*id).into(), value(marks.local(*id, p.uplink)))).collect(),
    );
    let known = peers.iter().filter(|(mac, _)| allocations.is_gateway && allocations.peers.contains_key(*mac));
    let known = known.map(|(mac, index)| (mac.as_slice(), marks.connection_of_peer(*index)));
    let peer = known.clone().map(|(mac, mark)| (Key::from(mac), value(mark))).collect();
    let back = known.map(|(mac, mark)| (mark.into(), Data::Value(mac.into()))).collect();
    put(set::PEER, SetKind::plain(DataType::Ether, Some(DataType::Mark)), peer);
    put(set::BACK, SetKind::plain(DataType::Mark, Some(DataType::Ether)), back);
    for (at, ip) in Family::BOTH.into_iter().enumerate() {
        let (address, pair) = types(ip);
        let of_family = |a: &&IpAddr| ip.has(a);
        let ways = || {
            let ways =
                translating.iter().flat_map(|(id, allocation)| addresses(allocation).map(|a| (u32::from(*id), a)));
            ways.filter(|(_, a)| of_family(&a))
        };
        let snat = ways().map(|(mark, a)| (mark.into(), Data::Value(a.into()))).collect();
        let pairs = ways().map(|(mark, a)| (with_mark(mark, a), Data::None)).collect();
        // Also egress IPs that other nodes hold now, so that the set has the address before its first packet arrives.
        // Addresses that Egret does not manage are excluded because they serve the node's own connections too. So are
        // addresses that this node cannot take because the host has them already.
        let egress = members()
            .filter(|(_, allocation)| allocation.is_managed() && (allocation.translates() || allocation.unassigned))
            .flat_map(|(_, allocation)| addresses(allocation));
        let egress = egress.filter(|a| of_family(&a)).map(|a| plain(&a)).collect();
        let services = translating.iter().filter(|(_, allocation)| allocation.service.is_some());
        let services = services.flat_map(|(_, allocation)| addresses(allocation));
        let services = services.filter(|a| of_family(&a)).map(|a| plain(&a)).collect();
        put(set::SERVICES[at], SetKind::plain(address, None), services);
        let ping = members()
            .filter(|(_, allocation)| allocation.answers_ping)
            .flat_map(|(_, allocation)| addresses(allocation));
        let ping = ping.filter(|a| of_family(&a)).map(|a| plain(&a)).collect();
        put(set::SNAT[at], SetKind::plain(DataType::Mark, Some(address)), snat);
        put(set::PAIRS[at], SetKind::plain(pair, None), pairs);
        put(set::EGRESS[at], SetKind::plain(address, None), egress);
        put(set::PING[at], SetKind::plain(address, None), ping);
        put(set::DIRECT[at], SetKind::plain(address, None).of_ranges(), ranges(&view.networks.direct, ip));
        put(set::POOLS[at], SetKind::plain(address, None).of_ranges(), ranges(&allocations.pools, ip));
        put(
            set::HOSTS[at],
            SetKind::plain(address, None),
            view.networks.hosts.iter().filter(of_family).map(plain).collect(),
        );
        let sources = view.tunnel_sources();
        put(set::TUNNEL[at], SetKind::plain(address, None), sources.iter().filter(of_family).map(plain).collect());
    }
    let of_dscp = translating
        .iter()
        .filter_map(|(id, allocation)| Some((u32::from(*id).into(), Data::Jump(dscp::chain_of(allocation.dscp?)))));
    let of_dscp: Elements = of_dscp.collect();
    if !of_dscp.is_empty() {
        put(set::DSCP, SetKind::plain(DataType::Mark, Some(DataType::Verdict)), of_dscp);
    }
    put(
        set::SAME_PORT,
        SetKind::plain(DataType::Ports, None),
        if allocations.is_gateway { same_port() } else { Elements::default() },
    );
    let bandwidth::Limits { limits, sets: of_bandwidth, beyond } = bandwidth::limits(&translating);
    of_bandwidth.into_iter().for_each(|(name, kind, elements)| put(name, kind, elements));
    let dscp = translating.iter().filter_map(|(_, allocation)| allocation.dscp).collect();
    SharedSets { sets, dscp, limits, beyond }
}

/// The sets that identify selected pods: by pod mark, by veth, and by address. `before` is the last plan with its
/// table. A pod's start waits for this, so only the new pods' elements are added where possible.
pub(super) fn of_pods(plan: &NodePlan, marks: Marks, before: Option<(&NodePlan, &Table)>) -> Vec<(&'static str, Set)> {
    let same_unfound = before.filter(|(last, _)| last.unfound == plan.unfound);
    let new = same_unfound.and_then(|(last, table)| Some((added(&last.pods, &plan.pods)?, table)));
    let (pods, unfound, table) = match new {
        Some((new, table)) => (new, None, Some(table)),
        None => (plan.pods.values().map(|pod| &**pod).collect(), Some(&plan.unfound), None),
    };
    let set = |name, key, data, elements: Vec<(Key, Data)>| {
        let kind = SetKind::plain(key, data);
        let elements = match table.map(|table| &table.sets[name].elements) {
            Some(before) if elements.is_empty() => before.clone(),
            Some(before) => Arc::new(before.with(elements)),
            None => Arc::new(elements.into_iter().collect()),
        };
        (name, Set { kind, elements })
    };
    let pod_marks =
        pods.iter().map(|pod| (marks.pod_mark(pod.pod_mark).into(), Data::Jump(pod.policy_chain.clone()))).collect();
    let veths = pods.iter().map(|pod| (pod.interface_index.into(), value(marks.pod_mark(pod.pod_mark)))).collect();
    let mut sets = vec![
        set(set::PODS, DataType::Mark, Some(DataType::Verdict), pod_marks),
        set(set::VETHS, DataType::Interface, Some(DataType::Mark), veths),
    ];
    for (at, ip) in Family::BOTH.into_iter().enumerate() {
        let (address, marked) = types(ip);
        let addresses = pods.iter().flat_map(|pod| pod.addresses.iter().map(|a| (pod.pod_mark, a)));
        let addresses = addresses.filter(|(_, a)| ip.has(a));
        let own =
            addresses.clone().map(|(pod_mark, a)| (with_mark(marks.pod_mark(pod_mark), *a), Data::None)).collect();
        let unfound = unfound.into_iter().flatten().filter(|a| ip.has(a));
        let selected = addresses.map(|(_, a)| a).chain(unfound).map(plain).collect();
        sets.push(set(set::OWN[at], marked, None, own));
        sets.push(set(set::SELECTED[at], address, None, selected));
    }
    sets
}

/// The values that `now` has in addition, if everything of `before` is unchanged in it.
fn added<'a, K: Ord, V: Eq>(before: &BTreeMap<K, Arc<V>>, now: &'a BTreeMap<K, Arc<V>>) -> Option<Vec<&'a V>> {
    let (mut last, mut new) = (before.iter().peekable(), Vec::new());
    for (key, value) in now {
        let same = |(k, v): &(&K, &Arc<V>)| *k == key && *v == value;
        if last.next_if(same).is_none() {
            new.push(&**value);
        }
    }
    last.next().is_none().then_some(new)
}

/// The types of an address, and of a mark with an address.
fn types(ip: Family) -> (DataType, DataType) {
    match ip {
        Family::V4 => (DataType::Ipv4, DataType::MarkIpv4),
        Family::V6 => (DataType::Ipv6, DataType::MarkIpv6),
    }
}

/// The key of a mark followed by an address.
fn with_mark(mark: u32, address: IpAddr) -> Key {
    let (mut both, address) = ([0; 20], Bytes::from(address));
    let length = 4 + address.as_slice().len();
    both[..4].copy_from_slice(&mark.to_ne_bytes());
    both[4..length].copy_from_slice(address.as_slice());
    Key::from(&both[..length])
}

fn plain(address: &IpAddr) -> (Key, Data) {
    (Key::from(*address), Data::None)
}

/// The ranges of one family, as the elements of an interval set. They are sorted and do not touch each other.
fn ranges(all: &[AddressRange], ip: Family) -> Elements {
    let elements = all.iter().filter(|range| ip.has(&range.first)).flat_map(|range| {
        let end = networks::next(range.last).map(|end| Key { bytes: end.into(), end: true });
        std::iter::once(range.first.into()).chain(end).map(|key| (key, Data::None))
    });
    elements.collect()
}

/// Pairs of equal values: all values of four bits, in each of the four places, each padded to four bytes.
fn same_port() -> Elements {
    let bits = PORT_BITS.iter().flat_map(|mask| (0..16).map(move |bits: u16| mask & (bits * 0x1111)));
    let twice = bits.map(|bits| {
        let [high, low] = bits.to_be_bytes();
        (Key::from([high, low, 0, 0].repeat(2).as_slice()), Data::None)
    });
    twice.collect()
}
