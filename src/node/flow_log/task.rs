//! The thread that reads the kernel's notifications and makes records of them.

use super::FlowLogMetrics;
use super::names::{Names, PodName, decode};
use super::output::Output;
use super::record::{Record, destination_port};
use crate::datapath::netlink_reader::{NetlinkReader, Read};
use crate::datapath::node_messages::NodeMessages;
use crate::datapath::socket_filter;
use crate::model::marks::{MAX_PEER, Marks};
use crate::model::selector::Name;
use crate::model::shared::Shared;
use crate::model::{Policy, PolicyKey};
use anyhow::{Context, Result};
use egret_nft::conntrack::{self, ConnectionEvent, Tuple};
use egret_nft::mac::Mac;
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use jiff::Timestamp;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The socket's buffer, bytes: room for some 20,000 notifications.
const RECEIVE_BUFFER: usize = 16 << 20;
/// Notifications read in one batch.
const AT_ONCE: usize = 512;
/// The pause after all notifications have been read. Without it, each connection would wake this thread and the writing
/// one, beside the packets that begin it. The socket's buffer has room for a million connections a second meanwhile.
/// After a pause in which none came, the next one wakes this thread.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a connection of an unknown pod waits for its name. The pod may just have started.
const PATIENCE: Duration = Duration::from_millis(300);
/// The largest number of waiting notifications.
const WAITING: usize = 16_384;
/// The largest number of connections whose first line is remembered.
const REMEMBERED: usize = 262_144;
/// The pause after the kernel's notifications could not be opened, and the interval of warnings.
const AGAIN: Duration = Duration::from_secs(10);
/// The interval at which names that are no longer announced are dropped.
const PRUNE: Duration = Duration::from_secs(20);
/// The size at which lines are queued for writing, bytes.
const BATCH: usize = 64 << 10;

/// What the daemon knows and records contain.
#[derive(Clone, Debug, Default)]
pub struct FlowView {
    /// This node.
    pub node: Name,
    /// The tunnel device's index, and the address from which this node sends messages.
    pub end: Option<(u32, Ipv6Addr)>,
    /// The egress IPs that this node may hold.
    pub egress_ips: HashMap<IpAddr, RecordedIp>,
    /// The other nodes by their index in connection marks.
    pub peers: HashMap<u16, (Mac, Name)>,
    /// The pods of this node that policies select.
    pub pods: HashMap<IpAddr, Arc<PodName>>,
    /// All policies.
    pub policies: Shared<BTreeMap<PolicyKey, Arc<Policy>>>,
}

/// An egress IP that this node may hold.
#[derive(Clone, Debug)]
pub struct RecordedIp {
    /// Its gateway.
    pub gateway: Name,
    /// Whether this node holds it.
    pub owns: bool,
}

/// A notification that waits for the name of its pod.
struct Waiting {
    event: ConnectionEvent,
    /// When it was read, as in the record: the same for all that were read at once.
    at: Arc<str>,
    until: Instant,
}

/// The fields that are written at the beginning of a connection and again at its end.
struct Begun {
    pod: Option<Arc<PodName>>,
    policy: Option<String>,
    node: Option<Name>,
    gateway: Option<Name>,
}

pub(super) struct Task {
    wanted: watch::Receiver<Arc<FlowView>>,
    view: Arc<FlowView>,
    marks: Marks,
    output: Output,
    metrics: FlowLogMetrics,
    notifications: Option<NetlinkReader>,
    /// Until when notifications are neither read nor waited for.
    paused: Option<Instant>,
    retry: Option<Instant>,
    messages: Option<NodeMessages>,
    names: Names,
    waiting: VecDeque<Waiting>,
    begun: HashMap<(u32, Tuple), Arc<Begun>>,
    lines: Vec<u8>,
    warned: Option<Instant>,
}

impl Task {
    pub(super) fn new(
        wanted: watch::Receiver<Arc<FlowView>>,
        marks: Marks,
        output: Output,
        metrics: FlowLogMetrics,
    ) -> Self {
        Task {
            wanted,
            view: Arc::default(),
            marks,
            output,
            metrics,
            notifications: None,
            paused: None,
            retry: None,
            messages: None,
            names: Names::default(),
            waiting: VecDeque::new(),
            begun: HashMap::new(),
            lines: Vec::new(),
            warned: None,
        }
    }

    /// Runs until the daemon ends.
    pub(super) async fn run(mut self) {
        let mut prune = tokio::time::interval(PRUNE);
        loop {
            let due = self.waiting.front().map(|first| first.until);
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.change_view(),
                    Err(_) => return,
                },
                ready = NodeMessages::readable(&self.messages) => self.read_messages(ready),
                ready = notified(&self.notifications) => self.read_notifications(ready),
                () = sleep_until(self.paused.unwrap_or_else(Instant::now)), if self.paused.is_some() => {
                    self.read_notifications(Ok(()));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = sleep_until(self.retry.unwrap_or_else(Instant::now)), if self.retry.is_some() => self.open(),
                _ = prune.tick() => self.names.prune(Instant::now()),
            }
            self.record_waiting();
            self.hand_on();
        }
    }

    fn change_view(&mut self) {
        let view = self.wanted.borrow_and_update().clone();
        let before = std::mem::replace(&mut self.view, view);
        if before.end != self.view.end {
            self.messages = None;
        }
        self.open();
    }

    /// Opens the sockets while this node may hold an egress IP.
    fn open(&mut self) {
        self.retry = None;
        if self.view.egress_ips.is_empty() {
            (self.notifications, self.messages) = (None, None);
            return;
        }
        let mut fault = None;
        if self.notifications.is_none() {
            match self.subscribe() {
                Ok(reader) => {
                    self.notifications = Some(reader);
                    check_settings();
                }
                Err(e) => fault = Some(e),
            }
        }
        if let (None, Some((device, source))) = (&self.messages, self.view.end) {
            match NodeMessages::open(device, source) {
                Ok(messages) => self.messages = Some(messages),
                Err(e) => fault = fault.or(Some(e)),
            }
        }
        if let Some(e) = fault {
            self.retry = Some(Instant::now() + AGAIN);
            self.warn(&format!(
                "connections of egress IPs are not recorded, or without their pods; trying again: {e:#}"
            ));
        }
    }

    fn subscribe(&self) -> Result<NetlinkReader> {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        socket.set_buffers(RECEIVE_BUFFER)?;
        // Set the filter before the socket receives anything. The kernel still makes a message for each connection of
        // the host.
        let (mark, mask) = (self.marks.connection(0), self.marks.connection_mask());
        let fd = socket.as_fd().try_clone_to_owned()?;
        socket_filter::accept_attribute(&fd, (conntrack::ATTRIBUTES, conntrack::MARK), mark, mask)
            .context("cannot filter by mark; the kernel rejects SO_ATTACH_FILTER")?;
        conntrack::subscribe(&mut socket).context("needs the kernel module nf_conntrack_netlink")?;
        Ok(NetlinkReader::new(socket)?)
    }

    fn read_messages(&mut self, ready: io::Result<()>) {
        let Some(messages) = &self.messages else { return };
        match ready.and_then(|()| messages.received(decode)) {
            Ok(received) => {
                received.into_iter().for_each(|(from, pods)| self.names.announced(from, pods, Instant::now()));
            }
            Err(e) => {
                self.messages = None;
                self.retry = Some(Instant::now() + AGAIN);
                self.warn(&format!("cannot receive other nodes' messages about their pods: {e}"));
            }
        }
    }

    fn read_notifications(&mut self, ready: io::Result<()>) {
        let mut result = ready;
        let until = Instant::now() + PATIENCE;
        let at: Arc<str> = format!("{:.6}", Timestamp::now()).into();
        self.paused = None;
        for count in 0..AT_ONCE {
            let Some(reader) = &mut self.notifications else { return };
            if result.is_err() {
                break;
            }
            let waiting = &mut self.waiting;
            let read = reader.read(|message| {
                waiting.extend(conntrack::parse_event(&message).map(|event| Waiting { event, at: at.clone(), until }));
            });
            match read {
                Ok(Read::Datagram) => {}
                Ok(Read::Nothing) if count == 0 => match reader.watch() {
                    Ok(()) => return,
                    Err(e) => result = Err(e),
                },
                Ok(Read::Nothing) => {
                    reader.unwatch();
                    self.paused = Some(Instant::now() + PAUSE);
                    return;
                }
                Ok(Read::Lost) => {
                    self.metrics.dropped("kernel", 1);
                    self.warn(
                        "the kernel dropped notifications about connections: they come faster than they are read",
                    );
                }
                Err(e) => result = Err(e),
            }
        }
        match result {
            // There are more of them.
            Ok(()) => self.paused = Some(Instant::now()),
            Err(e) => {
                self.notifications = None;
                self.retry = Some(Instant::now() + AGAIN);
                self.warn(&format!("cannot read the kernel's notifications about connections: {e}"));
            }
        }
    }

    /// Records waiting connections in order, up to the first one whose pod may still get its name.
    fn record_waiting(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.waiting.front() {
            let event = first.event;
            let before = if event.ended { self.begun.remove(&(event.id, event.out)) } else { None };
            let is_final = before.is_some() || first.until <= now || self.waiting.len() >= WAITING;
            let begun = before.or_else(|| self.begun(&event));
            if !is_final && begun.as_ref().is_some_and(|begun| begun.pod.is_none()) {
                return;
            }
            let first = self.waiting.pop_front();
            if let Some((first, begun)) = first.zip(begun) {
                self.record(&event, &first.at, &begun);
            }
        }
    }

    /// The fields of the connection; `None` if it does not leave from this node.
    fn begun(&self, event: &ConnectionEvent) -> Option<Arc<Begun>> {
        let egress_ip = self.view.egress_ips.get(&event.back.destination).filter(|egress_ip| egress_ip.owns)?;
        // On the pod's own node, a connection through another gateway node is not translated.
        if event.back.destination == event.out.source {
            return None;
        }
        let (of_peer, of_pod) = (self.marks.connection_kind_mask(), self.marks.connection_of_allocation_mask());
        let (node, pod) = if event.mark & of_peer == self.marks.connection_of_peer(0) {
            let (mac, node) = self.view.peers.get(&((event.mark & u32::from(MAX_PEER)) as u16))?;
            (node.clone(), self.names.get(*mac, event.out.source))
        } else if event.mark & of_pod == self.marks.connection(0) && event.mark != self.marks.stale() {
            (self.view.node.clone(), self.view.pods.get(&event.out.source).cloned())
        } else {
            return None;
        };
        let policy = pod.as_ref().and_then(|pod| self.policy(pod, &event.out));
        Some(Arc::new(Begun { pod, policy, node: Some(node), gateway: Some(egress_ip.gateway.clone()) }))
    }

    /// The first of a pod's policies that covers the destination.
    fn policy(&self, pod: &PodName, out: &Tuple) -> Option<String> {
        let port = destination_port(out);
        let covers = |key: &&String| {
            let policy = self.view.policies.get(&PolicyKey::from(key.as_str()));
            policy.is_some_and(|policy| {
                let covers = policy.egress.as_ref();
                covers.is_none_or(|covers| covers.has(out.destination, out.protocol, port))
            })
        };
        pod.policies.iter().find(covers).cloned()
    }

    fn record(&mut self, event: &ConnectionEvent, at: &str, begun: &Arc<Begun>) {
        let view = self.view.clone();
        let mut record = Record::of(event, at, &view.node);
        if let Some(pod) = &begun.pod {
            (record.pod_namespace, record.pod_name) = (Some(&*pod.namespace), Some(&*pod.name));
            record.pod_uid = Some(&*pod.uid).filter(|uid| !uid.is_empty());
        }
        (record.policy, record.node, record.gateway) =
            (begun.policy.as_deref(), begun.node.as_deref(), begun.gateway.as_deref());
        record.write(&mut self.lines);
        if !event.ended && self.begun.len() < REMEMBERED {
            self.begun.insert((event.id, event.out), begun.clone());
        }
        if self.lines.len() >= BATCH {
            self.hand_on();
        }
    }

    fn hand_on(&mut self) {
        if !self.lines.is_empty() {
            self.output.put(std::mem::take(&mut self.lines));
        }
    }

    fn warn(&mut self, what: &str) {
        let now = Instant::now();
        if self.warned.is_none_or(|at| at + AGAIN <= now) {
            self.warned = Some(now);
            tracing::warn!("{what}");
        }
    }
}

/// Warns about settings of the host that leave out records or parts of them. Egret does not change these settings.
fn check_settings() {
    let is_off = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/netfilter/{name}"));
        text.is_ok_and(|text| text.trim() == "0")
    };
    if is_off("nf_conntrack_events") {
        tracing::warn!("net.netfilter.nf_conntrack_events is 0: no connection is recorded; set it to 1 or 2");
    }
    if is_off("nf_conntrack_acct") {
        tracing::info!(
            "net.netfilter.nf_conntrack_acct is 0: records have no packets and bytes; set it to 1 to have them"
        );
    }
}

async fn notified(notifications: &Option<NetlinkReader>) -> io::Result<()> {
    match notifications {
        Some(notifications) => notifications.readable().await,
        None => std::future::pending().await,
    }
}
