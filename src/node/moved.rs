//! Connections of allocations that have come to this node or gone from it, while the kernel still tracks them as
//! before.
//!
//! A connection's address translation is settled by its first packet. On the node that owns its allocation a pod's
//! connection gets the allocation's address; on any other, none. Left in the table when the allocation moves, it
//! would leave with the wrong address, and be dropped for it; once forgotten, its next packet makes the kernel pick
//! it up anew. On a gateway that has given an address up, what it knows of a connection is out of date should the
//! address come back.

use crate::api::AddressPair;
use crate::kernel::conntrack::{self, Connection, EntryAction, MarkFilter, Tracked, Translated, Tuple};
use crate::kernel::netlink::Socket;
use crate::model::marks::{EgressId, Marks};
use crate::node::changed_ports::{ChangedPorts, kept_port};
use crate::node::ended;
use crate::node_plan::allocations::AllocationState;
use crate::node_plan::{View, addresses};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Who cleans the kernel's table, one after the other. Two at a time would each make entries by what it knows, and
/// the older one's could be the last.
#[derive(Clone, Debug, Default)]
pub struct Turns(Arc<Turn>);

#[derive(Debug, Default)]
struct Turn {
    cleaning: Mutex<()>,
    /// The number of the newest one. It does what all before it were to do.
    newest: AtomicU64,
}

impl Turns {
    /// What does the work when its turn comes, unless a newer one has come by then.
    fn next<W: FnOnce(&mut Socket) -> Result<usize>>(
        &self,
        work: W,
    ) -> impl FnOnce(&mut Socket) -> Result<usize> + use<W> {
        let turn = self.0.clone();
        let number = turn.newest.fetch_add(1, Ordering::SeqCst) + 1;
        move |socket| {
            let _turn = turn.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
            if turn.newest.load(Ordering::SeqCst) == number { work(socket) } else { Ok(0) }
        }
    }
}

/// What the connections in the kernel's table are to be like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Whether each allocation that is ready leaves from this node.
    local: BTreeMap<EgressId, bool>,
    /// Each allocation's address.
    egress: BTreeMap<EgressId, AddressPair>,
    /// The addresses that other nodes' connections leave from here.
    served: BTreeSet<IpAddr>,
}

impl Moved {
    /// As the kernel is now: these allocations' addresses are on this node.
    pub fn new(view: &View, here: &BTreeSet<EgressId>) -> Self {
        let allocations = &view.allocations.allocations;
        let local = allocations.iter().filter_map(|(id, allocation)| match allocation.state {
            AllocationState::Local => Some((*id, true)),
            AllocationState::Remote(_) => Some((*id, false)),
            AllocationState::Unready(_) => None,
        });
        let served = allocations.iter().filter(|(id, allocation)| {
            allocation.member && (allocation.state == AllocationState::Local || here.contains(*id))
        });
        Moved {
            local: local.collect(),
            egress: allocations.iter().map(|(id, allocation)| (*id, allocation.address.clone())).collect(),
            served: served.flat_map(|(_, allocation)| addresses(allocation)).collect(),
        }
    }

    /// The allocations that leave from this node.
    pub fn local(&self) -> BTreeSet<EgressId> {
        self.local.iter().filter(|(_, local)| **local).map(|(id, _)| *id).collect()
    }

    /// Whether the allocation left from this node.
    pub fn was_local(&self, allocation: EgressId) -> bool {
        self.local.get(&allocation) == Some(&true)
    }

    /// Whether the table may hold connections that are no longer as they should be.
    pub fn needs_cleaning(&self, before: &Moved) -> bool {
        let changed = |(id, local): (&EgressId, &bool)| before.local.get(id) != Some(local);
        self.local.iter().any(changed) || before.served.iter().any(|a| !self.served.contains(a))
    }

    /// Takes what is not as it should be out of the kernel's table, in the background: it may be large. For pods'
    /// connections on `handed_over` allocations, what servers have sent already is let in. What other nodes have told
    /// of, whose port was changed, stays; of a pod of this node's, whose allocation has come here, it gets the same
    /// port. Another one keeps its pod's port: here at once, and on the next owner, which is told of it.
    pub fn clean(self, marks: Marks, handed_over: BTreeSet<EgressId>, ports: &ChangedPorts, turns: &Turns) {
        let (replicas, next_owners) = (ports.replicas(), ports.gone());
        let of_allocation = marks.connection_of_allocation_mask();
        let late = MarkFilter { mark: marks.handed(0), mask: of_allocation };
        let pods = MarkFilter { mark: marks.connection(0), mask: of_allocation };
        let peers = MarkFilter { mark: marks.connection_of_peer(0), mask: marks.connection_kind_mask() };
        let clean = turns.next(move |socket| {
            let allocation = |c: &Connection| (c.mark & marks.allocation_mask()) as EgressId;
            let is_wrong = |allocation, translated| self.is_wrong(allocation, translated);
            let (kept, gone) = self.kept(socket, marks)?;
            // First: of an allocation that is moved back at once, they are in the way of what takes their place.
            conntrack::delete(socket, late, |c| is_wrong(allocation(c), c.destination == c.reply_source))?;
            let of_pods = conntrack::update_entries(socket, pods, |c| {
                let id = allocation(c);
                if !is_wrong(id, c.reply_destination != c.source) {
                    return EntryAction::Keep;
                }
                let late = handed_over.contains(&id).then(|| marks.handed(id));
                let comes = self.local.get(&id) == Some(&true);
                let heir = c.out.and_then(|out| {
                    let told = comes.then(|| replicas.translation_of(&out, marks.connection(id))).flatten();
                    told.or_else(|| kept.get(&out).copied())
                });
                match (heir, late) {
                    (Some(heir), late) => EntryAction::Replace(heir, late),
                    (None, Some(mark)) => EntryAction::DeleteAdmittingReplies(mark),
                    (None, None) => EntryAction::Delete,
                }
            })?;
            if !gone.is_empty() {
                // Only now: what servers send comes as the next owner translates it from then on. While the daemon
                // ends nobody hears of them.
                let _ = next_owners.send(gone);
            }
            let is_told = |c: &Connection| c.out.is_some_and(|out| replicas.has(&out, c.reply_destination));
            let of_peers =
                conntrack::delete(socket, peers, |c| !self.served.contains(&c.reply_destination) && !is_told(c))?;
            Ok(of_pods + of_peers)
        });
        ended::in_background("connections of allocations that have moved are picked up anew", clean);
    }

    fn is_wrong(&self, allocation: EgressId, translated: bool) -> bool {
        self.local.get(&allocation).is_some_and(|local| *local != translated)
    }

    /// Connections of this node's pods that have their pod's port: as they are to be, with the allocation's address
    /// where their allocation has come here, else without translation; and as they were where it has gone.
    fn kept(&self, socket: &mut Socket, marks: Marks) -> Result<(HashMap<Tuple, Translated>, Vec<Tracked>)> {
        let pods = MarkFilter { mark: marks.connection(0), mask: marks.connection_of_allocation_mask() };
        let allocation = |tracked: &Tracked| (tracked.mark & marks.allocation_mask()) as EgressId;
        let port = |tracked: &Tracked| kept_port(tracked, self.egress.get(&allocation(tracked))?);
        let is_kept = |tracked: &Tracked| {
            self.is_wrong(allocation(tracked), tracked.back.destination != tracked.out.source)
                && port(tracked).is_some()
        };
        let moved = conntrack::list_tracked(socket, pods, is_kept)?;
        let comes = |tracked: &Tracked| self.local.get(&allocation(tracked)) == Some(&true);
        let heir = |tracked: &Tracked| {
            // A Service's choice of a server cannot be made again.
            let (out, address) = port(tracked).filter(|(out, _)| *out == tracked.out)?;
            let address = if comes(tracked) { address } else { out.source };
            let (mark, timeout) = (marks.connection(allocation(tracked)), tracked.timeout.max(1));
            Some((out, Translated { out, address, port: out.ports[0], mark, timeout }))
        };
        let heirs = moved.iter().filter_map(heir).collect();
        Ok((heirs, moved.into_iter().filter(|tracked| !comes(tracked)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::NETLINK_NETFILTER;
    use std::cell::RefCell;

    #[test]
    fn only_the_newest_cleans() {
        let (turns, done) = (Turns::default(), RefCell::new(Vec::new()));
        let work = |number: u32| {
            let done = &done;
            turns.next(move |_| {
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
