//! One pass: the allocations are computed from a snapshot, and the statuses that have changed are written.

use super::Options;
use super::metrics::Metrics;
use super::services::MadePolicies;
use super::write_overlay::{self, WriteOverlay};
use crate::allocation::report::{of_gateway, of_policy, opted_in, report};
use crate::allocation::{AllocationResult, allocate};
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

/// How long a new leader waits for the source to show what existed when it began, before it checks again.
const CATCH_UP: Duration = Duration::from_secs(2);
/// How many statuses are written before other tasks (a scrape, a signal) get their turn.
const WRITES_AT_ONCE: usize = 64;
/// After this time, statuses that are still to be written wait for the allocations of a newer snapshot, if there is
/// one.
const WRITES_LAST: Duration = Duration::from_millis(500);
/// How often statuses are written in which only numbers of pods or of ready nodes have changed: pods come and go all the
/// time, and every node reads every gateway's status.
const COUNT_AGAIN: Duration = Duration::from_secs(10);

/// What the controller remembers from one pass to the next.
pub(super) struct Controller {
    statuses: Statuses,
    pub(super) leadership: Leadership,
    metrics: Metrics,
    pub(super) write_overlay: WriteOverlay,
    /// The term of leadership that this state belongs to.
    term: Option<Term>,
    /// Gateways whose last write may still take effect, with the version that it replaces.
    uncertain: BTreeMap<Name, Option<Box<str>>>,
    /// The gateways and policies of the last snapshot, once the statuses of all others have been removed.
    known: Option<(BTreeSet<Name>, BTreeSet<PolicyKey>)>,
    /// The writes of gateways' statuses in which only the ready nodes have changed.
    ready_nodes: Numbers,
    /// The writes of policies' statuses in which only numbers of pods have changed.
    pods: Numbers,
    /// The policies that are made of Services' annotations; `None`: none are made.
    made_policies: Option<MadePolicies>,
}

/// The result of a pass.
pub(super) struct Pass {
    /// When the next pass is due if nothing changes.
    pub(super) wake: Option<Duration>,
    /// The last failed write.
    pub(super) failure: Option<anyhow::Error>,
}

/// Writes of statuses in which only numbers have changed: in one pass of every [`COUNT_AGAIN`].
#[derive(Default)]
struct Numbers {
    /// When some were last written.
    last: Option<Instant>,
    /// How long they wait in this pass; `None`: they are written.
    pause: Option<Duration>,
    /// Whether some wait.
    waits: bool,
}

impl Numbers {
    /// Begins a pass.
    fn begin(&mut self) {
        self.pause = self.last.and_then(|at| COUNT_AGAIN.checked_sub(at.elapsed()));
        self.waits = false;
    }

    /// Whether one of them is written now.
    fn may_be_written(&mut self) -> bool {
        match self.pause {
            None => self.last = Some(Instant::now()),
            Some(_) => self.waits = true,
        }
        self.pause.is_none()
    }

    /// When those that wait are due.
    fn due(&self) -> Option<Duration> {
        self.pause.filter(|_| self.waits)
    }
}

/// Whether only the ready nodes differ.
fn differ_in_ready_nodes(before: &EgressGatewayStatus, after: &EgressGatewayStatus) -> bool {
    let (ready_nodes, not_ready_nodes) = (after.ready_nodes, after.not_ready_nodes.clone());
    EgressGatewayStatus { ready_nodes, not_ready_nodes, ..before.clone() } == *after
}

/// Whether only the numbers of pods differ.
fn differ_in_pods(before: &EgressPolicyStatus, after: &EgressPolicyStatus) -> bool {
    EgressPolicyStatus { pods: after.pods, pods_by_node: after.pods_by_node.clone(), ..before.clone() } == *after
}

impl Controller {
    pub(super) fn new(statuses: Statuses, leadership: Leadership, metrics: Metrics, options: Options) -> Self {
        let term = leadership.term();
        let (write_overlay, uncertain) = (WriteOverlay::default(), BTreeMap::new());
        let (ready_nodes, pods) = (Numbers::default(), Numbers::default());
        let made_policies = options.kube_vip_annotations.then(MadePolicies::default);
        Controller {
            statuses,
            leadership,
            metrics,
            write_overlay,
            term,
            uncertain,
            known: None,
            ready_nodes,
            pods,
            made_policies,
        }
    }

    /// Whether the controller still leads in the term in which it began.
    pub(super) fn leads(&self) -> bool {
        self.term.is_some() && self.leadership.term() == self.term
    }

    /// Begins a term: forgets earlier writes, and waits until the source shows every gateway that existed at the
    /// beginning. The allocations of an unknown gateway might have the same ids and addresses as new ones.
    pub(super) async fn begin(&mut self, snapshots: &mut watch::Receiver<Arc<Cluster>>) -> anyhow::Result<()> {
        self.term = self.leadership.term();
        // Uncertain writes stay: a term that lapsed and continues does not cancel what was sent in it.
        self.write_overlay = WriteOverlay::default();
        while self.leads() {
            let wanted = match self.statuses.gateway_versions().await {
                Ok(None) => return Ok(()),
                Ok(Some(wanted)) => wanted,
                Err(e) => {
                    warn!("cannot read the gateways; retrying: {e:#}");
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
                    // A policy that the allocations list may be newer than the shown policies. If it was deleted,
                    // this wait ends by the timeout.
                    let _ = timeout(CATCH_UP, snapshots.wait_for(|cluster| listed_only(cluster).is_empty())).await;
                    return Ok(());
                }
                Err(_) => {
                    let gateway = missing(&snapshots.borrow()).unwrap_or_default();
                    warn!(
                        gateway = &*gateway,
                        "waiting for a gateway that the source does not show; no egress IP is given out until then; \
                         if that lasts, check the gateway"
                    );
                }
            }
        }
        Ok(())
    }

    /// Writes all statuses for a snapshot. Statuses of policies may be left to the next pass if a `newer` snapshot is
    /// waiting.
    pub(super) async fn pass(&mut self, snapshot: Arc<Cluster>, newer: impl Fn() -> bool) -> Pass {
        let cluster = match self.sign_all(&snapshot).await {
            Ok(cluster) => cluster,
            Err(e) => {
                warn!("cannot sign the allocations as this controller's; retrying: {e:#}");
                return Pass { wake: None, failure: Some(e) };
            }
        };
        let now = Timestamp::now().as_second();
        let start = Instant::now();
        let mut outcome = allocate(&cluster, now);
        self.metrics.allocated(start.elapsed());

        let mut failure = None;
        self.ready_nodes.begin();
        self.pods.begin();
        let unwritten = self.write_gateways(&cluster, &mut outcome, &mut failure).await;
        let mut reports = report(&cluster, &outcome, now);
        let opted_in = opted_in(&mut reports);
        self.metrics.policies(reports.values());
        if !opted_in.is_empty() || cluster.gateways.values().any(|gateway| gateway.status.opt_in.is_some()) {
            self.write_opted_in(&snapshot, opted_in, &unwritten, &mut failure).await;
        }
        // A policy's status must not show an address that the policy may not get after all.
        reports.retain(|key, _| outcome.gateway_of(key).is_none_or(|gateway| !unwritten.contains(gateway)));
        self.write_policies(&cluster, reports, newer, &mut failure).await;
        // After the others' allocations, which do not wait for them.
        let made = match &mut self.made_policies {
            Some(made) => made.update(&cluster, &self.statuses).await,
            None => None,
        };
        self.write_overlay.count_from(Instant::now());
        if let Err(e) = self.forget(&snapshot).await {
            warn!("cannot remove the statuses of deleted objects: {e:#}");
            failure = Some(e);
        }
        let due = [outcome.next_release, outcome.next_reports].into_iter().flatten().min();
        let due = due.map(|at| Duration::from_secs(at.saturating_sub(now).max(1).unsigned_abs()));
        // A node whose kubelet reports nothing counts as lost after a while.
        let lost = cluster.nodes.values().filter_map(|node| node.is_lost_at()).filter(|at| *at > now).min();
        let lost = lost.map(|at| Duration::from_secs(at.saturating_sub(now).unsigned_abs()));
        let numbers = [self.ready_nodes.due(), self.pods.due()];
        let other = [due, lost, made, self.write_overlay.until(Instant::now())];
        let wake = numbers.into_iter().chain(other).flatten().min();
        Pass { wake, failure }
    }

    /// The cluster, after this leader has signed the allocations of every gateway. A write that an earlier leader may
    /// still send replaces another version and is refused by the API server. After that nobody else writes
    /// allocations, and what is free in all of them is free.
    async fn sign_all(&mut self, snapshot: &Arc<Cluster>) -> anyhow::Result<Arc<Cluster>> {
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
        // The next leader finds these gateways, and signs them before it gives anything out.
        self.leadership.confirm().await?;
        for (name, gateway) in open {
            let status =
                EgressGatewayStatus { writer: self.signature(&gateway), ..EgressGatewayStatus::clone(&gateway.status) };
            self.write_gateway(&name, &gateway, status).await.with_context(|| format!("the allocations of {name}"))?;
        }
        Ok(self.write_overlay.merge(snapshot.clone(), Instant::now()))
    }

    /// The signature for the next write of a gateway's allocations.
    fn signature(&self, gateway: &Gateway) -> Option<AllocationsWriter> {
        let term = self.term.as_ref().filter(|term| term.number > 0)?;
        let writes = gateway.status.writer.as_ref().map_or(0, |writer| writer.writes) + 1;
        Some(AllocationsWriter { name: term.name.clone(), term: term.number, writes })
    }

    /// Writes the allocations of a gateway, in place of its current version.
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

    /// Writes the allocations that have changed. Returns the gateways that could not be written.
    async fn write_gateways(
        &mut self,
        cluster: &Cluster,
        outcome: &mut AllocationResult,
        failure: &mut Option<anyhow::Error>,
    ) -> BTreeSet<Name> {
        let mut unwritten = BTreeSet::new();
        self.metrics.gateway_statuses(&outcome.gateways);
        for (name, status) in &mut outcome.gateways {
            let Some(gateway) = cluster.gateways.get(name) else { continue };
            status.writer.clone_from(&gateway.status.writer);
            if *gateway.status == *status {
                continue;
            }
            if differ_in_ready_nodes(&gateway.status, status) && !self.ready_nodes.may_be_written() {
                continue;
            }
            // Reports of policies are computed from it afterwards.
            let mut status = status.clone();
            let (nodes, allocations, in_cooldown) =
                (status.nodes.len(), status.allocations.len(), status.released.len());
            status.writer = self.signature(gateway);
            match self.write_gateway(name, gateway, status).await {
                Ok(()) => info!(gateway = &**name, nodes, allocations, in_cooldown, "wrote the allocations"),
                Err(e) => {
                    warn!(gateway = &**name, "cannot write the allocations; retrying: {e:#}");
                    unwritten.insert(name.clone());
                    *failure = Some(e);
                }
            }
        }
        unwritten
    }

    /// Writes into gateways' statuses what has changed about the pods that ask for them.
    async fn write_opted_in(
        &mut self,
        snapshot: &Arc<Cluster>,
        mut opted_in: BTreeMap<Name, EgressPolicyStatus>,
        unwritten: &BTreeSet<Name>,
        failure: &mut Option<anyhow::Error>,
    ) {
        let cluster = self.write_overlay.merge(snapshot.clone(), Instant::now());
        for (name, gateway) in cluster.gateways.iter().filter(|(name, _)| !unwritten.contains(*name)) {
            let (before, after) = (&gateway.status.opt_in, opted_in.remove(name).map(Box::new));
            let differ_in_pods = before.as_ref().zip(after.as_ref()).is_some_and(|(a, b)| differ_in_pods(a, b));
            if *before == after || differ_in_pods && !self.pods.may_be_written() {
                continue;
            }
            let status = EgressGatewayStatus {
                opt_in: after,
                writer: self.signature(gateway),
                ..EgressGatewayStatus::clone(&gateway.status)
            };
            if let Err(e) = self.write_gateway(name, gateway, status).await {
                *failure = Some(e.context(format!("the status of those who ask for EgressGateway {name}")));
            }
        }
    }

    /// Writes the statuses of policies that have changed.
    async fn write_policies(
        &mut self,
        cluster: &Cluster,
        reports: BTreeMap<PolicyKey, EgressPolicyStatus>,
        newer: impl Fn() -> bool,
        failure: &mut Option<anyhow::Error>,
    ) {
        let start = Instant::now();
        let (mut written, mut failed) = (0, 0);
        for (key, status) in reports {
            let stored = cluster.policy_statuses.get(&key);
            if stored.is_some_and(|stored| **stored == status) {
                continue;
            }
            if stored.is_some_and(|stored| differ_in_pods(stored, &status)) && !self.pods.may_be_written() {
                continue;
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
                    log_conditions(&key, &status);
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
            warn!(failed, "cannot write statuses of policies; retrying: {e:#}");
        }
        if written > 0 {
            info!(written, "wrote statuses of policies");
        }
    }

    /// Removes the statuses of deleted objects: in the first pass, and when objects were deleted.
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

/// Logs the conditions of a policy: a rejection as a warning, others at debug level.
fn log_conditions(key: &PolicyKey, status: &EgressPolicyStatus) {
    for condition in &status.conditions {
        let (reason, message) = (&*condition.reason, &*condition.message);
        match (&*condition.type_, &*condition.status) {
            ("Accepted", "False") => warn!(policy = %key, reason, "rejected policy: {message}"),
            (type_, status) => tracing::debug!(policy = %key, condition = type_, status, reason, "{message}"),
        }
    }
}
