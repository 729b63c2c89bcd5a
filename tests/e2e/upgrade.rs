//! A node with an older version than the controller's. Needs root.

use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{Lab, VISITOR};
use std::fs;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Another controller, of a later version, has written an allocation of a kind that these daemons do not know.
#[test]
fn an_allocation_of_an_unknown_kind_blocks_its_own_policy_and_nothing_else() {
    let lab = Lab::scene();
    lab.write_rich();
    let visitor = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let rich = ["n1", "g1"].map(|node| lab.add_pod(node, "shop", &format!("rich-{node}"), &[("app", "rich")]));
    let own = Ipv4Addr::new(192, 0, 2, 56);
    rich.iter().for_each(|pod| lab.wait_seen_as(pod, own));
    let live = sessions(std::slice::from_ref(&visitor));
    lab.daemon("controller").suspend(true);
    let file = lab.manifests().path().join("status/egressgateways/default.yaml");
    let text = fs::read_to_string(&file).expect("a status");
    let address = text.find(&own.to_string()).expect("the egress IP");
    let kind = text[..address].rfind("Explicit").expect("its kind");
    let changed = format!("{}Quantum{}", &text[..kind], &text[kind + "Explicit".len()..]);
    fs::write(file.with_extension("new"), changed).expect("a file");
    fs::rename(file.with_extension("new"), &file).expect("a file");
    lab.wait_until("the pods are blocked", PATIENCE, || rich.iter().all(|pod| pod.udp_who(lab::EXT4).is_err()));
    rich.iter().for_each(assert_blocked);
    let says = |node: &str| {
        let text = fs::read_to_string(lab.manifests().path().join(format!("status/egressnodes/{node}.yaml")));
        text.is_ok_and(|text| text.contains("does not know"))
    };
    lab.wait_until("the nodes say why", PATIENCE, || says("n1") && says("g1"));
    assert_leaves_by_egress(&visitor);
    // What is new elsewhere still takes effect: the gateway is not frozen.
    let late = lab.add_pod("n2", "shop", "late", VISITOR);
    assert_leaves_by_egress(&late);
    let late = lab.add_pod("n2", "shop", "late-rich", &[("app", "rich")]);
    assert_blocked(&late);

    // The controller of this version puts an egress IP of a kind that it knows into its place.
    lab.daemon("controller").suspend(false);
    lab.wait_seen_as(&late, own);
    rich.iter().for_each(|pod| lab.wait_seen_as(pod, own));
    thread::sleep(Duration::from_secs(1));
    assert_short(assert_live("a kind that is not known", live), 150);
    assert_leaves_by_egress(&visitor);
}
