//! Pods that ran before Egret are found by their route, or through their bridge. Needs root.

use crate::namespace::{Other, in_namespace, ip, ip_json, run};
use egret::datapath::pod_veth::{find_pod_veth, veth_by_index};
use egret::datapath::route_socket::RouteSocket;
use std::net::IpAddr;
use std::process::Command;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn routed_pod() -> Other {
    let pod = Other::new();
    ip(&format!("link add veth-p1 type veth peer name eth0 netns {}", pod.id));
    ip("address add 169.254.1.1/32 dev veth-p1");
    ip("link set veth-p1 up");
    ip("route add 10.244.1.5 dev veth-p1");
    ip("-6 route add fd00:244:1::5 dev veth-p1");
    pod.ip("link set eth0 up");
    pod
}

fn bridged_pod(vlans: bool) -> Other {
    let pod = Other::new();
    ip("link add cni0 type bridge");
    if vlans {
        ip("link set cni0 type bridge vlan_filtering 1");
    }
    ip("address add 10.244.2.1/24 dev cni0");
    ip("address add fd00:244:2::1/64 dev cni0 nodad");
    ip("link set cni0 up");
    ip(&format!("link add veth-p2 type veth peer name eth0 netns {}", pod.id));
    ip("link set veth-p2 master cni0 up");
    pod.ip("address add 10.244.2.5/24 dev eth0");
    pod.ip("address add fd00:244:2::5/64 dev eth0 nodad");
    pod.ip("link set eth0 up");
    pod
}

async fn name_of(socket: &RouteSocket, pod: &str) -> Option<String> {
    find_pod_veth(socket, address(pod)).await.unwrap().map(|v| v.name)
}

#[test]
fn a_routed_pod_is_found_by_its_route() {
    in_namespace(|| async {
        let socket = RouteSocket::open().unwrap();
        let pod = routed_pod();
        let veth = find_pod_veth(&socket, address("10.244.1.5")).await.unwrap().unwrap();
        let shown = ip_json("link show veth-p1").remove(0);
        assert_eq!((veth.name.as_str(), u64::from(veth.index)), ("veth-p1", shown["ifindex"].as_u64().unwrap()));
        let peer = pod.inside(|| ip_json("link show eth0").remove(0)["ifindex"].as_u64().unwrap());
        assert_eq!((u64::from(veth.peer_index), veth.master), (peer, None));
        assert_eq!(name_of(&socket, "fd00:244:1::5").await.as_deref(), Some("veth-p1"));
        assert_eq!(veth_by_index(&socket, veth.index).await.unwrap(), Some(veth));
        assert_eq!(name_of(&socket, "10.244.1.6").await, None);
    });
}

fn kernel_has_bridge_vlans() -> bool {
    ip("link add try0 type bridge");
    let tried = Command::new("ip").args("link set try0 type bridge vlan_filtering 1".split(' ')).output().unwrap();
    ip("link delete try0");
    tried.status.success()
}

#[test]
fn a_bridged_pod_is_found_after_a_long_silence() {
    in_namespace(|| async {
        for vlans in [false, true] {
            if vlans && !kernel_has_bridge_vlans() {
                println!("this kernel's bridges have no VLANs: tried without");
                continue;
            }
            let socket = RouteSocket::open().unwrap();
            let _pod = bridged_pod(vlans);
            for pod in ["10.244.2.5", "fd00:244:2::5"] {
                // First without a neighbour entry and a bridge entry, then with both, then with a neighbour entry
                // only.
                assert_eq!(name_of(&socket, pod).await.as_deref(), Some("veth-p2"), "{pod}");
                assert_eq!(name_of(&socket, pod).await.as_deref(), Some("veth-p2"), "{pod}");
                run("bridge", "fdb flush dev veth-p2 master dynamic");
                assert_eq!(name_of(&socket, pod).await.as_deref(), Some("veth-p2"), "{pod}");
                ip("neighbour flush dev cni0");
            }
            // An address that no pod has.
            assert_eq!(name_of(&socket, "10.244.2.6").await, None);
            ip("link delete cni0");
        }
    });
}

#[test]
fn a_bridged_pod_is_found_behind_a_packet_filter_and_after_another_had_its_address() {
    in_namespace(|| async {
        let socket = RouteSocket::open().unwrap();
        let _pod = bridged_pod(false);
        run("nft", "add table inet filter");
        run("nft", "add chain inet filter output { type filter hook output priority 0 ; policy drop ; }");
        assert_eq!(name_of(&socket, "10.244.2.5").await.as_deref(), Some("veth-p2"));
        ip("neighbour replace 10.244.2.5 lladdr 02:00:00:00:00:99 dev cni0 nud stale");
        assert_eq!(name_of(&socket, "10.244.2.5").await.as_deref(), Some("veth-p2"));
    });
}

#[test]
fn an_address_that_is_behind_no_veth_is_not_found() {
    in_namespace(|| async {
        let socket = RouteSocket::open().unwrap();
        // A host that is itself a container: its uplink is a veth, and other nodes' pods are behind it.
        let other = Other::new();
        ip(&format!("link add eth0 type veth peer name eth0 netns {}", other.id));
        ip("address add 192.0.2.11/24 dev eth0");
        ip("link set eth0 up");
        ip("route add 10.244.9.0/24 via 192.0.2.12");
        ip("route add unreachable 10.244.8.0/24");
        for a in ["192.0.2.12", "10.244.9.5", "10.244.8.5", "192.0.2.11", "127.0.0.1", "::1", "2001:db8::1"] {
            assert_eq!(name_of(&socket, a).await, None, "{a}");
        }
        assert_eq!(veth_by_index(&socket, 0).await.unwrap(), None);
        assert_eq!(veth_by_index(&socket, 1).await.unwrap(), None);
        assert_eq!(veth_by_index(&socket, 4711).await.unwrap(), None);
    });
}
