use super::nodes::{Host, checks};
use super::*;
use crate::ctl::output::{Show, View};
use serde_json::json;

fn host(name: &str, kernel: &str) -> Host {
    Host {
        name: name.to_owned(),
        kernel: kernel.to_owned(),
        runtime: "containerd://2.1.0".to_owned(),
        system: "linux/amd64".to_owned(),
        has_pod_networks: true,
    }
}

#[test]
fn nodes_with_old_kernels_are_named() {
    let good = checks(&[host("a", "6.12.1"), host("b", "5.10.0-46-amd64")]);
    assert!(good.iter().all(|check| check.state == CheckState::Ok), "{good:#?}");
    let bad = checks(&[host("a", "6.12.1"), host("b", "5.4.0-150-generic")]);
    assert_eq!((bad[0].state, bad[0].found.as_str()), (CheckState::Warning, "5.4.0-150-generic on b"));
    assert!(bad[0].remedy.contains("egretd check"));
    let windows = Host { system: "windows/amd64".to_owned(), runtime: "docker://1".to_owned(), ..host("w", "10.0.1") };
    let bad = checks(&[windows]);
    assert!(bad[1].state == CheckState::Warning && bad[2].found.contains("windows/amd64 on w"), "{bad:#?}");
}

#[tokio::test]
async fn other_egress_systems_are_named() {
    let objects = Objects::Dir(vec![
        json!({"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "a"}}),
        json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "ours"}}),
    ]);
    let checks = others::checks(&objects.read(&others::OBJECTS).await);
    let found: Vec<&str> = checks.iter().map(|check| check.found.as_str()).collect();
    assert_eq!(found, ["1 Egress of crd.antrea.io"]);
    assert!(checks[0].remedy.contains("kubectl egret convert"));
}

#[test]
fn the_checks_as_text_have_remedies() {
    let checks = Checks {
        is_installed: false,
        checks: vec![
            Check::ok("kubernetes", "Kubernetes 1.21 or newer", "v1.36.0"),
            Check::new("network", "the CNI uses netfilter", CheckState::Failed, "CNI Calico: eBPF", "use iptables"),
        ],
    };
    assert!(checks.has_failed());
    let text = checks.text(View::default());
    let wanted = "kubernetes\n  ok       Kubernetes 1.21 or newer: v1.36.0\nnetwork\n  failed   the CNI uses netfilter: CNI \
                  Calico: eBPF\n           remedy: use iptables\n1 check failed, 0 warnings.\nEgret is not installed here yet; \
                  docs/install.md says how.\n";
    assert_eq!(text, wanted);
}
