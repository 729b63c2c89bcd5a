//! Reads the state of the cluster that a command works on.

use super::cni::{OBJECTS, cni};
use super::problem::Problem;
use super::site::Objects;
use crate::cluster::{self, PodsOf, Scope, SourceName};
use crate::model::Cluster;
use anyhow::bail;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::timeout;

/// How long a command waits for the cluster's state. Reading 100,000 pods takes some seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A state of the cluster.
#[derive(Clone, Debug, Default)]
pub struct ClusterState {
    /// The objects.
    pub cluster: Arc<Cluster>,
    /// Objects that cannot be read, a line each.
    pub unread: Vec<String>,
    /// What is wrong with other people's objects, such as a CNI that bypasses netfilter.
    pub of_site: Vec<Problem>,
    /// When it was read, seconds since the Unix epoch.
    pub now: i64,
}

impl ClusterState {
    /// The newest state of an open source.
    pub fn of(source: &cluster::Source) -> Self {
        ClusterState {
            cluster: source.snapshots.borrow().clone(),
            unread: Vec::clone(&source.problems.borrow()),
            of_site: Vec::new(),
            now: jiff::Timestamp::now().as_second(),
        }
    }
}

/// Opens the source and waits until everything that the command needs has been read.
///
/// # Errors
/// It cannot be read, or not within a minute.
pub async fn open(source: &SourceName, pods: PodsOf) -> anyhow::Result<cluster::Source> {
    open_as(source, Scope::Reader(pods)).await
}

/// Opens the source with the scope of a daemon.
///
/// # Errors
/// It cannot be read, or not within a minute.
pub async fn open_as(source: &SourceName, scope: Scope) -> anyhow::Result<cluster::Source> {
    let waits_for = Mutex::new(String::new());
    let note = |what: &str| what.clone_into(&mut waits_for.lock().unwrap_or_else(PoisonError::into_inner));
    match timeout(PATIENCE, cluster::open_and_report(source, scope, &note)).await {
        Ok(source) => source,
        Err(_) => bail!(
            "cannot read the cluster within {} s: {}",
            PATIENCE.as_secs(),
            waits_for.lock().unwrap_or_else(PoisonError::into_inner)
        ),
    }
}

/// Reads the state once.
///
/// # Errors
/// It cannot be read, or not within a minute.
pub async fn read(source: &SourceName, pods: PodsOf) -> anyhow::Result<ClusterState> {
    Ok(ClusterState::of(&open(source, pods).await?))
}

/// What is wrong with the CNI. What may not be read is passed over.
///
/// # Errors
/// There are no credentials.
pub async fn problems_of_site(source: &SourceName) -> anyhow::Result<Vec<Problem>> {
    Ok(cni(&Objects::open(source).await?.read(&OBJECTS).await).problems)
}
