//! Questions, and what follows from answers and silence.

use super::Settings;
use crate::plan::selector::Name;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv6Addr;
use std::time::Duration;
use tokio::time::Instant;

/// How long a node that was dead must answer before it counts as alive, unless nobody else is. A node that was frozen
/// answers before its daemon has looked around: in this time it finds out what others have taken over from it, and
/// tells. It also keeps a line that lets every third packet through from taking paths to and fro.
const HOLD: Duration = Duration::from_millis(500);

/// An answer to one of so many last questions says that a node lives; an older one says that it did.
const RECENT: u16 = 64;

#[derive(Debug)]
struct Node {
    address: Ipv6Addr,
    /// When it is to be asked next.
    next: Instant,
    /// When it was asked, while its answer is awaited.
    asked: Option<Instant>,
    /// Questions in a row that were not answered.
    missed: u32,
    dead: bool,
    /// Since when every question was answered.
    answering: Option<Instant>,
    /// When it answered last, or was first to be asked.
    last: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Questions {
    settings: Settings,
    nodes: BTreeMap<Name, Node>,
    by_address: HashMap<Ipv6Addr, Name>,
    sequence: u16,
    stalled: bool,
}

impl Questions {
    pub fn new(settings: Settings) -> Self {
        let (nodes, by_address) = (BTreeMap::new(), HashMap::new());
        Questions { settings, nodes, by_address, sequence: 0, stalled: false }
    }

    /// Whom to ask from now on. Who is new counts as alive.
    pub fn set_nodes(&mut self, wanted: &BTreeMap<Name, Ipv6Addr>, now: Instant) {
        let same = |name: &Name, node: &Node| wanted.get(name) == Some(&node.address);
        if self.nodes.len() == wanted.len() && self.nodes.iter().all(|(name, node)| same(name, node)) {
            return;
        }
        self.nodes.retain(|name, node| same(name, node));
        for (name, address) in wanted {
            self.nodes.entry(name.clone()).or_insert_with(|| Node {
                address: *address,
                next: now,
                asked: None,
                missed: 0,
                dead: false,
                answering: None,
                last: now,
            });
        }
        self.by_address = wanted.iter().map(|(name, address)| (*address, name.clone())).collect();
    }

    /// When something is to be done: a question, or judging one.
    pub fn next(&self) -> Option<Instant> {
        self.nodes.values().map(|node| node.asked.map_or(node.next, |at| at + self.patience())).min()
    }

    /// After how long a question counts as not answered. An answer that comes later counts all the same, so a long way
    /// makes nobody dead.
    fn patience(&self) -> Duration {
        self.settings.interval / 5
    }

    /// Judges the questions whose time is over. All answers that have come must have been told before.
    pub fn judge(&mut self, now: Instant) {
        let (patience, Settings { interval, misses }) = (self.patience(), self.settings);
        for node in self.nodes.values_mut() {
            let Some(asked) = node.asked.filter(|asked| now >= *asked + patience) else { continue };
            node.asked = None;
            node.missed += 1;
            node.answering = None;
            node.dead |= node.missed >= misses;
            // Whoever has not answered is asked again soon, so that it is known soon.
            node.next = asked + if node.dead { interval } else { interval / 2 };
        }
    }

    /// Whom to ask now, with which number.
    pub fn due(&mut self, now: Instant) -> Vec<(Ipv6Addr, u16)> {
        let late = self.settings.safe_absence().max(self.patience());
        self.sequence = self.sequence.wrapping_add(1);
        let mut asked = Vec::new();
        for node in self.nodes.values_mut().filter(|node| node.asked.is_none() && node.next <= now) {
            self.stalled |= now - node.next > late;
            node.asked = Some(now);
            asked.push((node.address, self.sequence));
        }
        asked
    }

    /// An answer came. One that is late is an answer all the same.
    pub fn answered(&mut self, from: Ipv6Addr, sequence: u16, now: Instant) {
        if self.sequence.wrapping_sub(sequence) > RECENT {
            return;
        }
        let alone = self.nodes.values().all(|node| node.dead);
        let Some(node) = self.by_address.get(&from).and_then(|name| self.nodes.get_mut(name)) else { return };
        if let Some(asked) = node.asked.take() {
            node.next = asked + self.settings.interval;
        }
        (node.missed, node.last) = (0, now);
        let since = *node.answering.get_or_insert(now);
        if node.dead && (alone || now - since >= HOLD) {
            node.dead = false;
        }
    }

    /// Nodes that do not answer.
    pub fn dead(&self) -> BTreeSet<Name> {
        self.nodes.iter().filter(|(_, node)| node.dead).map(|(name, _)| name.clone()).collect()
    }

    /// How long nobody has answered.
    pub fn silent_for(&self, now: Instant) -> Duration {
        self.nodes.values().map(|node| now - node.last).min().unwrap_or_default()
    }

    /// Whether so much time has passed before a question that others may have found this node dead meanwhile.
    pub fn take_stall(&mut self) -> bool {
        std::mem::take(&mut self.stalled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(300);

    struct World {
        questions: Questions,
        now: Instant,
    }

    fn address(n: usize) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, n as u16)
    }

    impl World {
        fn new(nodes: usize) -> Self {
            let now = Instant::now();
            let mut questions = Questions::new(Settings { interval: INTERVAL, misses: 3 });
            questions.set_nodes(&(0..nodes).map(|n| (format!("n{n}").into(), address(n))).collect(), now);
            World { questions, now }
        }

        /// Lets time pass, in which these nodes answer what they are asked.
        fn pass(&mut self, time: Duration, answering: &[usize]) {
            let end = self.now + time;
            loop {
                self.questions.judge(self.now);
                for (to, sequence) in self.questions.due(self.now) {
                    if answering.iter().any(|n| address(*n) == to) {
                        self.questions.answered(to, sequence, self.now);
                    }
                }
                match self.questions.next() {
                    Some(next) if next <= end => self.now = next.max(self.now),
                    _ => break,
                }
            }
            self.now = end;
        }

        fn dead(&self) -> Vec<String> {
            self.questions.dead().iter().map(ToString::to_string).collect()
        }
    }

    #[test]
    fn three_silences_in_a_row_are_a_death_and_two_are_not() {
        let mut world = World::new(2);
        world.pass(INTERVAL * 3, &[0, 1]);
        for _ in 0..3 {
            // Two questions, at once and after half the time.
            world.pass(INTERVAL / 2 + INTERVAL / 4, &[0]);
            assert!(world.dead().is_empty());
            world.pass(INTERVAL * 2 - INTERVAL / 8, &[0, 1]);
        }
        world.pass(INTERVAL * 2 + INTERVAL / 3, &[0]);
        assert_eq!(world.dead(), ["n1"]);
    }

    #[test]
    fn who_comes_back_is_alive_after_half_a_second_of_answers() {
        let mut world = World::new(2);
        world.pass(INTERVAL * 4, &[0]);
        world.pass(INTERVAL, &[0, 1]);
        assert_eq!(world.dead(), ["n1"]);
        world.pass(INTERVAL, &[0]);
        world.pass(HOLD - INTERVAL / 2, &[0, 1]);
        assert_eq!(world.dead(), ["n1"], "a question was missed, so it begins anew");
        world.pass(INTERVAL * 2, &[0, 1]);
        assert!(world.dead().is_empty());
    }

    #[test]
    fn the_first_who_comes_back_of_all_is_alive_at_once() {
        let mut world = World::new(2);
        world.pass(INTERVAL * 4, &[]);
        assert_eq!(world.dead().len(), 2);
        world.pass(INTERVAL, &[1]);
        assert_eq!(world.dead(), ["n0"]);
        world.pass(INTERVAL, &[0, 1]);
        assert_eq!(world.dead(), ["n0"]);
    }

    #[test]
    fn a_busy_daemon_finds_nobody_dead() {
        let mut world = World::new(1);
        let asked = world.questions.due(world.now);
        world.now += INTERVAL * 20;
        // What was heard meanwhile is told before it is judged.
        world.questions.answered(asked[0].0, asked[0].1, world.now);
        world.questions.judge(world.now);
        assert!(world.dead().is_empty());
        assert!(!world.questions.take_stall());
        world.pass(INTERVAL, &[0]);
        assert!(world.questions.take_stall(), "it may have been frozen");
        world.pass(INTERVAL * 3, &[0]);
        assert!(!world.questions.take_stall());
    }

    #[test]
    fn an_answer_to_a_question_of_long_ago_is_none() {
        let mut world = World::new(1);
        let old = world.questions.due(world.now)[0];
        world.pass(INTERVAL * 70, &[]);
        assert_eq!(world.dead().len(), 1);
        world.questions.answered(old.0, old.1, world.now);
        assert_eq!(world.dead().len(), 1);
    }

    #[test]
    fn who_is_asked_no_more_and_then_again_counts_as_alive() {
        let mut world = World::new(1);
        world.pass(INTERVAL * 4, &[]);
        world.questions.set_nodes(&BTreeMap::new(), world.now);
        assert!(world.dead().is_empty() && world.questions.next().is_none());
        world.now += INTERVAL * 50;
        world.questions.set_nodes(&[("n0".into(), address(0))].into(), world.now);
        world.pass(INTERVAL / 2, &[]);
        assert!(world.dead().is_empty() && !world.questions.take_stall());
    }
}
