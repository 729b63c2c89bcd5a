use super::*;
use crate::api::Allocate;
use crate::datapath::uplink::Interface;
use crate::fixture::{World, asking};
use std::sync::Arc;

const ADDRESS: &str = "192.0.2.50";
const OTHER_HOST: Mac = [2, 0, 0, 0, 0, 9];
const SETTINGS: Settings = Settings { interval: Duration::from_millis(300), misses: 3 };

/// A gateway's node `n1`, to which the allocations give one allocation.
struct Scene {
    world: World,
    id: EgressId,
    facts: Facts,
    uplinks_now: UplinkStatus,
    holding: Holding,
    now: Instant,
}

fn interface(running: bool) -> Interface {
    let name = "eth0".to_owned();
    Interface { ifindex: 2, name, mac: Some([2; 6]), mtu: 1500, running }
}

impl Scene {
    /// Long after the daemon's start.
    fn new() -> Self {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", asking(Allocate::Dedicated));
        let grant = world.allocate().grant("a/p").clone();
        assert_eq!(grant.node.as_deref(), Some("n1"));
        let now = Instant::now();
        let mut scene = Scene {
            world,
            id: grant.id,
            facts: Facts::default(),
            uplinks_now: UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]),
            holding: Holding::new(SETTINGS, now),
            now: now + Duration::from_secs(60),
        };
        scene.decide();
        scene
    }

    fn view(&self) -> View {
        View::new(&self.world.cluster, "n1", &self.facts, &[], [])
    }

    /// Decides, and what is wished for happens.
    fn decide(&mut self) -> Decision {
        if self.holding.judge(&self.uplinks_now, None, self.now) {
            let own: crate::model::selector::Name = "n1".into();
            if self.holding.is_fit() {
                self.facts.dead.remove(&own)
            } else {
                self.facts.dead.insert(own)
            };
        }
        let decision = self.holding.decide(&self.view(), &self.facts, &self.uplinks_now, false, self.now);
        let address: IpAddr = ADDRESS.parse().unwrap();
        if decision.desired.allocations.contains(&self.id) {
            self.facts.addresses.insert(address);
        } else {
            self.facts.addresses.remove(&address);
        }
        self.facts.relinquished = self.holding.relinquished();
        self.facts.refused = self.holding.refused().collect();
        decision
    }

    fn hear(&mut self, answer: Option<Mac>) {
        let view = self.view();
        self.holding.probed(vec![(self.id, ADDRESS.parse().unwrap(), answer)], &view, &self.facts, self.now);
    }

    fn is_here(&self) -> bool {
        !self.facts.addresses.is_empty()
    }

    /// It asks, nobody answers, and the address comes.
    fn take(&mut self) {
        self.hear(None);
        self.decide();
        assert!(self.is_here());
    }

    fn pass(&mut self, milliseconds: u64) {
        self.now += Duration::from_millis(milliseconds);
    }

    /// The allocations give the allocation to the other node, which says that it holds it.
    fn other_takes_it(&mut self) {
        let gateway = Arc::make_mut(self.world.cluster.gateways.get_mut("g").unwrap());
        gateway.status.allocations[0].node = Some("n2".into());
        gateway.status.allocations[0].since += 1;
        self.world.holds("n2", &[self.id]);
    }
}

#[test]
fn it_asks_before_it_takes() {
    let mut scene = Scene::new();
    assert!(!scene.is_here());
    assert!(scene.decide().ask.is_empty(), "it has been asked already");
    scene.take();
    assert!(scene.decide().ask.is_empty());
    scene.facts.addresses.clear();
    assert!(scene.decide().desired.allocations.contains(&scene.id), "removed by hand: it need not ask again");
}

#[test]
fn what_another_host_has_it_does_not_take_until_nobody_answers() {
    let mut scene = Scene::new();
    scene.hear(Some(OTHER_HOST));
    let decision = scene.decide();
    assert!(!scene.is_here() && decision.ask.is_empty() && decision.desired.health);
    assert!(scene.facts.refused[&scene.id].contains("02:00:00:00:00:09"));
    let again = scene.holding.next().unwrap() - scene.now;
    assert_eq!(again, AGAIN[0]);
    scene.pass(250);
    assert!(scene.decide().ask.contains(&scene.id));
    scene.pass(6000);
    scene.hear(Some(OTHER_HOST));
    scene.decide();
    assert_eq!(scene.holding.next().unwrap() - scene.now, AGAIN[1], "it asks less often then");
    scene.pass(2000);
    assert!(scene.decide().ask.contains(&scene.id));
    scene.take();
    assert!(scene.facts.refused.is_empty());
}

#[test]
fn what_another_node_has_goes_after_a_while() {
    let mut scene = Scene::new();
    scene.take();
    scene.other_takes_it();
    scene.decide();
    assert!(scene.is_here(), "others may still send here");
    assert_eq!(scene.holding.next().unwrap() - scene.now, GRACE);
    scene.pass(301);
    scene.decide();
    assert!(!scene.is_here());
    assert_eq!(scene.holding.next(), None);
}

#[test]
fn what_another_node_is_to_have_and_has_not_stays() {
    let mut scene = Scene::new();
    scene.take();
    scene.other_takes_it();
    scene.world.holds("n2", &[]);
    scene.decide();
    scene.pass(60_000);
    scene.decide();
    assert!(scene.is_here());
}

#[test]
fn who_was_away_asks_for_what_it_has_and_gives_up_what_others_took() {
    let mut scene = Scene::new();
    scene.take();
    scene.holding.returned();
    assert!(scene.decide().ask.contains(&scene.id));
    assert!(scene.is_here(), "while it asks");
    scene.hear(Some(OTHER_HOST));
    let decision = scene.decide();
    assert!(!scene.is_here());
    assert!(!decision.desired.health, "who cannot hear of the takeover shall not send here");
    assert!(scene.facts.relinquished.contains(&scene.id));
    scene.pass(250);
    assert!(scene.decide().ask.contains(&scene.id), "the other one may die");
    scene.hear(Some(OTHER_HOST));
    scene.other_takes_it();
    assert!(scene.decide().desired.health, "the allocations has followed");
    assert!(scene.facts.relinquished.is_empty());
}

#[test]
fn who_was_away_keeps_what_nobody_took() {
    let mut scene = Scene::new();
    scene.take();
    scene.holding.returned();
    scene.decide();
    scene.hear(None);
    assert!(scene.decide().desired.health && scene.is_here());
}

#[test]
fn without_an_uplink_it_gives_all_up_before_others_take_it_and_asks_before_it_takes_it_back() {
    let mut scene = Scene::new();
    scene.take();
    scene.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    assert!(!scene.decide().desired.health);
    assert!(scene.is_here(), "it may be back at once");
    let gone = scene.holding.next().unwrap();
    assert!(gone - scene.now <= SETTINGS.safe_absence());
    scene.now = gone;
    scene.decide();
    assert!(!scene.is_here());
    scene.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]);
    let decision = scene.decide();
    assert!(decision.ask.contains(&scene.id) && !decision.desired.health && !scene.is_here());
    scene.take();
    assert!(scene.decide().desired.health);
}

#[test]
fn a_short_loss_of_the_uplink_moves_nothing() {
    let mut scene = Scene::new();
    scene.take();
    scene.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    scene.decide();
    scene.pass(100);
    scene.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]);
    let decision = scene.decide();
    assert!(scene.is_here() && decision.desired.health && decision.ask.is_empty());
}

#[test]
fn an_allocation_that_is_moved_on_purpose_comes_without_a_question_and_is_not_announced_at_once() {
    let mut scene = Scene::new();
    let gateway = Arc::make_mut(scene.world.cluster.gateways.get_mut("g").unwrap());
    gateway.status.allocations[0].leaving = Some("n2".into());
    scene.world.holds("n2", &[scene.id]);
    let decision = scene.decide();
    assert!(scene.is_here() && decision.ask.is_empty());
    assert!(decision.desired.moving.contains(&scene.id));
}

#[test]
fn a_daemon_that_starts_asks_for_what_is_here_and_lets_nothing_go_before_it_knows_who_lives() {
    let mut scene = Scene::new();
    scene.take();
    scene.other_takes_it();
    scene.holding = Holding::new(SETTINGS, scene.now);
    let decision = scene.decide();
    assert!(decision.ask.contains(&scene.id) && scene.is_here());
    scene.pass(400);
    scene.decide();
    assert!(scene.is_here(), "the other one is said to hold it, and may be dead");
    scene.hear(Some(OTHER_HOST));
    scene.decide();
    assert!(!scene.is_here(), "it does hold it");
}

#[test]
fn a_drained_node_that_has_nothing_left_says_that_it_is_not_fit() {
    let mut scene = Scene::new();
    scene.take();
    let decide = |scene: &mut Scene| {
        scene.holding.decide(&scene.view(), &scene.facts, &scene.uplinks_now, true, scene.now).desired.health
    };
    assert!(decide(&mut scene));
    scene.other_takes_it();
    scene.decide();
    scene.pass(301);
    scene.decide();
    assert!(!decide(&mut scene));
}

#[test]
fn an_allocation_that_is_no_more_goes_at_once() {
    let mut scene = Scene::new();
    scene.take();
    scene.world.without_policy("a/p");
    scene.world.allocate();
    scene.decide();
    assert!(!scene.is_here());
}

#[test]
fn what_no_node_has_had_before_is_told_apart() {
    let mut world = World::new(&["192.0.2.50-192.0.2.52"]);
    let addresses = [50, 51, 52].map(|last| IpAddr::from([192, 0, 2, last]));
    let uplinks_now = UplinkStatus::of(&interface(true), &addresses);
    let now = Instant::now();
    let mut holding = Holding::new(SETTINGS, now);
    let mut asked = |world: &World| {
        let view = View::new(&world.cluster, "n1", &Facts::default(), &[], []);
        let decision = holding.decide(&view, &Facts::default(), &uplinks_now, false, now + Duration::from_secs(60));
        (decision.ask.len(), decision.new.len())
    };
    let give = |world: &mut World, policy: &str, node: &str| {
        let gateway = Arc::make_mut(world.cluster.gateways.get_mut("g").unwrap());
        let allocation = gateway
            .status
            .allocations
            .iter_mut()
            .find(|allocation| allocation.policies[..] == [policy.into()])
            .unwrap();
        allocation.node = Some(node.into());
        allocation.since += 1;
    };
    world.policy("a/p", asking(Allocate::Dedicated));
    world.allocate();
    give(&mut world, "a/p", "n1");
    assert_eq!(asked(&world), (1, 0), "what there is at the start may be another's");
    world.policy("a/q", asking(Allocate::Dedicated));
    world.allocate();
    give(&mut world, "a/q", "n1");
    assert_eq!(asked(&world), (1, 1));
    world.policy("a/r", asking(Allocate::Dedicated));
    world.allocate();
    give(&mut world, "a/r", "n2");
    assert_eq!(asked(&world), (0, 0));
    give(&mut world, "a/r", "n1");
    assert_eq!(asked(&world), (1, 0), "it was another node's");
}

/// A node that was cut off asked, and the one that had taken the allocation over answered; then the allocation is moved back.
#[test]
fn who_answered_and_hands_it_over_keeps_it_from_nobody() {
    let mut scene = Scene::new();
    scene.hear(Some(OTHER_HOST));
    scene.decide();
    assert!(!scene.is_here() && scene.holding.refused().next().is_some());
    // n2 has it, and gives it to n1 on purpose.
    let id = scene.id;
    scene.world.holds("n2", &[id]);
    let gateway = scene.world.cluster.gateways.get_mut("g").unwrap();
    let allocation =
        Arc::make_mut(gateway).status.allocations.iter_mut().find(|allocation| allocation.id == id).unwrap();
    (allocation.node, allocation.leaving) = (Some("n1".into()), Some("n2".into()));
    scene.decide();
    assert!(scene.is_here() && scene.holding.refused().next().is_none());
    // An answer that is late is the old node's.
    scene.hear(Some(OTHER_HOST));
    scene.decide();
    assert!(scene.is_here() && scene.holding.refused().next().is_none());
}

/// Of a gateway with its own interface that never came up; or of a pool that no network of the node's holds.
#[test]
fn a_way_out_that_never_worked_takes_nothing_from_the_others() {
    let mut scene = Scene::new();
    scene.take();
    let other: IpAddr = "198.51.100.1".parse().unwrap();
    let down = Interface { name: "eth1".into(), ..interface(false) };
    for broken in [UplinkStatus::of_named("eth1", &down, &[other]), UplinkStatus::none_for(&[other])] {
        scene.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]).and(broken);
        scene.decide();
        scene.pass(10_000);
        scene.decide();
        assert!(scene.is_here() && scene.holding.is_fit());
    }
    // The only one there is.
    scene.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    scene.decide();
    assert!(!scene.holding.is_fit());
}

/// An allocation with both families on a node that loses IPv6 while no other node has more.
#[test]
fn what_is_lost_of_a_pair_is_taken_back_without_a_pause_of_the_rest() {
    let [v4, v6]: [IpAddr; 2] = [ADDRESS.parse().unwrap(), "2001:db8::50".parse().unwrap()];
    let mut world = World::new(&["192.0.2.50", "2001:db8::50"]);
    world.policy("a/p", asking(Allocate::Dedicated));
    let id = world.allocate().grant("a/p").id;
    let other = Arc::make_mut(world.cluster.egress_nodes.entry("n2".into()).or_default());
    (other.tunnel_mac, other.tunnel_address) = (Some([2, 0, 0, 0, 0, 2]), Some([10, 0, 0, 2].into()));
    let both = || UplinkStatus::of(&interface(true), &[v4, v6]);
    let half = || UplinkStatus::of(&interface(true), &[v4]).and(UplinkStatus::none_for(&[v6]));
    let now = Instant::now() + Duration::from_secs(60);
    let mut holding = Holding::new(SETTINGS, now - Duration::from_secs(60));
    let mut facts = Facts::default();
    // What is wished for happens.
    let decide = |holding: &mut Holding, facts: &mut Facts, uplinks_now: &UplinkStatus, now: Instant| {
        holding.judge(uplinks_now, None, now);
        facts.lost.clear();
        holding.note(&"n1".into(), facts);
        let view = View::new(&world.cluster, "n1", facts, &[], []);
        let decision = holding.decide(&view, facts, uplinks_now, false, now);
        facts.partial.clone_from(&decision.partial);
        let allocation = &view.allocations.allocations[&id];
        let here = |a: &IpAddr| uplinks_now.is_usable(*a, allocation) && !decision.desired.unasked.contains(a);
        facts.addresses =
            addresses(allocation).filter(|a| decision.desired.allocations.contains(&id) && here(a)).collect();
        decision
    };
    let hear = |holding: &mut Holding, facts: &Facts, of: &[IpAddr], now: Instant| {
        let view = View::new(&world.cluster, "n1", facts, &[], []);
        holding.probed(of.iter().map(|a| (id, *a, None)).collect(), &view, facts, now);
    };
    assert!(decide(&mut holding, &mut facts, &both(), now).ask.contains(&id));
    hear(&mut holding, &facts, &[v4, v6], now);
    decide(&mut holding, &mut facts, &both(), now);
    assert_eq!(facts.addresses, [v4, v6].into());

    let later = now + Duration::from_secs(5);
    let lost = decide(&mut holding, &mut facts, &half(), now);
    assert!(lost.desired.health && holding.is_fit() && lost.ask.is_empty());
    assert_eq!(lost.desired.uplinks.iter().map(ToString::to_string).collect::<Vec<_>>(), ["IPv4"]);
    let others: BTreeSet<Name> = ["n2".into()].into();
    facts.dead = others;
    decide(&mut holding, &mut facts, &half(), later);
    assert_eq!(facts.addresses, [v4].into(), "nobody can do better");

    let back = decide(&mut holding, &mut facts, &both(), later);
    assert!(back.ask.contains(&id), "somebody may have taken it meanwhile");
    assert_eq!(facts.addresses, [v4].into());
    hear(&mut holding, &facts, &[v4, v6], later);
    let back = decide(&mut holding, &mut facts, &both(), later);
    assert_eq!(facts.addresses, [v4, v6].into());
    assert!(back.desired.uplinks.len() == 2);
    assert!(decide(&mut holding, &mut facts, &both(), later).partial.is_empty());

    // Another daemon, while it is lost.
    decide(&mut holding, &mut facts, &half(), later);
    let mut holding = Holding::new(SETTINGS, later);
    facts.partial.clear();
    decide(&mut holding, &mut facts, &half(), later);
    assert_eq!(facts.addresses, [v4].into());

    // Another node can do better.
    facts.dead.clear();
    let much_later = later + Duration::from_secs(5);
    decide(&mut holding, &mut facts, &half(), much_later);
    assert!(facts.addresses.is_empty());
}

#[test]
fn what_another_node_claims_is_given_up_and_left_to_it_for_a_while() {
    let mut scene = Scene::new();
    scene.take();
    scene.holding.claimed(scene.id, ADDRESS.parse().unwrap(), OTHER_HOST, scene.now);
    assert!(!scene.decide().desired.health && !scene.is_here());
    scene.pass(4000);
    assert!(scene.decide().ask.is_empty(), "the other one may need a while to ask again");
    scene.pass(3000);
    assert!(scene.decide().ask.contains(&scene.id), "and may have died");
    scene.take();
}
