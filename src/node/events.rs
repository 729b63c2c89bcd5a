//! The events that the daemon handles, and their sources.

use super::adoption::SearchResult;
use super::liveness::PeerLiveness;
use super::node_state::NodeState;
use super::socket::{Listener, PluginRequest};
use super::state::{LinkMessage, NodeDaemon};
use super::trace::TraceRequest;
use super::uplink_probes::Findings;
use crate::datapath::watch::{self, Watch};
use crate::model::Cluster;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch::Receiver;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, interval_at, sleep_until};

/// The interval at which the kernel's state is read without an event, because a notification may have been lost.
const READ_BACK: Duration = Duration::from_secs(30);
/// The interval at which the counters of stale packets and of forwarding are read.
const COUNTERS: Duration = Duration::from_secs(1);
/// The pause after a failed pass.
const RETRY: Duration = Duration::from_secs(1);
/// The time after a change of the cluster or a reading of the kernel at which memory is returned to the system.
const RETURN_MEMORY: Duration = Duration::from_secs(1);
/// The largest number of plugins' requests that are programmed in one transaction.
const AT_ONCE: usize = 64;

/// An event.
pub enum Event {
    /// Plugins' requests that arrived together.
    Requests(Vec<PluginRequest>),
    /// A new snapshot of the cluster.
    Snapshot(Arc<Cluster>),
    /// Other programs have changed the kernel's state.
    Kernel(BTreeSet<watch::ForeignChange>),
    /// The liveness of other nodes has changed.
    Liveness(PeerLiveness),
    /// The findings of probes have changed.
    Findings(Findings),
    /// A message from the link.
    Link(LinkMessage),
    /// A deadline of an egress IP, a handover, a fault or a pod has come.
    Due,
    /// The deadline of a plugin's request has come.
    RequestDue,
    /// The search for an unmanaged pod has ended.
    Found(SearchResult),
    /// The metrics are about to be read.
    Scrape(oneshot::Sender<()>),
    /// `egretd state` asks for the state.
    State(oneshot::Sender<NodeState>),
    /// `kubectl egret trace` asks for what a trace needs.
    Trace(TraceRequest),
    /// Freed memory is to be returned to the system.
    ReturnMemory,
    /// The kernel's counters are to be read.
    ReadCounters,
    /// The kernel's whole state is to be read.
    ReadBack,
    /// What has failed is to be tried again.
    Retry,
}

/// The sources of events.
pub struct Sources {
    pub snapshots: Receiver<Arc<Cluster>>,
    pub kernel: Watch,
    pub liveness: Receiver<PeerLiveness>,
    pub findings: Receiver<Findings>,
    pub link: mpsc::UnboundedReceiver<LinkMessage>,
    pub found: mpsc::UnboundedReceiver<SearchResult>,
    pub scrapes: mpsc::Receiver<oneshot::Sender<()>>,
    /// The plugins' socket. It is opened when the kernel is in sync.
    pub listener: Option<Listener>,
    pub timers: Timers,
}

/// The timers of the daemon.
pub struct Timers {
    retry: Option<Instant>,
    return_memory: Option<Instant>,
    counters: Interval,
    read_back: Interval,
}

impl Timers {
    /// The timers at the daemon's start.
    pub fn new() -> Self {
        let (mut counters, mut read_back) = (interval(COUNTERS), interval_at(Instant::now() + READ_BACK, READ_BACK));
        counters.set_missed_tick_behavior(MissedTickBehavior::Delay);
        read_back.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Timers { retry: None, return_memory: None, counters, read_back }
    }

    /// Sets or clears the retry. One that is set keeps its time.
    pub fn set_retry(&mut self, retry: bool) {
        self.retry = retry.then(|| self.retry.unwrap_or_else(|| Instant::now() + RETRY));
    }

    /// Makes memory be returned to the system soon.
    pub fn return_memory(&mut self) {
        self.return_memory.get_or_insert_with(|| Instant::now() + RETURN_MEMORY);
    }
}

impl Sources {
    /// Waits for the next event. Plugins' requests precede all others.
    ///
    /// # Errors
    /// The source of cluster state or of the kernel's notifications has ended.
    pub async fn next(&mut self, node: &NodeDaemon) -> Result<Event> {
        let Timers { retry, return_memory, counters, read_back } = &mut self.timers;
        let (mut requests, mut states, mut traces) = match &mut self.listener {
            Some(listener) => (Some(&mut listener.requests), Some(&mut listener.states), Some(&mut listener.traces)),
            None => (None, None, None),
        };
        Ok(tokio::select! {
            biased;
            Some(first) = receive(&mut requests) => {
                let mut batch = vec![first];
                while batch.len() < AT_ONCE
                    && let Some(Ok(more)) = requests.as_mut().map(|requests| requests.try_recv())
                {
                    batch.push(more);
                }
                Event::Requests(batch)
            }
            changed = self.snapshots.changed() => {
                changed.context("the source of cluster state has ended")?;
                Event::Snapshot(self.snapshots.borrow_and_update().clone())
            }
            events = self.kernel.next() => Event::Kernel(events.context("the kernel's notifications")?),
            Ok(()) = self.liveness.changed() => Event::Liveness(self.liveness.borrow_and_update().clone()),
            Ok(()) = self.findings.changed() => Event::Findings(self.findings.borrow_and_update().clone()),
            Some(message) = self.link.recv() => Event::Link(message),
            // After an error the retry covers what is due.
            () = node.due(), if retry.is_none() => Event::Due,
            Some(found) = self.found.recv() => Event::Found(found),
            Some(done) = self.scrapes.recv() => Event::Scrape(done),
            Some(response) = receive(&mut states) => Event::State(response),
            Some(request) = receive(&mut traces) => Event::Trace(request),
            () = node.next_request_deadline() => Event::RequestDue,
            () = at(*return_memory) => {
                *return_memory = None;
                Event::ReturnMemory
            }
            _ = counters.tick() => Event::ReadCounters,
            _ = read_back.tick() => Event::ReadBack,
            () = at(*retry) => {
                *retry = None;
                Event::Retry
            }
        })
    }
}

async fn receive<T>(channel: &mut Option<&mut mpsc::Receiver<T>>) -> Option<T> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
