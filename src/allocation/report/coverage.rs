//! What some policies cover together, as far as one policy's rule alone covers another's.

use crate::model::destination::{Destination, Network, Ports, contains};
use crate::model::{Policy, PolicyKey};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use std::collections::{BTreeSet, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};

/// How many combinations of a network and ports a policy may list that is compared with others.
const MAX_COMBINATIONS: usize = 1_000;

/// What "all networks" means.
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

/// What policies cover that go before others.
#[derive(Default)]
pub(super) struct Coverage<'a> {
    /// A policy that covers everything.
    everything: Option<&'a PolicyKey>,
    /// Rules by network.
    rules: HashMap<IpNetwork, Vec<Rule<'a>>>,
    /// The prefix lengths that occur in `rules`.
    prefixes: BTreeSet<u8>,
}

/// Ports of a network, less some networks within it. No ports: all of all protocols.
struct Rule<'a> {
    except: &'a [IpNetwork],
    ports: Option<Ports>,
    policy: &'a PolicyKey,
}

impl<'a> Coverage<'a> {
    /// Adds what a policy covers.
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

    /// The policies that cover all that this one covers; `None` if some of it is left to it. A policy that covers
    /// nothing is not covered.
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

    /// A policy of which one rule covers this one.
    fn find(&self, cidr: IpNetwork, except: &[IpNetwork], ports: Option<Ports>) -> Option<&'a PolicyKey> {
        self.prefixes.range(..=cidr.prefix()).find_map(|prefix| {
            let wider = IpNetwork::new(cidr.ip(), *prefix).ok()?;
            let wider = IpNetwork::new(wider.network(), *prefix).ok()?;
            let rules = self.rules.get(&wider)?;
            let rule = rules.iter().find(|rule| {
                // What the wider rule leaves out must not be meant by this one either.
                let left_out = |e: &IpNetwork| contains(e, &cidr) || contains(&cidr, e);
                covers_ports(rule.ports, ports)
                    && rule.except.iter().filter(|e| left_out(e)).all(|e| except.iter().any(|own| contains(own, e)))
            })?;
            Some(rule.policy)
        })
    }
}

/// Each combination is looked at, for each group of pods, whenever anything changes: not what has more than some.
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

/// Calls `each` with all pairs of networks and ports that a policy covers, until it says `false`; returns whether it
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
