//! Rejected objects and requests, and how users are informed. Needs root.

use super::{PATIENCE, condition, condition_of};
use lab::api::Role;
use lab::scene::{VISITOR, assert_leaves_by_egress};
use lab::{EGRESS4, Lab, manifests};
use serde_json::json;

#[test]
fn an_object_that_bypassed_validation_affects_no_other() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    // Host bits: the API server's formats and rules do not detect them.
    let spec = "podSelector: {}\n  egress: [{ to: [{ ipBlock: { cidr: 203.0.113.7/24 } }] }]";
    lab.write_manifest("wrong.yaml", &manifests::policy("shop", "wrong", spec));
    lab.wait_until("the policy is told", PATIENCE, || {
        condition(&lab, "shop/wrong", "Accepted").is_some_and(|(status, reason, message)| {
            status == "False" && reason == "Invalid" && message.contains("203.0.113.7/24")
        })
    });
    lab.wait_until("the node says so", PATIENCE, || lab.daemon("n1").log().contains("EgressPolicy shop/wrong"));
    assert_leaves_by_egress(&pod);
    // Daemons that start while it is there.
    lab.daemon("n1").restart();
    lab.daemon("controller").restart();
    lab.wait_ready("n1");
    lab.wait_ready("controller");
    assert_leaves_by_egress(&pod);
    let right = "podSelector: {}\n  egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24 } }] }]";
    lab.write_manifest("wrong.yaml", &manifests::policy("shop", "wrong", right));
    lab.wait_until("it is right now", PATIENCE, || {
        condition(&lab, "shop/wrong", "Accepted").is_some_and(|c| c.0 == "True")
    });
}

#[test]
fn a_daemon_without_rights_logs_the_remedy() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.daemon("n1").kill9();
    let mut arguments = lab.node_daemon_arguments("n1");
    let at = arguments.iter().position(|a| a == "--kubeconfig").expect("a kubeconfig") + 1;
    arguments[at] = lab.api().kubeconfig(Role::Nobody).display().to_string();
    let daemon = lab.start_daemon("n1", lab.node("n1"), arguments);
    lab.wait_until("it says so", PATIENCE, || daemon.log().contains("install/rbac.yaml"));
    assert!(!lab.ready("n1"));
    // It has removed nothing.
    assert_leaves_by_egress(&pod);
    daemon.kill9();
    lab.start_node("n1");
    lab.wait_ready("n1");
    lab.wait_seen_as(&pod, EGRESS4);
}

#[test]
fn nodes_and_controllers_have_only_the_rights_that_they_use() {
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    let may = |role: Role, verb: &str, group: &str, resource: &str, subresource: &str, namespace: &str| {
        let user = match role {
            Role::Node => "system:serviceaccount:egret-system:egret-node",
            _ => "system:serviceaccount:egret-system:egret-controller",
        };
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {
            "user": user, "groups": ["system:serviceaccounts"],
            "resourceAttributes": {"verb": verb, "group": group, "resource": resource, "subresource": subresource,
                                   "namespace": namespace}}});
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        lab.api().ask("POST", path, Some(("application/json", &review)))["status"]["allowed"] == true
    };
    for role in [Role::Node, Role::Controller] {
        for verb in ["list", "watch"] {
            assert!(may(role, verb, "", "pods", "", "") && may(role, verb, "egret.dev", "egresspolicies", "", ""));
        }
        for verb in ["create", "update", "patch", "delete"] {
            assert!(!may(role, verb, "", "pods", "", "shop"));
            // A node removes its taint.
            assert_eq!(may(role, verb, "", "nodes", "", ""), role == Role::Node && verb == "patch", "{verb}");
            assert!(!may(role, verb, "egret.dev", "egresspolicies", "", "shop"));
        }
        assert!(!may(role, "get", "", "secrets", "", "shop") && !may(role, "list", "", "configmaps", "", ""));
    }
    assert!(may(Role::Node, "patch", "egret.dev", "egressnodes", "status", ""));
    assert!(!may(Role::Node, "patch", "egret.dev", "egressgateways", "status", ""));
    assert!(!may(Role::Node, "create", "", "services", "", "shop"));
    assert!(may(Role::Controller, "patch", "egret.dev", "egressgateways", "status", ""));
    assert!(!may(Role::Controller, "patch", "egret.dev", "egressnodes", "status", ""));
}

#[test]
fn the_api_server_rejects_invalid_objects() {
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    lab.add_namespace("shop", &[]);
    let policy = |spec: serde_json::Value| {
        let object = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
                            "metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
        lab.api().try_apply(&object)
    };
    // By formats, in every version.
    for address in ["192.0.2", "2001:db8::1"] {
        let said = policy(json!({"podSelector": {}, "address": {"ipv4": address}})).expect_err("not an IPv4 address");
        assert!(said.contains("ipv4"), "{said}");
    }
    let cidr = json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.0"}}]}]});
    policy(cidr).expect_err("no network");
    policy(json!({"podSelector": {}, "egress": [{"ports": [{"port": 70000}]}]})).expect_err("no port");
    let both = json!({"podSelector": {}, "services": ["frontend"]});
    if lab.api().version() >= (1, 25) {
        let said = policy(both).expect_err("two ways to say which pods");
        assert!(said.contains("either podSelector"), "{said}");
    } else {
        eprintln!("this API server is older than 1.25 and passes CEL rules over: they are tested by themselves only");
        policy(both).expect("the rule is passed over");
    }
    policy(json!({"podSelector": {}, "address": {"ipv4": "192.0.2.50"}})).expect("a good policy");
}

#[test]
fn an_invalid_gateway_has_a_condition_and_affects_no_other() {
    let lab = Lab::builder().kubernetes().scene();
    let pods = ["n1", "n2"].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    // Two ranges that overlap: the API server's formats and rules do not detect that.
    lab.write_manifest(
        "gateway.yaml",
        &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59", "192.0.2.55"]),
    );
    let told = |what: &'static str| {
        lab.wait_until(what, PATIENCE, || {
            condition_of(&lab.api().egret("egressgateways/default"), "Accepted").is_some_and(|(_, reason, message)| {
                reason == "Invalid" && message.contains("overlap") && message.contains(what)
            })
        });
    };
    told("its last good state is used");
    // Before the controller is restarted: an event is sent once.
    let of_gateway = |e: &serde_json::Value| e["regarding"]["kind"] == "EgressGateway" && e["reason"] == "Invalid";
    lab.wait_until("an event tells of it", PATIENCE, || {
        let events = lab.api().get("/apis/events.k8s.io/v1/events")["items"].as_array().cloned().unwrap_or_default();
        events.iter().any(of_gateway)
    });
    pods.iter().for_each(assert_leaves_by_egress);
    // Daemons that start now do not know its last valid state.
    for daemon in ["controller", "n1", "n2", "g1", "g2"] {
        lab.daemon(daemon).restart();
        lab.wait_ready(daemon);
    }
    told("its last good state is not known");
    pods.iter().for_each(assert_leaves_by_egress);
    // Another gateway still gives out addresses, and this one gives out none.
    lab.write_manifest(
        "second.yaml",
        &manifests::gateway("second", &["192.0.2.60-192.0.2.69"]).replace("default: true", "default: false"),
    );
    let asks = |gateway: &str| format!("podSelector: {{ matchLabels: {{ app: {gateway} }} }}\n  gateway: {gateway}");
    for gateway in ["second", "default"] {
        lab.write_manifest(&format!("{gateway}-new.yaml"), &manifests::policy("shop", gateway, &asks(gateway)));
    }
    lab.wait_until("the other gateway gives", PATIENCE, || {
        condition(&lab, "shop/second", "Accepted").is_some_and(|(status, ..)| status == "True")
    });
    lab.wait_until("this one says why not", PATIENCE, || {
        condition(&lab, "shop/default", "Accepted").is_some_and(|(_, reason, _)| reason == "GatewayInvalid")
    });
    lab.write_manifest(
        "gateway.yaml",
        &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]),
    );
    lab.wait_until("it is right now", PATIENCE, || {
        condition(&lab, "shop/default", "Accepted").is_some_and(|(status, ..)| status == "True")
    });
    pods.iter().for_each(assert_leaves_by_egress);
}
