//! The connections that this node, their owner, tells others of.

use super::message::Changed;
use crate::kernel::conntrack::Tuple;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// As many are told of. Each takes some 200 bytes here and on every member, and an entry of the kernel's there.
pub const MOST: usize = 16_384;
/// As many of one pod's address: a pod must not take others' room.
pub const MOST_OF_POD: usize = 2_048;
/// A new connection is looked at again after this long, and told of again: the first message may have been lost, and the
/// connection was half open.
const FIRST: Duration = Duration::from_secs(1);
/// Whether a connection lives on is looked at this often.
const LOOK: Duration = Duration::from_secs(2);
/// What lives on is told of this often.
const REPEAT: Duration = Duration::from_secs(10);
/// How often the end of a connection is told: a message may be lost.
const TIMES: u8 = 3;

/// See the module.
#[derive(Debug, Default)]
pub struct Owned {
    connections: HashMap<Tuple, Told>,
    /// When each is looked at next.
    next: BTreeSet<(Instant, Tuple)>,
    of_pods: HashMap<IpAddr, usize>,
    /// What has ended, and how often that is to be told.
    ended: Vec<(Changed, u8)>,
}

#[derive(Debug)]
struct Told {
    changed: Changed,
    next: Instant,
    repeat: Instant,
}

/// What becomes of a connection that was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// Others are to be told.
    New,
    /// They have been.
    Known,
    /// There is no room.
    NoRoom,
}

impl Owned {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// A connection was heard of.
    pub fn note(&mut self, changed: Changed, now: Instant) -> Noted {
        match self.connections.get(&changed.out) {
            Some(known) if known.changed == changed => return Noted::Known,
            // Another one has taken its place in the kernel's table.
            Some(_) => drop(self.remove(&changed.out)),
            None => {}
        }
        let of_pod = self.of_pods.entry(changed.out.source).or_default();
        if self.connections.len() >= MOST || *of_pod >= MOST_OF_POD {
            if *of_pod == 0 {
                self.of_pods.remove(&changed.out.source);
            }
            return Noted::NoRoom;
        }
        *of_pod += 1;
        self.ended.retain(|(ended, _)| ended.out != changed.out);
        let next = now + FIRST;
        self.next.insert((next, changed.out));
        self.connections.insert(changed.out, Told { changed, next, repeat: next });
        Noted::New
    }

    /// Which are to be looked at now, `most` at most.
    pub fn due(&self, now: Instant, most: usize) -> Vec<Changed> {
        let due = self.next.iter().take_while(|(at, _)| *at <= now).take(most);
        due.filter_map(|(_, out)| self.connections.get(out)).map(|told| told.changed).collect()
    }

    /// A connection lives on. Whether others are to be told of it again.
    pub fn lives(&mut self, out: &Tuple, now: Instant) -> bool {
        let Some(told) = self.connections.get_mut(out) else { return false };
        self.next.remove(&(told.next, *out));
        told.next = now + LOOK;
        self.next.insert((told.next, *out));
        let repeats = told.repeat <= now;
        if repeats {
            told.repeat = now + REPEAT;
        }
        repeats
    }

    /// A connection has ended.
    pub fn ended(&mut self, out: &Tuple) {
        if let Some(changed) = self.remove(out) {
            self.ended.push((changed, TIMES));
        }
    }

    /// The ends that are to be told now.
    pub fn take_ended(&mut self) -> Vec<Changed> {
        let told = self.ended.iter().map(|(changed, _)| *changed).collect();
        self.ended.iter_mut().for_each(|(_, times)| *times -= 1);
        self.ended.retain(|(_, times)| *times > 0);
        told
    }

    /// All are to be told of again.
    pub fn repeat_all(&mut self, now: Instant) {
        self.next = self.connections.keys().map(|out| (now, *out)).collect();
        for told in self.connections.values_mut() {
            (told.next, told.repeat) = (now, now);
        }
    }

    /// Keeps those with these egress IPs; of the others nothing is told any more.
    pub fn keep(&mut self, owns: impl Fn(IpAddr) -> bool) {
        let others = self.connections.values().filter(|told| !owns(told.changed.address));
        for out in others.map(|told| told.changed.out).collect::<Vec<_>>() {
            self.remove(&out);
        }
        self.ended.retain(|(changed, _)| owns(changed.address));
    }

    fn remove(&mut self, out: &Tuple) -> Option<Changed> {
        let told = self.connections.remove(out)?;
        self.next.remove(&(told.next, *out));
        if let Some(of_pod) = self.of_pods.get_mut(&out.source) {
            *of_pod -= 1;
            if *of_pod == 0 {
                self.of_pods.remove(&out.source);
            }
        }
        Some(told.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(pod: u16, port: u16) -> Changed {
        let source = IpAddr::from([10, 244, (pod >> 8) as u8, pod as u8]);
        let out = Tuple { source, destination: [198, 51, 100, 7].into(), protocol: 6, ports: [port, 443] };
        Changed { out, address: [192, 0, 2, 50].into(), port: port ^ 1, source_node: [2; 6] }
    }

    #[test]
    fn a_connection_is_told_of_after_a_second_and_every_ten_and_its_end_three_times() {
        let (mut owned, begin) = (Owned::default(), Instant::now());
        assert_eq!(owned.note(changed(1, 9), begin), Noted::New);
        assert_eq!(owned.note(changed(1, 9), begin), Noted::Known);
        let mut told = Vec::new();
        for tenth in 0..300 {
            let now = begin + Duration::from_millis(tenth * 100);
            for due in owned.due(now, 10) {
                if owned.lives(&due.out, now) {
                    told.push(tenth / 10);
                }
            }
        }
        assert_eq!(told, [1, 11, 21]);
        owned.ended(&changed(1, 9).out);
        assert_eq!(owned.len(), 0);
        assert_eq!((0..4).map(|_| owned.take_ended().len()).collect::<Vec<_>>(), [1, 1, 1, 0]);
    }

    #[test]
    fn what_comes_again_has_not_ended() {
        let (mut owned, now) = (Owned::default(), Instant::now());
        owned.note(changed(1, 9), now);
        owned.ended(&changed(1, 9).out);
        let other = Changed { port: 7, ..changed(1, 9) };
        assert_eq!(owned.note(other, now), Noted::New);
        assert_eq!(owned.take_ended(), []);
        assert_eq!(owned.note(changed(1, 9), now), Noted::New, "in the place of the other");
        assert_eq!((owned.len(), owned.due(now + FIRST, 9).len()), (1, 1));
    }

    #[test]
    fn a_pod_takes_no_more_than_its_share_and_all_no_more_than_there_is() {
        let (mut owned, now) = (Owned::default(), Instant::now());
        let of_one = (1..=3000).filter(|port| owned.note(changed(1, *port), now) == Noted::New).count();
        assert_eq!(of_one, MOST_OF_POD);
        assert_eq!(owned.note(changed(2, 1), now), Noted::New);
        let pods = 3..100;
        pods.for_each(|pod| (1..=500).for_each(|port| assert_ne!(owned.note(changed(pod, port), now), Noted::Known)));
        assert_eq!((owned.len(), owned.next.len()), (MOST, MOST));
        owned.keep(|_| false);
        assert_eq!((owned.len(), owned.next.len(), owned.of_pods.len()), (0, 0, 0));
        assert_eq!(owned.note(changed(1, 1), now), Noted::New);
    }
}
