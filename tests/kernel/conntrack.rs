//! Tracked connections: listed by mark, deleted and inserted. The program `conntrack` inserts and lists them for
//! comparison. Needs root.

use crate::namespace::{in_namespace, run};
use egret_nft::conntrack::{
    EntryAction, Insertion, MarkFilter, Translated, Tuple, delete, delete_by_address, delete_by_source, delete_one,
    find_by_original, find_by_reply, fold_tracked, insert, insert_or_update, list, list_tracked, update_entries,
};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

const PATHS: MarkFilter = MarkFilter { mark: 0x4547_0000, mask: 0xffff_8000 };

fn connection(source: &str, nat: Option<&str>, port: u16, mark: u32) {
    let destination = if source.contains(':') { "2001:db8::100" } else { "192.0.2.100" };
    let nat = nat.map(|a| format!("-n {a}")).unwrap_or_default();
    run(
        "conntrack",
        &format!(
            "-I -s {source} -d {destination} -p tcp --sport {port} --dport 80 --state ESTABLISHED -t 600 -m {mark} {nat}"
        ),
    );
}

fn shown() -> usize {
    run("conntrack", "-L -f ipv4").lines().count() + run("conntrack", "-L -f ipv6").lines().count()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_pods_connections_on_some_allocations_are_deleted_and_others_stay() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        assert_eq!(list(&mut socket, PATHS).unwrap(), []);
        connection("10.244.1.5", None, 1001, 0x4547_0011);
        connection("10.244.1.5", None, 1002, 0x4547_0012);
        connection("10.244.1.5", None, 1003, 0);
        connection("10.244.1.6", None, 1004, 0x4547_0011);
        connection("fd00:244:1::5", None, 1005, 0x4547_0011);
        connection("10.244.1.5", None, 1006, 0x4547_8011);
        assert_eq!(list(&mut socket, PATHS).unwrap().len(), 4);
        let pod = BTreeSet::from([address("10.244.1.5"), address("fd00:244:1::5")]);
        let doomed = |c: &egret_nft::conntrack::Connection| pod.contains(&c.source) && c.mark & 0x3fff == 0x11;
        assert_eq!(delete(&mut socket, PATHS, doomed).unwrap(), 2);
        assert_eq!(delete(&mut socket, PATHS, doomed).unwrap(), 0);
        assert_eq!(shown(), 4);
        assert_eq!(list(&mut socket, MarkFilter { mark: 0, mask: 0 }).unwrap().len(), 4);
    });
}

#[test]
fn only_the_connections_of_one_address_are_deleted() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        for (n, source) in ["10.244.1.5", "fd00:244:1::5", "10.244.1.6", "fd00:244:1::6"].into_iter().enumerate() {
            let n = n as u16 * 10;
            connection(source, None, 1001 + n, 0);
            connection(source, None, 1002 + n, 0x4547_0011);
            connection(source, Some(if source.contains(':') { "2001:db8::50" } else { "192.0.2.50" }), 1003 + n, 7);
        }
        assert_eq!(shown(), 12);
        assert_eq!(delete_by_address(&mut socket, &[address("10.244.1.5")].into(), |_| true).unwrap(), 3);
        assert_eq!(delete_by_address(&mut socket, &[address("10.244.1.5")].into(), |_| true).unwrap(), 0);
        assert_eq!(delete_by_address(&mut socket, &[address("fd00:244:1::5")].into(), |_| true).unwrap(), 3);
        assert_eq!(shown(), 6);
        // Connections to which the address replies.
        assert_eq!(delete_by_address(&mut socket, &[address("192.0.2.100")].into(), |_| true).unwrap(), 3);
        assert_eq!(delete_by_address(&mut socket, &[address("2001:db8::100")].into(), |_| true).unwrap(), 3);
        assert_eq!(shown(), 0);
    });
}

#[test]
fn connections_of_one_source_differ_by_server_port_and_id() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        connection("10.244.1.5", Some("192.0.2.11"), 1001, 0);
        connection("10.244.1.5", Some("192.0.2.11"), 1002, 0);
        connection("fd00:244:1::5", None, 1003, 0);
        connection("10.244.1.6", None, 1004, 0);
        let pod = BTreeSet::from([address("10.244.1.5"), address("fd00:244:1::5")]);
        let mut seen = Vec::new();
        let looked = delete_by_source(&mut socket, &pod, |c| {
            seen.push((c.id, c.protocol, c.reply_port));
            false
        });
        assert_eq!(looked.unwrap(), 0);
        let ids: BTreeSet<u32> = seen.iter().map(|(id, ..)| *id).collect();
        assert!(ids.len() == 3 && !ids.contains(&0), "{seen:?}");
        assert!(seen.iter().all(|(_, protocol, port)| (*protocol, *port) == (6, Some(80))), "{seen:?}");
        // The next time they have the same ids.
        assert_eq!(delete_by_source(&mut socket, &pod, |c| c.id == seen[0].0).unwrap(), 1);
        assert_eq!(delete_by_source(&mut socket, &pod, |c| ids.contains(&c.id)).unwrap(), 2);
        // Not the connections to which it replies.
        assert_eq!(delete_by_source(&mut socket, &[address("192.0.2.100")].into(), |_| true).unwrap(), 0);
        assert_eq!(shown(), 1);
    });
}

#[test]
fn connections_of_an_egress_ip_are_deleted() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        connection("10.244.1.5", Some("192.0.2.50"), 1001, 0x4547_800b);
        connection("fd00:244:1::5", Some("2001:db8::50"), 1002, 0x4547_800b);
        connection("10.244.1.6", Some("192.0.2.51"), 1003, 0x4547_800b);
        let gateways = MarkFilter { mark: 0x4547_8000, mask: 0xffff_8000 };
        let found = list(&mut socket, gateways).unwrap();
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|c| c.source != c.reply_destination && c.destination == c.reply_source), "{found:?}");
        let lost = [address("192.0.2.50"), address("2001:db8::50")];
        assert_eq!(delete(&mut socket, gateways, |c| lost.contains(&c.reply_destination)).unwrap(), 2);
        assert_eq!(shown(), 1);
    });
}

/// The kernel reports a conflict with another entry, and attributes that it does not understand.
#[test]
fn replies_in_flight_have_an_entry_for_a_second_that_begins_at_the_server() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        connection("10.244.1.5", Some("192.0.2.50"), 1001, 0x4547_0011);
        connection("fd00:244:1::5", Some("2001:db8::50"), 1002, 0x4547_0011);
        connection("10.244.1.6", None, 1003, 0x4547_0011);
        assert_eq!(
            update_entries(&mut socket, PATHS, |_| EntryAction::DeleteAdmittingReplies(0x4547_4011)).unwrap(),
            3
        );
        let late = MarkFilter { mark: 0x4547_4000, mask: 0xffff_c000 };
        let mut found: Vec<_> = list(&mut socket, late).unwrap();
        found.sort_by_key(|c| c.reply_source);
        let shown: Vec<_> = found.iter().map(|c| (c.source, c.destination, c.reply_source)).collect();
        let expected = [
            ("192.0.2.100", "192.0.2.50", "10.244.1.5"),
            ("192.0.2.100", "10.244.1.6", "10.244.1.6"),
            ("2001:db8::100", "2001:db8::50", "fd00:244:1::5"),
        ];
        assert_eq!(shown, expected.map(|(a, b, c)| (address(a), address(b), address(c))));
        // The translated connection can be created again while the entry that begins at the server exists.
        connection("10.244.1.5", None, 1001, 0x4547_0011);
        assert_eq!(list(&mut socket, PATHS).unwrap().len(), 4);
        let begin = Instant::now();
        while !list(&mut socket, late).unwrap().is_empty() {
            assert!(begin.elapsed().as_secs() < 10, "they stay");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(list(&mut socket, PATHS).unwrap().len(), 1);
    });
}

fn translated(source: &str, protocol: u8, port: u16, changed: u16) -> Translated {
    let v6 = source.contains(':');
    let out = Tuple {
        source: address(source),
        destination: address(if v6 { "2001:db8::100" } else { "192.0.2.100" }),
        protocol,
        ports: [port, 80],
    };
    let egress = address(if v6 { "2001:db8::50" } else { "192.0.2.50" });
    Translated { out, address: egress, port: changed, mark: 0x4547_8007, timeout: 600 }
}

const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
fn an_entry_is_inserted_with_exactly_the_given_port_or_not_at_all() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        let no_place = |_: &_| false;
        for source in ["10.244.1.5", "fd00:244:1::5"] {
            for protocol in [TCP, UDP] {
                let wanted = translated(source, protocol, 1001, 2001);
                assert_eq!(insert_or_update(&mut socket, &wanted, no_place).unwrap(), Insertion::Present);
                let found = find_by_reply(&mut socket, &wanted.back()).unwrap().unwrap();
                assert_eq!((found.out, found.back, found.mark), (wanted.out, wanted.back(), wanted.mark));
                assert!(found.has_changed_port() && !found.is_over && (500..=600).contains(&found.timeout));

                let longer = Translated { timeout: 900, mark: 0x4547_8008, ..wanted };
                assert_eq!(insert_or_update(&mut socket, &longer, no_place).unwrap(), Insertion::Present, "again");
                let found = find_by_original(&mut socket, &wanted.out).unwrap().unwrap();
                assert!(found.timeout > 800 && found.mark == 0x4547_8008, "{found:?}");

                let rival = translated(source, protocol, 1002, 2001);
                assert_eq!(
                    insert_or_update(&mut socket, &rival, no_place).unwrap(),
                    Insertion::Conflict,
                    "the answers are another's"
                );
                assert_eq!(find_by_original(&mut socket, &rival.out).unwrap(), None);
                let other = translated(source, protocol, 1001, 2002);
                assert_eq!(insert_or_update(&mut socket, &other, no_place).unwrap(), Insertion::Conflict);
                assert_eq!(
                    insert_or_update(&mut socket, &other, |there| there.back == wanted.back()).unwrap(),
                    Insertion::Present
                );
                assert_eq!(find_by_reply(&mut socket, &wanted.back()).unwrap(), None);
                assert_eq!(insert_or_update(&mut socket, &rival, no_place).unwrap(), Insertion::Present);
            }
        }
        assert_eq!(shown(), 8);
        assert!(run("conntrack", "-L -p tcp").contains("ESTABLISHED"));
        let all = list_tracked(&mut socket, MarkFilter { mark: 0x4547_8000, mask: 0xffff_8000 }, |_| true).unwrap();
        assert_eq!(all.len(), 8);
        let of =
            |filter| fold_tracked(&mut Socket::open(NETLINK_NETFILTER).unwrap(), filter, || 0, |n, _| *n += 1).unwrap();
        assert_eq!(of(MarkFilter { mark: 0x4547_8000, mask: 0xffff_8000 }), 8);
        assert_eq!(of(MarkFilter { mark: 0x4548_0000, mask: 0xffff_0000 }), 0, "no connection has this mark");
        for one in &all {
            delete_one(&mut socket, &one.out, |_| false).unwrap();
            assert!(find_by_original(&mut socket, &one.out).unwrap().is_some());
            delete_one(&mut socket, &one.out, |there| there == one).unwrap();
        }
        assert_eq!(shown(), 0);
    });
}

#[test]
fn a_large_table_is_read_whole_without_being_kept() {
    in_namespace(|| async {
        let (mut socket, ports) = (Socket::open(NETLINK_NETFILTER).unwrap(), 1024..31_024);
        for port in ports.clone() {
            let made = insert(&mut socket, &translated("10.244.1.5", UDP, port, port)).unwrap();
            assert_eq!(made, Insertion::Present);
        }
        let begin = Instant::now();
        let filter = MarkFilter { mark: 0x4547_0000, mask: 0xffff_0000 };
        let found = fold_tracked(&mut socket, filter, BTreeSet::new, |found, one| {
            found.insert(one.back.ports[1]);
        });
        println!("{} connections are read in {:?}", ports.len(), begin.elapsed());
        assert_eq!(found.unwrap(), ports.collect());
    });
}

#[test]
fn a_pods_entry_is_replaced_by_a_translated_one_and_one_for_replies_in_flight() {
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        connection("10.244.1.5", None, 1001, 0x4547_0011);
        connection("fd00:244:1::5", None, 1001, 0x4547_0011);
        let heirs = ["10.244.1.5", "fd00:244:1::5"].map(|source| {
            let heir = translated(source, TCP, 1001, 2001);
            Translated { mark: 0x4547_0011, ..heir }
        });
        let fate = |c: &egret_nft::conntrack::Connection| {
            let heir = heirs.iter().find(|heir| Some(heir.out) == c.out).unwrap();
            EntryAction::Replace(*heir, Some(0x4547_4011))
        };
        assert_eq!(update_entries(&mut socket, PATHS, fate).unwrap(), 2);
        for heir in &heirs {
            assert_eq!(find_by_original(&mut socket, &heir.out).unwrap().unwrap().back, heir.back());
        }
        let late = list(&mut socket, MarkFilter { mark: 0x4547_4011, mask: u32::MAX }).unwrap();
        assert_eq!(late.len(), 2);
        assert!(late.iter().all(|late| heirs.iter().any(|heir| heir.out.source == late.destination)), "{late:?}");
    });
}

#[test]
fn many_connections_are_deleted_quickly() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        let lines: String = (0..3000u32)
            .map(|n| {
                format!(
                    "-I -s 10.244.{}.{} -d 192.0.2.100 -p udp --sport {} --dport 53 -t 600 -m {}\n",
                    n >> 8 & 0xff,
                    n & 0xff,
                    1000 + n,
                    0x4547_0011
                )
            })
            .collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, lines.as_bytes()).unwrap();
        run("conntrack", &format!("-R {}", file.path().display()));
        // So many that the kernel filters by address.
        let one = [address("10.244.0.7")].into();
        assert_eq!(delete_by_address(&mut socket, &one, |_| false).unwrap(), 0);
        assert_eq!(delete_by_address(&mut socket, &one, |_| true).unwrap(), 1);
        assert_eq!(delete_by_address(&mut socket, &one, |_| true).unwrap(), 0);
        let start = Instant::now();
        assert_eq!(delete(&mut socket, PATHS, |_| true).unwrap(), 2999);
        println!("3000 connections: {:?}", start.elapsed());
        assert!(start.elapsed().as_millis() < 500, "{:?}", start.elapsed());
        assert_eq!(shown(), 0);
    });
}
