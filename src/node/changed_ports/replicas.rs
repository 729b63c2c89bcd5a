//! The connections that the owners of egress IPs have replicated to this node, which may become the owner.

use super::message::Changed;
use egret_nft::conntrack::{Translated, Tuple};
use egret_nft::mac::Mac;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The largest number of stored connections, of all owners.
pub const MOST: usize = 65_536;
/// A connection that its owner has not repeated for this long, while it sends others, has ended, and the message
/// about its end was lost.
const UNCONFIRMED: Duration = Duration::from_secs(60);
/// An owner is active if a message from it arrived within this time.
const ACTIVE: Duration = Duration::from_secs(20);

/// The replicated connections. The replication thread fills them; the cleaning of connection tracking after a move
/// reads them.
#[derive(Debug, Default)]
pub struct Replicas {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    connections: HashMap<Tuple, Replica>,
    by_reply: HashMap<Tuple, Tuple>,
    last_message: HashMap<Mac, Instant>,
}

/// A replicated connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The connection as its owner sent it.
    pub changed: Changed,
    /// Its connection mark on this node.
    pub mark: u32,
    /// When it expires if the owner does not repeat it.
    pub expires: Instant,
    from: Mac,
    confirmed: Instant,
}

impl Replica {
    /// The reply direction.
    pub fn back(&self) -> Tuple {
        let Changed { out, address, port, .. } = self.changed;
        Tuple { destination: address, ports: [out.ports[1], port], ..out.reversed() }
    }

    /// The connection to insert into the kernel's table.
    pub fn translated(&self, now: Instant) -> Translated {
        let Changed { out, address, port, .. } = self.changed;
        let timeout = self.expires.saturating_duration_since(now).as_secs().max(1);
        Translated { out, address, port, mark: self.mark, timeout: timeout.try_into().unwrap_or(u32::MAX) }
    }
}

impl Replicas {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic leaves the table consistent, because each change is complete.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of connections.
    pub fn len(&self) -> usize {
        self.table().connections.len()
    }

    /// Stores a connection that `from` has sent and that expires in `seconds`. Returns it, and the connection that
    /// had the same reply tuple before, which has ended on its owner. `None` if the limit is reached.
    pub fn put(
        &self,
        from: Mac,
        changed: Changed,
        mark: u32,
        seconds: u32,
        now: Instant,
    ) -> Option<(Replica, Option<Replica>)> {
        let mut table = self.table();
        table.last_message.insert(from, now);
        if table.connections.len() >= MOST && !table.connections.contains_key(&changed.out) {
            return None;
        }
        let replica =
            Replica { changed, mark, expires: now + Duration::from_secs(seconds.into()), from, confirmed: now };
        let back = replica.back();
        table.remove(&changed.out);
        let rival = table.by_reply.get(&back).copied().and_then(|out| table.remove(&out));
        table.by_reply.insert(back, changed.out);
        table.connections.insert(changed.out, replica);
        Some((replica, rival))
    }

    /// Removes a connection that has ended, if it is stored.
    pub fn take(&self, changed: &Changed) -> Option<Replica> {
        let mut table = self.table();
        let is_there = table.connections.get(&changed.out).is_some_and(|replica| replica.changed == *changed);
        is_there.then(|| table.remove(&changed.out)).flatten()
    }

    /// Whether this connection with this egress IP is stored.
    pub fn has(&self, out: &Tuple, address: IpAddr) -> bool {
        self.table().connections.get(out).is_some_and(|replica| replica.changed.address == address)
    }

    /// The translation of a connection of this node's pods after its egress IP has moved to this node.
    pub fn translation_of(&self, out: &Tuple, mark: u32) -> Option<Translated> {
        let replica = self.table().connections.get(out).copied()?;
        (replica.mark == mark).then(|| replica.translated(Instant::now()))
    }

    /// Marks the connections of egress IPs that have moved to this node as just confirmed.
    pub fn touch(&self, now: Instant, comes: impl Fn(&IpAddr) -> bool) {
        let mut table = self.table();
        let coming = table.connections.values_mut().filter(|replica| comes(&replica.changed.address));
        coming.for_each(|replica| replica.confirmed = now);
    }

    /// Removes and returns the connections that have expired, and those that an active owner no longer repeats. For
    /// the egress IPs for which `owned` returns true, this node's own table replaces the owner's messages.
    pub fn prune(&self, now: Instant, owned: impl Fn(IpAddr) -> bool) -> Vec<Replica> {
        let mut table = self.table();
        table.last_message.retain(|_, at| *at + ACTIVE > now);
        let is_active = |from: &Mac| table.last_message.contains_key(from);
        let has_ended = |replica: &Replica| {
            let unconfirmed = replica.confirmed + UNCONFIRMED <= now;
            replica.expires <= now || unconfirmed && (owned(replica.changed.address) || is_active(&replica.from))
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
        if self.by_reply.get(&back) == Some(out) {
            self.by_reply.remove(&back);
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
    fn an_unconfirmed_connection_is_removed_only_while_its_owner_is_active() {
        let (replicas, begin) = (Replicas::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        replicas.put(OWNER, changed(1, 101), 7, 10_000, begin).unwrap();
        replicas.put(OTHER, changed(2, 102), 7, 10_000, begin).unwrap();
        replicas.put(OTHER, changed(3, 103), 7, 70, begin).unwrap();
        replicas.put(OWNER, changed(4, 104), 7, 10_000, at(59)).unwrap();
        assert_eq!(replicas.prune(at(59), |_| false), []);
        let pruned = replicas.prune(at(61), |_| false);
        assert_eq!(pruned.iter().map(|r| r.changed).collect::<Vec<_>>(), [changed(1, 101)], "its owner is active");
        let pruned = replicas.prune(at(71), |_| false);
        assert_eq!(pruned.iter().map(|r| r.changed).collect::<Vec<_>>(), [changed(3, 103)], "it has expired");
        assert_eq!(replicas.len(), 2);
        replicas.touch(at(100), |_| true);
        assert_eq!(replicas.prune(at(159), |_| true), [], "this node has just become the owner");
        assert_eq!(replicas.prune(at(160), |_| true).len(), 2, "what this node owns is in the kernel's table");
        assert_eq!((replicas.len(), replicas.table().by_reply.len()), (0, 0));
    }

    #[test]
    fn the_newest_connection_has_the_reply_tuple_and_only_the_same_one_is_removed() {
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
        assert_eq!(replicas.translation_of(&changed(2, 0).out, 7).map(|wanted| wanted.port), Some(101));
        assert_eq!(replicas.translation_of(&changed(2, 0).out, 8), None, "no pod of this node's");
        assert!(replicas.take(&changed(2, 101)).is_some());
        assert_eq!((replicas.len(), replicas.table().by_reply.len()), (0, 0));
    }
}
