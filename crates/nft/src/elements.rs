//! The elements of sets and maps.
//!
//! A gateway node in a big cluster has a hundred thousand elements, most of about ten bytes. So they are packed, and
//! unpacked one at a time. A map of the standard library would need ten times the memory.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// The elements of one set, sorted by key. In a set of ranges, a key with `end` closes the range that the key before
/// it opens, and is not part of the range.
///
/// As in the kernel, all keys of a set have the same length, and so have all values. Shorter ones are padded with
/// zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    /// The lengths of a key and of a value, bytes.
    lengths: (u8, u8),
    /// The elements one after another: key, whether it ends a range, value.
    packed: Box<[u8]>,
    /// The target chains of a verdict map, or the objects of a map of objects, one for each element.
    names: Box<[Arc<str>]>,
    /// Whether the names are those of objects.
    are_objects: bool,
}

impl Elements {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.packed.is_empty()
    }

    /// All elements, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (Key, Data)> {
        self.range(0..self.len())
    }

    /// The elements that `other` does not have, or has with other data.
    pub fn missing_in(&self, other: &Elements) -> impl Iterator<Item = (Key, Data)> {
        let (mine, others) = self.unlike(other);
        let mut others = other.range(others).peekable();
        self.range(mine).filter(move |(key, data)| {
            while others.next_if(|(other, _)| other < key).is_some() {}
            others.peek().is_none_or(|(other, with)| other != key || with != data)
        })
    }

    /// For a set of ranges without values: the ranges that `other` does not have exactly so, each with both ends.
    /// Ends alone are not enough, because the kernel accepts no end inside an existing range.
    pub fn ranges_missing_in(&self, other: &Elements) -> impl Iterator<Item = (Key, Data)> {
        let others: BTreeSet<[Option<Key>; 2]> = other.ranges().into_iter().collect();
        let missing = self.ranges().into_iter().filter(move |range| !others.contains(range));
        missing.flatten().flatten().map(|key| (key, Data::None))
    }

    /// The start and the end of each range. The range that reaches to the last address has no end.
    fn ranges(&self) -> Vec<[Option<Key>; 2]> {
        let mut ranges: Vec<[Option<Key>; 2]> = Vec::new();
        for (key, _) in self.iter() {
            match ranges.last_mut() {
                Some([Some(first), last @ None]) if key.end && !first.end => *last = Some(key),
                _ => ranges.push([Some(key), None]),
            }
        }
        ranges
    }

    /// These elements and those of `more`, which replace elements with the same key.
    pub fn with(&self, more: impl IntoIterator<Item = (Key, Data)>) -> Elements {
        let more: Elements = more.into_iter().collect();
        if more.is_empty() {
            return self.clone();
        }
        if self.lengths != more.lengths {
            return self.iter().chain(more.iter()).collect();
        }
        let mut packed = Vec::with_capacity(self.packed.len() + more.packed.len());
        let mut names = Vec::with_capacity(self.names.len() + more.names.len());
        let mut append = |from: &Elements, range: Range<usize>| {
            packed.extend_from_slice(&from.packed[range.start * from.size()..range.end * from.size()]);
            if !from.names.is_empty() {
                names.extend_from_slice(&from.names[range]);
            }
        };
        let mut done = 0;
        for place in 0..more.len() {
            let key = more.sort_key(place);
            let before = done + partition_point(self.len() - done, |at| self.sort_key(done + at) < key);
            append(self, done..before);
            append(&more, place..place + 1);
            done = before + usize::from(before < self.len() && self.sort_key(before) == key);
        }
        append(self, done..self.len());
        let are_objects = more.are_objects;
        Elements { lengths: self.lengths, packed: packed.into(), names: names.into(), are_objects }
    }

    fn range(&self, places: Range<usize>) -> impl Iterator<Item = (Key, Data)> {
        let key = usize::from(self.lengths.0);
        places.map(move |place| {
            let (bytes, rest) = self.at(place).split_at(key);
            let data = match (self.names.get(place), &rest[1..]) {
                (Some(object), _) if self.are_objects => Data::Object(object.clone()),
                (Some(chain), _) => Data::Jump(chain.clone()),
                (None, []) => Data::None,
                (None, value) => Data::Value(value.into()),
            };
            (Key { bytes: bytes.into(), end: rest[0] != 0 }, data)
        })
    }

    fn len(&self) -> usize {
        self.packed.len() / self.size()
    }

    /// The length of a packed element, bytes.
    fn size(&self) -> usize {
        usize::from(self.lengths.0) + 1 + usize::from(self.lengths.1)
    }

    fn at(&self, place: usize) -> &[u8] {
        &self.packed[place * self.size()..(place + 1) * self.size()]
    }

    /// The bytes by which elements are sorted. They are comparable between sets with the same lengths.
    fn sort_key(&self, place: usize) -> &[u8] {
        &self.at(place)[..=usize::from(self.lengths.0)]
    }

    /// The parts of both that remain without the common elements at the start and at the end.
    fn unlike(&self, other: &Elements) -> (Range<usize>, Range<usize>) {
        let (mine, others) = (self.len(), other.len());
        if self.lengths != other.lengths {
            return (0..mine, 0..others);
        }
        let same = |a, b| self.at(a) == other.at(b) && self.names.get(a) == other.names.get(b);
        let start = (0..mine.min(others)).take_while(|at| same(*at, *at)).count();
        let end = (1..=mine.min(others) - start).take_while(|back| same(mine - back, others - back)).count();
        (start..mine - end, start..others - end)
    }
}

/// The first number of `0..len` for which `is_before` is false. `is_before` must be true for all numbers before it
/// and false for all after it.
fn partition_point(len: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (0, len);
    while from < to {
        let middle = from + (to - from) / 2;
        if is_before(middle) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    from
}

impl FromIterator<(Key, Data)> for Elements {
    /// If several elements have the same key, the last one counts.
    fn from_iter<T: IntoIterator<Item = (Key, Data)>>(elements: T) -> Self {
        let mut all: Vec<(Key, Data)> = elements.into_iter().collect();
        all.sort_by_key(|(key, _)| *key);
        all.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        let key = all.iter().map(|(key, _)| key.bytes.len).max().unwrap_or(0);
        let value = all.iter().map(|(_, data)| data.len()).max().unwrap_or(0);
        let are_objects = all.iter().any(|(_, data)| matches!(data, Data::Object(_)));
        let have_names = are_objects || all.iter().any(|(_, data)| matches!(data, Data::Jump(_)));
        let (mut packed, mut names) = (Vec::with_capacity(all.len() * usize::from(key + 1 + value)), Vec::new());
        for (Key { bytes, end }, data) in all {
            packed.extend_from_slice(&bytes.bytes[..usize::from(key)]);
            packed.push(u8::from(end));
            let (bytes, name) = match data {
                Data::None => (Bytes::default(), None),
                Data::Value(bytes) => (bytes, None),
                Data::Jump(name) | Data::Object(name) => (Bytes::default(), Some(name)),
            };
            packed.extend_from_slice(&bytes.bytes[..usize::from(value)]);
            if have_names {
                names.push(name.unwrap_or_default());
            }
        }
        Elements { lengths: (key, value), packed: packed.into(), names: names.into(), are_objects }
    }
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The value, in network byte order for addresses and in the host's byte order for marks.
    pub bytes: Bytes,
    /// `NFT_SET_ELEM_INTERVAL_END`
    pub end: bool,
}

/// The data of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// No data, in a set.
    None,
    /// A value. In a set of ranges of several fields it is the end of the range.
    Value(Bytes),
    /// `jump CHAIN`
    Jump(Arc<str>),
    /// An object of the table, in a map of objects.
    Object(Arc<str>),
}

impl Data {
    /// The length in [`Elements`], bytes.
    fn len(&self) -> u8 {
        match self {
            Data::Value(bytes) => bytes.len,
            Data::None | Data::Jump(_) | Data::Object(_) => 0,
        }
    }
}

/// Up to 24 bytes, stored in place. The longest keys have an IPv6 address, a protocol and a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes {
    bytes: [u8; 24],
    len: u8,
}

impl Bytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl From<&[u8]> for Bytes {
    /// Longer input is truncated. No key of this crate is longer.
    fn from(from: &[u8]) -> Self {
        let len = from.len().min(24);
        let mut bytes = [0; 24];
        bytes[..len].copy_from_slice(&from[..len]);
        Bytes { bytes, len: len as u8 }
    }
}

impl From<u32> for Bytes {
    fn from(mark: u32) -> Self {
        Bytes::from(mark.to_ne_bytes().as_slice())
    }
}

impl From<std::net::IpAddr> for Bytes {
    fn from(address: std::net::IpAddr) -> Self {
        match address {
            std::net::IpAddr::V4(a) => Bytes::from(a.octets().as_slice()),
            std::net::IpAddr::V6(a) => Bytes::from(a.octets().as_slice()),
        }
    }
}

impl<T: Into<Bytes>> From<T> for Key {
    fn from(value: T) -> Self {
        Key { bytes: value.into(), end: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    fn marks(of: &[(u32, u32)]) -> Elements {
        of.iter().map(|(key, value)| (Key::from(*key), Data::Value((*value).into()))).collect()
    }

    #[test]
    fn elements_are_sorted_and_unique() {
        let v6: std::net::IpAddr = "2001:db8::1".parse().unwrap();
        let set: Elements = [(Key::from(v6), Data::None), (Key { bytes: v6.into(), end: true }, Data::None)]
            .into_iter()
            .rev()
            .collect();
        let all: Vec<_> = set.iter().collect();
        assert_eq!(all, [(Key::from(v6), Data::None), (Key { bytes: v6.into(), end: true }, Data::None)]);

        let map = marks(&[(7, 70), (1, 10), (7, 71)]);
        assert_eq!(map, marks(&[(1, 10), (7, 71)]), "the last of two with one key counts");

        let jumps: Elements =
            [(Key::from(9), Data::Jump("b".into())), (Key::from(1), Data::Jump("a".into()))].into_iter().collect();
        let chains: Vec<_> = jumps.iter().map(|(_, data)| data).collect();
        assert_eq!(chains, [Data::Jump("a".into()), Data::Jump("b".into())]);

        let limits: Elements = [(Key::from(1), Data::Object("a".into()))].into_iter().collect();
        let more = limits.with([(Key::from(2), Data::Object("b".into()))]);
        let all: Vec<_> = more.iter().map(|(_, data)| data).collect();
        assert_eq!(all, [Data::Object("a".into()), Data::Object("b".into())]);
        assert!(Elements::default().is_empty() && Elements::default().iter().next().is_none());
    }

    #[test]
    fn differing_elements_are_missing_on_both_sides() {
        let (before, after) =
            (marks(&[(1, 10), (2, 20), (3, 30), (0x0100, 5)]), marks(&[(2, 20), (3, 31), (4, 40), (0x0100, 5)]));
        let missing = |a: &Elements, b: &Elements| -> Elements { a.missing_in(b).collect() };
        assert_eq!(missing(&before, &after), marks(&[(1, 10), (3, 30)]));
        assert_eq!(missing(&after, &before), marks(&[(3, 31), (4, 40)]));
        assert_eq!(missing(&before, &Elements::default()), before);
        assert!(missing(&after, &after).is_empty());
    }

    /// Ranges by their start and end. An end of 0 means that the range reaches to the last address.
    fn ranges(of: &[(u8, u8)]) -> Elements {
        let key = |at: u8, end| Key { end, ..Key::from([10, at].as_slice()) };
        let ends = of.iter().flat_map(|(from, to)| [Some(key(*from, false)), (*to > 0).then(|| key(*to, true))]);
        ends.flatten().map(|key| (key, Data::None)).collect()
    }

    #[test]
    fn a_range_is_missing_with_both_its_ends() {
        let missing =
            |a: &[(u8, u8)], b: &[(u8, u8)]| -> Elements { ranges(a).ranges_missing_in(&ranges(b)).collect() };
        let (whole, divided) = (&[(1, 5), (8, 0)], &[(1, 2), (3, 5), (8, 0)]);
        assert_eq!(missing(whole, divided), ranges(&[(1, 5)]));
        assert_eq!(missing(divided, whole), ranges(&[(1, 2), (3, 5)]));
        assert!(missing(whole, whole).is_empty());
        assert_eq!(missing(&[(8, 0)], &[(8, 9)]), ranges(&[(8, 0)]));
        assert_eq!(missing(whole, &[]), ranges(whole));
    }

    fn any_data(verdicts: bool) -> impl Strategy<Value = Data> {
        let value = (0u32..3).prop_map(|value| Data::Value(value.into()));
        let jump = (0u32..3).prop_map(|chain| Data::Jump(format!("chain-{chain}").into()));
        if verdicts { jump.boxed() } else { value.boxed() }
    }

    /// Elements of two sets with many keys in common.
    fn two_sets() -> impl Strategy<Value = [Vec<(u8, Data)>; 2]> {
        any::<bool>().prop_flat_map(|verdicts| {
            [vec((0u8..40, any_data(verdicts)), 0..40), vec((0u8..40, any_data(verdicts)), 0..6)]
        })
    }

    proptest! {
        #[test]
        fn adding_elements_equals_building_the_set_at_once([before, more] in two_sets()) {
            let element = |(key, data): &(u8, Data)| (Key::from([*key, 0, *key].as_slice()), data.clone());
            let set: Elements = before.iter().map(element).collect();
            let all: Elements = before.iter().chain(&more).map(element).collect();
            prop_assert_eq!(set.with(more.iter().map(element)), all);
        }

        #[test]
        fn the_difference_equals_that_of_standard_maps(
            (before, after) in (btree_map(0u32..40, 0u32..3, 0..40), btree_map(0u32..40, 0u32..3, 0..40))
        ) {
            let of = |map: &std::collections::BTreeMap<u32, u32>| marks(&map.iter().map(|(k, v)| (*k, *v)).collect::<Vec<_>>());
            let differing = after.iter().filter(|(key, value)| before.get(key) != Some(value));
            let differing = marks(&differing.map(|(k, v)| (*k, *v)).collect::<Vec<_>>());
            prop_assert_eq!(of(&after).missing_in(&of(&before)).collect::<Elements>(), differing);
        }
    }
}
