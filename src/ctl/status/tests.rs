use super::*;
use crate::api::{Allocate, EgressPolicySpec, PortsNearlyExhausted, Protocol};
use crate::ctl::output::{Show, View};
use crate::ctl::problem::{Problem, Severity};
use crate::fixture::{World, asking, naming, selector};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn state(world: &World) -> ClusterState {
    ClusterState { cluster: Arc::new(world.cluster.clone()), now: world.now, ..ClusterState::default() }
}

/// Two gateway nodes, one source node, a policy with a pod.
fn healthy() -> World {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.node("s1", "none", &["10.0.0.9"]);
    world.policy("shop/visitors", asking(Allocate::Dedicated));
    world.pod("shop", "visitor", &[("app", "visitor")]);
    world.report();
    world.settle();
    for node in ["n1", "n2", "s1"] {
        let since = crate::model::condition::time(world.now - 3 * 3_600);
        world.is_in_sync(node, "0.1.0", &since);
    }
    world.report();
    world
}

/// Four of the five things that the directory and the API server can tell without the CNI.
fn broken() -> World {
    let mut world = healthy();
    let of = |gateway: &str| EgressPolicySpec {
        gateway: Some(gateway.to_owned()),
        pod_selector: Some(selector(&[("app", "batch")])),
        ..asking(Allocate::Dedicated)
    };
    world.gateway("small", &["198.51.100.7"], |_| {});
    world.node("m1", "small", &["10.0.0.5"]);
    world.node("m2", "small", &["10.0.0.6"]);
    world.gateway("nowhere", &["198.51.100.8"], |_| {});
    for (key, gateway) in [("batch/a", "small"), ("batch/b", "small"), ("batch/c", "small"), ("other/n", "nowhere")] {
        world.policy(key, of(gateway));
        world.now += 1;
    }
    world.pod("batch", "job", &[("app", "batch")]);
    world.pod("other", "job", &[("app", "batch")]);
    // `a/first` is older than `a/second`, and covers as much.
    world.policy("a/first", naming(&["192.0.2.55"]));
    world.now += 1;
    world.policy("a/second", naming(&["192.0.2.56"]));
    world.pod("a", "pod", &[]);
    world.report();
    world.settle();
    world.misses("n2", &["n1".to_owned()]);
    world.report();
    world
}

fn problem<'s>(status: &'s Status, reason: &str) -> &'s Problem {
    let found = status.problems.iter().find(|problem| problem.reason == reason);
    found.unwrap_or_else(|| panic!("no {reason} in {:#?}", status.problems))
}

#[test]
fn a_healthy_cluster_has_no_problems() {
    let status = status(&state(&healthy()), None);
    assert_eq!(status.problems, []);
    let gateway = &status.gateways[0];
    assert_eq!((gateway.ready_nodes, gateway.nodes, gateway.egress_ips, gateway.not_held), (2, 2, 1, 0));
    assert_eq!((gateway.pool[0].used, gateway.pool[0].total), (1, 10));
    assert_eq!((status.policies[0].state, status.policies[0].pods), (PolicyState::Ready, 1));
    lab::snapshot::assert("status-healthy.txt", &status.text(View::default()));
}

#[test]
fn each_cause_is_one_problem_with_its_remedy() {
    let status = status(&state(&broken()), None);
    let exhausted = problem(&status, "PoolExhausted");
    assert_eq!((exhausted.object.as_str(), exhausted.severity), ("EgressGateway small", Severity::Error));
    assert_eq!(exhausted.policies, ["batch/b", "batch/c"]);
    assert!(exhausted.remedy.contains("addresses"), "{exhausted:?}");
    let nowhere = problem(&status, "NoNode");
    assert_eq!(
        (nowhere.object.as_str(), nowhere.policies.as_slice()),
        ("EgressGateway nowhere", &["other/n".into()][..])
    );
    assert!(nowhere.remedy.contains("label a node"), "{nowhere:?}");
    let shadowed = problem(&status, "Shadowed");
    assert_eq!((shadowed.object.as_str(), shadowed.severity), ("EgressPolicy a/second", Severity::Warning));
    assert!(shadowed.remedy.contains("set its priority"), "{shadowed:?}");
    let dead = problem(&status, "NodeUnreachable");
    assert!(dead.object == "gateway node n1" && dead.remedy.contains("UDP 7871"), "{dead:?}");
    assert!(status.problems.iter().all(|problem| !problem.remedy.is_empty()), "{:#?}", status.problems);
    lab::snapshot::assert("status-broken.txt", &status.text(View::default()));
}

#[test]
fn source_ports_that_run_out_are_a_warning_with_a_remedy() {
    let mut world = healthy();
    let found = PortsNearlyExhausted {
        id: world.cluster.gateways["g"].status.allocations[0].id,
        address: [192, 0, 2, 50].into(),
        destination: [203, 0, 113, 7].into(),
        port: 443,
        protocol: Protocol::Tcp,
        ports: "1024-65535".to_owned(),
    };
    world.has_few_ports("n1", &[found]);
    world.report();
    let status = status(&state(&world), None);
    let few = problem(&status, "PortsNearlyExhausted");
    assert_eq!((few.object.as_str(), few.severity), ("EgressPolicy shop/visitors", Severity::Warning));
    assert!(few.message.contains("203.0.113.7:443") && few.remedy.contains("spread: Connection"), "{few:?}");
    assert_eq!(status.policies[0].state, PolicyState::Ready);
}

#[test]
fn tunnels_of_different_sizes_are_named() {
    let mut world = healthy();
    for (n1, n2, reasons) in [
        (1450, 1450, &[][..]),
        (8950, 1450, &["TunnelMtuDiffers"]),
        (1450, 1200, &["TunnelMtuTooSmall", "TunnelMtuDiffers"]),
    ] {
        world.has_tunnel_mtu("n1", n1);
        world.has_tunnel_mtu("n2", n2);
        let status = status(&state(&world), None);
        let found: Vec<&Problem> = status.problems.iter().filter(|problem| problem.object == "tunnel").collect();
        assert_eq!(found.iter().map(|problem| problem.reason.as_str()).collect::<Vec<_>>(), reasons);
        for problem in found {
            assert!(
                problem.message.contains(&format!("{} bytes on n2", n2)) && !problem.remedy.is_empty(),
                "{problem:?}"
            );
        }
    }
}

#[test]
fn a_namespace_shows_its_own_policies_only() {
    let status = status(&state(&broken()), Some("shop"));
    let names: Vec<&str> = status.policies.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!(names, ["shop/visitors"]);
    assert!(status.problems.iter().all(|problem| problem.policies.iter().all(|name| name.starts_with("shop/"))));
}

#[test]
fn a_controller_that_writes_nothing_is_named() {
    let mut world = healthy();
    world.policy("shop/new", asking(Allocate::Dedicated));
    let status = status(&state(&world), None);
    let silent = problem(&status, "NoStatus");
    assert_eq!((silent.object.as_str(), silent.policies.as_slice()), ("controller", &["shop/new".to_owned()][..]));
}

#[test]
fn the_status_of_a_large_cluster_is_one_screen() {
    let mut world = World::new(&["10.200.0.0/18"]);
    for node in 0..5_000 {
        world.node(&format!("worker-{node:04}"), if node < 40 { "g" } else { "none" }, &[]);
    }
    for policy in 0..10_000 {
        world.policy(&format!("team-{}/policy-{policy}", policy % 700), asking(Allocate::Dedicated));
    }
    world.report();
    world.settle();
    for node in 3..30 {
        world.misses("n2", &[format!("worker-{node:04}")]);
        world.misses(&format!("worker-{:04}", node + 1), &[format!("worker-{node:04}")]);
    }
    world.report();
    let state = state(&world);
    let begun = Instant::now();
    let text = status(&state, None).text(View::default());
    // Without optimisation.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(text.lines().count() <= 55, "{text}");
    assert!(text.contains("10,000 policies") && text.contains("5,002 nodes"), "{text}");
}
