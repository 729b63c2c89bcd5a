//! How many source ports of an egress IP are in use towards one destination.
//!
//! Two connections of an egress IP to the same address, port and protocol need different source ports. When all are in
//! use, the kernel drops the first packets of further connections.

use crate::api::Protocol;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

/// From this share of the ports in use on, in percent, a budget counts as nearly exhausted; below the second one, no
/// longer.
const NEARLY: u32 = 80;
const NO_LONGER: u32 = 70;
/// How many budgets are shown.
pub(super) const SHOWN: usize = 10;
/// Budgets that are counted at once, some 1 MB.
const CAPACITY: usize = 16_384;

/// The source ports among which the kernel chooses for a connection whose own port another connection has.
///
/// Egret's rule gives no range (`NF_NAT_RANGE_PROTO_SPECIFIED`). Without one, `nf_nat_l4proto_unique_tuple`
/// (net/netfilter/nf_nat_core.c) replaces a port below 512 by one of 1 to 511, one below 1024 by one of 600 to 1023, and
/// any other by one of 1024 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum PortRange {
    /// 1 to 511.
    Low,
    /// 600 to 1023.
    Privileged,
    /// 1024 to 65535.
    High,
}

impl PortRange {
    /// The range that a port is taken from. A connection may keep one of 512 to 599, which are in no range.
    fn of(port: u16) -> Option<Self> {
        [PortRange::Low, PortRange::Privileged, PortRange::High].into_iter().find(|range| range.ports().contains(&port))
    }

    fn ports(self) -> RangeInclusive<u16> {
        match self {
            PortRange::Low => 1..=511,
            PortRange::Privileged => 600..=1023,
            PortRange::High => 1024..=65535,
        }
    }

    /// The number of ports.
    pub(super) fn size(self) -> u32 {
        u32::from(*self.ports().end()) - u32::from(*self.ports().start()) + 1
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ports().start(), self.ports().end())
    }
}

/// What connections share the ports of a range with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Budget {
    pub(super) egress_ip: IpAddr,
    pub(super) server: SocketAddr,
    pub(super) protocol: u8,
    pub(super) range: PortRange,
}

impl Budget {
    /// The budget of a connection from this address and port; `None` if its protocol has no ports.
    pub(super) fn of(source: SocketAddr, server: SocketAddr, protocol: u8) -> Option<Self> {
        protocol_of(protocol)?;
        Some(Budget { egress_ip: source.ip(), server, protocol, range: PortRange::of(source.port())? })
    }

    /// TCP, UDP or SCTP.
    pub(super) fn protocol(&self) -> Protocol {
        protocol_of(self.protocol).unwrap_or_default()
    }
}

fn protocol_of(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| protocol.number() == number)
}

/// Counts the ports in use by budget, in memory that does not grow with the number of connections.
///
/// If there are more budgets than places, all counts are lowered by one instead of a new one being stored (Misra and
/// Gries, "Finding repeated elements", 1982). Of n connections, a count is then at most n / 16,384 too low: 61 of a
/// million.
#[derive(Debug)]
pub(super) struct Counts {
    counts: HashMap<Budget, u32>,
    capacity: usize,
}

/// A budget, and how many of its ports are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) budget: Budget,
    pub(super) used: u32,
}

impl Usage {
    /// The share in use, from 0 to 1.
    pub(super) fn share(&self) -> f64 {
        f64::from(self.used) / f64::from(self.budget.range.size())
    }

    fn is_at_least(&self, percent: u32) -> bool {
        self.used * 100 >= self.budget.range.size() * percent
    }
}

impl Counts {
    pub(super) fn new() -> Self {
        Counts { counts: HashMap::new(), capacity: CAPACITY }
    }

    /// Counts a connection. Each has a port of its own.
    pub(super) fn add(&mut self, budget: Budget) {
        if let Some(count) = self.counts.get_mut(&budget) {
            *count += 1;
        } else if self.counts.len() < self.capacity {
            self.counts.insert(budget, 1);
        } else {
            self.counts.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }
    }

    /// All budgets, the fullest first.
    pub(super) fn by_share(&self) -> Vec<Usage> {
        let mut all: Vec<Usage> =
            self.counts.iter().map(|(budget, used)| Usage { budget: *budget, used: *used }).collect();
        all.sort_unstable_by(|a, b| b.share().total_cmp(&a.share()).then(a.budget.cmp(&b.budget)));
        all
    }
}

/// The budgets that are nearly exhausted after a count; `before` are those after the last one. Those that were remain
/// first if there are more than are shown.
pub(super) fn nearly_exhausted(by_share: &[Usage], before: &BTreeSet<Budget>) -> BTreeSet<Budget> {
    let was = |usage: &&Usage| before.contains(&usage.budget) && usage.is_at_least(NO_LONGER);
    let is_new = |usage: &&Usage| !before.contains(&usage.budget) && usage.is_at_least(NEARLY);
    let all = by_share.iter().filter(was).chain(by_share.iter().filter(is_new));
    all.take(SHOWN).map(|usage| usage.budget).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn budget(port: u16, server: u16) -> Option<Budget> {
        let source = SocketAddr::new([192, 0, 2, 50].into(), port);
        Budget::of(source, SocketAddr::new([203, 0, 113, 7].into(), server), 6)
    }

    fn counts(of: &[(Budget, u32)]) -> Vec<Usage> {
        let mut counts = Counts::new();
        of.iter().for_each(|(budget, n)| (0..*n).for_each(|_| counts.add(*budget)));
        counts.by_share()
    }

    #[test]
    fn the_ranges_are_those_of_the_kernel() {
        let range = |port| budget(port, 443).map(|budget| (budget.range.to_string(), budget.range.size()));
        for (ports, text, size) in
            [([1, 511], "1-511", 511), ([600, 1023], "600-1023", 424), ([1024, 65535], "1024-65535", 64_512)]
        {
            assert_eq!(ports.map(range), [Some((text.to_owned(), size)), Some((text.to_owned(), size))]);
        }
        assert_eq!([0, 512, 599].map(range), [None, None, None]);
        let icmp = Budget::of("192.0.2.50:1".parse().unwrap(), "203.0.113.7:1".parse().unwrap(), 1);
        assert_eq!(icmp, None, "it has no ports");
    }

    #[test]
    fn a_budget_counts_from_eighty_percent_until_it_is_below_seventy() {
        let (low, other) = (budget(1, 443).unwrap(), budget(1, 80).unwrap());
        let mut before = BTreeSet::new();
        let mut step = |used: u32| {
            before = nearly_exhausted(&counts(&[(low, used), (other, 300)]), &before);
            before.contains(&low)
        };
        assert_eq!([408, 409, 358, 357, 408, 511].map(&mut step), [false, true, true, false, false, true]);
        assert!(!step(0), "all connections have ended");
        assert!(!before.contains(&other));
    }

    #[test]
    fn ten_are_shown_and_they_stay() {
        let of = |server: u16| (budget(1, server).unwrap(), 450);
        let first: Vec<_> = (11..=20).map(of).collect();
        let before = nearly_exhausted(&counts(&first), &BTreeSet::new());
        assert_eq!(before.len(), SHOWN);
        let more: Vec<_> = (1..=20).map(of).collect();
        assert_eq!(nearly_exhausted(&counts(&more), &before), before);
        assert_eq!(counts(&[of(1), (budget(1, 2).unwrap(), 451)])[0].used, 451, "the fullest is first");
    }

    proptest! {
        #[test]
        fn a_count_is_too_low_by_a_bounded_number_and_never_too_high(
            servers in proptest::collection::vec(0..40u16, 0..400), capacity in 1..20usize,
        ) {
            let mut counts = Counts { capacity, ..Counts::new() };
            servers.iter().for_each(|server| counts.add(budget(2000, *server).unwrap()));
            prop_assert!(counts.counts.len() <= capacity);
            let bound = servers.len() / (capacity + 1);
            for server in 0..40 {
                let real = servers.iter().filter(|s| **s == server).count();
                let found = counts.counts.get(&budget(2000, server).unwrap()).map_or(0, |n| *n as usize);
                prop_assert!(found <= real && real - found <= bound, "{found} of {real}, bound {bound}");
            }
        }
    }
}
