//! Egress IPs and uplinks against the kernel, as `ip` shows them. Needs root.

use crate::namespace::host::{address, host, index, interface, ours};
use crate::namespace::{in_namespace, ip, ip_json};
use egret::datapath::addresses;
use egret::datapath::names::{ADDRESS_METRIC, PROTOCOL};
use egret::datapath::route_socket::{Change, RouteSocket};
use egret::datapath::tunnel;
use egret::datapath::uplink::Uplinks;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The addresses of an interface with their prefixes.
fn shown(interface: &str) -> Vec<String> {
    let all = ip_json(&format!("address show dev {interface} scope global"));
    let hosts = ip_json(&format!("address show dev {interface} scope host"));
    let mut found: Vec<String> = all
        .iter()
        .chain(&hosts)
        .filter_map(|l| l["addr_info"].as_array())
        .flatten()
        .filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"])))
        .collect();
    found.sort();
    found
}

/// Gives one of Egret's addresses an unlimited preferred lifetime. iproute2 would lose Egret's protocol number.
async fn preferred(socket: &RouteSocket, address: IpAddr, ifindex: u32) {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = 128;
    message.header.index = ifindex;
    message.attributes =
        vec![AddressAttribute::Local(address), AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL))];
    let message = RouteNetlinkMessage::NewAddress(message);
    socket.apply(vec![Change { message, flags: 0x100, done_already: &[], about: "prefer".into() }]).await.unwrap();
    assert!(!ip("-6 address show dev eth0 to 2001:db8::50").contains("deprecated"));
}

#[test]
fn egress_ips_are_added_and_removed_and_other_addresses_stay() {
    in_namespace(|| async {
        let socket = host();
        interface("eth1");
        tunnel::ensure(&socket, &ours()).await.unwrap();
        let (eth0, eth1) = (index("eth0"), index("eth1"));
        let (v4, v6) = (address("192.0.2.50"), address("2001:db8::50"));
        let wanted = BTreeSet::from([(v4, eth0), (v6, eth0)]);
        let changes = addresses::sync(&socket, &wanted).await.unwrap();
        assert_eq!(changes.added, [(v4, eth0), (v6, eth0)]);
        assert!(changes.removed.is_empty() && changes.foreign.is_empty() && changes.refused.is_empty());
        assert_eq!(shown("eth0"), ["192.0.2.11/24", "192.0.2.50/32", "2001:db8::11/64", "2001:db8::50/128"]);
        let v6_shown = ip("-6 address show dev eth0 to 2001:db8::50");
        assert!(v6_shown.contains("deprecated") && !v6_shown.contains("tentative"), "{v6_shown}");
        assert!(addresses::sync(&socket, &wanted).await.unwrap().added.is_empty());
        // The host does not select them as source addresses.
        assert!(ip("route get 192.0.2.77").contains("src 192.0.2.11"));
        assert!(ip("-6 route get 2001:db8::77").contains("src 2001:db8::11"));

        // One address removed by hand, one no longer deprecated, one that the host has itself, one on another
        // interface.
        ip("address delete 192.0.2.50/32 dev eth0");
        preferred(&socket, v6, eth0).await;
        ip("address add 192.0.2.60/24 dev eth0");
        ip("address add 192.0.2.61/32 dev eth1");
        let host_own = address("192.0.2.60");
        let elsewhere = address("192.0.2.61");
        let wanted = BTreeSet::from([(v4, eth1), (v6, eth0), (host_own, eth0), (elsewhere, eth0), (v4, 4711)]);
        let changes = addresses::sync(&socket, &wanted).await.unwrap();
        assert_eq!(changes.added, [(v4, eth1), (v6, eth0)]);
        assert_eq!(changes.foreign, [(host_own, eth0), (elsewhere, eth1)]);
        assert_eq!(changes.refused.len(), 1, "{changes:?}");
        assert!(ip("-6 address show dev eth0 to 2001:db8::50").contains("deprecated"));

        let changes = addresses::sync(&socket, &BTreeSet::new()).await.unwrap();
        assert_eq!(changes.removed.len(), 2, "{changes:?}");
        assert_eq!(shown("eth0"), ["192.0.2.11/24", "192.0.2.60/24", "2001:db8::11/64"]);
        assert_eq!(shown("eth1"), ["192.0.2.61/32"]);
        assert_eq!(ip_json("-4 address show dev egret")[0]["addr_info"][0]["local"], "169.254.78.71");
    });
}

/// A kernel before 5.18 stores the metric and no protocol number: as these addresses look there.
#[test]
fn an_address_without_a_protocol_number_is_recognised_by_its_metric_and_prefix() {
    in_namespace(|| async {
        let socket = host();
        let eth0 = index("eth0");
        for ours in ["192.0.2.50/32", "2001:db8::50/128"] {
            ip(&format!("address add {ours} dev eth0 metric {ADDRESS_METRIC}"));
        }
        ip(&format!("address add 192.0.2.60/24 dev eth0 metric {ADDRESS_METRIC}"));
        ip("address add 192.0.2.61/32 dev eth0 metric 1");
        let v4 = address("192.0.2.50");
        let there = Uplinks::read(&socket).await.unwrap();
        assert_eq!(there.unusable(v4), None);
        let changes = addresses::sync(&socket, &BTreeSet::from([(v4, eth0)])).await.unwrap();
        assert!(changes.added.is_empty() && changes.foreign.is_empty(), "{changes:?}");
        assert_eq!(changes.removed, [(address("2001:db8::50"), eth0)]);
        let changes = addresses::sync(&socket, &BTreeSet::new()).await.unwrap();
        assert_eq!(changes.removed, [(v4, eth0)]);
        assert_eq!(shown("eth0"), ["192.0.2.11/24", "192.0.2.60/24", "192.0.2.61/32", "2001:db8::11/64"]);
    });
}

#[test]
fn egress_addresses_have_the_metric_by_which_older_kernels_recognise_them() {
    in_namespace(|| async {
        let socket = host();
        let eth0 = index("eth0");
        let wanted = BTreeSet::from([(address("192.0.2.50"), eth0), (address("2001:db8::50"), eth0)]);
        addresses::sync(&socket, &wanted).await.unwrap();
        let routes = || ["", "-6 "].map(|family| ip(&format!("{family}route show table all dev eth0")));
        let with = routes();
        let shown = ip("address show dev eth0");
        assert_eq!(shown.matches(&format!("metric {ADDRESS_METRIC} ")).count(), 2, "{shown}");
        // It changes no route.
        assert!(with.iter().all(|routes| !routes.contains(&format!("metric {ADDRESS_METRIC}"))), "{with:?}");
    });
}

#[test]
fn an_uplink_is_named_or_found() {
    in_namespace(|| async {
        let socket = host();
        interface("eth1");
        ip("address add 198.51.100.2/24 dev eth1");
        let find = async |a: &str, i: Option<&str>| Uplinks::read(&socket).await?.find(address(a), i).await;
        assert_eq!(find("203.0.113.9", Some("eth1")).await.unwrap().name, "eth1");
        assert_eq!(find("198.51.100.77", None).await.unwrap().name, "eth1");
        assert_eq!(find("203.0.113.9", None).await.unwrap().name, "eth0");
        assert_eq!(find("2001:db8::50", None).await.unwrap().name, "eth0");
        assert_eq!(find("2001:db8:7::50", None).await.unwrap().name, "eth0");
        for name in ["eth7", "", "a-name-that-is-far-too-long"] {
            let error = find("203.0.113.9", Some(name)).await.unwrap_err();
            assert!(error.to_string().contains("has no interface"), "{error}");
        }
        ip("route delete default");
        let error = find("203.0.113.9", None).await.unwrap_err();
        assert!(error.to_string().contains("name the gateway's interface"), "{error}");
    });
}
