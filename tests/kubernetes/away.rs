//! The API server is away, returns with less state, closes every connection, or rejects the credentials. Needs root.

use super::{PATIENCE, condition, proxy};
use lab::api::Role;
use lab::scene::{VISITOR, assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::{EGRESS4, EXT4, Lab, manifests};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn everything_continues_while_the_api_server_is_away() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let mut late = lab.sandbox("n2", "shop", "late", VISITOR);
    assert_leaves_by_egress(&pod);
    lab.api().stop();
    let end = Instant::now() + Duration::from_secs(8);
    // The node knew this pod before.
    late.attach().expect("ADD of a pod that is known");
    assert_leaves_by_egress(&late);
    // The node does not know this pod, and cannot ask: isolated.
    let mut unknown = lab.sandbox_unknown("n1", "shop", "unknown");
    unknown.attach().expect("ADD of a pod that nobody knows");
    // A daemon that restarts meanwhile changes nothing.
    lab.daemon("n2").restart();
    while Instant::now() < end {
        assert_leaves_by_egress(&pod);
        assert_leaves_by_egress(&late);
        assert_blocked(&unknown);
    }
    assert!(lab.ready("n1"), "a node without its API server does its work");
    lab.api().start_again();
    lab.wait_ready("n2");
    assert_leaves_by_egress(&pod);
    assert_leaves_by_egress(&late);
    let own = [lab.node("n1").ipv4(), lab.node("n2").ipv4()].map(IpAddr::V4);
    assert!(lab.sources(EXT4).iter().all(|a| !own.contains(a)), "{:?}", lab.sources(EXT4));
    // New objects take effect again.
    let spec = "podSelector: { matchLabels: { app: new } }\n  address: { ipv4: 192.0.2.51 }";
    lab.write_manifest("new.yaml", &manifests::policy("shop", "new", spec));
    lab.wait_until("the policy is in place", PATIENCE, || {
        condition(&lab, "shop/new", "Ready").is_some_and(|c| c.0 == "True")
    });
    let new = lab.add_pod("n1", "shop", "new", &[("app", "new")]);
    lab.wait_seen_as(&new, "192.0.2.51".parse::<Ipv4Addr>().expect("an address"));
}

#[test]
fn a_daemon_that_starts_while_the_api_server_is_away_continues_with_its_offline_cache() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let mut late = lab.sandbox("n1", "shop", "late", VISITOR);
    let known = |kind: &str| std::fs::read_to_string(lab.node("n1").run_dir().join("known").join(kind));
    lab.wait_until("n1 knows the pod", PATIENCE, || known("Pod").is_ok_and(|text| text.contains("shop/late\t")));
    // A deleted policy does not return.
    let spec = "podSelector: { matchLabels: { app: gone } }";
    lab.write_manifest("gone.yaml", &manifests::policy("shop", "gone", spec));
    lab.wait_until("n1 knows", PATIENCE, || known("EgressPolicy").is_ok_and(|text| text.contains("shop/gone\t")));
    lab.remove_manifest("gone.yaml");
    lab.wait_until("n1 knows", PATIENCE, || known("EgressPolicy").is_ok_and(|text| text.contains("shop/gone\n")));
    let other = lab.add_pod("n1", "shop", "other", &[("app", "gone")]);
    assert_leaves_by_node(&other);
    lab.api().stop();
    let nodes = ["n1", "n2", "g1", "g2"];
    nodes.iter().for_each(|node| lab.daemon(node).restart());
    nodes.iter().for_each(|node| lab.wait_ready(node));
    assert_leaves_by_egress(&pod);
    assert_leaves_by_node(&other);
    late.attach().expect("ADD of a pod that was known");
    assert_leaves_by_egress(&late);
    let mut unknown = lab.sandbox_unknown("n1", "shop", "unknown");
    unknown.attach().expect("ADD of a pod that nobody knows");
    assert_blocked(&unknown);
    // It takes part in failover.
    let owner = ["g1", "g2"].into_iter().find(|g| lab.node(g).ip("-o addr").contains(&format!(" {EGRESS4}/32 ")));
    let port = format!("link set p-{}", owner.expect("an owner"));
    lab.host("fab").ip(&format!("{port} down"));
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&late, EGRESS4);
    assert_blocked(&unknown);
    // A taken-over egress IP stays after another restart.
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&pod, EGRESS4);
    lab.host("fab").ip(&format!("{port} up"));
    lab.api().start_again();
    let spec = "podSelector: { matchLabels: { app: new } }\n  address: { ipv4: 192.0.2.58 }";
    lab.write_manifest("new.yaml", &manifests::policy("shop", "new", spec));
    let new = lab.add_pod("n1", "shop", "new", &[("app", "new")]);
    lab.wait_seen_as(&new, "192.0.2.58".parse::<Ipv4Addr>().expect("an address"));
    assert_leaves_by_egress(&pod);
}

#[test]
fn missed_changes_are_found_by_a_new_list() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    // The node no longer reaches the server, and the server counts the node as lost.
    let deaf = "table inet deaf {\n chain in {\n type filter hook input priority -10\n tcp sport 6443 reject with tcp reset\n }\n}\n";
    lab.node("n1").nft(deaf);
    let spec = "podSelector: { matchLabels: { app: visitor } }\n  address: { ipv4: 192.0.2.52 }\n  priority: 9";
    lab.write_manifest("other.yaml", &manifests::policy("shop", "other", spec));
    lab.wait_until("the policy has its address", PATIENCE, || {
        condition(&lab, "shop/other", "Ready").is_some_and(|c| c.0 == "True")
    });
    lab.api().server.kill9();
    // etcd compacts its history, and a restarted server knows the present state only.
    let etcd = "http://127.0.0.1:2379";
    let status = lab.host("api").run(["curl", "-sf", "-d", "{}", &format!("{etcd}/v3/maintenance/status")]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let compaction = json!({"revision": status["header"]["revision"], "physical": true}).to_string();
    lab.host("api").run(["curl", "-sf", "-d", &compaction, &format!("{etcd}/v3/kv/compaction")]);
    lab.api().server.restart();
    lab.api().wait_ready();
    lab.node("n1").nft("delete table inet deaf");
    lab.wait_until("n1 lists again", Duration::from_secs(60), || {
        lab.daemon("n1").log().contains("changes were missed")
    });
    lab.wait_seen_as(&pod, "192.0.2.52".parse::<Ipv4Addr>().expect("an address"));
}

#[test]
fn watches_that_end_every_second_lose_nothing() {
    let lab = Lab::builder().kubernetes().scene();
    proxy::cutting(&lab, 6444, Duration::from_secs(1));
    let kubeconfig = lab.api().kubeconfig_by(Role::Node, 6444);
    lab.daemon("n1").kill9();
    let mut arguments = lab.node_daemon_arguments("n1");
    let at = arguments.iter().position(|a| a == "--kubeconfig").expect("a kubeconfig") + 1;
    arguments[at] = kubeconfig.display().to_string();
    lab.start_daemon("n1", lab.node("n1"), arguments);
    lab.wait_ready("n1");
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    for last in [53u8, 54, 55, 56] {
        let spec = format!(
            "podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: 192.0.2.{last} }}\n  priority: 9"
        );
        lab.write_manifest("other.yaml", &manifests::policy("shop", "other", &spec));
        lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, last));
        thread::sleep(Duration::from_millis(700));
    }
    lab.remove_manifest("other.yaml");
    lab.wait_seen_as(&pod, EGRESS4);
}

#[test]
fn credentials_that_expire_are_read_again() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    lab.api().set_token(Role::Node, "new-token");
    lab.api().server.restart();
    lab.api().wait_ready();
    lab.wait_until("n1 says that it is not let in", PATIENCE, || lab.daemon("n1").log().contains("not accepted"));
    assert_leaves_by_egress(&pod);
    std::fs::write(lab.api().token_file(Role::Node), "new-token").expect("write a token");
    let spec = "podSelector: { matchLabels: { app: visitor } }\n  address: { ipv4: 192.0.2.57 }\n  priority: 9";
    lab.write_manifest("other.yaml", &manifests::policy("shop", "other", spec));
    lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, 57));
    assert!(lab.sources(EXT4).iter().all(|a| *a != IpAddr::V4(lab.node("n1").ipv4())));
}
