//! Keeps the plugin installed while the node daemon runs. Another CNI that rewrites its configuration drops the
//! entry, and a tool that manages a host's plugins may remove an unknown program.

use super::configuration::{self, ConfigurationState};
use super::{entry, not_extensible, plugin, skipped};
use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How often everything is checked without any event: events can be lost.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// How soon a missing directory, or a file that is being written, is checked again.
const RETRY: Duration = Duration::from_millis(100);
/// Events within this time of each other cause one check.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// If the entry is put back so often within [`CONFLICT_WINDOW`], another program removes it,
const CONFLICT_WRITES: usize = 10;
const CONFLICT_WINDOW: Duration = Duration::from_secs(60);
/// and from then on this time passes between two writes.
const CONFLICT_INTERVAL: Duration = Duration::from_secs(6);
/// Buffer for some hundreds of inotify events, in bytes.
const EVENTS_BYTES: usize = 16 << 10;

/// What is kept installed, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime's directory of network configurations.
    pub conf_dir: PathBuf,
    /// The runtime's directory of plugins, if the program is kept there as well.
    pub bin_dir: Option<PathBuf>,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The daemon's state directory.
    pub state_dir: PathBuf,
}

/// Metrics of the installation.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    put_back: Counter,
    configured: Gauge,
    fight: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        let put_back = "How often the entry was put into the node's network configuration";
        registry.register("cni_entry_written", put_back, metrics.put_back.clone());
        let configured = "1: the runtime's chain has the entry; 0: pods start without Egret";
        registry.register("cni_configured", configured, metrics.configured.clone());
        let fight =
            "1: another program removes the entry again and again, and egretd puts it back only every few seconds";
        registry.register("cni_fight", fight, metrics.fight.clone());
        metrics
    }
}

/// Keeps the entry and the program for as long as the daemon runs.
pub async fn run(options: Options, metrics: Metrics) {
    let mut keeper =
        Keeper { options, metrics, written: VecDeque::new(), reported: Vec::new(), conflict_reported_at: None };
    let mut events = None;
    loop {
        // Start the watch before the check, so that no change is missed.
        if events.is_none() {
            events = keeper.watch();
        }
        let settled = keeper.reconcile().await && events.is_some();
        let wait = if settled { CHECK_INTERVAL } else { RETRY };
        let watched = match &mut events {
            Some(stream) => timeout(wait, next(stream)).await.unwrap_or(true),
            None => {
                sleep(wait).await;
                true
            }
        };
        if !watched {
            events = None;
        }
        keeper.pace_writes().await;
    }
}

type Events = EventStream<Vec<u8>>;

/// Waits for an event and those that follow it closely. Returns false if a directory was removed or replaced.
async fn next(events: &mut Events) -> bool {
    use inotify::EventMask;
    let gone = EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF;
    let mut first = events.next().await;
    loop {
        match first {
            Some(Ok(event)) if !event.mask.intersects(gone) => {}
            _ => return false,
        }
        first = match timeout(DEBOUNCE, events.next()).await {
            Ok(more) => more,
            Err(_) => return true,
        };
    }
}

struct Keeper {
    options: Options,
    metrics: Metrics,
    /// The times of the writes within the last [`CONFLICT_WINDOW`].
    written: VecDeque<Instant>,
    /// The problems that were logged last. They are logged again only if they change.
    reported: Vec<String>,
    /// When a conflict with another program was last logged.
    conflict_reported_at: Option<Instant>,
}

impl Keeper {
    /// Watches the directories. `None` if one is missing or cannot be watched; the caller tries again.
    fn watch(&self) -> Option<Events> {
        let open = || -> io::Result<Events> {
            let inotify = Inotify::init()?;
            let mask = WatchMask::CLOSE_WRITE | WatchMask::MODIFY | WatchMask::MOVE | WatchMask::DELETE;
            let mask = mask | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
            inotify.watches().add(&self.options.conf_dir, mask)?;
            if let Some(dir) = self.options.bin_dir.as_ref().filter(|dir| dir.is_dir()) {
                // A program is complete once it is closed or renamed.
                inotify.watches().add(dir, mask - WatchMask::MODIFY)?;
            }
            inotify.into_event_stream(vec![0; EVENTS_BYTES])
        };
        open().inspect_err(|e| tracing::debug!("{}: {e}", self.options.conf_dir.display())).ok()
    }

    /// Installs what is missing. Returns false if it must be checked again soon.
    async fn reconcile(&mut self) -> bool {
        let options = self.options.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let program = options.bin_dir.as_ref().map(|dir| {
                let source = plugin::beside_this_program()?;
                if plugin::is_settled(&source) { plugin::put(&source, dir).map(Some) } else { Ok(None) }
            });
            let entry = entry(&options.socket, &options.state_dir);
            (program, entry.and_then(|entry| configuration::put(&options.conf_dir, entry)))
        });
        let Ok((program, entry)) = looked.await else { return true };
        let dir = self.options.conf_dir.display().to_string();
        let mut problems = Vec::new();
        let mut settled = !matches!(program, Some(Ok(None)));
        match program {
            Some(Ok(Some(true))) => tracing::info!("installed egret-cni, which was missing or different"),
            Some(Err(e)) => problems.push(format!("cannot install egret-cni: {e:#}")),
            _ => {}
        }
        match entry {
            Err(e) => problems.push(format!("cannot put egret-cni into the network configuration: {e:#}")),
            Ok(outcome) => {
                let ready = matches!(outcome.state, ConfigurationState::Ready(_));
                self.metrics.configured.set(ready.into());
                if outcome.changed {
                    self.metrics.put_back.inc();
                    self.written.push_back(Instant::now());
                }
                problems.extend(outcome.skipped.iter().map(|file| skipped(file)));
                match outcome.state {
                    ConfigurationState::Ready(file) if outcome.changed => {
                        tracing::info!("put egret-cni into {dir}/{file}")
                    }
                    ConfigurationState::Ready(_) => {}
                    ConfigurationState::BeingWritten => settled = false,
                    ConfigurationState::Missing => {
                        problems.push(format!("there is no network configuration in {dir}; waiting for one"));
                    }
                    ConfigurationState::NotExtensible { file, reason } => {
                        problems.push(not_extensible(&self.options.conf_dir, &file, &reason));
                    }
                }
            }
        }
        if settled {
            for problem in problems.iter().filter(|p| !self.reported.contains(p)) {
                tracing::warn!("{problem}");
            }
            self.reported = problems;
        }
        settled
    }

    /// Waits if the entry was written so often that another program must be removing it: two programs that react to
    /// each other at once would keep the host busy and its runtime reloading.
    async fn pace_writes(&mut self) {
        while self.written.front().is_some_and(|at| at.elapsed() > CONFLICT_WINDOW) {
            self.written.pop_front();
        }
        let fights = self.written.len() >= CONFLICT_WRITES;
        self.metrics.fight.set(fights.into());
        let Some(last) = self.written.back().copied().filter(|_| fights) else {
            self.conflict_reported_at = None;
            return;
        };
        if self.conflict_reported_at.is_none_or(|at| at.elapsed() > CONFLICT_WINDOW) {
            self.conflict_reported_at = Some(Instant::now());
            tracing::warn!(
                "another program removed egret-cni from the network configuration in {} {} times within a minute; \
                 egretd now puts it back only every {} s, and pods that start in between start without Egret and are \
                 adopted later: find the program that writes there (for instance with fatrace or auditctl)",
                self.options.conf_dir.display(),
                self.written.len(),
                CONFLICT_INTERVAL.as_secs(),
            );
        }
        sleep((last + CONFLICT_INTERVAL).saturating_duration_since(Instant::now())).await;
    }
}
