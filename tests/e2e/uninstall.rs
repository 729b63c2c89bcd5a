//! Installation and uninstallation on hosts: the daemon maintains the entry while it runs, and after `egretd
//! uninstall` the host is as it was before. Needs root.

use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node, visitors};
use lab::{EGRESS4, EGRESS6, EXT4, Lab, LabBuilder, Node, NodeSpec, Pods, VISITOR, manifests};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

const PLAIN: &str = "{ \"name\":\"cbr0\", \"cniVersion\": \"1.0.0\",\n  \"plugins\":[ {\"type\": \"flannel\"} ] }\n";
const LIST: &str = "10-flannel.conflist";

/// The routed nodes of the usual lab, because bridges outlive their pods.
fn builder() -> LabBuilder {
    Lab::builder().nodes(vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)])
}

fn start(lab: &Lab) {
    let addresses = ["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"];
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &addresses));
    lab.write_manifest("policy.yaml", &visitors());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    lab.wait_everywhere("shop", VISITOR, &[EGRESS4.into(), EGRESS6.into()]);
}

/// Everything that `ip` and `nft` show of a node's network.
fn network(node: &Node) -> Vec<String> {
    let mut lines = Vec::new();
    let mut add = |what: &str, text: &str| lines.extend(text.lines().map(|l| format!("{what}: {}", l.trim_end())));
    for family in ["-4", "-6"] {
        add("rule", &node.ip(&format!("{family} rule")));
        add("route", &node.ip(&format!("{family} route show table all")));
    }
    add("address", &node.ip("addr"));
    add("link", &node.ip("-d link"));
    add("nft", &node.run(["nft", "-s", "list", "ruleset"]));
    lines
}

fn cni_dir(node: &Node, name: &str) -> PathBuf {
    let dir = node.directory.join(name);
    fs::create_dir_all(&dir).expect("make a directory");
    dir
}

fn uninstall(node: &Node, more: &[&str]) -> Output {
    let mut argv = vec![env!("CARGO_BIN_EXE_egretd").to_owned(), "uninstall".into()];
    argv.extend(["--cni-bin-dir".into(), cni_dir(node, "bin").display().to_string()]);
    argv.extend(["--cni-conf-dir".into(), cni_dir(node, "conf").display().to_string()]);
    argv.extend(["--run-dir".into(), node.run_dir().display().to_string()]);
    argv.extend(["--state-dir".into(), node.state_dir().display().to_string()]);
    argv.extend(more.iter().map(|a| (*a).to_owned()));
    node.try_run(argv)
}

/// Runs `egretd uninstall` on a node, with success.
#[track_caller]
pub fn uninstalled(node: &Node, more: &[&str]) {
    let out = uninstall(node, more);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

fn run_dir(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.run_dir()).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn uninstallation_removes_the_device_of_egress_ips_that_routers_announce() {
    let lab = builder().router().build();
    let before = network(lab.node("g1"));
    lab.write_manifest("gateway.yaml", &lab::routed::gateway());
    lab.write_manifest("policy.yaml", &lab::routed::policy());
    lab.add_namespace("shop", &[]);
    lab.start();
    let node = lab.node("g1");
    lab.wait_until("the egress IP is on its device", Duration::from_secs(10), || {
        node.ip("-o addr show").contains("198.51.100.50/32")
    });
    assert!(node.ip("-4 route show table local").contains("blackhole 198.51.100.50"));
    lab.daemon("g1").kill9();
    uninstalled(node, &[]);
    let difference = lab::kernel::difference(&before, &network(node));
    assert!(difference.is_empty(), "{difference}");
}

#[test]
fn uninstallation_restores_the_host_to_its_state_before_the_first_start() {
    let lab = builder().build();
    let before: Vec<_> = lab.nodes().iter().map(|n| network(n)).collect();
    for node in lab.nodes() {
        fs::write(cni_dir(node, "conf").join(LIST), PLAIN).expect("write");
        fs::write(cni_dir(node, "bin").join("portmap"), "somebody else's").expect("write");
        let program = env!("CARGO_BIN_EXE_egretd");
        let conf = node.directory.join("conf").display().to_string();
        let bin = node.directory.join("bin").display().to_string();
        let socket = node.cni_socket().display().to_string();
        node.run([program, "install", "--entry", "--cni-conf-dir", &conf, "--cni-bin-dir", &bin, "--socket", &socket]);
        assert!(fs::read_to_string(node.directory.join("conf").join(LIST)).expect("read").contains("egret-cni"));
    }
    start(&lab);
    let pods: Vec<_> = ["n1", "g1"].map(|n| lab.add_pod(n, "shop", &format!("pod-{n}"), VISITOR)).into();
    pods.iter().for_each(assert_leaves_by_egress);

    let node = lab.node("n1");
    let out = uninstall(node, &[]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("egretd runs on this host"), "{said}");
    assert_leaves_by_egress(&pods[0]);

    // A node with a pod in quarantine, and one whose daemon was killed at work.
    lab.daemon("n1").term();
    let quarantined = lab.add_pod("n1", "shop", "quarantined", VISITOR);
    assert!(quarantined.udp_who(EXT4).is_err());
    lab.daemon("g1").kill9();
    let cluster = format!("dir:{}", lab.manifests().path().display());
    for node in lab.nodes() {
        let status = lab.manifests().path().join(format!("status/egressnodes/{}.yaml", node.name));
        assert!(status.exists());
        uninstalled(node, &["--cluster", &cluster, "--name", &node.name]);
        assert!(!status.exists());
        assert_eq!(run_dir(node), ["uninstalled"]);
        assert_eq!(fs::read_to_string(node.directory.join("conf").join(LIST)).expect("read"), PLAIN);
        assert!(node.directory.join("bin/egret-cni").exists());
    }
    pods.iter().chain([&quarantined]).for_each(assert_leaves_by_node);

    // The runtime uses the list that it has read.
    for name in ["n1", "g1"] {
        let pod = lab.add_pod(name, "shop", &format!("late-{name}"), VISITOR);
        assert_leaves_by_node(&pod);
        pod.check().unwrap_or_else(|e| panic!("CHECK: {e}"));
        pod.delete();
    }
    pods.into_iter().chain([quarantined]).for_each(lab::Pod::delete);
    for (node, before) in lab.nodes().iter().zip(&before) {
        let difference = lab::kernel::difference(before, &network(node));
        assert!(difference.is_empty(), "{}:\n{difference}", node.name);
        assert_eq!(run_dir(node), ["uninstalled"]);
        // A second time, and with the program.
        uninstalled(node, &["--cluster", &cluster, "--name", &node.name]);
        uninstalled(node, &["--remove-plugin"]);
        uninstalled(node, &["--remove-plugin"]);
        assert!(!node.run_dir().exists() && !node.state_dir().exists());
        let left: Vec<_> = fs::read_dir(node.directory.join("bin")).expect("bin").flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    // Egret can be installed again.
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    assert!(!node.run_dir().join("uninstalled").exists());
    lab.daemon("g1").restart();
    lab.wait_ready("g1");
    let pod = lab.add_pod("n1", "shop", "again", VISITOR);
    lab.wait_seen_as(&pod, EGRESS4);
}

/// A pod's connection must not continue with the pod's own address when nobody translates it any more.
#[test]
fn connections_do_not_leave_with_a_pods_address_after_an_uninstallation() {
    let lab = builder().build();
    start(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let session = pod.session(EXT4).expect("a session");
    thread::sleep(Duration::from_millis(100));
    lab.forget_wire();
    lab.daemon("n1").term();
    uninstalled(lab.node("n1"), &[]);
    thread::sleep(Duration::from_millis(700));
    session.stop();
    let sources = lab.sources(EXT4);
    assert!(!sources.contains(&pod.addresses[0]), "{sources:?}");
}

#[test]
fn an_uninstallation_continues_after_an_error_and_reports_it() {
    let lab = builder().build();
    start(&lab);
    let node = lab.node("n1");
    fs::write(cni_dir(node, "conf").join("01-broken.conflist"), "{ \"type\": \"egret-cni\" ").expect("write");
    fs::write(cni_dir(node, "conf").join("kubeconfig"), "egret-cni: not a conflist").expect("write");
    let aside = PLAIN.replace("{\"type\": \"flannel\"}", "{\"type\": \"flannel\"}, {\"type\": \"egret-cni\"}");
    fs::write(cni_dir(node, "conf").join("10-flannel.conflist.cilium_bak"), aside).expect("write");
    lab.daemon("n1").term();
    let out = uninstall(node, &["--cluster", &format!("dir:{}", lab.manifests().path().display()), "--name", "N 1"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("01-broken.conflist"), "{said}");
    assert!(said.contains(r#""N 1" is not a valid node name"#), "{said}");
    assert!(!said.contains("kubeconfig"), "{said}");
    assert!(!network(node).iter().any(|l| l.contains("egret")), "{:#?}", network(node));
    let aside = fs::read_to_string(cni_dir(node, "conf").join("10-flannel.conflist.cilium_bak")).expect("read");
    assert_eq!(aside, PLAIN);
}

/// A node whose daemon maintains the entry.
fn kept() -> (Lab, PathBuf, PathBuf) {
    let mut lab = Lab::builder().nodes(vec![NodeSpec::new("n1", 11, Pods::Routed)]).build();
    let (conf, bin) = (cni_dir(lab.node("n1"), "conf"), cni_dir(lab.node("n1"), "bin"));
    let flags = ["--cni-conf-dir".to_owned(), conf.display().to_string(), "--cni-bin-dir".to_owned()];
    lab.node_arguments = flags.into_iter().chain([bin.display().to_string()]).collect();
    (lab, conf, bin)
}

fn has_entry(path: &std::path::Path) -> bool {
    let text = fs::read_to_string(path).unwrap_or_default();
    let list = serde_json::from_str::<Value>(&text).unwrap_or_default();
    list["plugins"].as_array().is_some_and(|all| all.iter().any(|p| p["type"] == "egret-cni"))
}

#[test]
fn the_daemon_restores_its_entry_within_a_second_of_another_cnis_rewrite() {
    let (lab, conf, bin) = kept();
    fs::remove_dir(&conf).expect("remove");
    lab.start();
    assert!(lab.node("n1").state_dir().join("offline-policies.json").exists());
    let list = conf.join(LIST);
    let second = Duration::from_secs(1);
    assert_eq!(lab.metrics("n1").get("egret_node_cni_configured", &[]), Some(0.0));
    fs::create_dir(&conf).expect("make");
    fs::write(&list, PLAIN).expect("write");
    lab.wait_until("the entry is there", second, || has_entry(&list));
    let socket = json!(lab.node("n1").cni_socket());
    let text = fs::read_to_string(&list).expect("read");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")["plugins"][1]["socket"], socket);
    for round in 0..3 {
        if round % 2 == 0 {
            fs::write(&list, PLAIN).expect("write");
        } else {
            fs::write(conf.join("new"), PLAIN).expect("write");
            fs::rename(conf.join("new"), &list).expect("rename");
        }
        lab.wait_until("the entry is back", second, || has_entry(&list));
    }
    // Another CNI takes over, and is removed again.
    fs::write(conf.join("05-other.conflist"), PLAIN).expect("write");
    lab.wait_until("the new first one has it", second, || has_entry(&conf.join("05-other.conflist")));
    fs::remove_file(conf.join("05-other.conflist")).expect("remove");
    // The directory is created anew.
    fs::remove_dir_all(&conf).expect("remove");
    thread::sleep(Duration::from_millis(300));
    fs::create_dir(&conf).expect("make");
    fs::write(&list, PLAIN).expect("write");
    lab.wait_until("the new directory has it", second, || has_entry(&list));
    // The program.
    fs::remove_file(bin.join("egret-cni")).expect("remove");
    lab.wait_until("the program is back", second, || bin.join("egret-cni").exists());
    lab.wait_until("the metric says so", second, || {
        lab.metrics("n1").get("egret_node_cni_configured", &[]) == Some(1.0)
    });
    lab.wait_until("it counts each time", second, || {
        lab.metrics("n1").get("egret_node_cni_entry_written_total", &[]) >= Some(6.0)
    });
    // A configuration that cannot be extended is reported and stays unchanged.
    let old = PLAIN.replace("1.0.0", "0.2.0");
    fs::write(&list, &old).expect("write");
    lab.wait_until("it is said", second, || lab.daemon("n1").log().contains("cniVersion \"0.2.0\" is not supported"));
    assert_eq!(fs::read_to_string(&list).expect("read"), old);
}

#[test]
fn repeated_rewrites_are_throttled_and_reported() {
    let (lab, conf, _) = kept();
    let list = conf.join(LIST);
    fs::write(&list, PLAIN).expect("write");
    lab.start();
    let begin = Instant::now();
    let mut answers = 0;
    while begin.elapsed() < Duration::from_secs(9) {
        if has_entry(&list) {
            answers += 1;
            fs::write(&list, PLAIN).expect("write");
        }
        thread::sleep(Duration::from_millis(2));
    }
    assert!((10..=13).contains(&answers), "{answers} answers in nine seconds");
    assert_eq!(lab.daemon("n1").log().matches("times within a minute").count(), 1);
    assert_eq!(lab.metrics("n1").get("egret_node_cni_fight", &[]), Some(1.0));
    lab.wait_until("the last word is the daemon's", Duration::from_secs(8), || has_entry(&list));
}
