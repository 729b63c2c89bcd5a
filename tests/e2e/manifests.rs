//! Users' mistakes do no harm: the last good state stays, and the fault is reported with its place. Needs root.

use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node, visitors};
use lab::{EGRESS4, EXT4, Lab, Pod, VISITOR, manifests};
use serde_json::Value;
use std::net::IpAddr;
use std::time::Duration;

/// Waits until a line of a daemon's log contains all of these words.
#[track_caller]
fn wait_said(lab: &Lab, daemon: &str, words: &[&str]) {
    lab.wait_until(&format!("{daemon} says {words:?}"), Duration::from_secs(10), || {
        lab.daemon(daemon).log().lines().any(|l| words.iter().all(|w| l.contains(w)))
    });
}

/// Waits until a policy has this condition (type, status, reason), and its message contains all of these words.
#[track_caller]
fn wait_condition(lab: &Lab, policy: &str, condition: [&str; 3], words: &[&str]) {
    let file = lab.manifests().path().join(format!("status/egresspolicies/{policy}.yaml"));
    let conditions = || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let object: Value = serde_saphyr::from_str(&text).unwrap_or_default();
        object["status"]["conditions"].as_array().cloned().unwrap_or_default()
    };
    let is_it = |c: &Value| {
        ["type", "status", "reason"].iter().zip(condition).all(|(field, wanted)| c[field] == wanted)
            && words.iter().all(|word| c["message"].as_str().is_some_and(|message| message.contains(word)))
    };
    let what = format!("{policy} is {condition:?} with {words:?}");
    lab.wait_until(&what, Duration::from_secs(10), || conditions().iter().any(is_it));
}

fn pods(lab: &Lab) -> [Pod; 2] {
    [lab.add_pod("n1", "shop", "visitor", VISITOR), lab.add_pod("n1", "shop", "other", &[("app", "other")])]
}

#[test]
fn an_invalid_file_keeps_its_last_good_state_and_is_reported_with_its_line() {
    let lab = Lab::scene();
    let [visitor, other] = pods(&lab);
    for broken in
        ["{ not: [yaml", "apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata: { name: x", "\u{0}\u{1}"]
    {
        lab.write_manifest("policy.yaml", broken);
        std::thread::sleep(Duration::from_millis(300));
        assert_leaves_by_egress(&visitor);
        assert_leaves_by_node(&other);
        assert_leaves_by_egress(&lab.add_pod("n1", "shop", "new", VISITOR));
        lab.write_manifest("policy.yaml", &visitors());
    }
    lab.write_manifest("policy.yaml", "# a comment\n---\n\nkind: [\n");
    for daemon in ["controller", "n1"] {
        wait_said(&lab, daemon, &["policy.yaml:4:"]);
    }
}

#[test]
fn an_invalid_document_does_not_affect_the_others() {
    let lab = Lab::scene();
    let [visitor, other] = pods(&lab);
    let wrong = manifests::policy(
        "shop",
        "wrong",
        "podSelector: {}\n  address: { ipv4: 192.0.2.51 }\n  egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/33 } }] }]",
    );
    lab.write_manifest("wrong.yaml", &wrong);
    wait_said(&lab, "controller", &["wrong.yaml:", "203.0.113.0/33"]);
    assert_leaves_by_egress(&visitor);
    assert_leaves_by_node(&other);
}

#[test]
fn pools_that_overlap_run_backwards_or_mix_families_are_rejected_with_a_reason() {
    let lab = Lab::scene();
    let [visitor, _] = pods(&lab);
    for (addresses, words) in [
        (&["192.0.2.50-192.0.2.59", "192.0.2.55"][..], &["overlap", "192.0.2.55"][..]),
        (&["192.0.2.59-192.0.2.50"], &["backwards", "192.0.2.50-192.0.2.59"]),
        (&["192.0.2.50-2001:db8::50"], &["mixes"]),
        (&["192.0.2.256"], &["192.0.2.256"]),
    ] {
        lab.write_manifest("gateway.yaml", &manifests::gateway("default", addresses));
        let words: Vec<&str> = ["gateway.yaml:"].iter().chain(words).copied().collect();
        wait_said(&lab, "controller", &words);
        assert_leaves_by_egress(&visitor);
    }
}

#[test]
fn an_ipv4_address_in_place_of_an_ipv6_one_is_rejected() {
    let lab = Lab::scene();
    let [visitor, _] = pods(&lab);
    lab.write_manifest("policy.yaml", &visitors().replace("2001:db8::50", "192.0.2.51"));
    wait_said(&lab, "controller", &["policy.yaml:7:", "IPv6"]);
    assert_leaves_by_egress(&visitor);
}

#[test]
fn a_request_that_cannot_be_met_is_a_condition_and_blocks() {
    let lab = Lab::scene();
    lab.add_namespace("office", &[("team", "back")]);
    let further =
        |name: &str, addresses: &[&str]| manifests::gateway(name, addresses).replace("default: true", "default: false");
    lab.write_manifest(
        "private.yaml",
        &(further("private", &["192.0.2.70"]) + "  namespaceSelector: { matchLabels: { team: front } }\n"),
    );
    lab.write_manifest(
        "lonely.yaml",
        &further("lonely", &["192.0.2.71"]).replace("egret.dev/gateway", "egret.dev/none"),
    );
    lab.write_manifest("full.yaml", &further("full", &["192.0.2.72"]));
    lab.write_manifest(
        "first.yaml",
        &manifests::policy("shop", "first", "gateway: full\n  podSelector: {}\n  priority: -1"),
    );
    for (name, spec, reason, words) in [
        ("outside", "address: { ipv4: 198.51.100.1 }", "AddressOutsidePool", &["198.51.100.1", "default"][..]),
        ("unknown", "gateway: absent", "GatewayUnknown", &["absent"]),
        ("taken", "address: { ipv4: 192.0.2.50 }", "AddressTaken", &["192.0.2.50", "shop/visitors"]),
        ("foreign", "gateway: private", "NamespaceNotAllowed", &["private", "office"]),
        ("nodeless", "gateway: lonely\n  allocate: Node", "NoNode", &["lonely"]),
        ("late", "gateway: full", "PoolExhausted", &["full"]),
    ] {
        lab.write_manifest("more.yaml", &manifests::policy("office", name, &format!("podSelector: {{}}\n  {spec}")));
        wait_condition(&lab, &format!("office/{name}"), ["Accepted", "False", reason], words);
        wait_condition(&lab, &format!("office/{name}"), ["Ready", "False", "NotAccepted"], &[]);
        let pod = lab.add_pod("n1", "office", name, &[]);
        lab.wait_until("the pod is blocked", Duration::from_secs(10), || pod.udp_who(EXT4).is_err());
        assert_blocked(&pod);
        if name == "foreign" {
            lab.add_namespace("office", &[("team", "front")]);
            lab.wait_seen_as(&pod, [192, 0, 2, 70]);
            wait_condition(&lab, "office/foreign", ["Ready", "True", "AddressHeld"], &[]);
        }
        pod.delete();
    }
}

#[test]
fn a_shadowed_policy_names_the_policies_that_decide() {
    let lab = Lab::scene();
    let [visitor, _] = pods(&lab);
    let all = "podSelector: { matchLabels: { app: visitor } }\n  address: { ipv4: 192.0.2.51 }\n  priority: -1";
    lab.write_manifest("all.yaml", &manifests::policy("shop", "all", all));
    wait_condition(&lab, "shop/all", ["Shadowed", "True", "Shadowed"], &["shop/visitors"]);
    assert_leaves_by_egress(&visitor);
    lab.remove_manifest("policy.yaml");
    wait_condition(&lab, "shop/all", ["Shadowed", "False", "NotShadowed"], &[]);
    lab.wait_seen_as(&visitor, [192, 0, 2, 51]);
}

#[test]
fn an_exhausted_pool_is_a_condition_and_free_addresses_are_used_at_once() {
    let lab = Lab::scene();
    let pool = |last: u8| {
        manifests::gateway("small", &[&format!("192.0.2.60-192.0.2.{last}")]).replace("default: true", "default: false")
    };
    lab.write_manifest("small.yaml", &pool(60));
    let of = |ns: &str| manifests::policy(ns, "own", "gateway: small\n  podSelector: {}");
    lab.write_manifest("first.yaml", &of("first"));
    let first = lab.add_pod("n1", "first", "pod", &[]);
    lab.wait_seen_as(&first, [192, 0, 2, 60]);
    lab.write_manifest("second.yaml", &of("second"));
    wait_condition(&lab, "second/own", ["Accepted", "False", "PoolExhausted"], &["small"]);
    let second = lab.add_pod("n1", "second", "pod", &[]);
    lab.wait_until("the second is blocked", Duration::from_secs(10), || second.udp_who(EXT4).is_err());
    assert_eq!(first.udp_who(EXT4).ok(), Some(IpAddr::from([192, 0, 2, 60])));
    lab.write_manifest("small.yaml", &pool(61));
    wait_condition(&lab, "second/own", ["Accepted", "True", "Accepted"], &["192.0.2.61"]);
    lab.wait_seen_as(&second, [192, 0, 2, 61]);
    assert_eq!(first.udp_who(EXT4).ok(), Some(IpAddr::from([192, 0, 2, 60])));
}

#[test]
fn every_policy_keeps_its_egress_ip_when_the_controller_is_killed() {
    let lab = Lab::scene();
    lab.write_manifest("own.yaml", &manifests::policy("office", "own", "podSelector: {}"));
    let pod = lab.add_pod("n2", "office", "clerk", &[]);
    lab.wait_until("the clerk has its address", Duration::from_secs(10), || {
        pod.who(EXT4).is_ok_and(|a| a != IpAddr::from(pod.node.ipv4()))
    });
    let before = pod.who(EXT4).expect("an address");
    assert_ne!(before, IpAddr::from(EGRESS4));
    for _ in 0..3 {
        lab.daemon("controller").kill9();
        assert_eq!(pod.who(EXT4).ok(), Some(before), "with the controller away");
        lab.daemon("controller").restart();
        lab.wait_ready("controller");
        assert_eq!(pod.who(EXT4).ok(), Some(before));
    }
}

/// Nobody knows its last good state then. Its pods must not be opened for that reason.
#[test]
fn a_policy_that_is_invalid_when_daemons_start_keeps_its_pods_and_its_egress_ip() {
    let lab = Lab::scene();
    let [visitor, other] = pods(&lab);
    let path = lab.egress_id("shop/visitors");
    lab.write_manifest("policy.yaml", &visitors().replace("spec:", "sepc:"));
    for daemon in ["n1", "controller"] {
        lab.daemon(daemon).kill9();
        lab.daemon(daemon).restart();
        lab.wait_ready(daemon);
    }
    wait_said(&lab, "n1", &["shop/visitors", "in no readable file"]);
    for _ in 0..10 {
        assert_leaves_by_egress(&visitor);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_leaves_by_egress(&lab.add_pod("n1", "shop", "new", VISITOR));
    assert_eq!(lab.egress_id("shop/visitors"), path);
    let elsewhere = lab.add_pod("n1", "office", "elsewhere", VISITOR);
    assert_leaves_by_node(&elsewhere);
    // Corrected, it selects the same pods.
    lab.write_manifest("policy.yaml", &visitors());
    lab.wait_seen_as(&other, other.node.ipv4());
    assert_leaves_by_node(&other);
    assert_leaves_by_egress(&visitor);
    assert_eq!(lab.egress_id("shop/visitors"), path);
}

/// Nobody withdraws the report of a node that was switched off, but Kubernetes sets its condition `Ready` to
/// `Unknown`.
#[test]
fn a_policy_whose_gateway_nodes_are_not_ready_for_kubernetes_is_not_ready() {
    let lab = Lab::scene();
    let ready =
        |status, reason, words: &[&str]| wait_condition(&lab, "shop/visitors", ["Ready", status, reason], words);
    ready("True", "AddressHeld", &["192.0.2.50"]);
    let reports = |node: &str, ready: &str| {
        let mut object = manifests::node(lab.node(node));
        object["status"]["conditions"] = serde_json::json!([{"type": "Ready", "status": ready}]);
        lab.manifests().write_object(&format!("node-{node}.yaml"), &object);
    };
    for node in ["g1", "g2"] {
        lab.daemon(node).kill9();
    }
    reports("g1", "Unknown");
    std::thread::sleep(Duration::from_millis(300));
    ready("True", "AddressHeld", &["192.0.2.50"]);
    reports("g2", "Unknown");
    ready("Unknown", "NodeStatusUnknown", &["192.0.2.50", "see whether it runs"]);
    // Its kubelet reports another problem, so the node lives.
    reports("g2", "False");
    ready("True", "AddressHeld", &["192.0.2.50"]);
}
