//! Planned moves: to live nodes, and to a new node on request. Needs root.

use lab::fault_injection::{cordoned, holders, label, owner_and_other, plugged, three_gateways, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, assert_short, sessions};
use lab::{Lab, Pod, VISITOR, manifests};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn an_egress_ip_of_a_drained_gateway_node_moves_to_a_live_one() {
    let (lab, pod) = three_gateways();
    let going_on = sessions(std::slice::from_ref(&pod));
    let owner = holders(&lab).remove(0);
    // If two nodes have no allocations, the first by name is chosen. This one is dead.
    let mut others = ["g1", "g2", "g3"].into_iter().filter(|g| *g != owner);
    let (dead, lives) = (others.next().expect("a second"), others.next().expect("a third"));
    plugged(&lab, dead, false);
    let told = |by: &str| {
        let status = lab.manifests().path().join(format!("status/egressnodes/{by}.yaml"));
        let text = std::fs::read_to_string(status).unwrap_or_default();
        let silent = text.split_once("unreachablePeers:").and_then(|(_, after)| after.lines().map(str::trim).nth(1));
        silent.is_some_and(|line| line == format!("- {dead}"))
    };
    lab.wait_until("the others tell", Duration::from_secs(20), || told(lives) && told(&owner));
    label(&lab, &owner, &[("egret.dev/drain", "true")]);
    wait_holder(&lab, lives);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(holders(&lab), [lives]);
    assert_leaves_by_egress(&pod);
    assert_short(assert_live("drained", going_on), 50);
    lab.assert_nothing_leaked();
}

/// Pods on a source node, and on both gateway nodes.
fn visitors(lab: &Lab) -> Vec<Pod> {
    ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into()
}

#[test]
fn egress_ips_of_a_cordoned_gateway_node_move_without_a_pause_and_stay_when_it_is_uncordoned() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = visitors(&lab);
    let going_on = sessions(&pods);
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    pods.iter().for_each(assert_leaves_by_egress);
    // If all gateway nodes are cordoned, nothing moves.
    cordoned(&lab, &other, true);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(holders(&lab), [other.as_str()]);
    cordoned(&lab, &owner, false);
    wait_holder(&lab, &owner);
    cordoned(&lab, &other, false);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(holders(&lab), [owner.as_str()], "nothing moves back by itself");
    assert_short(assert_live("cordoned", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn a_gateway_that_ignores_cordons_keeps_its_egress_ips_in_place() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pools = ["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"];
    let gateway = manifests::gateway("default", &pools);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  ignoreCordon: true\n"));
    thread::sleep(Duration::from_millis(500));
    cordoned(&lab, &owner, true);
    thread::sleep(Duration::from_secs(2));
    assert_eq!(holders(&lab), [owner.as_str()]);
    lab.write_manifest("gateway.yaml", &gateway);
    lab.wait_until("the address moves", Duration::from_secs(5), || holders(&lab) != [owner.as_str()]);
}

#[test]
fn a_daemon_that_is_stopped_on_a_drained_node_hands_over_first() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let going_on = sessions(&pods);
    // The controller is slow: the daemon is told to stop before the move has begun.
    lab.daemon("controller").suspend(true);
    cordoned(&lab, &owner, true);
    thread::sleep(Duration::from_millis(500));
    thread::scope(|scope| {
        let stopped = scope.spawn(|| lab.daemon(&owner).term());
        thread::sleep(Duration::from_secs(1));
        assert!(!stopped.is_finished(), "it has not handed over yet");
        lab.daemon("controller").suspend(false);
        assert!(stopped.join().expect("it stops").success());
    });
    assert_eq!(holders(&lab), [other.as_str()]);
    assert!(lab.daemon(&owner).log().contains("handed over; stopping"));
    plugged(&lab, &owner, false);
    thread::sleep(Duration::from_secs(2));
    assert_short(assert_live("the node has gone", going_on), 100);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();

    let begin = Instant::now();
    assert!(lab.daemon(&other).term().success());
    assert_short(begin.elapsed(), 500);
    assert_eq!(holders(&lab), [other.as_str()], "a node that stays is restarted only");
}

#[test]
fn a_new_gateway_node_gets_new_allocations_and_its_share_of_the_others_on_request() {
    let lab = Lab::builder().build();
    let addresses = ["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"];
    let gateway = manifests::gateway("default", &addresses);
    let rebalancing = gateway.replacen("metadata: {", "metadata: { annotations: { egret.dev/rebalance: \"true\" },", 1);
    assert_ne!(gateway, rebalancing);
    let policy = |name: &str| {
        let spec = format!("podSelector: {{ matchLabels: {{ app: {name} }} }}\n  allocate: Dedicated");
        lab.write_manifest(&format!("{name}.yaml"), &manifests::policy("shop", name, &spec));
    };
    lab.write_manifest("gateway.yaml", &gateway);
    lab.add_namespace("shop", &[]);
    label(&lab, "g2", &[("egret.dev/gateway", "no")]);
    let names = ["a", "b", "c", "d", "e"];
    names.iter().for_each(|name| policy(name));
    lab.start();
    let held = || ["g1", "g2"].map(|node| lab.node(node).ip("-o addr show dev eth0").matches("/32 ").count());
    lab.wait_for("egress IPs:", &[5, 0], held);
    let add = |(i, name): (usize, &&str)| lab.add_pod(["n1", "n2"][i % 2], "shop", name, &[("app", name)]);
    let pods: Vec<_> = names.iter().enumerate().map(add).collect();
    let answered = |pod: &lab::Pod| pod.udp_who(lab::EXT4).is_ok() && pod.udp_who(lab::EXT6).is_ok();
    let patience = Duration::from_secs(20);
    pods.iter().for_each(|pod| lab.wait_until(&format!("{} is answered", pod.name), patience, || answered(pod)));
    let before: Vec<_> = pods.iter().map(|pod| pod.who(lab::EXT4).expect("an answer")).collect();
    let going_on = sessions(&pods);

    label(&lab, "g2", &[]);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(held(), [5, 0], "nothing moves by itself");
    policy("f");
    lab.wait_for("egress IPs:", &[5, 1], held);
    lab.write_manifest("gateway.yaml", &rebalancing);
    lab.wait_for("egress IPs:", &[3, 3], held);
    lab.write_manifest("gateway.yaml", &gateway);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(held(), [3, 3], "what has moved stays");
    let after: Vec<_> = pods.iter().map(|pod| pod.who(lab::EXT4).expect("an answer")).collect();
    assert_eq!(after, before, "a path keeps its address");
    assert_short(assert_live("rebalanced", going_on), 50);
}
