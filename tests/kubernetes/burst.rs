//! Many objects at once. Needs root.

use super::PATIENCE;
use lab::{Lab, NodeSpec, Pods, manifests};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const POLICIES: usize = 1000;
const PODS: usize = 2000;

#[test]
fn a_thousand_policies_and_two_thousand_pods_at_once() {
    let nodes = vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)];
    let lab = Lab::builder().kubernetes().nodes(nodes).build();
    lab.add_namespace("shop", &[]);
    let gateway = manifests::gateway("default", &["198.18.0.0-198.18.3.255"]) + "  interface: eth0\n";
    lab.write_manifest("gateway.yaml", &gateway);
    lab.start();
    let begun = Instant::now();
    for i in 0..PODS {
        let app = format!("app-{}", i % POLICIES);
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": format!("pod-{i}"), "labels": {"app": app}},
            "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "example.org/none"}]}});
        lab.api().ask("POST", "/api/v1/namespaces/shop/pods", Some(("application/json", &pod)));
        if i % 2 == 0 {
            let i = i / 2;
            let spec = json!({"podSelector": {"matchLabels": {"app": format!("app-{i}")}}});
            let policy = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
                "metadata": {"namespace": "shop", "name": format!("policy-{i}")}, "spec": spec});
            let path = "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies";
            lab.api().ask("POST", path, Some(("application/json", &policy)));
        }
    }
    eprintln!("created in {:.1?}", begun.elapsed());
    let told = || {
        let list = lab.api().egret("namespaces/shop/egresspolicies");
        let is_ready = |p: &Value| {
            let conditions = p["status"]["conditions"].as_array();
            conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
        };
        let is_right =
            |p: &&Value| p["status"]["pods"] == 2 && p["status"]["addresses"]["ipv4"].is_string() && is_ready(p);
        list["items"].as_array().into_iter().flatten().filter(is_right).count()
    };
    lab.wait_until("every policy has been told of its address, its pods and its node", 6 * PATIENCE, || {
        std::thread::sleep(Duration::from_millis(500));
        told() == POLICIES
    });
    eprintln!("all told after {:.1?}", begun.elapsed());
    // This number of allocations is written as text.
    let gateway = lab.api().egret("egressgateways/default");
    let text = gateway["status"]["text"].as_str().unwrap_or_default();
    let lines = text.lines().filter(|line| line.contains(" shop/policy-")).count();
    assert!(lines == POLICIES && super::allocations(&lab).is_empty(), "{}", gateway["status"]);
    let labels = [("object", "policy"), ("result", "ok")];
    let writes = || lab.metrics("controller").get("egret_status_writes_total", &labels).unwrap_or(0.0);
    // Each policy: an egress IP, a first pod, a second pod, and the node that holds the egress IP.
    let before = writes();
    assert!(before <= 5.0 * POLICIES as f64, "{before} statuses were written");
    std::thread::sleep(Duration::from_secs(3));
    // Nothing changes, except that the last addresses are added.
    lab.wait_until("it is quiet", PATIENCE, || {
        let now = writes();
        std::thread::sleep(Duration::from_secs(2));
        writes() == now
    });
    // Without changes, nothing is computed.
    let passes = || {
        lab.metrics("controller").get("egret_allocation_duration_seconds_count", &[]).expect("a count of allocations")
    };
    let before = passes();
    std::thread::sleep(Duration::from_secs(3));
    assert!(passes() - before <= 2.0, "{} passes in three quiet seconds", passes() - before);
}
