//! The Kubernetes API as the source of cluster state.
//!
//! Each kind has a task (`watch`) that lists and watches its objects and sends the changes to one task (`Follower`),
//! which stores them and sends snapshots to the reader. The first snapshot is sent when every kind has been listed to
//! the end. Egret reads as little as possible: a node daemon reads the pods of its own node, only the metadata of
//! namespaces, and Services only while a policy needs them. The controller reads MetalLB's and Cilium's objects only while
//! a policy has a Service's address.

mod client;
mod events;
mod kind;
pub mod lease;
pub mod lists;
mod login;
mod lookup;
mod offline_cache;
mod progress;
mod prune;
mod review;
mod service_networks;
mod services;
mod split;
mod status;
mod taint;
mod watch;

use client::escaped;
pub use client::{Client, JSON, MERGE, RequestFailure};
pub use lookup::Lookup;
pub use review::{Reviewer, TokenReview};
pub use status::Statuses;

use super::decode::Reading;
use super::kind::Kind;
use super::names::Names;
use super::{KubeOptions, Leadership, PodsOf, Scope, Source, WaitingFor, log_changes};
use crate::model::Cluster;
use crate::model::selector::Name;
use crate::model::target::Target;
use anyhow::Context;
use http::Method;
use offline_cache::Files;
use progress::Progress;
use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch as channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use watch::{Change, Watch};

/// The shortest interval between snapshots: each one makes its readers compute.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(5);
/// The most changes that wait for the store.
const CHANGES: usize = 256;
/// The interval of log lines that say what the first snapshot waits for.
const WAIT_REPORT: Duration = Duration::from_secs(10);
/// The time for which Services are still followed after the last policy that selects pods by them is gone.
const GRACE_PERIOD: Duration = Duration::from_secs(60);

/// Follows the API server until the receivers are dropped.
pub(super) async fn open(options: KubeOptions, scope: Scope, waiting_for: WaitingFor<'_>) -> anyhow::Result<Source> {
    let client = Client::connect(&options).await?;
    let (node, lease, pods) = match scope {
        Scope::Node(name) => (Some(Name::from(name)), None, None),
        Scope::Controller => (None, options.lease, None),
        Scope::Reader(pods) => (None, None, Some(pods)),
    };
    let is_person = options.person.is_some();
    let (changes, received) = mpsc::channel(CHANGES);
    let files = Files::new(options.known.filter(|_| node.is_some()));
    let tasks =
        Tasks { client: client.clone(), node, pods, is_person, names: Arc::default(), changes, files: files.clone() };
    let (reading, names, lookups) = (tasks.reading(), tasks.names.clone(), tasks.changes.clone());
    let mut follower = Follower::new(tasks, received, options.follows_services);
    let optional = Kind::OPTIONAL.into_iter().filter(|_| follower.tasks.node.is_some());
    for kind in Kind::ALWAYS.into_iter().chain(optional) {
        if kind == Kind::Pod && follower.tasks.pods == Some(PodsOf::Nobody) {
            follower.progress.take(Change::Absent(kind));
        } else {
            follower.tasks.follow(kind);
        }
    }
    let first = follower.first(waiting_for).await?;
    // Not earlier: a controller that cannot read the cluster must not take the leadership from others.
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
    let (problems, problems_seen) = channel::channel(Arc::new(follower.progress.problems()));
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

/// All Services, and the endpoints of those to which packets to `target` may belong.
pub(super) async fn services(options: KubeOptions, target: &Target) -> anyhow::Result<services::ServicesAndEndpoints> {
    let client = Client::connect(&options).await?;
    services::find(&client, target).await.context("Services")
}

/// The reviewer of bearer tokens, with the credentials of these options.
pub(super) async fn reviewer(options: &KubeOptions) -> anyhow::Result<Reviewer> {
    Ok(Reviewer(Client::connect(options).await?))
}

/// Removes a node's EgressNode. Returns whether there was one.
pub(super) async fn remove_node(options: KubeOptions, node: &str) -> anyhow::Result<bool> {
    let client = Client::connect(&options).await?;
    match client.ask::<serde_json::Value>(Method::DELETE, &Kind::EgressNode.path_of(None, node), None).await {
        Err(e) if e.is_not_found() => Ok(false),
        other => other.map(|_| true).with_context(|| format!("EgressNode {node}")),
    }
}

/// What all tasks share.
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

/// Stores the changes and sends snapshots.
struct Follower {
    tasks: Tasks,
    received: mpsc::Receiver<Change>,
    progress: Progress,
    /// The task that follows Services.
    services: Option<JoinHandle<()>>,
    /// The kinds that say which nodes announce Services' addresses are followed, or not needed.
    follows_announcements: bool,
    /// The task that asks for the networks of Services has been started.
    asked_for_networks: bool,
    /// Services have not been needed since then.
    unneeded_since: Option<Instant>,
    /// The offline cache has been tried.
    tried_cache: bool,
}

impl Follower {
    fn new(tasks: Tasks, received: mpsc::Receiver<Change>, follows_services: bool) -> Self {
        let progress = Progress::new(tasks.node.is_none()).following_services(follows_services);
        Follower {
            tasks,
            received,
            progress,
            services: None,
            follows_announcements: false,
            asked_for_networks: false,
            unneeded_since: None,
            tried_cache: false,
        }
    }

    /// The first snapshot. Waits without a limit, because a part of a cluster is no state to act on. While the API
    /// server is away, the offline cache of an earlier daemon of this node is the first snapshot.
    ///
    /// # Errors
    /// A command reads, and a kind cannot be read.
    async fn first(&mut self, waiting_for: WaitingFor<'_>) -> anyhow::Result<Cluster> {
        let mut problems_before = Vec::new();
        let mut report_at = Instant::now() + WAIT_REPORT;
        loop {
            let missing = self.progress.missing();
            if missing.is_empty() && !self.progress.lacks_service_networks() {
                self.trim();
                if self.services.is_none() {
                    self.tasks.files.forget(Kind::Service);
                }
                return Ok(self.progress.first());
            }
            tokio::select! {
                change = self.received.recv() => {
                    if let Some(Change::State(_, Some(trouble))) = &change
                        && (self.tasks.is_person || self.tasks.pods.is_some())
                    {
                        anyhow::bail!("{}", trouble.text);
                    }
                    if let Some(change) = change {
                        let away = matches!(&change, Change::State(_, Some(trouble)) if trouble.away);
                        self.take(change);
                        if away && !std::mem::replace(&mut self.tried_cache, true) {
                            self.load_cache();
                        }
                    }
                    self.follow_services_if_needed();
                    let problems = self.progress.problems();
                    log_changes(&problems_before, &problems);
                    waiting_for(&match &problems[..] {
                        [] => format!("the API server has not listed {:?} yet", self.progress.missing()),
                        problems => format!("the cluster has not been read yet: {}", problems.join("; ")),
                    });
                    problems_before = problems;
                }
                () = sleep_until(report_at) => {
                    info!(?missing, "still waiting for the API server");
                    report_at = Instant::now() + WAIT_REPORT;
                }
            }
        }
    }

    /// Loads the offline cache of all kinds that have not been listed yet, if it has all of them.
    fn load_cache(&mut self) {
        let (reading, files) = (self.tasks.reading(), self.tasks.files.clone());
        let mut names = self.tasks.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut load = |kind| match files.load(kind, &reading, &mut names) {
            Some(listed) => Some(Change::Listed(kind, listed)),
            // A daemon of an earlier version followed none, or the daemon had no right to.
            None if kind == Kind::EndpointSlice => Some(Change::Absent(kind)),
            None => None,
        };
        let kinds: Vec<Kind> = Kind::ALWAYS.into_iter().chain(Kind::OPTIONAL).collect();
        let unlisted = kinds.into_iter().filter(|kind| !self.progress.has_listed(*kind));
        let Some(all) = unlisted.map(&mut load).collect::<Option<Vec<Change>>>() else { return };
        let services = load(Kind::Service);
        let own = files.own(&reading, &mut names).map(|own| Change::Applied(Kind::EgressNode, own));
        let networks = files.service_networks().map(Change::ServiceNetworks);
        drop(names);
        for change in all.into_iter().chain(own).chain(networks) {
            self.progress.take(change);
        }
        // The policies tell whether Services are needed.
        if let Some(services) = services.filter(|_| self.progress.needs_services()) {
            self.progress.take(services);
        }
        warn!("the API server is away; this node continues with its offline cache");
    }

    async fn follow(mut self, snapshots: channel::Sender<Arc<Cluster>>, problems: channel::Sender<Arc<Vec<String>>>) {
        let mut last = Instant::now() - SNAPSHOT_INTERVAL;
        loop {
            let grace_ends = self.unneeded_since.map(|since| since + GRACE_PERIOD);
            let change = tokio::select! {
                change = self.received.recv() => change,
                () = sleep_until(grace_ends.unwrap_or_else(Instant::now)), if grace_ends.is_some() => None,
                () = async { tokio::join!(snapshots.closed(), problems.closed()); } => return self.end(),
            };
            let mut listed = matches!(change, Some(Change::Listed(..)));
            if let Some(change) = change {
                self.take(change);
            }
            sleep_until(last + SNAPSHOT_INTERVAL).await;
            while let Ok(change) = self.received.try_recv() {
                listed |= matches!(change, Change::Listed(..));
                self.take(change);
            }
            self.follow_services_if_needed();
            if listed {
                self.trim();
            }
            let now = self.progress.problems();
            let before = problems.borrow().clone();
            if *before != now {
                log_changes(&before, &now);
                problems.send_replace(Arc::new(now));
            }
            if let Some(cluster) = self.progress.news() {
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
        // The last changes of a task that was ended are outdated.
        if !of_services || self.services.is_some() {
            self.progress.take(change);
        }
    }

    /// Follows Services while they are needed.
    fn follow_services_if_needed(&mut self) {
        if self.progress.lacks_service_networks() && !std::mem::replace(&mut self.asked_for_networks, true) {
            tokio::spawn(service_networks::find(self.tasks.client.clone(), self.tasks.changes.clone()));
        }
        if self.progress.needs_announcements() && !std::mem::replace(&mut self.follows_announcements, true) {
            for kind in Kind::ANNOUNCEMENTS {
                match self.tasks.pods {
                    // They end when the channel of changes closes. Where they exist, there are few of these objects.
                    None => drop(self.tasks.follow(kind)),
                    // A command reads what the controller has made of them.
                    Some(_) => self.progress.take(Change::Absent(kind)),
                }
            }
        }
        let needed = self.progress.needs_services();
        match (&self.services, needed) {
            (None, true) => self.services = Some(self.tasks.follow(Kind::Service)),
            (Some(_), true) => self.unneeded_since = None,
            (Some(task), false) => {
                let since = *self.unneeded_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE_PERIOD {
                    task.abort();
                    self.services = None;
                    self.unneeded_since = None;
                    self.tasks.files.forget(Kind::Service);
                    self.progress.forget_services();
                }
            }
            (None, false) => {}
        }
    }

    fn trim(&self) {
        self.tasks.names.lock().unwrap_or_else(PoisonError::into_inner).trim();
    }

    /// Ends. The channel of changes closes, and with it every task ends.
    fn end(self) {
        if let Some(task) = self.services {
            task.abort();
        }
    }
}
