//! Pairs of addresses by family, and addresses as numbers.

use crate::api::AddressPair;
use egret_nft::Family;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address of this family in a pair.
pub(super) fn of_pair(family: Family, pair: &AddressPair) -> Option<IpAddr> {
    match family {
        Family::V4 => pair.ipv4.map(IpAddr::V4),
        Family::V6 => pair.ipv6.map(IpAddr::V6),
    }
}

/// The address with this number in the family.
pub(super) fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
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
    Family::BOTH.map(|family| of_pair(family, pair)).into_iter().flatten()
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
    addresses(a).any(|address| of_pair(Family::of(&address), b) == Some(address))
}

/// A pair in words: `192.0.2.50 and 2001:db8::50`.
pub(crate) fn in_words(pair: &AddressPair) -> String {
    addresses(pair).map(|a| a.to_string()).collect::<Vec<_>>().join(" and ")
}
