//! Pods that ran before Egret and that the cluster drops while they still send: a restarted daemon knows them. Needs
//! root.

use lab::by_hand::ByHand;
use lab::kernel::assert_no_traces;
use lab::scene::{assert_leaves_by_egress, visitors};
use lab::{EGRESS4, EGRESS6, EXT4, EXT6, Lab, Node, Pod, VISITOR, manifests};
use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::Duration;

fn records(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.run_dir().join("adopted")).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// What other programs may have put among the daemon's files.
fn litter(node: &Node) -> Vec<String> {
    let directory = node.run_dir().join("adopted");
    fs::create_dir_all(directory.join("directory")).expect("make a directory");
    node.run(["mkfifo", &directory.join("pipe").display().to_string()]);
    symlink("/dev/zero", directory.join("device")).expect("a link");
    fs::write(directory.join("4.json"), "{\"boot").expect("write");
    let huge = fs::File::create(directory.join("huge")).expect("create");
    huge.set_len(64 << 30).expect("a long file");
    fs::write(directory.join(".7"), "unfinished").expect("write");
    ["directory", "pipe", "device", "4.json", "huge", ".7"].map(str::to_owned).into()
}

/// A pod on every node that ran before Egret, and is adopted.
fn adopted() -> (Lab, Vec<Vec<String>>, Vec<Pod>) {
    let lab = Lab::new();
    let mut pods: Vec<Pod> = lab
        .nodes()
        .iter()
        .map(|node| {
            node.set_conflist(lab.plain_conflist(&node.name));
            lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), &[("app", "other")])
        })
        .collect();
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50", "2001:db8::50"]));
    lab.write_manifest("policy.yaml", &visitors());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    lab.wait_everywhere("shop", VISITOR, &[EGRESS4.into(), EGRESS6.into()]);
    let states = lab.nodes().iter().map(|node| node.egret_state()).collect();
    for pod in &mut pods {
        pod.relabel(VISITOR);
    }
    for pod in &pods {
        lab.wait_seen_as(pod, EGRESS4);
        lab.wait_seen_as(pod, EGRESS6);
    }
    (lab, states, pods)
}

#[test]
fn the_next_daemon_enforces_an_adopted_pod_that_the_cluster_has_dropped() {
    let (lab, before, pods) = adopted();
    lab.forget_wire();
    let pace = Duration::from_millis(5);
    let floods: Vec<_> =
        pods.iter().flat_map(|pod| [pod.flood(EXT4, pace, true), pod.flood(EXT6, pace, true)]).collect();
    for (n, pod) in pods.iter().enumerate() {
        if n % 2 == 0 {
            pod.forget();
        } else {
            let mut object = manifests::pod(&pod.node.name, "shop", &pod.name, &pod.uid, VISITOR, &pod.addresses);
            object["status"]["phase"] = "Failed".into();
            lab.manifests().write_object(&format!("pod-shop-{}.yaml", pod.name), &object);
        }
    }
    thread::sleep(Duration::from_millis(500));
    lab.assert_nothing_leaked();
    let mut littered = Vec::new();
    for round in 0..2 {
        for node in lab.nodes() {
            lab.daemon(&node.name).kill9();
            if round == 0 && node.name == "n1" {
                littered = litter(node);
            }
            lab.daemon(&node.name).restart();
        }
        for node in lab.nodes() {
            lab.wait_ready(&node.name);
        }
        thread::sleep(Duration::from_millis(500));
        lab.assert_nothing_leaked();
        // The policies are those that select its labels.
        pods.iter().for_each(assert_leaves_by_egress);
    }
    floods.into_iter().for_each(|flood| drop(flood.stop()));
    lab.assert_nothing_leaked();
    for (node, before) in lab.nodes().iter().zip(&before) {
        let on_node: Vec<_> = pods.iter().filter(|pod| pod.node.name == node.name).collect();
        on_node.iter().for_each(|pod| drop(node.ip(&format!("link del {}", pod.host_interface()))));
        if node.name == "n1" {
            // An unreadable file is not the daemon's and stays. A file that a killed writer left does not.
            littered.retain(|name| name != ".7");
            lab.wait_until("the record is gone", Duration::from_secs(5), || records(node).len() == littered.len());
            littered.iter().for_each(|name| assert!(records(node).contains(name), "{name}"));
            fs::remove_dir_all(node.run_dir().join("adopted")).expect("remove");
        }
        assert_no_traces(node, before);
    }
}

/// The veth is removed while no daemon runs, and another pod's veth gets its index.
#[test]
fn the_file_of_an_adopted_pod_affects_no_other_pod() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    let mut first = ByHand::make(&lab, "first", VISITOR, "cali1 index 1000", "10.244.1.77");
    first.pod.relabel(VISITOR);
    lab.wait_seen_as(&first.pod, EGRESS4);
    lab.forget_wire();
    first.pod.forget();
    lab.wait_until("it is written down", Duration::from_secs(5), || records(node) == ["1000.json"]);

    // An emptied run directory is restored.
    fs::remove_dir_all(node.run_dir()).expect("remove");
    fs::create_dir(node.run_dir()).expect("make");
    lab.wait_until("it is written down again", Duration::from_secs(40), || records(node) == ["1000.json"]);
    lab.daemon("n1").kill9();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    assert_eq!(first.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()));
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());

    lab.daemon("n1").kill9();
    first.unplug();
    let mut second = ByHand::make(&lab, "second", &[("app", "other")], "cali2 index 1000", "10.244.1.78");
    second.pod.relabel(&[("app", "other")]);
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&second.pod, node.ipv4());
    assert_no_traces(node, &before);

    // A file of another boot, whose indexes are invalid now.
    let mut adopted = ByHand::make(&lab, "third", VISITOR, "cali3 index 1001", "10.244.1.79");
    adopted.pod.relabel(VISITOR);
    lab.wait_seen_as(&adopted.pod, EGRESS4);
    let allocation = node.run_dir().join("adopted/1001.json");
    lab.daemon("n1").kill9();
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&allocation).expect("read")).expect("JSON");
    record["boot"] = "an earlier one".into();
    fs::write(&allocation, record.to_string()).expect("write");
    adopted.pod.relabel(&[("app", "other")]);
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&adopted.pod, node.ipv4());
    assert_no_traces(node, &before);
}

/// The plugin's verbs ignore the file of an adopted pod.
#[test]
fn the_plugin_takes_over_a_pod_that_was_adopted() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    let mut pod = ByHand::make(&lab, "pod", VISITOR, "cali1", "10.244.1.77");
    pod.pod.relabel(VISITOR);
    lab.wait_seen_as(&pod.pod, EGRESS4);
    lab.forget_wire();
    assert_eq!(records(node).len(), 1);
    // The pod was set up without the plugin: nothing is undone while it can send.
    pod.egret("DEL");
    assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()));
    assert_eq!(records(node).len(), 1);
    pod.egret("ADD");
    pod.egret("CHECK");
    lab.wait_until("its record is gone", Duration::from_secs(5), || records(node).is_empty());
    assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()));
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
    pod.end();
    assert_no_traces(node, &before);
    let free = ByHand::make(&lab, "free", &[("app", "other")], "cali2", "10.244.1.78");
    lab.wait_seen_as(&free.pod, node.ipv4());
    assert!(records(node).is_empty());
}

/// As with Cilium, whose own programs deliver packets to pods: the host has no route that tells a pod's veth.
#[test]
fn a_pod_whose_veth_no_route_tells_is_adopted() {
    let lab = Lab::new();
    let node = lab.node("n1");
    node.set_conflist(lab.plain_conflist("n1"));
    let mut pod = lab.add_pod("n1", "shop", "visitor-before", &[("app", "other")]);
    let veth = pod.host_interface();
    let mac = pod.mac("eth0");
    for (address, bits, hop) in [(pod.ipv4().to_string(), 32, "169.254.9.1"), (pod.ipv6().to_string(), 128, "fe80::9")]
    {
        node.ip(&format!("route replace {address}/{bits} via {hop} dev {veth} onlink"));
        node.ip(&format!("neigh replace {hop} lladdr {mac} dev {veth} nud permanent"));
    }
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50", "2001:db8::50"]));
    lab.write_manifest("policy.yaml", &visitors());
    lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
    lab.start();
    lab.wait_everywhere("shop", VISITOR, &[EGRESS4.into(), EGRESS6.into()]);
    pod.relabel(VISITOR);
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.forget_wire();
    assert_leaves_by_egress(&pod);
    lab.assert_nothing_leaked();
}
