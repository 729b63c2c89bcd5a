//! A directory of manifests as the source of cluster state.
//!
//! It holds any number of `.yaml`, `.yml` and `.json` files, also in subdirectories, each with any number of
//! documents. Names that start with a dot and kinds that Egret does not use are ignored. `PATH/status/` is Egret's
//! own.
//!
//! Guarantees:
//! - A file that is invalid, incomplete, unreadable or truncated to nothing keeps all of its last good contents, and
//!   [`Source::problems`] says what is wrong and where. Only deleting a file removes its objects.
//! - If the whole directory disappears, the last state stays until it is back.
//! - A change is seen some 20 ms after its writer closes the file. Only documents with a new text are parsed again.
//!   Changes that inotify does not report (network file systems, links to files elsewhere) are found by checking every
//!   file's inode every ten seconds.

mod area;
mod documents;
mod file;
mod files;
mod merge;
pub(super) mod overlay;
mod status;
mod unreadable;
mod watch;

#[cfg(test)]
mod tests;

pub use status::Statuses;
pub(super) use status::remove_node;

use super::{Scope, Source, log_changes};
use crate::model::Cluster;
use anyhow::{Context, bail};
use files::{Files, UpdateResult};
use futures_util::StreamExt;
use inotify::{EventStream, Inotify};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch as channel;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{error, warn};
use watch::{Dirty, Watched};

/// Changes are read after a pause of this length, so that files written together are read together.
const QUIET: Duration = Duration::from_millis(10);
/// The longest time that changes wait for such a pause.
const MAX_WAIT: Duration = Duration::from_millis(100);
/// Interval of complete scans.
const RESCAN: Duration = Duration::from_secs(10);
/// Interval of checks of files that are being written, unless inotify reports them first.
const SETTLE: Duration = Duration::from_secs(1);
/// Interval of checks for a missing directory.
const ABSENCE: Duration = Duration::from_millis(500);
/// Buffer for some hundreds of inotify events with names, in bytes.
const EVENTS_BYTES: usize = 16 << 10;

/// Reads the directory, and follows its changes until the receivers are dropped.
pub(super) async fn open(path: &Path, scope: Scope) -> anyhow::Result<Source> {
    let inotify = Inotify::init().context(
        "cannot start inotify; raise the sysctl fs.inotify.max_user_instances, or stop what uses so many instances",
    )?;
    let node = match scope {
        Scope::Node(name) => Some(name),
        Scope::Controller | Scope::Reader(_) => None,
    };
    match path.metadata() {
        Ok(m) if m.is_dir() => {}
        Ok(_) => bail!("{} is not a directory; --cluster dir:PATH needs a directory of manifests", path.display()),
        Err(e) => bail!("{}: {e}; --cluster dir:PATH needs a directory of manifests", path.display()),
    }
    let mut files = Files::new(path.to_owned(), node, Watched::new(inotify.watches()));
    let outcome = files.refresh(&Dirty::everything());
    if outcome.missing {
        bail!("{}", files.problems().join("; "));
    }
    let cluster = files.snapshot().unwrap_or_default();
    let problems = files.problems();
    log_changes(&[], &problems);
    let incomplete = Arc::new(AtomicBool::new(files.is_incomplete()));
    let statuses = Statuses::new(path.to_owned(), incomplete.clone());
    let (snapshots, snapshots_seen) = channel::channel(Arc::new(cluster));
    let (problems, problems_seen) = channel::channel(Arc::new(problems));
    let events = inotify.into_event_stream(vec![0; EVENTS_BYTES]).context("cannot read inotify events")?;
    tokio::spawn(follow(files, events, Outlet { snapshots, problems, incomplete }, outcome));
    Ok(Source {
        snapshots: snapshots_seen,
        statuses: super::Statuses::Dir(statuses),
        problems: problems_seen,
        lookup: super::Lookup::None,
        leadership: super::Leadership::Alone,
    })
}

/// The receivers of what was read.
struct Outlet {
    snapshots: channel::Sender<Arc<Cluster>>,
    problems: channel::Sender<Arc<Vec<String>>>,
    incomplete: Arc<AtomicBool>,
}

async fn follow(mut files: Files, mut events: EventStream<Vec<u8>>, outlet: Outlet, mut outcome: UpdateResult) {
    let mut scan = Instant::now() + RESCAN;
    loop {
        if outcome.missing {
            scan = scan.min(Instant::now() + ABSENCE);
        } else if outcome.unsettled {
            scan = scan.min(Instant::now() + SETTLE);
        }
        let mut dirty = Dirty::default();
        tokio::select! {
            event = events.next() => collect(&mut files, &mut events, event, &mut dirty).await,
            () = sleep_until(scan) => {
                dirty = Dirty { everything: true, complete: outcome.missing, ..Dirty::default() };
            }
            () = async { tokio::join!(outlet.snapshots.closed(), outlet.problems.closed()); } => return,
        }
        if dirty.everything {
            scan = Instant::now() + RESCAN;
        }
        // Reading a large file takes time, in which the daemon has other work.
        let work = tokio::task::spawn_blocking(move || {
            let outcome = files.refresh(&dirty);
            let cluster = if outcome.changed { files.snapshot() } else { None };
            (files, outcome, cluster)
        });
        let cluster;
        (files, outcome, cluster) = match work.await {
            Ok(done) => done,
            Err(e) => return error!("stopped reading the directory of manifests: {e}"),
        };
        outlet.publish(&files, cluster);
    }
}

/// Collects events until there is a pause, and notes what changed.
async fn collect(
    files: &mut Files,
    events: &mut EventStream<Vec<u8>>,
    first: Option<std::io::Result<inotify::EventOwned>>,
    dirty: &mut Dirty,
) {
    let deadline = Instant::now() + MAX_WAIT;
    let mut next = first;
    loop {
        match next {
            Some(Ok(event)) => files.note(&event, dirty),
            Some(Err(e)) => {
                warn!("inotify: {e}; scanning everything");
                dirty.everything = true;
                return tokio::time::sleep(SETTLE).await;
            }
            // The kernel does not end this stream.
            None => return tokio::time::sleep(SETTLE).await,
        }
        match timeout_at(deadline.min(Instant::now() + QUIET), events.next()).await {
            Ok(event) => next = event,
            Err(_) => return,
        }
    }
}

impl Outlet {
    fn publish(&self, files: &Files, cluster: Option<Cluster>) {
        self.incomplete.store(files.is_incomplete(), Ordering::Relaxed);
        let problems = files.problems();
        let before = self.problems.borrow().clone();
        if *before != problems {
            log_changes(&before, &problems);
            self.problems.send_replace(Arc::new(problems));
        }
        if let Some(cluster) = cluster {
            self.snapshots.send_replace(Arc::new(cluster));
        }
    }
}
