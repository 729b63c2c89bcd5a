//! The tunnel device and its forwarding entries against the kernel, as `ip` and `bridge` show them. Needs root.

use crate::namespace::host::{address, host, link, mac, ours};
use crate::namespace::{in_namespace, ip, ip_json, run};
use egret::datapath::addresses;
use egret::datapath::fdb;
use egret::datapath::names;
use egret::datapath::names::{DEVICE, PROTOCOL};
use egret::datapath::tunnel::{self, Tunnel};
use egret::datapath::underlay::Underlay;
use lab::machine::bound;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

#[test]
fn the_tunnel_device_has_the_desired_settings_and_stays_in_the_second_run() {
    in_namespace(|| async {
        let socket = host();
        let first = tunnel::ensure(&socket, &ours()).await.unwrap();
        let device = link(DEVICE);
        let data = &device["linkinfo"]["info_data"];
        assert_eq!(data["id"], 7871);
        assert_eq!(data["port"], 7871);
        assert_eq!(data["local"], "192.0.2.11");
        assert_eq!(data["learning"], false);
        assert_eq!(data["gbp"], true);
        assert_eq!(data["udp_csum"], true);
        assert_eq!(device["address"], "02:65:67:00:00:0b");
        assert_eq!(device["mtu"], 1450);
        assert_eq!(device["group"], "7871");
        assert!(device["flags"].as_array().unwrap().contains(&"UP".into()), "{device}");
        assert_eq!(tunnel::ensure(&socket, &ours()).await.unwrap(), first);

        let address = &ip_json(&format!("-4 address show dev {DEVICE}"))[0]["addr_info"][0];
        assert_eq!((&address["local"], &address["scope"]), (&"169.254.78.71".into(), &"link".into()));
        let there = addresses::local_addresses(&socket).await.unwrap();
        assert!(there.iter().any(|a| a.address == names::DEVICE4 && a.protocol == PROTOCOL), "{there:?}");
        let hubs = ip_json(&format!("neighbour show dev {DEVICE} nud permanent"));
        let mut hubs: Vec<_> =
            hubs.iter().map(|n| (n["dst"].as_str().unwrap(), n["lladdr"].as_str().unwrap())).collect();
        hubs.sort_unstable();
        assert_eq!(hubs, [("169.254.78.1", "02:65:67:ff:ff:ff"), ("fe80::e", "02:65:67:ff:ff:ff")]);
        assert_eq!(setting("ipv6/conf/egret/accept_ra"), "0");
    });
}

#[test]
fn manual_changes_are_corrected_on_the_same_device() {
    in_namespace(|| async {
        let socket = host();
        let first = tunnel::ensure(&socket, &ours()).await.unwrap();
        ip("link set egret down");
        ip("link set egret address 02:00:00:00:00:01 mtu 1300 group 5");
        ip("address flush dev egret");
        ip("neighbour flush dev egret nud permanent");
        std::fs::write("/proc/sys/net/ipv6/conf/egret/accept_ra", "1").unwrap();
        assert_eq!(tunnel::ensure(&socket, &ours()).await.unwrap(), first);
        let device = link(DEVICE);
        assert_eq!((&device["address"], &device["mtu"]), (&"02:65:67:00:00:0b".into(), &1450.into()));
        assert_eq!(device["group"], "7871");
        assert!(device["flags"].as_array().unwrap().contains(&"UP".into()), "{device}");
        assert_eq!(ip_json("neighbour show dev egret nud permanent").len(), 2);
        assert_eq!(ip_json("-4 address show dev egret")[0]["addr_info"][0]["local"], "169.254.78.71");
        assert_eq!(setting("ipv6/conf/egret/accept_ra"), "0");
    });
}

/// Strict filtering would drop packets from the tunnel, and loose filtering requires some route back.
#[test]
fn reverse_paths_are_filtered_as_little_as_the_host_allows() {
    in_namespace(|| async {
        let socket = host();
        for (all, device) in [("0", "0"), ("1", "2"), ("2", "2"), ("0", "0")] {
            std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", all).unwrap();
            for before in ["1", "0", "2"] {
                tunnel::ensure(&socket, &ours()).await.unwrap();
                assert_eq!(setting("ipv4/conf/egret/rp_filter"), device, "with {all} for all");
                std::fs::write("/proc/sys/net/ipv4/conf/egret/rp_filter", before).unwrap();
            }
        }
    });
}

fn setting(key: &str) -> String {
    run("cat", &format!("/proc/sys/net/{key}")).trim().to_owned()
}

#[test]
fn a_device_with_other_parameters_is_recreated() {
    in_namespace(|| async {
        let socket = host();
        let mut before = tunnel::ensure(&socket, &ours()).await.unwrap();
        let v6 = Tunnel { local: address("2001:db8::11"), mtu: 1430, ..ours() };
        for other in [Tunnel { vni: 5, ..ours() }, Tunnel { port: 4790, ..ours() }, v6.clone(), ours()] {
            let after = tunnel::ensure(&socket, &other).await.unwrap();
            assert_ne!(after, before, "{other:?}");
            assert_eq!(tunnel::ensure(&socket, &other).await.unwrap(), after, "{other:?}");
            before = after;
        }
        // As another program would create it: without the group-based policy extension, and with learning.
        ip("link delete egret");
        ip("link add egret type vxlan id 7871 dstport 7871 local 192.0.2.11");
        tunnel::ensure(&socket, &ours()).await.unwrap();
        assert_eq!(link(DEVICE)["linkinfo"]["info_data"]["gbp"], true);
        assert!(tunnel::remove(&socket).await.unwrap());
        assert!(!tunnel::remove(&socket).await.unwrap());
    });
}

#[test]
fn a_device_of_another_program_is_an_error_with_a_remedy_and_stays() {
    in_namespace(|| async {
        let socket = host();
        ip("link add egret type bridge");
        let error = tunnel::ensure(&socket, &ours()).await.unwrap_err();
        assert!(format!("{error:#}").contains("ip link delete egret"), "{error:#}");
        assert!(!tunnel::remove(&socket).await.unwrap());
        ip("link delete egret");
        ip("link add other type vxlan id 7871 dstport 7871 local 192.0.2.11 gbp");
        let error = tunnel::ensure(&socket, &ours()).await.unwrap_err();
        assert!(format!("{error:#}").contains("another VXLAN device"), "{error:#}");
        ip("link delete other");
        let taken = bound(|| std::net::UdpSocket::bind("0.0.0.0:7871")).unwrap();
        let error = tunnel::ensure(&socket, &ours()).await.unwrap_err();
        assert!(format!("{error:#}").contains("is taken by another program"), "{error:#}");
        drop(taken);
        // As with `bound`.
        for _ in 0..100 {
            if tunnel::ensure(&socket, &ours()).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tunnel::ensure(&socket, &ours()).await.unwrap();
    });
}

#[test]
fn the_tunnels_mtu_is_the_underlays_less_the_overhead() {
    in_namespace(|| async {
        let socket = host();
        let mtu = async |local, peers: &[&str]| {
            let underlay = Underlay::read(&socket, address(local), peers.iter().map(|p| address(p)), None).await;
            underlay.map(|u| tunnel::mtu(&u))
        };
        assert_eq!(mtu("192.0.2.11", &[]).await.unwrap(), 1450);
        assert_eq!(mtu("2001:db8::11", &[]).await.unwrap(), 1430);
        assert_eq!(mtu("192.0.2.11", &["192.0.2.12", "2001:db8::12"]).await.unwrap(), 1450);
        // A host with its address on lo: the interface to the other nodes counts.
        ip("address add 198.51.100.7/32 dev lo");
        assert_eq!(mtu("198.51.100.7", &["192.0.2.12"]).await.unwrap(), 1450);
        // The narrowest route counts, by its own MTU or by its interface's. An unreachable peer does not count.
        ip("route add 192.0.2.13/32 dev eth0 mtu 1400");
        ip("link add narrow mtu 1380 type veth peer name narrow-end");
        ip("link set narrow up");
        ip("route add 192.0.2.14/32 nexthop dev eth0 nexthop dev narrow");
        ip("route add unreachable 192.0.2.15/32");
        ip("-6 route add 2001:db8::13/128 dev narrow");
        for (local, peers, expected) in [
            ("192.0.2.11", &["192.0.2.12", "192.0.2.13"][..], 1350),
            ("192.0.2.11", &["192.0.2.13", "192.0.2.14"], 1330),
            ("192.0.2.11", &["192.0.2.12", "192.0.2.15"], 1450),
            ("2001:db8::11", &["2001:db8::12", "2001:db8::13"], 1310),
        ] {
            assert_eq!(mtu(local, peers).await.unwrap(), expected, "{local} to {peers:?}");
        }
        let error = mtu("192.0.2.12", &[]).await.unwrap_err();
        assert!(error.to_string().contains("does not have the tunnel address 192.0.2.12"), "{error}");
    });
}

fn entries() -> BTreeMap<String, BTreeSet<String>> {
    let mut entries: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let shown: Vec<serde_json::Value> = serde_json::from_str(&run("bridge", "-j fdb show dev egret")).unwrap();
    for e in shown {
        let text = |k: &str| e[k].as_str().unwrap_or_default().to_owned();
        assert_eq!(e["state"], "permanent", "{e}");
        entries.entry(text("mac")).or_default().insert(text("dst"));
    }
    entries
}

#[test]
fn the_forwarding_database_contains_the_desired_entries() {
    in_namespace(|| async {
        let socket = host();
        let device = tunnel::ensure(&socket, &ours()).await.unwrap();
        let mut wanted: BTreeMap<_, _> = (12..20).map(|n| (mac(n), address(&format!("192.0.2.{n}")))).collect();
        assert_eq!(fdb::sync(&socket, device, &wanted).await.unwrap(), 8);
        assert_eq!(fdb::sync(&socket, device, &wanted).await.unwrap(), 0);
        // Changed by hand: one entry removed, one with another destination, one with a second destination, one of no
        // node, flooding, one not permanent.
        run("bridge", "fdb delete 02:65:67:00:00:0c dev egret dst 192.0.2.12");
        run("bridge", "fdb replace 02:65:67:00:00:0d dev egret dst 192.0.2.99");
        run("bridge", "fdb append 02:65:67:00:00:0e dev egret dst 192.0.2.98");
        run("bridge", "fdb append 02:00:00:00:00:01 dev egret dst 192.0.2.97");
        run("bridge", "fdb append 00:00:00:00:00:00 dev egret dst 192.0.2.96");
        run("bridge", "fdb replace 02:65:67:00:00:0f dev egret dst 192.0.2.15 dynamic");
        assert!(fdb::sync(&socket, device, &wanted).await.unwrap() >= 5);
        assert_eq!(fdb::sync(&socket, device, &wanted).await.unwrap(), 0);
        let expected: BTreeMap<_, _> =
            (12..20).map(|n| (format!("02:65:67:00:00:{n:02x}"), BTreeSet::from([format!("192.0.2.{n}")]))).collect();
        assert_eq!(entries(), expected);
        // A node gets another address, and one is removed.
        wanted.insert(mac(12), address("192.0.2.112"));
        wanted.remove(&mac(13));
        fdb::sync(&socket, device, &wanted).await.unwrap();
        assert_eq!(fdb::sync(&socket, device, &wanted).await.unwrap(), 0);
        assert_eq!(entries()["02:65:67:00:00:0c"], BTreeSet::from(["192.0.2.112".to_owned()]));
        assert_eq!(entries().len(), 7);
    });
}

#[test]
fn a_rejected_entry_does_not_affect_the_others() {
    in_namespace(|| async {
        let socket = host();
        let device = tunnel::ensure(&socket, &ours()).await.unwrap();
        let mut wanted: BTreeMap<_, _> = (12..15).map(|n| (mac(n), address(&format!("192.0.2.{n}")))).collect();
        wanted.insert(mac(13), address("2001:db8::13"));
        let error = fdb::sync(&socket, device, &wanted).await.unwrap_err();
        assert!(format!("{error:#}").contains("2001:db8::13"), "{error:#}");
        assert_eq!(entries().len(), 2);
    });
}
