use super::*;
use crate::api::{Allocate, EgressPolicySpec};
use crate::ctl::output::{Show, View};
use crate::fixture::{World, asking, naming, selector};
use std::sync::Arc;

/// A gateway with two addresses, one of them in use, and pods.
fn world() -> World {
    let mut world = World::new(&["192.0.2.50-192.0.2.51"]);
    let visitors = EgressPolicySpec { pod_selector: Some(selector(&[("app", "visitor")])), ..naming(&["192.0.2.50"]) };
    world.policy("shop/visitors", visitors);
    for (namespace, name, app) in [("shop", "v1", "visitor"), ("shop", "v2", "visitor"), ("shop", "other", "other")] {
        world.pod(namespace, name, &[("app", app)]);
    }
    world.pod("office", "clerk", &[]);
    world.report();
    world.settle();
    world.report();
    world
}

fn planned(world: &World, verb: OverlayVerb, text: &str) -> Plan {
    let state = ClusterState { cluster: Arc::new(world.cluster.clone()), now: world.now, ..ClusterState::default() };
    plan(&state, verb, &[File { name: "f.yaml".to_owned(), text: text.as_bytes().to_vec() }], "shop")
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    let namespace = if namespace.is_empty() { String::new() } else { format!("namespace: {namespace}, ") };
    format!(
        "---\napiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{ {namespace}name: {name} }}\nspec: {spec}\n"
    )
}

#[test]
fn what_is_there_already_changes_nothing() {
    let same =
        policy("shop", "visitors", "{ podSelector: { matchLabels: { app: visitor } }, address: { ipv4: 192.0.2.50 } }");
    let plan = planned(&world(), OverlayVerb::Apply, &same);
    assert!(!plan.changes_anything(), "{plan:#?}");
    assert_eq!(plan.objects, ["EgressPolicy/shop/visitors"]);
    assert_eq!(plan.text(View::default()), "Nothing changes.\n");
}

#[test]
fn pods_gain_change_and_lose_an_egress_ip() {
    let text = policy("", "others", "{ podSelector: { matchLabels: { app: other } }, existingConnections: End }")
        + &policy(
            "shop",
            "visitors",
            "{ podSelector: { matchLabels: { app: visitor, new: a } }, address: { ipv4: 192.0.2.50 } }",
        );
    let plan = planned(&world(), OverlayVerb::Apply, &text);
    let kinds: Vec<(Kind, usize)> = plan.pods.iter().map(|change| (change.kind, change.pods.len())).collect();
    assert_eq!(kinds, [(Kind::Gain, 1), (Kind::Lose, 2)], "{plan:#?}");
    assert!(plan.pods[0].connections.contains("End") && plan.pods[0].to[0].egress_ip[0].to_string() == "192.0.2.51");
    assert_eq!(plan.pods[1].pods, ["shop/v1", "shop/v2"]);
    lab::snapshot::assert("plan.txt", &plan.text(View::default()));

    let changed =
        policy("shop", "visitors", "{ podSelector: { matchLabels: { app: visitor } }, address: { ipv4: 192.0.2.51 } }");
    let plan = planned(&world(), OverlayVerb::Apply, &changed);
    assert_eq!((plan.pods.len(), plan.pods[0].kind), (1, Kind::Change));
    assert_eq!(plan.pods[0].connections, "connections from 192.0.2.50, which is given back end");

    let plan = planned(&world(), OverlayVerb::Delete, &changed);
    assert_eq!(plan.pods[0].kind, Kind::Lose);
    assert!(plan.policies[0].message.contains("is deleted, 192.0.2.50 is given back"), "{plan:#?}");
}

#[test]
fn a_policy_that_becomes_shadowed_and_a_pool_that_runs_out_are_named() {
    let wide = policy("shop", "all", "{ podSelector: {}, priority: 5 }");
    let plan = planned(&world(), OverlayVerb::Apply, &wide);
    let visitors = plan.policies.iter().find(|change| change.object == "EgressPolicy shop/visitors").unwrap();
    assert!(visitors.worse && visitors.message.contains("is shadowed"), "{visitors:?}");

    let many = policy("shop", "a", "{ podSelector: { matchLabels: { app: a } } }")
        + &policy("shop", "b", "{ podSelector: { matchLabels: { app: other } } }");
    let plan = planned(&world(), OverlayVerb::Apply, &many);
    let text = plan.text(View::default());
    assert!(plan.gateways.iter().any(|change| change.worse && change.message.contains("its pool runs out")), "{text}");
    assert!(text.contains("is rejected") && text.contains("blocked by shop/b"), "{text}");
}

#[test]
fn what_would_be_rejected_is_named_with_its_line() {
    let text = policy("shop", "good", "{ podSelector: { matchLabels: { app: none } } }")
        + &policy("shop", "bad", "{ podSelector: {}, adress: { ipv4: 192.0.2.51 } }");
    let plan = planned(&world(), OverlayVerb::Apply, &text);
    assert_eq!(plan.rejected.len(), 1, "{plan:#?}");
    assert!(plan.rejected[0].starts_with("f.yaml:10:") && plan.rejected[0].contains("adress"), "{:?}", plan.rejected);
}

#[test]
fn the_plan_is_what_the_controller_does() {
    let mut world = world();
    let text = policy("office", "clerks", "{ podSelector: {} }");
    let plan = planned(&world, OverlayVerb::Apply, &text);
    world.policy("office/clerks", asking(Allocate::Dedicated));
    let outcome = world.allocate();
    assert_eq!(plan.pods[0].to[0].egress_ip[0].to_string(), outcome.address("office/clerks"));
}
