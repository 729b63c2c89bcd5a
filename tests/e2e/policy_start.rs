//! A policy that begins for running pods. Needs root.

use lab::scene::assert_blocked;
use lab::{EXT4, Flood, Lab, Pod, manifests};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

const RUNNER: &[(&str, &str)] = &[("app", "runner")];
/// The egress IP of the pods after their policy has begun.
const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 57));
/// How long a pod must have run to be no new one when a policy begins.
const RUNS: Duration = Duration::from_millis(5500);

/// Pods that no policy selects and that have run for long enough.
fn runners<const N: usize>(lab: &Lab, nodes: [&str; N]) -> [Pod; N] {
    let pods = nodes.map(|node| lab.add_pod(node, "shop", &format!("runner-{node}"), RUNNER));
    thread::sleep(RUNS);
    pods
}

fn begins(lab: &Lab) {
    let address = "{ ipv4: 192.0.2.57, ipv6: \"2001:db8::57\" }";
    let spec = format!("podSelector: {{ matchLabels: {{ app: runner }} }}\n  address: {address}");
    lab.write_manifest("runners.yaml", &manifests::policy("shop", "runners", &spec));
}

#[test]
fn a_new_policy_for_running_pods_loses_none_of_their_packets() {
    let lab = Lab::scene();
    let pods = runners(&lab, ["n1", "n2", "g1", "g2"]);
    let floods = pods.each_ref().map(|pod| pod.flood(EXT4, Duration::from_millis(5), true));
    thread::sleep(Duration::from_millis(300));
    begins(&lab);
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, ADDRESS));
    thread::sleep(Duration::from_millis(300));
    let reports = pods.iter().zip(floods.map(Flood::stop));
    let reports: Vec<_> = reports.inspect(|(pod, r)| println!("{}: {r:?}", pod.name)).collect();
    for (pod, report) in reports {
        assert_eq!(report.lost(), 0, "{}", pod.name);
        assert_eq!(report.seen_as, [pod.node.ipv4().into(), ADDRESS].into(), "{}", pod.name);
    }
}

#[test]
fn a_policy_without_a_usable_egress_ip_blocks_running_pods_after_a_second_and_new_ones_at_once() {
    let lab = Lab::scene();
    let pods = runners(&lab, ["n1", "n2"]);
    lab.daemon("controller").suspend(true);
    begins(&lab);
    thread::sleep(Duration::from_millis(300));
    let new = lab.add_pod("n1", "shop", "new", RUNNER);
    assert!(new.udp_who(EXT4).is_err(), "a new pod waits");
    thread::sleep(Duration::from_millis(1000));
    pods.iter().for_each(assert_blocked);
    lab.daemon("controller").suspend(false);
    pods.iter().chain([&new]).for_each(|pod| lab.wait_seen_as(pod, ADDRESS));
}
