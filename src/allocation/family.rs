//! The two address families, and pairs of addresses by family.

use crate::api::AddressPair;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub(super) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The address of this family in a pair.
    pub(super) fn of_pair(self, pair: &AddressPair) -> Option<IpAddr> {
        match self {
            Family::V4 => pair.ipv4.map(IpAddr::V4),
            Family::V6 => pair.ipv6.map(IpAddr::V6),
        }
    }

    /// The address with this number in the family.
    pub(super) fn address(self, number: u128) -> IpAddr {
        match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// An address as a number, in the order of its family.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => a.to_bits().into(),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// A pair's addresses, IPv4 first.
pub(super) fn addresses(pair: &AddressPair) -> impl Iterator<Item = IpAddr> + use<> {
    [Family::V4.of_pair(pair), Family::V6.of_pair(pair)].into_iter().flatten()
}

/// A pair of these addresses. Of several of one family, the first one is used.
pub(super) fn pair(addresses: impl IntoIterator<Item = IpAddr>) -> AddressPair {
    let mut pair = AddressPair::default();
    for address in addresses {
        match address {
            IpAddr::V4(a) => pair.ipv4 = pair.ipv4.or(Some(a)),
            IpAddr::V6(a) => pair.ipv6 = pair.ipv6.or(Some(a)),
        }
    }
    pair
}

/// Whether two pairs have an address in common.
pub(super) fn overlap(a: &AddressPair, b: &AddressPair) -> bool {
    addresses(a).any(|address| Family::of(address).of_pair(b) == Some(address))
}

/// A pair in words: `192.0.2.50 and 2001:db8::50`.
pub(crate) fn in_words(pair: &AddressPair) -> String {
    addresses(pair).map(|a| a.to_string()).collect::<Vec<_>>().join(" and ")
}
