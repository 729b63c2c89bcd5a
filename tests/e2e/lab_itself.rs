//! The lab without Egret: pods reach the outside from their node's address, and nothing of a lab is left behind.
//! Needs root.

use lab::kernel::TABLES;
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, FAR4, FAR6, Lab, SERVERS, machine, server};
use nix::sys::socket::{setsockopt, sockopt};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

fn namespaces_of(lab: &str) -> Vec<String> {
    let all = std::fs::read_dir("/run/netns").expect("/run/netns");
    all.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(|n| n.starts_with(&format!("{lab}-"))).collect()
}

#[test]
fn a_lab_starts_quickly_and_leaves_nothing_behind() {
    let _machine = lab::turn::alone();
    let begin = Instant::now();
    let lab = Lab::builder().without_egret().build();
    assert!(begin.elapsed() < Duration::from_secs(2), "a lab took {:?}", begin.elapsed());
    let (name, directory) = (lab.name().to_owned(), lab.directory().to_owned());
    assert_eq!(namespaces_of(&name).len(), 6);
    let pod = lab.add_pod("n1", "shop", "visitor", &[]);
    let mut sleeper = std::process::Command::new("sleep");
    let mut child = pod.spawn(sleeper.arg("1000")).expect("sleep");
    drop(pod);
    drop(lab);
    assert!(!child.wait().expect("wait").success(), "the lab's end did not end a process in it");
    assert_eq!(namespaces_of(&name), Vec::<String>::new());
    assert!(!directory.exists());
}

#[test]
fn a_lab_is_removed_when_its_test_panics() {
    let name = std::sync::Mutex::new(String::new());
    let panicked = std::panic::catch_unwind(|| {
        let lab = Lab::new();
        *name.lock().expect("a lock") = lab.name().to_owned();
        panic!("as a test would");
    });
    assert!(panicked.is_err());
    let name = name.into_inner().expect("a lock");
    assert_eq!(namespaces_of(&name), Vec::<String>::new());
    assert!(!Path::new(&std::env::temp_dir().join(name)).exists());
}

#[test]
fn leftovers_of_a_killed_run_are_removed_by_the_next_one() {
    let mut gone = std::process::Command::new("true").spawn().expect("true");
    gone.wait().expect("wait");
    let name = format!("egt-{}-1", gone.id());
    let netns = format!("{name}-n1");
    lab::host::checked(&["ip", "netns", "add", &netns], None);
    let directory = std::env::temp_dir().join(&name);
    std::fs::create_dir(&directory).expect("make a directory");
    let mut sleeper = std::process::Command::new("sleep");
    let mut child = lab::Host::open("n1", &netns).spawn(sleeper.arg("1000")).expect("sleep");
    lab::leftovers::sweep();
    assert!(!child.wait().expect("wait").success());
    assert_eq!(namespaces_of(&name), Vec::<String>::new());
    assert!(!directory.exists());
}

#[test]
fn without_egret_a_server_sees_the_pods_nodes() {
    let lab = Lab::builder().router().without_egret().build();
    for node in lab.nodes() {
        let begin = Instant::now();
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), &[]);
        println!("a pod on {} took {:?}", node.name, begin.elapsed());
        let (v4, v6) = (IpAddr::from(node.ipv4()), IpAddr::from(node.ipv6()));
        for (server, seen_as) in [(IpAddr::from(EXT4), v4), (EXT6.into(), v6), (FAR4.into(), v4), (FAR6.into(), v6)] {
            assert_eq!(pod.who(server).expect("TCP"), seen_as, "{} to {server}", node.name);
            assert_eq!(pod.udp_who(server).expect("UDP"), seen_as, "{} to {server}", node.name);
            pod.ping(server).expect("ICMP");
        }
    }
    let nodes: std::collections::BTreeSet<IpAddr> = lab.nodes().iter().map(|n| n.ipv4().into()).collect();
    assert_eq!(lab.sources(EXT4), nodes);
    lab.forget_wire();
    assert_eq!(lab.sources(EXT4).len(), 0);
}

#[test]
fn a_node_that_says_an_address_is_not_reachable_is_not_noted() {
    let lab = Lab::new();
    let (ext, mac) = (lab.host("ext"), lab.node("g1").mac("eth0"));
    let late: Vec<UdpSocket> = [(SERVERS[0], EGRESS4.into()), (SERVERS[1], IpAddr::from(EGRESS6))]
        .into_iter()
        .map(|(own, egress)| {
            // As a server that still knows the egress IP at its former owner.
            ext.ip(&format!("neigh replace {egress} lladdr {mac} dev eth0 nud permanent"));
            let socket = ext.within(|| UdpSocket::bind((own, 0))).expect("a port");
            // Without this option the socket does not learn of it (`udp_err` in net/ipv4/udp.c).
            if egress.is_ipv4() {
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true).expect("IP_RECVERR");
            } else {
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true).expect("IPV6_RECVERR");
            }
            socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            socket.connect((egress, 9)).and_then(|()| socket.send(b"late")).expect("sent");
            socket
        })
        .collect();
    for socket in late {
        let answer = machine::receive(&socket, &mut [0; 8]).map_err(|e| e.kind());
        assert_eq!(answer, Err(ErrorKind::HostUnreachable), "{:?}", socket.local_addr());
    }
    for server in SERVERS {
        assert_eq!(lab.sources(server), [].into(), "to {server}");
    }
}

#[test]
fn pods_reach_each_other_with_their_own_addresses() {
    let lab = Lab::builder().without_egret().build();
    let pods: Vec<_> =
        lab.nodes().iter().map(|n| lab.add_pod(&n.name, "shop", &format!("on-{}", n.name), &[])).collect();
    for to in &pods {
        let _server = lab::Server::start(to);
        for from in pods.iter().filter(|p| p.name != to.name) {
            assert_eq!(from.who(to.ipv4()).expect("IPv4"), from.ipv4(), "{} to {}", from.name, to.name);
            assert_eq!(from.who(to.ipv6()).expect("IPv6"), from.ipv6(), "{} to {}", from.name, to.name);
        }
    }
    for pod in pods {
        pod.check().expect("CHECK");
        assert!(pod.host_interface().starts_with("veth"));
        pod.delete();
    }
    for node in lab.nodes() {
        assert!(!node.ip("-br link").contains("veth"), "{}: {}", node.name, node.ip("-br link"));
    }
}

/// The benches load a node's tables by `nft`, to compare.
#[test]
fn tables_that_nft_lists_are_loaded_on_another_host() {
    let lab = Lab::scene();
    let (node, host) = (lab.node("g1"), lab.host("ext"));
    host.ip("link add egret type vxlan id 7871 dstport 7871 local 192.0.2.100 nolearning gbp");
    host.nft(&node.egret_tables());
    let loaded = host.run(["nft", "list", "tables"]);
    for table in TABLES {
        assert!(loaded.contains(table), "{loaded}");
    }
}

#[test]
fn sessions_floods_and_bulk_report_their_results() {
    let lab = Lab::builder().without_egret().build();
    let pod = lab.add_pod("n2", "shop", "visitor", &[]);
    let session = pod.session(EXT4).expect("a session");
    let flood = pod.flood(EXT6, Duration::from_millis(2), false);
    let fresh = pod.flood(EXT4, Duration::from_millis(5), true);
    std::thread::sleep(Duration::from_millis(300));
    assert!(pod.bulk(EXT6, 3_000_000).expect("bulk") < Duration::from_secs(5));
    let report = session.stop();
    assert!(report.rounds > 5 && report.broken.is_none(), "{report:?}");
    assert!(report.longest_silence < Duration::from_millis(500), "{report:?}");
    for report in [flood.stop(), fresh.stop()] {
        assert!(report.sent > 20 && report.lost() == 0 && report.seen_as.len() == 1, "{report:?}");
    }
    assert_eq!(lab.server("ext").lock().expect("a lock").connections().len(), 2);

    lab.node("n2").nft("table inet stop { chain c { type filter hook forward priority 0; policy drop; }; }");
    let flood = pod.flood(EXT4, Duration::from_millis(5), true);
    let session = pod.session(EXT4);
    assert!(session.is_err());
    assert_eq!(pod.who(EXT4).expect_err("blocked").kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(flood.stop().answered, 0);
    assert!(pod.who_at(SocketAddr::new(lab.node("n2").ipv4().into(), server::WHO)).is_err(), "nobody listens there");
}
