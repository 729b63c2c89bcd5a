//! Routes and rules against the kernel, as `ip` shows them. Needs root.

use crate::namespace::host::{
    address, host, index, interface, mac, our_rules, ours, request_routes, rules_shown, table,
};
use crate::namespace::{in_namespace, ip};
use egret::datapath::addresses;
use egret::datapath::fdb;
use egret::datapath::names::{
    RULE_FROM_VRF, RULE_QUARANTINE, RULE_TO_VRF, TABLE_FLUSH_GUARD, TABLE_MAIN, TABLE_QUARANTINE, TABLE_REPLY,
    TABLE_REQUEST,
};
use egret::datapath::route_socket::RouteSocket;
use egret::datapath::routes;
use egret::datapath::routes::{METRIC_LAST, Route, RouteKind};
use egret::datapath::rules::{self, Only, Rule};
use egret::datapath::tunnel;
use egret_cni::quarantine::Quarantine;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn rules_of_a_vrf_are_for_its_interface_and_one_family() {
    in_namespace(|| async {
        let socket = RouteSocket::open().unwrap();
        let only = |to: &str| Some(Only { iif: "eth1".into(), to: to.parse().unwrap() });
        let to_vrf = |to| Rule {
            priority: RULE_TO_VRF,
            mark: 0,
            mask: 0xc000_0000,
            table: TABLE_MAIN,
            without_default: false,
            only: only(to),
        };
        let from_vrf = Rule { priority: RULE_FROM_VRF, mark: 0xc020_0000, mask: 0xffe0_0000, ..to_vrf("::/0") };
        let from_vrf = Rule { without_default: true, only: None, ..from_vrf };
        let wanted = BTreeSet::from([from_vrf, to_vrf("10.244.0.0/20")]);
        assert_eq!(rules::sync(&socket, &wanted).await.unwrap(), 3);
        let shown = [
            "-4 78: from all fwmark 0xc0200000/0xffe00000 lookup main suppress_prefixlength 0 proto 71",
            "-4 79: from all to 10.244.0.0/20 fwmark 0/0xc0000000 iif eth1 [detached] lookup main proto 71",
            "-6 78: from all fwmark 0xc0200000/0xffe00000 lookup main suppress_prefixlength 0 proto 71",
        ];
        assert_eq!(rules_shown(), shown);
        assert_eq!(rules::sync(&socket, &wanted).await.unwrap(), 0);
        assert_eq!(rules::sync(&socket, &BTreeSet::from([to_vrf("10.244.0.0/16")])).await.unwrap(), 4);
        assert_eq!(rules::sync(&socket, &BTreeSet::new()).await.unwrap(), 1);
        assert_eq!(rules_shown(), [""; 0]);
    });
}

#[test]
fn a_host_without_ipv6_has_a_tunnel_without_ipv6() {
    in_namespace(|| async {
        for scope in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").unwrap();
        }
        interface("eth0");
        ip("address add 192.0.2.11/24 dev eth0");
        let socket = RouteSocket::open().unwrap();
        let oif = tunnel::ensure(&socket, &ours()).await.unwrap();
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &request_routes(oif)).await.unwrap(), 3);
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 2);
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 0);
    });
}

#[test]
fn five_thousand_nodes_are_synchronised_quickly() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let socket = host();
        let device = tunnel::ensure(&socket, &ours()).await.unwrap();
        let nodes: BTreeMap<_, _> =
            (0..5000u16).map(|n| (mac(n), IpAddr::from([198, 18, (n >> 8) as u8, n as u8]))).collect();
        let start = Instant::now();
        assert_eq!(fdb::sync(&socket, device, &nodes).await.unwrap(), 5000);
        let first = start.elapsed();
        let start = Instant::now();
        assert_eq!(fdb::sync(&socket, device, &nodes).await.unwrap(), 0);
        let again = start.elapsed();
        let throws: BTreeSet<_> =
            nodes.values().map(|a| Route { dst: (*a).into(), kind: RouteKind::Throw, metric: 0 }).collect();
        let start = Instant::now();
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &throws).await.unwrap(), 5000);
        let routes_first = start.elapsed();
        let start = Instant::now();
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &throws).await.unwrap(), 0);
        let routes_again = start.elapsed();
        println!("entries {first:?}, again {again:?}; routes {routes_first:?}, again {routes_again:?}");
        assert!(first < Duration::from_millis(1000), "{first:?}");
        assert!(again < Duration::from_millis(500), "{again:?}");
        assert!(routes_first < Duration::from_millis(1000), "{routes_first:?}");
        assert!(routes_again < Duration::from_millis(500), "{routes_again:?}");
    });
}

#[test]
fn a_tables_fallback_route_can_be_a_blackhole() {
    in_namespace(|| async {
        let socket = host();
        let last = |dst: &str| Route { dst: dst.parse().unwrap(), kind: RouteKind::Blackhole, metric: METRIC_LAST };
        let wanted = [last("0.0.0.0/0"), last("::/0")].into();
        assert_eq!(routes::sync(&socket, TABLE_FLUSH_GUARD, &wanted).await.unwrap(), 2);
        assert_eq!(
            table(TABLE_FLUSH_GUARD),
            [
                "-4 blackhole default proto 71 metric 4278198272",
                "-6 blackhole default dev lo proto 71 metric 4278198272 pref medium",
            ]
        );
        assert_eq!(routes::sync(&socket, TABLE_FLUSH_GUARD, &wanted).await.unwrap(), 0);
    });
}

#[test]
fn a_table_contains_exactly_the_desired_routes() {
    in_namespace(|| async {
        let socket = host();
        let oif = tunnel::ensure(&socket, &ours()).await.unwrap();
        let wanted = request_routes(oif);
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &wanted).await.unwrap(), 6);
        let right = table(TABLE_REQUEST);
        assert_eq!(
            right,
            [
                "-4 default via 169.254.78.1 dev egret proto 71 onlink",
                "-4 throw 10.244.0.0/16 proto 71",
                "-4 unreachable default proto 71 metric 4278198272",
                "-6 default via fe80::e dev egret proto 71 metric 1024 pref medium",
                "-6 throw fd00:244::/32 dev lo proto 71 metric 1024 pref medium",
                "-6 unreachable default dev lo proto 71 metric 4278198272 pref medium",
            ]
        );
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &wanted).await.unwrap(), 0);

        // Routes added by hand, and one in another table, which stays.
        ip("route add 203.0.113.0/24 dev eth0 table 7872");
        ip("route add throw 10.244.0.0/16 table 7872");
        let other = table(TABLE_REPLY);
        for change in [
            "route delete default table 7871 metric 0",
            "route replace unreachable 10.244.0.0/16 table 7871",
            "route add 203.0.113.0/24 dev eth0 table 7871",
            "route append 203.0.113.0/24 via 192.0.2.1 table 7871",
            "route add default via 192.0.2.1 dev eth0 table 7871 tos 0x10",
            "route add default table 7871 metric 7 nexthop via 192.0.2.1 nexthop via 192.0.2.2",
            "-6 route replace unreachable fd00:244::/32 table 7871",
            "-6 route delete unreachable default table 7871 metric 4278198272",
            "-6 route append default via 2001:db8::1 dev eth0 table 7871 metric 1024",
            "-6 route add 2001:db8:9::/48 table 7871 nexthop via 2001:db8::1 nexthop via 2001:db8::2",
            "-6 route add blackhole 2001:db8:a::/48 table 7871",
        ] {
            ip(change);
        }
        assert!(routes::sync(&socket, TABLE_REQUEST, &wanted).await.unwrap() > 0);
        assert_eq!(table(TABLE_REQUEST), right);
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &wanted).await.unwrap(), 0);
        assert_eq!(table(TABLE_REPLY), other);
        ip("route add default via 192.0.2.1 table 7881 proto 71");
        ip("route add default via 192.0.2.1 table 100 proto 71");
        assert_eq!(routes::tables(&socket).await.unwrap(), BTreeSet::from([TABLE_REQUEST, 7881]));

        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &BTreeSet::new()).await.unwrap(), 6);
        assert_eq!(table(TABLE_REQUEST), Vec::<String>::new());
        assert_eq!(routes::sync(&socket, TABLE_REQUEST, &BTreeSet::new()).await.unwrap(), 0);
    });
}

#[test]
fn a_next_hop_is_replaced_atomically() {
    in_namespace(|| async {
        let socket = host();
        let oif = index("eth0");
        let via = |gateway: &str| {
            BTreeSet::from([Route {
                dst: "0.0.0.0/0".parse().unwrap(),
                kind: RouteKind::Unicast { gateway: Some(address(gateway)), oif, onlink: false },
                metric: 0,
            }])
        };
        routes::sync(&socket, 7881, &via("192.0.2.1")).await.unwrap();
        let mut monitor = std::process::Command::new("ip")
            .args(["-4", "monitor", "route"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        routes::sync(&socket, 7881, &via("192.0.2.2")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        monitor.kill().unwrap();
        let seen = String::from_utf8(monitor.wait_with_output().unwrap().stdout).unwrap();
        assert!(seen.contains("via 192.0.2.2") && !seen.contains("Deleted"), "{seen}");
        assert_eq!(table(7881), ["-4 default via 192.0.2.2 dev eth0 proto 71"]);
    });
}

#[test]
fn each_rule_exists_once_for_each_family() {
    in_namespace(|| async {
        let socket = host();
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 4);
        let right = rules_shown();
        assert_eq!(
            right,
            [
                "-4 72: from all fwmark 0x80000000/0xc0000000 lookup 7871 proto 71",
                "-4 73: from all fwmark 0xc0000000/0xc0000000 lookup 7872 proto 71",
                "-6 72: from all fwmark 0x80000000/0xc0000000 lookup 7871 proto 71",
                "-6 73: from all fwmark 0xc0000000/0xc0000000 lookup 7872 proto 71",
            ]
        );
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 0);
        for change in [
            "rule delete pref 72",
            "rule add pref 72 fwmark 0x40000000/0xc0000000 lookup 7871 protocol 71",
            "rule add pref 74 fwmark 0x80000000/0xc0000000 iif lo lookup 7880 protocol 71",
            "-6 rule delete pref 73",
            "-6 rule add pref 73 not fwmark 0xc0000000/0xc0000000 lookup 7872 protocol 71",
        ] {
            ip(change);
        }
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 5);
        assert_eq!(rules_shown(), right);
        // Other programs' rules stay, also at Egret's priorities.
        ip("rule add pref 72 from 10.0.0.0/8 lookup 100");
        ip("rule add pref 50 fwmark 0x1 lookup 100 protocol 71");
        ip("rule add from 10.244.1.5 lookup 7873 pref 71 protocol 71");
        let with_others = rules_shown();
        assert_eq!(rules::sync(&socket, &our_rules()).await.unwrap(), 0);
        assert_eq!(rules_shown(), with_others);
        assert_eq!(rules::sync(&socket, &BTreeSet::new()).await.unwrap(), 4);
        assert_eq!(rules_shown().len(), 3);
    });
}

#[test]
fn a_quarantine_is_seen_and_lifted() {
    in_namespace(|| async {
        let mut quarantine = Quarantine::open().unwrap();
        assert_eq!((RULE_QUARANTINE, TABLE_QUARANTINE), (71, 7873));
        ip("rule add pref 71 from 10.244.1.5 lookup 7873 protocol 71");
        ip("-6 rule add pref 71 from fd00:244:1::5 lookup 7873 protocol 71");
        ip("rule add pref 71 from 10.244.1.0/24 lookup 7873");
        ip("rule add pref 71 from 10.244.1.9 lookup 100");
        let pods = [address("10.244.1.5"), address("fd00:244:1::5")];
        assert_eq!(quarantine.addresses().unwrap(), pods.into());
        for pod in pods {
            quarantine.lift(&pod).unwrap();
            quarantine.lift(&pod).unwrap();
        }
        assert_eq!(quarantine.addresses().unwrap(), [].into());
        assert_eq!(rules_shown().len(), 2);
    });
}

/// Creates and removes everything again and again, in the namespace in which it was started, until it is killed.
#[test]
#[ignore = "started, and killed, by the next test"]
fn one_that_is_killed() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = RouteSocket::open().unwrap();
        // In case nobody kills it.
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            put(&socket).await;
            routes::sync(&socket, TABLE_REQUEST, &BTreeSet::new()).await.unwrap();
            rules::sync(&socket, &BTreeSet::new()).await.unwrap();
            addresses::sync(&socket, &BTreeSet::new()).await.unwrap();
            tunnel::remove(&socket).await.unwrap();
        }
    });
}

/// Creates everything. Returns the number of changes without those of the device itself.
async fn put(socket: &RouteSocket) -> usize {
    let device = tunnel::ensure(socket, &ours()).await.unwrap();
    let nodes: BTreeMap<_, _> = (12..99).map(|n| (mac(n), address(&format!("192.0.2.{n}")))).collect();
    let egress = BTreeSet::from([(address("192.0.2.150"), index("eth0")), (address("2001:db8::50"), index("eth0"))]);
    fdb::sync(socket, device, &nodes).await.unwrap()
        + routes::sync(socket, TABLE_REQUEST, &request_routes(device)).await.unwrap()
        + rules::sync(socket, &our_rules()).await.unwrap()
        + addresses::sync(socket, &egress).await.unwrap().added.len()
}

#[test]
fn whoever_is_killed_at_any_moment_can_be_started_again() {
    in_namespace(|| async {
        let socket = host();
        put(&socket).await;
        let everything = || (table(TABLE_REQUEST), rules_shown(), ip("-br address"), ip("neighbour show dev egret"));
        let right = everything();
        let mut halves = 0;
        for round in 0..40 {
            let mut other = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "routes::one_that_is_killed", "--ignored"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            tokio::time::sleep(Duration::from_micros(5_000 + 731 * round)).await;
            other.kill().unwrap();
            other.wait().unwrap();
            halves += usize::from(put(&socket).await > 0);
            assert_eq!(put(&socket).await, 0, "round {round}");
            let (routes, rules, addresses, neighbours) = everything();
            assert_eq!((&routes, &rules, &neighbours), (&right.0, &right.1, &right.3), "round {round}");
            assert_eq!(addresses.lines().count(), right.2.lines().count(), "round {round}");
        }
        assert!(halves > 0, "it was never killed with something missing");
        println!("{halves} of 40 times something was missing");
    });
}
