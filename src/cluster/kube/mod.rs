//! The Kubernetes API as the source of cluster state.
//!
//! Each kind is followed by a task of its own (`watch`), which tells changes to one that holds all that is known
//! (`store`) and tells snapshots to the reader. The first snapshot comes when every kind has been listed to its end.
//! What is read is the least: a node daemon reads its own node's pods, metadata alone of namespaces, Services only
//! while a policy names one.

mod allocations_text;
mod client;
mod decode;
mod events;
mod kind;
pub mod lease;
pub mod lists;
mod login;
mod lookup;
mod offline_cache;
mod prune;
mod review;
mod service_networks;
mod services;
mod split;
mod status;
mod store;
mod taint;
mod watch;

pub use client::{APPLY, Client, Failure, JSON};
pub use lookup::Lookup;
pub use review::{Reviewer, Verdict};
pub use status::Statuses;

use super::dir::names::Names;
use super::{KubeOptions, Leadership, PodsOf, Scope, Source, WaitingFor, log_changes};
use crate::model::Cluster;
use crate::model::selector::Name;
use crate::model::target::Target;
use anyhow::Context;
use decode::Reading;
use http::Method;
use kind::Kind;
use offline_cache::Files;
use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use store::Store;
use tokio::sync::{mpsc, watch as channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use watch::{Change, Watch, escaped};

/// Snapshots follow each other at this distance at least: each one makes its readers compute.
const PACE: Duration = Duration::from_millis(5);
/// As many changes wait for the store.
const CHANGES: usize = 256;
/// Between words on what is waited for.
const DEADLINE: Duration = Duration::from_secs(10);
/// Services are followed for so long after the last policy has named one.
const GRACE_PERIOD: Duration = Duration::from_secs(60);

/// Follows the API server until nobody listens any more.
pub(super) async fn open(options: KubeOptions, scope: Scope, waiting_for: WaitingFor<'_>) -> anyhow::Result<Source> {
    let client = Client::connect(&options).await?;
    let (node, lease, pods) = match scope {
        Scope::Node(name) => (Some(Name::from(name)), None, None),
        Scope::Controller => (None, options.lease, None),
        Scope::Reader(pods) => (None, None, Some(pods)),
    };
    let is_person = options.person.is_some();
    let (changes, taken) = mpsc::channel(CHANGES);
    let files = Files::new(options.known.filter(|_| node.is_some()));
    let tasks =
        Tasks { client: client.clone(), node, pods, is_person, names: Arc::default(), changes, files: files.clone() };
    let (reading, names, lookups) = (tasks.reading(), tasks.names.clone(), tasks.changes.clone());
    let mut follower = Follower::new(tasks, taken);
    let optional = Kind::OPTIONAL.into_iter().filter(|_| follower.tasks.node.is_some());
    for kind in Kind::ALWAYS.into_iter().chain(optional) {
        if kind == Kind::Pod && follower.tasks.pods == Some(PodsOf::Nobody) {
            follower.store.take(Change::Absent(kind));
        } else {
            follower.tasks.follow(kind);
        }
    }
    let first = follower.first(waiting_for).await?;
    // Not before: who cannot read the cluster must not keep others from leading.
    let leadership = match lease {
        Some(mut lease) => {
            if lease.namespace.is_empty() {
                lease.namespace = client.namespace();
            }
            Leadership::Lease(lease::Leadership::start(client.clone(), lease))
        }
        None => Leadership::Alone,
    };
    let (snapshots, snapshots_seen) = channel::channel(Arc::new(first));
    let (problems, problems_seen) = channel::channel(Arc::new(follower.store.problems()));
    tokio::spawn(follower.follow(snapshots, problems));
    let lookup = Lookup { client: client.clone(), reading, names, changes: lookups, snapshots: snapshots_seen.clone() };
    Ok(Source {
        snapshots: snapshots_seen,
        statuses: super::Statuses::Kube(Statuses::new(client, files)),
        problems: problems_seen,
        lookup: super::Lookup::Kube(lookup),
        leadership,
    })
}

/// All Services, and the endpoints of those that packets to `target` may be for.
pub(super) async fn services(options: KubeOptions, target: &Target) -> anyhow::Result<services::Found> {
    let client = Client::connect(&options).await?;
    services::find(&client, target).await.context("Services")
}

/// What asks about tokens, with the credentials of these options.
pub(super) async fn reviewer(options: &KubeOptions) -> anyhow::Result<Reviewer> {
    Ok(Reviewer(Client::connect(options).await?))
}

/// Removes what a node said of itself; whether there was anything.
pub(super) async fn remove_node(options: KubeOptions, node: &str) -> anyhow::Result<bool> {
    let client = Client::connect(&options).await?;
    match client.ask::<serde_json::Value>(Method::DELETE, &Kind::EgressNode.path_of(None, node), None).await {
        Err(e) if e.is_not_found() => Ok(false),
        other => other.map(|_| true).with_context(|| format!("EgressNode {node}")),
    }
}

/// What each task needs.
struct Tasks {
    client: Client,
    node: Option<Name>,
    /// The pods that a command asks for; `None`: a daemon reads.
    pods: Option<PodsOf>,
    is_person: bool,
    names: Arc<Mutex<Names>>,
    changes: mpsc::Sender<Change>,
    files: Files,
}

impl Tasks {
    fn reading(&self) -> Reading {
        Reading { node: self.node.clone() }
    }

    fn follow(&self, kind: Kind) -> JoinHandle<()> {
        let (path, selector) = match &self.pods {
            Some(pods) if kind == Kind::Pod => pods.path_and_selector(),
            _ => (kind.path().into(), kind.selector(self.node.as_deref())),
        };
        let is_person = self.is_person;
        let (client, names, changes) = (self.client.clone(), self.names.clone(), self.changes.clone());
        let files = self.files.clone();
        tokio::spawn(
            Watch { client, kind, path, selector, reading: self.reading(), is_person, names, files, changes }.run(),
        )
    }
}

impl PodsOf {
    /// Where the API server has these pods, and which of them.
    fn path_and_selector(&self) -> (Cow<'static, str>, String) {
        let in_namespace = |namespace: &str| format!("/api/v1/namespaces/{}/pods", escaped(namespace)).into();
        match self {
            PodsOf::Nobody | PodsOf::All => (Kind::Pod.path().into(), String::new()),
            PodsOf::Namespace(name) => (in_namespace(name), String::new()),
            PodsOf::Node(name) => (Kind::Pod.path().into(), Kind::Pod.selector(Some(name))),
            PodsOf::One(key) => {
                (in_namespace(&key.namespace), format!("fieldSelector=metadata.name%3D{}", escaped(&key.name)))
            }
        }
    }
}

/// Brings the store up to date and tells of it.
struct Follower {
    tasks: Tasks,
    taken: mpsc::Receiver<Change>,
    store: Store,
    services: Option<JoinHandle<()>>,
    /// Somebody has been asked for the Services' networks.
    asked: bool,
    /// Since when no policy has named a Service.
    unneeded: Option<Instant>,
    /// It was looked what was known before.
    recalled: bool,
}

impl Follower {
    fn new(tasks: Tasks, taken: mpsc::Receiver<Change>) -> Self {
        let store = Store::new(tasks.node.is_none());
        Follower { tasks, taken, store, services: None, asked: false, unneeded: None, recalled: false }
    }

    /// The first snapshot. It waits for it as long as it takes: half a cluster is none. With the API server away, it is
    /// what an earlier daemon of this node was told last.
    ///
    /// # Errors
    /// A command reads, and a kind cannot be read.
    async fn first(&mut self, waiting_for: WaitingFor<'_>) -> anyhow::Result<Cluster> {
        let mut said = Vec::new();
        let mut patience = Instant::now() + DEADLINE;
        loop {
            let missing = self.store.missing();
            if missing.is_empty() && !self.store.lacks_service_networks() {
                self.trim();
                if self.services.is_none() {
                    self.tasks.files.forget(Kind::Service);
                }
                return Ok(self.store.news().unwrap_or_default());
            }
            tokio::select! {
                change = self.taken.recv() => {
                    if let (Some(Change::State(_, Some(trouble))), Some(_)) = (&change, &self.tasks.pods) {
                        anyhow::bail!("{}", trouble.text);
                    }
                    if let Some(change) = change {
                        let away = matches!(&change, Change::State(_, Some(trouble)) if trouble.away);
                        self.take(change);
                        if away && !std::mem::replace(&mut self.recalled, true) {
                            self.recall();
                        }
                    }
                    self.care_for_services();
                    let problems = self.store.problems();
                    log_changes(&said, &problems);
                    waiting_for(&match &problems[..] {
                        [] => format!("the API server has not listed {:?} yet", self.store.missing()),
                        problems => format!("the cluster has not been read yet: {}", problems.join("; ")),
                    });
                    said = problems;
                }
                () = sleep_until(patience) => {
                    info!(?missing, "still waiting for the API server");
                    patience = Instant::now() + DEADLINE;
                }
            }
        }
    }

    /// Takes in what was known before of all that has not been listed yet, if all of it is there.
    fn recall(&mut self) {
        let (reading, files) = (self.tasks.reading(), self.tasks.files.clone());
        let mut names = self.tasks.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut recall = |kind| match files.recall(kind, &reading, &mut names) {
            Some(listed) => Some(Change::Listed(kind, listed)),
            // A daemon of an earlier version followed none, or it had no right to.
            None if kind == Kind::EndpointSlice => Some(Change::Absent(kind)),
            None => None,
        };
        let kinds: Vec<Kind> = Kind::ALWAYS.into_iter().chain(Kind::OPTIONAL).collect();
        let unlisted = kinds.into_iter().filter(|kind| !self.store.has_listed(*kind));
        let Some(all) = unlisted.map(&mut recall).collect::<Option<Vec<Change>>>() else { return };
        let services = recall(Kind::Service);
        let own = files.own(&reading, &mut names).map(|own| Change::Applied(Kind::EgressNode, own));
        let networks = files.service_networks().map(Change::ServiceNetworks);
        drop(names);
        for change in all.into_iter().chain(own).chain(networks) {
            self.store.take(change);
        }
        // Not before it is known whether a policy goes by them.
        if let Some(services) = services.filter(|_| self.store.needs_services()) {
            self.store.take(services);
        }
        warn!("the API server is away; this node goes on from what it was told last");
    }

    async fn follow(mut self, snapshots: channel::Sender<Arc<Cluster>>, problems: channel::Sender<Arc<Vec<String>>>) {
        let mut last = Instant::now() - PACE;
        loop {
            let grace_ends = self.unneeded.map(|since| since + GRACE_PERIOD);
            let change = tokio::select! {
                change = self.taken.recv() => change,
                () = sleep_until(grace_ends.unwrap_or_else(Instant::now)), if grace_ends.is_some() => None,
                () = async { tokio::join!(snapshots.closed(), problems.closed()); } => return self.end(),
            };
            let mut listed = matches!(change, Some(Change::Listed(..)));
            if let Some(change) = change {
                self.take(change);
            }
            sleep_until(last + PACE).await;
            while let Ok(change) = self.taken.try_recv() {
                listed |= matches!(change, Change::Listed(..));
                self.take(change);
            }
            self.care_for_services();
            if listed {
                self.trim();
            }
            let now = self.store.problems();
            let before = problems.borrow().clone();
            if *before != now {
                log_changes(&before, &now);
                problems.send_replace(Arc::new(now));
            }
            if let Some(cluster) = self.store.news() {
                snapshots.send_replace(Arc::new(cluster));
                last = Instant::now();
            }
        }
    }

    fn take(&mut self, change: Change) {
        let of_services = matches!(
            change,
            Change::Listed(Kind::Service, _)
                | Change::Applied(Kind::Service, _)
                | Change::Deleted(Kind::Service, _)
                | Change::State(Kind::Service, _)
        );
        if let Change::ServiceNetworks(answer) = &change {
            self.tasks.files.note_service_networks(answer);
        }
        // What a task that was ended has told last is old.
        if !of_services || self.services.is_some() {
            self.store.take(change);
        }
    }

    /// Follows Services while a policy goes by them.
    fn care_for_services(&mut self) {
        if self.store.lacks_service_networks() && !std::mem::replace(&mut self.asked, true) {
            tokio::spawn(service_networks::find(self.tasks.client.clone(), self.tasks.changes.clone()));
        }
        let needed = self.store.needs_services();
        match (&self.services, needed) {
            (None, true) => self.services = Some(self.tasks.follow(Kind::Service)),
            (Some(_), true) => self.unneeded = None,
            (Some(task), false) => {
                let since = *self.unneeded.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE_PERIOD {
                    task.abort();
                    self.services = None;
                    self.unneeded = None;
                    self.tasks.files.forget(Kind::Service);
                    self.store.forget_services();
                }
            }
            (None, false) => {}
        }
    }

    fn trim(&self) {
        self.tasks.names.lock().unwrap_or_else(PoisonError::into_inner).trim();
    }

    /// The channel closes, and with it every task ends.
    fn end(self) {
        if let Some(task) = self.services {
            task.abort();
        }
    }
}
