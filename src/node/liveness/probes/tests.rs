use super::*;
use crate::model::selector::Name;

const INTERVAL: Duration = Duration::from_millis(300);
const HOUR: Duration = Duration::from_secs(3600);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The path to all nodes and back.
#[derive(Clone, Copy)]
struct NodePath {
    round_trip: Duration,
    /// By how much a round trip is shorter or longer, as a fraction.
    jitter: f64,
    /// The probability of a loss in each direction.
    loss: f64,
}

const SHORT: NodePath = NodePath { round_trip: Duration::from_micros(200), jitter: 0.0, loss: 0.0 };

/// Nodes, the path to them, and a clock.
struct World {
    probes: Probes<Name>,
    now: Instant,
    path: NodePath,
    /// Replies in flight, by the time at which they arrive.
    answers: BTreeMap<Instant, Vec<(Ipv6Addr, u16)>>,
    random: u64,
    /// How often a node was found dead.
    deaths: u32,
    asked: u32,
}

fn address(n: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, n as u16)
}

fn names(nodes: usize) -> BTreeMap<Name, Ipv6Addr> {
    (0..nodes).map(|n| (format!("n{n}").into(), address(n))).collect()
}

impl World {
    fn new(nodes: usize, path: NodePath) -> Self {
        let now = Instant::now();
        let mut probes = Probes::new(LivenessSettings { interval: INTERVAL, misses: 3 });
        probes.set_nodes(&names(nodes), now);
        World { probes, now, path, answers: BTreeMap::new(), random: 1, deaths: 0, asked: 0 }
    }

    /// A number between 0 and 1, evenly distributed (SplitMix64).
    fn random(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn ask(&mut self, to: Ipv6Addr, sequence: u16, answering: &[usize]) {
        self.asked += 1;
        let NodePath { round_trip, jitter, loss } = self.path;
        let lost = self.random() < loss || self.random() < loss;
        let arrives = self.now + round_trip.mul_f64(1.0 + jitter * (2.0 * self.random() - 1.0));
        if !lost && answering.iter().any(|n| address(*n) == to) {
            self.answers.entry(arrives).or_default().push((to, sequence));
        }
    }

    /// Lets time pass. The nodes in `answering` reply to probes meanwhile.
    fn pass(&mut self, time: Duration, answering: &[usize]) {
        let end = self.now + time;
        loop {
            while let Some(first) = self.answers.first_entry().filter(|first| *first.key() <= self.now) {
                for (from, sequence) in first.remove() {
                    self.probes.answered(from, sequence, self.now);
                }
            }
            let before = self.dead().len();
            self.probes.judge(self.now);
            self.deaths += u32::try_from(self.dead().len().saturating_sub(before)).unwrap();
            for (to, sequence) in self.probes.due(self.now) {
                self.ask(to, sequence, answering);
            }
            let next = self.probes.next().into_iter().chain(self.answers.keys().next().copied()).min();
            match next.filter(|next| *next <= end) {
                Some(next) => self.now = next.max(self.now),
                None => break,
            }
        }
        self.now = end;
    }

    fn dead(&self) -> Vec<String> {
        self.probes.dead().iter().map(ToString::to_string).collect()
    }

    /// The time until the first node is found dead, or alive.
    fn until(&mut self, dead: bool, answering: &[usize]) -> Duration {
        let begin = self.now;
        while self.dead().contains(&"n0".to_owned()) != dead {
            self.pass(ms(1), answering);
            assert!(self.now - begin < Duration::from_secs(60), "never");
        }
        self.now - begin
    }
}

#[test]
fn no_node_is_found_dead_in_an_hour_over_a_long_path_with_jitter_and_loss() {
    for (round_trip, seed) in [200, 400].into_iter().flat_map(|rt| (1..=5).map(move |seed| (rt, seed))) {
        let path = NodePath { round_trip: ms(round_trip), jitter: 0.5, loss: 0.05 };
        let mut world = World { random: seed, ..World::new(2, path) };
        world.pass(HOUR, &[0, 1]);
        assert_eq!(world.deaths, 0, "round trip {round_trip} ms, seed {seed}");
        let usual = 2 * HOUR.as_millis() / INTERVAL.as_millis();
        assert!(u128::from(world.asked) < 2 * usual, "{} probes, {usual} without loss", world.asked);
    }
}

#[test]
fn no_node_is_found_dead_in_an_hour_if_a_fifth_of_all_round_trips_is_lost() {
    let mut world = World::new(2, NodePath { loss: 0.105, ..SHORT });
    world.pass(HOUR, &[0, 1]);
    assert_eq!(world.deaths, 0);
}

#[test]
fn no_node_is_found_dead_in_an_hour_over_a_line_that_loses_a_fifth_in_each_direction() {
    for (round_trip, seed) in [0, 60, 400].into_iter().flat_map(|rt| (1..=3).map(move |seed| (rt, seed))) {
        let path = NodePath { round_trip: ms(round_trip), jitter: 0.1, loss: 0.2 };
        let mut world = World { random: seed, ..World::new(2, path) };
        // The loss becomes known by the first probes.
        world.pass(ms(30_000), &[0, 1]);
        world.deaths = 0;
        world.pass(HOUR, &[0, 1]);
        assert_eq!(world.deaths, 0, "round trip {round_trip} ms, seed {seed}");
    }
}

#[test]
fn a_death_over_a_line_that_loses_a_fifth_in_each_direction_is_detected_in_time() {
    let (mut longest, mut back) = (Duration::ZERO, Duration::ZERO);
    for seed in 1..=100 {
        let path = NodePath { loss: 0.2, ..SHORT };
        let mut world = World { random: seed, ..World::new(2, path) };
        world.pass(ms(30_000 + 3 * seed), &[0, 1]);
        longest = longest.max(world.until(true, &[1]));
        world.pass(ms(5000), &[1]);
        back = back.max(world.until(false, &[0, 1]));
    }
    println!("found dead after at most {longest:?}, alive after at most {back:?}");
    assert!(longest < ms(1500), "{longest:?}");
    // It must answer most probes for half a second, and a third of them is lost.
    assert!(back < ms(8000), "{back:?}");
}

/// What happens on a line that loses nothing is no loss of the line.
#[test]
fn deaths_do_not_make_the_next_one_slower() {
    let mut world = World::new(2, SHORT);
    for _ in 0..20 {
        world.pass(ms(3000), &[0, 1]);
        let took = world.until(true, &[1]);
        assert!(took < ms(700), "{took:?}");
    }
}

#[test]
fn after_a_break_a_node_is_alive_within_two_seconds_at_any_round_trip() {
    for (round_trip, jitter, loss) in
        [(0, 0.0, 0.0), (40, 0.0, 0.0), (100, 0.0, 0.0), (100, 0.5, 0.05), (200, 0.5, 0.05), (400, 0.5, 0.05)]
    {
        let mut longest = Duration::ZERO;
        for seed in 1..=50 {
            let mut world = World::new(2, NodePath { round_trip: ms(round_trip), jitter, loss });
            world.random = seed;
            world.pass(ms(10_000 + 7 * seed), &[0, 1]);
            world.pass(ms(4000), &[1]);
            assert_eq!(world.dead(), ["n0"], "round trip {round_trip} ms");
            longest = longest.max(world.until(false, &[0, 1]));
        }
        println!("round trip {round_trip} ms: alive at most {longest:?} after the break");
        assert!(longest < ms(2000), "round trip {round_trip} ms: {longest:?}");
    }
}

#[test]
fn a_dead_node_is_detected_within_a_second_at_a_short_round_trip() {
    for (loss, most) in [(0.0, 700), (0.05, 900)] {
        for seed in 1..=100 {
            let mut world = World { random: seed, ..World::new(2, NodePath { loss, ..SHORT }) };
            world.pass(ms(5000 + 3 * seed), &[0, 1]);
            let took = world.until(true, &[1]);
            assert!(took < ms(most), "{took:?}");
            assert!(took > world.probes.settings.safe_absence(), "{took:?}");
        }
    }
}

#[test]
fn the_time_to_detect_a_dead_node_follows_the_round_trip() {
    for (round_trip, most) in [(1, 700), (100, 900), (400, 1700)] {
        let mut world = World::new(2, NodePath { round_trip: ms(round_trip), ..SHORT });
        world.pass(ms(30_000), &[0, 1]);
        let took = world.until(true, &[1]);
        println!("round trip {round_trip} ms: found dead after {took:?}");
        assert!(took < ms(most), "round trip {round_trip} ms: {took:?}");
    }
}

#[test]
fn short_breaks_do_not_make_a_node_dead() {
    let mut world = World::new(2, SHORT);
    world.pass(INTERVAL * 3, &[0, 1]);
    for _ in 0..3 {
        world.pass(INTERVAL, &[0]);
        assert!(world.dead().is_empty());
        world.pass(INTERVAL * 2, &[0, 1]);
    }
    world.pass(INTERVAL * 2 + INTERVAL / 3, &[0]);
    assert_eq!(world.dead(), ["n1"]);
}

#[test]
fn a_dead_node_is_alive_after_half_a_second_of_replies() {
    let mut world = World::new(2, SHORT);
    world.pass(INTERVAL * 4, &[0]);
    world.pass(PROBATION - ms(1), &[0, 1]);
    assert_eq!(world.dead(), ["n1"]);
    world.pass(INTERVAL * 3, &[0]);
    world.pass(PROBATION - ms(1), &[0, 1]);
    assert_eq!(world.dead(), ["n1"], "it missed probes, so the time starts again");
    world.pass(INTERVAL, &[0, 1]);
    assert!(world.dead().is_empty());
}

#[test]
fn a_dead_node_that_replies_to_every_third_probe_stays_dead() {
    let mut world = World::new(2, SHORT);
    world.pass(INTERVAL * 4, &[0]);
    for probe in 0..1000 {
        let next = world.probes.next().unwrap();
        world.pass(next - world.now, if probe % 3 == 0 { &[0, 1] } else { &[0] });
        assert_eq!(world.dead(), ["n1"]);
    }
}

#[test]
fn the_first_node_that_replies_is_alive_at_once_if_all_were_dead() {
    let mut world = World::new(2, SHORT);
    world.pass(INTERVAL * 4, &[]);
    assert_eq!(world.dead().len(), 2);
    world.pass(INTERVAL, &[1]);
    assert_eq!(world.dead(), ["n0"]);
    world.pass(INTERVAL, &[0, 1]);
    assert_eq!(world.dead(), ["n0"]);
}

#[test]
fn a_busy_daemon_finds_no_node_dead() {
    let mut world = World::new(1, SHORT);
    let asked = world.probes.due(world.now);
    let arrived = world.now + ms(1);
    world.now += INTERVAL * 20;
    // The replies that arrived meanwhile are taken before the judgement.
    world.probes.answered(asked[0].0, asked[0].1, arrived);
    world.probes.judge(world.now);
    assert!(world.dead().is_empty());
    assert!(!world.probes.take_stall());
    world.pass(INTERVAL, &[0]);
    assert!(world.probes.take_stall(), "it may have been frozen");
    world.pass(INTERVAL * 3, &[0]);
    assert!(!world.probes.take_stall());
    let took = world.until(true, &[]);
    assert!(took < ms(700), "the round trip is as short as before: {took:?}");
}

#[test]
fn a_reply_to_a_very_old_probe_is_ignored() {
    let mut world = World::new(1, SHORT);
    let old = world.probes.due(world.now)[0];
    world.pass(INTERVAL * 70, &[]);
    assert_eq!(world.dead().len(), 1);
    world.probes.answered(old.0, old.1, world.now);
    assert_eq!(world.dead().len(), 1);
}

#[test]
fn a_node_that_is_removed_and_added_again_counts_as_alive() {
    let mut world = World::new(1, SHORT);
    world.pass(INTERVAL * 4, &[]);
    world.probes.set_nodes(&BTreeMap::new(), world.now);
    assert!(world.dead().is_empty() && world.probes.next().is_none());
    world.now += INTERVAL * 50;
    world.probes.set_nodes(&names(1), world.now);
    world.pass(INTERVAL / 2, &[]);
    assert!(world.dead().is_empty() && !world.probes.take_stall());
}

#[test]
fn replies_out_of_order_count_for_their_own_probes() {
    let mut world = World::new(1, SHORT);
    world.pass(INTERVAL * 3, &[]);
    assert_eq!(world.dead().len(), 1);
    // It is not the only node, so it does not count as alive at once.
    world.probes.set_nodes(&names(2), world.now);
    let mut ask = || {
        world.now += INTERVAL;
        world.probes.judge(world.now);
        world.probes.due(world.now).into_iter().find(|(to, _)| *to == address(0)).expect("it is due")
    };
    let asked = [ask(), ask()];
    // Both replies are late, and that to the first probe arrives first.
    world.now += INTERVAL * 2;
    world.probes.judge(world.now);
    for (from, sequence) in asked {
        world.probes.answered(from, sequence, world.now);
    }
    let returning = world.probes.nodes["n0"].returning.expect("it answers again");
    assert_eq!((returning.answered, returning.missed), (2, 0));
}

/// A node that is probed only in doubt.
#[test]
fn an_unproven_node_is_alive_with_its_first_reply_unless_it_was_given_up() {
    let now = Instant::now();
    let unproven = |given_up: bool| {
        let mut probes = Probes::unproven(LivenessSettings { interval: INTERVAL, misses: 3 });
        probes.set_nodes(&names(2), now);
        let node: Name = "n0".into();
        assert!(!probes.is_alive(&node));
        if given_up {
            probes.give_up(&node);
            probes.give_up(&"n1".into());
        }
        World { probes, now, path: SHORT, answers: BTreeMap::new(), random: 1, deaths: 0, asked: 0 }
    };
    let mut world = unproven(false);
    assert!(world.until(false, &[0]) <= ms(1));
    assert_eq!(world.dead(), ["n1"]);
    let mut world = unproven(false);
    world.pass(ms(1), &[1]);
    world.probes.give_up(&"n0".into());
    assert!(
        world.until(false, &[0, 1]) >= PROBATION,
        "a node that was frozen detects first which egress IPs others took over"
    );
}

#[test]
fn a_node_that_misses_a_probe_is_in_doubt_long_before_it_counts_as_dead() {
    let mut world = World::new(1, SHORT);
    world.pass(ms(1000), &[0]);
    assert_eq!(world.probes.in_doubt().count(), 0);
    let begin = world.now;
    while world.probes.in_doubt().count() == 0 {
        world.pass(ms(1), &[]);
    }
    let doubt = world.now - begin;
    let dead = world.until(true, &[]);
    assert!(doubt <= ms(361) && dead >= ms(250), "{doubt:?}, then {dead:?}");
}
