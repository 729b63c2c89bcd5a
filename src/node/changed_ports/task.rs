//! The replication thread's task: it reads the log of changed ports, and sends and receives messages.

use super::ReplicationMetrics;
use super::kept::OwnerNotices;
use super::message::{Changed, Message};
use super::owned::{Owned, Recorded};
use super::replicas::Replicas;
use super::roles::Roles;
use crate::datapath::node_messages::NodeMessages;
use crate::datapath::port_log::{LogRead, PortLog};
use crate::model::marks::Marks;
use egret_nft::conntrack::{self, MarkFilter, Tracked, Tuple};
use egret_nft::netlink::{self, NETLINK_NETFILTER, Socket};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// The interval of the checks of owned connections, and the largest number in one interval. A check takes some 4 µs.
const TICK: Duration = Duration::from_millis(250);
const CHECKS: usize = 512;
/// Messages read in one batch, and the pause after a full batch. A pod can cause a changed port with each connection
/// that it opens, and must not keep a processor busy with it. Connections whose log messages are lost meanwhile are
/// found in the kernel's table.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// The kernel logs a connection's first packet just before it inserts the connection into its table, so a failed
/// lookup is repeated after this time.
const UNFOUND: Duration = Duration::from_millis(2);
const TRIES: u8 = 3;
/// The table is read again this long after an egress IP moved to this node: connections of this node's pods may have
/// been in the way.
const AGAIN: Duration = Duration::from_secs(2);
/// The shortest interval between two readings of the table because of lost log messages.
const OVERRUN: Duration = Duration::from_secs(10);
/// The interval at which replicas that have ended are removed.
const PRUNE: Duration = Duration::from_secs(5);
/// The shortest timeout that is sent, in seconds. The connection is sent again before that.
const SHORTEST: u32 = 60;

/// The task's state.
pub(super) struct Task {
    wanted: watch::Receiver<Arc<Roles>>,
    gone: mpsc::UnboundedReceiver<Vec<Tracked>>,
    pub(super) roles: Arc<Roles>,
    pub(super) marks: Marks,
    pub(super) metrics: ReplicationMetrics,
    pub(super) table: Socket,
    log: Option<PortLog>,
    pub(super) messages: Option<NodeMessages>,
    pub(super) owned: Owned,
    pub(super) replicas: Arc<Replicas>,
    pub(super) notices: OwnerNotices,
    /// Connections to send now, by receivers.
    outbox: BTreeMap<Arc<[Ipv6Addr]>, Vec<(Changed, u32)>>,
    /// Connections that were logged and not found yet, and how often they were looked up.
    unfound: Vec<(Tuple, u8)>,
    unfound_at: Option<Instant>,
    log_paused: Option<Instant>,
    /// When the kernel's table is to be read.
    read_at: BTreeSet<Instant>,
    overrun_at: Option<Instant>,
    pruned: Instant,
    pub(super) repeated: Option<Instant>,
    warned: bool,
    logged_error: Option<Instant>,
}

impl Task {
    pub(super) fn new(
        (wanted, gone): (watch::Receiver<Arc<Roles>>, mpsc::UnboundedReceiver<Vec<Tracked>>),
        replicas: Arc<Replicas>,
        marks: Marks,
        metrics: ReplicationMetrics,
    ) -> io::Result<Self> {
        Ok(Task {
            wanted,
            gone,
            roles: Arc::default(),
            marks,
            metrics,
            table: Socket::open(NETLINK_NETFILTER)?,
            log: None,
            messages: None,
            owned: Owned::default(),
            replicas,
            notices: OwnerNotices::default(),
            outbox: BTreeMap::new(),
            unfound: Vec::new(),
            unfound_at: None,
            log_paused: None,
            read_at: BTreeSet::new(),
            overrun_at: None,
            pruned: Instant::now(),
            repeated: None,
            warned: false,
            logged_error: None,
        })
    }

    /// Runs until the daemon ends.
    pub(super) async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let paused = self.log_paused.is_some_and(|until| until > Instant::now());
            let notices = self.notices.next();
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.change_roles(),
                    Err(_) => return,
                },
                result = log_readable(&self.log), if !paused => self.read_log(result),
                result = NodeMessages::readable(&self.messages) => self.receive_messages(result),
                () = sleep_until(self.unfound_at.unwrap_or_else(Instant::now)), if self.unfound_at.is_some() => {
                    self.retry_unfound();
                }
                () = sleep_until(self.log_paused.unwrap_or_else(Instant::now)), if paused => self.log_paused = None,
                Some(gone) = self.gone.recv() => self.schedule_gone(gone),
                () = sleep_until(notices.unwrap_or_else(Instant::now)), if notices.is_some() => {
                    self.change_roles_if_new();
                    self.notify_owners();
                }
                _ = tick.tick() => self.tick(),
            }
            self.flush();
        }
    }

    fn change_roles_if_new(&mut self) {
        if self.wanted.has_changed().unwrap_or_default() {
            self.change_roles();
        }
    }

    fn change_roles(&mut self) {
        let new = self.wanted.borrow_and_update().clone();
        let before = std::mem::replace(&mut self.roles, new);
        let now = Instant::now();
        if self.roles.addresses.keys().any(|a| self.roles.owns(a) && !before.owns(a)) {
            self.read_at.extend([now, now + AGAIN]);
            self.replicas.touch(now, |a| self.roles.owns(a) && !before.owns(a));
        }
        let roles = self.roles.clone();
        self.notices.change(&roles.owners, roles.mac, now);
        self.owned.keep(|address| roles.owns(&address));
        if (before.device, before.source) != (self.roles.device, self.roles.source) {
            self.messages = None;
        }
        self.open();
        self.read_if_due(now);
    }

    /// Opens the sockets that this node's roles need.
    fn open(&mut self) {
        let Some(source) = self.roles.source else {
            self.messages = None;
            return;
        };
        let is_member = !self.roles.addresses.is_empty();
        if !is_member && self.roles.owners.is_empty() {
            (self.messages, self.log) = (None, None);
            return;
        }
        let mut faults = Vec::new();
        if self.messages.is_none() {
            match NodeMessages::open(self.roles.device, source) {
                Ok(messages) => {
                    self.messages = Some(messages);
                    self.request_all();
                }
                Err(e) => faults.push(e),
            }
        }
        if !is_member {
            self.log = None;
        } else if self.log.is_none() {
            match PortLog::open() {
                Ok(log) => {
                    self.log = Some(log);
                    self.read_at.insert(Instant::now());
                }
                Err(e) => faults.push(e),
            }
        }
        if let (Some(fault), false) = (faults.first(), self.warned) {
            tracing::warn!("connections with a changed port break when their egress IP moves; trying again: {fault:#}");
        }
        self.warned = !faults.is_empty();
    }

    fn request_all(&self) {
        let members: BTreeSet<_> = self.roles.addresses.values().flat_map(|role| role.members.iter()).collect();
        for member in members {
            self.send(*member, &Message::Resend);
        }
    }

    fn send(&self, to: Ipv6Addr, message: &Message) {
        message.encode().iter().for_each(|bytes| self.send_bytes(to, bytes));
    }

    pub(super) fn send_bytes(&self, to: Ipv6Addr, bytes: &[u8]) {
        if let Some(messages) = &self.messages {
            // A message that cannot be sent is repeated later.
            let _ = messages.send(to, bytes);
        }
    }

    fn flush(&mut self) {
        for (members, connections) in std::mem::take(&mut self.outbox) {
            let message = Message::Replicate(connections);
            members.iter().for_each(|member| self.send(*member, &message));
        }
        self.metrics.owned.set(self.owned.len() as i64);
        self.metrics.replicas.set(self.replicas.len() as i64);
    }

    fn read_log(&mut self, result: io::Result<()>) {
        let mut result = result.map(|()| LogRead::Nothing);
        for _ in 0..AT_ONCE {
            let Some(log) = self.log.as_mut().filter(|_| result.is_ok()) else { break };
            result = log.read_next();
            match result {
                Ok(LogRead::Packet(leaving)) => self.find(leaving.reversed(), 0),
                Ok(LogRead::Lost) => {
                    self.metrics.overruns.inc();
                    let now = Instant::now();
                    let at = self.overrun_at.map_or(now, |before| now.max(before + OVERRUN));
                    self.overrun_at = Some(at);
                    self.read_at.insert(at);
                }
                Ok(LogRead::Nothing) => return,
                Err(_) => {}
            }
        }
        match result {
            Ok(_) => self.log_paused = Some(Instant::now() + PAUSE),
            Err(e) => {
                tracing::warn!("cannot read the log of changed ports: {e}");
                self.log = None;
            }
        }
    }

    /// Looks up the connection with this reply tuple in the kernel's table.
    fn find(&mut self, back: Tuple, tries: u8) {
        match conntrack::find_by_reply(&mut self.table, &back) {
            Ok(Some(tracked)) => self.record(&tracked),
            Ok(None) if tries < TRIES && self.unfound.len() < AT_ONCE => {
                self.unfound.push((back, tries + 1));
                self.unfound_at = self.unfound_at.or_else(|| Some(Instant::now() + UNFOUND));
            }
            Ok(None) => {}
            Err(e) => self.log_error(&e),
        }
    }

    fn retry_unfound(&mut self) {
        self.unfound_at = None;
        for (back, tries) in std::mem::take(&mut self.unfound) {
            self.find(back, tries);
        }
    }

    fn record(&mut self, tracked: &Tracked) {
        let Some(changed) = self.roles.replicated(tracked, self.marks) else { return };
        match self.owned.record(changed, Instant::now()) {
            Recorded::New => self.queue(changed, tracked.timeout),
            Recorded::Known => {}
            Recorded::NoRoom => drop(self.metrics.no_room.inc()),
        }
    }

    fn queue(&mut self, changed: Changed, timeout: u32) {
        if let Some(role) = self.roles.addresses.get(&changed.address) {
            self.outbox.entry(role.members.clone()).or_default().push((changed, timeout.max(SHORTEST)));
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.change_roles_if_new();
        self.open();
        self.read_if_due(now);
        self.check_owned(now);
        if self.pruned + PRUNE <= now {
            self.pruned = now;
            let roles = self.roles.clone();
            for replica in self.replicas.prune(now, |address| roles.owns(&address)) {
                self.drop_entry(&replica);
            }
        }
    }

    fn check_owned(&mut self, now: Instant) {
        let mut ended = Vec::new();
        for changed in self.owned.due(now, CHECKS) {
            match conntrack::find_by_original(&mut self.table, &changed.out) {
                Ok(Some(tracked)) if self.roles.replicated(&tracked, self.marks) == Some(changed) => {
                    if self.owned.lives(&changed.out, now) {
                        self.queue(changed, tracked.timeout);
                    }
                }
                Ok(_) => ended.push(changed),
                Err(e) => return self.log_error(&e),
            }
        }
        // If the roles have changed, an egress IP may have moved away. Its connections have not ended; the daemon
        // deleted their entries here.
        if self.wanted.has_changed().unwrap_or(true) {
            return;
        }
        ended.iter().for_each(|changed| self.owned.ended(&changed.out));
        let mut messages: BTreeMap<Arc<[Ipv6Addr]>, Vec<Changed>> = BTreeMap::new();
        for changed in self.owned.take_ended() {
            if let Some(role) = self.roles.addresses.get(&changed.address) {
                messages.entry(role.members.clone()).or_default().push(changed);
            }
        }
        for (members, ended) in messages {
            let message = Message::Ended(ended);
            members.iter().for_each(|member| self.send(*member, &message));
        }
    }

    /// Reads the kernel's table for connections whose log messages were lost.
    fn read_if_due(&mut self, now: Instant) {
        if self.read_at.first().is_none_or(|at| *at > now) {
            return;
        }
        self.read_at.retain(|at| *at > now);
        let marks = self.marks;
        let of_peers = MarkFilter { mark: marks.connection_of_peer(0), mask: marks.connection_kind_mask() };
        let of_pods = MarkFilter { mark: marks.connection(0), mask: marks.connection_of_allocation_mask() };
        for marked in [of_peers, of_pods] {
            match conntrack::list_tracked(&mut self.table, marked, Tracked::has_changed_port) {
                Ok(found) => found.iter().for_each(|tracked| self.record(tracked)),
                Err(e) => {
                    tracing::warn!("cannot list the connections with a changed port: {e:#}");
                }
            }
        }
    }

    /// Logs an error of connection tracking, at most once in 10 s. The next message about the connection tries again.
    pub(super) fn log_error(&mut self, error: &netlink::Error) {
        let now = Instant::now();
        if self.logged_error.is_none_or(|at| at + OVERRUN <= now) {
            self.logged_error = Some(now);
            tracing::warn!("cannot keep connections with a changed port in sync: {error}");
        }
    }
}

async fn log_readable(log: &Option<PortLog>) -> io::Result<()> {
    match log {
        Some(log) => log.readable().await,
        None => std::future::pending().await,
    }
}
