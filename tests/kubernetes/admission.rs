//! A node's token is valid for that node only: `install/admission.yaml`, with tokens as the kubelet requests them.
//! Needs root.

use super::documents;
use lab::Lab;
use lab::api::{API, NAMESPACE};
use serde_json::{Value, json};
use std::time::Duration;

const MERGE: &str = "application/merge-patch+json";
const TAINT: &str = "egret.dev/not-ready";

/// A token of the node daemon's ServiceAccount, bound to a pod on that node if there is one.
fn token(lab: &Lab, node: Option<&str>) -> String {
    let bound = node.map(|node| {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": NAMESPACE, "name": format!("egret-{node}")},
            "spec": {"nodeName": node, "serviceAccountName": "egret-node", "containers": [{"name": "node", "image": "none.invalid/none"}]}});
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let pod = lab.api().ask("POST", &path, Some(("application/json", &pod)));
        json!({"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]})
    });
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                         "spec": {"audiences": [], "boundObjectRef": bound}});
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/egret-node/token");
    let answer = lab.api().ask("POST", &path, Some(("application/json", &request)));
    answer["status"]["token"].as_str().expect("a token").to_owned()
}

/// The API server's response to a request with this token: the status and the message.
fn ask(lab: &Lab, token: &str, method: &str, path: &str, content: Option<(&str, &Value)>) -> (u16, String) {
    let mut arguments =
        vec!["curl".to_owned(), "-sk".into(), "-w".into(), "\n%{http_code}".into(), "-X".into(), method.into()];
    arguments.extend(["-H".into(), format!("Authorization: Bearer {token}")]);
    if let Some((type_, body)) = content {
        arguments.extend(["-H".into(), format!("Content-Type: {type_}"), "-d".into(), body.to_string()]);
    }
    arguments.push(format!("https://{API}:6443{path}"));
    let text = lab.host("api").run(arguments);
    let (body, code) = text.trim_end().rsplit_once('\n').unwrap_or(("", &text));
    let answer: Value = serde_json::from_str(body).unwrap_or_default();
    let message = answer["message"].as_str().unwrap_or_default().to_owned();
    (code.trim().parse().unwrap_or_else(|_| panic!("no status in {text}")), message)
}

fn tainted(lab: &Lab, node: &str) {
    let taints = json!([{"key": TAINT, "effect": "NoSchedule"}, {"key": "dedicated", "effect": "NoSchedule"}]);
    let patch = json!({"metadata": {"labels": {"zone": "one"}}, "spec": {"taints": taints}});
    lab.api().ask("PATCH", &format!("/api/v1/nodes/{node}"), Some((MERGE, &patch)));
}

/// Whether the server has the kind. If so, the policy is in force on return.
fn install(lab: &Lab) -> bool {
    let path = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
    if lab.api().try_ask("GET", path, None).expect("an answer").0 == 404 {
        let version = lab.api().version();
        assert!(version < (1, 30), "{version:?} has no ValidatingAdmissionPolicy");
        eprintln!(
            "an API server of {version:?} has no ValidatingAdmissionPolicy: install/admission.yaml is not tested"
        );
        return false;
    }
    for object in documents(include_str!("../../install/admission.yaml")) {
        lab.api().apply(&object);
    }
    let unbound = token(lab, None);
    lab.wait_until("the policy is in force", Duration::from_secs(30), || {
        let patch = json!({"spec": {"taints": [{"key": "dedicated", "effect": "NoSchedule"}]}});
        ask(lab, &unbound, "PATCH", "/api/v1/nodes/n1?dryRun=All", Some((MERGE, &patch))).0 == 403
    });
    true
}

#[test]
fn a_nodes_token_can_write_its_own_objects_only() {
    let lab = Lab::builder().kubernetes().build();
    for node in ["n1", "n2"] {
        tainted(&lab, node);
    }
    if !install(&lab) {
        return;
    }
    let own = token(&lab, Some("n1"));
    let node =
        |name: &str, patch: Value| ask(&lab, &own, "PATCH", &format!("/api/v1/nodes/{name}"), Some((MERGE, &patch)));
    let refused = |what: &str, (code, message): (u16, String), words: &str| {
        assert!(code == 403 && message.contains(words), "{what}: {code} {message}");
    };
    let dedicated = json!({"key": "dedicated", "effect": "NoSchedule"});
    // Nothing of other nodes, and of its own Node only the taint.
    refused("n2's taint", node("n2", json!({"spec": {"taints": [dedicated]}})), "bound to node n1");
    for (what, patch) in [
        ("a gateway's label", json!({"metadata": {"labels": {"egret.dev/gateway": "true"}}})),
        ("a label less", json!({"metadata": {"labels": {"zone": null}}})),
        ("an annotation", json!({"metadata": {"annotations": {"a": "b"}}})),
        ("a finalizer", json!({"metadata": {"finalizers": ["example.org/a"]}})),
        ("a cordon", json!({"spec": {"unschedulable": true}})),
        ("a provider", json!({"spec": {"providerID": "example://n1"}})),
        ("no taint at all", json!({"spec": {"taints": []}})),
        (
            "a taint more",
            json!({"spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}, dedicated, {"key": "x", "effect": "NoSchedule"}]}}),
        ),
        ("a taint changed", json!({"spec": {"taints": [{"key": "dedicated", "effect": "NoExecute"}]}})),
        ("with the taint, a label", json!({"metadata": {"labels": {"zone": "two"}}, "spec": {"taints": [dedicated]}})),
    ] {
        refused(what, node("n1", patch), "may only remove the taint");
    }
    assert_eq!(node("n1", json!({"spec": {"taints": [dedicated]}})), (200, String::new()));

    // Its own EgressNode: created, written, and removed by an uninstallation.
    let collection = "/apis/egret.dev/v1alpha1/egressnodes";
    let object = |name: &str| json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": name}, "spec": {}});
    lab.api().ask("POST", collection, Some(("application/json", &object("n2"))));
    let status = json!({"status": {}});
    for (name, allowed) in [("n2", false), ("n1", true)] {
        let json_type = "application/json";
        let apply =
            json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": name}, "status": {}});
        let answers = [
            if allowed {
                ask(&lab, &own, "POST", collection, Some((json_type, &object(name))))
            } else {
                ask(&lab, &own, "POST", collection, Some((json_type, &object("another"))))
            },
            ask(&lab, &own, "PATCH", &format!("{collection}/{name}/status"), Some((MERGE, &status))),
            ask(
                &lab,
                &own,
                "PATCH",
                &format!("{collection}/{name}/status?fieldManager=egret-node&force=true"),
                Some(("application/apply-patch+yaml", &apply)),
            ),
            ask(&lab, &own, "DELETE", &format!("{collection}/{name}"), None),
        ];
        for answer in answers {
            assert!(
                if allowed { answer.0 < 300 } else { answer.0 == 403 && answer.1.contains("bound to node n1") },
                "{name}: {answer:?}"
            );
        }
    }
    // A token that names no node can write nothing. Writes by others are not examined.
    let (code, message) = ask(&lab, &token(&lab, None), "DELETE", &format!("{collection}/n2"), None);
    refused("no node in the token", (code, message), "bound to no node");
    lab.api().ask("DELETE", &format!("{collection}/n2"), None);
}
