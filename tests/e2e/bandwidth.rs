//! The bandwidth of an egress IP: how much its pods send and receive together. Needs root.

use lab::fault_injection::owner_and_other;
use lab::{Bulk, EGRESS4, EGRESS6, EXT4, EXT6, Lab, Pod, VISITOR, manifests};
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The bucket holds what comes in a second; so long a transfer is not measured.
const BUCKET: Duration = Duration::from_millis(1500);
const MEASURED: Duration = Duration::from_secs(2);

fn visitors(more: &str) -> String {
    let pods = "podSelector: { matchLabels: { app: visitor } }";
    let address = format!("address: {{ ipv4: {EGRESS4}, ipv6: \"{EGRESS6}\" }}");
    manifests::policy("shop", "visitors", &format!("{pods}\n  {address}\n  {more}"))
}

/// Which way a transfer goes, as seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Sends,
    Receives,
}

/// The bits a second, in millions, that these pods send or receive together once their bucket is empty.
fn megabits(lab: &Lab, way: Way, pods: &[(&Pod, IpAddr)]) -> f64 {
    let transfers: Vec<Bulk> = pods
        .iter()
        .map(|(pod, server)| match way {
            Way::Sends => pod.upload(*server).expect("a connection"),
            Way::Receives => pod.download(*server).expect("a connection"),
        })
        .collect();
    let bytes = || match way {
        Way::Sends => lab.server("ext").lock().expect("a lock").sunk(),
        Way::Receives => transfers.iter().map(Bulk::received).sum(),
    };
    sleep(BUCKET);
    let (before, begin) = (bytes(), Instant::now());
    sleep(MEASURED);
    let (bits, took) = ((bytes() - before) as f64 * 8.0, begin.elapsed());
    for transfer in transfers {
        assert_eq!(transfer.stop(), None, "the connection lives");
    }
    bits / took.as_secs_f64() / 1e6
}

/// Waits until the owner has the limits that end with these numbers of bytes a second.
fn wait_for_limits(lab: &Lab, node: &str, rates: &[&str]) {
    lab.wait_until("the limits", Duration::from_secs(10), || {
        let table = lab.node(node).run(["nft", "list", "table", "inet", "egret"]);
        let limits: Vec<&str> =
            table.lines().filter(|line| line.trim().starts_with("limit ") && line.ends_with('{')).collect();
        limits.len() == rates.len()
            && rates.iter().all(|rate| limits.iter().any(|l| l.contains(&format!("-{rate} {{"))))
    });
}

fn assert_limited(what: &str, megabits: f64, limit: f64) {
    eprintln!("{what}: {megabits:.1} of {limit} Mbit/s");
    // What was received out of order counts when the gap before it closes.
    assert!(megabits < limit * 1.25, "{what}: {megabits:.1} Mbit/s, the limit is {limit}");
    assert!(megabits > limit * 0.4, "{what}: {megabits:.1} Mbit/s only, the limit is {limit}");
}

#[test]
fn pods_of_an_egress_ip_send_and_receive_no_more_than_its_bandwidth() {
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let (far, near) = (lab.add_pod("n1", "shop", "far", VISITOR), lab.add_pod(&owner, "shop", "near", VISITOR));
    let other = lab.add_pod("n1", "office", "other", &[]);
    let (v4, v6) = (IpAddr::V4(EXT4), IpAddr::V6(EXT6));
    let ways = [(Way::Sends, &far, v4), (Way::Receives, &far, v6)];
    let free = ways.map(|(way, pod, server)| megabits(&lab, way, &[(pod, server)]));

    lab.write_manifest("policy.yaml", &visitors("bandwidth: { egress: 20Mbit, ingress: 10Mbit }"));
    wait_for_limits(&lab, &owner, &["2500000", "1250000"]);
    let cases = [(Way::Sends, &near, v6), (Way::Receives, &near, v4)].into_iter().chain(ways);
    for (way, pod, server) in cases {
        let limit = if way == Way::Sends { 20.0 } else { 10.0 };
        assert_limited(&format!("{} {way:?} {server}", pod.name), megabits(&lab, way, &[(pod, server)]), limit);
    }
    // Both pods and both families together.
    assert_limited("together", megabits(&lab, Way::Sends, &[(&far, v4), (&near, v6)]), 20.0);
    for (limited, free) in [20.0, 10.0].into_iter().zip(free) {
        eprintln!("without a limit: {free:.0} Mbit/s");
        assert!(free > limited * 5.0, "without a limit only {free:.1} Mbit/s");
    }
    assert!(megabits(&lab, Way::Sends, &[(&other, v4)]) > 100.0, "another pod is not limited");

    let metrics = lab.metrics(&owner);
    let id = lab.egress_id("shop/visitors").to_string();
    for direction in ["egress", "ingress"] {
        let labels = [("allocation", &*id), ("direction", direction)];
        let dropped = metrics.get("egret_node_bandwidth_dropped_packets_total", &labels);
        assert!(dropped.is_some_and(|n| n > 0.0), "{direction}: {dropped:?}");
    }
    assert!(metrics.dropped("bandwidth").is_some_and(|n| n > 0.0));
    let status = lab.manifests().statuses();
    assert!(status.contains("its packets have a bandwidth of 20Mbit to send and 10Mbit to receive"), "{status}");
}

#[test]
fn another_bandwidth_takes_effect_on_open_connections() {
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let sunk = || lab.server("ext").lock().expect("a lock").sunk();
    let rate = || {
        sleep(BUCKET);
        let (before, begin) = (sunk(), Instant::now());
        sleep(MEASURED);
        (sunk() - before) as f64 * 8.0 / 1e6 / begin.elapsed().as_secs_f64()
    };
    lab.write_manifest("policy.yaml", &visitors("bandwidth: { egress: 20Mbit }"));
    wait_for_limits(&lab, &owner, &["2500000"]);
    let (session, upload) = (pod.session(EXT6).expect("a session"), pod.upload(EXT4).expect("a connection"));
    assert_limited("at first", rate(), 20.0);
    lab.write_manifest("policy.yaml", &visitors("bandwidth: { egress: 60Mbit }"));
    wait_for_limits(&lab, &owner, &["7500000"]);
    assert_limited("more", rate(), 60.0);
    // No moment without a limit: in each change the bucket is full once, and no more comes.
    let (before, begin) = (sunk(), Instant::now());
    for megabits in [8, 16, 24, 8, 16, 24] {
        lab.write_manifest("policy.yaml", &visitors(&format!("bandwidth: {{ egress: {megabits}Mbit }}")));
        wait_for_limits(&lab, &owner, &[&*(megabits * 125_000).to_string()]);
    }
    let (bits, took) = ((sunk() - before) as f64 * 8.0, begin.elapsed());
    let buckets = 96e6 + 6.0 * 8.0 * 65_536.0;
    assert!(bits < buckets * 1.1 + 24e6 * took.as_secs_f64(), "{bits} bits in {took:?}");
    // The next owner has the limit from its first packet.
    lab.daemon(&owner).kill9();
    lab.node(&owner).ip("link set eth0 down");
    lab.wait_until("the other node has taken over", Duration::from_secs(10), || pod.udp_who(EXT4).is_ok());
    wait_for_limits(&lab, &other, &["3000000"]);
    assert_limited("the next owner", rate(), 24.0);
    assert_eq!(upload.stop(), None);
    let report = session.stop();
    assert!(report.broken.is_none(), "{report:?}");
}

#[test]
fn without_a_bandwidth_there_is_no_chain_for_it() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let rules = || lab.node(&owner).run(["nft", "list", "table", "inet", "egret"]);
    let has = |words: &[&str]| words.iter().map(|word| rules().contains(word)).collect::<Vec<_>>();
    let words = ["chain limit-egress", "chain limit-ingress", "map limit_ingress6", "limit egress-"];
    assert_eq!(has(&words), [false; 4]);
    lab.write_manifest("policy.yaml", &visitors("bandwidth: { ingress: 1Gbit }"));
    lab.wait_for("the chain", &vec![false, true, true, false], || has(&words));
    lab.write_manifest("policy.yaml", &visitors("bandwidth: { ingress: 1Gbit, egress: 64Kbit }"));
    lab.wait_for("both chains", &vec![true; 4], || has(&words));
    lab.write_manifest("policy.yaml", &visitors(""));
    lab.wait_for("no chain", &vec![false; 4], || has(&words));
}
