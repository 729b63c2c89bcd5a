//! Covered destinations, from lists of networks and exceptions.

use crate::api::{EgressPeer, EgressPort, EgressRule, IpBlock, MAX_EXCEPTIONS};
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// How many networks a rule can have, and how many rules a policy can have (`crate::api::rules`).
const MAX_ITEMS: usize = 100;

/// The field `egress` of a policy.
#[derive(Clone, Debug, PartialEq)]
pub enum Covered {
    /// Everything outside the cluster: the field is absent.
    Everything,
    /// These rules.
    Rules(Vec<EgressRule>),
    /// No destination at all, because the exceptions contain all networks.
    Nothing,
    /// More networks than a policy can list, and their number.
    TooMany(usize),
}

/// The destinations in `networks` and not in `exceptions`, by these ports. No networks: everything outside the cluster.
/// No ports: all protocols.
pub fn covered(networks: &[IpNetwork], exceptions: &[IpNetwork], ports: &[EgressPort]) -> Covered {
    let everywhere = [everything_of(false), everything_of(true)];
    let all = everywhere.iter().all(|network| networks.contains(network)) || networks.is_empty();
    if all && exceptions.is_empty() {
        return match ports {
            [] => Covered::Everything,
            ports => Covered::Rules(vec![EgressRule { to: Vec::new(), ports: ports.to_vec() }]),
        };
    }
    let networks = if networks.is_empty() { &everywhere[..] } else { networks };
    let mut blocks = Vec::new();
    for network in outermost(networks) {
        blocks.extend(without(network, exceptions));
    }
    match blocks.len() {
        0 => Covered::Nothing,
        count if count > MAX_ITEMS * MAX_ITEMS => Covered::TooMany(count),
        _ => {
            let to = |ip_block: &IpBlock| EgressPeer { ip_block: ip_block.clone() };
            let rule = |part: &[IpBlock]| EgressRule { to: part.iter().map(to).collect(), ports: ports.to_vec() };
            Covered::Rules(blocks.chunks(MAX_ITEMS).map(rule).collect())
        }
    }
}

/// All addresses of a family.
pub fn everything_of(ipv6: bool) -> IpNetwork {
    let any = if ipv6 { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) };
    // It does not fail: the prefix length 0 is valid in both families.
    IpNetwork::new(any, 0).unwrap_or_else(|_| IpNetwork::from(any))
}

/// Whether `inner` is `outer` or within it.
pub fn contains(outer: &IpNetwork, inner: &IpNetwork) -> bool {
    outer.is_ipv4() == inner.is_ipv4() && outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

/// The networks that are in no other one, in their order, each once.
fn outermost(networks: &[IpNetwork]) -> Vec<IpNetwork> {
    let mut kept: Vec<IpNetwork> = Vec::new();
    for network in networks {
        if !networks.iter().any(|other| other != network && contains(other, network)) && !kept.contains(network) {
            kept.push(*network);
        }
    }
    kept
}

/// A network without exceptions: one block, or several where there are more exceptions than a block can have.
fn without(network: IpNetwork, exceptions: &[IpNetwork]) -> Vec<IpBlock> {
    if exceptions.iter().any(|exception| contains(exception, &network)) {
        return Vec::new();
    }
    let inside: Vec<IpNetwork> = exceptions.iter().copied().filter(|e| contains(&network, e)).collect();
    let inside = outermost(&inside);
    if inside.len() <= MAX_EXCEPTIONS {
        let except = inside.iter().map(ToString::to_string).collect();
        return vec![IpBlock { cidr: network.to_string(), except }];
    }
    // It has exceptions, so it is larger than one address and has two halves.
    halves(&network).into_iter().flat_map(|half| without(half, &inside)).collect()
}

/// The two halves of a network; none if it is a single address.
fn halves(network: &IpNetwork) -> Vec<IpNetwork> {
    let prefix = network.prefix() + 1;
    let upper = match network {
        IpNetwork::V4(n) if prefix <= 32 => IpAddr::from((u32::from(n.network()) | (1 << (32 - prefix))).to_be_bytes()),
        IpNetwork::V6(n) if prefix <= 128 => {
            IpAddr::from((u128::from(n.network()) | (1 << (128 - prefix))).to_be_bytes())
        }
        _ => return Vec::new(),
    };
    [network.network(), upper].into_iter().filter_map(|first| IpNetwork::new(first, prefix).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn blocks(covered: &Covered) -> Vec<(String, Vec<String>)> {
        let Covered::Rules(rules) = covered else { panic!("{covered:?}") };
        let block = |peer: &EgressPeer| (peer.ip_block.cidr.clone(), peer.ip_block.except.clone());
        rules.iter().flat_map(|rule| rule.to.iter().map(block)).collect()
    }

    #[test]
    fn no_destinations_mean_everything() {
        assert_eq!(covered(&[], &[], &[]), Covered::Everything);
        assert_eq!(covered(&networks(&["0.0.0.0/0", "::/0"]), &[], &[]), Covered::Everything);
        assert_eq!(blocks(&covered(&networks(&["0.0.0.0/0"]), &[], &[])), [("0.0.0.0/0".to_owned(), vec![])]);
    }

    #[test]
    fn exceptions_are_in_the_networks_that_contain_them() {
        let to = networks(&["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32", "192.0.2.0/24"]);
        let except = networks(&["10.2.0.0/16", "10.2.3.0/24", "2001:db8:1::/48", "192.0.0.0/16", "172.16.0.0/12"]);
        let found = blocks(&covered(&to, &except, &[]));
        let of = |cidr: &str, except: &[&str]| (cidr.to_owned(), except.iter().map(|e| (*e).to_owned()).collect());
        assert_eq!(found, [of("10.0.0.0/8", &["10.2.0.0/16"]), of("2001:db8::/32", &["2001:db8:1::/48"])]);
        assert_eq!(covered(&networks(&["192.0.2.0/24"]), &except, &[]), Covered::Nothing);
    }

    #[test]
    fn a_network_with_many_exceptions_becomes_several() {
        let except: Vec<IpNetwork> = (0..60).map(|i| format!("10.{i}.7.0/24").parse().unwrap()).collect();
        let found = blocks(&covered(&networks(&["0.0.0.0/0"]), &except, &[]));
        assert!(found.iter().all(|(_, except)| except.len() <= MAX_EXCEPTIONS), "{found:?}");
        let all: Vec<IpNetwork> = found.iter().map(|(cidr, _)| cidr.parse().unwrap()).collect();
        // They are all of IPv4, once, and all exceptions are there.
        assert_eq!(all.iter().map(|n| 1u64 << (32 - n.prefix())).sum::<u64>(), 1 << 32);
        assert!(all.iter().enumerate().all(|(i, n)| !all.iter().skip(i + 1).any(|m| contains(n, m) || contains(m, n))));
        assert_eq!(found.iter().map(|(_, except)| except.len()).sum::<usize>(), 60);
    }
}
