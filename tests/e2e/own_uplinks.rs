//! The nodes' network breaks while gateway nodes' own uplinks work: which node holds the egress IP, and how long none
//! does. Needs root.

use lab::fault_injection::{all_of, cut, tunnel_between};
use lab::own_uplinks::{OUTSIDE, OwnUplinks, both, holders, scene};
use lab::survival::assert_short;
use lab::{Lab, Pod};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// Nodes n1 and n2, gateway nodes g1 and g2 with uplinks of their own, a pod on each, the owner, and the other
/// gateway node.
fn lab() -> (Lab, OwnUplinks, Vec<Pod>, String, String) {
    let lab = Lab::new();
    let uplinks = scene(&lab);
    let pods: Vec<Pod> = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), &[])).into();
    served(&lab, &pods);
    lab.wait_until("one node holds it", PATIENCE, || holders(&lab).len() == 1);
    let owner = holders(&lab).remove(0);
    let other = if owner == "g1" { "g2" } else { "g1" };
    (lab, uplinks, pods, owner, other.to_owned())
}

/// Waits until each of the pods leaves from the egress IP in both families.
#[track_caller]
fn served<'a>(lab: &Lab, pods: impl IntoIterator<Item = &'a Pod>) {
    for pod in pods {
        for (server, egress) in both() {
            lab.wait_for(&format!("{server} to see {}", pod.name), &Some(egress), || pod.udp_who(server).ok());
        }
    }
}

fn of<'a>(pods: &'a [Pod], nodes: &'a [&'a str]) -> impl Iterator<Item = &'a Pod> {
    pods.iter().filter(|pod| nodes.contains(&&*pod.node.name))
}

/// Checks for some time that the egress IP stays on that node and these pods are served.
fn stays(lab: &Lab, holder: &str, pods: &[Pod], nodes: &[&str], time: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        assert_eq!(holders(lab), [holder], "after {:?}", begin.elapsed());
        for pod in of(pods, nodes) {
            for (server, egress) in both() {
                assert_eq!(pod.udp_who(server).ok(), Some(egress), "{} after {:?}", pod.name, begin.elapsed());
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Checks that only one node answers the server for the egress IP all the time.
fn one_mac(uplinks: &OwnUplinks) -> usize {
    let text = uplinks.host.ip("neigh show 198.51.100.50");
    text.lines().filter(|line| line.contains("lladdr")).count()
}

#[test]
fn an_owner_that_no_node_reaches_is_replaced_by_one_that_they_reach() {
    let (lab, uplinks, pods, owner, other) = lab();
    cut(&lab, &all_of(&owner));
    let begin = Instant::now();
    lab.wait_until("the other one holds it", PATIENCE, || holders(&lab) == [other.as_str()]);
    println!("it is on the other gateway after {:?}", begin.elapsed());
    assert_short(begin.elapsed(), 2500);
    served(&lab, of(&pods, &["n1", "n2", &other]));
    println!("all others are served after {:?}", begin.elapsed());
    stays(&lab, &other, &pods, &["n1", "n2", &other], Duration::from_secs(12));
    assert_eq!(one_mac(&uplinks), 1);
    for pod in of(&pods, &[&owner]) {
        assert!(pod.udp_who(OUTSIDE.0).is_err() && pod.udp_who(OUTSIDE.1).is_err(), "blocked, not leaked");
    }
    cut(&lab, &[]);
    served(&lab, &pods);
    stays(&lab, &other, &pods, &["n1", "n2", "g1", "g2"], Duration::from_secs(3));
}

#[test]
fn gateway_nodes_that_do_not_reach_each_other_but_are_reached_by_the_nodes_move_nothing() {
    let (lab, _uplinks, pods, owner, other) = lab();
    cut(&lab, &tunnel_between(&owner, &other));
    thread::sleep(Duration::from_secs(1));
    stays(&lab, &owner, &pods, &["n1", "n2", &owner], Duration::from_secs(5));
    cut(&lab, &[]);
    served(&lab, &pods);
    assert_eq!(holders(&lab), [owner]);
}

#[test]
fn the_owners_half_of_a_split_network_is_served() {
    let (lab, _uplinks, pods, owner, other) = lab();
    let halves = [("n1", "n2"), ("n1", &*other), (&*owner, "n2"), (&*owner, &*other)];
    cut(&lab, &halves.iter().flat_map(|(a, b)| tunnel_between(a, b)).collect::<Vec<_>>());
    thread::sleep(Duration::from_secs(2));
    stays(&lab, &owner, &pods, &["n1", &owner], Duration::from_secs(5));
    for pod in of(&pods, &["n2"]) {
        assert!(pod.udp_who(OUTSIDE.0).is_err() && pod.udp_who(OUTSIDE.1).is_err(), "blocked, not leaked");
    }
    cut(&lab, &[]);
    served(&lab, &pods);
}

#[test]
fn a_dead_network_between_all_nodes_moves_no_egress_ip() {
    let (lab, _uplinks, pods, owner, _) = lab();
    let all: Vec<String> = ["n1", "n2", "g1", "g2"].iter().flat_map(|node| all_of(node)).collect();
    cut(&lab, &all);
    thread::sleep(Duration::from_secs(6));
    stays(&lab, &owner, &pods, &[&owner], Duration::from_secs(4));
    cut(&lab, &[]);
    served(&lab, &pods);
    lab.wait_until("one node holds it", PATIENCE, || holders(&lab).len() == 1);
}

#[test]
fn an_owner_that_only_the_other_gateway_node_reaches_is_replaced_by_it() {
    let (lab, uplinks, pods, owner, other) = lab();
    cut(&lab, &["n1", "n2"].iter().flat_map(|node| tunnel_between(node, &owner)).collect::<Vec<_>>());
    let begin = Instant::now();
    lab.wait_until("the other one holds it", 2 * PATIENCE, || holders(&lab) == [other.as_str()]);
    println!("it is on the other gateway after {:?}", begin.elapsed());
    served(&lab, &pods);
    stays(&lab, &other, &pods, &["n1", "n2", "g1", "g2"], Duration::from_secs(5));
    assert_eq!(one_mac(&uplinks), 1);
    cut(&lab, &[]);
    served(&lab, &pods);
    stays(&lab, &other, &pods, &["n1", "n2", "g1", "g2"], Duration::from_secs(12));
}
