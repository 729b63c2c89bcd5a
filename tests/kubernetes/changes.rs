//! Labels, selectors and pools change while pods run. Needs root.

use super::{PATIENCE, condition};
use lab::scene::{VISITOR, assert_leaves_by_egress};
use lab::{EGRESS4, Lab, manifests};
use serde_json::json;
use std::net::Ipv4Addr;

const fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, last)
}

/// The reason and the note of every event about policies.
fn events(lab: &Lab) -> Vec<(String, String)> {
    let list = lab.api().get("/apis/events.k8s.io/v1/namespaces/shop/events");
    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
    let all = list["items"].as_array().cloned().unwrap_or_default().into_iter();
    all.filter(|e| e["regarding"]["kind"] == "EgressPolicy").map(|e| (text(&e["reason"]), text(&e["note"]))).collect()
}

#[test]
fn labels_and_selectors_change() {
    let lab = Lab::builder().kubernetes().scene();
    let node = lab.node("n1").ipv4();
    let mut pod = lab.add_pod("n1", "shop", "a", &[("app", "other")]);
    lab.wait_seen_as(&pod, node);
    // The pod's labels.
    pod.relabel(VISITOR);
    lab.wait_seen_as(&pod, EGRESS4);
    pod.relabel(&[("app", "other"), ("tier", "front")]);
    lab.wait_seen_as(&pod, node);

    // A Service's selector.
    let service = |tier: &str| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "frontend"},
               "spec": {"selector": {"tier": tier}, "ports": [{"port": 80, "protocol": "TCP"}]}})
        .to_string()
    };
    lab.write_manifest("service.yaml", &service("back"));
    let spec = "services: [frontend]\n  address: { ipv4: 192.0.2.51 }";
    lab.write_manifest("front.yaml", &manifests::policy("shop", "front", spec));
    lab.wait_until("the policy has its address", PATIENCE, || {
        condition(&lab, "shop/front", "Ready").is_some_and(|c| c.0 == "True")
    });
    lab.wait_seen_as(&pod, node);
    lab.write_manifest("service.yaml", &service("front"));
    lab.wait_seen_as(&pod, address(51));
    lab.remove_manifest("front.yaml");
    lab.wait_seen_as(&pod, node);

    // A namespace's labels.
    let cluster = "apiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: { name: sales }\nspec:\n  \
                   namespaceSelector: { matchLabels: { team: sales } }\n  \
                   podSelector: { matchLabels: { tier: front } }\n  address: { ipv4: 192.0.2.52 }\n";
    lab.write_manifest("cluster.yaml", cluster);
    lab.wait_seen_as(&pod, address(52));
    lab.add_namespace("shop", &[("team", "office")]);
    lab.wait_seen_as(&pod, node);
    lab.add_namespace("shop", &[("team", "sales")]);
    lab.wait_seen_as(&pod, address(52));
}

#[test]
fn a_gateway_loses_a_node_and_a_part_of_its_pool() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let node_of = || lab.api().egret("namespaces/shop/egresspolicies/visitors")["status"]["node"].clone();
    let holder = node_of().as_str().unwrap_or_default().to_owned();
    // A node's label is removed: another node takes its allocations.
    let mut object = manifests::node(lab.node(&holder));
    object["metadata"]["labels"]["egret.dev/gateway"] = "no".into();
    lab.manifests().write_object(&format!("node-{holder}.yaml"), &object);
    lab.wait_until("another node has the allocation", PATIENCE, || {
        node_of() != holder.as_str() && !node_of().is_null()
    });
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_until("an event tells of the move", PATIENCE, || {
        events(&lab).iter().any(|(reason, note)| reason == "AddressMoved" && note.contains(&holder))
    });
    // The pool shrinks and no longer contains the address that a policy names: the policy's condition says so, and
    // its traffic is blocked.
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.55-192.0.2.59"]));
    lab.wait_until("the policy is rejected", PATIENCE, || {
        condition(&lab, "shop/visitors", "Accepted").is_some_and(|c| c.0 == "False")
    });
    lab.wait_until("an event tells of it", PATIENCE, || {
        events(&lab).iter().any(|(reason, note)| reason == "AddressOutsidePool" && note.contains("192.0.2.50"))
    });
    lab.wait_until("nothing leaves", PATIENCE, || pod.who(lab::EXT4).is_err());
    let own = std::net::IpAddr::V4(lab.node("n1").ipv4());
    assert!(!lab.sources(lab::EXT4).contains(&own), "it has left from its node");
    lab.write_manifest(
        "gateway.yaml",
        &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]),
    );
    lab.wait_seen_as(&pod, EGRESS4);
    // The gateway is deleted while one of its nodes is down. The node removes its part when it is back.
    let holder = node_of().as_str().unwrap_or_default().to_owned();
    lab.daemon(&holder).kill9();
    lab.remove_manifest("gateway.yaml");
    let has = |name: &str| lab.node(name).ip("-4 addr show").contains("192.0.2.50/32");
    assert!(has(&holder), "the address goes only with its daemon");
    lab.daemon(&holder).restart();
    lab.wait_until("the address is gone", PATIENCE, || !has(&holder));
}

#[test]
fn a_node_reports_the_networks_inside_the_cluster() {
    let lab = Lab::builder().kubernetes().scene();
    let told = lab.api().egret("egressnodes/n1")["status"]["direct"].clone();
    let told: Vec<(String, String)> = told
        .as_array()
        .into_iter()
        .flatten()
        .map(|d| (d["network"].as_str().unwrap_or_default().into(), d["from"].as_str().unwrap_or_default().into()))
        .collect();
    let from = |network: &str| told.iter().find(|(n, _)| n == network).map(|(_, from)| from.as_str());
    assert!(from("10.244.1.0/24").or(from("10.244.2.0/23")).is_some_and(|f| f.contains("podCIDRs")), "{told:?}");
    let services = if lab.api().version() >= (1, 33) { "ServiceCIDR" } else { "API server" };
    assert!(from("10.96.0.0/16").is_some_and(|f| f.contains(services)), "{told:?}");
    // A Service without endpoints is inside all the same: its packets stay on their node.
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.forget_wire();
    assert!(pod.who("10.96.7.7".parse::<Ipv4Addr>().expect("an address")).is_err());
    let seen = lab.sources("10.96.7.7".parse::<Ipv4Addr>().expect("an address"));
    assert!(!seen.contains(&std::net::IpAddr::V4(EGRESS4)), "{seen:?}");
}

#[test]
fn a_host_that_has_a_policys_address_is_reported() {
    let lab = Lab::builder().kubernetes().scene();
    let ext = lab.host("ext");
    ext.ip_batch(&["addr add 192.0.2.57/32 dev eth0".into()]);
    let spec = "podSelector: { matchLabels: { app: late } }\n  address: { ipv4: 192.0.2.57 }";
    lab.write_manifest("late.yaml", &manifests::policy("shop", "late", spec));
    lab.wait_until("there is an event", PATIENCE, || {
        events(&lab)
            .iter()
            .any(|(reason, note)| reason == "AddressRefused" && note.contains("answers for it on the link"))
    });
    let ready = condition(&lab, "shop/late", "Ready").expect("a condition");
    assert_eq!((&*ready.0, &*ready.1), ("False", "AddressRefused"), "{}", ready.2);
    ext.ip_batch(&["addr del 192.0.2.57/32 dev eth0".into()]);
    lab.wait_until("the policy is ready", PATIENCE, || {
        condition(&lab, "shop/late", "Ready").is_some_and(|c| c.0 == "True")
    });
}
