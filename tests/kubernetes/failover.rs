//! Egress IPs move while the API server is away. Needs root.

use super::allocations;
use lab::fault_injection::{all_of, assert_stays, cut, dies, holders, owner_and_other, plugged};
use lab::routed::Routed;
use lab::scene::{VISITOR, assert_leaves_by_egress};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EGRESS4, Lab};
use std::thread;
use std::time::{Duration, Instant};

/// How the API server is away: it refuses connections, or does not answer at all.
fn allocations_move(away: impl Fn(&Lab), back: impl Fn(&Lab)) {
    let lab = Lab::builder().kubernetes().scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2", &other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    away(&lab);
    let gap = dies(&lab, &owner, &other, &pods);
    // The daemon still repairs the kernel while its requests get no response.
    thread::sleep(Duration::from_millis(500));
    lab.node(&other).ip(&format!("addr del {EGRESS4}/32 dev eth0"));
    let begin = Instant::now();
    lab.wait_until("the address is back", Duration::from_secs(3), || holders(&lab) == [other.as_str()]);
    println!("an address that somebody removed is back after {:?}", begin.elapsed());
    plugged(&lab, &owner, true);
    assert_stays(&lab, &other, Duration::from_secs(4), || ());
    assert_live("without an API server", going_on);
    assert_short(gap, 1100);
    back(&lab);
    lab.wait_until("the allocations follow", Duration::from_secs(60), || {
        allocations(&lab).iter().any(|allocation| allocation["node"] == other.as_str())
    });
    pods.iter().for_each(assert_leaves_by_egress);
    assert_eq!(holders(&lab), [other.as_str()]);
    lab.assert_nothing_leaked();
}

#[test]
fn allocations_move_while_the_api_server_refuses_connections() {
    allocations_move(|lab| lab.api().stop(), |lab| lab.api().start_again());
}

#[test]
fn allocations_move_while_the_api_server_does_not_answer() {
    allocations_move(|lab| plugged(lab, "api", false), |lab| plugged(lab, "api", true));
}

#[test]
fn what_routers_announce_moves_once_while_the_api_server_is_away() {
    let lab = Routed::of(Lab::builder().kubernetes());
    let (owner, other) = lab.owner_and_other();
    let pods = ["n1", "n2", &other].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = lab.sessions(&pods);
    lab.api().stop();
    let begin = Instant::now();
    cut(&lab, &all_of(&owner));
    let gap = lab.answered_after(&pods[0], begin);
    println!("new packets are answered after {gap:?}");
    lab.wait_for("it is on", &vec![other.clone()], || lab.holders());
    lab.wait_routed_to(&other);
    cut(&lab, &[]);
    // No report tells the owner of the takeover: it asks.
    lab.assert_stays(&other, Duration::from_secs(6));
    assert_live("without an API server", going_on);
    assert_short(gap, 1100);
    lab.api().start_again();
    lab.wait_until("the allocations follow", Duration::from_secs(60), || {
        allocations(&lab).iter().any(|allocation| allocation["node"] == other.as_str())
    });
    pods.iter().for_each(|pod| lab.served(pod));
    assert_eq!(lab.holders(), [other.as_str()]);
    lab.assert_nothing_leaked();
}
