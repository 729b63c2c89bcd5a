//! A created object takes effect. Needs root.

use lab::api::Role;
use lab::scene::{VISITOR, assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::{EGRESS4, EXT4, Lab};
use std::time::Duration;

#[test]
fn a_pod_leaves_from_the_address_of_its_policy() {
    let lab = Lab::builder().kubernetes().scene();
    for node in ["n1", "n2", "g1"] {
        let pod = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        assert_leaves_by_egress(&pod);
        let other = lab.add_pod(node, "shop", &format!("other-{node}"), &[("app", "other")]);
        assert_leaves_by_node(&other);
    }
    let policy = lab.api().get("/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/visitors");
    assert_eq!(policy["status"]["addresses"]["ipv4"], EGRESS4.to_string(), "{policy}");
    lab.wait_until("the policy says how many pods it selects", Duration::from_secs(15), || {
        let policy = lab.api().get("/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/visitors");
        policy["status"]["pods"] == 3
    });
    for (to, told) in [
        (EXT4.to_string(), format!("{EXT4} leaves from {EGRESS4}: EgressPolicy shop/visitors decides")),
        // A Service's backend.
        ("10.96.0.1".into(), "10.96.0.1 goes direct: it is in 10.96.".into()),
        ("10.244.2.9".into(), "goes direct".into()),
    ] {
        let kubeconfig = lab.api().kubeconfig(Role::Node);
        let why = lab.host("api").run([
            env!("CARGO_BIN_EXE_egretd"),
            "why",
            "shop/visitor-n1",
            "--to",
            &to,
            "--cluster",
            "kube",
            "--kubeconfig",
            &kubeconfig.display().to_string(),
        ]);
        assert!(why.contains(&told), "{told:?} is not in {why}");
    }

    // A pod that the API server does not know is isolated until it does.
    let mut unknown = lab.sandbox_unknown("n1", "shop", "unknown");
    unknown.attach().expect("ADD of a pod that is not known yet");
    assert_blocked(&unknown);
}

#[test]
fn kubectl_get_shows_numbers() {
    let lab = Lab::builder().kubernetes().scene();
    for (node, name) in [("n1", "one"), ("n2", "two"), ("n2", "three")] {
        assert_leaves_by_egress(&lab.add_pod(node, "shop", name, VISITOR));
    }
    let kinds = ["egressgateways/default", "namespaces/shop/egresspolicies/visitors", "egressnodes/g1"];
    let path = |kind: &str| format!("/apis/egret.dev/v1alpha1/{kind}");
    let [gateway, policy, node] = kinds.map(path);
    lab.wait_until("the statuses count pods and nodes", Duration::from_secs(30), || {
        lab.api().get(&policy)["status"]["pods"] == 3 && lab.api().get(&gateway)["status"]["readyNodes"] == 2
    });
    let assert_shows = |path: &str, cells: &[(&str, &str)]| {
        let columns = lab.api().columns(path);
        for (name, cell) in cells {
            assert_eq!(columns.get(*name).map(String::as_str), Some(*cell), "{name} in {columns:?}");
        }
        columns
    };
    let ready = [("Ready", "True"), ("Nodes", "2"), ("Nodes Ready", "2")];
    assert_shows(&gateway, &[&ready[..], &[("IPv4", "10"), ("IPv4 Used", "1"), ("IPv6 Used", "1")]].concat());
    let columns = assert_shows(&policy, &[("Pods", "3"), ("Ready", "True")]);
    let is_age = |text: &str| text.ends_with(['s', 'm']) && text.starts_with(|c: char| c.is_ascii_digit());
    assert!(is_age(&columns["Since"]), "{columns:?}");
    let by_node = &lab.api().get(&policy)["status"]["podsByNode"];
    assert_eq!(*by_node, serde_json::json!([{"node": "n1", "pods": 1}, {"node": "n2", "pods": 2}]));
    let columns = assert_shows(&node, &[("Version", env!("CARGO_PKG_VERSION"))]);
    assert!(is_age(&columns["In Sync"]), "{columns:?}");
}
