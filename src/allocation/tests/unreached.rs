//! Moves away from an owner that no source node reaches, by fresh reports of all nodes.

use crate::allocation::unreached::VALID_SECONDS;
use crate::api::{Allocate, TakenAllocation};
use crate::fixture::{World, asking};
use crate::model::ObjectKey;
use proptest::prelude::*;
use std::sync::Arc;

const GATEWAYS: [&str; 3] = ["g1", "g2", "g3"];
const SOURCES: [&str; 3] = ["n1", "n2", "n3"];
const ALL: [&str; 6] = ["g1", "g2", "g3", "n1", "n2", "n3"];

/// Gateway nodes, and source nodes with one pod each of the same policy, whose egress IP has been on g1 for long.
fn world() -> World {
    let mut world = World::new(&["192.0.2.0/24"]);
    world.cluster.nodes.clear();
    for (i, node) in GATEWAYS.iter().enumerate() {
        world.node(node, "g", &[&format!("10.0.0.{i}")]);
    }
    for node in SOURCES {
        world.node(node, "none", &[]);
        world.pod("a", node, &[]);
        let pod = world.cluster.pods.get_mut(&ObjectKey::new("a", node)).unwrap();
        Arc::make_mut(pod).node = Some(node.into());
    }
    world.policy("a/p", asking(Allocate::Dedicated));
    world.allocate();
    world.settle();
    world.now += 100;
    assert_eq!(world.allocate().node("a/p"), Some("g1"));
    world
}

fn misses(world: &mut World, node: &str, unreachable: &[&str]) {
    world.misses(node, &unreachable.iter().map(ToString::to_string).collect::<Vec<_>>());
}

/// Lets the controller request reports, and all nodes report again. Returns the owner after that.
fn asked(world: &mut World) -> String {
    world.allocate();
    world.give_reports(&ALL);
    world.now += 2;
    world.allocate().node("a/p").unwrap().to_owned()
}

fn requested(world: &World) -> Option<i64> {
    world.cluster.gateways["g"].status.reports_requested_at
}

#[test]
fn an_egress_ip_that_no_source_node_reaches_moves_to_a_node_that_all_of_them_reach() {
    let mut world = world();
    world.does_not_reach("n1", &["g1"]);
    world.does_not_reach("n2", &["g1", "g2"]);
    assert_eq!((asked(&mut world).as_str(), requested(&world)), ("g1", None), "n3 reaches it");
    world.does_not_reach("n3", &["g1"]);
    let outcome = world.allocate();
    assert_eq!((outcome.node("a/p"), outcome.next_reports), (Some("g1"), Some(world.now + 2)), "it asks first");
    assert_eq!(requested(&world), Some(world.now));
    world.give_reports(&ALL);
    assert_eq!(world.allocate().node("a/p"), Some("g1"), "it lets nodes have their time");
    world.now += 2;
    let grant = world.allocate().grant("a/p").clone();
    assert_eq!((grant.node.as_deref(), grant.leaving.as_deref()), (Some("g3"), Some("g1")), "n2 does not reach g2");
    world.settle();
    assert_eq!(world.allocate().node("a/p"), Some("g3"));
    assert_eq!(requested(&world), None, "there is nothing more to ask");

    (0..5).for_each(|i| world.policy(&format!("b/p{i}"), asking(Allocate::Dedicated)));
    Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap()).rebalance = true;
    assert_eq!(asked(&mut world), "g3", "nor is it moved back");
}

#[test]
fn an_egress_ip_that_has_just_moved_stays_for_a_while() {
    let mut world = world();
    SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g1"]));
    assert_eq!(asked(&mut world), "g2");
    world.settle();
    world.allocate();
    let moved = world.now;
    SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g2"]));
    let outcome = world.allocate();
    assert_eq!((outcome.next_reports, requested(&world)), (Some(moved + 10), None));
    world.now += 10;
    assert_eq!(asked(&mut world), "g1");
}

#[test]
fn an_unreached_egress_ip_stays_if_no_other_node_is_reached_or_the_owner_may_be_uninformed() {
    let mut world = world();
    for (node, unreachable) in [("n1", ["g1", "g2"]), ("n2", ["g1", "g3"]), ("n3", ["g1", "g2"])] {
        world.does_not_reach(node, &unreachable);
    }
    assert_eq!((asked(&mut world).as_str(), requested(&world)), ("g1", None), "no node is reached by all");
    SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g1", "g2", "g3"]));
    assert_eq!((asked(&mut world).as_str(), requested(&world)), ("g1", None), "no node is reached");
    SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g1"]));
    let lost = |world: &mut World, node: &str, since| {
        Arc::make_mut(world.cluster.nodes.get_mut(node).unwrap()).lost_since = since;
    };
    lost(&mut world, "g1", Some(0));
    assert_eq!(asked(&mut world), "g1", "it may not hear of the move");
    lost(&mut world, "g1", None);
    misses(&mut world, "g2", &["g1"]);
    misses(&mut world, "g3", &["g1"]);
    assert_eq!(asked(&mut world), "g1", "the gateway nodes see to it by themselves");
    misses(&mut world, "g2", &[]);
    misses(&mut world, "g3", &[]);
    world.does_not_reach("n3", &[]);
    lost(&mut world, "n3", Some(0));
    assert_eq!(asked(&mut world), "g2", "neither n3's daemon nor its kubelet reports anything");
}

#[test]
fn unconfirmed_reports_move_nothing() {
    for silent in ["g1", "n2"] {
        let mut world = world();
        SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g1"]));
        world.allocate();
        for _ in 0..10 {
            let others: Vec<&str> = ALL.into_iter().filter(|node| *node != silent).collect();
            world.give_reports(&others);
            world.now += 2;
            let outcome = world.allocate();
            assert_eq!(outcome.node("a/p"), Some("g1"), "{silent} has not confirmed its report");
            assert!(outcome.next_reports > Some(world.now), "it asks again");
        }
    }
    let mut world = world();
    SOURCES.iter().for_each(|node| world.does_not_reach(node, &["g1"]));
    world.allocate();
    world.give_reports(&ALL);
    world.now += VALID_SECONDS + 1;
    assert_eq!(world.allocate().node("a/p"), Some("g1"), "the answers are old");
    assert_eq!(requested(&world), Some(world.now));
    world.now -= 3600;
    world.allocate();
    assert_eq!(requested(&world), Some(world.now), "the clock was set back");
    world.give_reports(&["g1", "g3", "n1", "n2", "n3"]);
    world.now += 2;
    assert_eq!(world.allocate().node("a/p"), Some("g3"), "g2 does not hear the controller");
}

/// An event in a cluster in which the API server is not always reached by all.
#[derive(Clone, Debug)]
enum Event {
    /// The link between a source node and a gateway node breaks, or is repaired.
    Flip(usize, usize),
    /// A gateway node takes the egress IP over, and nobody has received its report yet.
    Takeover(usize),
    /// A node's watch delivers what the controller has written.
    Hear(usize),
    /// A node's report arrives.
    Report(usize),
    /// The controller makes a pass.
    Pass,
    /// Some seconds pass.
    Tick(i64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..3usize, 0..2usize).prop_map(|(source, gateway)| Event::Flip(source, gateway)),
        1 => (0..3usize).prop_map(Event::Takeover),
        6 => (0..6usize).prop_map(Event::Hear),
        8 => (0..6usize).prop_map(Event::Report),
        8 => Just(Event::Pass),
        4 => (1..4i64).prop_map(Event::Tick),
    ]
}

/// The real state, which no node knows completely.
struct Truth {
    world: World,
    id: u16,
    holder: usize,
    taken: Option<(usize, i64)>,
    reaches: [[bool; 3]; 3],
    heard: [Option<i64>; 6],
    /// When a node last held the egress IP, and when a source node last reached or did not reach a gateway node.
    held: [i64; 3],
    reached: [[i64; 3]; 3],
    missed: [[i64; 3]; 3],
}

impl Truth {
    fn note(&mut self) {
        let now = self.world.now;
        self.held[self.holder] = now;
        for (source, reaches) in self.reaches.iter().enumerate() {
            for (gateway, reaches) in reaches.iter().enumerate() {
                let last = if *reaches { &mut self.reached } else { &mut self.missed };
                last[source][gateway] = now;
            }
        }
    }

    fn report(&mut self, node: usize) {
        if let Some(source) = node.checked_sub(3) {
            let unreachable = (0..3).filter(|gateway| !self.reaches[source][*gateway]).map(|gateway| GATEWAYS[gateway]);
            self.world.does_not_reach(ALL[node], &unreachable.collect::<Vec<_>>());
        }
        let status = Arc::make_mut(self.world.cluster.egress_nodes.entry(ALL[node].into()).or_default());
        let status = status.of_allocations_mut();
        status.held = if self.holder == node { vec![self.id] } else { Vec::new() };
        let taken = self.taken.filter(|(taker, _)| *taker == node);
        status.taken = taken.map(|(_, since)| TakenAllocation { id: self.id, since }).into_iter().collect();
        let given = self.heard[node];
        status.reports_given = given
            .map(|requested_at| crate::api::ReportGiven { gateway: "g".to_owned(), requested_at })
            .into_iter()
            .collect();
    }

    /// A move that the controller plans must have been right some seconds ago.
    fn pass(&mut self) -> Result<(), TestCaseError> {
        let before = self.world.cluster.gateways["g"].status.allocations[0].clone();
        let grant = self.world.allocate().grant("a/p").clone();
        let index = |name: &str| GATEWAYS.iter().position(|gateway| *gateway == name).unwrap();
        let (Some(from), Some(to)) = (grant.leaving.as_deref(), grant.node.as_deref()) else { return Ok(()) };
        if before.node.as_deref() == Some(to) {
            return Ok(());
        }
        let (from, to) = (index(from), index(to));
        let recent = |at: i64| self.world.now - at <= VALID_SECONDS;
        prop_assert!(recent(self.held[from]), "{from} did not hold it");
        for source in 0..3 {
            prop_assert!(recent(self.missed[source][from]), "{source} reached {from}");
            prop_assert!(recent(self.reached[source][to]), "{source} did not reach {to}");
        }
        // The new node takes it at once.
        (self.holder, self.taken) = (to, None);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn late_reports_cause_no_move_that_was_wrong_a_moment_ago(
        events in proptest::collection::vec(event(), 0..80),
    ) {
        let world = world();
        let id = world.cluster.gateways["g"].status.allocations[0].id;
        let mut truth = Truth {
            world, id, holder: 0, taken: None, reaches: [[false, true, true]; 3], heard: [None; 6],
            held: [i64::MIN / 2; 3], reached: [[i64::MIN / 2; 3]; 3], missed: [[i64::MIN / 2; 3]; 3],
        };
        truth.note();
        (0..6).for_each(|node| truth.report(node));
        for event in events {
            match event {
                Event::Flip(source, gateway) => truth.reaches[source][gateway] ^= true,
                Event::Takeover(gateway) => {
                    let since = truth.world.cluster.gateways["g"].status.allocations[0].since;
                    (truth.holder, truth.taken) = (gateway, Some((gateway, since)));
                }
                Event::Hear(node) => truth.heard[node] = requested(&truth.world),
                Event::Report(node) => truth.report(node),
                Event::Pass => truth.pass()?,
                Event::Tick(seconds) => truth.world.now += seconds,
            }
            truth.note();
        }
    }
}
