use super::*;
use crate::api::Allocate;
use crate::datapath::uplink::{Interface, Vrf};
use crate::fixture::{World, asking};
use std::sync::Arc;

const ADDRESS: &str = "192.0.2.50";
const OTHER_HOST: Mac = [2, 0, 0, 0, 0, 9];
const SETTINGS: LivenessSettings = LivenessSettings { interval: Duration::from_millis(300), misses: 3 };

/// The gateway node `n1`, which one allocation names.
struct Fixture {
    world: World,
    id: EgressId,
    facts: Facts,
    uplinks_now: UplinkStatus,
    holding: Holding,
    now: Instant,
}

fn interface(running: bool) -> Interface {
    let name = "eth0".to_owned();
    Interface { ifindex: 2, name, mac: Some([2; 6]), mtu: 1500, running, vrf: Vrf::None }
}

impl Fixture {
    /// Long after the daemon's start.
    fn new() -> Self {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", asking(Allocate::Dedicated));
        let grant = world.allocate().grant("a/p").clone();
        assert_eq!(grant.node.as_deref(), Some("n1"));
        let now = Instant::now();
        let mut fixture = Fixture {
            world,
            id: grant.id,
            facts: Facts::default(),
            uplinks_now: UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]),
            holding: Holding::new(SETTINGS, now),
            now: now + Duration::from_secs(60),
        };
        fixture.decide();
        fixture
    }

    fn view(&self) -> View {
        View::new(&self.world.cluster, "n1", &self.facts, &[], [])
    }

    /// Decides, and applies the desired addresses.
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

    fn take_probe_result(&mut self, answer: Option<Mac>) {
        let view = self.view();
        self.holding.probed(vec![(self.id, ADDRESS.parse().unwrap(), answer)], &view, &self.facts, self.now);
    }

    fn is_here(&self) -> bool {
        !self.facts.addresses.is_empty()
    }

    /// Probes, no host answers, and the address is added.
    fn take(&mut self) {
        self.take_probe_result(None);
        self.decide();
        assert!(self.is_here());
    }

    fn pass(&mut self, milliseconds: u64) {
        self.now += Duration::from_millis(milliseconds);
    }

    /// The allocation names the other node, which reports that it holds the egress IP.
    fn other_takes_it(&mut self) {
        let gateway = Arc::make_mut(self.world.cluster.gateways.get_mut("g").unwrap());
        gateway.status.allocations[0].node = Some("n2".into());
        gateway.status.allocations[0].since += 1;
        self.world.holds("n2", &[self.id]);
    }
}

#[test]
fn a_node_probes_an_egress_ip_before_it_adds_it() {
    let mut fixture = Fixture::new();
    assert!(!fixture.is_here());
    assert!(fixture.decide().ask.is_empty(), "a probe is in flight");
    fixture.take();
    assert!(fixture.decide().ask.is_empty());
    fixture.facts.addresses.clear();
    assert!(fixture.decide().desired.allocations.contains(&fixture.id), "removed by hand: no probe is needed again");
}

#[test]
fn an_egress_ip_in_conflict_is_not_added_until_no_host_answers() {
    let mut fixture = Fixture::new();
    fixture.take_probe_result(Some(OTHER_HOST));
    let decision = fixture.decide();
    assert!(!fixture.is_here() && decision.ask.is_empty() && decision.desired.health);
    assert!(fixture.facts.refused[&fixture.id].contains("02:00:00:00:00:09"));
    let again = fixture.holding.next().unwrap() - fixture.now;
    assert_eq!(again, AGAIN[0]);
    fixture.pass(250);
    assert!(fixture.decide().ask.contains(&fixture.id));
    fixture.pass(6000);
    fixture.take_probe_result(Some(OTHER_HOST));
    fixture.decide();
    assert_eq!(fixture.holding.next().unwrap() - fixture.now, AGAIN[1], "probes are rarer then");
    fixture.pass(2000);
    assert!(fixture.decide().ask.contains(&fixture.id));
    fixture.take();
    assert!(fixture.facts.refused.is_empty());
}

#[test]
fn an_egress_ip_that_another_node_holds_goes_after_the_grace_period() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.other_takes_it();
    fixture.decide();
    assert!(fixture.is_here(), "others may still send here");
    assert_eq!(fixture.holding.next().unwrap() - fixture.now, GRACE);
    fixture.pass(301);
    fixture.decide();
    assert!(!fixture.is_here());
    assert_eq!(fixture.holding.next(), None);
}

#[test]
fn an_egress_ip_stays_until_the_next_owner_holds_it() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.other_takes_it();
    fixture.world.holds("n2", &[]);
    fixture.decide();
    fixture.pass(60_000);
    fixture.decide();
    assert!(fixture.is_here());
}

#[test]
fn a_node_that_was_away_probes_its_egress_ips_and_gives_up_those_taken_over() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.holding.returned(fixture.now);
    assert!(fixture.decide().ask.contains(&fixture.id));
    assert!(fixture.is_here(), "while it asks");
    fixture.take_probe_result(Some(OTHER_HOST));
    let decision = fixture.decide();
    assert!(!fixture.is_here());
    assert!(!decision.desired.health, "a node that has not received the takeover's report must not send here");
    assert!(fixture.facts.relinquished.contains(&fixture.id));
    fixture.pass(250);
    assert!(fixture.decide().ask.contains(&fixture.id), "the other one may die");
    fixture.take_probe_result(Some(OTHER_HOST));
    fixture.other_takes_it();
    assert!(fixture.decide().desired.health, "the allocation has followed");
    assert!(fixture.facts.relinquished.is_empty());
}

#[test]
fn a_node_that_was_away_keeps_egress_ips_that_no_host_answers_for() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.holding.returned(fixture.now);
    fixture.decide();
    fixture.take_probe_result(None);
    assert!(fixture.decide().desired.health && fixture.is_here());
}

#[test]
fn without_an_uplink_a_node_gives_up_before_others_take_over_and_probes_before_it_takes_back() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    assert!(!fixture.decide().desired.health);
    assert!(fixture.is_here(), "it may be back at once");
    let gone = fixture.holding.next().unwrap();
    assert!(gone - fixture.now <= SETTINGS.safe_absence());
    fixture.now = gone;
    fixture.decide();
    assert!(!fixture.is_here());
    fixture.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]);
    let decision = fixture.decide();
    assert!(decision.ask.contains(&fixture.id) && !decision.desired.health && !fixture.is_here());
    fixture.take();
    assert!(fixture.decide().desired.health);
}

#[test]
fn a_short_loss_of_the_uplink_moves_nothing() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    fixture.decide();
    fixture.pass(100);
    fixture.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]);
    let decision = fixture.decide();
    assert!(fixture.is_here() && decision.desired.health && decision.ask.is_empty());
}

#[test]
fn a_planned_move_needs_no_probe_and_is_not_announced_at_once() {
    let mut fixture = Fixture::new();
    let gateway = Arc::make_mut(fixture.world.cluster.gateways.get_mut("g").unwrap());
    gateway.status.allocations[0].leaving = Some("n2".into());
    fixture.world.holds("n2", &[fixture.id]);
    let decision = fixture.decide();
    assert!(fixture.is_here() && decision.ask.is_empty());
    assert!(decision.desired.moving.contains(&fixture.id));
}

#[test]
fn a_starting_daemon_probes_its_egress_ips_and_gives_none_up_before_it_knows_which_nodes_live() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.other_takes_it();
    fixture.holding = Holding::new(SETTINGS, fixture.now);
    let decision = fixture.decide();
    assert!(decision.ask.contains(&fixture.id) && fixture.is_here());
    fixture.pass(400);
    fixture.decide();
    assert!(fixture.is_here(), "the other one is said to hold it, and may be dead");
    fixture.take_probe_result(Some(OTHER_HOST));
    fixture.decide();
    assert!(!fixture.is_here(), "it does hold it");
}

#[test]
fn a_drained_node_without_egress_ips_has_no_health_address() {
    let mut fixture = Fixture::new();
    fixture.take();
    let decide = |fixture: &mut Fixture| {
        fixture.holding.decide(&fixture.view(), &fixture.facts, &fixture.uplinks_now, true, fixture.now).desired.health
    };
    assert!(decide(&mut fixture));
    fixture.other_takes_it();
    fixture.decide();
    fixture.pass(301);
    fixture.decide();
    assert!(!decide(&mut fixture));
}

#[test]
fn an_egress_ip_whose_allocation_is_gone_goes_at_once() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.world.without_policy("a/p");
    fixture.world.allocate();
    fixture.decide();
    assert!(!fixture.is_here());
}

#[test]
fn allocations_that_no_node_has_held_before_are_new() {
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
    assert_eq!(asked(&world), (1, 0), "an allocation that exists at the start may be another node's");
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

/// A node that was cut off asked, and the one that had taken the allocation over answered; then the allocation is
/// moved back.
#[test]
fn a_node_that_answered_and_hands_the_egress_ip_over_is_no_conflict() {
    let mut fixture = Fixture::new();
    fixture.take_probe_result(Some(OTHER_HOST));
    fixture.decide();
    assert!(!fixture.is_here() && fixture.holding.refused().next().is_some());
    // n2 has it, and gives it to n1 on purpose.
    let id = fixture.id;
    fixture.world.holds("n2", &[id]);
    let gateway = fixture.world.cluster.gateways.get_mut("g").unwrap();
    let allocation =
        Arc::make_mut(gateway).status.allocations.iter_mut().find(|allocation| allocation.id == id).unwrap();
    (allocation.node, allocation.leaving) = (Some("n1".into()), Some("n2".into()));
    fixture.decide();
    assert!(fixture.is_here() && fixture.holding.refused().next().is_none());
    // An answer that is late is the old node's.
    fixture.take_probe_result(Some(OTHER_HOST));
    fixture.decide();
    assert!(fixture.is_here() && fixture.holding.refused().next().is_none());
}

/// The interface that a gateway names never came up, or no network of the node contains a pool's address.
#[test]
fn an_uplink_that_never_worked_affects_no_other() {
    let mut fixture = Fixture::new();
    fixture.take();
    let other: IpAddr = "198.51.100.1".parse().unwrap();
    let down = Interface { name: "eth1".into(), ..interface(false) };
    for broken in [UplinkStatus::of_named("eth1", &down, &[other]), UplinkStatus::none_for(&[other])] {
        fixture.uplinks_now = UplinkStatus::of(&interface(true), &[ADDRESS.parse().unwrap()]).and(broken);
        fixture.decide();
        fixture.pass(10_000);
        fixture.decide();
        assert!(fixture.is_here() && fixture.holding.is_fit());
    }
    // The only one there is.
    fixture.uplinks_now = UplinkStatus::of(&interface(false), &[ADDRESS.parse().unwrap()]);
    fixture.decide();
    assert!(!fixture.holding.is_fit());
}

/// An allocation with both families on a node that loses IPv6 while no other node has more.
#[test]
fn a_lost_family_of_a_pair_is_taken_back_without_a_pause_of_the_other() {
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
    // The desired addresses are applied.
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
    assert_eq!(facts.addresses, [v4].into(), "no node can serve both families");

    let back = decide(&mut holding, &mut facts, &both(), later);
    assert!(back.ask.contains(&id), "another node may have taken it meanwhile");
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

    // Another node can serve both families.
    facts.dead.clear();
    let much_later = later + Duration::from_secs(5);
    decide(&mut holding, &mut facts, &half(), much_later);
    assert!(facts.addresses.is_empty());
}

#[test]
fn a_claimed_egress_ip_is_given_up_and_not_probed_for_a_while() {
    let mut fixture = Fixture::new();
    fixture.take();
    fixture.holding.claimed(fixture.id, ADDRESS.parse().unwrap(), OTHER_HOST, fixture.now);
    assert!(!fixture.decide().desired.health && !fixture.is_here());
    fixture.pass(4000);
    assert!(fixture.decide().ask.is_empty(), "the other one may need a while to ask again");
    fixture.pass(3000);
    assert!(fixture.decide().ask.contains(&fixture.id), "and may have died");
    fixture.take();
}

#[test]
fn failing_probes_cost_a_node_its_egress_ips_only_if_another_node_can_serve_them() {
    let mut fixture = Fixture::new();
    fixture.world.gateway("g", &["192.0.2.50"], |spec| {
        spec.default = true;
        spec.probes = vec![crate::api::UplinkProbe { icmp: Some("192.0.2.1".to_owned()), tcp: None }];
    });
    fixture.take();
    let key = UplinkKey { interface: None, ipv4: true, gateway: Some("g".into()) };
    let lost = |lost: bool| {
        let lost = lost.then(|| (key.clone(), "no answer".to_owned()));
        ProbedUplinks { all: [key.clone()].into(), lost: lost.into_iter().collect() }
    };
    fixture.holding.set_probed(lost(false));
    assert!(fixture.decide().desired.uplinks.contains(&key));

    fixture.holding.set_probed(lost(true));
    let decision = fixture.decide();
    assert!(decision.desired.health && fixture.holding.is_fit(), "other nodes still reach it");
    assert!(!decision.desired.uplinks.contains(&key) && decision.desired.failed_probes.contains(&key));
    // The node n2 is dead, so that this one is still the best.
    fixture.facts.dead.insert("n2".into());
    fixture.holding.note(&"n1".into(), &mut fixture.facts);
    fixture.pass(5000);
    fixture.decide();
    assert!(fixture.is_here());

    fixture.facts.dead.clear();
    let end = crate::api::EgressNodeStatus {
        tunnel_address: Some([192, 0, 2, 12].into()),
        tunnel_mac: Some("02:00:00:00:00:02".to_owned()),
        ..Default::default()
    };
    fixture.world.cluster.egress_nodes.insert("n2".into(), Arc::new(end.into()));
    fixture.decide();
    assert!(!fixture.is_here(), "the node n2 lives, and its probes succeed");
    fixture.holding.set_probed(lost(false));
    fixture.holding.judge(&fixture.uplinks_now, None, fixture.now);
    assert_eq!(fixture.holding.lost().count(), 0);
}

mod routed;
