//! `kubectl egret` with a real API server, under the rights of `install/kubectl.yaml`.

use super::PATIENCE;
use lab::api::{Role, has_server};
use lab::fault_injection::{owner_and_other, plugged, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::{EGRESS4, Lab, VISITOR, manifests, problems};
use serde_json::{Value, json};

/// Exit code, and what the command says to this user.
pub(super) fn kubectl_egret(lab: &Lab, role: Role, arguments: &[&str]) -> (i32, String) {
    let kubeconfig = format!("KUBECONFIG=/nowhere:{}", lab.api().kubeconfig(role).display());
    let program = env!("CARGO_BIN_EXE_kubectl-egret");
    let argv = ["env", "-i", &kubeconfig, program].into_iter().chain(arguments.iter().copied());
    let output = lab.host("api").try_run(argv);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

#[track_caller]
fn assert_says(lab: &Lab, role: Role, arguments: &[&str], code: i32, words: &[&str]) {
    let (found, text) = kubectl_egret(lab, role, arguments);
    println!("$ kubectl egret {}\n{text}", arguments.join(" "));
    for word in words {
        assert!(text.contains(word), "{word:?} is not in what {arguments:?} says:\n{text}");
    }
    assert_eq!(found, code, "{arguments:?}:\n{text}");
}

/// Gives the user who may do nothing a role of `install/kubectl.yaml`.
pub(super) fn grant(lab: &Lab, role: &str) {
    let text = std::fs::read_to_string(lab::places::repository().join("install/kubectl.yaml")).expect("the roles");
    for object in serde_saphyr::from_multiple::<Value>(&text).expect("YAML") {
        lab.api().apply(&object);
    }
    lab.api().apply(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": role},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "nobody"}],
    }));
}

#[test]
fn a_reader_sees_and_an_operator_moves() {
    let lab = Lab::builder().kubernetes().scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let ip = EGRESS4.to_string();
    assert_says(&lab, Role::Nobody, &["status"], 1, &["cannot list", "docs/kubectl.md lists the rights"]);
    grant(&lab, "egret-reader");
    lab.wait_until("the reader may read", PATIENCE, || kubectl_egret(&lab, Role::Nobody, &["status"]).0 == 0);
    assert_says(&lab, Role::Nobody, &["status", "--exit-code"], 0, &["No problems.", "shop/visitors", &owner]);
    for what in ["shop/visitors", &ip, "n1"] {
        assert_says(&lab, Role::Nobody, &["pods", what], 0, &["shop/visitor ", &ip, &owner, "1 pod\n"]);
    }
    assert_says(&lab, Role::Nobody, &["ip", &ip], 0, &["policies: shop/visitors", "1 pod leaves from it now"]);
    let leaves = format!("leaves from {ip}");
    assert_says(&lab, Role::Nobody, &["why", "visitor", "-n", "shop", "--to", "192.0.2.3"], 0, &[]);
    assert_says(&lab, Role::Nobody, &["why", "shop/visitor", "--to", "9.9.9.9"], 0, &[&leaves]);
    assert_says(&lab, Role::Nobody, &["why", "shop/visitor", "--to", "10.96.0.1"], 0, &["goes direct"]);

    // A trace runs in the daemon's container, which only who may create pods/exec in its namespace can do.
    let trace = ["trace", "shop/visitor", "--to", "192.0.2.100:8080"];
    assert_says(&lab, Role::Nobody, &trace, 1, &["the DaemonSet egret-node has no pod on node n1"]);
    lab.api().apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "egret-system"}}));
    let labels = json!({"app.kubernetes.io/name": "egret", "app.kubernetes.io/component": "node"});
    lab.api().apply(&json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "egret-node-x", "namespace": "egret-system", "labels": labels},
        "spec": {"nodeName": "n1", "containers": [{"name": "node", "image": "egret"}]}}));
    let words =
        "cannot run `egretd trace` in pod egret-system/egret-node-x: it needs the right to create pods/exec there";
    assert_says(&lab, Role::Nobody, &trace, 1, &[words]);

    let file = lab.directory().join("plan.yaml");
    std::fs::write(&file, manifests::policy("shop", "all", "podSelector: {}\n  priority: 7")).expect("a file");
    let plan = ["plan", "--exit-code", "-f", &file.display().to_string()].map(str::to_owned);
    let plan: Vec<&str> = plan.iter().map(String::as_str).collect();
    assert_says(&lab, Role::Nobody, &plan, 2, &["EgressPolicy shop/visitors is shadowed", "1 changes and 0 lose one"]);

    assert_says(&lab, Role::Nobody, &["move", &ip, "--to", &other], 1, &["cannot change EgressPolicy shop/visitors"]);
    grant(&lab, "egret-operator");
    lab.wait_until("the operator moves it", PATIENCE, || {
        kubectl_egret(&lab, Role::Nobody, &["move", &ip, "--to", &other, "--wait"]).0 == 0
    });
    wait_holder(&lab, &other);
    assert_says(&lab, Role::Nobody, &["move", &ip, "--undo"], 0, &["removed the annotation"]);
    assert_says(&lab, Role::Nobody, &["drain", &other, "--wait"], 0, &["1 egress IP moved in"]);
    wait_holder(&lab, &owner);
    assert_says(&lab, Role::Nobody, &["drain", &other, "--undo"], 0, &["removed the label"]);
    lab.assert_nothing_leaked();
}

/// A pool that is too small, a gateway without nodes, a shadowed policy, a dead gateway node, a CNI that bypasses
/// netfilter: each is named with its remedy.
#[test]
fn problems_of_a_cluster_are_reported_with_their_remedies() {
    // An older one drops the validation rules of the CustomResourceDefinitions, which is one more problem.
    if !has_server((1, 25), false, "kubectl_egret::problems_of_a_cluster_are_reported_with_their_remedies") {
        return;
    }
    let lab = Lab::builder().kubernetes().scene();
    let (owner, other) = owner_and_other(&lab);
    let gateway = |name: &str, label: &str, address: &str| {
        json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressGateway", "metadata": {"name": name},
            "spec": {"nodeSelector": {"matchLabels": {label: "true"}}, "addresses": [address]}})
    };
    lab.manifests().write_object("small.yaml", &gateway("small", "egret.dev/gateway", "192.0.2.70"));
    lab.manifests().write_object("nowhere.yaml", &gateway("nowhere", "nobody", "192.0.2.71"));
    for (name, gateway) in [("first", "small"), ("second", "small"), ("lost", "nowhere")] {
        let spec = format!("podSelector: {{ matchLabels: {{ app: {name} }} }}\n  gateway: {gateway}");
        lab.write_manifest(&format!("{name}.yaml"), &manifests::policy("shop", name, &spec));
    }
    let late = "podSelector: { matchLabels: { app: visitor } }\n  priority: -1";
    lab.write_manifest("late.yaml", &manifests::policy("shop", "late", late));
    lab.api().apply(&json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"namespace": "kube-system", "name": "cilium-config"}, "data": {
        "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true", "cni-exclusive": "false"}}));
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    for app in ["second", "lost"] {
        lab.add_pod("n1", "shop", app, &[("app", app)]);
    }
    lab.daemon(&other).kill9();
    plugged(&lab, &other, false);
    let dead = format!("gateway node {other}: NodeUnreachable: it does not answer {owner}");
    problems::assert_told(&lab, &dead, || kubectl_egret(&lab, Role::Admin, &["status", "--exit-code", "-o", "wide"]));
    let of_check = [
        "ok       Kubernetes 1.21 or newer",
        "failed   the CNI uses netfilter: CNI Cilium",
        "ok       CustomResourceDefinitions: 4 as this version",
        "failed   DaemonSet egret-node: it is missing",
        "PoolExhausted",
        "NoNode",
        "Shadowed",
        "NodeUnreachable",
    ];
    assert_says(&lab, Role::Admin, &["check"], 2, &of_check);
    let of_second = ["no IPv4 address left", "spec.addresses", "bpf.hostLegacyRouting=true"];
    assert_says(&lab, Role::Admin, &["why", "shop/second"], 0, &of_second);
    assert_says(&lab, Role::Admin, &["why", "shop/lost"], 0, &["EgressGateway \"nowhere\" has no node; label one"]);
    assert_says(
        &lab,
        Role::Admin,
        &["why", "shop/visitor"],
        0,
        &["it never decides: a policy before it covers everything"],
    );
}
