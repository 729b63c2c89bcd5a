//! Probes and announcements on the link; the neighbour is another network namespace. Needs root.

use crate::namespace::{Other, in_namespace, ip};
use egret::datapath::addresses;
use egret::datapath::announce::{LinkAddress, announce, probe};
use egret::datapath::route_socket::RouteSocket;
use egret::datapath::uplink::by_name;
use egret_nft::mac::{Mac, parse};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const THEIRS: &str = "02:00:00:00:00:02";
const TIMEOUT: Duration = Duration::from_millis(300);

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A link with a neighbour that has 192.0.2.12, .50 and 2001:db8::12, ::50.
async fn link() -> (RouteSocket, Other) {
    let other = Other::new();
    ip(&format!(
        "link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 address {THEIRS} netns {}",
        other.id
    ));
    ip("link set eth0 up");
    ip("address add 192.0.2.11/24 dev eth0");
    ip("address add 2001:db8::11/64 dev eth0 nodad");
    for command in [
        "link set eth0 up",
        "address add 192.0.2.12/24 dev eth0",
        "address add 2001:db8::12/64 dev eth0 nodad",
        "address add 192.0.2.50/32 dev eth0",
        "address add 2001:db8::50/128 dev eth0 nodad preferred_lft 0",
    ] {
        other.ip(command);
    }
    (RouteSocket::open().unwrap(), other)
}

async fn targets(socket: &RouteSocket, addresses: &[&str]) -> Vec<LinkAddress> {
    let interface = by_name(socket, "eth0").await.unwrap().unwrap();
    addresses.iter().map(|a| LinkAddress { address: address(a), interface: interface.clone(), claim: None }).collect()
}

#[test]
fn only_the_host_with_an_address_answers_probes_for_it() {
    in_namespace(|| async {
        let (socket, _other) = link().await;
        let theirs: Mac = parse(THEIRS).unwrap();
        let all = targets(&socket, &["192.0.2.50", "192.0.2.51", "2001:db8::50", "2001:db8::51"]).await;
        let answers = probe(&all, TIMEOUT).await.unwrap();
        assert_eq!(answers, [Some(theirs), None, Some(theirs), None]);
        // When all addresses have been answered, the probe does not wait.
        let start = Instant::now();
        let there = targets(&socket, &["192.0.2.50", "2001:db8::50"]).await;
        assert_eq!(probe(&there, Duration::from_secs(5)).await.unwrap(), [Some(theirs), Some(theirs)]);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        // The host's own addresses are no other host's.
        let own = targets(&socket, &["192.0.2.11", "2001:db8::11"]).await;
        assert_eq!(probe(&own, TIMEOUT).await.unwrap(), [None, None]);
    });
}

#[test]
fn an_announcement_updates_the_neighbours_entries() {
    in_namespace(|| async {
        let (socket, other) = link().await;
        let moved = ["192.0.2.60", "2001:db8::60"];
        for a in moved {
            other.ip(&format!("neighbour replace {a} lladdr 02:00:00:00:00:99 dev eth0 nud stale"));
            ip(&format!("address add {a} dev eth0 {}", if a.contains(':') { "nodad" } else { "" }));
        }
        announce(&targets(&socket, &moved).await).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        for a in moved {
            let entry = other.ip(&format!("neighbour show {a} dev eth0"));
            assert!(entry.contains("02:00:00:00:00:01"), "{entry}");
        }
    });
}

#[test]
fn the_kernel_answers_for_an_address_that_egret_added() {
    in_namespace(|| async {
        let (socket, other) = link().await;
        let placed = targets(&socket, &["192.0.2.61", "2001:db8::61"]).await;
        let wanted = placed.iter().map(|t| (t.address, t.interface.ifindex)).collect();
        assert_eq!(addresses::sync(&socket, &wanted).await.unwrap().added.len(), 2);
        for target in &placed {
            other.ip(&format!("neighbour flush to {}", target.address));
            let to = SocketAddr::new(target.address, 9);
            let refused = other.inside(move || TcpStream::connect_timeout(&to, Duration::from_secs(2))).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {refused}");
        }
    });
}

#[test]
fn an_interface_that_is_down_is_an_error_and_one_without_a_mac_address_is_ignored() {
    in_namespace(|| async {
        let (socket, _other) = link().await;
        let mut all = targets(&socket, &["192.0.2.60", "2001:db8::60"]).await;
        ip("link set eth0 down");
        assert!(announce(&all).is_err());
        for target in &all {
            let error = probe(std::slice::from_ref(target), TIMEOUT).await.unwrap_err();
            assert!(format!("{error:#}").contains("eth0"), "{error:#}");
        }
        for target in &mut all {
            target.interface.mac = None;
        }
        announce(&all).unwrap();
        assert_eq!(probe(&all, TIMEOUT).await.unwrap(), [None, None]);
    });
}
