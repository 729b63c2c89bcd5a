//! Two controllers: one leads, and however they overlap, no id and no address is given to two allocations. Needs
//! root.

use super::{PATIENCE, allocations};
use lab::api::NAMESPACE;
use lab::{Lab, NodeSpec, Pods, manifests};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

fn lease() -> String {
    format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/egret-controller")
}

fn holder(lab: &Lab) -> String {
    let answer = lab.api().try_ask("GET", &lease(), None);
    answer.map(|(_, lease)| lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()).unwrap_or_default()
}

/// Panics if two allocations share an id or an address.
#[track_caller]
fn assert_unique(allocations: &[Value]) {
    let mut seen: BTreeMap<String, &Value> = BTreeMap::new();
    for allocation in allocations {
        for key in ["id", "ipv4", "ipv6"] {
            let value = &allocation[key];
            if !value.is_null()
                && let Some(other) = seen.insert(format!("{key} {value}"), allocation)
            {
                panic!("{key} {value} is of two allocations: {other} and {allocation}");
            }
        }
    }
}

fn bare() -> Lab {
    let nodes = vec![NodeSpec::gateway("g1", 21, Pods::Routed), NodeSpec::gateway("g2", 22, Pods::Routed)];
    let lab = Lab::builder().kubernetes().nodes(nodes).build();
    lab.add_namespace("shop", &[]);
    let gateway =
        |name: &str, range: &str| manifests::gateway(name, &[range]).replace("default: true", "default: false");
    // They overlap in a part, which belongs to only one of them.
    lab.write_manifest("a.yaml", &gateway("a", "192.0.2.50-192.0.2.99"));
    lab.write_manifest("b.yaml", &gateway("b", "192.0.2.90-192.0.2.149"));
    lab
}

fn policy(i: usize) -> String {
    let gateway = if i.is_multiple_of(2) { "a" } else { "b" };
    manifests::policy("shop", &format!("p{i}"), &format!("gateway: {gateway}\n  podSelector: {{}}"))
}

#[test]
fn one_leads_and_the_other_takes_over() {
    let lab = bare();
    let one = lab.start_another_controller("one", 7881);
    lab.wait_until("the first leads", PATIENCE, || !holder(&lab).is_empty());
    let first = holder(&lab);
    let two = lab.start_another_controller("two", 7882);
    lab.write_manifest("p0.yaml", &policy(0));
    lab.wait_until("there is an allocation", PATIENCE, || allocations(&lab).len() == 1);
    let before = allocations(&lab);
    assert!(!two.log().contains("this controller leads"));
    // It releases its Lease, so the other one need not wait until the Lease expires.
    assert!(one.term().success());
    lab.wait_until("the second leads", Duration::from_secs(8), || !holder(&lab).is_empty() && holder(&lab) != first);
    lab.write_manifest("p1.yaml", &policy(1));
    lab.wait_until("the second gives out allocations", PATIENCE, || allocations(&lab).len() == 2);
    let after = allocations(&lab);
    assert!(before.iter().all(|allocation| after.contains(allocation)), "{before:?} {after:?}");
    // A leader that dies keeps the Lease until it expires.
    two.kill9();
    let three = lab.start_another_controller("three", 7883);
    lab.write_manifest("p2.yaml", &policy(2));
    lab.wait_until("the third leads", Duration::from_secs(40), || allocations(&lab).len() == 3);
    assert!(three.log().contains("this controller leads"));
    assert_unique(&allocations(&lab));
}

#[test]
fn overlapping_leaders_give_out_no_address_twice() {
    let lab = bare();
    let controllers = [lab.start_another_controller("one", 7881), lab.start_another_controller("two", 7882)];
    lab.wait_until("one leads", PATIENCE, || !holder(&lab).is_empty());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for i in 0.. {
                if done.load(Ordering::Relaxed) {
                    return i;
                }
                lab.write_manifest(&format!("p{}.yaml", i % 40), &policy(i % 40));
                if i % 3 == 0 && i > 6 {
                    let gone = (i - 5) % 40;
                    if i < 40 || gone % 2 == 0 {
                        lab.api().delete(&format!("/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/p{gone}"));
                    }
                }
                thread::sleep(Duration::from_millis(30));
            }
            0
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_unique(&allocations(&lab));
                thread::sleep(Duration::from_millis(5));
            }
        });
        let mut holders = Vec::new();
        for _ in 0..6 {
            // Often, because leadership may change at the same interval as the checks.
            for _ in 0..25 {
                thread::sleep(Duration::from_millis(100));
                holders.push(holder(&lab));
            }
            // The Lease is taken from its holder. The holder learns that at its next read, the other one takes it at
            // its own, and meanwhile both may assume that they lead.
            let other = json!({"spec": {"holderIdentity": ""}});
            lab.api().ask("PATCH", &lease(), Some(("application/merge-patch+json", &other)));
        }
        done.store(true, Ordering::Relaxed);
        let written = writer.join().expect("the writer");
        holders.sort();
        holders.dedup();
        holders.retain(|h| !h.is_empty());
        assert!(holders.len() > 1 && written > 100, "{holders:?}, {written} policies written");
    });
    for controller in &controllers {
        assert!(controller.log().contains("this controller leads"), "one has never led");
    }
    for i in 0..40 {
        lab.write_manifest(&format!("p{i}.yaml"), &policy(i));
    }
    lab.wait_until("every policy has its allocation", Duration::from_secs(30), || allocations(&lab).len() == 40);
    assert_unique(&allocations(&lab));
}

#[test]
fn a_controller_that_is_killed_again_and_again_leaves_no_half_allocations() {
    let lab = bare();
    for round in 0..6 {
        let controller = lab.start_another_controller("one", 7881);
        for i in 0..6 {
            lab.write_manifest(&format!("p{}.yaml", round * 6 + i), &policy(round * 6 + i));
        }
        // Somewhere between two of its writes.
        let begun = std::time::Instant::now();
        let patience = Duration::from_millis(300 + 170 * round as u64);
        while begun.elapsed() < patience {
            assert_unique(&allocations(&lab));
        }
        controller.kill9();
        // So that the next one need not wait for it.
        let gone = json!({"spec": {"holderIdentity": ""}});
        let _ = lab.api().try_ask("PATCH", &lease(), Some(("application/merge-patch+json", &gone)));
    }
    let _controller = lab.start_another_controller("one", 7881);
    lab.wait_until("every policy has its allocation", PATIENCE, || {
        assert_unique(&allocations(&lab));
        allocations(&lab).len() == 36
    });
}
