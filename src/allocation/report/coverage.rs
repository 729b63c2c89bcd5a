//! The destinations that policies cover together. A rule counts as covered only if a single rule of another policy
//! covers it.

use crate::model::destination::{Destination, Network, Ports, contains};
use crate::model::{Policy, PolicyKey};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use std::collections::{BTreeSet, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};

/// A policy with more combinations of a network and ports than this is not compared with others.
const MAX_COMBINATIONS: usize = 1_000;

/// The networks that an empty list stands for.
const EVERYWHERE: [IpNetwork; 2] = [
    match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
        Some(all) => IpNetwork::V4(all),
        None => panic!("0 is a prefix length"),
    },
    match Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0) {
        Some(all) => IpNetwork::V6(all),
        None => panic!("0 is a prefix length"),
    },
];

/// The destinations covered by the policies that decide before others.
#[derive(Default)]
pub(super) struct Coverage<'a> {
    /// A policy that covers everything.
    everything: Option<&'a PolicyKey>,
    /// The rules by network.
    rules: HashMap<IpNetwork, Vec<Rule<'a>>>,
    /// The prefix lengths that occur in `rules`.
    prefixes: BTreeSet<u8>,
}

/// A network without `except`, and its covered ports. `None`: all ports of all protocols.
struct Rule<'a> {
    except: &'a [IpNetwork],
    ports: Option<Ports>,
    policy: &'a PolicyKey,
}

impl<'a> Coverage<'a> {
    /// Adds the destinations of a policy.
    pub(super) fn add(&mut self, key: &'a PolicyKey, policy: &'a Policy) {
        if policy.covers_everything() {
            self.everything.get_or_insert(key);
        }
        if is_long(policy) {
            return;
        }
        for_each_rule(policy, |cidr, except, ports| {
            self.prefixes.insert(cidr.prefix());
            self.rules.entry(cidr).or_default().push(Rule { except, ports, policy: key });
            true
        });
    }

    /// The policies that cover all destinations of this one; `None` if some are left to it. A policy that covers
    /// nothing does not count as covered.
    pub(super) fn covers(&self, policy: &Policy) -> Option<BTreeSet<&'a PolicyKey>> {
        if let Some(key) = self.everything {
            return Some(BTreeSet::from([key]));
        }
        if is_long(policy) {
            return None;
        }
        let mut by = BTreeSet::new();
        let whole = for_each_rule(policy, |cidr, except, ports| match self.find(cidr, except, ports) {
            Some(key) => {
                by.insert(key);
                true
            }
            None => false,
        });
        (whole && !by.is_empty()).then_some(by)
    }

    /// A policy with a rule that covers this one.
    fn find(&self, cidr: IpNetwork, except: &[IpNetwork], ports: Option<Ports>) -> Option<&'a PolicyKey> {
        self.prefixes.range(..=cidr.prefix()).find_map(|prefix| {
            let wider = IpNetwork::new(cidr.ip(), *prefix).ok()?;
            let wider = IpNetwork::new(wider.network(), *prefix).ok()?;
            let rules = self.rules.get(&wider)?;
            let rule = rules.iter().find(|rule| {
                // An exception of the wider rule must be excepted here too.
                let left_out = |e: &IpNetwork| contains(e, &cidr) || contains(&cidr, e);
                covers_ports(rule.ports, ports)
                    && rule.except.iter().filter(|e| left_out(e)).all(|e| except.iter().any(|own| contains(own, e)))
            })?;
            Some(rule.policy)
        })
    }
}

/// Whether a policy is too long to be compared: each combination is examined for each group of pods at every change.
fn is_long(policy: &Policy) -> bool {
    let listed = policy.egress.iter().flat_map(|covers| covers.iter());
    listed.map(Destination::combinations).sum::<usize>() > MAX_COMBINATIONS
}

fn covers_ports(outer: Option<Ports>, inner: Option<Ports>) -> bool {
    match (outer, inner) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(o), Some(i)) => o.protocol == i.protocol && o.first <= i.first && i.last <= o.last,
    }
}

/// Calls `each` with all combinations of networks and ports of a policy until it returns `false`. Returns whether it
/// never did.
fn for_each_rule<'a>(
    policy: &'a Policy,
    mut each: impl FnMut(IpNetwork, &'a [IpNetwork], Option<Ports>) -> bool,
) -> bool {
    let mut with_ports = |ports: &[Ports], cidr: IpNetwork, except: &'a [IpNetwork]| {
        if ports.is_empty() { each(cidr, except, None) } else { ports.iter().all(|p| each(cidr, except, Some(*p))) }
    };
    let Some(destinations) = &policy.egress else {
        return EVERYWHERE.into_iter().all(|cidr| with_ports(&[], cidr, &[]));
    };
    destinations.iter().all(|destination| {
        if destination.networks.is_empty() {
            return EVERYWHERE.into_iter().all(|cidr| with_ports(&destination.ports, cidr, &[]));
        }
        let mut networks = destination.networks.iter();
        networks.all(|Network { cidr, except }| with_ports(&destination.ports, *cidr, except))
    })
}
