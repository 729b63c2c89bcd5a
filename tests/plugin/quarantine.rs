//! The daemon is away: pods start, and nothing leaks. Needs root.

use crate::call::Call;
use crate::node::{CLUSTER, Node, OUTSIDE, ip};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Instant;

#[test]
fn a_pod_that_a_policy_can_select_reaches_the_cluster_only_until_del() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let (pod, other) = (node.pod(5), node.pod(6));
    assert_eq!((pod.reaches(OUTSIDE), pod.reaches(CLUSTER)), ([true; 2], [true; 2]));

    let stdout = Call::new(&node, "ADD").pod(&pod).run().success();
    assert_eq!(stdout, format!("{}\n", pod.result()));
    assert_eq!(
        node.rules(),
        [
            "71: from 10.244.1.5 lookup 7873 proto 71".to_owned(),
            format!("71: from {} lookup 7873 proto 71", "fd00:244:1::5"),
        ]
    );
    assert_eq!(node.records(), ["c1@eth0.json"]);
    assert_eq!((pod.reaches(OUTSIDE), pod.reaches(CLUSTER)), ([false; 2], [true; 2]));
    assert_eq!(other.reaches(OUTSIDE), [true; 2]);
    Call::new(&node, "CHECK").pod(&pod).run().success();

    assert_eq!(Call::new(&node, "DEL").pod(&pod).run().success(), "");
    assert_eq!(pod.reaches(OUTSIDE), [true; 2]);
    assert!(node.rules().is_empty() && node.records().is_empty());
}

#[test]
fn a_pod_that_no_policy_can_select_is_free() {
    let node = Node::new();
    node.prepare(&["other"]);
    let pod = node.pod(5);
    Call::new(&node, "ADD").pod(&pod).run().success();
    assert!(node.rules().is_empty());
    assert_eq!(node.records(), ["c1@eth0.json"]);
    assert_eq!(pod.reaches(OUTSIDE), [true; 2]);
    Call::new(&node, "CHECK").pod(&pod).run().success();
}

#[test]
fn a_free_pod_lifts_the_quarantine_of_its_address() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    Call::new(&node, "ADD").container("old").pod(&pod).run().success();
    Call::new(&node, "ADD").container("new").pod(&pod).of("free").run().success();
    assert!(node.rules().is_empty());
    Call::new(&node, "DEL").container("old").run().success();
    assert_eq!(node.records(), ["new@eth0.json"]);
}

#[test]
fn pods_start_without_egret_on_a_node_whose_daemon_was_never_in_sync() {
    let node = Node::new();
    let pod = node.pod(5);
    let start = Instant::now();
    let stdout = Call::new(&node, "ADD").pod(&pod).run().success();
    assert_eq!(stdout, format!("{}\n", pod.result()));
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
    // A later daemon finds the pod by its attachment's file.
    assert_eq!((node.records(), node.rules()), (vec!["c1@eth0.json".to_owned()], Vec::new()));
    assert_eq!(pod.reaches(OUTSIDE), [true; 2]);
    Call::new(&node, "DEL").pod(&pod).run().success();
    assert!(node.records().is_empty());
}

#[test]
fn after_a_reboot_a_pod_that_a_policy_can_select_waits_for_the_daemon_and_others_start_at_once() {
    let node = Node::new();
    node.offline_policies(&["shop"]);
    let pod = node.pod(5);
    let start = Instant::now();
    let (code, text) = Call::new(&node, "ADD").pod(&pod).run().failure();
    assert_eq!(code, 11, "{text}");
    assert!(text.contains("policy shop/visitors can select pods of namespace shop"), "{text}");
    assert!(text.contains("start egretd"), "{text}");
    assert!((5..8).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(node.records().is_empty() && node.rules().is_empty());
    let start = Instant::now();
    Call::new(&node, "ADD").pod(&pod).of("free").run().success();
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}

#[test]
fn a_damaged_snapshot_quarantines_every_pod_and_is_reported() {
    let node = Node::new();
    node.prepare(&[]);
    let pod = node.pod(5);
    let file = node.state_dir().join("offline-policies.json");
    std::fs::write(&file, "{").unwrap();
    let (code, text) = Call::new(&node, "ADD").pod(&pod).of("free").run().failure();
    assert!(code == 11 && text.contains(&file.display().to_string()), "{code} {text}");
    assert!(node.records().is_empty() && node.rules().is_empty());
}

#[test]
fn a_quarantine_without_its_routes_is_not_used() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    // One family without routes is enough to leak.
    ip(&format!("-6 -n {} route flush table 7873", node.name));
    let (code, text) = Call::new(&node, "ADD").pod(&pod).run().failure();
    assert!(code == 11 && text.contains("shop/visitors") && text.contains("routes"), "{code} {text}");
    assert!(node.records().is_empty() && node.rules().is_empty());
    // A pod that needs no quarantine needs no routes.
    Call::new(&node, "ADD").pod(&pod).of("free").run().success();
}

#[test]
fn a_pod_that_cannot_be_quarantined_is_rejected() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.empty_pod(5);
    ip(&format!("-n {} link add eth0 type bridge", pod.name));
    let (code, text) = Call::new(&node, "ADD").pod(&pod).run().failure();
    assert!(code == 100 && text.contains("eth0") && text.contains("shop"), "{code} {text}");
    assert!(node.records().is_empty() && node.rules().is_empty());
}

#[test]
fn adding_again_changes_nothing_and_other_addresses_replace_the_first() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    for _ in 0..3 {
        Call::new(&node, "ADD").pod(&pod).run().success();
    }
    assert_eq!(node.rules().len(), 2);
    Call::new(&node, "ADD").pod(&pod).previous(r#"{"ips": [{"address": "10.244.1.77/32"}]}"#).run().success();
    assert_eq!(node.rules(), ["71: from 10.244.1.77 lookup 7873 proto 71"]);
}

#[test]
fn check_reports_differences_from_what_add_left() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let check = || Call::new(&node, "CHECK").pod(&pod);
    assert_eq!(check().run().failure().0, 101, "never added");
    Call::new(&node, "ADD").pod(&pod).run().success();
    check().run().success();
    assert_eq!(check().previous(r#"{"ips": [{"address": "10.9.9.9/32"}]}"#).run().failure().0, 101);
    assert_eq!(check().previous("null").run().failure().0, 7);
    for priority in [70, 71] {
        ip(&format!("-n {} rule delete priority {priority}", node.name));
        let (code, text) = check().run().failure();
        assert!(code == 11 && text.contains("away"), "{code} {text}");
        Call::new(&node, "ADD").pod(&pod).run().success();
        check().run().success();
    }
}

/// A runtime that gets an error reports the whole node as NotReady.
#[test]
fn status_succeeds_whatever_the_daemon_does() {
    let node = Node::new();
    let status = || Call::new(&node, "STATUS").without_variable("CNI_CONTAINERID").without_variable("CNI_IFNAME").run();
    assert_eq!(status().success(), "", "never ran");
    node.offline_policies(&["shop"]);
    assert_eq!(status().success(), "", "rebooted");
    node.prepare(&["shop"]);
    assert_eq!(status().success(), "");
    let _deaf = UnixListener::bind(node.socket()).unwrap();
    let start = Instant::now();
    assert_eq!(status().success(), "", "hangs");
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}

#[test]
fn many_plugins_run_at_once() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let add = |n: usize| {
        let result = format!(r#"{{"ips": [{{"address": "10.244.1.{}/32"}}]}}"#, n % 100 + 100);
        Call::new(&node, "ADD").pod(&pod).container(&format!("c{n}")).previous(&result)
    };
    for round in 0..2 {
        let outcomes = run_all((0..40).map(add).collect());
        assert_eq!(outcomes, 40, "round {round}");
        assert_eq!(node.rules().len(), 40);
        let dels = (0..40).map(|n| Call::new(&node, "DEL").container(&format!("c{n}"))).collect();
        assert_eq!(run_all(dels), 40);
        assert!(node.rules().is_empty() && node.records().is_empty());
    }
    // One address, passed from container to container: each new one is added while the former one is removed.
    Call::new(&node, "ADD").pod(&pod).container("a0").run().success();
    for n in 0..20 {
        let add = Call::new(&node, "ADD").pod(&pod).container(&format!("a{}", n + 1));
        assert_eq!(run_all(vec![add, Call::new(&node, "DEL").container(&format!("a{n}"))]), 2);
        assert_eq!(node.rules().len(), 2, "round {n}");
    }
}

/// Runs all calls at the same time, and returns how many succeeded.
fn run_all(calls: Vec<Call<'_>>) -> usize {
    thread::scope(|scope| {
        let running: Vec<_> = calls.into_iter().map(|call| scope.spawn(|| call.run())).collect();
        running.into_iter().map(|r| r.join().unwrap()).filter(|o| o.status == Some(0)).count()
    })
}
