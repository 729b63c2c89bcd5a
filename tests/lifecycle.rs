//! Pods come and go: many at once, twice, late, with the daemon away.

mod lab;

use lab::kernel::assert_no_traces;
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node, visitors};
use lab::server::UDP_WHO;
use lab::{EGRESS4, EXT4, Lab, Pod, SERVERS, Server, VISITOR, manifests};
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

#[test]
fn two_hundred_pods_come_at_once_each_works_from_its_first_packet_and_they_go_at_once() {
    let lab = Lab::scene();
    let before: Vec<_> = lab.nodes().iter().map(|n| n.egret_state()).collect();
    let sandboxes: Vec<Pod> = (0..200)
        .map(|i| {
            let labels = if i % 4 == 3 { &[("app", "other")] } else { VISITOR };
            lab.sandbox(["n1", "n2"][i % 2], "shop", &format!("pod-{i}"), labels)
        })
        .collect();
    let pods: Vec<Pod> = thread::scope(|scope| {
        let adding: Vec<_> = sandboxes
            .into_iter()
            .map(|mut pod| {
                scope.spawn(move || {
                    pod.attach().unwrap_or_else(|e| panic!("ADD of {}: {e}", pod.name));
                    let first = pod.udp_who(EXT4);
                    (pod, first)
                })
            })
            .collect();
        adding
            .into_iter()
            .map(|thread| {
                let (pod, first) = thread.join().expect("an ADD");
                let i: usize = pod.name.trim_start_matches("pod-").parse().expect("a number");
                let promised = if i % 4 == 3 { IpAddr::from(pod.node.ipv4()) } else { EGRESS4.into() };
                assert_eq!(first.ok(), Some(promised), "{} by its first packet", pod.name);
                pod
            })
            .collect()
    });
    for pod in pods.iter().filter(|p| p.name.ends_with('0')) {
        assert_leaves_by_egress_or_node(pod);
    }
    thread::scope(|scope| {
        for pod in pods {
            scope.spawn(|| pod.delete());
        }
    });
    for (node, before) in lab.nodes().iter().zip(&before) {
        assert_no_traces(node, before);
    }
}

fn assert_leaves_by_egress_or_node(pod: &Pod) {
    let i: usize = pod.name.trim_start_matches("pod-").parse().expect("a number");
    if i % 4 == 3 { assert_leaves_by_node(pod) } else { assert_leaves_by_egress(pod) }
}

#[test]
fn pods_come_and_go_while_the_daemon_is_killed_again_and_again() {
    let lab = Lab::scene();
    let node = lab.node("n2");
    let before = node.egret_state();
    let daemon = lab.daemon("n2");
    let pods: Vec<Pod> = thread::scope(|scope| {
        let adding = scope.spawn(|| {
            let mut pods = Vec::new();
            for i in 0..40 {
                let pod = lab.add_pod("n2", "shop", &format!("pod-{i}"), VISITOR);
                if i % 3 == 0 { pod.delete() } else { pods.push(pod) }
            }
            pods
        });
        while !adding.is_finished() {
            daemon.kill9();
            thread::sleep(Duration::from_millis(40));
            daemon.restart();
            thread::sleep(Duration::from_millis(150));
        }
        adding.join().expect("adding")
    });
    lab.wait_ready("n2");
    for pod in &pods {
        lab.wait_seen_as(pod, EGRESS4);
    }
    for server in SERVERS {
        let sources = lab.sources(server);
        assert!(!sources.contains(&node.ipv4().into()) && !sources.contains(&node.ipv6().into()), "{sources:?}");
    }
    pods.into_iter().for_each(Pod::delete);
    assert_no_traces(node, &before);
}

#[test]
fn del_may_come_twice_with_the_daemon_away_with_the_namespace_gone_and_without_a_previous_result() {
    let lab = Lab::scene();
    for name in ["n1", "n2"] {
        let node = lab.node(name);
        let before = node.egret_state();
        let add = |i: u32| lab.add_pod(name, "shop", &format!("pod-{name}-{i}"), VISITOR);
        let egret_del = |pod: &Pod, previous: Option<&Value>| {
            pod.conflist.del_only("egret-cni", node, &pod.runtime, previous).unwrap_or_else(|e| panic!("DEL: {e}"));
        };

        let twice = add(1);
        egret_del(&twice, twice.result.as_ref());
        twice.detach().expect("the second DEL");
        twice.detach().expect("the third DEL");

        let gone = add(2);
        gone.remove_netns();
        gone.detach().expect("DEL without the namespace");

        let mut forgotten = add(3);
        forgotten.remove_netns();
        forgotten.runtime.netns = String::new();
        egret_del(&forgotten, None);
        forgotten.detach().expect("DEL of the rest");

        let away = add(4);
        let away_and_gone = add(5);
        lab.daemon(name).kill9();
        away.detach().expect("DEL with the daemon away");
        away.detach().expect("a second one");
        away_and_gone.remove_netns();
        egret_del(&away_and_gone, None);
        away_and_gone.detach().expect("DEL of the rest");
        let quarantined = add(6);
        quarantined.detach().expect("DEL of a pod in quarantine");
        lab.daemon(name).restart();
        lab.wait_ready(name);
        // For as long as the cluster knows the pods, their addresses may rightly be held.
        [twice, gone, forgotten, away, away_and_gone, quarantined].iter().for_each(Pod::forget);
        assert_no_traces(node, &before);
    }
}

/// A routed pod by hand, as Calico makes them: the test says which address and which name the veth on the host has.
struct ByHand {
    pod: Pod,
    veth: String,
}

impl ByHand {
    /// Makes the interface, and calls `egret-cni` alone.
    fn add(lab: &Lab, name: &str, labels: lab::manifests::Labels, veth: &str, address: &str) -> ByHand {
        let by_hand = ByHand::make(lab, name, labels, veth, address);
        by_hand.egret("ADD");
        by_hand
    }

    /// Makes the interface. `veth` is its name, and what else `ip link add` may be told.
    fn make(lab: &Lab, name: &str, labels: lab::manifests::Labels, veth: &str, address: &str) -> ByHand {
        let mut pod = lab.sandbox("n1", "shop", name, labels);
        let node = lab.node("n1");
        node.ip(&format!("link add {veth} type veth peer name eth0 netns {}", pod.netns));
        let veth = veth.split(' ').next().unwrap_or(veth);
        node.ip_batch(&[
            format!("link set {veth} up"),
            format!("route replace {address} dev {veth}"),
            format!("addr add 169.254.1.1/32 dev {veth}"),
        ]);
        pod.ip_batch(&[
            format!("addr add {address}/32 dev eth0"),
            "link set eth0 up".into(),
            "route add 169.254.1.1 dev eth0".into(),
            "route add default via 169.254.1.1".into(),
        ]);
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": pod.netns_path()}],
            "ips": [{"address": format!("{address}/32"), "interface": 0}]
        });
        pod.addresses = vec![address.parse().expect("an address")];
        pod.result = Some(result);
        ByHand { pod, veth: veth.to_owned() }
    }

    fn egret(&self, verb: &str) {
        self.pod.egret(verb, |_| {}).unwrap_or_else(|e| panic!("{verb}: {e}"));
    }

    fn unplug(&self) {
        self.pod.node.ip(&format!("link del {}", self.veth));
    }
}

#[test]
fn a_late_del_leaves_the_next_pod_of_the_same_address_alone() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    for round in 0..5 {
        let first = ByHand::add(&lab, &format!("first-{round}"), VISITOR, "cali1", "10.244.1.77");
        assert_eq!(first.pod.who(EXT4).ok(), Some(EGRESS4.into()));
        first.unplug();
        let second = ByHand::add(&lab, &format!("second-{round}"), VISITOR, "cali2", "10.244.1.77");
        assert_eq!(second.pod.who(EXT4).ok(), Some(EGRESS4.into()), "before the late DEL");
        first.egret("DEL");
        assert_eq!(second.pod.who(EXT4).ok(), Some(EGRESS4.into()), "after the late DEL");
        first.egret("DEL");
        assert_eq!(second.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()), "after the second late DEL");
        first.pod.forget();
        second.egret("DEL");
        second.unplug();
        second.pod.forget();
    }
    assert_no_traces(node, &before);
}

#[test]
fn a_late_del_leaves_the_next_pod_behind_a_veth_of_the_same_name_alone() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    for round in 0..5 {
        let first = ByHand::add(&lab, &format!("first-{round}"), VISITOR, "cali1", "10.244.1.77");
        assert_eq!(first.pod.who(EXT4).ok(), Some(EGRESS4.into()));
        first.unplug();
        let second = ByHand::add(&lab, &format!("second-{round}"), VISITOR, "cali1", "10.244.1.78");
        first.egret("DEL");
        assert_eq!(second.pod.who(EXT4).ok(), Some(EGRESS4.into()), "after the late DEL");
        second.egret("DEL");
        second.unplug();
        // The next behind that name is none that a policy selects: nothing of the old ones may stick to the name.
        let third = ByHand::add(&lab, &format!("third-{round}"), &[("app", "other")], "cali1", "10.244.1.77");
        assert_eq!(third.pod.who(EXT4).ok(), Some(node.ipv4().into()));
        third.egret("DEL");
        third.unplug();
        [first, second, third].iter().for_each(|p| p.pod.forget());
    }
    assert_no_traces(node, &before);
}

#[test]
fn a_late_del_with_the_daemon_away_leaves_the_next_pods_quarantine() {
    let lab = Lab::scene();
    let first = ByHand::add(&lab, "first", VISITOR, "cali1", "10.244.1.77");
    first.unplug();
    lab.daemon("n1").kill9();
    let second = ByHand::add(&lab, "second", VISITOR, "cali2", "10.244.1.77");
    lab.forget_wire();
    assert!(second.pod.udp_who(EXT4).is_err());
    first.egret("DEL");
    assert!(second.pod.udp_who(EXT4).is_err(), "the late DEL let it out");
    lab.assert_silence();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&second.pod, EGRESS4);
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

/// A tracked connection keeps the address that it left from, and the next pod's first packet may be one of it.
#[test]
fn a_selected_pod_inherits_no_connection_of_the_pod_that_had_its_address() {
    let lab = Lab::scene();
    let asks = |who: &ByHand| who.pod.udp_who_from(5060, (EXT4, UDP_WHO).into());
    for (del, away) in [(true, false), (false, false), (true, true), (false, true)] {
        let case = format!("del-{del}-away-{away}");
        let first = ByHand::add(&lab, &format!("first-{case}"), &[("app", "other")], "cali1", "10.244.1.77");
        lab.wait_seen_as(&first.pod, first.pod.node.ipv4());
        assert_eq!(asks(&first).ok(), Some(first.pod.node.ipv4().into()));
        let daemon = lab.daemon("n1");
        if away {
            daemon.kill9();
        }
        if del {
            first.egret("DEL");
        }
        first.unplug();
        first.pod.forget();
        let second = ByHand::add(&lab, &format!("second-{case}"), VISITOR, "cali2", "10.244.1.77");
        lab.forget_wire();
        if away {
            assert!(asks(&second).is_err(), "{case}");
            daemon.restart();
            lab.wait_ready("n1");
        }
        assert_eq!(asks(&second).ok(), Some(EGRESS4.into()), "{case}");
        assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "{case}");
        second.egret("DEL");
        second.unplug();
        second.pod.forget();
    }
}

/// Also of a pod that the plugin did not bring, and that nobody tells the end of.
#[test]
fn a_pod_inherits_no_connection_of_an_adopted_pod_that_had_its_address() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let asks = |who: &ByHand| who.pod.udp_who_from(5060, (EXT4, UDP_WHO).into());
    for (round, gone_first) in [(1, "veth"), (2, "manifest")] {
        let mut first = ByHand::make(&lab, &format!("first-{round}"), VISITOR, "cali1", "10.244.1.77");
        first.pod.relabel(VISITOR);
        lab.wait_seen_as(&first.pod, EGRESS4);
        assert_eq!(asks(&first).ok(), Some(EGRESS4.into()));
        if gone_first == "veth" {
            first.unplug();
            thread::sleep(Duration::from_millis(200));
            first.pod.forget();
        } else {
            first.pod.forget();
            thread::sleep(Duration::from_millis(200));
            first.unplug();
        }
        lab.wait_until("its connections are forgotten", Duration::from_secs(5), || {
            !node.run(["conntrack", "-L", "-s", "10.244.1.77"]).contains("5060")
        });
        let second = ByHand::add(&lab, &format!("second-{round}"), &[("app", "other")], "cali2", "10.244.1.77");
        assert_eq!(asks(&second).ok(), Some(node.ipv4().into()), "{gone_first} gone first");
        second.egret("DEL");
        second.unplug();
        second.pod.forget();
    }
}

/// A runtime that is killed with all its pods calls no DEL, and what the plugin wrote down of them stays.
#[test]
fn what_is_left_of_a_pod_without_a_del_lets_no_other_pod_out() {
    let lab = Lab::scene();
    let daemon = lab.daemon("n1");
    let vanishes = |pod: &ByHand| {
        pod.unplug();
        pod.pod.forget();
    };

    // The address is another pod's, which was started without the plugin.
    vanishes(&ByHand::add(&lab, "lost", VISITOR, "cali1", "10.244.1.77"));
    let mut heir = ByHand::make(&lab, "heir", VISITOR, "cali2", "10.244.1.77");
    heir.pod.relabel(VISITOR);
    lab.wait_seen_as(&heir.pod, EGRESS4);

    // So is the name.
    vanishes(&ByHand::add(&lab, "web-0", VISITOR, "cali3", "10.244.1.78"));
    let mut again = ByHand::make(&lab, "web-0", VISITOR, "cali4", "10.244.1.79");
    again.pod.relabel(VISITOR);
    lab.wait_seen_as(&again.pod, EGRESS4);

    // And the index of its interface, of a pod that the plugin brought.
    let gone = ByHand::make(&lab, "gone", VISITOR, "cali5 index 1000", "10.244.1.80");
    gone.egret("ADD");
    vanishes(&gone);
    let mut indexed = ByHand::make(&lab, "indexed", VISITOR, "cali6 index 1000", "10.244.1.81");
    indexed.egret("ADD");
    indexed.pod.relabel(VISITOR);

    lab.forget_wire();
    for _ in 0..2 {
        for _ in 0..10 {
            for pod in [&heir, &again, &indexed] {
                assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()), "{}", pod.pod.name);
            }
            thread::sleep(Duration::from_millis(20));
        }
        daemon.kill9();
        daemon.restart();
        lab.wait_ready("n1");
    }
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

#[test]
fn a_last_word_that_cannot_be_written_holds_up_no_policy() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "office", "visitor", VISITOR);
    assert_leaves_by_node(&pod);
    // Whoever writes the file finds a directory in the way.
    let in_the_way = lab.node("n1").run_dir().join(".last-word.json");
    fs::create_dir(&in_the_way).expect("a directory");
    lab.write_manifest("more.yaml", &visitors().replace("namespace: shop", "namespace: office"));
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_until("it says that something is wrong", Duration::from_secs(5), || !lab.ready("n1"));
    // What it said before would let pods of that namespace go.
    assert!(!lab.node("n1").run_dir().join("last-word.json").exists());
    assert_leaves_by_egress(&lab.add_pod("n1", "office", "another", VISITOR));
    fs::remove_dir(&in_the_way).expect("no directory");
    lab.wait_ready("n1");
    lab.daemon("n1").kill9();
    lab.forget_wire();
    assert!(lab.add_pod("n1", "office", "held", VISITOR).udp_who(EXT4).is_err());
    lab.assert_silence();
}

#[test]
fn an_emptied_run_directory_is_filled_again() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    for entry in fs::read_dir(node.run_dir()).expect("the run directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
    }
    // The daemon looks every half a minute.
    lab.wait_until("the socket is back", Duration::from_secs(40), || node.cni_socket().exists());
    let another = lab.add_pod("n1", "shop", "another", VISITOR);
    [&pod, &another].into_iter().for_each(assert_leaves_by_egress);
    let daemon = lab.daemon("n1");
    daemon.kill9();
    daemon.restart();
    lab.wait_ready("n1");
    [pod, another].into_iter().for_each(Pod::delete);
    assert_no_traces(node, &before);
}

#[test]
fn a_pod_whose_veth_gets_another_name_is_held_on() {
    let lab = Lab::scene();
    let pod = ByHand::add(&lab, "visitor", VISITOR, "cali1", "10.244.1.77");
    let node = lab.node("n1");
    assert_eq!(pod.pod.who(EXT4).ok(), Some(EGRESS4.into()));
    node.ip_batch(&["link set cali1 down".into(), "link set cali1 name other1".into(), "link set other1 up".into()]);
    node.ip("route replace 10.244.1.77 dev other1");
    lab.forget_wire();
    for _ in 0..3 {
        // It has everything read back.
        pod.egret("CHECK");
        assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()));
    }
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
    let chain = node.nft("list table inet egret");
    assert!(chain.contains("other1") && !chain.contains("cali1"), "{chain}");
}

/// The kernel gives an index that is free again to the next interface that is moved here with it.
#[test]
fn late_word_of_a_veth_that_is_gone_is_not_taken_for_the_next_one_with_its_index() {
    let lab = Lab::scene();
    let daemon = lab.daemon("n1");
    for round in 0..16 {
        let first = ByHand::make(&lab, &format!("first-{round}"), VISITOR, "cali1 index 1000", "10.244.1.77");
        first.egret("ADD");
        assert_eq!(first.pod.who(EXT4).ok(), Some(EGRESS4.into()));
        let second = thread::scope(|scope| {
            // The daemon is busy with the first pod's end for some milliseconds, of which this is to be one.
            scope.spawn(|| first.egret("DEL"));
            thread::sleep(Duration::from_micros(1000 + 500 * round));
            daemon.suspend(true);
            first.unplug();
            let second = ByHand::make(&lab, &format!("second-{round}"), VISITOR, "cali2 index 1000", "10.244.1.78");
            let adding = thread::scope(|scope| {
                let adding = scope.spawn(|| second.egret("ADD"));
                thread::sleep(Duration::from_millis(50));
                daemon.suspend(false);
                adding.join()
            });
            adding.expect("ADD");
            second
        });
        for _ in 0..5 {
            assert_eq!(second.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()), "round {round}");
            thread::sleep(Duration::from_millis(40));
        }
        second.egret("DEL");
        second.unplug();
        [first, second].iter().for_each(|p| p.pod.forget());
    }
}

/// The node reaches it by something that is no veth, so that nothing but its address tells whose its packets are.
#[test]
fn a_pod_whose_veth_is_not_found_is_kept_inside_by_its_address() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    let node = lab.node("n1");
    let mut pod = lab.sandbox_unknown("n1", "shop", "behind-a-macvlan");
    node.ip(&format!("link add trunk type veth peer name eth0 netns {}", pod.netns));
    node.ip_batch(&[
        "link set trunk up".into(),
        "link add link trunk name over type macvlan mode bridge".into(),
        "link set over up".into(),
        "route add 10.244.1.77 dev over".into(),
        "addr add 169.254.1.1/32 dev over".into(),
    ]);
    pod.ip_batch(&[
        "addr add 10.244.1.77/32 dev eth0".into(),
        "link set eth0 up".into(),
        "route add 169.254.1.1 dev eth0".into(),
        "route add default via 169.254.1.1".into(),
    ]);
    pod.addresses = vec![[10, 244, 1, 77].into()];
    let manifest = |labels| manifests::pod("n1", "shop", &pod.name, &pod.uid, labels, &pod.addresses);
    lab.manifests().write_object("macvlan.yaml", &manifest(&[("app", "other")]));
    lab.wait_seen_as(&pod, node.ipv4());
    lab.manifests().write_object("macvlan.yaml", &manifest(VISITOR));
    lab.wait_until("it is held", Duration::from_secs(10), || pod.udp_who(EXT4).is_err());
    let unmanaged = || lab.metrics("n1").get("egret_node_pods", &[("state", "unmanaged")]);
    lab.wait_for("the metric", &Some(1.0), unmanaged);
    assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()));
    lab.forget_wire();
    for _ in 0..10 {
        node.ip("rule del pref 71");
        let socket = pod.udp_socket((EXT4, UDP_WHO).into()).expect("a socket");
        drop(socket.send(b"who"));
        let is_back = || node.ip("rule").contains("from 10.244.1.77 lookup 7873");
        lab.wait_until("it is held by its rule again", Duration::from_secs(5), is_back);
    }
    lab.assert_silence();
    lab.manifests().write_object("macvlan.yaml", &manifest(&[("app", "other")]));
    lab.wait_seen_as(&pod, node.ipv4());
    lab.wait_for("the metric", &Some(0.0), unmanaged);
}
