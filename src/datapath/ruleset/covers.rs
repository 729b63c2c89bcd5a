//! The sets of destinations that policies list, and the rules that look packets up in them.
//!
//! The sets are constant, and named after their content: another list is another set. The kernel then refuses to
//! remove an element from a set that a rule uses, also for `nft`. A removed element would open a hole in what the
//! policy covers, because a packet that is in no set passes.

use crate::api::Protocol;
use crate::model::AddressRange;
use crate::model::covers::{Covers, Lookups, Shape};
use crate::model::networks;
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::table::{Bytes, Data, DataType, Elements, Key, Set, SetKind, SetName};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// The kinds of sets.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Networks.
    Whole,
    /// Networks and protocols.
    Protocols,
    /// Networks, protocols and ports.
    Ports,
}

const KINDS: [Kind; 3] = [Kind::Whole, Kind::Protocols, Kind::Ports];

fn name(kind: Kind, at: usize, shape: &Shape) -> String {
    let kind = match kind {
        Kind::Whole => ["to4", "to6"][at],
        Kind::Protocols => ["protocols4", "protocols6"][at],
        Kind::Ports => ["ports4", "ports6"][at],
    };
    format!("{kind}-{}", shape.name)
}

/// The sets that a list has: kind, and index of the family.
fn sets_of(shape: &Shape) -> impl Iterator<Item = (Kind, usize)> {
    let of = |kind, at: usize| match kind {
        Kind::Whole => shape.whole[at],
        Kind::Protocols => shape.protocols[at],
        Kind::Ports => shape.ports[at],
    };
    [0, 1].into_iter().flat_map(|at| KINDS.map(|kind| (kind, at))).filter(move |(kind, at)| of(*kind, *at))
}

/// Adds a list's sets to `sets`. Sets that exist in `before` are reused.
pub(super) fn add_sets(covers: &Covers, before: Option<&BTreeMap<SetName, Set>>, sets: &mut BTreeMap<SetName, Set>) {
    let mut lookups = None;
    for (kind, at) in sets_of(covers.shape()) {
        let name = name(kind, at, covers.shape());
        if sets.contains_key(&*name) {
            continue;
        }
        let set = before.and_then(|before| before.get(&*name)).cloned();
        let set = set.unwrap_or_else(|| set_of(kind, at, lookups.get_or_insert_with(|| covers.lookups())));
        sets.insert(name.into(), set);
    }
}

fn set_of(kind: Kind, at: usize, lookups: &Lookups) -> Set {
    let (key, elements): (DataType, Elements) = match kind {
        Kind::Whole => {
            let all = lookups.whole[at].iter().flat_map(|range| bounds(*range));
            ([DataType::Ipv4, DataType::Ipv6][at], all.collect())
        }
        Kind::Protocols => {
            let all = lookups.protocols[at].iter();
            let all = all.map(|(range, p)| of_fields([range.first, range.last].map(|a| fields(a, *p, None))));
            ([DataType::Ipv4Protocol, DataType::Ipv6Protocol][at], all.collect())
        }
        Kind::Ports => {
            let all = lookups.ports[at].iter().map(|(range, p)| {
                let ends = [(range.first, p.first), (range.last, p.last)];
                of_fields(ends.map(|(address, port)| fields(address, p.protocol, Some(port))))
            });
            ([DataType::Ipv4ProtocolPort, DataType::Ipv6ProtocolPort][at], all.collect())
        }
    };
    let kind = SetKind::plain(key, None).of_ranges().constant();
    Set { kind, elements: Arc::new(elements) }
}

/// The two elements of a range: its first address, and the first address after it.
fn bounds(range: AddressRange) -> impl Iterator<Item = (Key, Data)> {
    let end = networks::next(range.last).map(|end| Key { bytes: end.into(), end: true });
    std::iter::once(range.first.into()).chain(end).map(|key| (key, Data::None))
}

/// One element for a range of several fields: the first and the last value.
fn of_fields([first, last]: [Bytes; 2]) -> (Key, Data) {
    (first.into(), Data::Value(last))
}

/// An address, a protocol and perhaps a port, each padded to whole registers of four bytes.
fn fields(address: IpAddr, protocol: Protocol, port: Option<u16>) -> Bytes {
    let mut all = Bytes::from(address).as_slice().to_vec();
    all.extend([protocol.number(), 0, 0, 0]);
    if let Some([high, low]) = port.map(u16::to_be_bytes) {
        all.extend([high, low, 0, 0]);
    }
    all.as_slice().into()
}

/// One look-up of a packet in what a policy covers.
pub(super) enum Lookup {
    /// No look-up: the policy covers everything.
    Everything,
    InSet(Kind, Family, String),
}

impl Lookup {
    /// The families of the packets that it finds.
    pub(super) fn families(&self) -> &[Family] {
        match self {
            Lookup::Everything => &Family::BOTH,
            Lookup::InSet(_, ip, _) => std::slice::from_ref(ip),
        }
    }

    /// Appends the condition that the packet is covered.
    pub(super) fn append_to(&self, rule: Rule) -> Rule {
        match self {
            Lookup::Everything => rule,
            Lookup::InSet(Kind::Whole, ip, set) => rule.daddr_in_set(*ip, set.clone()),
            Lookup::InSet(Kind::Protocols, ip, set) => rule.daddr_and_protocol_in_set(*ip, set.clone()),
            Lookup::InSet(Kind::Ports, ip, set) => rule.daddr_and_port_in_set(*ip, set.clone()),
        }
    }
}

/// All look-ups of a list. A packet that one of them finds is covered.
pub(super) fn lookups(covers: &Covers) -> Vec<Lookup> {
    if covers.is_empty() {
        return vec![Lookup::Everything];
    }
    let shape = covers.shape();
    sets_of(shape).map(|(kind, at)| Lookup::InSet(kind, Family::BOTH[at], name(kind, at, shape))).collect()
}
