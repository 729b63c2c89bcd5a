//! What other nodes tell, and what becomes of it in the kernel's table.

use super::message::{Changed, Message};
use super::replicas::Replica;
use super::task::{AT_ONCE, Task};
use crate::kernel::conntrack::{self, Insertion, Tracked};
use crate::model::mac::Mac;
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// Everything is told anew to who asks for it at most this often.
const ASKED: Duration = Duration::from_secs(1);
/// The longest that a connection is kept for, in seconds: the kernel's default for TCP
/// (`net.netfilter.nf_conntrack_tcp_timeout_established`).
pub(super) const LONGEST: u32 = 432_000;

impl Task {
    pub(super) fn hear_messages(&mut self, ready: io::Result<()>) {
        let mut heard = ready.map(|()| None);
        for _ in 0..AT_ONCE {
            let Some(messages) = self.messages.as_ref().filter(|_| heard.is_ok()) else { break };
            heard = messages.next();
            match &heard {
                Ok(Some((from, bytes))) => {
                    if let Some(message) = Message::decode(bytes) {
                        self.hear(*from, message);
                    }
                }
                Ok(None) => return,
                Err(_) => {}
            }
        }
        if let Err(e) = heard {
            tracing::warn!("what other nodes tell of changed ports cannot be heard: {e}");
            self.messages = None;
        }
    }

    fn hear(&mut self, from: Mac, message: Message) {
        let now = Instant::now();
        match message {
            Message::Hold(connections) => {
                connections.into_iter().for_each(|(changed, seconds)| self.hold(from, changed, seconds, now));
            }
            Message::Kept(connections) => {
                connections.into_iter().for_each(|(changed, seconds)| self.hold_kept(from, changed, seconds));
            }
            Message::Forget(connections) => connections.iter().for_each(|changed| self.forget(from, changed)),
            Message::Tell => {
                let known = self.roles.peers.contains_key(&from);
                if known && self.repeated.is_none_or(|at| at + ASKED <= now) {
                    self.repeated = Some(now);
                    self.owned.repeat_all(now);
                }
            }
        }
    }

    fn hold(&mut self, from: Mac, changed: Changed, seconds: u32, now: Instant) {
        let Some(mark) = self.roles.mark(from, &changed, self.marks) else { return };
        let Some((replica, rival)) = self.replicas.put(from, changed, mark, seconds.min(LONGEST), now) else {
            self.figures.no_room.inc();
            return;
        };
        if let Some(rival) = rival {
            self.drop_entry(&rival);
        }
        let (is_here, owns) = (changed.source_node == self.roles.mac, self.roles.owns(&changed.address));
        if is_here && !owns {
            // A pod of this node's: it goes through the tunnel by an entry of its own, until its allocation comes here.
            return;
        }
        let there = owns.then(|| conntrack::find_by_original(&mut self.table, &changed.out).ok().flatten()).flatten();
        if there.is_some_and(|there| there.back == replica.back()) {
            // This node has just become the owner, and the connection goes through it already.
            return;
        }
        let marks = self.marks;
        // What this node knows of a connection that another one owns is older; and a pod's own way through the tunnel ends
        // when its allocation comes here.
        let gives_place = |there: &Tracked| match is_here {
            true => there.mark == mark && there.back == there.out.reversed(),
            false => there.mark & marks.connection_kind_mask() == marks.connection_of_peer(0),
        };
        match conntrack::insert_or_update(&mut self.table, &replica.translated(now), gives_place) {
            Ok(Insertion::Present) => {}
            Ok(Insertion::Conflict) => drop(self.figures.taken.inc()),
            Err(e) => self.complain(&e),
        }
    }

    fn forget(&mut self, from: Mac, changed: &Changed) {
        // Who owns it now does not let the owner before have it ended.
        let counts = !self.roles.owns(&changed.address) && self.roles.mark(from, changed, self.marks).is_some();
        if let Some(replica) = counts.then(|| self.replicas.take(changed)).flatten() {
            self.drop_entry(&replica);
        }
    }

    /// Takes the entry of a connection that has ended out of the kernel's table. An owner's are its own, and so are those
    /// of this node's pods.
    pub(super) fn drop_entry(&mut self, replica: &Replica) {
        let changed = &replica.changed;
        if self.roles.owns(&changed.address) || changed.source_node == self.roles.mac {
            return;
        }
        let (kind, of_peer) = (self.marks.connection_kind_mask(), self.marks.connection_of_peer(0));
        let is_it = |there: &Tracked| there.mark & kind == of_peer && there.back == replica.back();
        if let Err(e) = conntrack::delete_one(&mut self.table, &changed.out, is_it) {
            self.complain(&e);
        }
    }
}
