//! Where cluster state comes from and statuses go to: the Kubernetes API, or a directory of manifests.
//!
//! A source delivers snapshots ([`Cluster`]): the first one when it has read everything once, then one for each
//! change. It never delivers less than it knows: what cannot be read keeps its last good state.

pub mod dir;
pub mod kube;
mod readable;

use crate::api::{EgressGatewayStatus, EgressNodeStatus, EgressPolicyStatus};
use crate::model::notice::Notice;
use crate::model::selector::Name;
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey, PolicyKey};
pub use kube::lease::Settings as LeaseSettings;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{info, warn};

/// What `--cluster` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceName {
    /// `dir:PATH`: a directory of manifests.
    Dir(PathBuf),
    /// `kube`: the Kubernetes API.
    Kube(KubeOptions),
}

/// How the Kubernetes API is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeOptions {
    /// A file with the address and the credentials; `None`: those that Kubernetes gives to pods.
    pub kubeconfig: Option<PathBuf>,
    /// How several controllers take turns; `None`: there is only one.
    pub lease: Option<LeaseSettings>,
    /// Where a node writes down what it is told, for a start while the API server is away; `None`: nowhere.
    pub known: Option<OfflineCache>,
}

/// Where a node writes down what it knows of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfflineCache {
    /// The directory; it is made if need be.
    pub directory: PathBuf,
    /// Whose it is. What was written for another is not read: what another node knew, or this one before a boot, when
    /// the kernel was another one.
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
    /// With these options, where they have a meaning.
    #[must_use]
    pub fn with(self, options: KubeOptions) -> Self {
        match self {
            SourceName::Kube(_) => SourceName::Kube(options),
            dir @ SourceName::Dir(_) => dir,
        }
    }

    /// With what is known written down there, by a node.
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
}

/// An open source.
pub struct Source {
    /// The newest snapshot.
    pub snapshots: watch::Receiver<Arc<Cluster>>,
    /// Where statuses go.
    pub statuses: Statuses,
    /// What is wrong in the source now, one line each: what it is about, and what is wrong. Empty when all is well.
    pub problems: watch::Receiver<Arc<Vec<String>>>,
    /// For pods that start before a snapshot has them.
    pub lookup: Lookup,
    /// Whether this reader may write what several could: a controller's.
    pub leadership: Leadership,
}

/// Writes statuses to where the cluster keeps them. Each kind of status has one writer in the cluster.
#[derive(Clone, Debug)]
pub enum Statuses {
    /// Into `PATH/status/`.
    Dir(dir::Statuses),
    /// Into the objects' status, by the Kubernetes API.
    Kube(kube::Statuses),
}

/// A status that was not written, or maybe not.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// Nothing was changed.
    #[error("{0:#}")]
    Refused(#[from] anyhow::Error),
    /// It is not known whether it was written, or still will be.
    #[error("{0:#}")]
    Uncertain(anyhow::Error),
}

/// Looks for a pod by name.
#[derive(Clone)]
pub enum Lookup {
    /// The source tells of pods as soon as it can be told of them.
    None,
    /// By the Kubernetes API.
    Kube(kube::Lookup),
}

impl Lookup {
    /// Has the pod in one of the next snapshots, if there is one of that name, and of that uid unless it is empty.
    pub fn look_for(&self, pod: ObjectKey, uid: &str) {
        match self {
            Lookup::None => {}
            Lookup::Kube(lookup) => lookup.look_for(pod, uid.to_owned()),
        }
    }
}

/// Which of several controllers leads.
#[derive(Clone)]
pub enum Leadership {
    /// There is only this one.
    Alone,
    /// Who has the Lease.
    Lease(kube::lease::Leadership),
}

/// One time of leading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// Who leads.
    pub name: String,
    /// Which time it is; later ones have higher numbers. 0 where nobody takes turns.
    pub number: i64,
}

impl Leadership {
    /// The time of leading that this process is in; `None`: another one leads, or nobody.
    pub fn term(&self) -> Option<Term> {
        match self {
            Leadership::Alone => Some(Term { name: String::new(), number: 0 }),
            Leadership::Lease(lease) => lease.term(),
        }
    }

    /// Waits until this process begins to lead, or ceases to.
    pub async fn changed(&mut self) {
        match self {
            Leadership::Alone => std::future::pending().await,
            Leadership::Lease(lease) => lease.changed().await,
        }
    }

    /// Makes sure that this process leads now: who leads after it sees all that was there before this call.
    ///
    /// # Errors
    /// It does not, or that cannot be found out.
    pub async fn confirm(&self) -> anyhow::Result<()> {
        match self {
            Leadership::Alone => Ok(()),
            Leadership::Lease(lease) => lease.confirm().await,
        }
    }

    /// Lets the next one lead at once.
    pub async fn release(&self) {
        if let Leadership::Lease(lease) = self {
            lease.release().await;
        }
    }
}

/// Opens a source and returns when everything has been read once.
///
/// # Errors
/// The source does not exist or cannot be watched.
pub async fn open(name: &SourceName, scope: Scope) -> anyhow::Result<Source> {
    open_and_report(name, scope, &|_| {}).await
}

/// Who is told what an opening waits for, in the words of the log.
pub type WaitingFor<'a> = &'a (dyn Fn(&str) + Sync);

/// Opens a source as [`open`] does, and reports what it waits for meanwhile.
///
/// # Errors
/// The source does not exist or cannot be watched.
pub async fn open_and_report(name: &SourceName, scope: Scope, waiting_for: WaitingFor<'_>) -> anyhow::Result<Source> {
    match name {
        SourceName::Dir(path) => dir::open(path, scope).await,
        SourceName::Kube(options) => kube::open(options.clone(), scope, waiting_for).await,
    }
}

/// Adds to a snapshot all Services, and the endpoints of those that packets to `target` may be for, where they are not in
/// it anyway.
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

/// What asks about tokens, where there is somebody to ask.
///
/// # Errors
/// Nobody there knows of tokens, or there are no credentials.
pub async fn reviewer(name: &SourceName) -> anyhow::Result<kube::Reviewer> {
    match name {
        SourceName::Dir(path) => anyhow::bail!(
            "nobody at dir:{} knows of tokens; leave --metrics-authentication out, or use --cluster kube",
            path.display()
        ),
        SourceName::Kube(options) => kube::reviewer(options).await,
    }
}

/// Removes what a node said of itself, for a node that Egret leaves; whether there was anything.
///
/// # Errors
/// It is still there.
pub async fn remove_node(name: &SourceName, node: &str) -> anyhow::Result<bool> {
    match name {
        SourceName::Dir(path) => dir::remove_node(path, node),
        SourceName::Kube(options) => kube::remove_node(options.clone(), node).await,
    }
}

impl Statuses {
    /// Writes a gateway's status, the allocations, in place of the one of the version that a snapshot had
    /// ([`Gateway::version`](crate::model::Gateway::version)); returns the new version, where there are any.
    /// `notices` are told as events, where there are any.
    ///
    /// # Errors
    /// It could not be stored, or the object has another version by now.
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

    /// The gateways that there are now, and their versions: newer than any snapshot. `None` where a snapshot is as new
    /// as can be.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn gateway_versions(&self) -> anyhow::Result<Option<Vec<(Name, Box<str>)>>> {
        match self {
            Statuses::Dir(_) => Ok(None),
            Statuses::Kube(k) => Ok(Some(k.gateway_versions().await?)),
        }
    }

    /// Writes a policy's status, and tells of it.
    ///
    /// # Errors
    /// It could not be stored.
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

    /// Tells of a pod.
    pub fn pod(&self, key: &ObjectKey, uid: &str, notice: Notice) {
        match self {
            // The log has it.
            Statuses::Dir(_) => {}
            Statuses::Kube(k) => k.pod(key, uid, notice),
        }
    }

    /// Writes what a node says of itself.
    ///
    /// # Errors
    /// It could not be stored.
    pub async fn node(&self, name: &str, status: &EgressNodeStatus) -> Result<(), NotWritten> {
        match self {
            Statuses::Dir(d) => {
                let (d, name, status) = (d.clone(), name.to_owned(), status.clone());
                Ok(in_background(move || d.node(&name, &status)).await?)
            }
            Statuses::Kube(k) => k.node(name, status).await,
        }
    }

    /// Takes the taint `egret.dev/not-ready` off a node, by which it was kept free of pods; whether it was there.
    ///
    /// # Errors
    /// It may still be there.
    pub async fn untaint(&self, node: &str) -> anyhow::Result<bool> {
        match self {
            Statuses::Dir(_) => Ok(false),
            Statuses::Kube(k) => Ok(k.untaint(node).await?),
        }
    }

    /// Removes the statuses of objects that are gone.
    ///
    /// # Errors
    /// They could not be removed.
    pub async fn forget(&self, cluster: &Cluster) -> anyhow::Result<()> {
        match self {
            Statuses::Dir(d) => d.forget(cluster),
            // They are part of the objects, and go with them.
            Statuses::Kube(_) => Ok(()),
        }
    }
}

/// The directory may be on another machine, and that may be away: nothing else shall wait for it.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Logs each problem once, and once that it is over.
fn tell(before: &[String], now: &[String]) {
    let (old, new): (BTreeSet<&String>, BTreeSet<&String>) = (before.iter().collect(), now.iter().collect());
    for problem in now.iter().filter(|p| !old.contains(p)) {
        warn!("{problem}");
    }
    for problem in before.iter().filter(|p| !new.contains(p)) {
        info!("no longer so: {problem}");
    }
}
