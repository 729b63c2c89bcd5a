use super::*;
use crate::api::{
    Action, Allocate, Condition, EgressPeer, EgressPolicySpec, EgressPort, EgressRule, Fallback, IpBlock,
    PortsNearlyExhausted, Protocol, RefusedAllocation, Tier,
};
use crate::fixture::{World, asking, naming, selector};
use crate::model::Unreadable;
use std::sync::Arc;

/// `203.0.113.0/24 -203.0.113.7/32 tcp:80-90`: a network, exceptions, ports.
fn rule(text: &str) -> EgressRule {
    let mut rule = EgressRule::default();
    for word in text.split_whitespace() {
        if let Some(except) = word.strip_prefix('-') {
            rule.to.last_mut().unwrap().ip_block.except.push(except.to_owned());
        } else if word.contains('/') {
            rule.to.push(EgressPeer { ip_block: IpBlock { cidr: word.to_owned(), except: vec![] } });
        } else {
            let (protocol, ports) = word.split_once(':').unwrap();
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            rule.ports.push(EgressPort {
                protocol: if protocol == "tcp" { Protocol::Tcp } else { Protocol::Udp },
                port: first.parse().ok(),
                end_port: last.parse().ok(),
            });
        }
    }
    rule
}

fn to(rules: &[&str], priority: i32) -> EgressPolicySpec {
    let egress = Some(rules.iter().map(|text| rule(text)).collect());
    EgressPolicySpec { egress, priority, ..asking(Allocate::Shared) }
}

impl World {
    fn condition(&mut self, key: &str, type_: &str) -> Condition {
        let status = &self.report()[&PolicyKey::from(key)];
        status.conditions.iter().find(|c| c.type_ == type_).unwrap().clone()
    }

    #[track_caller]
    fn assert_condition(&mut self, key: &str, type_: &str, status: &str, reason: &str, words: &str) {
        let c = self.condition(key, type_);
        assert_eq!((&*c.status, &*c.reason), (status, reason), "{}", c.message);
        assert!(c.message.contains(words), "{words:?} is not in {:?}", c.message);
    }
}

#[test]
fn ready_follows_the_nodes_report() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.assert_condition("a/p", "Accepted", "True", "Accepted", "192.0.2.50");
    world.assert_condition("a/p", "Ready", "False", "NodeNotReporting", "\"n1\"");
    world.holds("n1", &[]);
    world.assert_condition("a/p", "Ready", "False", "AddressNotHeld", "egretd's log");
    let id = world.allocate().grant("a/p").id;
    let mut node = (*world.cluster.egress_nodes["n1"]).clone();
    node.of_allocations_mut().refused.push(RefusedAllocation { id, message: "a host answers for it".into() });
    world.cluster.egress_nodes.insert("n1".into(), Arc::new(node));
    world.assert_condition("a/p", "Ready", "False", "AddressRefused", "a host answers for it");
    world.holds("n1", &[id]);
    world.now += 60;
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "\"n1\"");

    let before = world.condition("a/p", "Ready");
    world.now += 60;
    assert_eq!(world.condition("a/p", "Ready"), before, "time alone changes nothing");

    world.cluster.nodes.clear();
    world.assert_condition("a/p", "Ready", "False", "NoNode", "nodeSelector");
    world.external("g", &["192.0.2.50"]);
    world.assert_condition("a/p", "Ready", "False", "NoNode", "place it");
}

#[test]
fn the_report_of_a_lost_node_does_not_count() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.policy("a/own", asking(Allocate::Node));
    world.allocate();
    world.settle();
    let held = [world.allocate().node("a/p").unwrap().to_owned(), world.allocate().node("a/own").unwrap().to_owned()];
    let other = |node: &str| if node == "n1" { "n2" } else { "n1" };
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");

    // Another node lives and takes it over, but it cannot have a node's own address.
    world.misses(other(&held[0]), &[held[0].clone()]);
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");
    world.misses(other(&held[0]), &[]);
    world.misses(other(&held[1]), &[held[1].clone()]);
    world.assert_condition("a/own", "Ready", "Unknown", "NodeStatusUnknown", "reports nothing");
    world.misses(other(&held[1]), &[]);

    // The node that lives cannot take it either, or Egret does not place the address.
    let id = world.allocate().grant("a/p").id;
    world.misses(other(&held[0]), &[held[0].clone()]);
    let mut standby = (*world.cluster.egress_nodes[other(&held[0])]).clone();
    standby.of_allocations_mut().refused.push(RefusedAllocation { id, message: "a host answers for it".into() });
    let before = world.cluster.egress_nodes.insert(other(&held[0]).into(), Arc::new(standby)).unwrap();
    world.assert_condition("a/p", "Ready", "Unknown", "NodeStatusUnknown", "reports nothing");
    world.cluster.egress_nodes.insert(other(&held[0]).into(), before);
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");
    world.misses(other(&held[0]), &[]);

    // Kubernetes receives reports of none of them.
    let lost = |world: &mut World, node: &str, lost: bool| {
        Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).lost_since = lost.then_some(0);
    };
    lost(&mut world, "n1", true);
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");
    lost(&mut world, "n2", true);
    world.assert_condition("a/p", "Ready", "Unknown", "NodeStatusUnknown", "see whether it runs");
    let gateway = |world: &mut World| {
        let conditions = world.allocate().gateways["g"].conditions.clone();
        let ready = conditions.into_iter().find(|c| c.type_ == "Ready").unwrap();
        (ready.status, ready.reason)
    };
    assert_eq!(gateway(&mut world), ("Unknown".to_owned(), "NodesUnreachable".to_owned()));
    lost(&mut world, "n2", false);
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");
    assert_eq!(gateway(&mut world), ("True".to_owned(), "NodesMatch".to_owned()));

    // The API server was away, and received no kubelet's report meanwhile.
    let now = world.now;
    for node in ["n1", "n2"] {
        Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).lost_since = Some(now - 5);
    }
    world.assert_condition("a/p", "Ready", "True", "AddressHeld", "holds");
    assert_eq!(gateway(&mut world), ("True".to_owned(), "NodesMatch".to_owned()));
    world.now += 60;
    world.assert_condition("a/p", "Ready", "Unknown", "NodeStatusUnknown", "see whether it runs");
    lost(&mut world, "n2", false);

    // Of two nodes that do not reach each other, it is unknown which one lives.
    lost(&mut world, "n1", false);
    world.misses("n1", &["n2".to_owned()]);
    world.misses("n2", &["n1".to_owned()]);
    world.assert_condition("a/p", "Ready", "Unknown", "NodeStatusUnknown", "reports nothing");
}

#[test]
fn a_refused_policy_is_not_ready_and_has_no_address() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.51"]));
    world.assert_condition("a/p", "Accepted", "False", "AddressOutsidePool", "192.0.2.51");
    world.assert_condition("a/p", "Ready", "False", "NotAccepted", "Accepted");
    let status = world.report().remove(&PolicyKey::from("a/p")).unwrap();
    assert_eq!((status.addresses, status.node), (None, None));
}

#[test]
fn a_policy_says_which_gateway_it_uses() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/default", naming(&["192.0.2.50"]));
    world.policy("a/nowhere", EgressPolicySpec { gateway: Some("nowhere".into()), ..naming(&["192.0.2.50"]) });
    let gateway = |key: &str, world: &mut World| world.report()[&PolicyKey::from(key)].gateway.clone();
    assert_eq!(gateway("a/default", &mut world).as_deref(), Some("g"));
    assert_eq!(gateway("a/nowhere", &mut world).as_deref(), Some("nowhere"));
}

#[test]
fn an_invalid_policy_has_a_condition_with_the_reason() {
    let mut world = World::new(&["192.0.2.50"]);
    let unreadable = |message: &str| Arc::new(Unreadable { message: message.into(), generation: Some(2) });
    world.cluster.unreadable.insert("a/p".into(), unreadable("spec.egress[0]: what?"));
    world.assert_condition("a/p", "Accepted", "False", "Invalid", "spec.egress[0]");
    world.assert_condition("a/p", "Ready", "False", "NotAccepted", "Accepted");
    // Its last good state is used.
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.assert_condition("a/p", "Accepted", "False", "Invalid", "spec.egress[0]");
    assert!(world.report()[&PolicyKey::from("a/p")].addresses.is_some());
    assert_eq!(world.condition("a/p", "Ready").reason, "NodeNotReporting");
}

#[test]
fn pods_are_counted_while_they_can_be_selected() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", EgressPolicySpec { pod_selector: Some(selector(&[("app", "x")])), ..naming(&["192.0.2.50"]) });
    for name in ["one", "two", "host", "finished"] {
        world.pod("a", name, &[("app", "x")]);
    }
    world.pod("a", "other", &[]);
    world.pod("b", "elsewhere", &[("app", "x")]);
    for (key, pod) in world.cluster.pods.iter_mut() {
        let pod = Arc::make_mut(pod);
        pod.host_network = &*key.name == "host";
        pod.finished = &*key.name == "finished";
    }
    assert_eq!(world.report()[&PolicyKey::from("a/p")].pods, 2);
}

#[test]
fn a_policy_is_shadowed_when_others_decide_for_all_its_pods() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/all", asking(Allocate::Shared));
    world.assert_condition("a/all", "Shadowed", "False", "NoPods", "");
    world.pod("a", "one", &[("app", "x")]);
    world.policy(
        "a/x",
        EgressPolicySpec { pod_selector: Some(selector(&[("app", "x")])), priority: 1, ..asking(Allocate::Shared) },
    );
    world.assert_condition("a/all", "Shadowed", "True", "Shadowed", "a/x");
    world.assert_condition("a/x", "Shadowed", "False", "NotShadowed", "");
    world.pod("a", "two", &[]);
    world.assert_condition("a/all", "Shadowed", "False", "NotShadowed", "");
}

/// Whether a policy with the last rules is covered by policies with the rules before.
#[track_caller]
fn assert_covered(rules: &[&[&str]], expected: bool) {
    let mut world = World::new(&["192.0.2.50"]);
    world.pod("a", "one", &[]);
    for (i, rules) in rules.iter().enumerate() {
        world.policy(&format!("a/p{i}"), to(rules, -(i as i32)));
    }
    let shadowed = world.condition(&format!("a/p{}", rules.len() - 1), "Shadowed");
    assert_eq!(shadowed.status == "True", expected, "{rules:?}: {}", shadowed.message);
}

#[test]
fn destinations_are_compared_exactly() {
    assert_covered(&[&["203.0.113.0/24"], &["203.0.113.0/25"]], true);
    assert_covered(&[&["203.0.113.0/25"], &["203.0.113.0/24"]], false);
    assert_covered(&[&["203.0.113.0/24 tcp:80-90"], &["203.0.113.5/32 tcp:80"]], true);
    assert_covered(&[&["203.0.113.0/24 tcp:80-90"], &["203.0.113.5/32 udp:80"]], false);
    assert_covered(&[&["203.0.113.0/24 tcp:80-90"], &["203.0.113.5/32 tcp:80-91"]], false);
    assert_covered(&[&["203.0.113.0/24 tcp:80-90"], &["203.0.113.5/32"]], false);
    assert_covered(&[&["203.0.113.0/24"], &["198.51.100.0/24"], &["203.0.113.5/32", "198.51.100.1/32"]], true);
    assert_covered(&[&["203.0.113.0/24"], &["203.0.113.5/32", "198.51.100.1/32"]], false);
    assert_covered(&[&[""], &["203.0.113.0/24"]], true);
    assert_covered(&[&["0.0.0.0/0", "::/0"], &[""]], true);
    assert_covered(&[&["0.0.0.0/0"], &[""]], false);
    assert_covered(&[&["tcp:1-65535"], &["2001:db8::/64 tcp:443"]], true);
    assert_covered(&[&["0.0.0.0/0"], &["2001:db8::/64"]], false);
    assert_covered(&[&["203.0.113.0/24"], &[]], false);
}

#[test]
fn exceptions_are_not_covered() {
    let wide = "203.0.113.0/24 -203.0.113.0/28";
    assert_covered(&[&[wide], &["203.0.113.0/24"]], false);
    assert_covered(&[&[wide], &["203.0.113.4/32"]], false);
    assert_covered(&[&[wide], &["203.0.113.128/25"]], true);
    assert_covered(&[&[wide], &["203.0.113.0/24 -203.0.113.0/28"]], true);
    assert_covered(&[&[wide], &["203.0.113.0/25 -203.0.113.0/27"]], true);
    assert_covered(&[&[wide], &["203.0.113.0/25 -203.0.113.0/29"]], false);
}

#[test]
fn the_hint_of_a_shadowed_policy_can_be_followed() {
    // Priorities and tiers of the deciding policy and of the shadowed one, and the hint for the latter.
    type Of = (&'static str, i32, Option<Tier>);
    let cases: [(Of, Of, &str); 7] = [
        (("a/first", 4, None), ("a/second", 4, None), "set its priority to 5 or more"),
        (("a/first", 9, None), ("second", 4, None), "set its priority to 10 or more"),
        (("a/first", i32::MAX, None), ("a/second", 4, None), "set its priority to 2147483647 and theirs below that"),
        (("first", 0, Some(Tier::Admin)), ("a/second", 4, None), "a cluster administrator can take them out of tier"),
        (
            ("first", 3, Some(Tier::Admin)),
            ("second", 4, None),
            "set its tier to Admin, and set its priority to 4 or more",
        ),
        (("a/first", 3, None), ("second", 4, Some(Tier::Baseline)), "leave out its tier, and set its priority to 4 or"),
        (("first", 3, Some(Tier::Admin)), ("second", 2, Some(Tier::Admin)), "set its priority to 4 or more"),
    ];
    for ((first, high, above), (second, low, below), words) in cases {
        let mut world = World::new(&["192.0.2.50"]);
        world.pod("a", "one", &[]);
        world.policy_of_tier(first, EgressPolicySpec { priority: high, ..asking(Allocate::Shared) }, above);
        world.now += 1;
        world.policy_of_tier(second, EgressPolicySpec { priority: low, ..asking(Allocate::Shared) }, below);
        world.assert_condition(second, "Shadowed", "True", "Shadowed", words);
        world.assert_condition(first, "Shadowed", "False", "NotShadowed", "");
    }
}

#[test]
fn a_policy_with_fallback_and_without_an_address_shadows_none() {
    let mut world = World::new(&["192.0.2.50"]);
    world.pod("a", "one", &[]);
    world.policy("everywhere", asking(Allocate::Shared));
    let unknown = |fallback| EgressPolicySpec { gateway: Some("nope".into()), fallback, ..asking(Allocate::Shared) };
    world.policy("a/out", unknown(Fallback::NodeAddress));
    world.assert_condition("everywhere", "Shadowed", "False", "NotShadowed", "");
    world.assert_condition("a/out", "Shadowed", "False", "PassedOver", "next policy");
    world.policy("a/out", unknown(Fallback::Block));
    world.assert_condition("everywhere", "Shadowed", "True", "Shadowed", "a/out");
    // A policy with an egress IP keeps its place while its gateway is dead.
    world.policy("a/out", EgressPolicySpec { fallback: Fallback::NodeAddress, ..asking(Allocate::Shared) });
    world.cluster.nodes.clear();
    world.assert_condition("a/out", "Ready", "False", "NoNode", "");
    world.assert_condition("everywhere", "Shadowed", "True", "Shadowed", "a/out");
}

#[test]
fn lost_families_that_the_policy_needs_are_named() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    world.policy("a/pair", asking(Allocate::Dedicated));
    world.policy("a/plain", naming(&["192.0.2.57"]));
    world.allocate();
    world.settle();
    for node in ["n1", "n2"] {
        world.loses(node, &["IPv6"]);
    }
    world.assert_condition(
        "a/pair",
        "Ready",
        "True",
        "AddressHeld",
        "it has lost IPv6, and no other node has lost less: no",
    );
    assert!(!world.condition("a/plain", "Ready").message.contains("lost"));
}

#[test]
fn a_policy_over_the_limit_of_a_node_says_on_which_nodes() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    for node in ["n1", "n2"] {
        world.node(node, "g", &[]);
        let status = Arc::make_mut(world.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().over_limit = vec![PolicyKey::from("a/p")];
    }
    world.assert_condition("a/p", "OverNodeLimit", "True", "TooManyDestinations", "its pods on n1, n2 are isolated");
    for status in world.cluster.egress_nodes.values_mut() {
        Arc::make_mut(status).of_allocations_mut().over_limit.clear();
    }
    let status = &world.report()[&PolicyKey::from("a/p")];
    assert!(status.conditions.iter().all(|c| c.type_ != "OverNodeLimit"), "{:?}", status.conditions);
}

#[test]
fn a_direct_policy_has_no_egress_ip_and_is_ready() {
    let mut world = World::new(&["192.0.2.50"]);
    world.pod("a", "pod", &[]);
    let direct = EgressPolicySpec { action: Action::Direct, ..to(&["203.0.113.0/24"], 5) };
    world.policy("a/direct", EgressPolicySpec { allocate: None, ..direct });
    world.policy("a/narrow", to(&["203.0.113.0/25"], 0));
    world.assert_condition("a/direct", "Accepted", "True", "Direct", "leaves as if Egret were not there");
    world.assert_condition("a/direct", "Ready", "True", "Direct", "no egress IP");
    world.assert_condition("a/direct", "Shadowed", "False", "NotShadowed", "");
    world.assert_condition("a/narrow", "Shadowed", "True", "Shadowed", "a/direct");
    let status = &world.report()[&PolicyKey::from("a/direct")];
    assert_eq!((&status.addresses, &status.gateway, status.pods), (&None, &None, 1));
    world.policy("everywhere", to(&["203.0.113.0/24"], -3));
    world.assert_condition("a/direct", "Shadowed", "True", "PassedOver", "ClusterEgressPolicy with action: Direct");
    world.assert_condition("a/narrow", "Shadowed", "False", "NotShadowed", "");
}

#[test]
fn pods_are_counted_by_node_while_there_are_few_nodes() {
    let mut world = World::new(&["192.0.2.50"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.policy("a/q", asking(Allocate::Node));
    world.pod_on("n2", "a", "one");
    world.pod_on("n1", "a", "two");
    world.pod_on("n2", "a", "three");
    world.pod_on("n2", "b", "of-another-namespace");
    world.pod("a", "not-scheduled", &[]);
    let by_node = |world: &mut World, key: &str| {
        let status = &world.report()[&PolicyKey::from(key)];
        let by_node: Vec<(String, u32)> = status.pods_by_node.iter().map(|on| (on.node.to_string(), on.pods)).collect();
        (status.pods, by_node)
    };
    for key in ["a/p", "a/q"] {
        assert_eq!(by_node(&mut world, key), (4, vec![("n1".into(), 1), ("n2".into(), 2)]));
    }
    for node in 3..100 {
        world.pod_on(&format!("n{node}"), "a", &format!("on-{node}"));
    }
    assert_eq!(by_node(&mut world, "a/p").1.len(), 99);
    world.pod_on("n100", "a", "on-100");
    assert_eq!(by_node(&mut world, "a/p"), (102, vec![]), "on 100 nodes");
}

#[test]
fn few_source_ports_are_named_with_their_remedy() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.policy("a/p", naming(&["192.0.2.50"]));
    world.policy("a/q", naming(&["192.0.2.51"]));
    world.allocate();
    world.settle();
    let id = world.allocate().grant("a/p").id;
    let owner = world.allocate().node("a/p").unwrap().to_owned();
    let found = |ports: &str| PortsNearlyExhausted {
        id,
        address: [192, 0, 2, 50].into(),
        destination: [203, 0, 113, 7].into(),
        port: 443,
        protocol: Protocol::Tcp,
        ports: ports.to_owned(),
    };
    let condition = |world: &mut World, key: &str| {
        let status = world.report()[&PolicyKey::from(key)].clone();
        status.conditions.into_iter().find(|condition| condition.type_ == "PortsNearlyExhausted")
    };
    let of_gateway = |world: &mut World| {
        let conditions = world.allocate().gateways["g"].conditions.clone();
        conditions.into_iter().find(|condition| condition.type_ == "PortsNearlyExhausted")
    };
    assert_eq!((condition(&mut world, "a/p"), of_gateway(&mut world)), (None, None));

    world.has_few_ports(&owner, &[found("1024-65535")]);
    let message = condition(&mut world, "a/p").unwrap().message;
    let words = ["192.0.2.50 to 203.0.113.7:443 (TCP)", "source ports 1024-65535", "; divide its connections"];
    assert!(words.iter().all(|words| message.contains(words)) && !message.contains("64,512"), "{message}");
    assert_eq!(condition(&mut world, "a/q"), None, "it has another egress IP");
    let message = of_gateway(&mut world).unwrap().message;
    assert!(message.contains("203.0.113.7:443 (TCP)") && message.contains("; give the policies"), "{message}");
    let first = condition(&mut world, "a/p");
    world.now += 60;
    assert_eq!(condition(&mut world, "a/p"), first, "since when it is so stays");

    world.has_few_ports(&owner, &[found("1-511")]);
    assert!(condition(&mut world, "a/p").unwrap().message.contains("from ports above 1023"));
    world.holds(&owner, &[]);
    world.has_few_ports(&owner, &[found("1-511")]);
    assert_eq!(condition(&mut world, "a/p"), None, "another node has the egress IP now");
}

#[test]
fn the_status_says_which_dscp_packets_have() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    let shared = |dscp| EgressPolicySpec { dscp, ..asking(Allocate::Shared) };
    world.policy("a/old", shared(None));
    world.now += 1;
    world.policy("a/gives", shared(Some(46)));
    world.now += 1;
    world.policy("a/other", shared(Some(10)));
    world.policy("a/own", EgressPolicySpec { dscp: Some(0), ..asking(Allocate::Dedicated) });
    for (key, words) in [
        ("a/old", "its packets have DSCP 46 by a/gives, which has the same egress IP"),
        ("a/gives", "its packets have DSCP 46"),
        ("a/other", "its packets have DSCP 46 and not 10, because a/gives has the same egress IP and"),
        ("a/own", "its packets have DSCP 0"),
    ] {
        world.assert_condition(key, "Accepted", "True", "Accepted", words);
    }
    world.policy("b/other", shared(None));
    let words = "its packets do not have DSCP 46, because policies of several namespaces have its egress IP";
    world.assert_condition("a/gives", "Accepted", "True", "Accepted", words);
}
