use super::*;
use crate::api::{Allocate, EgressNodeStatus, EgressPolicySpec, NodeCapacity, TakenAllocation};
use crate::fixture::{World, asking, naming, naming_service, naming_several, selector};
use crate::model::tunnel_mac;
use egret_nft::mac;
use std::sync::Arc;

/// Three gateway nodes and another node, and one policy, whose allocation `n1` holds.
fn world() -> (World, EgressId) {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.node("n3", "g", &["10.0.0.3"]);
    world.node("plain", "none", &["10.0.0.4"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    let id = world.allocate().grant("a/p").id;
    for node in ["n1", "n2", "n3", "plain"] {
        says(&mut world, node, &[], &[]);
    }
    says(&mut world, "n1", &[id], &[]);
    (world, id)
}

fn says(world: &mut World, node: &str, allocations: &[EgressId], taken: &[(EgressId, i64)]) {
    let status = EgressNodeStatus {
        tunnel_address: world.cluster.nodes[node].addresses.first().copied(),
        tunnel_mac: Some(mac::Shown(tunnel_mac::of_node(node)).to_string()),
        answers: true,
        allocations: allocations.to_vec(),
        taken: taken.iter().map(|(id, since)| TakenAllocation { id: *id, since: *since }).collect(),
        refused: Vec::new(),
        ..Default::default()
    };
    world.cluster.egress_nodes.insert(node.into(), Arc::new(status.into()));
}

fn facts(here: &[&str], dead: &[&str]) -> Facts {
    Facts {
        addresses: here.iter().map(|a| a.parse().unwrap()).collect(),
        dead: dead.iter().map(|n| (*n).into()).collect(),
        ..Facts::default()
    }
}

fn seen(world: &World, node: &str, facts: &Facts, id: EgressId) -> (AllocationState, Placing) {
    let allocation = NodeAllocations::new(&world.cluster, node, facts).allocations[&id].clone();
    (allocation.state, allocation.placing)
}

fn to(node: &str) -> AllocationState {
    AllocationState::Remote(tunnel_mac::of_node(node))
}

const A: &str = "192.0.2.50";

#[test]
fn the_allocations_node_takes_it_and_the_others_send_to_it() {
    let (world, id) = world();
    assert_eq!(seen(&world, "n1", &facts(&[A], &[]), id), (AllocationState::Local, Placing::Take));
    assert_eq!(seen(&world, "n2", &facts(&[], &[]), id), (to("n1"), Placing::Leave));
    assert_eq!(seen(&world, "plain", &facts(&[], &[]), id), (to("n1"), Placing::Never));
    let (state, placing) = seen(&world, "n1", &facts(&[], &[]), id);
    assert!(matches!(state, AllocationState::Unready(_)), "it is not there yet");
    assert_eq!(placing, Placing::Take);
}

#[test]
fn one_of_the_others_takes_a_dead_nodes_allocation_and_all_know_which() {
    let (world, id) = world();
    let AllocationState::Remote(new) = seen(&world, "plain", &facts(&[], &["n1"]), id).0 else { panic!() };
    let (taker, other) = if new == tunnel_mac::of_node("n2") { ("n2", "n3") } else { ("n3", "n2") };
    assert_eq!(seen(&world, taker, &facts(&[], &["n1"]), id).1, Placing::Take);
    assert_eq!(seen(&world, taker, &facts(&[A], &["n1"]), id).0, AllocationState::Local);
    // The dead node's report that it holds the allocation does not count any more.
    assert_eq!(seen(&world, other, &facts(&[], &["n1"]), id), (to(taker), Placing::Keep));
    assert_eq!(seen(&world, other, &facts(&[], &["n1", taker]), id).1, Placing::Take);
    let nobody = seen(&world, "plain", &facts(&[], &["n1", "n2", "n3"]), id).0;
    assert!(matches!(nobody, AllocationState::Unready(_)));
}

#[test]
fn a_node_translates_before_and_during_a_takeover() {
    let (world, id) = world();
    let AllocationState::Remote(new) = seen(&world, "plain", &facts(&[], &["n1"]), id).0 else { panic!() };
    let taker = if new == tunnel_mac::of_node("n2") { "n2" } else { "n3" };
    let (asking, mut coming, mut refused) = (facts(&[], &["n1"]), facts(&[], &["n1"]), facts(&[], &["n1"]));
    coming.coming.insert(id);
    refused.refused.insert(id, "another host has it".into());
    let at = |facts: &Facts| {
        let allocations = NodeAllocations::new(&world.cluster, taker, facts);
        let allocation = &allocations.allocations[&id];
        assert!(allocation.is_member());
        (allocation.state.clone(), allocation.translates(), allocations.held.contains(&id))
    };
    assert_eq!(at(&facts(&[], &[])), (to("n1"), true, false));
    assert_eq!(at(&asking), (to("n1"), true, false), "as it was, until it is known that nobody has the address");
    assert_eq!(at(&coming), (AllocationState::Local, true, false), "its own pods need not wait for the address");
    assert_eq!(at(&facts(&[A], &["n1"])), (AllocationState::Local, true, true));
    assert_eq!(at(&refused), (AllocationState::Unready("another host has it".into()), false, false));
}

#[test]
fn a_taken_over_allocation_stays_when_the_dead_node_is_back() {
    let (mut world, id) = world();
    let since = world.cluster.gateways["g"].status.allocations[0].since;
    says(&mut world, "n3", &[id], &[(id, since)]);
    let mut own = facts(&[A], &[]);
    own.taken.insert(id, since);
    let all_agree = |world: &World| {
        assert_eq!(seen(world, "n3", &own, id), (AllocationState::Local, Placing::Take));
        assert_eq!(seen(world, "n1", &facts(&[A], &[]), id), (to("n3"), Placing::Leave), "it was frozen, say");
        assert_eq!(seen(world, "n1", &facts(&[], &[]), id).0, to("n3"));
        assert_eq!(seen(world, "plain", &facts(&[], &[]), id).0, to("n3"));
    };
    all_agree(&world);
    assert_eq!(world.allocate().node("a/p"), Some("n3"));
    assert_ne!(world.cluster.gateways["g"].status.allocations[0].since, since);
    all_agree(&world);
    let after = world.cluster.gateways["g"].status.clone();
    world.allocate();
    assert_eq!(world.cluster.gateways["g"].status, after);
}

#[test]
fn reports_about_older_allocations_do_not_count() {
    let (mut world, id) = world();
    let since = world.cluster.gateways["g"].status.allocations[0].since;
    says(&mut world, "n3", &[id], &[(id, since - 1)]);
    assert_eq!(seen(&world, "plain", &facts(&[], &[]), id).0, to("n1"));
    assert_eq!(world.allocate().node("a/p"), Some("n1"));
}

fn label(world: &mut World, node: &str, labels: &[(&str, &str)]) {
    let node = Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap());
    node.labels = labels.iter().copied().collect();
}

#[test]
fn a_drained_or_deselected_node_holds_its_allocations_until_another_has_them() {
    for labels in [&[("gateway", "g"), ("egret.dev/drain", "true")][..], &[("gateway", "none")]] {
        let (mut world, id) = world();
        label(&mut world, "n1", labels);
        assert_eq!(
            seen(&world, "n1", &facts(&[A], &[]), id).0,
            AllocationState::Local,
            "before the allocations has moved it"
        );
        assert_eq!(seen(&world, "plain", &facts(&[], &[]), id).0, to("n1"));

        let new = world.allocate().node("a/p").unwrap().to_owned();
        assert!(new == "n2" || new == "n3");
        assert_eq!(world.cluster.gateways["g"].status.allocations[0].leaving.as_deref(), Some("n1"));
        assert_eq!(seen(&world, "n1", &facts(&[A], &[]), id), (AllocationState::Local, Placing::TakeHanded));
        assert_eq!(seen(&world, &new, &facts(&[], &[]), id), (to("n1"), Placing::TakeHanded));
        assert_eq!(seen(&world, "plain", &facts(&[], &[]), id).0, to("n1"));

        assert_eq!(seen(&world, &new, &facts(&[A], &[]), id), (AllocationState::Local, Placing::TakeHanded));
        says(&mut world, &new, &[id], &[]);
        assert_eq!(seen(&world, "n1", &facts(&[A], &[]), id), (to(&new), Placing::Leave));
        assert_eq!(seen(&world, "plain", &facts(&[], &[]), id).0, to(&new));
        world.allocate();
        assert_eq!(world.cluster.gateways["g"].status.allocations[0].leaving, None);
        assert!(
            NodeAllocations::new(&world.cluster, "n1", &facts(&[A], &[])).allocations[&id].is_member(),
            "while the address is there"
        );
    }
}

#[test]
fn of_nodes_that_are_all_drained_none_is_left() {
    let (mut world, id) = world();
    for node in ["n1", "n2", "n3"] {
        label(&mut world, node, &[("gateway", "g"), ("egret.dev/drain", "true")]);
    }
    assert_eq!(world.allocate().node("a/p"), Some("n1"));
    assert_eq!(seen(&world, "n1", &facts(&[A], &[]), id).0, AllocationState::Local);
}

#[test]
fn with_external_placement_the_node_with_the_address_is_the_owner() {
    let (mut world, id) = world();
    world.external("g", &["192.0.2.50-192.0.2.59"]);
    let allocation = |world: &World, node: &str, facts: &Facts| seen(world, node, facts, id);
    assert_eq!(allocation(&world, "n1", &facts(&[A], &[])), (AllocationState::Local, Placing::Never));
    assert_eq!(allocation(&world, "n2", &facts(&[A], &[])).0, AllocationState::Local, "it has moved here");
    assert!(matches!(allocation(&world, "n1", &facts(&[], &[])).0, AllocationState::Unready(_)));
    says(&mut world, "n1", &[], &[]);
    says(&mut world, "n2", &[id], &[]);
    assert_eq!(allocation(&world, "plain", &facts(&[], &[])).0, to("n2"), "before the allocations has followed");
    says(&mut world, "n1", &[id], &[]);
    assert_eq!(allocation(&world, "plain", &facts(&[], &["n1"])).0, to("n2"), "a dead node's word counts no more");
}

#[test]
fn a_nodes_own_address_does_not_move() {
    let (mut world, _) = world();
    world.policy("a/own", asking(Allocate::Node));
    let grant = world.allocate().grant("a/own").clone();
    let node = grant.node.as_deref().unwrap();
    assert_eq!(seen(&world, "plain", &facts(&[], &[]), grant.id), (to(node), Placing::Never));
    assert!(matches!(seen(&world, "plain", &facts(&[], &[node]), grant.id).0, AllocationState::Unready(_)));
}

#[test]
fn a_node_that_relinquished_an_allocation_sends_to_the_next_owner() {
    let (world, id) = world();
    let mut facts = facts(&[], &[]);
    facts.relinquished.insert(id);
    let (state, placing) = seen(&world, "n1", &facts, id);
    let taker = seen(&world, "plain", &super::tests::facts(&[], &["n1"]), id).0;
    assert_eq!((state, placing), (taker, Placing::Take), "and takes it back if nobody has it");
}

#[test]
fn a_policy_has_no_allocation_that_it_does_not_ask_for_any_more() {
    let (mut world, id) = world();
    world.gateway("other", &["192.0.2.60-192.0.2.69"], |_| {});
    let allocation = |world: &World| {
        let key = "a/p".into();
        let allocations = NodeAllocations::new(&world.cluster, "plain", &facts(&[], &[]));
        allocations.of(&key, &world.cluster.policies[&key]).first().map(|choice| choice.of)
    };
    assert_eq!(allocation(&world), Some(id));
    let in_other = |gateway: &str, spec: crate::api::EgressPolicySpec| crate::api::EgressPolicySpec {
        gateway: Some(gateway.to_owned()),
        ..spec
    };
    for spec in [naming(&["192.0.2.51"]), in_other("other", asking(Allocate::Dedicated)), naming(&["192.0.2.52"])] {
        world.policy("a/p", spec);
        assert_eq!(allocation(&world), None, "the controller has not given it another one yet");
        let id = world.allocate().grant("a/p").id;
        assert_eq!(allocation(&world), Some(id));
    }
    // Another change is no change of the address.
    let id = allocation(&world);
    world.policy("a/p", crate::api::EgressPolicySpec { priority: 7, ..naming(&["192.0.2.52"]) });
    assert_eq!(allocation(&world), id);
}

#[test]
fn the_address_of_a_service_need_not_be_on_an_interface_of_the_node_that_announces_it() {
    let mut world = World::default();
    world.external("g", &["192.0.2.50-192.0.2.59"]);
    for (node, address) in [("n1", "10.0.0.1"), ("n2", "10.0.0.2"), ("n3", "10.0.0.3")] {
        world.node(node, "g", &[address]);
        says(&mut world, node, &[], &[]);
    }
    world.service("shop/web", &[A], Some("n1"));
    world.policy("shop/web", naming_service("web"));
    let id = world.allocate().grant("shop/web").id;
    let state = |world: &World, node: &str, here: &[&str], dead: &[&str]| seen(world, node, &facts(here, dead), id).0;
    assert_eq!(state(&world, "n1", &[], &[]), AllocationState::Local);
    assert_eq!(state(&world, "n2", &[], &[]), to("n1"));
    let allocations = NodeAllocations::new(&world.cluster, "n1", &facts(&[], &[]));
    assert!(allocations.held.contains(&id) && allocations.without_address.contains(&id));
    assert!(allocations.allocations[&id].translates() && allocations.allocations[&id].owner_holds);
    let policy = world.cluster.policies[&"shop/web".into()].clone();
    assert_eq!(allocations.of(&"shop/web".into(), &policy).first().map(|choice| choice.of), Some(id));
    // The policy names another Service now, and the controller has not written its address yet.
    world.policy("shop/web", naming_service("other"));
    let policy = world.cluster.policies[&"shop/web".into()].clone();
    assert!(allocations.of(&"shop/web".into(), &policy).is_empty());

    // It appears on another node's interface. What the load balancer says is late.
    assert_eq!(state(&world, "n2", &[A], &[]), AllocationState::Local);
    let without = EgressNodeStatus { allocations: vec![id], without_address: vec![id], ..EgressNodeStatus::default() };
    says(&mut world, "n2", &[id], &[]);
    assert_eq!(state(&world, "n3", &[], &[]), to("n2"));
    assert_eq!(state(&world, "n1", &[], &[]), to("n2"));
    let mut status = without.clone();
    (status.tunnel_address, status.tunnel_mac) =
        (Some([10, 0, 0, 2].into()), Some(mac::Shown(tunnel_mac::of_node("n2")).to_string()));
    world.cluster.egress_nodes.insert("n2".into(), Arc::new(status.into()));
    assert_eq!(state(&world, "n3", &[], &[]), to("n1"), "a node without the address does not claim it");
    assert!(matches!(state(&world, "n3", &[], &["n1"]), AllocationState::Unready(_)));
}

#[test]
fn a_policy_with_several_egress_ips_has_those_that_it_names_now_in_its_order() {
    let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
    world.node("plain", "none", &["10.0.0.9"]);
    let key = "a/p".into();
    let of = |world: &World| -> Vec<(u16, String)> {
        let allocations = NodeAllocations::new(&world.cluster, "plain", &facts(&[], &[]));
        let choices = allocations.of(&key, &world.cluster.policies[&key]);
        let address = |id| allocations.allocations[id].address.ipv4.unwrap().to_string();
        let mut all: Vec<_> = choices.iter().map(|choice| (choice.ordinal, address(&choice.of))).collect();
        all.sort();
        all
    };
    let pairs = |all: &[(u16, &str)]| all.iter().map(|(n, a)| (*n, (*a).to_owned())).collect::<Vec<_>>();
    world.policy("a/p", naming_several(["192.0.2.52", "192.0.2.51"]));
    world.allocate();
    assert_eq!(of(&world), pairs(&[(0, "192.0.2.52"), (1, "192.0.2.51")]));
    world.policy("a/p", naming_several(["192.0.2.51", "192.0.2.53"]));
    assert_eq!(of(&world), pairs(&[(0, "192.0.2.51")]), "the controller has not given it the other one yet");
    world.allocate();
    assert_eq!(of(&world), pairs(&[(0, "192.0.2.51"), (1, "192.0.2.53")]));
    let counted = |count| crate::api::EgressPolicySpec { address_count: Some(count), ..asking(Allocate::Dedicated) };
    world.policy("a/p", counted(3));
    world.allocate();
    assert_eq!(of(&world).len(), 3);
    world.policy("a/p", counted(2));
    assert_eq!(of(&world).iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn only_nodes_that_may_become_the_owner_know_the_dscp() {
    let mut world = World::new(&[A]);
    world.policy("a/p", EgressPolicySpec { dscp: Some(46), ..naming(&[A]) });
    world.node("plain", "none", &["10.0.0.9"]);
    let id = world.allocate().grant("a/p").id;
    let dscp = |world: &World, node| NodeAllocations::new(&world.cluster, node, &facts(&[], &[])).allocations[&id].dscp;
    assert_eq!(["n1", "n2", "plain"].map(|node| dscp(&world, node)), [Some(46), Some(46), None]);
    world.policy("a/p", naming(&[A]));
    assert_eq!(dscp(&world, "n1"), None);
}

/// What the nodes of a gateway take, and where a source node sends, by egress ID.
fn taken_by(world: &World, members: &[&str], dead: &[&str]) -> BTreeMap<EgressId, Vec<String>> {
    let of_source = NodeAllocations::new(&world.cluster, "plain", &facts(&[], dead));
    let mut takers: BTreeMap<EgressId, Vec<String>> =
        of_source.allocations.keys().map(|id| (*id, Vec::new())).collect();
    for node in members.iter().filter(|node| !dead.contains(node)) {
        for (id, allocation) in NodeAllocations::new(&world.cluster, node, &facts(&[], dead)).allocations {
            if allocation.placing == Placing::Take {
                takers.get_mut(&id).unwrap().push((*node).to_owned());
            }
        }
    }
    for (id, allocation) in &of_source.allocations {
        match takers[id].as_slice() {
            [one] => assert_eq!(allocation.state, to(one), "{id}"),
            [] => assert!(matches!(allocation.state, AllocationState::Unready(_)), "{id}: {:?}", allocation.state),
            several => panic!("{several:?} take {id}"),
        }
    }
    takers
}

#[test]
fn all_nodes_compute_the_same_where_nodes_have_a_maximum() {
    let members = ["n1", "n2", "n3"];
    for most in 2..6 {
        let mut world = World::new(&["192.0.2.50-192.0.2.69"]);
        world.gateway("g", &["192.0.2.50-192.0.2.69"], |spec| {
            let nodes = |weight| NodeCapacity {
                node_selector: selector(&[]),
                weight: Some(weight),
                max_egress_ips: Some(most),
            };
            (spec.default, spec.capacity) = (true, vec![nodes(2)]);
        });
        world.node("n3", "g", &["10.0.0.3"]);
        world.node("plain", "none", &["10.0.0.4"]);
        (0..6).for_each(|i| world.policy(&format!("a/p{i}"), asking(Allocate::Dedicated)));
        world.allocate();
        for node in members.into_iter().chain(["plain"]) {
            says(&mut world, node, &[], &[]);
        }
        let before = taken_by(&world, &members, &[]);
        assert!(before.values().all(|nodes| nodes.len() == 1), "{before:?}");
        let after = taken_by(&world, &members, &["n1"]);
        let of = |node: &str| after.values().filter(|nodes| nodes.contains(&node.to_owned())).count();
        let room = 2 * (most as usize - 2);
        assert_eq!(of("n2") + of("n3"), 4 + room.min(2), "{after:?}");
        assert!(of("n2") <= most as usize && of("n3") <= most as usize, "{after:?}");
        for (id, nodes) in &before {
            assert!(*nodes == ["n1"] || *nodes == after[id], "only what the dead node held moves: {after:?}");
        }
        let full = NodeAllocations::new(&world.cluster, "plain", &facts(&[], &["n1"]));
        for allocation in full.allocations.values() {
            if let AllocationState::Unready(why) = &allocation.state {
                assert!(
                    why.contains("n1 does not answer") && why.contains("maxEgressIPs") && why.contains("n2, n3"),
                    "{why}"
                );
            }
        }
    }
}
