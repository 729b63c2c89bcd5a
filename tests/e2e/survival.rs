//! What connections survive besides a lost link: a reboot of a gateway node, two simultaneous deaths, a missing
//! source of cluster state. Needs root.

use lab::fault_injection::{
    answered_after, assert_stays, dies, holders, owner_and_other, plugged, three_gateways, wait_holder,
};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, assert_short, sessions};
use lab::{Lab, VISITOR};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Removes what a node loses when it is switched off: the daemon, and its state in the kernel and in the run
/// directory.
fn switch_off(lab: &Lab, name: &str) {
    let node = lab.node(name);
    lab.daemon(name).kill9();
    for family in ["inet", "netdev", "ip", "ip6"] {
        // Which of them exist depends on earlier moves.
        node.try_run(["nft", "delete", "table", family, "egret"]);
    }
    node.ip("link del egret");
    for family in ["-4", "-6"] {
        let rules = node.ip(&format!("{family} rule"));
        let own = rules.lines().filter_map(|line| line.split_once(':')).map(|(number, _)| number.trim());
        for number in own.filter(|n| !["0", "32766", "32767"].contains(n)) {
            node.ip(&format!("{family} rule del pref {number}"));
        }
        for table in [7871, 7872, 7873] {
            node.try_run(["ip", family, "route", "flush", "table", &table.to_string()]);
        }
    }
    for line in node.ip("-o addr show dev eth0").lines() {
        let address = line.split_whitespace().nth(3).expect("an address");
        if address.ends_with("/32") || address.ends_with("/128") {
            node.ip(&format!("addr del {address} dev eth0"));
        }
    }
    node.run(["conntrack", "-F"]);
    fs::remove_dir_all(node.run_dir()).expect("remove the run directory");
    fs::create_dir(node.run_dir()).expect("make the run directory");
}

#[test]
fn a_rebooted_gateway_node_gets_nothing_back_and_serves_again_when_needed() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2", &other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    thread::sleep(Duration::from_millis(300));
    plugged(&lab, &owner, false);
    let gap = answered_after(&pods[0], Instant::now());
    println!("new packets are answered after {gap:?}");
    switch_off(&lab, &owner);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(1));
    // Its kernel runs before its daemon does.
    plugged(&lab, &owner, true);
    assert_stays(&lab, &other, Duration::from_secs(1), || ());
    lab.daemon(&owner).restart();
    lab.wait_ready(&owner);
    assert_stays(&lab, &other, Duration::from_secs(3), || ());
    assert_short(assert_live("rebooted", going_on), 1500);
    let returned = lab.add_pod(&owner, "shop", "returned", VISITOR);
    assert_leaves_by_egress(&returned);

    let going_on = sessions(&pods[..2]);
    plugged(&lab, &other, false);
    println!("the other one dies: answered after {:?}", answered_after(&pods[0], Instant::now()));
    wait_holder(&lab, &owner);
    thread::sleep(Duration::from_secs(1));
    assert_short(assert_live("served by who was rebooted", going_on), 1500);
    lab.assert_nothing_leaked();
}

#[test]
fn two_of_three_gateway_nodes_die_at_once() {
    let (lab, pod) = three_gateways();
    let going_on = sessions(std::slice::from_ref(&pod));
    let owner = holders(&lab).remove(0);
    let mut others = ["g1", "g2", "g3"].into_iter().filter(|g| *g != owner);
    let (dies, lives) = (others.next().expect("a second"), others.next().expect("a third"));
    plugged(&lab, dies, false);
    plugged(&lab, &owner, false);
    println!("two die: answered after {:?}", answered_after(&pod, Instant::now()));
    wait_holder(&lab, lives);
    thread::sleep(Duration::from_secs(1));
    // The dead node may have been selected before it was known to be dead.
    assert_short(assert_live("two at once", going_on), 1700);
    lab.assert_nothing_leaked();
}

#[test]
fn allocations_move_while_the_cluster_directory_is_away() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2", &other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    let directory = lab.manifests().path();
    let elsewhere = directory.with_extension("away");
    fs::rename(directory, &elsewhere).expect("move the cluster directory away");
    thread::sleep(Duration::from_millis(500));

    let gap = dies(&lab, &owner, &other, &pods);
    // It returns, and nobody can tell it what has happened.
    plugged(&lab, &owner, true);
    assert_stays(&lab, &other, Duration::from_secs(4), || ());
    assert_short(assert_live("without a source", going_on), 1500);
    assert_short(gap, 1100);
    pods.iter().for_each(assert_leaves_by_egress);

    fs::rename(&elsewhere, directory).expect("move the cluster directory back");
    let follows = || lab.manifests().statuses().contains(&format!("node \"{other}\" holds"));
    lab.wait_until("the allocations follows", Duration::from_secs(20), follows);
    for daemon in ["controller", "n1", "n2", "g1", "g2"] {
        assert!(lab.daemon(daemon).runs(), "{daemon} has ended");
    }
    assert_stays(&lab, &other, Duration::from_secs(1), || ());
    lab.assert_nothing_leaked();
}

#[test]
fn a_node_is_ready_soon_after_its_address_appears() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    let own = [format!("{}/24", node.ipv4()), format!("{}/64", node.ipv6())];
    let daemon = lab.daemon("n1");
    daemon.kill9();
    own.iter().for_each(|address| drop(node.ip(&format!("address del {address} dev eth0"))));
    daemon.restart();
    thread::sleep(Duration::from_millis(1500));
    assert!(!lab.ready("n1"), "without an address");
    own.iter().for_each(|address| drop(node.ip(&format!("address add {address} dev eth0 nodad"))));
    let begin = Instant::now();
    lab.wait_ready("n1");
    assert!(begin.elapsed() < Duration::from_secs(3), "after {:?}", begin.elapsed());
    assert_leaves_by_egress(&lab.add_pod("n1", "shop", "visitor", VISITOR));
}
