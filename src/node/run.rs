//! The daemon's run: it opens the sources of events, and handles one event after another.

use super::events::{Event, Sources, Timers};
use super::state::{Listeners, NodeDaemon, PassResult, Stopping};
use super::{Options, holders, liveness, metrics, socket, taint, uplink_probes};
use crate::cluster::{self, OfflineCache, Scope, Source, Statuses};
use crate::datapath::watch::Watch;
use crate::install::keep;
use crate::memory;
use crate::telemetry::server;
use crate::telemetry::server::Readiness;
use anyhow::{Context, Result};
use egret_cni::offline_policies::{OfflinePolicies, boot_id};
use egret_cni::run_dir::{self, KNOWN, SOCKET};
use egret_cni::uninstalled;
use nix::fcntl::Flock;
use prometheus_client::registry::Registry;
use std::fs::File;
use std::pin::Pin;
use tokio::sync::{mpsc, oneshot, watch};

/// The readiness of the node, for its endpoint.
type Ready = watch::Sender<Readiness>;

/// The daemon after its start.
struct Daemon {
    options: Options,
    statuses: Statuses,
    node: NodeDaemon,
    sources: Sources,
    /// The lock of the run directory.
    lock: Flock<File>,
    /// Starts the task that writes the plugin's entry; `None` when it has been started.
    plugin_may_run: Option<oneshot::Sender<()>>,
    stopping: Option<Stopping>,
    /// The outcome of the last pass.
    outcome: PassResult,
}

/// Runs until `stop` completes, and, if the node is being drained, until its egress IPs are handed over. The state in
/// the kernel stays.
///
/// # Errors
/// The run directory, the cluster's source or a socket is not usable.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<()> {
    let mut stop = std::pin::pin!(stop);
    let lock = tokio::select! {
        lock = socket::lock(&options.run_dir) => lock?,
        () = &mut stop => return Ok(()),
    };
    let (mut registry, metrics) = metrics::Metrics::new();
    uninstalled::clear(&options.run_dir).with_context(|| format!("run directory {}", options.run_dir.display()))?;
    let plugin_may_run = keep_entry(&options, &mut registry)?;
    let (scrape, scrapes) = mpsc::channel(4);
    let (ready, readiness) = watch::channel(Readiness::waiting_for("the cluster has not been read yet"));
    let _servers = options.addresses.serve(shown(registry, scrape), readiness)?;
    let source = tokio::select! {
        source = open_cluster(&options, &ready) => source?,
        () = &mut stop => return Ok(()),
    };
    let mut daemon = Daemon::start(options, source, metrics, ready, scrapes, (lock, plugin_may_run)).await?;
    daemon.run(stop).await
}

/// Starts the task that keeps the plugin's entry as `egretd install` left it. The entry is written only once the daemon
/// has been in sync: without it pods start without Egret. If it has been there before, it is written at once.
fn keep_entry(options: &Options, registry: &mut Registry) -> Result<Option<oneshot::Sender<()>>> {
    let (plugin_may_run, wanted) = oneshot::channel();
    if let Some((conf_dir, bin_dir)) = options.cni_dirs.clone() {
        let socket = std::path::absolute(options.run_dir.join(SOCKET)).context("run directory")?;
        let state_dir = std::path::absolute(&options.state_dir).context("state directory")?;
        let keep = keep::Options { conf_dir, bin_dir, socket, state_dir };
        let metrics = keep::Metrics::register(registry);
        tokio::spawn(async move {
            // A dropped sender means that the daemon has ended.
            if wanted.await.is_ok() {
                keep::run(keep, metrics).await;
            }
        });
    }
    let mut plugin_may_run = Some(plugin_may_run);
    if OfflinePolicies::is_there(&options.state_dir) {
        let _ = plugin_may_run.take().map(|entry| entry.send(()));
    }
    Ok(plugin_may_run)
}

/// The metrics, refreshed before each scrape.
fn shown(registry: Registry, scrape: mpsc::Sender<oneshot::Sender<()>>) -> server::Metrics {
    server::Metrics::new(registry).before_scrape(move || {
        let scrape = scrape.clone();
        async move {
            let (done, refreshed) = oneshot::channel();
            if scrape.send(done).await.is_ok() {
                let _ = refreshed.await;
            }
        }
    })
}

async fn open_cluster(options: &Options, ready: &Ready) -> Result<Source> {
    let known = OfflineCache {
        directory: options.run_dir.join(KNOWN),
        of: format!("{} {}", options.name, boot_id().context("the boot's id")?),
    };
    let cluster = options.cluster.clone().writing_down(known);
    let waiting_for = |what: &str| drop(ready.send_replace(Readiness::waiting_for(what)));
    cluster::open_and_report(&cluster, Scope::Node(options.name.clone()), &waiting_for).await
}

impl Daemon {
    async fn start(
        options: Options,
        mut source: Source,
        metrics: metrics::Metrics,
        ready: Ready,
        scrapes: mpsc::Receiver<oneshot::Sender<()>>,
        (lock, plugin_may_run): (Flock<File>, Option<oneshot::Sender<()>>),
    ) -> Result<Self> {
        let (adopted, found) = mpsc::unbounded_channel();
        let (messages, link) = mpsc::unbounded_channel();
        let (targets, wanted) = watch::channel(liveness::Targets::default());
        let (peers, liveness) = watch::channel(liveness::PeerLiveness::default());
        tokio::spawn(liveness::watch(options.liveness, wanted, peers));
        let (probes, to_probe) = watch::channel(uplink_probes::Wanted::default());
        let (found_by_probes, findings) = watch::channel(uplink_probes::Findings::default());
        let (held, to_answer) = watch::channel(holders::Held::default());
        tokio::spawn(holders::answer(to_answer));
        let lookup = source.lookup.clone();
        let listeners = Listeners { adopted, link: messages, targets, probes, held, lookup, ready };
        let kernel = Watch::open().context("the kernel's notifications")?;
        let snapshot = source.snapshots.borrow_and_update().clone();
        let probe_metrics = metrics.uplink_probes();
        let node = NodeDaemon::start(options.clone(), source.statuses.clone(), snapshot, metrics, listeners).await?;
        let lost = node.failed_probes();
        tokio::spawn(uplink_probes::watch(lost, to_probe, found_by_probes, probe_metrics));
        let timers = Timers::new();
        let (statuses, snapshots) = (source.statuses, source.snapshots);
        let sources = Sources { snapshots, kernel, liveness, findings, link, found, scrapes, listener: None, timers };
        let outcome = PassResult::default();
        Ok(Daemon { options, statuses, node, sources, lock, plugin_may_run, stopping: None, outcome })
    }

    async fn run(&mut self, mut stop: Pin<&mut impl Future<Output = ()>>) -> Result<()> {
        self.sources.timers.return_memory();
        self.pass().await;
        loop {
            if self.stopping.as_ref().is_some_and(|stopping| self.node.has_stopped(stopping)) {
                return Ok(());
            }
            self.open_when_in_sync();
            let event = tokio::select! {
                biased;
                () = &mut stop, if self.stopping.is_none() => {
                    self.stopping = Some(self.node.stop());
                    continue;
                }
                () = deadline(self.stopping.as_ref()) => continue,
                event = self.sources.next(&self.node) => event?,
            };
            if self.handle(event).await? {
                self.pass().await;
            }
        }
    }

    /// Runs a pass, and sets what follows from its outcome.
    async fn pass(&mut self) {
        self.outcome = self.node.pass().await;
        self.sources.timers.set_retry(self.outcome.again);
        if let Some(interest) = self.outcome.interest.take() {
            self.sources.kernel.set_interest(interest);
        }
        if self.outcome.has_freed {
            self.sources.timers.return_memory();
        }
    }

    /// Opens what plugins need once the kernel is in sync. Without the socket, the plugin quarantines its pod.
    fn open_when_in_sync(&mut self) {
        if self.outcome.can_enforce {
            let _ = self.plugin_may_run.take().map(|entry| entry.send(()));
        }
        if self.sources.listener.is_some() || !self.outcome.in_sync {
            return;
        }
        match socket::listen(&self.options.run_dir) {
            Ok(new) => {
                self.sources.listener = Some(new);
                tracing::info!(node = %self.options.name, "ready");
                tokio::spawn(taint::remove(self.statuses.clone(), self.options.name.clone()));
            }
            Err(e) => {
                self.sources.timers.set_retry(true);
                tracing::error!("cannot open the plugins' socket, and selected pods do not start: {e:#}");
            }
        }
    }

    /// Handles an event. Returns whether a pass is due.
    async fn handle(&mut self, event: Event) -> Result<bool> {
        let node = &mut self.node;
        match event {
            Event::Requests(requests) => node.answer(requests).await,
            Event::Snapshot(cluster) => node.snapshot(cluster),
            Event::Kernel(events) => node.kernel_changed(&events).await,
            Event::Liveness(liveness) => node.set_liveness(liveness),
            Event::Findings(findings) => node.set_findings(findings),
            Event::Link(message) => node.link_message(message),
            Event::Due => node.mark_due(),
            Event::RequestDue => {}
            Event::Found(found) => node.adopt(found),
            Event::Scrape(done) => {
                node.refresh_metrics();
                let _ = done.send(());
                return Ok(false);
            }
            Event::State(response) => {
                // Without a receiver, the connection has ended.
                let _ = response.send(node.state());
                return Ok(false);
            }
            Event::Trace(request) => {
                node.trace(request);
                return Ok(false);
            }
            Event::ReturnMemory => {
                memory::give_back();
                return Ok(false);
            }
            Event::ReadCounters => return Ok(node.check_counters()),
            Event::ReadBack => {
                self.restore_run_dir().await?;
                self.node.invalidate();
            }
            Event::Retry => node.try_again(),
        }
        Ok(true)
    }

    /// Restores the files of the run directory if it was emptied.
    async fn restore_run_dir(&mut self) -> Result<()> {
        let path = &self.options.run_dir;
        if self.sources.listener.as_ref().is_none_or(|listener| listener.is_there(path)) {
            return Ok(());
        }
        let run_dir = path.display();
        tracing::warn!(%run_dir, "the run directory was emptied; restoring its files");
        if !run_dir::is_locked_by(path, &self.lock)? {
            self.lock = socket::lock(path).await?;
        }
        match self.node.restore_run_dir().and_then(|()| socket::listen(path)) {
            Ok(new) => self.sources.listener = Some(new),
            Err(e) => tracing::error!(%run_dir, "cannot restore the run directory; trying again: {e:#}"),
        }
        Ok(())
    }
}

async fn deadline(stopping: Option<&Stopping>) {
    match stopping {
        Some(stopping) => tokio::time::sleep_until(stopping.deadline()).await,
        None => std::future::pending().await,
    }
}
