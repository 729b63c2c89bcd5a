//! The node daemon: it watches the cluster, compiles the plan, keeps the kernel in sync with it, and responds to the
//! plugin.
//!
//! One task owns the state and handles one event after another, so there are no locks and no partial states. Plugins'
//! requests precede changes of the cluster, and requests that arrive together are programmed in one transaction.

mod adopted_files;
mod adoption;
mod changed_ports;
mod ended;
mod existing;
mod forwarding;
mod holding;
mod host;
pub mod liveness;
mod metrics;
mod moved;
mod pod_marks;
mod pods;
mod policy_delay;
mod report;
mod socket;
mod state;
mod taint;

use crate::cluster::{self, OfflineCache, Scope, SourceName};
use crate::datapath::watch::Watch;
use crate::install::keep;
use crate::memory;
use crate::model::marks::Marks;
use crate::model::tunnel_family::TunnelFamily;
use crate::telemetry::server;
use anyhow::Context;
use egret_cni::offline_policies::{OfflinePolicies, boot_id};
use egret_cni::run_dir::{self, KNOWN, SOCKET};
use egret_cni::uninstalled;
use ipnetwork::IpNetwork;
use socket::{Listener, PluginRequest};
use state::{Node, Stopping};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

/// The interval at which the kernel's state is read without an event, because a notification may have been lost.
const READ_BACK: Duration = Duration::from_secs(30);
/// The interval at which the counters of stale packets and of forwarding are read.
const STALE: Duration = Duration::from_secs(1);
/// The pause after a failed reconciliation.
const RETRY: Duration = Duration::from_secs(1);
/// The time after a change of the cluster or a reading of the kernel at which memory is returned to the system.
const TIDY: Duration = Duration::from_secs(1);
/// The largest number of plugins' requests that are programmed in one transaction.
const AT_ONCE: usize = 64;

/// The daemon's settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's name in the cluster.
    pub name: String,
    /// The source of cluster state.
    pub cluster: SourceName,
    /// The directory of the socket and the attachments.
    pub run_dir: PathBuf,
    /// The directory of the offline policy snapshot, which outlives a reboot.
    pub state_dir: PathBuf,
    /// The address to which other nodes send tunnel packets; `None`: the node's first InternalIP.
    pub tunnel_address: Option<IpAddr>,
    /// The family of the tunnel's outer packets; `None`: the family that the cluster's nodes have.
    pub tunnel_family: Option<TunnelFamily>,
    /// Destinations that no policy covers, besides the cluster's own.
    pub direct: Vec<IpNetwork>,
    /// Settings of the liveness probes.
    pub liveness: liveness::Settings,
    /// Egret's bits in marks.
    pub marks: Marks,
    /// Whether the daemon owns the nftables tables, on kernels that support it, so that no other program can change
    /// them.
    pub own_tables: bool,
    /// Addresses of the servers for metrics and health.
    pub addresses: server::Addresses,
    /// The runtime's directory of network configurations and that of plugins, if the daemon is to keep them as `egretd
    /// install` left them.
    pub cni_dirs: Option<(PathBuf, Option<PathBuf>)>,
}

/// Runs until `stop` completes, and, if the node is being drained, until its egress IPs are handed over. The state in
/// the kernel stays.
///
/// # Errors
/// The run directory, the cluster's source or a socket is not usable.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut stop = std::pin::pin!(stop);
    let mut lock = tokio::select! {
        lock = socket::lock(&options.run_dir) => lock?,
        () = &mut stop => return Ok(()),
    };
    let (mut registry, metrics) = metrics::Metrics::new();
    uninstalled::clear(&options.run_dir).with_context(|| format!("run directory {}", options.run_dir.display()))?;
    let (plugin_may_run, entry_wanted) = oneshot::channel();
    let mut plugin_may_run = Some(plugin_may_run);
    if let Some((conf_dir, bin_dir)) = options.cni_dirs.clone() {
        let socket = std::path::absolute(options.run_dir.join(SOCKET)).context("run directory")?;
        let state_dir = std::path::absolute(&options.state_dir).context("state directory")?;
        let keep = keep::Options { conf_dir, bin_dir, socket, state_dir };
        let metrics = keep::Metrics::register(&mut registry);
        tokio::spawn(async move {
            // The plugin's entry is written only once the daemon has been in sync. A dropped sender means that the
            // daemon has ended.
            if entry_wanted.await.is_ok() {
                keep::run(keep, metrics).await;
            }
        });
    }
    // Without the entry pods start without Egret. If it has been there before, it is written at once.
    if OfflinePolicies::is_there(&options.state_dir) {
        let _ = plugin_may_run.take().map(|entry| entry.send(()));
    }
    let (asked, mut scrapes) = mpsc::channel::<oneshot::Sender<()>>(4);
    let (ready, readiness) = tokio::sync::watch::channel(Err("the cluster has not been read yet".to_owned()));
    let metrics_shown = server::Metrics::new(registry).before_scrape(move || {
        let asked = asked.clone();
        async move {
            let (done, read) = oneshot::channel();
            if asked.send(done).await.is_ok() {
                let _ = read.await;
            }
        }
    });
    let _servers = options.addresses.serve(metrics_shown, readiness)?;

    let known = OfflineCache {
        directory: options.run_dir.join(KNOWN),
        of: format!("{} {}", options.name, boot_id().context("the boot's id")?),
    };
    let cluster = options.cluster.clone().writing_down(known);
    let waiting_for = |what: &str| drop(ready.send_replace(Err(what.to_owned())));
    let mut source = tokio::select! {
        source = cluster::open_and_report(&cluster, Scope::Node(options.name.clone()), &waiting_for) => source?,
        () = &mut stop => return Ok(()),
    };
    let (adopted, mut adoptions) = mpsc::unbounded_channel();
    let (heard, mut answers) = mpsc::unbounded_channel();
    let (targets, wanted) = tokio::sync::watch::channel(liveness::Targets::default());
    let (seen, mut news) = tokio::sync::watch::channel(liveness::Seen::default());
    tokio::spawn(liveness::watch(options.liveness, wanted, seen));
    let listeners = state::Listeners { adopted, heard, targets, lookup: source.lookup.clone() };
    let mut kernel = Watch::open().context("the kernel's notifications")?;
    let snapshot = source.snapshots.borrow_and_update().clone();
    let mut node = Node::start(options.clone(), source.statuses.clone(), snapshot, metrics, listeners).await?;
    let mut retry = node.reconcile_all(&ready).await;
    let mut listener: Option<Listener> = None;
    let mut retry_at = None;
    let mut untidy = None;
    let mut stopping: Option<Stopping> = None;
    let mut read_back = tokio::time::interval_at(Instant::now() + READ_BACK, READ_BACK);
    read_back.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stale = tokio::time::interval(STALE);
    stale.set_missed_tick_behavior(MissedTickBehavior::Delay);

    loop {
        if stopping.as_ref().is_some_and(|stopping| node.has_stopped(stopping)) {
            return Ok(());
        }
        retry_at = retry.then(|| retry_at.unwrap_or_else(|| Instant::now() + RETRY));
        if let Some(interest) = node.interest() {
            kernel.set_interest(interest);
        }
        if node.is_untidy() {
            untidy = untidy.or(Some(Instant::now() + TIDY));
        }
        // The socket is opened when the kernel is in sync. Without it the plugin quarantines its pod.
        if node.can_enforce() {
            let _ = plugin_may_run.take().map(|entry| entry.send(()));
        }
        if listener.is_none() && node.is_in_sync() {
            match socket::listen(&options.run_dir) {
                Ok(new) => {
                    listener = Some(new);
                    tracing::info!(node = %options.name, "ready");
                    tokio::spawn(taint::remove(source.statuses.clone(), options.name.clone()));
                }
                Err(e) => {
                    retry_at = retry_at.or(Some(Instant::now() + RETRY));
                    retry = true;
                    tracing::error!("cannot open the plugins' socket, and selected pods do not start: {e:#}");
                }
            }
        }
        retry = tokio::select! {
            biased;
            () = &mut stop, if stopping.is_none() => {
                stopping = Some(node.stop());
                retry
            }
            () = deadline(stopping.as_ref()), if stopping.is_some() => retry,
            Some(first) = next(&mut listener) => {
                let mut batch = vec![first];
                while batch.len() < AT_ONCE && let Some(Ok(more)) = listener.as_mut().map(|d| d.requests.try_recv()) {
                    batch.push(more);
                }
                node.answer(batch).await;
                node.reconcile_all(&ready).await
            }
            changed = source.snapshots.changed() => {
                changed.context("the source of cluster state has ended")?;
                let snapshot = source.snapshots.borrow_and_update().clone();
                node.snapshot(snapshot);
                node.reconcile_all(&ready).await
            }
            events = kernel.next() => {
                node.kernel_changed(&events.context("the kernel's notifications")?).await;
                node.reconcile_all(&ready).await
            }
            Ok(()) = news.changed() => {
                let seen = news.borrow_and_update().clone();
                node.seen(seen);
                node.reconcile_all(&ready).await
            }
            Some(heard) = answers.recv() => {
                node.heard(heard);
                node.reconcile_all(&ready).await
            }
            // After an error the retry covers what is due.
            () = node.due(), if !retry => {
                node.mark_due();
                node.reconcile_all(&ready).await
            }
            Some(found) = adoptions.recv() => {
                node.adopt(found);
                node.reconcile_all(&ready).await
            }
            Some(done) = scrapes.recv() => {
                node.refresh_metrics();
                let _ = done.send(());
                retry
            }
            () = node.next_deadline() => node.reconcile_all(&ready).await,
            () = tokio::time::sleep_until(untidy.unwrap_or_else(Instant::now)), if untidy.is_some() => {
                untidy = None;
                memory::give_back();
                retry
            }
            _ = stale.tick() => {
                if node.check_counters() { node.reconcile_all(&ready).await } else { retry }
            }
            _ = read_back.tick() => {
                if listener.as_ref().is_some_and(|listener| !listener.is_there(&options.run_dir)) {
                    let run_dir = options.run_dir.display();
                    tracing::warn!(%run_dir, "the run directory was emptied; restoring its files");
                    if !run_dir::is_locked_by(&options.run_dir, &lock)? {
                        lock = socket::lock(&options.run_dir).await?;
                    }
                    match node.restore_run_dir().and_then(|()| socket::listen(&options.run_dir)) {
                        Ok(new) => listener = Some(new),
                        Err(e) => tracing::error!(%run_dir, "cannot restore the run directory; trying again: {e:#}"),
                    }
                }
                node.invalidate();
                node.reconcile_all(&ready).await
            }
            () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry => {
                retry_at = None;
                node.invalidate();
                node.reconcile_all(&ready).await
            }
        };
    }
}

async fn deadline(stopping: Option<&Stopping>) {
    match stopping {
        Some(stopping) => tokio::time::sleep_until(stopping.deadline()).await,
        None => std::future::pending().await,
    }
}

async fn next(listener: &mut Option<Listener>) -> Option<PluginRequest> {
    match listener {
        Some(listener) => listener.requests.recv().await,
        None => std::future::pending().await,
    }
}
