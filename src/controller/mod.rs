//! The controller: computes the allocations and writes the statuses of gateways and policies.
//!
//! Snapshots of the cluster go in, statuses come out. [`crate::allocation`] computes them. The controller itself
//! remembers only its own writes that the source has not shown yet.

mod metrics;
mod pass;
mod services;
mod write_overlay;

use crate::cluster::{self, Leadership, Scope, Source, SourceName};
use crate::model::{Cluster, Gateway};
use crate::signals;
use crate::telemetry::server::{self, Addresses, Readiness};
use anyhow::bail;
use metrics::Metrics;
use pass::Controller;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until};

/// Changes within this time are handled together: minimum, and maximum under load.
const DEBOUNCE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(500));
/// How long a failed write waits until it is retried: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What a controller does besides its usual work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Makes policies of Services' annotations for kube-vip. The source must follow Services
    /// ([`KubeOptions::follows_services`](crate::cluster::KubeOptions::follows_services)).
    pub kube_vip_annotations: bool,
}

/// Runs until the source ends or a signal arrives. Of several controllers one leads; the others follow the source and
/// wait.
pub async fn run(source: &SourceName, addresses: &Addresses, options: Options) -> anyhow::Result<()> {
    let mut registry = Registry::with_prefix("egret");
    let metrics = Metrics::new(&mut registry);
    let (ready, readiness) = watch::channel(Readiness::waiting_for("the cluster has not been read yet"));
    let _servers = addresses.serve(server::Metrics::new(registry), readiness)?;
    let waiting_for = |what: &str| drop(ready.send_replace(Readiness::waiting_for(what)));
    let source = tokio::select! {
        source = cluster::open_and_report(source, Scope::Controller, &waiting_for) => source?,
        () = signals::stopped()? => return Ok(()),
    };
    let stop = source.leadership.clone();
    tokio::select! {
        ended = lead_in_turns(source, options, metrics, ready) => ended,
        () = signals::stopped()? => {
            stop.release().await;
            Ok(())
        }
    }
}

async fn lead_in_turns(
    source: Source,
    options: Options,
    metrics: Metrics,
    ready: watch::Sender<Readiness>,
) -> anyhow::Result<()> {
    let Source { mut snapshots, statuses, leadership, problems: _problems, lookup: _ } = source;
    let mut waiting = leadership.clone();
    let mut controller = Controller::new(statuses, leadership, metrics, options);
    loop {
        while controller.leadership.term().is_none() {
            // A controller that could lead at once counts as ready.
            let _ = ready.send_replace(Readiness::Ready);
            waiting.changed().await;
        }
        controller.begin(&mut snapshots).await?;
        lead(&mut controller, &mut snapshots, &mut waiting, &ready).await?;
    }
}

/// Writes statuses for each snapshot until another controller leads.
async fn lead(
    controller: &mut Controller,
    snapshots: &mut watch::Receiver<Arc<Cluster>>,
    leadership: &mut Leadership,
    ready: &watch::Sender<Readiness>,
) -> anyhow::Result<()> {
    let mut backoff = RETRY.0;
    while controller.leads() {
        let start = Instant::now();
        let snapshot = snapshots.borrow_and_update().clone();
        let newer = || {
            let news = snapshots.has_changed().unwrap_or_default();
            news && changes_the_allocations(&snapshot, &snapshots.borrow())
        };
        let pass = controller.pass(snapshot.clone(), newer).await;
        let mut wake = pass.wake;
        match pass.failure {
            None => {
                backoff = RETRY.0;
                let _ = ready.send_replace(Readiness::Ready);
            }
            Some(e) => {
                let _ = ready.send_replace(Readiness::NotReady(format!("statuses cannot be written: {e:#}")));
                wake = Some(wake.map_or(backoff, |wake| wake.min(backoff)));
                backoff = (backoff * 2).min(RETRY.1);
            }
        }
        // Other tasks get as much time as the pass took, and changes are collected meanwhile.
        let rest = start.elapsed().clamp(DEBOUNCE.0, DEBOUNCE.1);
        let waking = async {
            match wake {
                Some(after) => sleep(after).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = snapshots.changed() => {
                if changed.is_err() {
                    bail!("the source of cluster state has ended");
                }
                sleep_until((start + rest).into()).await;
                sleep(DEBOUNCE.0).await;
            }
            () = waking => {}
            () = leadership.changed() => {}
        }
    }
    Ok(())
}

/// Whether a newer snapshot can lead to other allocations. Most only show what this controller has just written.
fn changes_the_allocations(old: &Cluster, new: &Cluster) -> bool {
    let asks = |gateway: &Gateway| Gateway { status: Default::default(), version: None, ..gateway.clone() };
    let same_gateway = |a: &Arc<Gateway>, b: &Arc<Gateway>| Arc::ptr_eq(a, b) || asks(a) == asks(b);
    !(same(&old.policies, &new.policies, Arc::ptr_eq)
        && same(&old.gateways, &new.gateways, same_gateway)
        && same(&old.nodes, &new.nodes, Arc::ptr_eq)
        && same(&old.egress_nodes, &new.egress_nodes, Arc::ptr_eq)
        && same(&old.services, &new.services, Arc::ptr_eq)
        && same(&old.announcements, &new.announcements, Arc::ptr_eq)
        && old.namespaces == new.namespaces)
}

fn same<K: Eq, V>(a: &BTreeMap<K, V>, b: &BTreeMap<K, V>, same: impl Fn(&V, &V) -> bool) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((k, v), (l, w))| k == l && same(v, w))
}

#[cfg(test)]
mod tests;
