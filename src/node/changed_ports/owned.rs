//! The connections with a changed port that this node, as the owner of their egress IPs, replicates.

use super::message::Changed;
use egret_nft::conntrack::Tuple;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// The largest number of replicated connections. Each takes some 200 bytes here and on every member, and an entry in
/// the member's connection tracking.
pub const MOST: usize = 16_384;
/// The largest number for one pod address, so that a pod cannot use up the limit.
pub const MOST_OF_POD: usize = 2_048;
/// A new connection is checked and sent again after this time. The first message may have been lost, and the
/// connection was half open.
const FIRST: Duration = Duration::from_secs(1);
/// The interval between two checks of a connection.
const CHECK: Duration = Duration::from_secs(2);
/// The interval at which a connection is sent again.
const REPEAT: Duration = Duration::from_secs(10);
/// How often the end of a connection is sent, because a message may be lost.
const TIMES: u8 = 3;

/// The replicated connections and their schedule.
#[derive(Debug, Default)]
pub struct Owned {
    connections: HashMap<Tuple, Scheduled>,
    /// When each connection is checked next.
    next: BTreeSet<(Instant, Tuple)>,
    of_pods: HashMap<IpAddr, usize>,
    /// Connections that have ended, and how often their end is still to be sent.
    ended: Vec<(Changed, u8)>,
}

#[derive(Debug)]
struct Scheduled {
    changed: Changed,
    next: Instant,
    repeat: Instant,
}

/// The result of [`Owned::record`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// The connection is to be sent.
    New,
    /// The connection is known.
    Known,
    /// A limit is reached.
    NoRoom,
}

impl Owned {
    /// The number of connections.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Records a connection with a changed port.
    pub fn record(&mut self, changed: Changed, now: Instant) -> Recorded {
        match self.connections.get(&changed.out) {
            Some(known) if known.changed == changed => return Recorded::Known,
            // Another connection has the same tuple now.
            Some(_) => drop(self.remove(&changed.out)),
            None => {}
        }
        let of_pod = self.of_pods.entry(changed.out.source).or_default();
        if self.connections.len() >= MOST || *of_pod >= MOST_OF_POD {
            if *of_pod == 0 {
                self.of_pods.remove(&changed.out.source);
            }
            return Recorded::NoRoom;
        }
        *of_pod += 1;
        self.ended.retain(|(ended, _)| ended.out != changed.out);
        let next = now + FIRST;
        self.next.insert((next, changed.out));
        self.connections.insert(changed.out, Scheduled { changed, next, repeat: next });
        Recorded::New
    }

    /// The connections that are due for a check, at most `most`.
    pub fn due(&self, now: Instant, most: usize) -> Vec<Changed> {
        let due = self.next.iter().take_while(|(at, _)| *at <= now).take(most);
        due.filter_map(|(_, out)| self.connections.get(out)).map(|entry| entry.changed).collect()
    }

    /// Reschedules a connection that still exists. Returns whether it is to be sent again.
    pub fn lives(&mut self, out: &Tuple, now: Instant) -> bool {
        let Some(entry) = self.connections.get_mut(out) else { return false };
        self.next.remove(&(entry.next, *out));
        entry.next = now + CHECK;
        self.next.insert((entry.next, *out));
        let repeats = entry.repeat <= now;
        if repeats {
            entry.repeat = now + REPEAT;
        }
        repeats
    }

    /// Removes a connection that has ended.
    pub fn ended(&mut self, out: &Tuple) {
        if let Some(changed) = self.remove(out) {
            self.ended.push((changed, TIMES));
        }
    }

    /// The ended connections that are to be sent now.
    pub fn take_ended(&mut self) -> Vec<Changed> {
        let entry = self.ended.iter().map(|(changed, _)| *changed).collect();
        self.ended.iter_mut().for_each(|(_, times)| *times -= 1);
        self.ended.retain(|(_, times)| *times > 0);
        entry
    }

    /// Makes all connections due for a check and for sending.
    pub fn repeat_all(&mut self, now: Instant) {
        self.next = self.connections.keys().map(|out| (now, *out)).collect();
        for entry in self.connections.values_mut() {
            (entry.next, entry.repeat) = (now, now);
        }
    }

    /// Drops the connections of egress IPs for which `owns` returns false.
    pub fn keep(&mut self, owns: impl Fn(IpAddr) -> bool) {
        let others = self.connections.values().filter(|entry| !owns(entry.changed.address));
        for out in others.map(|entry| entry.changed.out).collect::<Vec<_>>() {
            self.remove(&out);
        }
        self.ended.retain(|(changed, _)| owns(changed.address));
    }

    fn remove(&mut self, out: &Tuple) -> Option<Changed> {
        let entry = self.connections.remove(out)?;
        self.next.remove(&(entry.next, *out));
        if let Some(of_pod) = self.of_pods.get_mut(&out.source) {
            *of_pod -= 1;
            if *of_pod == 0 {
                self.of_pods.remove(&out.source);
            }
        }
        Some(entry.changed)
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
    fn a_connection_is_sent_after_a_second_and_every_ten_and_its_end_three_times() {
        let (mut owned, begin) = (Owned::default(), Instant::now());
        assert_eq!(owned.record(changed(1, 9), begin), Recorded::New);
        assert_eq!(owned.record(changed(1, 9), begin), Recorded::Known);
        let mut entry = Vec::new();
        for tenth in 0..300 {
            let now = begin + Duration::from_millis(tenth * 100);
            for due in owned.due(now, 10) {
                if owned.lives(&due.out, now) {
                    entry.push(tenth / 10);
                }
            }
        }
        assert_eq!(entry, [1, 11, 21]);
        owned.ended(&changed(1, 9).out);
        assert_eq!(owned.len(), 0);
        assert_eq!((0..4).map(|_| owned.take_ended().len()).collect::<Vec<_>>(), [1, 1, 1, 0]);
    }

    #[test]
    fn a_connection_that_returns_has_not_ended() {
        let (mut owned, now) = (Owned::default(), Instant::now());
        owned.record(changed(1, 9), now);
        owned.ended(&changed(1, 9).out);
        let other = Changed { port: 7, ..changed(1, 9) };
        assert_eq!(owned.record(other, now), Recorded::New);
        assert_eq!(owned.take_ended(), []);
        assert_eq!(owned.record(changed(1, 9), now), Recorded::New, "in the place of the other");
        assert_eq!((owned.len(), owned.due(now + FIRST, 9).len()), (1, 1));
    }

    #[test]
    fn connections_are_limited_for_each_pod_and_in_total() {
        let (mut owned, now) = (Owned::default(), Instant::now());
        let of_one = (1..=3000).filter(|port| owned.record(changed(1, *port), now) == Recorded::New).count();
        assert_eq!(of_one, MOST_OF_POD);
        assert_eq!(owned.record(changed(2, 1), now), Recorded::New);
        let pods = 3..100;
        pods.for_each(|pod| {
            (1..=500).for_each(|port| assert_ne!(owned.record(changed(pod, port), now), Recorded::Known))
        });
        assert_eq!((owned.len(), owned.next.len()), (MOST, MOST));
        owned.keep(|_| false);
        assert_eq!((owned.len(), owned.next.len(), owned.of_pods.len()), (0, 0, 0));
        assert_eq!(owned.record(changed(1, 1), now), Recorded::New);
    }
}
