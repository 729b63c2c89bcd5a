use super::*;
use crate::model::destination::Network;
use ipnetwork::IpNetwork;
use proptest::collection::vec;
use proptest::prelude::*;

fn covers(listed: Vec<(Vec<Network>, Vec<Ports>)>) -> Covers {
    let destination =
        |(networks, ports): (Vec<Network>, Vec<Ports>)| Destination { networks: networks.into(), ports: ports.into() };
    listed.into_iter().map(destination).collect::<Vec<_>>().into()
}

fn network(cidr: &str, except: &[&str]) -> Network {
    let parse = |text: &&str| text.parse::<IpNetwork>().unwrap();
    Network { cidr: parse(&cidr), except: except.iter().map(parse).collect() }
}

fn tcp(first: u16, last: u16) -> Ports {
    Ports { protocol: Protocol::Tcp, first, last }
}

fn found(lookups: &Lookups, address: IpAddr, protocol: Protocol, port: u16) -> bool {
    let family = usize::from(address.is_ipv6());
    let by_port = |p: &Ports| p.protocol == protocol && (p.first..=p.last).contains(&port);
    lookups.whole[family].iter().any(|range| range.contains(address))
        || lookups.ports[family].iter().any(|(range, ports)| range.contains(address) && by_port(ports))
        || lookups.protocols[family].iter().any(|(range, of)| range.contains(address) && *of == protocol)
}

fn listed(covers: &Covers, address: IpAddr, protocol: Protocol, port: u16) -> bool {
    let ports = |d: &Destination| {
        d.ports.is_empty() || d.ports.iter().any(|p| p.protocol == protocol && (p.first..=p.last).contains(&port))
    };
    covers.iter().any(|d| d.has_address(address) && ports(d))
}

#[test]
fn entries_are_the_combinations_that_are_left_when_neighbours_are_joined() {
    let networks = |width: usize| (0..100).map(|n| network(&format!("198.51.{}.0/24", width * n), &[])).collect();
    let ports = (0..100).map(|n| tcp(n * 10, n * 10)).collect::<Vec<_>>();
    let entries = |networks, ports| covers(vec![(networks, ports)]).shape().entries;
    assert_eq!(entries(networks(2), ports.clone()), 10_000);
    // 64, 32 and 4 neighbours.
    assert_eq!(entries(networks(1), ports), 100 * 3);
    assert_eq!(entries(networks(2), vec![]), 100);
    // A network without its first address consists of 64 networks.
    assert_eq!(entries(vec![network("2001:db8::/64", &["2001:db8::/128"])], vec![tcp(1, 1)]), 64);
    assert_eq!(entries(vec![network("192.0.2.0/24", &[])], vec![tcp(1, 65534)]), 30);
    assert_eq!([prefixes(0, u128::MAX), prefixes(1, u128::MAX), prefixes(7, 7)], [1, 128, 1]);
}

#[test]
fn exceptions_are_holes_and_adjacent_ranges_are_joined() {
    let all = covers(vec![(
        vec![
            network("192.0.2.0/24", &["192.0.2.99/32", "192.0.2.96/28", "192.0.2.255/32"]),
            network("192.0.2.0/28", &[]),
            network("192.0.3.0/24", &[]),
            network("255.255.255.0/24", &["255.255.255.0/32"]),
        ],
        vec![],
    )]);
    let ranges: Vec<_> = all.lookups().whole[0].iter().map(|r| format!("{}-{}", r.first, r.last)).collect();
    assert_eq!(
        ranges,
        ["192.0.2.0-192.0.2.95", "192.0.2.112-192.0.2.254", "192.0.3.0-192.0.3.255", "255.255.255.1-255.255.255.255"]
    );
    let last = covers(vec![(vec![network("ff00::/8", &["ffff::/16"])], vec![])]);
    assert_eq!(last.lookups().whole[1][0].last, "fffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse::<IpAddr>().unwrap());
}

#[test]
fn every_port_of_a_protocol_is_found_without_looking_at_the_port() {
    let all = covers(vec![(vec![], vec![tcp(0, 100), tcp(101, u16::MAX)])]);
    let lookups = all.lookups();
    assert!(lookups.ports.iter().all(Vec::is_empty));
    assert_eq!(lookups.protocols.map(|of| of.len()), [1, 1]);
    assert_eq!((all.shape().protocols, all.shape().ports), ([true; 2], [false; 2]));
}

#[test]
fn lists_that_cover_the_same_have_one_name_and_others_have_others() {
    let one = covers(vec![(vec![network("192.0.2.0/25", &[]), network("192.0.2.128/25", &[])], vec![])]);
    let same = covers(vec![(vec![network("192.0.2.0/24", &[])], vec![])]);
    let other = covers(vec![(vec![network("192.0.2.0/24", &[])], vec![tcp(1, 1)])]);
    assert_eq!(one.shape(), same.shape());
    assert_eq!(one.shape().entries, 1);
    assert_ne!(one.shape().name, other.shape().name);
}

fn any_network() -> impl Strategy<Value = Network> {
    // All within a network of 16 addresses of either family, so that they overlap.
    let cidr = (any::<bool>(), 0u8..16, 0u8..=4).prop_map(|(v4, at, bits)| small(v4, at, bits));
    (cidr, vec((0u8..16, 0u8..=4), 0..3)).prop_map(|(cidr, except)| {
        let prefix = cidr.prefix() - if cidr.is_ipv4() { 28 } else { 124 };
        let at = last_byte(cidr.network());
        let inside = |(n, bits): &(u8, u8)| small(cidr.is_ipv4(), at | (n & (0xf >> prefix)), prefix.max(*bits));
        Network { cidr, except: except.iter().map(inside).collect() }
    })
}

fn last_byte(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(a) => a.octets()[3] & 0xf,
        IpAddr::V6(a) => a.octets()[15] & 0xf,
    }
}

fn small(v4: bool, at: u8, bits: u8) -> IpNetwork {
    let net = IpNetwork::new(address(v4, at), bits + if v4 { 28 } else { 124 }).unwrap();
    IpNetwork::new(net.network(), net.prefix()).unwrap()
}

/// The last addresses of all, which have no address after them.
fn address(v4: bool, at: u8) -> IpAddr {
    if v4 { IpAddr::from([255, 255, 255, 0xf0 | at]) } else { IpAddr::V6((u128::MAX - 15 + u128::from(at)).into()) }
}

fn any_ports() -> impl Strategy<Value = Ports> {
    let port = prop_oneof![Just(0u16), 1u16..5, Just(u16::MAX)];
    (any::<bool>(), port.clone(), port).prop_map(|(tcp, a, b)| Ports {
        protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
        first: a.min(b),
        last: a.max(b),
    })
}

proptest! {
    #[test]
    fn lookups_cover_exactly_the_listed_destinations(of in vec((vec(any_network(), 0..4), vec(any_ports(), 0..3)), 0..5)) {
        let all = covers(of);
        let lookups = all.lookups();
        for v4 in [true, false] {
            for address in (0..16).map(|at| address(v4, at)).chain([first_of(usize::from(!v4))]) {
                for (protocol, port) in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                    .into_iter()
                    .flat_map(|p| [0, 1, 2, 3, 4, 5, u16::MAX].map(|port| (p, port)))
                {
                    prop_assert_eq!(
                        found(&lookups, address, protocol, port),
                        listed(&all, address, protocol, port),
                        "{} {} {}", address, protocol, port
                    );
                }
            }
        }
        prop_assert!(all.shape().entries <= all.entries_at_most());
    }
}
