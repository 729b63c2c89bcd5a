//! The thread that hears of connections and tells of them.

use super::Figures;
use super::kept::Telling;
use super::message::{Changed, Message};
use super::owned::{Noted, Owned};
use super::replicas::Replicas;
use super::roles::Roles;
use crate::datapath::node_messages::NodeMessages;
use crate::datapath::port_log::{Heard, PortLog};
use crate::kernel::conntrack::{self, MarkFilter, Tracked, Tuple};
use crate::kernel::netlink::{self, NETLINK_NETFILTER, Socket};
use crate::model::marks::Marks;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Whether connections live on is looked at this often, and at so many of them at most: each takes some 4 µs.
const TICK: Duration = Duration::from_millis(250);
const LOOKS: usize = 512;
/// As much is heard at once, and then nothing for a moment: a pod can have as many ports changed as it can open connections,
/// and must not keep a processor busy with it. What the kernel cannot tell meanwhile is found in its table.
pub(super) const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// The kernel logs a connection's first packet just before the connection is in its table.
const UNFOUND: Duration = Duration::from_millis(2);
const TRIES: u8 = 3;
/// The table is read again this long after an address came here: connections of this node's pods may have been in the way.
const AGAIN: Duration = Duration::from_secs(2);
/// At most this often because the kernel could not tell all.
const OVERRUN: Duration = Duration::from_secs(10);
/// What others do not tell of any more is looked for this often.
const PRUNE: Duration = Duration::from_secs(5);
/// Others keep a connection for no less than this, in seconds: the next word of it comes before.
const SHORTEST: u32 = 60;

/// See the module.
pub(super) struct Task {
    wanted: watch::Receiver<Arc<Roles>>,
    gone: mpsc::UnboundedReceiver<Vec<Tracked>>,
    pub(super) roles: Arc<Roles>,
    pub(super) marks: Marks,
    pub(super) figures: Figures,
    pub(super) table: Socket,
    log: Option<PortLog>,
    pub(super) messages: Option<NodeMessages>,
    pub(super) owned: Owned,
    pub(super) replicas: Arc<Replicas>,
    pub(super) telling: Telling,
    /// What is to be told now, by whom it is told to.
    outbox: BTreeMap<Arc<[Ipv6Addr]>, Vec<(Changed, u32)>>,
    /// Connections that were logged and not found yet, and how often they were looked for.
    unfound: Vec<(Tuple, u8)>,
    unfound_at: Option<Instant>,
    log_paused: Option<Instant>,
    /// When the kernel's table is read.
    read_at: BTreeSet<Instant>,
    overrun_at: Option<Instant>,
    pruned: Instant,
    pub(super) repeated: Option<Instant>,
    warned: bool,
    complained: Option<Instant>,
}

impl Task {
    pub(super) fn new(
        (wanted, gone): (watch::Receiver<Arc<Roles>>, mpsc::UnboundedReceiver<Vec<Tracked>>),
        replicas: Arc<Replicas>,
        marks: Marks,
        figures: Figures,
    ) -> io::Result<Self> {
        Ok(Task {
            wanted,
            gone,
            roles: Arc::default(),
            marks,
            figures,
            table: Socket::open(NETLINK_NETFILTER)?,
            log: None,
            messages: None,
            owned: Owned::default(),
            replicas,
            telling: Telling::default(),
            outbox: BTreeMap::new(),
            unfound: Vec::new(),
            unfound_at: None,
            log_paused: None,
            read_at: BTreeSet::new(),
            overrun_at: None,
            pruned: Instant::now(),
            repeated: None,
            warned: false,
            complained: None,
        })
    }

    /// Runs until the daemon ends.
    pub(super) async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let paused = self.log_paused.is_some_and(|until| until > Instant::now());
            let telling = self.telling.next();
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.change_roles(),
                    Err(_) => return,
                },
                result = heard_log(&self.log), if !paused => self.hear_log(result),
                result = heard_messages(&self.messages) => self.hear_messages(result),
                () = sleep_until(self.unfound_at.unwrap_or_else(Instant::now)), if self.unfound_at.is_some() => {
                    self.look_for_unfound();
                }
                () = sleep_until(self.log_paused.unwrap_or_else(Instant::now)), if paused => self.log_paused = None,
                Some(gone) = self.gone.recv() => self.hear_gone(gone),
                () = sleep_until(telling.unwrap_or_else(Instant::now)), if telling.is_some() => {
                    self.change_roles_if_new();
                    self.tell_next_owners();
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
        self.telling.change(&roles.holders, roles.mac, now);
        self.owned.keep(|address| roles.owns(&address));
        if (before.device, before.asking) != (self.roles.device, self.roles.asking) {
            self.messages = None;
        }
        self.open();
        self.read_if_due(now);
    }

    /// Opens what this node's part needs and is not open.
    fn open(&mut self) {
        let Some(source) = self.roles.asking else {
            self.messages = None;
            return;
        };
        let is_member = !self.roles.addresses.is_empty();
        if !is_member && self.roles.holders.is_empty() {
            (self.messages, self.log) = (None, None);
            return;
        }
        let mut faults = Vec::new();
        if self.messages.is_none() {
            match NodeMessages::open(self.roles.device, source) {
                Ok(messages) => {
                    self.messages = Some(messages);
                    self.ask_for_all();
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
            tracing::warn!("sessions whose port is changed break when their allocation moves; trying again: {fault:#}");
        }
        self.warned = !faults.is_empty();
    }

    fn ask_for_all(&self) {
        let members: BTreeSet<_> = self.roles.addresses.values().flat_map(|role| role.members.iter()).collect();
        for member in members {
            self.send(*member, &Message::Tell);
        }
    }

    fn send(&self, to: Ipv6Addr, message: &Message) {
        message.encode().iter().for_each(|bytes| self.send_bytes(to, bytes));
    }

    pub(super) fn send_bytes(&self, to: Ipv6Addr, bytes: &[u8]) {
        if let Some(messages) = &self.messages {
            // What this host cannot send is told again.
            let _ = messages.send(to, bytes);
        }
    }

    fn flush(&mut self) {
        for (members, connections) in std::mem::take(&mut self.outbox) {
            let message = Message::Hold(connections);
            members.iter().for_each(|member| self.send(*member, &message));
        }
        self.figures.owned.set(self.owned.len() as i64);
        self.figures.replicas.set(self.replicas.len() as i64);
    }

    fn hear_log(&mut self, result: io::Result<()>) {
        let mut result = result.map(|()| Heard::Nothing);
        for _ in 0..AT_ONCE {
            let Some(log) = self.log.as_mut().filter(|_| result.is_ok()) else { break };
            result = log.take();
            match result {
                Ok(Heard::Packet(leaving)) => self.find(leaving.reversed(), 0),
                Ok(Heard::Lost) => {
                    self.figures.overruns.inc();
                    let now = Instant::now();
                    let at = self.overrun_at.map_or(now, |before| now.max(before + OVERRUN));
                    self.overrun_at = Some(at);
                    self.read_at.insert(at);
                }
                Ok(Heard::Nothing) => return,
                Err(_) => {}
            }
        }
        match result {
            Ok(_) => self.log_paused = Some(Instant::now() + PAUSE),
            Err(e) => {
                tracing::warn!("it cannot be heard which connections' ports are changed: {e}");
                self.log = None;
            }
        }
    }

    /// Finds the connection with these answers in the kernel's table.
    fn find(&mut self, back: Tuple, tries: u8) {
        match conntrack::find_by_reply(&mut self.table, &back) {
            Ok(Some(tracked)) => self.note(&tracked),
            Ok(None) if tries < TRIES && self.unfound.len() < AT_ONCE => {
                self.unfound.push((back, tries + 1));
                self.unfound_at = self.unfound_at.or_else(|| Some(Instant::now() + UNFOUND));
            }
            Ok(None) => {}
            Err(e) => self.complain(&e),
        }
    }

    fn look_for_unfound(&mut self) {
        self.unfound_at = None;
        for (back, tries) in std::mem::take(&mut self.unfound) {
            self.find(back, tries);
        }
    }

    fn note(&mut self, tracked: &Tracked) {
        let Some(changed) = self.roles.told(tracked, self.marks) else { return };
        match self.owned.note(changed, Instant::now()) {
            Noted::New => self.tell(changed, tracked.timeout),
            Noted::Known => {}
            Noted::NoRoom => drop(self.figures.no_room.inc()),
        }
    }

    fn tell(&mut self, changed: Changed, timeout: u32) {
        if let Some(role) = self.roles.addresses.get(&changed.address) {
            self.outbox.entry(role.members.clone()).or_default().push((changed, timeout.max(SHORTEST)));
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.change_roles_if_new();
        self.open();
        self.read_if_due(now);
        self.look_at_owned(now);
        if self.pruned + PRUNE <= now {
            self.pruned = now;
            let roles = self.roles.clone();
            for replica in self.replicas.prune(now, |address| roles.owns(&address)) {
                self.drop_entry(&replica);
            }
        }
    }

    fn look_at_owned(&mut self, now: Instant) {
        let mut ended = Vec::new();
        for changed in self.owned.due(now, LOOKS) {
            match conntrack::find_by_original(&mut self.table, &changed.out) {
                Ok(Some(tracked)) if self.roles.told(&tracked, self.marks) == Some(changed) => {
                    if self.owned.lives(&changed.out, now) {
                        self.tell(changed, tracked.timeout);
                    }
                }
                Ok(_) => ended.push(changed),
                Err(e) => return self.complain(&e),
            }
        }
        // The connections of an egress IP that has just gone from here have not ended: they were forgotten here, after the
        // roles were changed.
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
            let message = Message::Forget(ended);
            members.iter().for_each(|member| self.send(*member, &message));
        }
    }

    /// Reads the kernel's table, for connections that were not heard of.
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
                Ok(found) => found.iter().for_each(|tracked| self.note(tracked)),
                Err(e) => {
                    tracing::warn!("connections whose ports were changed cannot be looked for: {e:#}");
                }
            }
        }
    }

    /// What the kernel refuses is tried again with the next word of it; it is said once in a while.
    pub(super) fn complain(&mut self, error: &netlink::Error) {
        let now = Instant::now();
        if self.complained.is_none_or(|at| at + OVERRUN <= now) {
            self.complained = Some(now);
            tracing::warn!("connections whose ports were changed cannot be kept in sync: {error}");
        }
    }
}

async fn heard_log(log: &Option<PortLog>) -> io::Result<()> {
    match log {
        Some(log) => log.heard().await,
        None => std::future::pending().await,
    }
}

async fn heard_messages(messages: &Option<NodeMessages>) -> io::Result<()> {
    match messages {
        Some(messages) => messages.heard().await,
        None => std::future::pending().await,
    }
}
