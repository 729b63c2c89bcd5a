//! The sources of cluster state and the destinations of statuses: the Kubernetes API, or a directory of manifests.
//!
//! A source delivers snapshots ([`Cluster`]): the first when it has read everything once, then one for each change.
//! An object that cannot be read keeps its last good state.

mod decode;
pub mod dir;
mod kind;
pub mod kube;
mod names;
mod object;
mod opt_in;
mod refused;
mod store;
#[cfg(test)]
mod tests;

use crate::api::{EgressGatewayStatus, EgressNodeStatus, EgressPolicySpec, EgressPolicyStatus};
use crate::model::notice::Notice;
use crate::model::selector::Name;
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey, PolicyKey};
pub use dir::overlay::{Overlaid, Verb as OverlayVerb, overlay};
pub use kube::lease::ElectionSettings;
pub use kube::lists::Lists;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{info, warn};

/// The value of `--cluster`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceName {
    /// `dir:PATH`: a directory of manifests.
    Dir(PathBuf),
    /// `kube`: the Kubernetes API.
    Kube(KubeOptions),
}

/// Options of the Kubernetes API as a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeOptions {
    /// A kubeconfig file; `None`: the credentials that Kubernetes gives to pods.
    pub kubeconfig: Option<PathBuf>,
    /// A person's credentials, found as kubectl finds them; `None`: this is a daemon.
    pub person: Option<Person>,
    /// Leader election among several controllers; `None`: there is only one.
    pub lease: Option<ElectionSettings>,
    /// The offline cache, for a node's start while the API server is away; `None`: there is none.
    pub known: Option<OfflineCache>,
    /// Whether Services are followed whatever the policies are.
    pub follows_services: bool,
}

/// Whose credentials a command of a person uses, of those in kubeconfig files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Person {
    /// The context; `None`: the current one.
    pub context: Option<String>,
}

/// The directory of a node's offline cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfflineCache {
    /// The directory; it is created if it does not exist.
    pub directory: PathBuf,
    /// The owner: the node and its boot. A cache of another owner is not read, because it describes another node, or
    /// a kernel that no longer runs.
    pub of: String,
}

impl FromStr for SourceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("dir:") {
            _ if text == "kube" => Ok(SourceName::Kube(KubeOptions::default())),
            Some("") => Err("dir: names no directory; write dir:/path/to/manifests".into()),
            Some(path) => Ok(SourceName::Dir(path.into())),
            None => Err(format!("{text:?} is no source of cluster state; write kube or dir:/path/to/manifests")),
        }
    }
}

impl SourceName {
    /// Sets the options, if the source is the Kubernetes API.
    #[must_use]
    pub fn with(self, options: KubeOptions) -> Self {
        match self {
            SourceName::Kube(_) => SourceName::Kube(options),
            dir @ SourceName::Dir(_) => dir,
        }
    }

    /// Sets the offline cache, if the source is the Kubernetes API.
    #[must_use]
    pub fn writing_down(mut self, known: OfflineCache) -> Self {
        if let SourceName::Kube(options) = &mut self {
            options.known = Some(known);
        }
        self
    }
}

/// How much of the cluster a reader needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A node daemon: the pods of this node only, no policy statuses.
    Node(String),
    /// The controller: everything.
    Controller,
    /// A command that a person runs: everything but pods that it does not ask for. What cannot be read is an error,
    /// and is not tried again.
    Reader(PodsOf),
}

/// Which pods a command needs. A cluster may have 100,000.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodsOf {
    /// No pods.
    Nobody,
    /// The pods of all namespaces.
    All,
    /// The pods of one namespace.
    Namespace(String),
    /// The pods of one node.
    Node(String),
    /// One pod.
    One(ObjectKey),
}

/// An open source.
pub struct Source {
    /// The newest snapshot.
    pub snapshots: watch::Receiver<Arc<Cluster>>,
    /// Writes statuses.
    pub statuses: Statuses,
    /// The source's current problems, one line each with the object and the fault. Empty if there are none.
    pub problems: watch::Receiver<Arc<Vec<String>>>,
    /// Looks up pods that start before a snapshot has them.
    pub lookup: Lookup,
    /// Whether this process may write what only one controller may write.
    pub leadership: Leadership,
}

/// Writes statuses to the source. Each kind of status has one writer in the cluster.
#[derive(Clone, Debug)]
pub enum Statuses {
    /// To files in `PATH/status/`.
    Dir(dir::Statuses),
    /// To the objects' status, by the Kubernetes API.
    Kube(kube::Statuses),
}

/// A status was not written, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// Nothing was changed.
    #[error("{0:#}")]
    Refused(#[from] anyhow::Error),
    /// It is not known whether the status was written or still will be.
    #[error("{0:#}")]
    Uncertain(anyhow::Error),
}

/// Looks up a pod by name.
#[derive(Clone)]
pub enum Lookup {
    /// The source delivers every pod without being asked.
    None,
    /// By the Kubernetes API.
    Kube(kube::Lookup),
}

impl Lookup {
    /// Makes one of the next snapshots have the pod, if there is one of this name, and of this uid unless `uid` is
    /// empty.
    pub fn look_for(&self, pod: ObjectKey, uid: &str) {
        match self {
            Lookup::None => {}
            Lookup::Kube(lookup) => lookup.look_for(pod, uid.to_owned()),
        }
    }
}

/// Leader election among controllers.
#[derive(Clone)]
pub enum Leadership {
    /// This is the only controller.
    Alone,
    /// The holder of the Lease leads.
    Lease(kube::lease::Leadership),
}

/// One term of a leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// The leader's name.
    pub name: String,
    /// The term's number; later terms have higher numbers. 0 without leader election.
    pub number: i64,
}

impl Leadership {
    /// The term in which this process leads; `None` if it does not.
    pub fn term(&self) -> Option<Term> {
        match self {
            Leadership::Alone => Some(Term { name: String::new(), number: 0 }),
            Leadership::Lease(lease) => lease.term(),
        }
    }

    /// Waits until this process becomes the leader, or is no longer.
    pub async fn changed(&mut self) {
        match self {
            Leadership::Alone => std::future::pending().await,
            Leadership::Lease(lease) => lease.changed().await,
        }
    }

    /// Makes sure that this process leads now. A later leader sees everything that was written before this call.
    ///
    /// # Errors
    /// This process does not lead, or the Lease cannot be read.
    pub async fn confirm(&self) -> anyhow::Result<()> {
        match self {
            Leadership::Alone => Ok(()),
            Leadership::Lease(lease) => lease.confirm().await,
        }
    }

    /// Releases the leadership, so that the next process can lead at once.
    pub async fn release(&self) {
        if let Leadership::Lease(lease) = self {
            lease.release().await;
        }
    }
}

/// Opens a source. Returns when everything has been read once.
///
/// # Errors
/// The source does not exist or cannot be watched.
pub async fn open(name: &SourceName, scope: Scope) -> anyhow::Result<Source> {
    open_and_report(name, scope, &|_| {}).await
}

/// Receives a text that says what an opening waits for.
pub type WaitingFor<'a> = &'a (dyn Fn(&str) + Sync);

/// Opens a source as [`open`] does, and reports what it waits for.
///
/// # Errors
/// The source does not exist or cannot be watched.
pub async fn open_and_report(name: &SourceName, scope: Scope, waiting_for: WaitingFor<'_>) -> anyhow::Result<Source> {
    match name {
        SourceName::Dir(path) => dir::open(path, scope).await,
        SourceName::Kube(options) => kube::open(options.clone(), scope, waiting_for).await,
    }
}

/// Adds to a snapshot all Services, and the endpoints of those to which packets to `target` may belong, if the
/// snapshot has none.
///
/// # Errors
/// They cannot be read.
pub async fn add_services(name: &SourceName, cluster: &mut Cluster, target: &Target) -> anyhow::Result<()> {
    if let SourceName::Kube(options) = name {
        let (services, endpoints) = kube::services(options.clone(), target).await?;
        cluster.services = services.into();
        for (key, endpoints) in endpoints {
            cluster.endpoints.insert(key, endpoints);
        }
    }
    Ok(())
}

/// The reviewer of bearer tokens.
///
/// # Errors
/// The source knows no tokens, or there are no credentials.
pub async fn reviewer(name: &SourceName) -> anyhow::Result<kube::Reviewer> {
    match name {
        SourceName::Dir(path) => anyhow::bail!(
            "dir:{} has no API server to review tokens; omit --metrics-authentication, or use --cluster kube",
            path.display()
        ),
        SourceName::Kube(options) => kube::reviewer(options).await,
    }
}

/// Removes a node's report from the cluster. Returns whether there was one.
///
/// # Errors
/// The report could not be removed.
pub async fn remove_node(name: &SourceName, node: &str) -> anyhow::Result<bool> {
    match name {
        SourceName::Dir(path) => dir::remove_node(path, node),
        SourceName::Kube(options) => kube::remove_node(options.clone(), node).await,
    }
}

impl Statuses {
    /// Writes a gateway's status with its allocations, replacing the version that a snapshot had
    /// ([`Gateway::version`](crate::model::Gateway::version)). Returns the new version, if the source has versions.
    /// `notices` become events, if the source has events.
    ///
    /// # Errors
    /// The status was not stored, or the object's version has changed meanwhile.
    pub async fn gateway(
        &self,
        name: &str,
        status: &EgressGatewayStatus,
        in_place_of: Option<&str>,
        notices: Vec<Notice>,
    ) -> Result<Option<Box<str>>, NotWritten> {
        match self {
            Statuses::Dir(d) => {
                let (d, name, status) = (d.clone(), name.to_owned(), status.clone());
                Ok(in_background(move || d.gateway(&name, &status)).await.map(|()| None)?)
            }
            Statuses::Kube(k) => k.gateway(name, status, in_place_of, notices).await,
        }
    }

    /// The current gateways and their versions, newer than any snapshot. `None` if the source's snapshots are always
    /// current.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn gateway_versions(&self) -> anyhow::Result<Option<Vec<(Name, Box<str>)>>> {
        match self {
            Statuses::Dir(_) => Ok(None),
            Statuses::Kube(k) => Ok(Some(k.gateway_versions().await?)),
        }
    }

    /// Writes a policy's status, and emits `notices` as events.
    ///
    /// # Errors
    /// The status could not be stored.
    pub async fn policy(
        &self,
        key: &PolicyKey,
        status: &EgressPolicyStatus,
        notices: Vec<Notice>,
    ) -> Result<(), NotWritten> {
        match self {
            Statuses::Dir(d) => {
                let (d, key, status) = (d.clone(), key.clone(), status.clone());
                Ok(in_background(move || d.policy(&key, &status)).await?)
            }
            Statuses::Kube(k) => k.policy(key, status, notices).await,
        }
    }

    /// Writes a policy that was made of the annotations of the Service of its name. `uid` is the Service's.
    ///
    /// # Errors
    /// The policy was not written, or may not have been.
    pub async fn write_made_policy(&self, key: &PolicyKey, uid: &str, spec: &EgressPolicySpec) -> anyhow::Result<()> {
        match self {
            Statuses::Dir(d) => {
                let (d, key, spec) = (d.clone(), key.clone(), spec.clone());
                in_background(move || d.write_made_policy(&key, &spec)).await
            }
            Statuses::Kube(k) => Ok(k.write_made_policy(key, uid, spec).await?),
        }
    }

    /// Removes a policy that was made of a Service's annotations.
    ///
    /// # Errors
    /// The policy may still be there.
    pub async fn remove_made_policy(&self, key: &PolicyKey) -> anyhow::Result<()> {
        match self {
            Statuses::Dir(d) => {
                let (d, key) = (d.clone(), key.clone());
                in_background(move || d.remove_made_policy(&key)).await
            }
            Statuses::Kube(k) => Ok(k.remove_made_policy(key).await?),
        }
    }

    /// Emits an event about a Service.
    pub fn service(&self, key: &ObjectKey, uid: &str, notice: Notice) {
        match self {
            // The log has it.
            Statuses::Dir(_) => {}
            Statuses::Kube(k) => k.service(key, uid, notice),
        }
    }

    /// Emits an event about a pod.
    pub fn pod(&self, key: &ObjectKey, uid: &str, notice: Notice) {
        match self {
            // The log has it.
            Statuses::Dir(_) => {}
            Statuses::Kube(k) => k.pod(key, uid, notice),
        }
    }

    /// Writes a node's status.
    ///
    /// # Errors
    /// The status could not be stored.
    pub async fn node(&self, name: &str, status: &EgressNodeStatus) -> Result<(), NotWritten> {
        match self {
            Statuses::Dir(d) => {
                let (d, name, status) = (d.clone(), name.to_owned(), status.clone());
                Ok(in_background(move || d.node(&name, &status)).await?)
            }
            Statuses::Kube(k) => k.node(name, status).await,
        }
    }

    /// Removes the taint `egret.dev/not-ready`, which keeps pods off a node. Returns whether the node had it.
    ///
    /// # Errors
    /// The node may still have the taint.
    pub async fn untaint(&self, node: &str) -> anyhow::Result<bool> {
        match self {
            Statuses::Dir(_) => Ok(false),
            Statuses::Kube(k) => Ok(k.untaint(node).await?),
        }
    }

    /// Removes the statuses of objects that no longer exist.
    ///
    /// # Errors
    /// A status could not be removed.
    pub async fn forget(&self, cluster: &Cluster) -> anyhow::Result<()> {
        match self {
            Statuses::Dir(d) => d.forget(cluster),
            // Statuses are parts of the objects, and are deleted with them.
            Statuses::Kube(_) => Ok(()),
        }
    }
}

/// Runs `work` on another thread: the directory may be on another machine that does not respond.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Logs each problem once when it appears and once when it is solved.
fn log_changes(before: &[String], now: &[String]) {
    let (old, new): (BTreeSet<&String>, BTreeSet<&String>) = (before.iter().collect(), now.iter().collect());
    for problem in now.iter().filter(|p| !old.contains(p)) {
        warn!("{problem}");
    }
    for problem in before.iter().filter(|p| !new.contains(p)) {
        info!("solved: {problem}");
    }
}
