//! The destinations that a policy lists, as set look-ups: networks covered whole, networks covered for a whole
//! protocol, and networks covered for some ports. A list takes one rule for each kind of look-up, whatever its
//! length.

use crate::api::Protocol;
use crate::model::AddressRange;
use crate::model::destination::{Destination, Ports};
use crate::model::networks::next;
use ring::digest::{Context, SHA256};
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::OnceLock;

/// How many prefixes a range of addresses can consist of.
const MAX_PREFIXES: usize = 2 * 128;

/// The destinations that a policy lists. An empty list covers everything.
#[derive(Clone, Debug, Default)]
pub struct Covers {
    listed: Box<[Destination]>,
    shape: OnceLock<Shape>,
}

/// A summary of [`Lookups`], which are as long as the list and are not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// A collision-resistant hash of the look-ups. Kernel sets are named after it, and tenants write the lists.
    pub name: Box<str>,
    /// Whether [`Lookups::whole`] has entries, for IPv4 and IPv6.
    pub whole: [bool; 2],
    /// Whether [`Lookups::protocols`] has entries.
    pub protocols: [bool; 2],
    /// Whether [`Lookups::ports`] has entries.
    pub ports: [bool; 2],
    /// How many entries the kernel makes of the look-ups. In a set of several fields it divides each range of a field
    /// into prefixes (`pipapo_expand`, net/netfilter/nft_set_pipapo.c).
    pub entries: usize,
}

/// The look-ups of a list, sorted and without overlaps. Each array has the entries of IPv4, then those of IPv6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    /// Every packet to these addresses is covered.
    pub whole: [Vec<AddressRange>; 2],
    /// Every packet of the protocol to these addresses is covered, also one that is too short to have ports.
    pub protocols: [Vec<(AddressRange, Protocol)>; 2],
    /// Packets of the protocol to these addresses and ports are covered.
    pub ports: [Vec<(AddressRange, Ports)>; 2],
}

impl Covers {
    /// Computes the look-ups.
    pub fn lookups(&self) -> Lookups {
        let mut classes = Classes { of: &self.listed, ports: Vec::new(), by_indices: HashMap::new() };
        let mut lookups = Lookups::default();
        for family in [0, 1] {
            for (range, class) in classes.pieces(family) {
                let Some(class) = class else {
                    lookups.whole[family].push(range);
                    continue;
                };
                for ports in &classes.ports[class] {
                    if (ports.first, ports.last) == (0, u16::MAX) {
                        lookups.protocols[family].push((range, ports.protocol));
                    } else {
                        lookups.ports[family].push((range, *ports));
                    }
                }
            }
        }
        lookups
    }

    /// The summary of the look-ups. It is computed once.
    pub fn shape(&self) -> &Shape {
        self.shape.get_or_init(|| {
            let all = self.lookups();
            let lengths = [0, 1].map(|at| [all.whole[at].len(), all.protocols[at].len(), all.ports[at].len()]);
            Shape {
                name: all.name(),
                whole: lengths.map(|of| of[0] > 0),
                protocols: lengths.map(|of| of[1] > 0),
                ports: lengths.map(|of| of[2] > 0),
                entries: all.entries(),
            }
        })
    }

    /// Whether packets to `address`, of the IP protocol `protocol` and to `port` (if they have ports), are covered.
    pub fn has(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> bool {
        self.listed.is_empty() || self.listed.iter().any(|d| d.has(address, protocol, port))
    }

    /// An upper bound of [`Shape::entries`] that is cheap to compute.
    pub fn entries_at_most(&self) -> usize {
        let networks = |d: &Destination| d.networks.iter().map(|n| 1 + n.except.len()).sum::<usize>();
        let ends = self.listed.iter().map(|d| 2 * (networks(d) + 1)).sum::<usize>();
        let ports = self.listed.iter().map(|d| d.ports.len()).sum::<usize>();
        if ports == 0 { ends } else { ends.saturating_mul(ports).saturating_mul(MAX_PREFIXES) }
    }
}

impl Lookups {
    fn entries(&self) -> usize {
        let protocols = self.protocols.iter().flatten().map(|(range, _)| prefixes_of(range));
        let ports = self.ports.iter().flatten().map(|(range, p)| {
            let ports = prefixes(u128::from(p.first), u128::from(p.last));
            prefixes_of(range).max(ports)
        });
        self.whole.iter().map(Vec::len).sum::<usize>() + protocols.chain(ports).sum::<usize>()
    }

    fn name(&self) -> Box<str> {
        let mut hash = Context::new(&SHA256);
        let add = |hash: &mut Context, range: &AddressRange| {
            for address in [range.first, range.last] {
                match address {
                    IpAddr::V4(a) => hash.update(&a.octets()),
                    IpAddr::V6(a) => hash.update(&a.octets()),
                }
            }
        };
        for family in [0, 1] {
            for length in [self.whole[family].len(), self.protocols[family].len(), self.ports[family].len()] {
                hash.update(&(length as u64).to_be_bytes());
            }
            self.whole[family].iter().for_each(|range| add(&mut hash, range));
            for (range, protocol) in &self.protocols[family] {
                add(&mut hash, range);
                hash.update(&[*protocol as u8]);
            }
            for (range, ports) in &self.ports[family] {
                add(&mut hash, range);
                hash.update(&[ports.protocol as u8]);
                hash.update(&[ports.first.to_be_bytes(), ports.last.to_be_bytes()].concat());
            }
        }
        // 128 bits suffice against a second preimage.
        hash.finish().as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()
    }
}

/// Groups addresses into classes: those of one class are covered by the same destinations, and so for the same ports.
struct Classes<'a> {
    of: &'a [Destination],
    ports: Vec<Vec<Ports>>,
    by_indices: HashMap<Box<[usize]>, Option<usize>>,
}

impl Classes<'_> {
    /// The ranges of a family with their classes, in order. Adjacent ranges of one class are merged.
    fn pieces(&mut self, family: usize) -> Vec<(AddressRange, Option<usize>)> {
        let mut out: Vec<(AddressRange, Option<usize>)> = Vec::new();
        for (range, indices) in pieces(self.of, family) {
            let class = self.class(&indices);
            match out.last_mut() {
                Some((last, of)) if *of == class && next(last.last) == Some(range.first) => last.last = range.last,
                _ => out.push((range, class)),
            }
        }
        out
    }

    /// The class of addresses that the destinations at these indices cover; `None` if every packet is covered.
    fn class(&mut self, indices: &[usize]) -> Option<usize> {
        if let Some(class) = self.by_indices.get(indices) {
            return *class;
        }
        let everything = indices.iter().any(|at| self.of[*at].ports.is_empty());
        let class = (!everything).then(|| {
            let ports = merged_ports(indices.iter().flat_map(|at| self.of[*at].ports.iter().copied()).collect());
            self.ports.iter().position(|same| *same == ports).unwrap_or_else(|| {
                self.ports.push(ports);
                self.ports.len() - 1
            })
        });
        self.by_indices.insert(indices.into(), class);
        class
    }
}

/// The ranges of a family that the same destinations cover, with the indices of these destinations, in order.
fn pieces(listed: &[Destination], family: usize) -> Vec<(AddressRange, Vec<usize>)> {
    // The points at which a destination begins (`true`) or has ended (`false`). A destination that reaches the last
    // address of the family has no end point.
    let mut edges: Vec<(IpAddr, usize, bool)> = Vec::new();
    for (index, destination) in listed.iter().enumerate() {
        for range in ranges(destination, family) {
            edges.push((range.first, index, true));
            edges.extend(next(range.last).map(|end| (end, index, false)));
        }
    }
    edges.sort_unstable();
    let (mut pieces, mut open, mut at) = (Vec::new(), BTreeMap::<usize, usize>::new(), 0);
    while let Some((first, ..)) = edges.get(at).copied() {
        while let Some((_, index, begins)) = edges.get(at).filter(|edge| edge.0 == first) {
            let count = open.entry(*index).or_default();
            *count = if *begins { *count + 1 } else { *count - 1 };
            if *count == 0 {
                open.remove(index);
            }
            at += 1;
        }
        if !open.is_empty() {
            let last = edges.get(at).map_or_else(|| last_of(family), |edge| before(edge.0));
            pieces.push((AddressRange { first, last }, open.keys().copied().collect()));
        }
    }
    pieces
}

/// The ranges of a family that a destination covers; they may overlap. At one address, an end sorts before a
/// beginning. A network contains its own exceptions, so no count falls below zero.
fn ranges(destination: &Destination, family: usize) -> Vec<AddressRange> {
    if destination.networks.is_empty() {
        return vec![AddressRange { first: first_of(family), last: last_of(family) }];
    }
    let of_family = destination.networks.iter().filter(|n| n.cidr.is_ipv4() == (family == 0));
    let less = |network: &crate::model::destination::Network| {
        let whole = AddressRange::from(&network.cidr);
        let mut except: Vec<AddressRange> = network.except.iter().map(AddressRange::from).collect();
        except.sort_unstable();
        let (mut out, mut from) = (Vec::new(), Some(whole.first));
        for hole in except {
            let Some(first) = from else { break };
            if first < hole.first {
                out.push(AddressRange { first, last: before(hole.first) });
            }
            from = next(hole.last).map_or_else(|| None, |after| Some(first.max(after)));
        }
        out.extend(from.filter(|first| *first <= whole.last).map(|first| AddressRange { first, last: whole.last }));
        out
    };
    of_family.flat_map(less).collect()
}

fn first_of(family: usize) -> IpAddr {
    if family == 0 { IpAddr::V4([0; 4].into()) } else { IpAddr::V6([0; 16].into()) }
}

fn last_of(family: usize) -> IpAddr {
    if family == 0 { IpAddr::V4([0xff; 4].into()) } else { IpAddr::V6([0xff; 16].into()) }
}

/// The preceding address. The caller does not pass the first address of a family.
fn before(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => IpAddr::V4(u32::from(a).wrapping_sub(1).into()),
        IpAddr::V6(a) => IpAddr::V6(u128::from(a).wrapping_sub(1).into()),
    }
}

fn prefixes_of(range: &AddressRange) -> usize {
    let number = |address| match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    };
    prefixes(number(range.first), number(range.last))
}

/// How many prefixes a range consists of.
fn prefixes(first: u128, last: u128) -> usize {
    let (mut count, mut at) = (0, first);
    loop {
        count += 1;
        let left = last - at;
        let fits = left.checked_add(1).map_or(128, u128::ilog2);
        let bits = at.trailing_zeros().min(fits);
        let after = if bits >= 128 { None } else { at.checked_add(1 << bits) };
        match after.filter(|after| *after <= last) {
            Some(after) => at = after,
            None => return count,
        }
    }
}

/// Sorts ports and merges those that overlap or are adjacent.
fn merged_ports(mut ports: Vec<Ports>) -> Vec<Ports> {
    ports.sort_unstable();
    let mut out: Vec<Ports> = Vec::new();
    for ports in ports {
        match out.last_mut() {
            Some(last) if last.protocol == ports.protocol && u32::from(ports.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(ports.last);
            }
            _ => out.push(ports),
        }
    }
    out
}

impl From<Vec<Destination>> for Covers {
    fn from(listed: Vec<Destination>) -> Self {
        Covers { listed: listed.into(), shape: OnceLock::new() }
    }
}

impl Deref for Covers {
    type Target = [Destination];

    fn deref(&self) -> &[Destination] {
        &self.listed
    }
}

impl PartialEq for Covers {
    fn eq(&self, other: &Self) -> bool {
        self.listed == other.listed
    }
}

impl Eq for Covers {}

impl Hash for Covers {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.listed.hash(state);
    }
}

#[cfg(test)]
mod tests;
