//! One look at the cluster: the allocations are computed anew, and what has changed is written.

use super::metrics::Metrics;
use super::write_overlay::{self, WriteOverlay};
use crate::allocation::report::{of_gateway, of_policy, report};
use crate::allocation::{Outcome, allocate};
use crate::api::{AllocationsWriter, EgressGatewayStatus, EgressPolicyStatus};
use crate::cluster::{Leadership, NotWritten, Statuses, Term};
use crate::model::fallback_policy::listed_only;
use crate::model::selector::Name;
use crate::model::{Cluster, Gateway, PolicyKey};
use anyhow::{Context, bail};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

/// A leader waits so long for the source to show what was there when it began, and then looks again what there is.
const CATCH_UP: Duration = Duration::from_secs(2);
/// So many statuses are written before others get their turn: a scrape, a signal.
const WRITES_AT_ONCE: usize = 64;
/// After this time, statuses that are still to be written wait for a newer snapshot's allocations, if it is another one.
const WRITES_LAST: Duration = Duration::from_millis(500);
/// Statuses that are wrong in their number of pods alone are written this often: pods come and go all the time.
const COUNT_AGAIN: Duration = Duration::from_secs(10);

/// What is known from one look at the cluster to the next.
pub(super) struct Controller {
    statuses: Statuses,
    pub(super) leadership: Leadership,
    metrics: Metrics,
    pub(super) write_overlay: WriteOverlay,
    /// The time of leading that all this is of.
    term: Option<Term>,
    /// Allocations that may have been written, or still will be: in place of which version.
    uncertain: BTreeMap<Name, Option<Box<str>>>,
    /// The gateways and policies of the last snapshot, if all that is not there has been forgotten.
    known: Option<(BTreeSet<Name>, BTreeSet<PolicyKey>)>,
    /// When numbers of pods alone were last written.
    counted: Option<Instant>,
}

/// What one look at the cluster led to.
pub(super) struct Pass {
    /// When to look again although nothing has changed.
    pub(super) wake: Option<Duration>,
    /// A write that failed, of maybe several.
    pub(super) failure: Option<anyhow::Error>,
}

impl Controller {
    pub(super) fn new(statuses: Statuses, leadership: Leadership, metrics: Metrics) -> Self {
        let term = leadership.term();
        let (write_overlay, uncertain) = (WriteOverlay::default(), BTreeMap::new());
        Controller { statuses, leadership, metrics, write_overlay, term, uncertain, known: None, counted: None }
    }

    /// Whether it still leads as it did when it began.
    pub(super) fn leads(&self) -> bool {
        self.term.is_some() && self.leadership.term() == self.term
    }

    /// Begins to lead: forgets what it wrote the last time, and waits until the source shows every gateway that there
    /// was when it began to lead. A gateway's allocations that it does not know of could have what it gives out.
    pub(super) async fn begin(&mut self, snapshots: &mut watch::Receiver<Arc<Cluster>>) -> anyhow::Result<()> {
        self.term = self.leadership.term();
        // What is uncertain stays so: a term that lapsed and goes on makes nothing void that was sent in it.
        self.write_overlay = WriteOverlay::default();
        while self.leads() {
            let wanted = match self.statuses.gateway_versions().await {
                Ok(None) => return Ok(()),
                Ok(Some(wanted)) => wanted,
                Err(e) => {
                    warn!("the gateways cannot be read, and are tried again: {e:#}");
                    sleep(CATCH_UP).await;
                    continue;
                }
            };
            let missing = |cluster: &Cluster| {
                let shown = |name| cluster.gateways.get(name).and_then(|gateway| gateway.version.as_deref());
                let missing = wanted
                    .iter()
                    .find(|(name, version)| shown(name).is_none_or(|shown| write_overlay::is_older(shown, version)));
                missing.map(|(name, _)| name.clone())
            };
            let caught_up = async { snapshots.wait_for(|cluster| missing(cluster).is_none()).await.map(drop) };
            match timeout(CATCH_UP, caught_up).await {
                Ok(shown) => {
                    shown.context("the source of cluster state has ended")?;
                    // A policy that the allocations list may be younger than what is shown of policies; one that is gone stays so.
                    let _ = timeout(CATCH_UP, snapshots.wait_for(|cluster| listed_only(cluster).is_empty())).await;
                    return Ok(());
                }
                Err(_) => {
                    let gateway = missing(&snapshots.borrow()).unwrap_or_default();
                    warn!(
                        gateway = &*gateway,
                        "nothing is given out before this gateway can be read; if that lasts, see what is wrong with it"
                    );
                }
            }
        }
        Ok(())
    }

    /// Brings all statuses in sync with a snapshot; some policies' may be left to the next pass if a `newer` snapshot
    /// waits for it.
    pub(super) async fn pass(&mut self, snapshot: Arc<Cluster>, newer: impl Fn() -> bool) -> Pass {
        let cluster = match self.sealed(&snapshot).await {
            Ok(cluster) => cluster,
            Err(e) => {
                warn!("the allocations cannot be made this controller's, and are tried again: {e:#}");
                return Pass { wake: None, failure: Some(e) };
            }
        };
        let now = Timestamp::now().as_second();
        let start = Instant::now();
        let mut outcome = allocate(&cluster, now);
        self.metrics.allocated(start.elapsed());

        let mut failure = None;
        let unwritten = self.write_gateways(&cluster, &mut outcome, &mut failure).await;
        let mut reports = report(&cluster, &outcome, now);
        self.metrics.policies(reports.values());
        // A policy shall not be told of an address that it may not get after all.
        reports.retain(|key, _| outcome.gateway_of(key).is_none_or(|gateway| !unwritten.contains(gateway)));
        let count_again = self.write_policies(&cluster, reports, newer, &mut failure).await;
        self.write_overlay.count_from(Instant::now());
        if let Err(e) = self.forget(&snapshot).await {
            warn!("statuses of objects that are gone cannot be removed: {e:#}");
            failure = Some(e);
        }
        let release = outcome.next_release.map(|at| Duration::from_secs(at.saturating_sub(now).max(1).unsigned_abs()));
        // What becomes of a node that Kubernetes hears nothing of is said when it has lasted.
        let lost = cluster.nodes.values().filter_map(|node| node.is_lost_at()).filter(|at| *at > now).min();
        let lost = lost.map(|at| Duration::from_secs(at.saturating_sub(now).unsigned_abs()));
        let wake = [release, count_again, lost, self.write_overlay.until(Instant::now())].into_iter().flatten().min();
        Pass { wake, failure }
    }

    /// The cluster, with every allocations in it made this leader's: what an earlier one may still send is in place of
    /// another version, and is refused. Then nobody but this one writes a gateway's allocations, and what is free in all of them is
    /// free.
    async fn sealed(&mut self, snapshot: &Arc<Cluster>) -> anyhow::Result<Arc<Cluster>> {
        let cluster = self.write_overlay.merge(snapshot.clone(), Instant::now());
        self.uncertain.retain(|name, version| cluster.gateways.get(name).is_some_and(|g| g.version == *version));
        let Some(term) = self.term.clone().filter(|term| term.number > 0) else { return Ok(cluster) };
        let foreign = |gateway: &Gateway| {
            gateway.status.writer.as_ref().is_none_or(|w| w.name != term.name || w.term != term.number)
        };
        let is_open = |(name, g): &(&Name, &Arc<Gateway>)| foreign(g) || self.uncertain.contains_key(*name);
        let open: Vec<(Name, Arc<Gateway>)> =
            cluster.gateways.iter().filter(is_open).map(|(name, g)| (name.clone(), g.clone())).collect();
        if open.is_empty() {
            return Ok(cluster);
        }
        // Whoever leads next finds these gateways, and makes them its own before it gives anything out.
        self.leadership.confirm().await?;
        for (name, gateway) in open {
            let status = EgressGatewayStatus { writer: self.signature(&gateway), ..gateway.status.clone() };
            self.write_gateway(&name, &gateway, status).await.with_context(|| format!("the allocations of {name}"))?;
        }
        Ok(self.write_overlay.merge(snapshot.clone(), Instant::now()))
    }

    /// What a gateway's allocations that is written next says of its writer.
    fn signature(&self, gateway: &Gateway) -> Option<AllocationsWriter> {
        let term = self.term.as_ref().filter(|term| term.number > 0)?;
        let writes = gateway.status.writer.as_ref().map_or(0, |writer| writer.writes) + 1;
        Some(AllocationsWriter { name: term.name.clone(), term: term.number, writes })
    }

    /// Writes a gateway's allocations in place of the one that the gateway has.
    async fn write_gateway(
        &mut self,
        name: &Name,
        gateway: &Gateway,
        status: EgressGatewayStatus,
    ) -> anyhow::Result<()> {
        if !self.leads() {
            bail!("this controller no longer leads");
        }
        let notices = of_gateway(&gateway.status, &status);
        let written = self.statuses.gateway(name, &status, gateway.version.as_deref(), notices).await;
        self.metrics.written("gateway", written.is_ok());
        match written {
            Ok(version) => {
                self.uncertain.remove(name);
                self.write_overlay.gateway(name.clone(), status, version);
                Ok(())
            }
            Err(NotWritten::Refused(e)) => Err(e),
            Err(NotWritten::Uncertain(e)) => {
                self.uncertain.insert(name.clone(), gateway.version.clone());
                Err(e)
            }
        }
    }

    /// Writes the allocations that have changed; returns the gateways whose allocations could not be written.
    async fn write_gateways(
        &mut self,
        cluster: &Cluster,
        outcome: &mut Outcome,
        failure: &mut Option<anyhow::Error>,
    ) -> BTreeSet<Name> {
        let mut unwritten = BTreeSet::new();
        self.metrics.gateway_statuses(&outcome.gateways);
        for (name, status) in &mut outcome.gateways {
            let Some(gateway) = cluster.gateways.get(name) else { continue };
            status.writer.clone_from(&gateway.status.writer);
            if gateway.status == *status {
                continue;
            }
            let mut status = std::mem::take(status);
            let (nodes, allocations, resting) = (status.nodes.len(), status.allocations.len(), status.released.len());
            status.writer = self.signature(gateway);
            match self.write_gateway(name, gateway, status).await {
                Ok(()) => info!(gateway = &**name, nodes, allocations, resting, "the allocations has changed"),
                Err(e) => {
                    warn!(gateway = &**name, "the allocations cannot be written, and is tried again: {e:#}");
                    unwritten.insert(name.clone());
                    *failure = Some(e);
                }
            }
        }
        unwritten
    }

    /// Writes the statuses of policies that have changed. Returns when to write those that wait for it.
    async fn write_policies(
        &mut self,
        cluster: &Cluster,
        reports: BTreeMap<PolicyKey, EgressPolicyStatus>,
        newer: impl Fn() -> bool,
        failure: &mut Option<anyhow::Error>,
    ) -> Option<Duration> {
        let start = Instant::now();
        let (mut written, mut failed) = (0, 0);
        let count_in = self.counted.and_then(|at| COUNT_AGAIN.checked_sub(at.elapsed()));
        let mut waits = false;
        for (key, status) in reports {
            let stored = cluster.policy_statuses.get(&key);
            if stored.is_some_and(|stored| **stored == status) {
                continue;
            }
            if stored.is_some_and(|stored| EgressPolicyStatus { pods: status.pods, ..(**stored).clone() } == status) {
                if count_in.is_some() {
                    waits = true;
                    continue;
                }
                self.counted = Some(start);
            }
            let notices = of_policy(stored.map(|stored| &**stored), &status);
            if !self.leads() {
                break;
            }
            let result = self.statuses.policy(&key, &status, notices).await.map_err(anyhow::Error::from);
            self.metrics.written("policy", result.is_ok());
            match result {
                Ok(()) => {
                    written += 1;
                    tell(&key, &status);
                    self.write_overlay.policy(key, status);
                }
                Err(e) => {
                    failed += 1;
                    *failure = Some(e.context(format!("the status of policy {key}")));
                }
            }
            if (written + failed) % WRITES_AT_ONCE == 0 {
                tokio::task::yield_now().await;
                if start.elapsed() > WRITES_LAST && newer() {
                    break;
                }
            }
        }
        if let (Some(e), 1..) = (&failure, failed) {
            warn!(failed, "statuses of policies cannot be written, and are tried again: {e:#}");
        }
        if written > 0 {
            info!(written, "policies have been told");
        }
        count_in.filter(|_| waits)
    }

    /// Has the statuses of objects that are gone removed: at first, and when some have gone.
    async fn forget(&mut self, snapshot: &Cluster) -> anyhow::Result<()> {
        let gone = |(gateways, policies): &(BTreeSet<Name>, BTreeSet<PolicyKey>)| {
            gateways.iter().any(|name| !snapshot.gateways.contains_key(name))
                || policies.iter().any(|key| !snapshot.policies.contains_key(key))
        };
        if self.known.as_ref().is_none_or(gone) {
            self.known = None;
            self.statuses.forget(snapshot).await?;
        }
        let (gateways, policies) = (snapshot.gateways.keys().cloned(), snapshot.policies.keys().cloned());
        self.known = Some((gateways.collect(), policies.collect()));
        Ok(())
    }
}

/// Says what has become of a policy: to everyone what a person should act on, to who asks the rest.
fn tell(key: &PolicyKey, status: &EgressPolicyStatus) {
    for condition in &status.conditions {
        let (reason, message) = (&*condition.reason, &*condition.message);
        match (&*condition.type_, &*condition.status) {
            ("Accepted", "False") => warn!(policy = %key, reason, "the policy is refused: {message}"),
            (type_, status) => tracing::debug!(policy = %key, condition = type_, status, reason, "{message}"),
        }
    }
}
