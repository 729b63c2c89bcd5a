use super::*;
use proptest::prelude::*;

const SETTINGS: ProbeSettings = ProbeSettings { interval: Duration::from_secs(1), misses: 3 };
const STEP: Duration = Duration::from_millis(20);

fn mac(node: usize) -> Mac {
    [2, 0, 0, 0, 0, node as u8]
}

/// Nodes that probe the same target over lines of their own, and ask each other as the task does.
struct World {
    judges: Vec<Judge>,
    /// Answers on their way: when they arrive, at which node, and when the probe was sent.
    coming: Vec<(Instant, usize, Instant)>,
    asked: Vec<Instant>,
    begin: Instant,
    now: Instant,
    random: u64,
    round_trip: Duration,
    /// The share of probes without an answer, in percent.
    loss: u64,
    /// Whether a node has found its uplink lost at any time.
    was_lost: Vec<bool>,
}

impl World {
    fn new(nodes: usize, settings: ProbeSettings, seed: u64) -> Self {
        let now = Instant::now();
        World {
            judges: (0..nodes).map(|_| Judge::new(settings, 1, false, now)).collect(),
            coming: Vec::new(),
            asked: vec![now; nodes],
            begin: now,
            now,
            random: seed | 1,
            round_trip: Duration::from_millis(30),
            loss: 0,
            was_lost: vec![false; nodes],
        }
    }

    /// xorshift64 (Marsaglia 2003).
    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Lets time pass. `answers` says whether the target answers a node's probe that is sent now.
    fn pass(&mut self, time: Duration, answers: impl Fn(usize, Duration) -> bool) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            for node in 0..self.judges.len() {
                self.step(node, &answers);
            }
        }
    }

    fn step(&mut self, node: usize, answers: &impl Fn(usize, Duration) -> bool) {
        let now = self.now;
        for (_, _, sent) in self.coming.extract_if(.., |(at, of, _)| *of == node && *at <= now) {
            self.judges[node].answered(sent);
        }
        self.judges[node].judge(now);
        self.was_lost[node] |= self.judges[node].state() == ProbeState::Lost;
        for _ in self.judges[node].due(now) {
            if self.draw(100) >= self.loss && answers(node, now - self.begin) {
                self.coming.push((now + self.round_trip, node, now));
            }
        }
        if self.judges[node].asks() && self.asked[node] + SETTINGS.interval / 2 <= now {
            self.asked[node] = now;
            for peer in (0..self.judges.len()).filter(|peer| *peer != node) {
                if let Some(at) = self.judges[peer].success() {
                    self.judges[node].proven(mac(peer), at);
                }
            }
        }
    }

    fn states(&self) -> Vec<ProbeState> {
        self.judges.iter().map(Judge::state).collect()
    }
}

#[test]
fn a_node_that_fails_while_another_succeeds_loses_its_uplink_and_gets_it_back_after_a_longer_run() {
    let mut world = World::new(2, SETTINGS, 1);
    world.pass(Duration::from_secs(10), |_, _| true);
    assert_eq!(world.states(), [ProbeState::Succeeds; 2]);
    let mut after = Duration::ZERO;
    while world.judges[0].state() != ProbeState::Lost {
        world.pass(STEP, |node, _| node != 0);
        after += STEP;
        assert!(after < Duration::from_secs(30), "{:?}", world.states());
    }
    println!("lost after {after:?}");
    assert!((Duration::from_secs(7)..Duration::from_secs(10)).contains(&after), "{after:?}");
    world.pass(Duration::from_secs(60), |node, _| node != 0);
    assert_eq!(world.states(), [ProbeState::Lost, ProbeState::Succeeds]);

    // Single answers do not end a loss.
    world.pass(Duration::from_secs(60), |node, at| node != 0 || at.as_secs().is_multiple_of(10));
    assert_eq!(world.states(), [ProbeState::Lost, ProbeState::Succeeds]);
    world.pass(Duration::from_secs(20), |node, _| node != 0);
    world.pass(Duration::from_secs(8), |_, _| true);
    assert_eq!(world.states(), [ProbeState::Lost, ProbeState::Succeeds]);
    world.pass(Duration::from_secs(4), |_, _| true);
    assert_eq!(world.states(), [ProbeState::Succeeds; 2]);
}

#[test]
fn what_no_node_reaches_is_lost_by_none_whenever_each_notices() {
    for seed in 1..200 {
        let mut world = World::new(3, SETTINGS, seed);
        let dead = Duration::from_millis(10_000 + 37 * seed);
        world.pass(Duration::from_secs(60), |_, at| at < dead);
        assert_eq!(world.states(), [ProbeState::Fails; 3]);
        // It comes back, and each node has an answer at another time.
        world.pass(Duration::from_secs(20), |_, _| true);
        assert_eq!(world.states(), [ProbeState::Succeeds; 3]);
        assert_eq!(world.was_lost, [false; 3], "seed {seed}");
    }
}

#[test]
fn of_two_that_fail_together_both_give_way_to_a_third_and_neither_to_the_other() {
    let mut world = World::new(3, SETTINGS, 5);
    world.pass(Duration::from_secs(10), |_, _| true);
    world.pass(Duration::from_secs(20), |node, _| node == 2);
    assert_eq!(world.states(), [ProbeState::Lost, ProbeState::Lost, ProbeState::Succeeds]);
    // The third one has nobody to give way to.
    world.pass(Duration::from_secs(30), |_, _| false);
    assert_eq!(world.states(), [ProbeState::Lost, ProbeState::Lost, ProbeState::Fails]);
}

#[test]
fn loss_and_latency_move_nothing() {
    // Both directions lose: 20 % each are 36 % of the probes.
    for (loss, round_trip) in [(10, 30), (36, 30), (10, 250), (0, 400), (36, 400)] {
        for misses in [2, 3] {
            let settings = ProbeSettings { interval: Duration::from_secs(1), misses };
            let mut world = World::new(2, settings, 11 + loss);
            (world.loss, world.round_trip) = (loss, Duration::from_millis(round_trip));
            world.pass(Duration::from_secs(3600), |_, _| true);
            assert_eq!(world.was_lost, [false; 2], "{loss} %, {round_trip} ms, {misses} misses");
        }
    }
}

#[test]
fn what_never_answered_anywhere_is_lost_nowhere() {
    let mut world = World::new(2, SETTINGS, 3);
    assert_eq!(world.states(), [ProbeState::Unproven; 2]);
    world.pass(Duration::from_secs(300), |_, _| false);
    assert_eq!(world.states(), [ProbeState::Fails; 2]);
    assert_eq!(world.was_lost, [false; 2]);
}

#[test]
fn a_restart_ends_no_loss_and_makes_none() {
    let mut world = World::new(2, SETTINGS, 4);
    world.pass(Duration::from_secs(10), |_, _| true);
    // The daemon of node 0 restarts all the time, and each one's first probe finds the target.
    for _ in 0..20 {
        world.judges[0] = Judge::new(SETTINGS, 1, false, world.now);
        assert_eq!(world.judges[0].success(), None, "nothing has answered this daemon yet");
        world.pass(Duration::from_millis(700), |_, _| true);
    }
    assert_eq!(world.was_lost, [false; 2]);
    world.pass(Duration::from_secs(20), |node, _| node != 0);
    assert_eq!(world.states()[0], ProbeState::Lost);
    world.judges[0] = Judge::new(SETTINGS, 1, true, world.now);
    world.pass(Duration::from_secs(20), |node, _| node != 0);
    assert_eq!(world.states()[0], ProbeState::Lost);
    world.pass(Duration::from_secs(12), |_, _| true);
    assert_eq!(world.states()[0], ProbeState::Succeeds);
}

#[test]
fn a_daemon_that_stood_still_judges_by_what_it_sends_after() {
    let mut world = World::new(2, SETTINGS, 6);
    world.pass(Duration::from_secs(10), |_, _| true);
    for _ in 0..10 {
        // Answers to what was sent before arrive nowhere.
        world.coming.clear();
        world.now += Duration::from_secs(20);
        world.judges[0].judge(world.now);
        assert_eq!(world.states()[0], ProbeState::Succeeds);
        world.pass(Duration::from_millis(1500), |_, _| true);
    }
    assert!(!world.was_lost[0]);
}

#[test]
fn reports_of_successes_before_the_failure_prove_nothing() {
    let begin = Instant::now();
    let mut judge = Judge::new(SETTINGS, 1, false, begin);
    let mut now = begin;
    while judge.state() != ProbeState::Fails {
        now += STEP;
        judge.due(now);
        judge.judge(now);
        judge.proven(mac(1), begin + SETTINGS.interval);
    }
    let failed = now;
    for seconds in 1..60 {
        now = failed + Duration::from_secs(seconds);
        judge.due(now);
        judge.judge(now);
        judge.proven(mac(1), failed - STEP);
        // One success, however often it is reported.
        judge.proven(mac(2), failed + STEP);
        assert_eq!(judge.state(), ProbeState::Fails);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The target answers at some times and not at others, but all nodes alike.
    #[test]
    fn what_happens_to_all_alike_moves_nothing(seed: u64, loss in 0_u64..30, changes in prop::collection::vec(1_u64..30, 1..12)) {
        let mut world = World::new(3, SETTINGS, seed);
        world.loss = loss;
        let mut up = true;
        for seconds in changes {
            world.pass(Duration::from_secs(seconds), |_, _| up);
            up = !up;
        }
        prop_assert_eq!(world.was_lost, [false; 3]);
    }

    /// Whatever lines break and heal, a node that succeeds is not lost for longer than a recovery takes, and one that
    /// fails for long while another succeeds is lost.
    #[test]
    fn in_the_end_the_state_is_what_the_line_is(seed: u64, changes in prop::collection::vec((0_usize..3, 1_u64..20), 1..10)) {
        let mut world = World::new(3, SETTINGS, seed);
        let mut lines = [true; 3];
        for (node, seconds) in changes {
            lines[node] = !lines[node];
            world.pass(Duration::from_secs(seconds), |node, _| lines[node]);
        }
        world.pass(Duration::from_secs(30), |node, _| lines[node]);
        for (node, state) in world.states().into_iter().enumerate() {
            match (lines[node], lines.contains(&true)) {
                (true, _) => prop_assert_eq!(state, ProbeState::Succeeds),
                (false, true) => prop_assert_eq!(state, ProbeState::Lost),
                (false, false) => prop_assert!(matches!(state, ProbeState::Lost | ProbeState::Fails)),
            }
        }
    }
}
