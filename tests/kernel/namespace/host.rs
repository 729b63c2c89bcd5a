//! A host as the kernel's tests need it: an uplink with both families, and what Egret puts there.

use super::{ip, ip_json};
use egret::datapath::names::{RULE_REPLY, RULE_REQUEST, TABLE_REPLY, TABLE_REQUEST};
use egret::datapath::route_socket::RouteSocket;
use egret::datapath::routes::{METRIC_LAST, Route, RouteKind};
use egret::datapath::rules::Rule;
use egret::datapath::tunnel::Tunnel;
use egret_nft::mac::Mac;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// An uplink with addresses of both families, a default route, and a socket.
pub fn host() -> RouteSocket {
    interface("eth0");
    ip("address add 192.0.2.11/24 dev eth0");
    ip("address add 2001:db8::11/64 dev eth0 nodad");
    ip("route add default via 192.0.2.1");
    ip("-6 route add default via 2001:db8::1");
    RouteSocket::open().unwrap()
}

/// An interface that is up, with a carrier.
pub fn interface(name: &str) {
    ip(&format!("link add {name} type veth peer name {name}-wire"));
    ip(&format!("link set {name}-wire up"));
    ip(&format!("link set {name} up"));
}

/// The tunnel.
pub fn ours() -> Tunnel {
    Tunnel { vni: 7871, port: 7871, local: address("192.0.2.11"), mac: mac(11), mtu: 1450, ipv6: true }
}

pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node's tunnel MAC address.
pub fn mac(n: u16) -> Mac {
    let [a, b] = n.to_be_bytes();
    [2, 0x65, 0x67, 0, a, b]
}

/// What `ip -d link show` says.
pub fn link(name: &str) -> serde_json::Value {
    ip_json(&format!("-d link show {name}")).remove(0)
}

/// An interface's index.
pub fn index(name: &str) -> u32 {
    link(name)["ifindex"].as_u64().unwrap() as u32
}

/// The routes of requests, as the prototype has them.
pub fn request_routes(oif: u32) -> BTreeSet<Route> {
    let tunnel_next_hop = |dst: &str, gateway: &str| Route {
        dst: dst.parse().unwrap(),
        kind: RouteKind::Unicast { gateway: Some(address(gateway)), oif, onlink: gateway.contains('.') },
        metric: 0,
    };
    let bare = |dst: &str, kind, metric| Route { dst: dst.parse().unwrap(), kind, metric };
    BTreeSet::from([
        tunnel_next_hop("0.0.0.0/0", "169.254.78.1"),
        tunnel_next_hop("::/0", "fe80::e"),
        bare("10.244.0.0/16", RouteKind::Throw, 0),
        bare("fd00:244::/32", RouteKind::Throw, 0),
        bare("0.0.0.0/0", RouteKind::Unreachable, METRIC_LAST),
        bare("::/0", RouteKind::Unreachable, METRIC_LAST),
    ])
}

/// A table's routes of both families, as text, sorted.
pub fn table(number: u32) -> Vec<String> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let out =
            std::process::Command::new("ip").args([family, "route", "show", "table", &number.to_string()]).output();
        let out = String::from_utf8(out.unwrap().stdout).unwrap();
        all.extend(out.lines().map(|l| format!("{family} {}", l.split_whitespace().collect::<Vec<_>>().join(" "))));
    }
    all.sort();
    all
}

/// The rules of requests and replies.
pub fn our_rules() -> BTreeSet<Rule> {
    BTreeSet::from([
        Rule {
            priority: RULE_REQUEST,
            mark: 0x8000_0000,
            mask: 0xc000_0000,
            table: TABLE_REQUEST,
            without_default: false,
            only: None,
        },
        Rule {
            priority: RULE_REPLY,
            mark: 0xc000_0000,
            mask: 0xc000_0000,
            table: TABLE_REPLY,
            without_default: false,
            only: None,
        },
    ])
}

/// Both families' rules but for the kernel's own three.
pub fn rules_shown() -> Vec<String> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let shown = ip(&format!("{family} rule show"));
        let own = shown.lines().filter(|l| !["0:", "32766:", "32767:"].iter().any(|k| l.starts_with(k)));
        all.extend(own.map(|l| format!("{family} {}", l.split_whitespace().collect::<Vec<_>>().join(" "))));
    }
    all
}
