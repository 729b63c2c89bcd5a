//! The node daemon's care for what was installed: another CNI that writes its configuration anew leaves the entry out,
//! and whoever sets up a host's plugins may remove a program that they do not know.

use super::configuration::{self, State};
use super::{entry, left_alone, passed_over, plugin};
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

/// Without any event everything is looked at this often: events can be lost.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How soon a directory that was not there, or a file that was being written, is looked at again.
const SOON: Duration = Duration::from_millis(100);
/// Events that come this close to each other are answered together.
const TOGETHER: Duration = Duration::from_millis(10);
/// How often the entry is put back within [`FIGHT`] before it is taken for a fight,
const PUT_BACK: usize = 10;
const FIGHT: Duration = Duration::from_secs(60);
/// and how far apart it is put back from then on.
const TRUCE: Duration = Duration::from_secs(6);
/// Room for some hundreds of inotify's events.
const EVENTS: usize = 16 << 10;

/// What is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime's directory of network configurations.
    pub conf_dir: PathBuf,
    /// The runtime's directory of plugins, if the program is to be kept as well.
    pub bin_dir: Option<PathBuf>,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The daemon's state directory.
    pub state_dir: PathBuf,
}

/// What is counted.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    put_back: Counter,
    configured: Gauge,
    fight: Gauge,
}

impl Metrics {
    /// All of them, shown by `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        let put_back = "How often the entry was put into the node's network configuration";
        registry.register("cni_entry_written", put_back, metrics.put_back.clone());
        let configured = "1: the runtime's chain has the entry; 0: pods start without Egret";
        registry.register("cni_configured", configured, metrics.configured.clone());
        let fight = "1: somebody takes the entry out again and again, and it is put back every few seconds only";
        registry.register("cni_fight", fight, metrics.fight.clone());
        metrics
    }
}

/// Keeps the entry and the program for as long as the daemon runs.
pub async fn run(options: Options, metrics: Metrics) {
    let mut keeper = Keeper { options, metrics, written: VecDeque::new(), said: Vec::new(), fought_at: None };
    let mut events = None;
    loop {
        // Watched before it is looked at, so that nothing falls in between.
        if events.is_none() {
            events = keeper.watch();
        }
        let settled = keeper.look().await && events.is_some();
        let wait = if settled { LOOK_AGAIN } else { SOON };
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
        keeper.hold_back().await;
    }
}

type Events = EventStream<Vec<u8>>;

/// Waits for an event, and those that come with it. False: a directory is no longer the one that was watched.
async fn next(events: &mut Events) -> bool {
    use inotify::EventMask;
    let gone = EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF;
    let mut first = events.next().await;
    loop {
        match first {
            Some(Ok(event)) if !event.mask.intersects(gone) => {}
            _ => return false,
        }
        first = match timeout(TOGETHER, events.next()).await {
            Ok(more) => more,
            Err(_) => return true,
        };
    }
}

struct Keeper {
    options: Options,
    metrics: Metrics,
    /// When the entry was written, within the last [`FIGHT`].
    written: VecDeque<Instant>,
    /// What was last said of the state, which is said only when it changes.
    said: Vec<String>,
    /// When it was last said that there is a fight.
    fought_at: Option<Instant>,
}

impl Keeper {
    /// `None`: a directory is not there yet, or cannot be watched; then it is looked at again and again.
    fn watch(&self) -> Option<Events> {
        let open = || -> io::Result<Events> {
            let inotify = Inotify::init()?;
            let mask = WatchMask::CLOSE_WRITE | WatchMask::MODIFY | WatchMask::MOVE | WatchMask::DELETE;
            let mask = mask | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
            inotify.watches().add(&self.options.conf_dir, mask)?;
            if let Some(dir) = self.options.bin_dir.as_ref().filter(|dir| dir.is_dir()) {
                // A program is complete when it is closed or renamed.
                inotify.watches().add(dir, mask - WatchMask::MODIFY)?;
            }
            inotify.into_event_stream(vec![0; EVENTS])
        };
        open().inspect_err(|e| tracing::debug!("{}: {e}", self.options.conf_dir.display())).ok()
    }

    /// Puts everything right. False: to be looked at again soon.
    async fn look(&mut self) -> bool {
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
            Some(Ok(Some(true))) => tracing::info!("egret-cni was missing or another one, and is in its place now"),
            Some(Err(e)) => problems.push(format!("egret-cni cannot be kept in its place: {e:#}")),
            _ => {}
        }
        match entry {
            Err(e) => problems.push(format!("the network configuration cannot be kept: {e:#}")),
            Ok(outcome) => {
                let ready = matches!(outcome.state, State::Ready(_));
                self.metrics.configured.set(ready.into());
                if outcome.changed {
                    self.metrics.put_back.inc();
                    self.written.push_back(Instant::now());
                }
                problems.extend(outcome.passed_over.iter().map(|file| passed_over(file)));
                match outcome.state {
                    State::Ready(file) if outcome.changed => tracing::info!("{dir}/{file} calls egret-cni now"),
                    State::Ready(_) => {}
                    State::Unsettled => settled = false,
                    State::Missing => {
                        problems.push(format!("there is no network configuration in {dir}; waiting for one"));
                    }
                    State::LeftAlone { file, reason } => {
                        problems.push(left_alone(&self.options.conf_dir, &file, &reason));
                    }
                }
            }
        }
        if settled {
            for problem in problems.iter().filter(|p| !self.said.contains(p)) {
                tracing::warn!("{problem}");
            }
            self.said = problems;
        }
        settled
    }

    /// Waits if the entry has been written so often that somebody must be at work against it: two programs that answer
    /// each other at once would keep the host busy and its runtime reloading.
    async fn hold_back(&mut self) {
        while self.written.front().is_some_and(|at| at.elapsed() > FIGHT) {
            self.written.pop_front();
        }
        let fights = self.written.len() >= PUT_BACK;
        self.metrics.fight.set(fights.into());
        let Some(last) = self.written.back().copied().filter(|_| fights) else {
            self.fought_at = None;
            return;
        };
        if self.fought_at.is_none_or(|at| at.elapsed() > FIGHT) {
            self.fought_at = Some(Instant::now());
            tracing::warn!(
                "somebody has taken egret-cni out of the network configuration in {} {} times within a minute; \
                 from now on it is put back every {} s only, and pods that start in between start without Egret and \
                 are adopted after: find out who writes there (for instance with fatrace or auditctl)",
                self.options.conf_dir.display(),
                self.written.len(),
                TRUCE.as_secs(),
            );
        }
        sleep((last + TRUCE).saturating_duration_since(Instant::now())).await;
    }
}
