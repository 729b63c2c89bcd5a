//! Destinations inside the cluster: their traffic goes direct, never through a gateway.

use crate::model::{AddressRange, Cluster};
use ipnetwork::IpNetwork;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The destinations that no policy covers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// Networks of pods, and those that the user lists: replies to pods are routed to them. Merged into as few
    /// networks as possible.
    pub pods: Vec<IpNetwork>,
    /// Whether another source than the pods of this node tells the networks of pods.
    pub pods_are_known: bool,
    /// Direct ranges: networks of pods and Services, link-local, multicast and reserved ones, those that the user
    /// lists. Sorted and merged.
    pub direct: Vec<AddressRange>,
    /// Single direct addresses: those of nodes, Services and API servers.
    pub hosts: BTreeSet<IpAddr>,
    /// All direct destinations, as few networks as possible.
    pub networks: Vec<IpNetwork>,
    /// For users: the direct networks, each with its origin. Single addresses are not listed.
    pub origins: Vec<(IpNetwork, Box<str>)>,
}

/// Networks that are always direct: link-local, multicast, and addresses that no host has.
fn always_direct() -> [IpNetwork; 4] {
    let v4 = |a, b, p| net(IpAddr::V4(Ipv4Addr::new(a, b, 0, 0)), p);
    let v6 = |a, p| net(IpAddr::V6(Ipv6Addr::new(a, 0, 0, 0, 0, 0, 0, 0)), p);
    // RFC 3927, RFC 5771 and RFC 1112 (224/4 multicast, 240/4 reserved and broadcast), RFC 4291.
    [v4(169, 254, 16), v4(224, 0, 3), v6(0xfe80, 10), v6(0xff00, 8)]
}

fn net(address: IpAddr, prefix: u8) -> IpNetwork {
    // It does not fail: the prefixes are constants, or the length of the family.
    IpNetwork::new(address, prefix).unwrap_or_else(|_| IpNetwork::from(address))
}

impl Networks {
    /// Computes the networks from a snapshot, the networks that the user lists, and the addresses of pods on this
    /// node: a pod may have an address outside of its node's `podCIDRs`.
    pub fn new(cluster: &Cluster, extra: &[IpNetwork], local_pods: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut pods: BTreeSet<IpNetwork> = cluster.nodes.values().flat_map(|n| n.pod_cidrs.iter().copied()).collect();
        let origins = origins(cluster, &pods, extra);
        // The user may have to list networks of pods that no object in the cluster lists.
        pods.extend(cluster.inside.pods.keys().chain(extra));
        let pods_are_known = !pods.is_empty();
        // A binary search: there are hundreds of pods and thousands of networks.
        let known = merged(pods.iter().map(AddressRange::from).collect());
        let is_known =
            |a: &IpAddr| known[..known.partition_point(|r| r.first <= *a)].last().is_some_and(|r| r.contains(*a));
        pods.extend(local_pods.into_iter().filter(|a| !is_known(a)).map(IpNetwork::from));
        let nodes = cluster.nodes.values().flat_map(|n| n.addresses.iter().copied());
        let services = cluster.services.values().flat_map(|s| s.cluster_ips.iter().copied());
        let hosts: BTreeSet<IpAddr> = nodes.chain(services).chain(cluster.api_servers()).collect();
        let services = cluster.inside.services.keys();
        let direct = merged(pods.iter().chain(services).chain(&always_direct()).map(AddressRange::from).collect());
        let one = |a: &IpAddr| AddressRange { first: *a, last: *a };
        let networks = merged(direct.iter().copied().chain(hosts.iter().map(one)).collect());
        Networks {
            pods: as_networks(&merged(pods.iter().map(AddressRange::from).collect())),
            pods_are_known,
            direct,
            hosts,
            networks: as_networks(&networks),
            origins,
        }
    }

    /// Whether `address` belongs to a network of pods.
    pub fn is_of_pods(&self, address: IpAddr) -> bool {
        self.pods.iter().any(|network| network.contains(address))
    }

    /// Whether `address` is direct.
    pub fn is_direct(&self, address: IpAddr) -> bool {
        self.hosts.contains(&address) || self.direct.iter().any(|r| r.contains(address))
    }
}

/// The direct networks with their origins. Adjacent networks of nodes' pods are merged.
fn origins(cluster: &Cluster, pods: &BTreeSet<IpNetwork>, extra: &[IpNetwork]) -> Vec<(IpNetwork, Box<str>)> {
    let of_nodes = as_networks(&merged(pods.iter().map(AddressRange::from).collect())).into_iter();
    let mut all: Vec<(IpNetwork, Box<str>)> = of_nodes.map(|n| (n, "spec.podCIDRs of Nodes".into())).collect();
    let inside = cluster.inside.pods.iter().chain(&cluster.inside.services);
    all.extend(inside.map(|(network, from)| (*network, (&**from).into())));
    all.extend(extra.iter().map(|network| (*network, "--direct".into())));
    all
}

/// Splits ranges that are not adjacent into as few networks as possible.
fn as_networks(ranges: &[AddressRange]) -> Vec<IpNetwork> {
    let mut networks = Vec::new();
    for range in ranges {
        let mut first = range.first;
        loop {
            let network = largest(first, range.last);
            networks.push(network);
            match next(AddressRange::from(&network).last) {
                Some(after) if after <= range.last => first = after,
                _ => break,
            }
        }
    }
    networks
}

/// The largest network that begins at `first` and does not exceed `last`.
fn largest(first: IpAddr, last: IpAddr) -> IpNetwork {
    let bits = if first.is_ipv4() { 32 } else { 128 };
    let fits = |n: &IpNetwork| n.network() == first && AddressRange::from(n).last <= last;
    // A single address always fits.
    (0..bits).map(|prefix| net(first, prefix)).find(fits).unwrap_or_else(|| net(first, bits))
}

/// Merges ranges that overlap or are adjacent.
pub(crate) fn merged(mut ranges: Vec<AddressRange>) -> Vec<AddressRange> {
    ranges.sort();
    let mut out: Vec<AddressRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last)
                if last.first.is_ipv4() == range.first.is_ipv4()
                    && (range.first <= last.last || next(last.last) == Some(range.first)) =>
            {
                last.last = last.last.max(range.last);
            }
            _ => out.push(range),
        }
    }
    out
}

/// The next address; `None` after the last one of the family.
pub fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoints, Node, ObjectKey};
    use proptest::prelude::*;
    use std::sync::Arc;

    fn cluster(cidrs: &[&str]) -> Cluster {
        let mut cluster = Cluster::default();
        for (i, cidr) in cidrs.iter().enumerate() {
            let node = Node { pod_cidrs: [cidr.parse().unwrap()].into(), ..Node::default() };
            cluster.nodes.insert(format!("n{i}").into(), Arc::new(node));
        }
        cluster
    }

    #[test]
    fn neighbouring_pod_networks_become_one_range() {
        let networks = Networks::new(&cluster(&["10.244.0.0/24", "10.244.1.0/24", "10.244.3.0/24"]), &[], []);
        let v4: Vec<String> =
            networks.direct.iter().filter(|r| r.first.is_ipv4()).map(|r| format!("{}-{}", r.first, r.last)).collect();
        assert_eq!(
            v4,
            [
                "10.244.0.0-10.244.1.255",
                "10.244.3.0-10.244.3.255",
                "169.254.0.0-169.254.255.255",
                "224.0.0.0-255.255.255.255"
            ]
        );
    }

    #[test]
    fn networks_that_the_cluster_lists_are_direct_and_have_an_origin() {
        let mut cluster = cluster(&["10.244.0.0/24", "10.244.1.0/24"]);
        let inside = |text: &str| (text.parse().unwrap(), "somebody".into());
        cluster.inside.pods = [inside("10.10.0.0/16")].into();
        cluster.inside.services = [inside("10.96.0.0/16")].into();
        let networks = Networks::new(&cluster, &["192.168.0.0/16".parse().unwrap()], []);
        for address in ["10.10.3.4", "10.96.0.1", "192.168.7.7", "10.244.1.1"] {
            assert!(networks.is_direct(address.parse().unwrap()), "{address}");
        }
        assert!(networks.pods.contains(&"10.10.0.0/16".parse().unwrap()));
        assert!(!networks.pods.contains(&"10.96.0.0/16".parse().unwrap()));
        let origins: Vec<String> = networks.origins.iter().map(|(network, from)| format!("{network} {from}")).collect();
        assert_eq!(
            origins,
            [
                "10.244.0.0/23 spec.podCIDRs of Nodes",
                "10.10.0.0/16 somebody",
                "10.96.0.0/16 somebody",
                "192.168.0.0/16 --direct"
            ]
        );
    }

    #[test]
    fn an_api_server_is_direct_though_it_is_no_node() {
        let mut cluster = cluster(&["10.244.0.0/24"]);
        for (service, address) in [("kubernetes", "203.0.113.6"), ("database", "203.0.113.7")] {
            let service = ObjectKey::new("default", service);
            let addresses = [address.parse().unwrap()].into();
            let endpoints = Endpoints { service: service.clone(), addresses, ports: Box::default() };
            cluster.endpoints.insert(service, Arc::new(endpoints));
        }
        let networks = Networks::new(&cluster, &[], []);
        assert!(networks.is_direct("203.0.113.6".parse().unwrap()));
        assert!(!networks.is_direct("203.0.113.7".parse().unwrap()));
    }

    #[test]
    fn the_whole_of_a_family_is_one_network() {
        for all in ["0.0.0.0/0", "::/0"] {
            let all: IpNetwork = all.parse().unwrap();
            assert_eq!(as_networks(&[AddressRange::from(&all)]), [all]);
        }
    }

    #[test]
    fn a_local_pod_in_a_known_network_adds_nothing() {
        let known = cluster(&["10.244.1.0/24", "10.244.0.0/24", "10.244.3.0/24", "fd00:244::/64"]);
        for pod in ["10.244.0.0", "10.244.1.255", "10.244.3.7", "fd00:244::9"] {
            let networks = Networks::new(&known, &[], [pod.parse().unwrap()]);
            assert_eq!(networks.pods, Networks::new(&known, &[], []).pods, "{pod}");
        }
        for pod in ["10.243.255.255", "10.244.2.0", "10.244.4.0", "fd00:244:0:1::"] {
            let networks = Networks::new(&known, &[], [pod.parse().unwrap()]);
            assert!(networks.pods.contains(&IpNetwork::from(pod.parse::<IpAddr>().unwrap())), "{pod}");
        }
    }

    #[test]
    fn a_local_pod_outside_the_known_networks_is_direct_and_gets_its_replies() {
        let pod: IpAddr = "172.20.1.9".parse().unwrap();
        let networks = Networks::new(&cluster(&["10.244.0.0/24"]), &[], [pod]);
        assert!(networks.is_direct(pod));
        assert!(networks.pods.contains(&"172.20.1.9/32".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn merging_keeps_exactly_the_addresses(ranges in prop::collection::vec((0u32..200, 0u32..20), 0..20), probe in 0u32..240) {
            let ranges: Vec<AddressRange> = ranges
                .into_iter()
                .map(|(a, n)| AddressRange { first: IpAddr::V4(a.into()), last: IpAddr::V4((a + n).into()) })
                .collect();
            let probe = IpAddr::V4(probe.into());
            let merged = merged(ranges.clone());
            prop_assert_eq!(ranges.iter().any(|r| r.contains(probe)), merged.iter().any(|r| r.contains(probe)));
            prop_assert!(merged.windows(2).all(|w| next(w[0].last).is_some_and(|n| n < w[1].first)));
            let networks = as_networks(&merged);
            prop_assert_eq!(merged.iter().any(|r| r.contains(probe)), networks.iter().any(|n| n.contains(probe)));
            for pair in networks.windows(2) {
                let sum = net(pair[0].network(), pair[0].prefix().saturating_sub(1));
                let halves = pair[0].prefix() == pair[1].prefix() && AddressRange::from(&sum).last == AddressRange::from(&pair[1]).last;
                prop_assert!(!(halves && sum.network() == pair[0].network()), "{} and {} are one", pair[0], pair[1]);
            }
        }
    }
}
