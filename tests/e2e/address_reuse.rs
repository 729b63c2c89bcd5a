//! Reuse of addresses, names and indexes: nothing of an ended pod may affect the next one. Needs root.

use lab::by_hand::ByHand;
use lab::kernel::assert_no_traces;
use lab::server::UDP_WHO;
use lab::{EGRESS4, EXT4, Lab, VISITOR, manifests};
use std::thread;
use std::time::Duration;

#[test]
fn a_late_del_does_not_affect_the_next_pod_with_the_same_address() {
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
        second.end();
    }
    assert_no_traces(node, &before);
}

#[test]
fn a_late_del_does_not_affect_the_next_pod_with_the_same_veth_name() {
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
        // No policy selects the next pod with that name: nothing of the earlier ones may affect it.
        let third = ByHand::add(&lab, &format!("third-{round}"), &[("app", "other")], "cali1", "10.244.1.77");
        assert_eq!(third.pod.who(EXT4).ok(), Some(node.ipv4().into()));
        third.egret("DEL");
        third.unplug();
        [first, second, third].iter().for_each(|p| p.pod.forget());
    }
    assert_no_traces(node, &before);
}

#[test]
fn a_late_del_without_the_daemon_does_not_lift_the_next_pods_quarantine() {
    let lab = Lab::scene();
    let first = ByHand::add(&lab, "first", VISITOR, "cali1", "10.244.1.77");
    first.unplug();
    lab.daemon("n1").kill9();
    let second = ByHand::add(&lab, "second", VISITOR, "cali2", "10.244.1.77");
    lab.forget_wire();
    assert!(second.pod.udp_who(EXT4).is_err());
    first.egret("DEL");
    assert!(second.pod.udp_who(EXT4).is_err(), "the late DEL let it out");
    lab.assert_nothing_arrives();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&second.pod, EGRESS4);
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
}

/// A tracked connection keeps its source address, and the next pod's first packet may belong to it.
#[test]
fn a_selected_pod_inherits_no_connection_of_the_pod_that_had_its_address() {
    let lab = Lab::scene();
    let asks = |who: &ByHand| who.pod.udp_who_from(5060, (EXT4, UDP_WHO).into());
    for (del, away) in [(true, false), (false, false), (true, true), (false, true)] {
        let case = format!("del-{del}-away-{away}");
        let first = ByHand::add(&lab, &format!("first-{case}"), &[("app", "other")], "cali1", "10.244.1.77");
        // Not by TCP: the server's last packets may come late, and the node answers for an address that is gone.
        let from_node = Some(first.pod.node.ipv4().into());
        lab.wait_until("an answer", Duration::from_secs(5), || asks(&first).ok() == from_node);
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
        second.end();
    }
}

/// Also for a pod that the plugin did not set up, and whose end nobody reports.
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
        second.end();
    }
}

/// The end of the Pod object does not mean the end of the container.
#[test]
fn an_adopted_pod_is_enforced_for_as_long_as_it_can_send() {
    let lab = Lab::scene();
    for round in ["forgotten", "failed"] {
        let mut pod = ByHand::make(&lab, round, VISITOR, "cali1", "10.244.1.77");
        pod.pod.relabel(VISITOR);
        lab.wait_seen_as(&pod.pod, EGRESS4);
        lab.forget_wire();
        if round == "failed" {
            let mut object = manifests::pod("n1", "shop", &pod.pod.name, &pod.pod.uid, VISITOR, &pod.pod.addresses);
            object["status"]["phase"] = "Failed".into();
            lab.manifests().write_object(&format!("pod-shop-{round}.yaml"), &object);
        } else {
            pod.pod.forget();
        }
        for _ in 0..20 {
            assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()), "{round}");
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "{round}");
        pod.unplug();
        lab.wait_until("its chain is gone", Duration::from_secs(5), || {
            !lab.node("n1").nft("list table inet egret").contains("cali1")
        });
        if round == "failed" {
            pod.pod.forget();
        }
    }
}

/// A runtime that is killed with all its pods calls no DEL, and the plugin's files about them stay.
#[test]
fn leftovers_of_a_pod_without_a_del_do_not_open_another_pod() {
    let lab = Lab::scene();
    let daemon = lab.daemon("n1");
    let vanishes = |pod: &ByHand| {
        pod.unplug();
        pod.pod.forget();
    };

    // Another pod, which was started without the plugin, has the address.
    vanishes(&ByHand::add(&lab, "lost", VISITOR, "cali1", "10.244.1.77"));
    let mut heir = ByHand::make(&lab, "heir", VISITOR, "cali2", "10.244.1.77");
    heir.pod.relabel(VISITOR);
    lab.wait_seen_as(&heir.pod, EGRESS4);

    // Another pod has the name.
    vanishes(&ByHand::add(&lab, "web-0", VISITOR, "cali3", "10.244.1.78"));
    let mut again = ByHand::make(&lab, "web-0", VISITOR, "cali4", "10.244.1.79");
    again.pod.relabel(VISITOR);
    lab.wait_seen_as(&again.pod, EGRESS4);

    // A pod that the plugin set up has the index of the interface.
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
fn a_pod_whose_veth_is_renamed_stays_enforced() {
    let lab = Lab::scene();
    let pod = ByHand::add(&lab, "visitor", VISITOR, "cali1", "10.244.1.77");
    let node = lab.node("n1");
    assert_eq!(pod.pod.who(EXT4).ok(), Some(EGRESS4.into()));
    node.ip_batch(&["link set cali1 down".into(), "link set cali1 name other1".into(), "link set other1 up".into()]);
    node.ip("route replace 10.244.1.77 dev other1");
    lab.forget_wire();
    for _ in 0..3 {
        // The daemon reads everything back.
        pod.egret("CHECK");
        assert_eq!(pod.pod.udp_who(EXT4).ok(), Some(EGRESS4.into()));
    }
    assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into());
    let chain = node.nft("list table inet egret");
    assert!(chain.contains("other1") && !chain.contains("cali1"), "{chain}");
}

/// The kernel gives a free index to the next interface that is moved here with it.
#[test]
fn a_late_notification_about_a_removed_veth_does_not_concern_the_next_one_with_its_index() {
    let lab = Lab::scene();
    let daemon = lab.daemon("n1");
    for round in 0..16 {
        let first = ByHand::make(&lab, &format!("first-{round}"), VISITOR, "cali1 index 1000", "10.244.1.77");
        first.egret("ADD");
        assert_eq!(first.pod.who(EXT4).ok(), Some(EGRESS4.into()));
        let second = thread::scope(|scope| {
            // The daemon needs some milliseconds for the first pod's end. The next veth should appear within that
            // time.
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
