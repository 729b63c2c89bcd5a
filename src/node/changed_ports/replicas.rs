//! The connections that the owners of egress IPs have told this node of, which may come to own them.

use super::message::Changed;
use crate::kernel::conntrack::{Translated, Tuple};
use crate::model::mac::Mac;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// As many are kept, of all owners.
pub const MOST: usize = 65_536;
/// What its owner's daemon has not told of for this long, while it tells of others, has ended: word of that was lost.
const SILENT: Duration = Duration::from_secs(60);
/// An owner from which a message came in this time tells what there is.
const SPEAKS: Duration = Duration::from_secs(20);

/// Shared by the task that hears of them, and by what cleans the kernel's table when an allocation has moved.
#[derive(Debug, Default)]
pub struct Replicas {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    connections: HashMap<Tuple, Replica>,
    by_answers: HashMap<Tuple, Tuple>,
    heard: HashMap<Mac, Instant>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// What its owner told.
    pub changed: Changed,
    /// The mark that it has here.
    pub mark: u32,
    /// When it is forgotten if nothing more comes.
    pub expires: Instant,
    from: Mac,
    told: Instant,
}

impl Replica {
    /// What its answers look like.
    pub fn back(&self) -> Tuple {
        let Changed { out, address, port, .. } = self.changed;
        Tuple { destination: address, ports: [out.ports[1], port], ..out.reversed() }
    }

    /// As the kernel is to track it.
    pub fn translated(&self, now: Instant) -> Translated {
        let Changed { out, address, port, .. } = self.changed;
        let timeout = self.expires.saturating_duration_since(now).as_secs().max(1);
        Translated { out, address, port, mark: self.mark, timeout: timeout.try_into().unwrap_or(u32::MAX) }
    }
}

impl Replicas {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table().connections.len()
    }

    /// A node's word of a connection, which lives so many seconds more; and another one whose answers it has: its owner has
    /// given them to this one. `None`: there is no room.
    pub fn put(
        &self,
        from: Mac,
        changed: Changed,
        mark: u32,
        seconds: u32,
        now: Instant,
    ) -> Option<(Replica, Option<Replica>)> {
        let mut table = self.table();
        table.heard.insert(from, now);
        if table.connections.len() >= MOST && !table.connections.contains_key(&changed.out) {
            return None;
        }
        let replica = Replica { changed, mark, expires: now + Duration::from_secs(seconds.into()), from, told: now };
        let back = replica.back();
        table.remove(&changed.out);
        let rival = table.by_answers.get(&back).copied().and_then(|out| table.remove(&out));
        table.by_answers.insert(back, changed.out);
        table.connections.insert(changed.out, replica);
        Some((replica, rival))
    }

    /// Takes out what has ended, if it is there.
    pub fn take(&self, changed: &Changed) -> Option<Replica> {
        let mut table = self.table();
        let is_there = table.connections.get(&changed.out).is_some_and(|replica| replica.changed == *changed);
        is_there.then(|| table.remove(&changed.out)).flatten()
    }

    /// Whether this connection, with this egress IP, is one of them.
    pub fn has(&self, out: &Tuple, address: IpAddr) -> bool {
        self.table().connections.get(out).is_some_and(|replica| replica.changed.address == address)
    }

    /// What the connection of a pod of this node becomes when its allocation comes here.
    pub fn heir(&self, out: &Tuple, mark: u32) -> Option<Translated> {
        let replica = self.table().connections.get(out).copied()?;
        (replica.mark == mark).then(|| replica.translated(Instant::now()))
    }

    /// These egress IPs are this node's now: what it was told of them counts for a while yet, however long ago that was.
    pub fn touch(&self, now: Instant, comes: impl Fn(&IpAddr) -> bool) {
        let mut table = self.table();
        let coming = table.connections.values_mut().filter(|replica| comes(&replica.changed.address));
        coming.for_each(|replica| replica.told = now);
    }

    /// Takes out what has ended without word of it. `owned`: of these egress IPs the kernel's table is what counts.
    pub fn prune(&self, now: Instant, owned: impl Fn(IpAddr) -> bool) -> Vec<Replica> {
        let mut table = self.table();
        table.heard.retain(|_, heard| *heard + SPEAKS > now);
        let speaks = |from: &Mac| table.heard.contains_key(from);
        let has_ended = |replica: &Replica| {
            let silent = replica.told + SILENT <= now;
            replica.expires <= now || silent && (owned(replica.changed.address) || speaks(&replica.from))
        };
        let ended: Vec<Replica> = table.connections.values().filter(|r| has_ended(r)).copied().collect();
        for replica in &ended {
            table.remove(&replica.changed.out);
        }
        ended
    }
}

impl Table {
    fn remove(&mut self, out: &Tuple) -> Option<Replica> {
        let replica = self.connections.remove(out)?;
        let back = replica.back();
        if self.by_answers.get(&back) == Some(out) {
            self.by_answers.remove(&back);
        }
        Some(replica)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Mac = [2; 6];
    const OTHER: Mac = [3; 6];

    fn changed(port: u16, other: u16) -> Changed {
        let out = Tuple {
            source: [10, 244, 1, 5].into(),
            destination: [198, 51, 100, 7].into(),
            protocol: 6,
            ports: [port, 443],
        };
        Changed { out, address: [192, 0, 2, 50].into(), port: other, source_node: [4; 6] }
    }

    #[test]
    fn what_is_told_no_more_goes_while_its_owner_speaks_and_stays_while_it_is_silent() {
        let (replicas, begin) = (Replicas::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        replicas.put(OWNER, changed(1, 101), 7, 10_000, begin).unwrap();
        replicas.put(OTHER, changed(2, 102), 7, 10_000, begin).unwrap();
        replicas.put(OTHER, changed(3, 103), 7, 70, begin).unwrap();
        replicas.put(OWNER, changed(4, 104), 7, 10_000, at(59)).unwrap();
        assert_eq!(replicas.prune(at(59), |_| false), []);
        let pruned = replicas.prune(at(61), |_| false);
        assert_eq!(pruned.iter().map(|r| r.changed).collect::<Vec<_>>(), [changed(1, 101)], "its owner speaks");
        let pruned = replicas.prune(at(71), |_| false);
        assert_eq!(pruned.iter().map(|r| r.changed).collect::<Vec<_>>(), [changed(3, 103)], "its time is over");
        assert_eq!(replicas.len(), 2);
        replicas.touch(at(100), |_| true);
        assert_eq!(replicas.prune(at(159), |_| true), [], "this node has just become the owner");
        assert_eq!(replicas.prune(at(160), |_| true).len(), 2, "what this node owns is in the kernel's table");
        assert_eq!((replicas.len(), replicas.table().by_answers.len()), (0, 0));
    }

    #[test]
    fn the_newest_has_the_answers_and_only_what_was_meant_is_taken_out() {
        let (replicas, now) = (Replicas::default(), Instant::now());
        let put = |changed| replicas.put(OWNER, changed, 7, 100, now).unwrap().1.map(|rival| rival.changed);
        assert_eq!(put(changed(1, 101)), None);
        assert_eq!(put(changed(1, 101)), None);
        assert_eq!(put(changed(2, 101)), Some(changed(1, 101)));
        assert_eq!(put(changed(1, 102)), None);
        assert!(replicas.take(&changed(1, 101)).is_none(), "it has another port now");
        assert!(replicas.has(&changed(1, 0).out, [192, 0, 2, 50].into()));
        assert!(!replicas.has(&changed(1, 0).out, [192, 0, 2, 51].into()));
        assert!(replicas.take(&changed(1, 102)).is_some());
        assert_eq!(replicas.heir(&changed(2, 0).out, 7).map(|heir| heir.port), Some(101));
        assert_eq!(replicas.heir(&changed(2, 0).out, 8), None, "no pod of this node's");
        assert!(replicas.take(&changed(2, 101)).is_some());
        assert_eq!((replicas.len(), replicas.table().by_answers.len()), (0, 0));
    }
}
