//! Connections of egress IPs that have moved to this node or away from it.
//!
//! A connection's first packet determines its address translation. On the owner, a local pod's connection is
//! translated to the egress IP; on other nodes it is not translated. If the entry stayed when the egress IP moves,
//! packets would have the wrong source address and be dropped. After its deletion, the next packet creates an entry
//! with the right translation. On a gateway node that has given up an egress IP, entries would be out of date if the
//! egress IP returned.

use crate::api::AddressPair;
use crate::model::marks::{EgressId, Marks};
use crate::node::changed_ports::{ChangedPorts, kept_port};
use crate::node::ended;
use crate::node_plan::allocations::AllocationState;
use crate::node_plan::{View, addresses};
use anyhow::Result;
use egret_nft::conntrack::{self, Connection, EntryAction, MarkFilter, Tracked, Translated, Tuple};
use egret_nft::netlink::Socket;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Serialises the cleaning jobs. Of two concurrent ones, the older could insert its outdated entries last.
#[derive(Clone, Debug, Default)]
pub struct CleaningQueue(Arc<QueueState>);

#[derive(Debug, Default)]
struct QueueState {
    cleaning: Mutex<()>,
    /// The number of the newest job. It supersedes all jobs before it.
    newest: AtomicU64,
}

impl CleaningQueue {
    /// Wraps `work` so that it waits for the running job, and does nothing if a newer one is queued by then.
    fn enqueue<W: FnOnce(&mut Socket) -> Result<usize>>(
        &self,
        work: W,
    ) -> impl FnOnce(&mut Socket) -> Result<usize> + use<W> {
        let state = self.0.clone();
        let number = state.newest.fetch_add(1, Ordering::SeqCst) + 1;
        move |socket| {
            let _guard = state.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
            if state.newest.load(Ordering::SeqCst) == number { work(socket) } else { Ok(0) }
        }
    }
}

/// How the connections in the kernel's table must be translated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// For each allocation that is ready, whether this node is the owner.
    local: BTreeMap<EgressId, bool>,
    /// Each allocation's egress IP.
    egress: BTreeMap<EgressId, AddressPair>,
    /// The egress IPs of other nodes' connections through this node.
    served: BTreeSet<IpAddr>,
}

impl Moved {
    /// The present translation, where the egress IPs of the allocations `here` are on this node.
    pub fn new(view: &View, here: &BTreeSet<EgressId>) -> Self {
        let allocations = &view.allocations.allocations;
        let local = allocations.iter().filter_map(|(id, allocation)| match allocation.state {
            AllocationState::Local => Some((*id, true)),
            AllocationState::Remote(_) => Some((*id, false)),
            AllocationState::Unready(_) => None,
        });
        let served = allocations.iter().filter(|(id, allocation)| {
            allocation.is_member() && (allocation.state == AllocationState::Local || here.contains(*id))
        });
        Moved {
            local: local.collect(),
            egress: allocations.iter().map(|(id, allocation)| (*id, allocation.address.clone())).collect(),
            served: served.flat_map(|(_, allocation)| addresses(allocation)).collect(),
        }
    }

    /// The allocations that this node owns.
    pub fn local(&self) -> BTreeSet<EgressId> {
        self.local.iter().filter(|(_, local)| **local).map(|(id, _)| *id).collect()
    }

    /// Whether this node owned the allocation.
    pub fn was_local(&self, allocation: EgressId) -> bool {
        self.local.get(&allocation) == Some(&true)
    }

    /// Whether the table may contain connections with the wrong translation.
    pub fn needs_cleaning(&self, before: &Moved) -> bool {
        let changed = |(id, local): (&EgressId, &bool)| before.local.get(id) != Some(local);
        self.local.iter().any(changed) || before.served.iter().any(|a| !self.served.contains(a))
    }

    /// Deletes or replaces the entries with the wrong translation, in the background, because the table may be large.
    /// Replies in flight to pods' connections on `handed_over` allocations are admitted. Replicated connections with
    /// a changed port stay. A local pod's replicated connection gets its changed port when its egress IP moves to
    /// this node. Other connections keep their pod's port: on this node at once, and on the new owner, to which they
    /// are sent.
    pub fn clean(self, marks: Marks, handed_over: BTreeSet<EgressId>, ports: &ChangedPorts, queue: &CleaningQueue) {
        let (replicas, next_owners) = (ports.replicas(), ports.gone());
        let of_allocation = marks.connection_of_allocation_mask();
        let in_flight = MarkFilter { mark: marks.handed(0), mask: of_allocation };
        let pods = MarkFilter { mark: marks.connection(0), mask: of_allocation };
        let peers = MarkFilter { mark: marks.connection_of_peer(0), mask: marks.connection_kind_mask() };
        let clean = queue.enqueue(move |socket| {
            let allocation = |c: &Connection| (c.mark & marks.egress_id_mask()) as EgressId;
            let is_wrong = |allocation, translated| self.is_wrong(allocation, translated);
            let (kept, gone) = self.kept(socket, marks)?;
            // First the entries for replies in flight: if an egress IP moves back at once, they conflict with the
            // entries that replace the connections.
            conntrack::delete(socket, in_flight, |c| is_wrong(allocation(c), c.destination == c.reply_source))?;
            let of_pods = conntrack::update_entries(socket, pods, |c| {
                let id = allocation(c);
                if !is_wrong(id, c.reply_destination != c.source) {
                    return EntryAction::Keep;
                }
                let in_flight = handed_over.contains(&id).then(|| marks.handed(id));
                let comes = self.local.get(&id) == Some(&true);
                let replacement = c.out.and_then(|out| {
                    let replicated = comes.then(|| replicas.translation_of(&out, marks.connection(id))).flatten();
                    replicated.or_else(|| kept.get(&out).copied())
                });
                match (replacement, in_flight) {
                    (Some(replacement), in_flight) => EntryAction::Replace(replacement, in_flight),
                    (None, Some(mark)) => EntryAction::DeleteAdmittingReplies(mark),
                    (None, None) => EntryAction::Delete,
                }
            })?;
            if !gone.is_empty() {
                // Only now: from then on the new owner translates the servers' replies. Without a receiver the daemon
                // is ending.
                let _ = next_owners.send(gone);
            }
            let is_replicated = |c: &Connection| c.out.is_some_and(|out| replicas.has(&out, c.reply_destination));
            let of_peers =
                conntrack::delete(socket, peers, |c| !self.served.contains(&c.reply_destination) && !is_replicated(c))?;
            Ok(of_pods + of_peers)
        });
        ended::in_background("deleted or replaced connections of moved egress IPs", clean);
    }

    fn is_wrong(&self, allocation: EgressId, translated: bool) -> bool {
        self.local.get(&allocation).is_some_and(|local| *local != translated)
    }

    /// The connections of this node's pods with the wrong translation that kept their port. Returns their
    /// replacements, translated to the egress IP if it has moved to this node and untranslated otherwise, and the
    /// entries of those whose egress IP has moved away.
    fn kept(&self, socket: &mut Socket, marks: Marks) -> Result<(HashMap<Tuple, Translated>, Vec<Tracked>)> {
        let pods = MarkFilter { mark: marks.connection(0), mask: marks.connection_of_allocation_mask() };
        let allocation = |tracked: &Tracked| (tracked.mark & marks.egress_id_mask()) as EgressId;
        let port = |tracked: &Tracked| kept_port(tracked, self.egress.get(&allocation(tracked))?);
        let is_kept = |tracked: &Tracked| {
            self.is_wrong(allocation(tracked), tracked.back.destination != tracked.out.source)
                && port(tracked).is_some()
        };
        let moved = conntrack::list_tracked(socket, pods, is_kept)?;
        let comes = |tracked: &Tracked| self.local.get(&allocation(tracked)) == Some(&true);
        let replacement = |tracked: &Tracked| {
            // A connection to a Service cannot be replaced, because the choice of a server cannot be repeated.
            let (out, address) = port(tracked).filter(|(out, _)| *out == tracked.out)?;
            let address = if comes(tracked) { address } else { out.source };
            let (mark, timeout) = (marks.connection(allocation(tracked)), tracked.timeout.max(1));
            Some((out, Translated { out, address, port: out.ports[0], mark, timeout }))
        };
        let replacements = moved.iter().filter_map(replacement).collect();
        Ok((replacements, moved.into_iter().filter(|tracked| !comes(tracked)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use egret_nft::netlink::NETLINK_NETFILTER;
    use std::cell::RefCell;

    #[test]
    fn only_the_newest_job_cleans() {
        let (queue, done) = (CleaningQueue::default(), RefCell::new(Vec::new()));
        let work = |number: u32| {
            let done = &done;
            queue.enqueue(move |_| {
                done.borrow_mut().push(number);
                Ok(1)
            })
        };
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        let (first, second) = (work(1), work(2));
        assert_eq!((first(&mut socket).unwrap(), second(&mut socket).unwrap()), (0, 1));
        assert_eq!(work(3)(&mut socket).unwrap(), 1);
        assert_eq!(*done.borrow(), [2, 3]);
    }
}
