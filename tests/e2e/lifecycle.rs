//! Pods start and end: many at once, with repeated verbs, with the daemon away, with a damaged run directory. Address
//! reuse is in `address_reuse.rs`. Needs root.

use lab::kernel::assert_no_traces;
use lab::scene::{assert_leaves_by_egress, assert_leaves_by_node};
use lab::server::UDP_WHO;
use lab::{EGRESS4, EXT4, Lab, Pod, SERVERS, Server, VISITOR, manifests};
use serde_json::Value;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::Duration;

#[test]
fn two_hundred_pods_start_and_end_at_once_and_work_from_their_first_packets() {
    let _machine = lab::turn::alone();
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
fn pods_start_and_end_while_the_daemon_is_killed_again_and_again() {
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
        // As long as the cluster has the pods, their addresses may be quarantined.
        [twice, gone, forgotten, away, away_and_gone, quarantined].iter().for_each(Pod::forget);
        assert_no_traces(node, &before);
    }
}

#[test]
fn an_offline_policy_snapshot_that_cannot_be_written_delays_no_policy() {
    const OFFICE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 55);
    let lab = Lab::scene();
    let (node, daemon) = (lab.node("n1"), lab.daemon("n1"));
    let state_dir = node.state_dir();
    daemon.kill9();
    // Room for the directory itself and three files.
    let place = state_dir.display().to_string();
    node.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=4", "tmpfs", &place]);
    daemon.restart();
    lab.wait_ready("n1");
    let pod = lab.add_pod("n1", "office", "visitor", VISITOR);
    assert_leaves_by_node(&pod);
    let fill = ["fill-1", "fill-2"].map(|name| state_dir.join(name).display().to_string());
    fill.iter().for_each(|file| drop(node.run(["touch", file])));
    let policy = format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {OFFICE4} }}");
    lab.write_manifest("more.yaml", &manifests::policy("office", "visitors", &policy));
    lab.wait_seen_as(&pod, OFFICE4);
    lab.wait_until("it says that something is wrong", Duration::from_secs(5), || !lab.ready("n1"));
    // By the old snapshot, pods of that namespace would start.
    let file = state_dir.join("offline-policies.json").display().to_string();
    assert_eq!(node.run(["cat", &file]), "");
    lab.wait_seen_as(&lab.add_pod("n1", "office", "another", VISITOR), OFFICE4);
    fill.iter().for_each(|file| drop(node.run(["rm", file])));
    lab.wait_ready("n1");
    lab.daemon("n1").kill9();
    lab.forget_wire();
    assert!(lab.add_pod("n1", "office", "held", VISITOR).udp_who(EXT4).is_err());
    lab.assert_nothing_arrives();
}

#[test]
fn an_emptied_run_directory_is_restored() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let before = node.egret_state();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    for entry in fs::read_dir(node.run_dir()).expect("the run directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
    }
    // The daemon checks every half a minute.
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

/// Creates something in the place of a file, and of an attachment.
type Make<'a> = &'a dyn Fn(&str, &str);

#[test]
fn unexpected_entries_in_the_run_directory_interrupt_nothing() {
    let lab = Lab::scene();
    let (node, daemon) = (lab.node("n1"), lab.daemon("n1"));
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let run_dir = node.run_dir();
    let strange = |make: Make| {
        for (at, place) in
            ["egretd.lock", "attachments.lock", "cni.sock", ".cni.sock", ".trial"].into_iter().enumerate()
        {
            let _ = fs::remove_file(run_dir.join(place));
            let _ = fs::remove_dir_all(run_dir.join(place));
            make(place, &format!("attachments/c{at}@eth0.json"));
        }
    };
    let fifo = |path: &str| node.run(["mkfifo", &run_dir.join(path).display().to_string()]);
    let link = |to: &str, path: &str| std::os::unix::fs::symlink(to, run_dir.join(path)).expect("a link");
    let all: [(&str, Make); 5] = [
        ("pipes", &|place, attachment| [place, attachment].into_iter().for_each(|path| drop(fifo(path)))),
        ("links in a circle", &|place, attachment| {
            [place, attachment].into_iter().for_each(|path| {
                let name = path.rsplit('/').next().expect("a name");
                link(name, path);
            })
        }),
        ("links to a device", &|place, attachment| {
            [place, attachment].into_iter().for_each(|path| link("/dev/zero", path))
        }),
        ("directories", &|place, attachment| {
            [place, attachment]
                .into_iter()
                .for_each(|path| fs::create_dir_all(run_dir.join(path).join("in")).expect("made"));
        }),
        ("huge files", &|_, attachment| {
            fs::File::create(run_dir.join(attachment)).and_then(|file| file.set_len(1 << 36)).expect("a sparse file");
        }),
    ];
    for (what, make) in all {
        daemon.kill9();
        strange(make);
        daemon.restart();
        lab.wait_until(&format!("a daemon that finds {what} is ready"), Duration::from_secs(20), || lab.ready("n1"));
        assert_leaves_by_egress(&pod);
        let new = lab.add_pod("n1", "shop", "new", VISITOR);
        assert_leaves_by_egress(&new);
        new.delete();
        for at in 0..5 {
            let path = run_dir.join(format!("attachments/c{at}@eth0.json"));
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
        }
    }
    // Clients that connect and send nothing must not use up the daemon's file descriptors.
    let silent: Vec<_> = (0..1500).map(|_| std::os::unix::net::UnixStream::connect(node.cni_socket())).collect();
    thread::sleep(Duration::from_millis(500));
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.pid().expect("it runs"))).expect("descriptors").count();
    assert!(open < 700, "{open} descriptors are open");
    drop(silent);
    lab.add_pod("n1", "shop", "after", VISITOR).delete();
    lab.assert_nothing_leaked();
}

#[test]
fn a_full_run_directory_is_reported() {
    let lab = Lab::scene();
    let (node, daemon) = (lab.node("n1"), lab.daemon("n1"));
    daemon.kill9();
    let run_dir = node.run_dir().display().to_string();
    node.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", &run_dir]);
    daemon.restart();
    lab.wait_ready("n1");
    lab.add_pod("n1", "shop", "before", VISITOR).delete();
    let fill = format!("{run_dir}/fill");
    node.try_run(["dd", "if=/dev/zero", &format!("of={fill}"), "bs=4k"]);
    let mut pod = lab.sandbox("n1", "shop", "visitor", VISITOR);
    pod.attach().expect_err("ADD with nowhere to write it down");
    lab.wait_until("it says so", Duration::from_secs(5), || !lab.ready("n1"));
    assert!(daemon.log().contains("no pod can start: the run directory"), "{}", daemon.log());
    node.run(["rm", &fill]);
    lab.wait_ready("n1");
    pod.detach().expect("DEL of what was not added");
    pod.attach().expect("ADD");
    assert_leaves_by_egress(&pod);
}

/// The node reaches it by an interface that is no veth, so only its address identifies its packets.
#[test]
fn a_pod_whose_veth_is_not_found_is_quarantined_by_its_address() {
    let lab = Lab::scene();
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    let node = lab.node("n1");
    let mut pod = lab.sandbox_unknown("n1", "shop", "behind-a-macvlan");
    node.ip_batch(&[
        "link add trunk type veth peer name trunk-end".into(),
        "link set trunk up".into(),
        "link set trunk-end up".into(),
        format!("link add link trunk name eth0 netns {} type macvlan mode bridge", pod.netns),
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
    lab.assert_nothing_arrives();
    lab.manifests().write_object("macvlan.yaml", &manifest(&[("app", "other")]));
    lab.wait_seen_as(&pod, node.ipv4());
    lab.wait_for("the metric", &Some(0.0), unmanaged);
}
