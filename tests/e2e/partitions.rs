//! Ways between nodes that break, lose packets, and come back: who is found dead, and for how long. Needs root.

use lab::fault_injection::{answered_after, cut, holders, owner_and_other, tunnel_between};
use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{Lab, VISITOR};
use std::thread;
use std::time::{Duration, Instant};

/// How often a daemon has found another node dead.
fn deaths(lab: &Lab, daemon: &str) -> usize {
    lab.daemon(daemon).log().matches("the node does not answer").count()
}

#[test]
fn a_line_that_loses_packets_finds_nobody_dead_and_one_that_was_broken_is_back_within_two_seconds() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
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
    assert_eq!(holders(&lab), [owner]);
    lab.assert_nothing_leaked();
}
