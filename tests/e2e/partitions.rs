//! Links between nodes that break, lose packets, and recover: which nodes are found dead, and for how long. Needs
//! root.

use lab::fault_injection::{answered_after, assert_stays, cut, holders, owner_and_other, tunnel_between, wait_holder};
use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{EXT6, Lab, Pod, VISITOR};
use std::slice;
use std::thread;
use std::time::{Duration, Instant};

/// How often a daemon has found another node dead.
fn deaths(lab: &Lab, daemon: &str) -> usize {
    lab.daemon(daemon).log().matches("the node does not answer").count()
}

#[test]
fn a_lossy_link_makes_no_node_dead_and_a_broken_one_is_back_within_two_seconds() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    // As long as one source node reaches the owner, the egress IP stays.
    let of_n2 = lab.add_pod("n2", "shop", "visitor-n2", VISITOR);
    let lossy: Vec<String> = ["n1", &other]
        .iter()
        .flat_map(|node| tunnel_between(node, &owner))
        .map(|rule| format!("{rule} numgen random mod 10 == 0"))
        .collect();
    let before = ["n1", &owner, &other].map(|node| deaths(&lab, node));
    cut(&lab, &lossy);
    thread::sleep(Duration::from_secs(20));
    assert_eq!(["n1", &owner, &other].map(|node| deaths(&lab, node)), before, "a tenth is lost in each direction");

    cut(&lab, &tunnel_between(&owner, "n1"));
    thread::sleep(Duration::from_secs(4));
    assert_blocked(&pod);
    assert_eq!(deaths(&lab, "n1"), before[0] + 1);
    cut(&lab, &lossy);
    let back = answered_after(&pod, Instant::now());
    println!("back {back:?} after a break of 4 s");
    lab::survival::assert_short(back, 1000);
    cut(&lab, &[]);
    assert_leaves_by_egress(&pod);
    assert_leaves_by_egress(&of_n2);
    assert_eq!(holders(&lab), [owner]);
    lab.assert_nothing_leaked();
}

/// Pods of the policy on both source nodes and on the owner, the owner, and the other gateway node.
fn pods_everywhere(lab: &Lab) -> ([Pod; 3], String, String) {
    let (owner, other) = owner_and_other(lab);
    let pods = ["n1", "n2", &owner].map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    (pods, owner, other)
}

#[test]
fn an_owner_that_no_source_node_reaches_is_replaced_by_one_that_all_reach() {
    let lab = Lab::scene();
    let (pods, owner, other) = pods_everywhere(&lab);
    let sessions = pods.each_ref().map(|pod| pod.session(EXT6).expect("a session"));
    let before = deaths(&lab, &other);
    let way = |node: &str| [tunnel_between("n1", node), tunnel_between("n2", node)].concat();
    let begin = Instant::now();
    cut(&lab, &way(&owner));
    let back = answered_after(&pods[0], begin);
    println!("answered after {back:?}");
    assert!(back < Duration::from_secs(16), "answered after {back:?}");
    wait_holder(&lab, &other);
    answered_after(&pods[1], Instant::now());
    pods.iter().for_each(assert_leaves_by_egress);
    assert_eq!(deaths(&lab, &other), before, "the gateway nodes reach each other");
    let [held @ .., of_owner] = sessions.map(lab::Session::stop);
    held.iter().for_each(|report| assert_eq!(report.broken, None, "{report:?}"));
    assert_eq!(of_owner.broken, None, "{of_owner:?}");
    assert!(
        of_owner.longest_silence < Duration::from_millis(700),
        "a pod on the owner waits for nothing: {of_owner:?}"
    );
    lab.assert_nothing_leaked();

    // It stays when the link is repaired, and moves back when the other node's link breaks.
    cut(&lab, &[]);
    thread::sleep(Duration::from_secs(6));
    assert_eq!(holders(&lab), slice::from_ref(&other));
    pods.iter().for_each(assert_leaves_by_egress);
    cut(&lab, &way(&other));
    lab.wait_until("the address is back", Duration::from_secs(20), || holders(&lab) == [owner.as_str()]);
    for pod in &pods {
        answered_after(pod, Instant::now());
    }
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}

#[test]
fn an_owner_that_only_some_source_nodes_reach_keeps_its_egress_ip() {
    let lab = Lab::scene();
    let (mut pods, owner, other) = pods_everywhere(&lab);
    cut(&lab, &tunnel_between("n1", &owner));
    assert_stays(&lab, &owner, Duration::from_secs(8), || pods[1..].iter().for_each(assert_leaves_by_egress));
    assert_blocked(&pods[0]);
    // It serves no other node any more.
    pods[1].relabel(&[]);
    lab.wait_until("the address is on the other", Duration::from_secs(20), || holders(&lab) == [other.as_str()]);
    answered_after(&pods[0], Instant::now());
    lab.assert_nothing_leaked();
}

#[test]
fn source_nodes_that_reach_no_gateway_node_or_different_ones_move_nothing() {
    let lab = Lab::scene();
    let (pods, owner, other) = pods_everywhere(&lab);
    let stays = |rules: &[String], served: &[&Pod]| {
        cut(&lab, rules);
        thread::sleep(Duration::from_secs(2));
        assert_stays(&lab, &owner, Duration::from_secs(10), || {
            served.iter().for_each(|pod| assert_leaves_by_egress(pod));
        });
    };
    let ways = |ways: &[(&str, &str)]| ways.iter().flat_map(|(a, b)| tunnel_between(a, b)).collect::<Vec<_>>();
    // The second source node would gain and lose nothing, because it reaches neither gateway node.
    stays(&ways(&[("n1", &owner), ("n2", &owner), ("n2", &other)]), &[&pods[2]]);
    stays(&ways(&[("n1", &owner), ("n1", &other), ("n2", &owner), ("n2", &other)]), &[&pods[2]]);
    stays(&ways(&[("n1", &owner), ("n2", &other)]), &[&pods[1], &pods[2]]);
    cut(&lab, &[]);
    pods.iter().for_each(|pod| lab::survival::assert_short(answered_after(pod, Instant::now()), 5000));
    assert_eq!(holders(&lab), [owner]);
    lab.assert_nothing_leaked();
}

#[test]
fn without_the_controller_an_owner_that_no_source_node_reaches_keeps_its_egress_ip() {
    let lab = Lab::scene();
    let (pods, owner, other) = pods_everywhere(&lab);
    lab.daemon("controller").suspend(true);
    cut(&lab, &[tunnel_between("n1", &owner), tunnel_between("n2", &owner)].concat());
    thread::sleep(Duration::from_secs(12));
    assert_eq!(holders(&lab), slice::from_ref(&owner));
    assert_leaves_by_egress(&pods[2]);
    // When the controller is back, the link is repaired, and nobody reports it any more.
    cut(&lab, &[]);
    pods.iter().for_each(|pod| lab::survival::assert_short(answered_after(pod, Instant::now()), 5000));
    lab.daemon("controller").suspend(false);
    assert_stays(&lab, &owner, Duration::from_secs(5), || pods.iter().for_each(assert_leaves_by_egress));
    // The egress IP moves when the controller is there.
    cut(&lab, &[tunnel_between("n1", &owner), tunnel_between("n2", &owner)].concat());
    lab.wait_until("the address is on the other", Duration::from_secs(20), || holders(&lab) == [other.as_str()]);
    pods.iter().for_each(|pod| lab::survival::assert_short(answered_after(pod, Instant::now()), 5000));
    lab.assert_nothing_leaked();
}
