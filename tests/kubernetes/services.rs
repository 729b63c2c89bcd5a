//! The addresses of Services as egress IPs, with a real API server: who announces them, and kube-vip's annotations. Needs
//! root.

use super::{PATIENCE, condition, documents};
use lab::{Lab, manifests};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};

const WEB: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
const SERVICE: &str = "/api/v1/namespaces/shop/services/web";
const MERGE: &str = "application/merge-patch+json";

const GATEWAY: &str = "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: { name: load-balancers }\nspec:\n  \
                       nodeSelector: {}\n  placement: External\n  addresses: [192.0.2.192/26]\n";

fn annotate(lab: &Lab, annotations: &Value) {
    lab.api().ask("PATCH", SERVICE, Some((MERGE, &json!({"metadata": {"annotations": annotations}}))));
}

/// The Service, with the address that its load balancer has given it.
fn make_service(lab: &Lab) {
    lab.add_namespace("shop", &[]);
    lab.write_manifest("gateway.yaml", GATEWAY);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": "web"},
                         "spec": {"type": "LoadBalancer", "selector": {"app": "web"},
                                  "ports": [{"port": 80, "protocol": "TCP"}]}});
    lab.api().apply(&service);
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": WEB}]}}});
    lab.api().ask("PATCH", &format!("{SERVICE}/status"), Some((MERGE, &status)));
}

fn policy_node(lab: &Lab) -> Option<String> {
    let policy = lab.api().egret("namespaces/shop/egresspolicies/web");
    policy["status"]["node"].as_str().map(str::to_owned)
}

/// MetalLB's definition, as far as it matters.
fn define_l2_statuses(lab: &Lab) {
    let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "servicel2statuses.metallb.io"},
        "spec": {"group": "metallb.io", "scope": "Namespaced",
                 "names": {"kind": "ServiceL2Status", "plural": "servicel2statuses", "singular": "servicel2status"},
                 "versions": [{"name": "v1beta1", "served": true, "storage": true, "subresources": {"status": {}},
                               "schema": {"openAPIV3Schema": open}}]}});
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    lab.api().ask("POST", path, Some(("application/json", &definition)));
    let is_served = || {
        let list = lab.api().try_ask("GET", "/apis/metallb.io/v1beta1/servicel2statuses", None);
        list.is_ok_and(|(code, _)| code.is_success())
    };
    lab.wait_until("MetalLB's objects are served", PATIENCE, is_served);
}

fn announced_by_metallb(lab: &Lab, node: &str) {
    let collection = "/apis/metallb.io/v1beta1/namespaces/default/servicel2statuses";
    let object = json!({"apiVersion": "metallb.io/v1beta1", "kind": "ServiceL2Status", "metadata": {"name": "l2-x7"}});
    lab.api().ask("POST", collection, Some(("application/json", &object)));
    let status = json!({"status": {"node": node, "serviceName": "web", "serviceNamespace": "shop"}});
    lab.api().ask("PATCH", &format!("{collection}/l2-x7/status"), Some((MERGE, &status)));
}

#[test]
fn the_owner_follows_what_load_balancers_say() {
    let lab = Lab::builder().kubernetes().build();
    define_l2_statuses(&lab);
    make_service(&lab);
    let spec = "podSelector: {}\n  address: { service: { name: web } }";
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "web", spec));
    lab.start();
    lab.wait_until("the status says that nobody announces it", PATIENCE, || {
        condition(&lab, "shop/web", "Ready").is_some_and(|(_, reason, _)| reason == "AddressNotAnnounced")
    });
    let owner = |node: &str| {
        lab.wait_for("the policy's node", &Some(node.to_owned()), || policy_node(&lab));
        lab.wait_until("it is ready", PATIENCE, || {
            condition(&lab, "shop/web", "Ready").is_some_and(|(status, ..)| status == "True")
        });
    };
    let lease = |holder: &str| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
               "metadata": {"namespace": "kube-system", "name": "cilium-l2announce-shop-web"},
               "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15}})
    };
    for node in ["g1", "n1"] {
        lab.api().apply(&lease(node));
        owner(node);
    }
    announced_by_metallb(&lab, "g2");
    owner("g2");
    annotate(&lab, &json!({"kube-vip.io/vipHost": "n2"}));
    owner("n2");
    // A node has it on an interface.
    lab.node("g1").ip(&format!("addr add {WEB}/32 dev eth0"));
    owner("g1");
    let pod = lab.add_pod("n1", "shop", "visitor", &[]);
    lab.wait_seen_as(&pod, WEB);
    let columns = lab.api().columns("/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/web");
    assert_eq!(columns["IPv4"], WEB.to_string());
    // The load balancer takes the address away.
    let status = json!({"status": {"loadBalancer": {"ingress": null}}});
    lab.api().ask("PATCH", &format!("{SERVICE}/status"), Some((MERGE, &status)));
    lab.wait_until("the status says that the Service has none", PATIENCE, || {
        condition(&lab, "shop/web", "Accepted").is_some_and(|(_, reason, _)| reason == "ServiceWithoutAddress")
    });
    lab.wait_until("the pod is blocked", PATIENCE, || pod.udp_who(lab::EXT4).is_err());
}

#[test]
fn annotations_of_kube_vip_make_policies_that_the_service_owns() {
    let lab = Lab::builder().kubernetes().controller_arguments(&["--kube-vip-annotations"]).build();
    for object in documents(include_str!("../../install/kube-vip-annotations.yaml")) {
        lab.api().apply(&object);
    }
    make_service(&lab);
    annotate(&lab, &json!({"kube-vip.io/egress": "true", "kube-vip.io/egress-destination-ports": "tcp:8080"}));
    lab.start();
    let path = "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/web";
    let policy = || lab.api().try_ask("GET", path, None).ok().filter(|(code, _)| code.is_success()).map(|(_, p)| p);
    lab.wait_until("there is a policy", PATIENCE, || policy().is_some());
    let made = policy().expect("a policy");
    assert_eq!(made["spec"]["address"]["service"]["name"], "web", "{made}");
    assert_eq!(made["spec"]["egress"][0]["ports"], json!([{"protocol": "TCP", "port": 8080}]), "{made}");
    let owner = &made["metadata"]["ownerReferences"][0];
    assert_eq!(owner["uid"], lab.api().get(SERVICE)["metadata"]["uid"], "{made}");
    lab.node("g1").ip(&format!("addr add {WEB}/32 dev eth0"));
    let pod = lab.add_pod("n2", "shop", "web", &[("app", "web")]);
    lab.wait_seen_as(&pod, WEB);
    // Another port is not covered.
    annotate(&lab, &json!({"kube-vip.io/egress-destination-ports": "tcp:9"}));
    lab.wait_seen_as(&pod, IpAddr::from(pod.node.ipv4()));
    annotate(&lab, &json!({"kube-vip.io/egress-destination-ports": null}));
    lab.wait_seen_as(&pod, WEB);
    annotate(&lab, &json!({"kube-vip.io/egress": "false"}));
    lab.wait_until("the policy is gone", PATIENCE, || policy().is_none());
    // A person's policy of that name stays as it is, and the Service has an event.
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "web", "podSelector: {}\n  action: Direct"));
    annotate(&lab, &json!({"kube-vip.io/egress": "true"}));
    let told = || {
        let list = lab.api().get("/apis/events.k8s.io/v1/namespaces/shop/events");
        list["items"].as_array().into_iter().flatten().any(|event| {
            event["regarding"]["kind"] == "Service"
                && event["note"].as_str().is_some_and(|note| note.contains("rename"))
        })
    };
    lab.wait_until("the Service has an event", PATIENCE, told);
    assert_eq!(policy().expect("it is there")["spec"]["action"], "Direct");
}
