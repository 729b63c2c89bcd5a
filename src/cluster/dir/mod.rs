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
pub(super) mod fault;
mod file;
pub(super) mod kubernetes;
mod lost;
mod manifest;
mod merge;
pub(super) mod names;
mod object;
mod status;
mod store;
pub(super) mod validate;
mod watch;

#[cfg(test)]
mod tests;

pub use status::Statuses;
pub(super) use status::remove_node;

use super::{Scope, Source, log_changes};
use crate::model::Cluster;
use anyhow::{Context, bail};
use futures_util::StreamExt;
use inotify::{EventStream, Inotify};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use store::{Outcome, Store};
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
    let mut store = Store::new(path.to_owned(), node, Watched::new(inotify.watches()));
    let outcome = store.refresh(&Dirty::everything());
    if outcome.missing {
        bail!("{}", store.problems().join("; "));
    }
    let cluster = store.snapshot();
    let problems = store.problems();
    log_changes(&[], &problems);
    let incomplete = Arc::new(AtomicBool::new(store.is_incomplete()));
    let statuses = Statuses::new(path.to_owned(), incomplete.clone());
    let (snapshots, snapshots_seen) = channel::channel(Arc::new(cluster));
    let (problems, problems_seen) = channel::channel(Arc::new(problems));
    let events = inotify.into_event_stream(vec![0; EVENTS_BYTES]).context("cannot read inotify events")?;
    tokio::spawn(follow(store, events, Outlet { snapshots, problems, incomplete }, outcome));
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

async fn follow(mut store: Store, mut events: EventStream<Vec<u8>>, outlet: Outlet, mut outcome: Outcome) {
    let mut scan = Instant::now() + RESCAN;
    loop {
        if outcome.missing {
            scan = scan.min(Instant::now() + ABSENCE);
        } else if outcome.unsettled {
            scan = scan.min(Instant::now() + SETTLE);
        }
        let mut dirty = Dirty::default();
        tokio::select! {
            event = events.next() => collect(&mut store, &mut events, event, &mut dirty).await,
            () = sleep_until(scan) => {
                dirty = Dirty { everything: true, complete: outcome.missing, ..Dirty::default() };
            }
            () = async { tokio::join!(outlet.snapshots.closed(), outlet.problems.closed()); } => return,
        }
        if dirty.everything {
            scan = Instant::now() + RESCAN;
        }
        // Reading a large file takes time, in which the daemon has other work.
        let before = outlet.snapshots.borrow().clone();
        let work = tokio::task::spawn_blocking(move || {
            let outcome = store.refresh(&dirty);
            let mut cluster = outcome.changed.then(|| store.snapshot());
            // Share equal parts with the previous snapshot, so that there is one copy of them.
            let changed = |new: &mut Cluster| !merge::share(&before, new);
            cluster = cluster.take_if(changed);
            (store, outcome, cluster)
        });
        let cluster;
        (store, outcome, cluster) = match work.await {
            Ok(done) => done,
            Err(e) => return error!("stopped reading the directory of manifests: {e}"),
        };
        outlet.publish(&store, cluster);
    }
}

/// Collects events until there is a pause, and notes what changed.
async fn collect(
    store: &mut Store,
    events: &mut EventStream<Vec<u8>>,
    first: Option<std::io::Result<inotify::EventOwned>>,
    dirty: &mut Dirty,
) {
    let deadline = Instant::now() + MAX_WAIT;
    let mut next = first;
    loop {
        match next {
            Some(Ok(event)) => store.note(&event, dirty),
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
    fn publish(&self, store: &Store, cluster: Option<Cluster>) {
        self.incomplete.store(store.is_incomplete(), Ordering::Relaxed);
        let problems = store.problems();
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
