use super::*;
use crate::model::selector::Labels;
use crate::model::{ObjectKey, PodMatch};
use std::net::IpAddr;

const CLUSTER: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: web}}
---
apiVersion: v1
kind: Node
metadata:
  name: node-1
  labels: {egret.dev/gateway: "true"}
spec:
  podCIDR: 10.244.1.0/24
  podCIDRs: [10.244.1.0/24, "fd00:1::/64"]
  taints: [{key: x, effect: NoSchedule}]
status:
  addresses:
  - {type: Hostname, address: node-1}
  - {type: ExternalIP, address: 198.51.100.7}
  - {type: InternalIP, address: 192.0.2.11}
  - {type: InternalIP, address: "2001:db8::11"}
---
apiVersion: v1
kind: Pod
metadata: {name: visitor-0, namespace: shop, uid: 1-2-3, labels: {app: visitor, version: 1.10}}
spec: {nodeName: node-1, containers: [{name: a, image: b}]}
status: {phase: Running, podIP: 10.244.1.5, podIPs: [{ip: 10.244.1.5}, {ip: "fd00:1::5"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done}
spec: {nodeName: node-2, hostNetwork: true}
status: {phase: Succeeded, podIP: 10.244.2.9}
---
apiVersion: v1
kind: Service
metadata: {name: frontend, namespace: shop}
spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], selector: {app: visitor}}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: other}
spec: {whatever: [1, 2]}
---
kind: ClusterEgressPolicy
spec:
  priority: 7
  services: [frontend]
metadata:
  name: spec-before-version
  creationTimestamp: "2026-01-31T12:00:00Z"
  generation: 4
apiVersion: egret.dev/v1alpha1
"#;

#[tokio::test]
async fn all_kinds_are_read() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", CLUSTER);
    fixture
        .put("deeper/still/b.yml", &(gateway("default", "192.0.2.50-192.0.2.59") + "---\n" + &policy("shop", "p", 3)));
    let source = fixture.open().await;
    assert_eq!(source.problems(), [""; 0]);
    let c = source.now();
    assert_eq!(c.namespaces["shop"].get("team").map(|t| &**t), Some("web"));
    let node = &c.nodes["node-1"];
    let addresses: Vec<IpAddr> = ["192.0.2.11", "2001:db8::11", "198.51.100.7"].map(|a| a.parse().unwrap()).into();
    assert_eq!((&node.addresses[..], node.internal, node.pod_cidrs.len()), (&addresses[..], 2, 2));
    let pod = &c.pods[&ObjectKey::new("shop", "visitor-0")];
    assert_eq!((&*pod.uid, pod.node.as_deref(), pod.addresses.len()), ("1-2-3", Some("node-1"), 2));
    assert_eq!(pod.labels, Labels::from_iter([("app", "visitor"), ("version", "1.10")]));
    let done = &c.pods[&ObjectKey::new("default", "done")];
    assert!(done.finished && done.host_network && done.addresses.len() == 1);
    let frontend = &c.services[&ObjectKey::new("shop", "frontend")];
    assert!(frontend.selector.as_ref().unwrap().matches(&pod.labels) && frontend.cluster_ips.len() == 1);
    let headless = &c.services[&ObjectKey::new("shop", "headless")];
    assert!(headless.selector.is_none() && headless.cluster_ips.is_empty());
    assert_eq!(c.gateways["default"].pool.len(), 1);
    assert_eq!(priority(&c, "shop/p"), Some(3));
    let late = &c.policies[&"spec-before-version".into()];
    assert!(matches!(&late.pods, PodMatch::Services(s) if s.len() == 1));
    assert_eq!((late.priority, late.created, late.generation()), (7, 1_769_860_800, Some(4)));
}

#[tokio::test]
async fn lists_are_read_in_yaml_and_in_json() {
    let fixture = Fixture::new();
    let item = |i: i32| {
        format!(
            r#"{{"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy", "spec": {{"podSelector": {{}}, "priority": {i}}},
            "metadata": {{"name": "p{i}", "annotations": {{"x": "\ud83d\ude00 \u003c"}}}}}}"#
        )
    };
    let json = format!("{{\"apiVersion\": \"v1\",\n\t\"items\": [{}, {}], \"kind\": \"List\"}}", item(1), item(2));
    fixture.put("a.json", &json);
    fixture.put("b.yaml", &format!("apiVersion: v1\nitems:\n- {}\n- {}\nkind: List\n", item(3), item(4)));
    let source = fixture.open().await;
    assert_eq!(source.problems(), [""; 0]);
    assert_eq!(source.now().policies.values().map(|p| p.priority).collect::<Vec<_>>(), [1, 2, 3, 4]);
}

/// Few lists whose networks overlap in many ways, each with many ports.
fn overlapping() -> String {
    let ports: Vec<String> = (0..5_000).map(|n| format!("{{port: {}}}", 2 * n + 1)).collect();
    let rule = |prefix| {
        format!("{{to: [{{ipBlock: {{cidr: 10.0.0.0/{prefix}}}}}], ports: [{{port: {}}}]}}", 20_000 + 2 * prefix)
    };
    let rules: Vec<String> = (8..=32).map(rule).collect();
    format!("[{{ports: [{}]}}, {}]", ports.join(", "), rules.join(", "))
}

/// A manifest, the line of its fault, and texts of the fault.
#[tokio::test]
async fn faults_are_reported_with_their_lines() {
    let gateway = |body: &str| {
        format!("apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata:\n  name: g\nspec:\n{body}")
    };
    let policy =
        |body: &str| format!("apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  name: p\nspec:\n{body}");
    let cases = [
        (gateway("  nodeSelector: {}\n  addresses:\n  - 192.0.2.1\n  - 192.0.2.9-192.0.2.3\n"), 9, "EgressGateway/g: spec.addresses[1]: "),
        (gateway("  nodeSelector: {}\n  addresses: [192.0.2.1, 192.0.2.300]\n"), 7, "192.0.2.300"),
        (gateway("  nodeSelector: {}\n  nextHop:\n    ipv4: 2001:db8::1\n"), 8, "EgressGateway/g: "),
        (gateway("  nodeSelector: {}\n  address: 192.0.2.1\n"), 7, "EgressGateway/g: unknown field \"address\""),
        (gateway("  nodeSelector:\n  addresses: [192.0.2.1]\n"), 6, "selector is empty"),
        (gateway("  nodeSelector: {matchLabel: {a: b}}\n"), 6, "unknown field \"matchLabel\""),
        (gateway("  nodeSelector: {}\n  default: yes\n"), 7, "true or false"),
        (gateway("  nodeSelector: {}\n  default: true\n  default: true\n"), 8, "\"default\" is there twice"),
        (gateway("  addresses: []\n"), 6, "\"nodeSelector\" is missing"),
        (gateway("  nodeSelector: {}\nsepc: {}\n"), 7, "unknown field \"sepc\""),
        (policy("  podSelector: {}\n  egress:\n  - to:\n    - ipBlock: {cidr: 203.0.113.1/24}\n"), 8, "EgressPolicy/p: spec.egress[0]: "),
        (policy(&format!("  podSelector: {{}}\n  egress:\n  - to:\n    - ipBlock: {{cidr: 10.0.0.0/8, except: {:?}}}\n", vec!["10.1.0.0/16"; 25])), 8, "25 exceptions, and at most 24"),
        (policy(&format!("  podSelector: {{}}\n  egress: {}\n", overlapping())), 7, "combinations of a network and ports, and at most 100000"),
        (policy("  podSelector: {}\n  fallback: Open\n"), 7, "\"Open\" is not possible here; write Block or NodeAddress"),
        (policy("  podSelector: {}\n  address: {}\n"), 7, "spec.address: "),
        (policy("  priority: 1\n"), 5, "spec: selects no pods"),
        (policy("  podSelector: {}\n  priority: [1\n"), 7, "EgressPolicy/p: "),
        ("# first\n---\napiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nspec: {podSelector: {}}\n".into(), 3, "metadata.name: is missing"),
        ("apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  name: ../x\nspec: {podSelector: {}}\n".into(), 4, "\"../x\" cannot be a name"),
        ("apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  name: x\n".into(), 1, "spec: is missing"),
        ("apiVersion: egret.dev/v1\nkind: EgressPolicy\nmetadata: {name: x}\n".into(), 1, "write egret.dev/v1alpha1"),
        ("apiVersion: egret.dev/v1alpha1\nkind: EgresPolicy\nmetadata: {name: x}\n".into(), 2, "\"EgresPolicy\" is unknown"),
        ("metadata: {name: x}\nspec: {}\n".into(), 1, "has no kind"),
        ("apiVersion: v1\nkind: Node\nmetadata: {name: n}\nstatus:\n  addresses:\n  - {type: InternalIP, address: 192.0.2}\n".into(), 6, "\"192.0.2\" is not an IP address"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: n}\nstatus:\n  podIPs:\n  - ip: x\n".into(), 6, "Pod/n: status.podIPs[0].ip: "),
        ("apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Node\n  metadata: {name: b}\n  spec:\n    podCIDR: here\n".into(), 11, "Node/b: spec.podCIDR: "),
        ("a: b: c\n".into(), 1, ""),
        ("\tx".into(), 1, ""),
        ("just words\n".into(), 1, ""),
        ("{\"apiVersion\": \"egret.dev/v1alpha1\",\n\"kind\": \"EgressPolicy\",\n\"kind\": \"EgressPolicy\"}".into(), 3, "\"kind\" is there twice"),
    ];
    let fixture = Fixture::new();
    for (i, (text, ..)) in cases.iter().enumerate() {
        fixture.put(&format!("{i:02}.yaml"), text);
    }
    let source = fixture.open().await;
    let problems = source.problems();
    for (i, (text, line, part)) in cases.iter().enumerate() {
        let file = format!("{i:02}.yaml:");
        let told: Vec<&String> = problems.iter().filter(|p| p.starts_with(&file)).collect();
        let [told] = told[..] else { panic!("{file} {told:?}\n{text}") };
        assert!(told.starts_with(&format!("{file}{line}: ")) && told.contains(part), "{told}\n{text}");
        assert!(told.ends_with("(Egret uses nothing of this file until that is corrected)"), "{told}");
    }
    // None of their objects exists. Rejected policies are reported, and rejected gateways give out nothing.
    let now = source.now();
    let (unreadable, gateways) = (now.unreadable.clone(), now.gateways.clone());
    assert!(gateways.values().all(|g| g.frozen && g.fault.is_some() && g.pool.is_empty()), "{gateways:?}");
    assert_eq!(*now, Cluster { unreadable, gateways, ..Cluster::default() });
}

#[tokio::test]
async fn all_invalid_documents_of_a_file_are_reported() {
    let fixture = Fixture::new();
    let text = [policy("a", "good", 1), policy("a", "BAD", 1), policy("a", "good2", 1), "x: [".into()].join("---\n");
    fixture.put("a.yaml", &text);
    fixture.put("b.yaml", &policy("b", "other", 2));
    let source = fixture.open().await;
    assert_eq!(source.problems().len(), 2);
    assert!(source.problems()[0].starts_with("a.yaml:13: EgressPolicy/a/BAD: "), "{:?}", source.problems());
    assert_eq!(source.now().policies.len(), 1);
}

#[tokio::test]
async fn files_that_are_no_manifests_are_ignored() {
    let fixture = Fixture::new();
    fixture.put("empty.yaml", "");
    fixture.put("comments.yaml", "# nothing\n---\n# here\n");
    fixture.put("windows.yaml", &format!("\u{feff}{}", policy("a", "p", 1).replace('\n', "\r\n")));
    fixture.put(".hidden.yaml", "x: [");
    fixture.put(".git/config.yaml", "x: [");
    fixture.put("notes.txt", "x: [");
    fixture.put("a.yaml~", "x: [");
    fixture.put("status/mine/x.yaml", "x: [");
    let source = fixture.open().await;
    assert_eq!(source.problems(), [""; 0]);
    assert_eq!(source.now().policies.len(), 1);
}

#[tokio::test]
async fn garbage_is_rejected_quickly() {
    let fixture = Fixture::new();
    let noise: Vec<u8> = (0..10_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(fixture.path("noise.yaml"), noise).unwrap();
    fixture.put("word.yaml", &"x".repeat(10_000_000));
    fixture.put("deep.yaml", &"[".repeat(10_000_000));
    fixture.put("deep.json", &"{\"a\":".repeat(2_000_000));
    fixture.put(
        "bomb.yaml",
        &(0..40).fold("a0: &a0 [x, x]\n".into(), |t, i| format!("{t}a{}: &a{} [*a{i}, *a{i}]\n", i + 1, i + 1)),
    );
    fixture.put("good.yaml", &policy("a", "p", 1));
    let start = std::time::Instant::now();
    let source = fixture.open().await;
    assert_eq!(source.problems().len(), 5, "{:?}", source.problems());
    assert_eq!(source.now().policies.len(), 1);
    // Unoptimized, on a busy machine.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[tokio::test]
async fn of_two_definitions_the_first_counts_and_both_are_reported() {
    let fixture = Fixture::new();
    fixture.put("b.yaml", &(policy("x", "p", 2) + "---\n" + &policy("x", "q", 2)));
    fixture.put("a.yaml", &format!("# a comment\n{}---\n{}", policy("x", "p", 1), policy("x", "p", 3)));
    let source = fixture.open().await;
    let root = fixture.path("a.yaml");
    assert_eq!(source.0.problems.borrow().len(), 2);
    assert_eq!(
        source.problems()[1],
        format!(
            "b.yaml:1: EgressPolicy/x/p is defined twice; the one at {}:2 counts. Remove one of the two",
            root.display()
        )
        .replace(&format!("{}/", source.1), "")
    );
    let c = source.now();
    assert_eq!((priority(&c, "x/p"), priority(&c, "x/q")), (Some(1), Some(2)));
}

#[tokio::test]
async fn a_node_sees_its_own_pods_only() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", CLUSTER);
    let source = fixture.open_for(Scope::Node("node-1".into())).await;
    let c = source.now();
    assert_eq!(c.pods.keys().map(|k| &*k.name).collect::<Vec<_>>(), ["visitor-0"]);
    assert_eq!(c.nodes.len(), 1);
}

#[tokio::test]
async fn a_path_that_is_no_directory_cannot_be_opened() {
    let fixture = Fixture::new();
    fixture.put("file.yaml", "");
    for name in ["missing", "file.yaml"] {
        let error = open(&fixture.path(name), Scope::Controller).await.err().unwrap().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn no_text_causes_a_panic() {
    use super::super::documents::Documents;
    use crate::cluster::decode::manifest::{Reader, StatusPath};
    use crate::cluster::names::Names;
    const SIGNS: &[u8] = b"\n\t -:[]{}&*!|>'\"%@`#,?~0a";
    let whole = [CLUSTER, &gateway("g", "192.0.2.1"), &policy("a", "b", 1)].join("---\n");
    let mut random = 1u64;
    let mut next = move |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for _ in 0..3000 {
        let mut text = whole.as_bytes().to_vec();
        for _ in 0..next(4) {
            let at = next(text.len());
            text[at] = SIGNS[next(SIGNS.len())];
        }
        text.truncate(next(text.len()) + 1);
        let mut names = Names::default();
        let mut reader = Reader { names: &mut names, node: None, statuses: StatusPath::InFiles };
        let mut documents = Documents::new(&text[..]);
        while let Ok(Some(document)) = documents.next() {
            let lines = document.text.lines().count() as u32;
            if let Err(fault) = reader.read(document.text) {
                assert!((1..=lines + 1).contains(&fault.line) && !fault.message.is_empty(), "{fault:?}");
            }
        }
    }
}
