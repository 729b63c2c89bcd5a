//! A node's start: pods before the daemon, Egret's own pods, and everything anew after a reboot. Needs root.

use crate::site::{Pod, Site, egress, own};
use lab::{Lab, VISITOR, topology};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// A node whose daemon is never in sync must not be worse off than without Egret.
#[test]
fn pods_start_before_the_daemon_was_ever_in_sync_and_are_adopted_later() {
    let site = Site::plain();
    site.runtime.install();
    let begin = Instant::now();
    let daemon_pod = site.start_on_host_network("egret-system", "egret-node-x7k2p");
    let early = site.visitor("early");
    assert!(begin.elapsed() < Duration::from_secs(4), "it took {:?}", begin.elapsed());
    site.wait_heard_from("early", own(site.node()));
    assert_eq!(site.attachments(), 1);
    site.lab.start();
    site.wait_heard_from("early", egress());
    early.end();
    // The host's own name is that of the machine.
    let machine = nix::unistd::gethostname().expect("a name").into_string().expect("UTF-8");
    assert_eq!(site.ear.sources(&machine), own(site.node()).into());
    daemon_pod.end();
    assert_eq!(site.attachments(), 0);
}

#[test]
fn the_daemon_is_away_when_pods_start() {
    let site = Site::with_egret();
    site.lab.daemon("n1").kill9();
    site.lab.forget_wire();
    let held = site.visitor("held");
    let free = site.start("other", "free", VISITOR);
    site.assert_unheard("held");
    site.wait_heard_from("free", own(site.node()));
    // Its cluster traffic works.
    let gateway = site.lab.add_pod("g1", "other", "peer", &[]);
    let address = site.runtime.cri.addresses(&held.id).expect("addresses")[0];
    gateway.ping(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    // Late DELs without the daemon, too.
    let gone = site.visitor("gone");
    gone.end();
    site.lab.daemon("n1").restart();
    site.wait_heard_from("held", egress());
    held.end();
    free.end();
    assert_eq!(site.attachments(), 0);
}

#[test]
fn leftovers_of_before_a_reboot_affect_nothing() {
    let site = Site::with_egret();
    let old: Vec<Pod> = (0..4).map(|n| site.visitor(&format!("old-{n}"))).collect();
    old.iter().for_each(|pod| site.assert_left_by_egress(&pod.name));
    let addresses = |pod: &Pod| site.runtime.cri.addresses(&pod.id).expect("addresses");
    let before: Vec<_> = old.iter().map(&addresses).collect();

    reboot(&site.lab, &site);
    site.runtime.restart();
    site.runtime.wait_network();
    // The kubelet is faster than the daemon: it ends earlier pods, and starts new ones. Pods that no policy can
    // select start.
    let free = site.start("other", "free", VISITOR);
    site.wait_heard_from("free", own(site.node()));
    free.end();
    site.lab.forget_wire();
    let begin = Instant::now();
    let error = site.try_start("shop", "new", VISITOR).map(|p| p.id).expect_err("held back").to_string();
    assert!(error.contains("policy shop/visitors can select pods of namespace shop"), "{error}");
    // A kubelet tries again only after a quarter of a minute. Waiting is better than failing, but is limited.
    assert!((3..10).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    old[0].stop();
    // A pod that waits while the daemon starts.
    thread::scope(|scope| {
        let waits = scope.spawn(|| site.visitor("waits"));
        thread::sleep(Duration::from_millis(1500));
        site.lab.daemon("n1").restart();
        let pod = waits.join().expect("a thread");
        site.assert_left_by_egress("waits");
        pod.end();
    });
    site.lab.wait_ready("n1");
    let new: Vec<Pod> = (0..4).map(|n| site.visitor(&format!("new-{n}"))).collect();
    new.iter().for_each(|pod| site.assert_left_by_egress(&pod.name));
    // Late DELs of the earlier pods, without a namespace, whose addresses may be other pods' now.
    for pod in &old {
        pod.stop();
    }
    old.into_iter().for_each(Pod::end);
    for pod in &new {
        site.wait_only_by_egress(&pod.name);
    }
    println!("before: {before:?}, after: {:?}", new.iter().map(addresses).collect::<Vec<_>>());
    new.into_iter().for_each(Pod::end);
    assert_eq!(site.attachments(), 0);
    site.lab.assert_nothing_leaked();
}

/// The kernel's state and `/run` are empty, and the rest of the disk is unchanged.
fn reboot(lab: &Lab, site: &Site) {
    let node = lab.node("n1");
    lab.daemon("n1").kill9();
    site.runtime.die_as_by_reboot();
    fs::remove_dir_all(node.run_dir()).expect("remove");
    fs::create_dir(node.run_dir()).expect("make");
    node.run(["nft", "flush", "ruleset"]);
    node.run(["conntrack", "-F"]);
    for family in ["-4", "-6"] {
        for table in 7871..=7873 {
            node.try_run(["ip", family, "route", "flush", "table", &table.to_string()]);
        }
        for priority in 71..=74 {
            while node.try_run(["ip", family, "rule", "del", "priority", &priority.to_string()]).status.success() {}
        }
    }
    node.ip("link del egret");
    // Pods' interfaces disappear with their namespaces, a moment after the last process.
    lab.wait_until("the pods' interfaces are gone", Duration::from_secs(10), || !node.ip("-o link").contains("veth"));
    // The cluster's CNI restores its own state.
    topology::masquerade(node);
}
