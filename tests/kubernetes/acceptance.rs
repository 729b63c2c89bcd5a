//! `kubectl egret test` with a real API server, real daemons and real packets; kubelets are played.

use super::PATIENCE;
use super::kubectl_egret::{grant, kubectl_egret};
use super::kubelet::Kubelets;
use lab::api::{Role, has_server};
use lab::{Daemon, EXT4, EXT6, Lab};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The server's port.
const PORT: u16 = 8088;
/// `kubectl egret test` begins with the checks of the installation, which want a supported API server that keeps the
/// validation rules of the CustomResourceDefinitions.
const SERVER: (u32, u32) = (1, 25);
/// The longest test.
const LONGEST: Duration = Duration::from_secs(240);

/// A lab whose API server finds the kubelets.
fn lab() -> Lab {
    Lab::builder().kubernetes().api_arguments(&["--kubelet-preferred-address-types=InternalIP"]).scene()
}

/// A cluster in which Egret is installed, by its objects.
fn installed(lab: &Lab) {
    let root = "/apis/apps/v1/namespaces/egret-system";
    let labels = |component: &str| json!({"app.kubernetes.io/name": "egret", "app.kubernetes.io/component": component});
    let workload = |kind: &str, name: &str, component: &str, container: &str| {
        json!({"apiVersion": "apps/v1", "kind": kind,
            "metadata": {"namespace": "egret-system", "name": name, "labels": labels(component)},
            "spec": {"selector": {"matchLabels": labels(component)}, "template": {
                "metadata": {"labels": labels(component)},
                "spec": {"containers": [{"name": container, "image": "egret.invalid/egret:v0.1.0"}]}}}})
    };
    for (kind, plural, name, component, status) in [
        (
            "DaemonSet",
            "daemonsets",
            "egret-node",
            "node",
            json!({"desiredNumberScheduled": 4, "numberReady": 4,
            "currentNumberScheduled": 4, "numberMisscheduled": 0}),
        ),
        ("Deployment", "deployments", "egret-controller", "controller", json!({"replicas": 1, "readyReplicas": 1})),
    ] {
        let object = workload(kind, name, component, component);
        lab.api().ask("POST", &format!("{root}/{plural}"), Some(("application/json", &object)));
        let status = json!({"status": status});
        lab.api().ask(
            "PATCH",
            &format!("{root}/{plural}/{name}/status"),
            Some(("application/merge-patch+json", &status)),
        );
    }
    for node in ["n1", "n2", "g1", "g2"] {
        lab.api().apply(&json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "egret-system", "name": format!("egret-node-{node}"), "labels": labels("node")},
            "spec": {"nodeName": node, "hostNetwork": true},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}));
    }
}

/// Starts the server outside. It goes with the lab.
fn outside(lab: &Lab) -> Daemon {
    let log = lab.directory().join("test-server");
    let arguments = vec!["test-server".to_owned(), format!("--port={PORT}")];
    Daemon::start("test-server", lab.host("ext"), Path::new(env!("CARGO_BIN_EXE_egretd")), arguments, log)
}

fn server() -> [String; 2] {
    [format!("--server={EXT4}:{PORT}"), format!("--server=[{EXT6}]:{PORT}")]
}

/// Starts the command, with its output in a pipe.
fn start(lab: &Lab, role: Role, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
    command.env_clear().env("KUBECONFIG", lab.api().kubeconfig(role)).arg("test").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    lab.host("api").spawn(&mut command).expect("start the command")
}

/// What it has written. It writes less than a pipe holds.
fn said(mut child: Child) -> String {
    let mut text = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    text
}

/// Runs it to its end.
fn run(lab: &Lab, kubelets: &mut Kubelets, role: Role, more: &[&str]) -> (i32, String) {
    let server = server();
    let arguments: Vec<&str> = server.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let mut child = start(lab, role, &arguments);
    let code = kubelets.run_until_ended(&mut child, LONGEST);
    (code, said(child))
}

/// Starts it, and waits until it has pods.
fn begin(lab: &Lab, kubelets: &mut Kubelets, arguments: &[&str]) -> Child {
    let child = start(lab, Role::Admin, arguments);
    lab.wait_until("pods are there", PATIENCE, || {
        kubelets.look();
        left(lab).iter().any(|object| object.contains("/pods: \"running-"))
    });
    child
}

/// What is left of tests in the cluster.
fn left(lab: &Lab) -> Vec<String> {
    let selector = "?labelSelector=egret.dev%2Ftest%3Dtrue";
    let paths = [
        "/api/v1/namespaces",
        "/api/v1/pods",
        "/apis/egret.dev/v1alpha1/egresspolicies",
        "/apis/egret.dev/v1alpha1/egressgateways",
    ];
    let all = paths.iter().flat_map(|path| {
        let list = lab.api().get(&format!("{path}{selector}"));
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.into_iter().map(move |item| format!("{path}: {}", item["metadata"]["name"]))
    });
    all.collect()
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

#[test]
fn all_promises_are_kept_and_nothing_is_left() {
    if !has_server(SERVER, false, "acceptance::all_promises_are_kept_and_nothing_is_left") {
        return;
    }
    let lab = lab();
    installed(&lab);
    for role in ["egret-tester", "egret-reader"] {
        grant(&lab, role);
    }
    lab.wait_until("the tester may read", PATIENCE, || kubectl_egret(&lab, Role::Nobody, &["status"]).0 == 0);
    let (_server, mut kubelets) = (outside(&lab), Kubelets::new(&lab));
    let before = lab.api().egret("egressgateways/default")["spec"].clone();
    let (code, text) = run(&lab, &mut kubelets, Role::Nobody, &["--pods=8"]);
    println!("{text}");
    let kept = [
        "ok       a policy has an egress IP: 192.0.2.",
        "ok       the first packet of a new pod, on the gateway node that holds the egress IP: ",
        "ok       the first packet of a new pod, on another gateway node: ",
        "ok       the first packet of a new pod, on a node that is no gateway node: ",
        "ok       many new pods at once: 8 pods on 4 nodes",
        "ok       a planned move: from g",
        "ok       a change to another egress IP, and back: ",
        "ok       blocked without a gateway node: 3 pods",
        "ok       a policy ends: ",
        "ok       pods that no policy selects are untouched: ",
        "ok       everything is deleted: ",
        "IPv4, IPv6",
    ];
    assert_says(&text, &kept);
    assert_eq!(code, 0, "{text}");
    assert_eq!(left(&lab), [""; 0]);
    assert_eq!(lab.api().egret("egressgateways/default")["spec"], before);
}

#[test]
fn what_an_interrupted_or_killed_test_has_made_is_deleted() {
    if !has_server(SERVER, false, "acceptance::what_an_interrupted_or_killed_test_has_made_is_deleted") {
        return;
    }
    let lab = lab();
    installed(&lab);
    let (_server, mut kubelets) = (outside(&lab), Kubelets::new(&lab));
    let server = server();
    let arguments: Vec<&str> = server.iter().map(String::as_str).collect();
    let mut child = begin(&lab, &mut kubelets, &arguments);
    let made = left(&lab);
    assert!(made.iter().any(|object| object.contains("egresspolicies: \"first\"")), "{made:?}");
    for _ in 0..2 {
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("SIGINT");
        std::thread::sleep(Duration::from_millis(200));
    }
    let code = kubelets.run_until_ended(&mut child, LONGEST);
    let text = said(child);
    assert_says(&text, &["interrupted", "ok       everything is deleted"]);
    assert_eq!((code, left(&lab)), (1, vec![]), "{text}");

    let mut killed = begin(&lab, &mut kubelets, &arguments);
    killed.kill().expect("SIGKILL");
    killed.wait().expect("the end");
    assert!(!left(&lab).is_empty());
    let (code, text) = run(&lab, &mut kubelets, Role::Admin, &["--timeout=20", "--pods=1"]);
    assert_says(&text, &["ok       earlier tests: deleted what egret-test-", "everything is deleted"]);
    assert!(code != 2, "{text}");
    lab.wait_until("all is gone", PATIENCE, || {
        kubelets.look();
        left(&lab).is_empty()
    });
}

#[test]
fn what_is_missing_or_broken_is_named_with_its_remedy() {
    if !has_server(SERVER, false, "acceptance::what_is_missing_or_broken_is_named_with_its_remedy") {
        return;
    }
    let lab = lab();
    let (_server, mut kubelets) = (outside(&lab), Kubelets::new(&lab));
    let mut says = |more: &[&str], wanted: i32, words: &[&str]| {
        let (code, text) = run(&lab, &mut kubelets, Role::Admin, more);
        println!("$ kubectl egret test {}\n{text}", more.join(" "));
        assert_says(&text, words);
        assert_eq!((code, left(&lab)), (wanted, vec![]), "{text}");
    };
    says(&[], 2, &["failed   DaemonSet egret-node: it is missing", "install Egret: docs/install.md"]);
    installed(&lab);
    says(&["--gateway=office"], 2, &["failed   a gateway: there is no EgressGateway office, but default"]);
    let inside = "--server=192.0.2.11";
    let mut child = start(&lab, Role::Admin, &[inside]);
    assert_eq!(child.wait().expect("the end").code(), Some(2));
    assert_says(&said(child), &["failed   the server is outside: 192.0.2.11 is the address of node n1"]);
    let mut child = start(&lab, Role::Nobody, &[inside]);
    assert_eq!(child.wait().expect("the end").code(), Some(1));
    assert_says(&said(child), &["cannot list", "docs/kubectl.md lists the rights"]);

    // Nobody answers at this port.
    let silent = format!("--server={EXT4}:9");
    let mut child = start(&lab, Role::Admin, &[&silent, "--pods=1"]);
    let code = kubelets.run_until_ended(&mut child, LONGEST);
    let text = said(child);
    assert_says(&text, &["failed   the server answers: 192.0.2.100:9 answers no pod", "kubectl egret test-server"]);
    assert_eq!((code, left(&lab)), (2, vec![]), "{text}");

    // A firewall on the way that lets nodes pass, and no egress IP.
    lab.host("ext").nft("add table inet wall; add chain inet wall in { type filter hook input priority 0; }; \
        add rule inet wall in ip saddr 192.0.2.50-192.0.2.59 drop; add rule inet wall in ip6 saddr 2001:db8::50-2001:db8::59 drop");
    let (code, text) = run(&lab, &mut kubelets, Role::Admin, &["--pods=1"]);
    println!("{text}");
    assert_says(
        &text,
        &[
            "failed   the first packet of a new pod, on a node that is no gateway node",
            "let 192.0.2.5",
            " reach 192.0.2.100:8088",
        ],
    );
    assert_eq!((code, left(&lab)), (2, vec![]), "{text}");
    lab.host("ext").nft("delete table inet wall");

    let labels: Value = json!({"metadata": {"labels": {"egret.dev/gateway": null}}});
    for node in ["g1", "g2"] {
        lab.api().ask("PATCH", &format!("/api/v1/nodes/{node}"), Some(("application/merge-patch+json", &labels)));
    }
    let (code, text) = run(&lab, &mut kubelets, Role::Admin, &[]);
    assert_says(&text, &["failed   a gateway: EgressGateway default: no node matches", "label a node"]);
    assert_eq!(code, 2, "{text}");
}
