//! Received messages, and their effect on the kernel's connection tracking.

use super::message::{Changed, Message};
use super::replicas::Replica;
use super::task::Task;
use egret_nft::conntrack::{self, Insertion, Tracked};
use egret_nft::mac::Mac;
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// The shortest interval between two responses to requests for all connections.
const RESEND: Duration = Duration::from_secs(1);
/// The longest timeout of a connection, in seconds: the kernel's default for TCP
/// (`net.netfilter.nf_conntrack_tcp_timeout_established`).
pub(super) const LONGEST: u32 = 432_000;

impl Task {
    pub(super) fn receive_messages(&mut self, ready: io::Result<()>) {
        let Some(messages) = &self.messages else { return };
        match ready.and_then(|()| messages.received(Message::decode)) {
            Ok(received) => received.into_iter().for_each(|(from, message)| self.handle(from, message)),
            Err(e) => {
                tracing::warn!("cannot receive other nodes' messages about changed ports: {e}");
                self.messages = None;
            }
        }
    }

    fn handle(&mut self, from: Mac, message: Message) {
        let now = Instant::now();
        match message {
            Message::Replicate(connections) => {
                connections.into_iter().for_each(|(changed, seconds)| self.replicate(from, changed, seconds, now));
            }
            Message::Kept(connections) => {
                connections.into_iter().for_each(|(changed, seconds)| self.insert_kept(from, changed, seconds));
            }
            Message::Ended(connections) => connections.iter().for_each(|changed| self.end(from, changed)),
            Message::Resend => {
                let known = self.roles.peers.contains_key(&from);
                if known && self.repeated.is_none_or(|at| at + RESEND <= now) {
                    self.repeated = Some(now);
                    self.owned.repeat_all(now);
                }
            }
        }
    }

    fn replicate(&mut self, from: Mac, changed: Changed, seconds: u32, now: Instant) {
        let Some(mark) = self.roles.mark(from, &changed, self.marks) else { return };
        let Some((replica, rival)) = self.replicas.put(from, changed, mark, seconds.min(LONGEST), now) else {
            self.metrics.no_room.inc();
            return;
        };
        if let Some(rival) = rival {
            self.drop_entry(&rival);
        }
        let (is_here, owns) = (changed.source_node == self.roles.mac, self.roles.owns(&changed.address));
        if is_here && !owns {
            // The pod runs here. Its entry sends it through the tunnel until the egress IP moves to this node.
            return;
        }
        let there = owns.then(|| conntrack::find_by_original(&mut self.table, &changed.out).ok().flatten()).flatten();
        if there.is_some_and(|there| there.back == replica.back()) {
            // This node has just become the owner, and the connection already has its entry.
            return;
        }
        let marks = self.marks;
        // An entry of a connection that another node owns is older than the message. The entry that sends a local pod
        // through the tunnel ends when the egress IP moves to this node.
        let gives_place = |there: &Tracked| match is_here {
            true => there.mark == mark && there.back == there.out.reversed(),
            false => there.mark & marks.connection_kind_mask() == marks.connection_of_peer(0),
        };
        match conntrack::insert_or_update(&mut self.table, &replica.translated(now), gives_place) {
            Ok(Insertion::Present) => {}
            Ok(Insertion::Conflict) => drop(self.metrics.taken.inc()),
            Err(e) => self.log_error(&e),
        }
    }

    fn end(&mut self, from: Mac, changed: &Changed) {
        // The present owner does not let a former owner end a connection.
        let counts = !self.roles.owns(&changed.address) && self.roles.mark(from, changed, self.marks).is_some();
        if let Some(replica) = counts.then(|| self.replicas.take(changed)).flatten() {
            self.drop_entry(&replica);
        }
    }

    /// Deletes the entry of a connection that has ended from the kernel's table. Entries of egress IPs that this node
    /// owns, and of this node's pods, stay.
    pub(super) fn drop_entry(&mut self, replica: &Replica) {
        let changed = &replica.changed;
        if self.roles.owns(&changed.address) || changed.source_node == self.roles.mac {
            return;
        }
        let (kind, of_peer) = (self.marks.connection_kind_mask(), self.marks.connection_of_peer(0));
        let is_it = |there: &Tracked| there.mark & kind == of_peer && there.back == replica.back();
        if let Err(e) = conntrack::delete_one(&mut self.table, &changed.out, is_it) {
            self.log_error(&e);
        }
    }
}
