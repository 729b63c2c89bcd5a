//! `kubectl egret` with a directory as the source of cluster state: what it shows, and what it moves. Needs root.

use lab::fault_injection::{owner_and_other, plugged, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EGRESS4, EXT4, Lab, VISITOR, manifests, problems};
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

/// The exit code, and the output.
fn egretctl(lab: &Lab, arguments: &[&str]) -> (i32, String) {
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
    let output = command.env_clear().args(arguments).args(["--cluster", &cluster]).output().expect("kubectl-egret");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

#[track_caller]
fn assert_says(lab: &Lab, arguments: &[&str], code: i32, words: &[&str]) -> String {
    let (found, text) = egretctl(lab, arguments);
    println!("$ kubectl egret {}\n{text}", arguments.join(" "));
    for word in words {
        assert!(text.contains(word), "{word:?} is not in what {arguments:?} says:\n{text}");
    }
    assert_eq!(found, code, "{arguments:?}:\n{text}");
    text
}

#[test]
fn status_pods_and_addresses_are_shown() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let ip = EGRESS4.to_string();
    lab.wait_until("the policy's status counts the pod", Duration::from_secs(20), || {
        let (_, text) = egretctl(&lab, &["status", "-o", "json"]);
        let status: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        status["policies"][0]["pods"] == 1 && status["problems"] == serde_json::json!([])
    });
    assert_says(
        &lab,
        &["status", "--exit-code"],
        0,
        &["No problems.", "2 of 2 gateway nodes", "shop/visitors", &owner],
    );
    for what in [&["shop/visitors"][..], &[&ip], &["n1"], &["-n", "shop"], &["-A"]] {
        let arguments = [&["pods"], what].concat();
        assert_says(&lab, &arguments, 0, &["shop/visitor ", &ip, &owner, "1 pod\n"]);
    }
    assert_says(&lab, &["pods", "-n", "office"], 0, &["No policy selects a pod here."]);
    assert_says(&lab, &["pods", "nobody"], 1, &["no node, no ClusterEgressPolicy", "NAMESPACE/NAME"]);
    let held = format!("held by {owner}");
    assert_says(&lab, &["ip", &ip], 0, &["policies: shop/visitors", &held, "1 pod leaves from it now: shop/visitor"]);
    assert_says(&lab, &["ip", "192.0.2.59"], 0, &["in the pool of EgressGateway default, and no policy has it"]);
    let to = EXT4.to_string();
    assert_says(&lab, &["why", "visitor", "-n", "shop", "--to", &to], 0, &[&format!("{to} leaves from {ip}")]);
    let run_dir = lab.node("n1").run_dir().display().to_string();
    let now =
        ["The daemon on node n1 says now:", "its kernel has the pod (chain policy-", "go through the tunnel to node"];
    let of_egress_ip = format!("to node {owner}; pods of this node have sent ");
    let says = assert_says(&lab, &["why", "shop/visitor", "--run-dir", &run_dir], 0, &now);
    assert!(says.contains(&of_egress_ip), "{says}");
    let elsewhere = lab.node("n2").run_dir().display().to_string();
    let words = "that of node n2; run the command on node n1";
    assert_says(&lab, &["why", "shop/visitor", "--run-dir", &elsewhere], 0, &[words]);
    assert_says(&lab, &["why", "nobody", "-n", "shop"], 1, &["the cluster has no pod shop/nobody"]);
    assert_says(&lab, &["check"], 0, &["no problems"]);
}

/// A pool that is too small, a gateway without nodes, a shadowed policy, a dead gateway node, a CNI that bypasses
/// netfilter: each is named with its remedy.
#[test]
fn problems_are_reported_with_their_remedies() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let gateway = |name: &str, label: &str, address: &str| {
        format!(
            "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: {{ name: {name} }}\nspec:\n  nodeSelector: \
             {{ matchLabels: {{ {label}: \"true\" }} }}\n  addresses: [{address}]\n"
        )
    };
    lab.write_manifest("small.yaml", &gateway("small", "egret.dev/gateway", "192.0.2.70"));
    lab.write_manifest("nowhere.yaml", &gateway("nowhere", "nobody", "192.0.2.71"));
    let of = |name: &str, gateway: &str| {
        let spec = format!("podSelector: {{ matchLabels: {{ app: {name} }} }}\n  gateway: {gateway}");
        manifests::policy("shop", name, &spec)
    };
    lab.write_manifest("policies.yaml", &[of("first", "small"), of("second", "small"), of("lost", "nowhere")].concat());
    let late = "podSelector: { matchLabels: { app: visitor } }\n  priority: -1";
    lab.write_manifest("late.yaml", &manifests::policy("shop", "late", late));
    lab.write_manifest(
        "cilium.yaml",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: { namespace: kube-system, name: cilium-config }\ndata: { \
         kube-proxy-replacement: \"true\", enable-bpf-masquerade: \"true\", cni-exclusive: \"false\" }\n",
    );
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    for app in ["second", "lost"] {
        lab.add_pod("n1", "shop", app, &[("app", app)]);
    }
    lab.daemon(&other).kill9();
    plugged(&lab, &other, false);
    let dead = format!("gateway node {other}: NodeUnreachable: it does not answer {owner}");
    problems::assert_told(&lab, &dead, || egretctl(&lab, &["status", "--exit-code", "-o", "wide"]));
    assert_says(&lab, &["check"], 2, &["PoolExhausted", "NoNode", "Shadowed", "NodeUnreachable", "Cilium", "remedy: "]);
    assert_says(
        &lab,
        &["why", "shop/second"],
        0,
        &["no IPv4 address left", "spec.addresses", "bpf.hostLegacyRouting=true"],
    );
    assert_says(&lab, &["why", "shop/lost"], 0, &["EgressGateway \"nowhere\" has no node; label one"]);
    assert_says(
        &lab,
        &["why", "shop/visitor"],
        0,
        &["shop/late", "it never decides: a policy before it covers everything"],
    );
}

#[test]
fn an_egress_ip_moves_and_a_node_is_drained_without_a_pause() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let going_on = sessions(std::slice::from_ref(&pod));
    let ip = EGRESS4.to_string();
    let moved =
        assert_says(&lab, &["move", &ip, "--to", &other, "--wait"], 0, &["moving from", "1 egress IP moved in"]);
    assert!(moved.contains(&format!("node {other} holds it")), "{moved}");
    wait_holder(&lab, &other);
    assert_says(&lab, &["move", "shop/visitors", "--to", &other], 0, &["is on node", "already"]);
    assert_says(
        &lab,
        &["move", "shop/visitors", "--to", "n1"],
        1,
        &["it is no node of EgressGateway default; label it"],
    );
    assert_says(&lab, &["move", "shop/visitors", "--undo"], 0, &["removed the annotation egret.dev/move-to"]);
    assert_says(&lab, &["drain", &other, "--wait"], 0, &["1 egress IP moved in"]);
    wait_holder(&lab, &owner);
    assert_says(&lab, &["move", &ip, "--to", &other], 1, &["the node is drained or cordoned"]);
    assert_says(&lab, &["drain", &other, "--undo"], 0, &["removed the label egret.dev/drain"]);
    assert_says(
        &lab,
        &["rebalance", "default", "--wait", "--timeout", "30"],
        0,
        &["set the annotation egret.dev/rebalance"],
    );
    assert_says(&lab, &["rebalance", "default", "--undo"], 0, &["removed the annotation egret.dev/rebalance"]);
    assert_leaves_by_egress(&pod);
    assert_short(assert_live("moved and drained", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn a_plan_predicts_what_the_controller_does() {
    let lab = Lab::scene();
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.add_pod("n1", "shop", "other", &[("app", "other")]);
    let file = lab.directory().join("plan.yaml");
    let plan = |spec: &str, arguments: &[&str]| {
        std::fs::write(&file, manifests::policy("shop", "others", spec)).expect("a file");
        egretctl(&lab, &[&["plan", "--exit-code", "-f", &file.display().to_string()], arguments].concat())
    };
    let others = "podSelector: { matchLabels: { app: other } }";
    let (code, text) = plan(others, &[]);
    assert!(code == 2 && text.contains("1 pod gains an egress IP") && text.contains("shop/other"), "{code}: {text}");
    let planned: Value = serde_json::from_str(&plan(others, &["-o", "json"]).1).expect("JSON");
    let planned = planned["pods"][0]["to"][0]["egressIp"][0].as_str().expect("an address").to_owned();
    let (code, text) = plan("podSelector: { matchLabels: { app: nobody } }\n  nonsense: 1", &[]);
    assert!(code == 1 && text.contains("unknown field \"nonsense\""), "{code}: {text}");
    lab.write_manifest("others.yaml", &manifests::policy("shop", "others", others));
    lab.wait_until("the pod has what was planned", Duration::from_secs(10), || {
        egretctl(&lab, &["pods", "shop/others"]).1.contains(&planned)
    });
    lab.wait_until("nothing changes any more", Duration::from_secs(15), || plan(others, &[]).0 == 0);
}
