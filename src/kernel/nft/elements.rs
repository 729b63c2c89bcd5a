//! The elements of sets and maps.
//!
//! A gateway's node in a big cluster has a hundred thousand of them, most of some ten bytes: they are packed, and come
//! out one by one. A map of the standard library would take ten times the memory.

use std::sync::Arc;

/// The elements of one set, sorted by key. In a set of ranges, a key with `end` closes the range that the key before it
/// opens, and is not part of it.
///
/// As in the kernel, keys in one set are of one length, and so are values: what is shorter than the others is filled up
/// with zeros.
#[derive(Clone, Debug, Default)]
pub struct Elements {
    /// Bytes of a key and of a value.
    lengths: (u8, u8),
    /// One after another: key, whether it ends a range, value; in the place of a chain its number among `chains`.
    packed: Box<[u8]>,
    /// The chains that are jumped to.
    chains: Box<[Arc<str>]>,
}

/// Bytes of a chain's number.
const NUMBER: usize = size_of::<u32>();

impl Elements {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.packed.is_empty()
    }

    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = (Key, Data)> {
        let (key, value) = (usize::from(self.lengths.0), usize::from(self.lengths.1));
        self.packed.chunks_exact(key + 1 + value).map(move |element| {
            let (bytes, rest) = element.split_at(key);
            (Key { bytes: bytes.into(), end: rest[0] != 0 }, self.data(&rest[1..]))
        })
    }

    fn data(&self, value: &[u8]) -> Data {
        match <[u8; NUMBER]>::try_from(value) {
            Ok(number) if !self.chains.is_empty() => {
                Data::Jump(self.chains[u32::from_ne_bytes(number) as usize].clone())
            }
            _ if value.is_empty() => Data::None,
            _ => Data::Value(value.into()),
        }
    }

    /// Those that `other` does not have, or has with other data.
    pub fn missing_in(&self, other: &Elements) -> impl Iterator<Item = (Key, Data)> {
        let mut others = other.iter().peekable();
        self.iter().filter(move |(key, data)| {
            while others.next_if(|(other, _)| other < key).is_some() {}
            others.peek().is_none_or(|(other, with)| other != key || with != data)
        })
    }
}

impl PartialEq for Elements {
    fn eq(&self, other: &Self) -> bool {
        self.packed.len() == other.packed.len() && self.iter().eq(other.iter())
    }
}

impl Eq for Elements {}

impl FromIterator<(Key, Data)> for Elements {
    /// Of elements with the same key the last one counts.
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
        let (mut packed, mut chains) = (Vec::with_capacity(all.len() * usize::from(key + 1 + value)), Vec::new());
        for (Key { bytes, end }, data) in all {
            packed.extend_from_slice(&bytes.bytes[..usize::from(key)]);
            packed.push(u8::from(end));
            let data = match data {
                Data::None => Bytes::default(),
                Data::Value(bytes) => bytes,
                Data::Jump(chain) => {
                    chains.push(chain);
                    Bytes::from(chains.len() as u32 - 1)
                }
            };
            packed.extend_from_slice(&data.bytes[..usize::from(value)]);
        }
        Elements { lengths: (key, value), packed: packed.into(), chains: chains.into() }
    }
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The value, in the byte order of the wire for addresses, of the host for marks.
    pub bytes: Bytes,
    /// `NFT_SET_ELEM_INTERVAL_END`
    pub end: bool,
}

/// What a key maps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Nothing: a set.
    None,
    /// A value.
    Value(Bytes),
    /// `jump CHAIN`
    Jump(Arc<str>),
}

impl Data {
    /// How many bytes it takes in [`Elements`].
    fn len(&self) -> u8 {
        match self {
            Data::None => 0,
            Data::Value(bytes) => bytes.len,
            Data::Jump(_) => NUMBER as u8,
        }
    }
}

/// Up to twenty bytes, in place: a mark and an IPv6 address are the longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes {
    bytes: [u8; 20],
    len: u8,
}

impl Bytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl From<&[u8]> for Bytes {
    /// Longer input is cut: the kernel holds none of ours.
    fn from(from: &[u8]) -> Self {
        let len = from.len().min(20);
        let mut bytes = [0; 20];
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

    fn marks(of: &[(u32, u32)]) -> Elements {
        of.iter().map(|(key, value)| (Key::from(*key), Data::Value((*value).into()))).collect()
    }

    #[test]
    fn elements_come_out_as_they_went_in_sorted_and_once_each() {
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
        assert!(Elements::default().is_empty() && Elements::default().iter().next().is_none());
    }

    #[test]
    fn what_differs_is_missing_on_both_sides() {
        let (before, after) =
            (marks(&[(1, 10), (2, 20), (3, 30), (0x0100, 5)]), marks(&[(2, 20), (3, 31), (4, 40), (0x0100, 5)]));
        let missing = |a: &Elements, b: &Elements| -> Elements { a.missing_in(b).collect() };
        assert_eq!(missing(&before, &after), marks(&[(1, 10), (3, 30)]));
        assert_eq!(missing(&after, &before), marks(&[(3, 31), (4, 40)]));
        assert_eq!(missing(&before, &Elements::default()), before);
        assert!(missing(&after, &after).is_empty());
    }
}
