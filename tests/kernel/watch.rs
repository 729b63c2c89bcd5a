//! Which changes in the kernel are events for the daemon, and which are not. Needs root.

use crate::namespace::{Other, in_namespace, ip, ip_json, run};
use egret::datapath::names;
use egret::datapath::route_socket::RouteSocket;
use egret::datapath::rules;
use egret::datapath::rules::Rule;
use egret::datapath::tunnel::{self, Tunnel};
use egret::datapath::watch::{ForeignChange, Interest, Watch};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

async fn news(watch: &mut Watch) -> Vec<ForeignChange> {
    let mut all = BTreeSet::new();
    while let Ok(events) = tokio::time::timeout(Duration::from_millis(100), watch.next()).await {
        all.extend(events.unwrap());
    }
    all.into_iter().collect()
}

async fn host() -> (RouteSocket, Watch) {
    ip("link add eth0 type veth peer name wire0");
    ip("link set wire0 up");
    ip("link set eth0 up");
    ip("address add 192.0.2.11/24 dev eth0");
    let mut watch = Watch::open().unwrap();
    let socket = RouteSocket::open().unwrap();
    let tunnel = Tunnel {
        vni: 7871,
        port: 7871,
        local: "192.0.2.11".parse().unwrap(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1450,
        ipv6: true,
    };
    tunnel::ensure(&socket, &tunnel).await.unwrap();
    assert!(news(&mut watch).await.contains(&ForeignChange::Tunnel));
    let eth0 = ip_json("link show eth0")[0]["ifindex"].as_u64().unwrap() as u32;
    watch.set_interest(Interest {
        own_ports: BTreeSet::from([socket.port()]),
        underlay: BTreeMap::from([(eth0, 1500)]),
        peers: BTreeSet::from(["192.0.2.12", "2001:db8::12"].map(|a| a.parse().unwrap())),
        uplinks: BTreeSet::from([eth0]),
        addresses: BTreeSet::from(["198.51.100.7".parse().unwrap()]),
    });
    (socket, watch)
}

#[test]
fn changes_of_egrets_objects_by_others_are_events() {
    in_namespace(|| async {
        let (_socket, mut watch) = host().await;
        let pod = Other::new();
        ip(&format!("link add veth-p1 type veth peer name eth0 netns {}", pod.id));
        let index = ip_json("link show veth-p1")[0]["ifindex"].as_u64().unwrap() as u32;
        ip("link add cni0 type bridge");
        assert_eq!(news(&mut watch).await, []);
        for (change, event) in [
            ("route add 203.0.113.0/24 dev eth0 table 7871", ForeignChange::Routes),
            ("-6 route add throw 2001:db8::/32 table 7872", ForeignChange::Routes),
            ("route add default via 192.0.2.1 table 7881", ForeignChange::Routes),
            ("rule add pref 72 fwmark 1 lookup 7871", ForeignChange::Rules),
            ("-6 rule add pref 71 from fd00::1 lookup 7873", ForeignChange::Rules),
            ("address add 192.0.2.50/32 dev eth0", ForeignChange::Addresses),
            ("address add 198.51.100.7/32 dev lo", ForeignChange::Addresses),
            ("address flush dev egret", ForeignChange::Tunnel),
            ("neighbour replace 169.254.78.1 lladdr 02:00:00:00:00:09 dev egret", ForeignChange::Neighbours),
            ("link set egret mtu 1400", ForeignChange::Tunnel),
            ("link set eth0 mtu 1499", ForeignChange::Underlay),
            ("route add 192.0.2.12/32 dev eth0 mtu 1400", ForeignChange::Underlay),
            ("-6 route add 2001:db8::/64 dev eth0", ForeignChange::Underlay),
            ("route del 192.0.2.12/32", ForeignChange::Underlay),
            ("route add default dev eth0", ForeignChange::Underlay),
            ("link set eth0 down", ForeignChange::Routes),
            ("link set eth0 up", ForeignChange::Underlay),
            ("link delete veth-p1", ForeignChange::VethGone { index }),
        ] {
            ip(change);
            let seen = news(&mut watch).await;
            assert!(seen.contains(&event), "{change}: {seen:?}");
        }
        for setting in ["egret", "all"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{setting}/rp_filter"), "1").unwrap();
            assert_eq!(news(&mut watch).await, [ForeignChange::Tunnel], "{setting}");
        }
        run("bridge", "fdb append 02:00:00:00:00:01 dev egret dst 192.0.2.97");
        assert_eq!(news(&mut watch).await, [ForeignChange::Neighbours]);
        run("nft", "add table inet egret");
        assert_eq!(news(&mut watch).await, [ForeignChange::Nftables]);
        ip("link delete egret");
        assert!(news(&mut watch).await.contains(&ForeignChange::Tunnel));
    });
}

#[test]
fn other_changes_are_no_events() {
    in_namespace(|| async {
        let (socket, mut watch) = host().await;
        let rule = Rule {
            priority: names::RULE_REQUEST,
            mark: 1,
            mask: 1,
            table: names::TABLE_REQUEST,
            without_default: false,
            only: None,
        };
        rules::sync(&socket, &BTreeSet::from([rule])).await.unwrap();
        let pod = Other::new();
        ip(&format!("link add veth-p1 type veth peer name eth0 netns {}", pod.id));
        ip("link add cni0 type bridge");
        ip("link set cni0 up");
        ip("link set veth-p1 master cni0 up");
        pod.ip("link set eth0 up");
        ip("address add 10.244.1.1/24 dev cni0");
        ip("route add 10.244.9.0/24 via 192.0.2.12");
        ip("neighbour replace 192.0.2.12 lladdr 02:00:00:00:00:09 dev eth0");
        ip("rule add pref 100 from 10.0.0.0/8 lookup 100");
        run("nft", "add table inet somebody");
        ip("link set veth-p1 nomaster");
        assert_eq!(news(&mut watch).await, []);
    });
}

#[test]
fn a_burst_of_changes_is_one_event_and_a_loss_is_an_event() {
    in_namespace(|| async {
        let (_socket, mut watch) = host().await;
        let many: String =
            (0..60_000).map(|n| format!("route add 10.{}.{}.0/24 dev eth0 table 7871\n", n >> 8, n & 255)).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, many.as_bytes()).unwrap();
        run("ip", &format!("-force -batch {}", file.path().display()));
        let events = news(&mut watch).await;
        assert!(events.contains(&ForeignChange::Everything) && events.contains(&ForeignChange::Routes), "{events:?}");
    });
}

#[test]
fn the_sockets_know_their_ports() {
    in_namespace(|| async {
        let one = Socket::open(NETLINK_NETFILTER).unwrap();
        let two = Socket::open(NETLINK_NETFILTER).unwrap();
        assert!(one.port() != 0 && one.port() != two.port());
    });
}
