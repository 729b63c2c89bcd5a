//! Policies with `action: Direct`: what they cover leaves as if Egret were not there. Needs root.

use lab::scene::assert_leaves_by_egress;
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, FAR4, FAR6, Lab, Pod, Session, VISITOR, manifests};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

/// The networks of the servers behind the router.
const FAR: &str =
    "egress: [{ to: [{ ipBlock: { cidr: 203.0.113.0/24 } }, { ipBlock: { cidr: \"2001:db8:2::/64\" } }] }]";

/// A policy of the visitors' namespace that lets them reach the servers behind the router directly.
fn direct(more: &str) -> String {
    let spec = format!(
        "action: Direct\n  podSelector: {{ matchLabels: {{ app: visitor }} }}\n  priority: 10\n  {FAR}\n  {more}"
    );
    manifests::policy("shop", "direct", &spec)
}

fn own(pod: &Pod) -> [IpAddr; 2] {
    [pod.node.ipv4().into(), pod.node.ipv6().into()]
}

/// Waits until new connections to the servers behind the router have these addresses.
#[track_caller]
fn wait_far(lab: &Lab, pod: &Pod, wanted: [IpAddr; 2]) {
    lab.wait_for("the address seen far away", &[Some(wanted[0]), Some(wanted[1])], || {
        [pod.who(FAR4).ok(), pod.who(FAR6).ok()]
    });
}

#[test]
fn what_a_direct_policy_covers_leaves_as_if_egret_were_not_there() {
    let lab = Lab::builder().router().scene();
    lab.server("far").lock().expect("a lock").also_tell_on(lab.host("far"), 5060);
    lab.server("ext").lock().expect("a lock").also_tell_on(lab.host("ext"), 5060);
    let pods = ["n1", "n2", "g1", "g2"].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    pods.iter().for_each(|pod| wait_far(&lab, pod, [EGRESS4.into(), EGRESS6.into()]));
    lab.write_manifest("direct.yaml", &direct(""));
    // A policy that decides before it.
    let voice = "podSelector: {}\n  priority: 20\n  address: { ipv4: 192.0.2.52, ipv6: \"2001:db8::52\" }\n  egress: [{ \
                 ports: [{ protocol: UDP, port: 5060 }] }]";
    lab.write_manifest("voice.yaml", &manifests::policy("shop", "voice", voice));
    for pod in &pods {
        wait_far(&lab, pod, own(pod));
        let seen = [pod.udp_who(FAR4), pod.udp_who(FAR6)].map(Result::ok);
        assert_eq!(seen, own(pod).map(Some), "{} by UDP", pod.name);
        assert_leaves_by_egress(pod);
        for server in [IpAddr::from(FAR4), EXT4.into()] {
            lab.wait_for("the policy before it", &Some(IpAddr::from([192, 0, 2, 52])), || {
                pod.udp_who_at(SocketAddr::new(server, 5060)).ok()
            });
        }
    }
    let status = lab.manifests().statuses();
    assert!(status.contains("reason: Direct"), "{status}");
    lab.remove_manifest("direct.yaml");
    pods.iter().for_each(|pod| wait_far(&lab, pod, [EGRESS4.into(), EGRESS6.into()]));
}

#[test]
fn connections_keep_their_address_when_a_direct_policy_comes_and_goes() {
    let lab = Lab::builder().router().scene();
    let pods = ["n1", "g1"].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    let sessions = |pod: &Pod| [pod.session(FAR4), pod.session(FAR6)].map(|session| session.expect("a session"));
    pods.iter().for_each(|pod| wait_far(&lab, pod, [EGRESS4.into(), EGRESS6.into()]));
    let by_egress: Vec<Session> = pods.iter().flat_map(sessions).collect();
    lab.write_manifest("direct.yaml", &direct(""));
    pods.iter().for_each(|pod| wait_far(&lab, pod, own(pod)));
    let by_node: Vec<Session> = pods.iter().flat_map(sessions).collect();
    thread::sleep(Duration::from_millis(500));
    lab.remove_manifest("direct.yaml");
    pods.iter().for_each(|pod| wait_far(&lab, pod, [EGRESS4.into(), EGRESS6.into()]));
    thread::sleep(Duration::from_millis(500));
    // The address of a connection cannot change, so a session that goes on has kept its own.
    for session in by_node {
        let report = session.stop();
        assert!(report.broken.is_none(), "begun directly: {report:?}");
    }
    lab.write_manifest("direct.yaml", &direct("existingConnections: End"));
    pods.iter().for_each(|pod| wait_far(&lab, pod, own(pod)));
    thread::sleep(Duration::from_millis(500));
    for session in by_egress {
        let report = session.stop();
        let reset = report.broken.as_ref().is_some_and(|why| why.contains("reset"));
        assert!(reset, "existingConnections: End has not ended {report:?}");
    }
}

#[test]
fn a_pod_that_only_direct_policies_select_is_left_alone() {
    let lab = Lab::builder().router().scene();
    lab.add_namespace("office", &[]);
    let spec = "action: Direct\n  podSelector: {}";
    lab.write_manifest("office.yaml", &manifests::policy("office", "all", spec));
    lab.wait_until("the policy is known", Duration::from_secs(5), || {
        lab.manifests().statuses().contains("reason: Direct")
    });
    for node in ["n1", "g1"] {
        let pod = lab.add_pod(node, "office", &format!("clerk-{node}"), &[]);
        let rules = lab.node(node).run(["nft", "list", "table", "inet", "egret"]);
        assert!(!rules.contains(&pod.host_interface()), "{node}: {rules}");
        lab.daemon(node).kill9();
        let started = lab.add_pod(node, "office", &format!("late-{node}"), &[]);
        for pod in [&pod, &started] {
            let seen = [pod.who(EXT4), pod.who(EXT6)].map(Result::ok);
            assert_eq!(seen, own(pod).map(Some), "{}", pod.name);
        }
        lab.daemon(node).restart();
        lab.wait_ready(node);
    }
}

#[test]
fn no_tenant_exempts_its_pods_from_a_cluster_policy() {
    let lab = Lab::builder().router().scene();
    let cluster_policy = |name: &str, spec: &str| {
        format!(
            "apiVersion: egret.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{ name: {name} }}\nspec:\n  podSelector: {{}}\n  {spec}\n---\n"
        )
    };
    lab.add_namespace("office", &[]);
    lab.write_manifest(
        "cluster.yaml",
        &cluster_policy("all", "address: { ipv4: 192.0.2.57, ipv6: \"2001:db8::57\" }\n  priority: -5"),
    );
    lab.write_manifest(
        "tenant.yaml",
        &manifests::policy("office", "escape", "action: Direct\n  podSelector: {}\n  priority: 9"),
    );
    let pod = lab.add_pod("n1", "office", "clerk", &[]);
    let audited: [IpAddr; 2] = [[192, 0, 2, 57].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x57].into()];
    wait_far(&lab, &pod, audited);
    lab.wait_until("the tenant is told", Duration::from_secs(5), || {
        lab.manifests().statuses().contains("no EgressPolicy exempts pods")
    });
    wait_far(&lab, &pod, audited);
    assert_eq!([pod.who(EXT4), pod.who(EXT6)].map(Result::ok), audited.map(Some));
    lab.write_manifest("exempt.yaml", &cluster_policy("exempt", &format!("action: Direct\n  {FAR}")));
    wait_far(&lab, &pod, own(&pod));
    assert_eq!([pod.who(EXT4), pod.who(EXT6)].map(Result::ok), audited.map(Some));
}

#[test]
fn why_names_the_direct_policy_that_decides() {
    let lab = Lab::builder().router().scene();
    lab.write_manifest("direct.yaml", &direct(""));
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    let source = format!("dir:{}", lab.manifests().path().display());
    let why = |more: &[&str]| {
        let arguments = [&[env!("CARGO_BIN_EXE_egretd"), "why", "shop/visitor", "--cluster", &source], more].concat();
        lab.node("n1").run(arguments)
    };
    for server in [FAR4.to_string(), FAR6.to_string()] {
        let words =
            format!("{server} leaves as if Egret were not there: EgressPolicy shop/direct decides (action: Direct)");
        lab.wait_until("why", Duration::from_secs(5), || why(&["--to", &server]).contains(&words));
    }
    assert!(why(&["--to", &EXT4.to_string()]).contains(&format!("leaves from {EGRESS4}")));
    let all = why(&[]);
    let is_named = |line: &str| line.contains("EgressPolicy shop/direct") && line.ends_with("action: Direct");
    assert!(all.lines().any(is_named), "{all}");
}
