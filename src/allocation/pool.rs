//! The addresses of gateways, and which of them a gateway may give out.

use super::address_pair::{address, number};
use super::index::{GatewayIndex, ListIndex};
use crate::model::{AddressRange, Gateway};
use egret_nft::Family;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Addresses by family, in sorted ranges that do not overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool {
    v4: Ranges,
    v6: Ranges,
}

#[derive(Clone, Debug, Default)]
struct Ranges {
    /// First and last, inclusive.
    ranges: Vec<(u128, u128)>,
    /// The range, and the number in it, before which no address is free.
    cursor: (usize, u128),
}

impl Pool {
    fn family(&self, family: Family) -> &Ranges {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn family_mut(&mut self, family: Family) -> &mut Ranges {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Removes the addresses of another pool.
    pub(super) fn without(mut self, other: &Pool) -> Self {
        for family in Family::BOTH {
            let mut taken = other.family(family).ranges.iter().peekable();
            let mut left = Vec::new();
            for (first, last) in std::mem::take(&mut self.family_mut(family).ranges) {
                while taken.next_if(|(_, end)| *end < first).is_some() {}
                let mut next = Some(first);
                // A range of the other pool may overlap several of this one.
                for (from, to) in taken.clone().take_while(|(from, _)| *from <= last) {
                    let Some(first) = next else { break };
                    if first < *from {
                        left.push((first, from - 1));
                    }
                    next = to.checked_add(1).map(|after| after.max(first)).filter(|after| *after <= last);
                }
                left.extend(next.map(|first| (first, last)));
            }
            self.family_mut(family).ranges = left;
        }
        self
    }

    /// Whether it has any address of the family.
    pub(super) fn has(&self, family: Family) -> bool {
        !self.family(family).ranges.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        !Family::BOTH.into_iter().any(|family| self.has(family))
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        let ranges = &self.family(Family::of(&address)).ranges;
        let number = number(address);
        let after = ranges.partition_point(|(first, _)| *first <= number);
        after > 0 && number <= ranges[after - 1].1
    }

    /// How many addresses of the family it has. The count saturates at `u128::MAX`, one less than all of IPv6.
    pub(super) fn size(&self, family: Family) -> u128 {
        let size = |(first, last): &(u128, u128)| (last - first).saturating_add(1);
        self.family(family).ranges.iter().map(size).fold(0, u128::saturating_add)
    }

    /// The first free address of the family. An address that was not free is not tried again: within one computation
    /// no address becomes free.
    pub(super) fn first(&mut self, family: Family, free: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let Ranges { ranges, cursor } = self.family_mut(family);
        while let Some((first, last)) = ranges.get(cursor.0) {
            let mut number = cursor.1.max(*first);
            while number <= *last {
                cursor.1 = number;
                let address = address(family, number);
                if free(address) {
                    return Some(address);
                }
                match number.checked_add(1) {
                    Some(next) => number = next,
                    None => break,
                }
            }
            *cursor = (cursor.0 + 1, 0);
        }
        None
    }
}

impl<'a> FromIterator<&'a AddressRange> for Pool {
    fn from_iter<T: IntoIterator<Item = &'a AddressRange>>(ranges: T) -> Self {
        let mut pool = Pool::default();
        for range in ranges {
            let part = (number(range.first), number(range.last));
            pool.family_mut(Family::of(&range.first)).ranges.push(part);
        }
        for ranges in [&mut pool.v4.ranges, &mut pool.v6.ranges] {
            ranges.sort_unstable();
            // Ranges of one pool do not overlap. Those of several reservations may.
            ranges.dedup_by(|next, before| {
                let overlaps = next.0 <= before.1;
                if overlaps {
                    before.1 = before.1.max(next.1);
                }
                overlaps
            });
        }
        pool
    }
}

/// A part of a pool that an earlier gateway has too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) first: IpAddr,
    pub(super) last: IpAddr,
    /// The index of the gateway that keeps it.
    pub(super) with: GatewayIndex,
}

/// For each gateway, its pool without the addresses of the gateways before it, and the overlaps with these.
pub(super) fn usable<'a>(gateways: impl Iterator<Item = &'a Gateway>) -> Vec<(Pool, Vec<Overlap>)> {
    // The claimed parts: family and first number, then last number and gateway. They do not overlap.
    let mut claimed: BTreeMap<(Family, u128), (u128, GatewayIndex)> = BTreeMap::new();
    let mut all = Vec::new();
    for (index, gateway) in gateways.enumerate() {
        let (mut pool, mut overlaps) = (Pool::default(), Vec::new());
        for range in &gateway.pool {
            let family = Family::of(&range.first);
            let (mut next, last) = (Some(number(range.first)), number(range.last));
            let before = claimed.range(..(family, number(range.first))).next_back();
            let within = claimed.range((family, number(range.first))..=(family, last));
            for ((other_family, other_first), (other_last, with)) in before.into_iter().chain(within) {
                let Some(first) = next else { break };
                if *other_family != family || *other_last < first {
                    continue;
                }
                if first < *other_first {
                    pool.family_mut(family).ranges.push((first, other_first - 1));
                }
                let (from, to) = (first.max(*other_first), last.min(*other_last));
                overlaps.push(Overlap { first: address(family, from), last: address(family, to), with: *with });
                next = to.checked_add(1).filter(|n| *n <= last);
            }
            if let Some(first) = next {
                pool.family_mut(family).ranges.push((first, last));
            }
        }
        for family in Family::BOTH {
            for (first, last) in &pool.family(family).ranges {
                claimed.insert((family, *first), (*last, GatewayIndex::new(index)));
            }
        }
        all.push((pool, overlaps));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::EgressGatewaySpec;
    use crate::model::Metadata;

    fn gateway(addresses: &[&str]) -> Gateway {
        let addresses = addresses.iter().map(|a| a.to_string()).collect();
        Gateway::new(&EgressGatewaySpec { addresses, ..Default::default() }, Metadata::default()).unwrap()
    }

    fn all(mut pool: Pool, family: Family) -> Vec<String> {
        let taken = std::cell::RefCell::new(std::collections::HashSet::new());
        std::iter::from_fn(|| {
            let address = pool.first(family, |a| !taken.borrow().contains(&a))?;
            taken.borrow_mut().insert(address);
            Some(address.to_string())
        })
        .collect()
    }

    #[test]
    fn addresses_are_taken_in_order() {
        let pool: Pool = gateway(&["198.51.100.0/31", "192.0.2.1", "2001:db8::f-2001:db8::10"]).pool.iter().collect();
        assert_eq!(all(pool.clone(), Family::V4), ["192.0.2.1", "198.51.100.0", "198.51.100.1"]);
        assert_eq!(all(pool, Family::V6), ["2001:db8::f", "2001:db8::10"]);
    }

    #[test]
    fn the_last_address_of_a_family_can_be_taken() {
        let last =
            |family: Family| AddressRange { first: address(family, u128::MAX), last: address(family, u128::MAX) };
        let pool: Pool = Family::BOTH.map(last).iter().collect();
        assert_eq!(all(pool.clone(), Family::V4).len(), 1);
        assert_eq!(all(pool, Family::V6).len(), 1);
        let all = AddressRange { first: address(Family::V6, 0), last: address(Family::V6, u128::MAX) };
        let whole: Pool = [&all].into_iter().collect();
        assert_eq!(whole.size(Family::V6), u128::MAX);
    }

    #[test]
    fn without_removes_the_addresses_of_another_pool() {
        let pool = |addresses: &[&str]| -> Pool { gateway(addresses).pool.iter().collect() };
        let left = |of: &[&str], without: &[&str]| all(pool(of).without(&pool(without)), Family::V4);
        assert_eq!(left(&["192.0.2.1-192.0.2.4"], &["192.0.2.2-192.0.2.3"]), ["192.0.2.1", "192.0.2.4"]);
        assert_eq!(left(&["192.0.2.1", "192.0.2.3", "192.0.2.5"], &["192.0.2.0-192.0.2.4"]), ["192.0.2.5"]);
        assert_eq!(
            left(&["192.0.2.1-192.0.2.4"], &["192.0.2.1", "192.0.2.3", "2001:db8::"]),
            ["192.0.2.2", "192.0.2.4"]
        );
        assert_eq!(left(&["192.0.2.1-192.0.2.2"], &["192.0.2.2-192.0.2.9"]), ["192.0.2.1"]);
        assert!(left(&["192.0.2.1-192.0.2.2"], &["192.0.0.0/9"]).is_empty());
        assert_eq!(left(&["192.0.2.1-192.0.2.2"], &[]), ["192.0.2.1", "192.0.2.2"]);
    }

    #[test]
    fn addresses_of_an_earlier_gateway_are_not_usable() {
        let gateways = [
            gateway(&["192.0.2.4-192.0.2.5", "192.0.2.8"]),
            gateway(&["192.0.2.3-192.0.2.9", "2001:db8::1"]),
            gateway(&["192.0.2.0/30", "192.0.2.5"]),
        ];
        let mut usable = usable(gateways.iter());
        let (third, overlaps) = usable.pop().unwrap();
        assert_eq!(all(third, Family::V4), ["192.0.2.0", "192.0.2.1", "192.0.2.2"]);
        assert_eq!(overlaps.iter().map(|o| o.with.number()).collect::<Vec<_>>(), [1, 0]);
        let (second, overlaps) = usable.pop().unwrap();
        assert_eq!(all(second.clone(), Family::V4), ["192.0.2.3", "192.0.2.6", "192.0.2.7", "192.0.2.9"]);
        assert_eq!(all(second, Family::V6), ["2001:db8::1"]);
        assert_eq!(overlaps.len(), 2);
    }
}
