//! A directory of manifests as the source of cluster state.
//!
//! Any number of `.yaml`, `.yml` and `.json` files, in subdirectories too, each with any number of documents. Names
//! that start with a dot are passed over, and so are kinds that Egret does not use. `PATH/status/` is Egret's own.
//!
//! What is promised:
//! - A file that is wrong, half-written, unreadable or cut off to nothing keeps what it last held, all of it, and
//!   [`Source::problems`] says what is wrong and where. Only deleting a file removes its objects.
//! - If all of the directory goes, the last state stays until it is back.
//! - A change is seen some 20 ms after its writer closes the file, and only what changed is parsed again: of a file,
//!   the documents that have another text. Whatever inotify does not tell (network file systems, links to files
//!   elsewhere) is found by a look at every file's inode every ten seconds.

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

use super::{Scope, Source, tell};
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

/// How long nothing must happen before changes are looked at: what is written together is read together.
const QUIET: Duration = Duration::from_millis(10);
/// How long changes can wait for quiet.
const PATIENCE: Duration = Duration::from_millis(100);
/// Between looks at everything.
const RESCAN: Duration = Duration::from_secs(10);
/// Between looks at files that are being written, unless inotify tells first.
const SETTLE: Duration = Duration::from_secs(1);
/// Between looks for a directory that is gone.
const ABSENCE: Duration = Duration::from_millis(500);
/// Room for inotify's events: some hundreds, with their names.
const EVENTS: usize = 16 << 10;

/// Reads the directory, and follows its changes until nobody listens any more.
pub(super) async fn open(path: &Path, scope: Scope) -> anyhow::Result<Source> {
    let inotify = Inotify::init().context(
        "inotify is not to be had; raise the sysctl fs.inotify.max_user_instances, or end what uses so many of them",
    )?;
    let node = match scope {
        Scope::Node(name) => Some(name),
        Scope::Controller => None,
    };
    match path.metadata() {
        Ok(m) if m.is_dir() => {}
        Ok(_) => bail!("{} is not a directory; --cluster dir:PATH wants a directory of manifests", path.display()),
        Err(e) => bail!("{}: {e}; --cluster dir:PATH wants a directory of manifests", path.display()),
    }
    let mut store = Store::new(path.to_owned(), node, Watched::new(inotify.watches()));
    let outcome = store.refresh(&Dirty::everything());
    if outcome.missing {
        bail!("{}", store.problems().join("; "));
    }
    let cluster = store.snapshot();
    let problems = store.problems();
    tell(&[], &problems);
    let incomplete = Arc::new(AtomicBool::new(store.is_incomplete()));
    let statuses = Statuses::new(path.to_owned(), incomplete.clone());
    let (snapshots, snapshots_seen) = channel::channel(Arc::new(cluster));
    let (problems, problems_seen) = channel::channel(Arc::new(problems));
    let events = inotify.into_event_stream(vec![0; EVENTS]).context("cannot listen to inotify")?;
    tokio::spawn(follow(store, events, Outlet { snapshots, problems, incomplete }, outcome));
    Ok(Source {
        snapshots: snapshots_seen,
        statuses: super::Statuses::Dir(statuses),
        problems: problems_seen,
        lookup: super::Lookup::None,
        leadership: super::Leadership::Alone,
    })
}

/// Where what was read goes to.
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
        // Reading a big file takes a while, in which the daemon has others to answer.
        let before = outlet.snapshots.borrow().clone();
        let work = tokio::task::spawn_blocking(move || {
            let outcome = store.refresh(&dirty);
            let mut cluster = outcome.changed.then(|| store.snapshot());
            // What there was before goes as soon as it can: of most of it there is one copy then.
            let changed = |new: &mut Cluster| !merge::share(&before, new);
            cluster = cluster.take_if(changed);
            (store, outcome, cluster)
        });
        let cluster;
        (store, outcome, cluster) = match work.await {
            Ok(done) => done,
            Err(e) => return error!("reading the directory of manifests failed, and is given up: {e}"),
        };
        outlet.publish(&store, cluster);
    }
}

/// Takes events until there is quiet, and finds out what they mean.
async fn collect(
    store: &mut Store,
    events: &mut EventStream<Vec<u8>>,
    first: Option<std::io::Result<inotify::EventOwned>>,
    dirty: &mut Dirty,
) {
    let deadline = Instant::now() + PATIENCE;
    let mut next = first;
    loop {
        match next {
            Some(Ok(event)) => store.note(&event, dirty),
            Some(Err(e)) => {
                warn!("inotify: {e}; everything is looked at again");
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
            tell(&before, &problems);
            self.problems.send_replace(Arc::new(problems));
        }
        if let Some(cluster) = cluster {
            self.snapshots.send_replace(Arc::new(cluster));
        }
    }
}
