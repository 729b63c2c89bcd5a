//! Defaults: teams that write no policies ask for a gateway by an annotation, and a namespace has a gateway for policies that name
//! none; policies share a pool. Needs root.

use lab::fault_injection::plugged;
use lab::scene::assert_blocked;
use lab::{Lab, Pod, manifests};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

/// The egress IP of all who ask.
const SHARED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 50);
const ASKS: &str = "egret.dev/egress-gateway";

/// What the administrator writes once: namespaces of team sales may ask.
fn policies() -> String {
    let policy = |name: &str, namespaces: &str, pods: &str, priority: u8| {
        format!(
            "---\napiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{ name: {name} }}\nspec:\n  \
             namespaceSelector: {{ matchLabels: {{ team: sales{namespaces} }} }}\n  \
             podSelector: {{ matchLabels: {{ {pods} }} }}\n  gateway: default\n  allocate: Shared\n  \
             tier: Baseline\n  priority: {priority}\n"
        )
    };
    let asked = format!("{ASKS}: default");
    policy("asked-by-pods", "", &asked, 1) + &policy("asked-by-namespaces", &format!(", {asked}"), "", 0)
}

fn write_namespace(lab: &Lab, name: &str, labels: manifests::Labels, annotations: Value) {
    let mut object = manifests::namespace(name, labels);
    object["metadata"]["annotations"] = annotations;
    lab.add_namespace(name, labels);
    lab.manifests().write_object(&format!("namespace-{name}.yaml"), &object);
}

fn annotate(lab: &Lab, pod: &Pod, annotations: Value) {
    let mut object =
        manifests::pod(&pod.node.name, &pod.namespace, &pod.name, &pod.uid, &[("app", "web")], &pod.addresses);
    object["metadata"]["annotations"] = annotations;
    lab.manifests().write_object(&format!("pod-{}-{}.yaml", pod.namespace, pod.name), &object);
}

#[test]
fn pods_and_namespaces_ask_for_a_gateway_by_an_annotation() {
    let lab = Lab::new();
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50-192.0.2.59"]));
    lab.write_manifest("asked.yaml", &policies());
    let sales: manifests::Labels = &[("team", "sales")];
    write_namespace(&lab, "shop", sales, json!({}));
    write_namespace(&lab, "office", &[("team", "office")], json!({}));
    lab.start();
    let pods = ["n1", "n2"].map(|node| lab.add_pod(node, "shop", &format!("web-{node}"), &[("app", "web")]));
    let other = lab.add_pod("n1", "office", "web", &[("app", "web")]);
    let own = |pod: &Pod| IpAddr::from(pod.node.ipv4());
    for pod in pods.iter().chain([&other]) {
        lab.wait_seen_as(pod, own(pod));
        annotate(&lab, pod, json!({ASKS: "default"}));
    }
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, SHARED));
    lab.wait_seen_as(&other, own(&other));
    // Another gateway's name is no request to this one.
    annotate(&lab, &pods[0], json!({ASKS: "another"}));
    lab.wait_seen_as(&pods[0], own(&pods[0]));
    pods.iter().for_each(|pod| annotate(&lab, pod, json!({})));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, own(pod)));
    // A whole namespace.
    write_namespace(&lab, "shop", sales, json!({ASKS: "default"}));
    write_namespace(&lab, "office", &[("team", "office")], json!({ASKS: "default"}));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, SHARED));
    let late = lab.add_pod("g1", "shop", "late", &[]);
    assert_eq!(late.who(lab::EXT4).ok(), Some(SHARED.into()), "from its first packet on");
    lab.wait_seen_as(&other, own(&other));
    write_namespace(&lab, "shop", sales, json!({}));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, own(pod)));
}

#[test]
fn a_gateway_alone_lets_pods_and_namespaces_ask_for_it() {
    let lab = Lab::new();
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    let write = |more: &str| lab.write_manifest("gateway.yaml", &format!("{gateway}{more}"));
    let allowed = "  optIn: true\n  namespaceSelector: { matchLabels: { team: sales } }\n";
    write(allowed);
    let sales: manifests::Labels = &[("team", "sales")];
    write_namespace(&lab, "shop", sales, json!({}));
    write_namespace(&lab, "office", &[("team", "office")], json!({ASKS: "default"}));
    lab.start();
    let pods = ["n1", "n2", "g1"].map(|node| lab.add_pod(node, "shop", &format!("web-{node}"), &[("app", "web")]));
    let other = lab.add_pod("n1", "office", "web", &[("app", "web")]);
    let own = |pod: &Pod| IpAddr::from(pod.node.ipv4());
    let shared6: IpAddr = "2001:db8::50".parse().expect("an address");
    for pod in pods.iter().chain([&other]) {
        lab.wait_seen_as(pod, own(pod));
        annotate(&lab, pod, json!({ASKS: "default"}));
    }
    for pod in &pods {
        lab.wait_seen_as(pod, SHARED);
        lab.wait_seen_as(pod, shared6);
    }
    lab.wait_seen_as(&other, own(&other));
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let why = |pod: &str| {
        let output = Command::new(lab::places::program("egretd")).args(["why", pod, "--cluster", &cluster]).output();
        String::from_utf8_lossy(&output.expect("egretd").stdout).into_owned()
    };
    assert!(why("office/web").contains("in vain: its namespaceSelector"), "{}", why("office/web"));
    assert!(why("shop/web-n1").contains("EgressGateway default, which may be asked for"), "{}", why("shop/web-n1"));
    let status = || std::fs::read_to_string(lab.manifests().path().join("status/egressgateways/default.yaml"));
    lab.wait_until("the gateway's status counts the pods", std::time::Duration::from_secs(15), || {
        status().is_ok_and(|text| text.contains("optIn:") && text.contains("pods: 3") && text.contains("AddressHeld"))
    });

    // A daemon that was restarted knows it, and so does a pod's first packet.
    lab.daemon("n1").kill9();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    pods.iter().for_each(|pod| assert_eq!(pod.who(lab::EXT4).ok(), Some(SHARED.into()), "{}", pod.name));
    // A whole namespace, and a policy that goes first.
    pods.iter().for_each(|pod| annotate(&lab, pod, json!({})));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, own(pod)));
    write_namespace(&lab, "shop", sales, json!({ASKS: "default"}));
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, SHARED));
    let late = lab.add_pod("g2", "shop", "late", &[]);
    assert_eq!(late.who(lab::EXT4).ok(), Some(SHARED.into()), "from its first packet on");
    let spec = "podSelector: {}\n  address: { ipv4: 192.0.2.57 }";
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "web", spec));
    lab.wait_seen_as(&late, Ipv4Addr::new(192, 0, 2, 57));
    lab.remove_manifest("policy.yaml");
    lab.wait_seen_as(&late, SHARED);

    // All gateway nodes are dead: nothing leaves as the node.
    for node in ["g1", "g2"] {
        plugged(&lab, node, false);
    }
    std::thread::sleep(std::time::Duration::from_secs(2));
    pods[..2].iter().for_each(assert_blocked);
    for node in ["g1", "g2"] {
        plugged(&lab, node, true);
    }
    lab.wait_seen_as(&pods[0], SHARED);
    // It is taken back.
    write("");
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, own(pod)));
    write(allowed);
    pods.iter().for_each(|pod| lab.wait_seen_as(pod, SHARED));
}

#[test]
fn a_namespace_has_a_gateway_for_policies_that_name_none() {
    let lab = Lab::new();
    let second = manifests::gateway("second", &["192.0.2.70-192.0.2.79"]).replace("default: true", "default: false");
    let first = manifests::gateway("default", &["192.0.2.50-192.0.2.59"]);
    lab.write_manifest("gateways.yaml", &format!("{first}---\n{second}"));
    write_namespace(&lab, "shop", &[], json!({"egret.dev/default-gateway": "second"}));
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "web", "podSelector: {}"));
    lab.start();
    let pod = lab.add_pod("n1", "shop", "web", &[]);
    lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 70));
    write_namespace(&lab, "shop", &[], json!({}));
    lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 50));
    // A label says the same.
    write_namespace(&lab, "shop", &[("egret.dev/default-gateway", "second")], json!({}));
    lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 70));
}

#[test]
fn policies_share_the_egress_ips_of_a_pool_when_none_is_left() {
    let lab = Lab::new();
    lab.write_manifest(
        "gateway.yaml",
        &manifests::gateway("default", &["192.0.2.50-192.0.2.51", "2001:db8::50-2001:db8::51"]),
    );
    let policy = |namespace: &str| {
        lab.write_manifest(
            &format!("policy-{namespace}.yaml"),
            &manifests::policy(namespace, "all", "podSelector: {}\n  allocate: Pooled"),
        );
    };
    lab.start();
    let pods: Vec<Pod> = ["first", "second", "third"]
        .into_iter()
        .map(|namespace| {
            policy(namespace);
            let pod = lab.add_pod("n1", namespace, "web", &[]);
            lab.wait_until("the pod leaves", std::time::Duration::from_secs(10), || {
                pod.who(lab::EXT4).is_ok_and(|seen| seen != IpAddr::from(pod.node.ipv4()))
            });
            pod
        })
        .collect();
    let seen = |pod: &Pod| [pod.who(lab::EXT4).ok(), pod.who(lab::EXT6).ok()];
    let [first, second, third] = [0, 1, 2].map(|n| seen(&pods[n]));
    assert!(first != second && first.iter().chain(&second).all(Option::is_some), "{first:?} and {second:?}");
    assert!(third == first || third == second, "{third:?}");
}

#[test]
fn policies_that_name_no_egress_ip_leave_from_the_default_address_of_the_gateway() {
    let lab = Lab::new();
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    let default = "  defaultAddress: { ipv4: 192.0.2.57, ipv6: \"2001:db8::57\" }\n";
    lab.write_manifest("gateway.yaml", &format!("{gateway}{default}"));
    for namespace in ["first", "second"] {
        lab.add_namespace(namespace, &[]);
        let file = format!("policy-{namespace}.yaml");
        lab.write_manifest(&file, &manifests::policy(namespace, "all", "podSelector: {}"));
    }
    lab.write_manifest("own.yaml", &manifests::policy("third", "all", "podSelector: {}\n  allocate: Dedicated"));
    lab.start();
    let [first, second, own] =
        [("n1", "first"), ("g1", "second"), ("n2", "third")].map(|(node, of)| lab.add_pod(node, of, "web", &[]));
    let default6: IpAddr = "2001:db8::57".parse().expect("an address");
    for pod in [&first, &second] {
        lab.wait_seen_as(pod, Ipv4Addr::new(192, 0, 2, 57));
        lab.wait_seen_as(pod, default6);
    }
    lab.wait_seen_as(&own, Ipv4Addr::new(192, 0, 2, 50));
    // Without it, each policy has an egress IP of its own.
    lab.write_manifest("gateway.yaml", &gateway);
    let seen = |pod: &Pod| pod.who(lab::EXT4).ok();
    lab.wait_until("each has its own", std::time::Duration::from_secs(10), || {
        let [first, second] = [seen(&first), seen(&second)];
        let are_egress_ips =
            [first, second].map(|seen| seen.is_some_and(|seen| seen.to_string().starts_with("192.0.2.5")));
        are_egress_ips == [true, true] && first != second
    });
}
