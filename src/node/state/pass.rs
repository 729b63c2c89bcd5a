//! A pass: runs the pending steps until none is left, sends the waiting responses, and publishes the status.

use super::steps::{Input, Step};
use super::{NodeDaemon, refusals};
use crate::datapath::underlay::Underlay;
use crate::datapath::watch::Interest;
use crate::node::report::Own;
use crate::node_plan::addresses;
use crate::telemetry::server::Readiness;
use anyhow::Result;
use egret_cni::protocol::{CniError, codes};
use std::time::Instant;
use tracing::Instrument;

/// The outcome of a pass.
#[derive(Debug, Default)]
pub struct PassResult {
    /// Whether the kernel is in sync.
    pub in_sync: bool,
    /// Whether policies can be enforced, also by the plugin while this daemon is away. Then the plugin's entry may be
    /// written.
    pub can_enforce: bool,
    /// Whether another pass must try again what has failed.
    pub again: bool,
    /// The kernel notifications that concern the daemon, if that may have changed.
    pub interest: Option<Interest>,
    /// Whether memory was freed that can be returned to the system.
    pub has_freed: bool,
}

impl NodeDaemon {
    /// Brings the kernel in sync with the desired state, to a fixed point. Then it sends the waiting responses, and
    /// publishes the status.
    pub async fn pass(&mut self) -> PassResult {
        self.passes += 1;
        let span = tracing::debug_span!("pass", number = self.passes);
        self.run_pass().instrument(span).await
    }

    async fn run_pass(&mut self) -> PassResult {
        let started = Instant::now();
        let result = self.run_steps().await;
        let failure = result.as_ref().err().map(|e| {
            let details = self.problems.refusals.lasting().map_or_else(|| format!("{e:#}"), ToOwned::to_owned);
            CniError::new(codes::KERNEL, "the kernel is not in sync", details)
        });
        self.metrics.applied(started.elapsed(), &result);
        self.respond(failure.as_ref());
        // Let the responses be sent before the work that no plugin waits for.
        tokio::task::yield_now().await;
        let text = failure.as_ref().map(CniError::to_string);
        if self.problems.refusals.is_news(text.as_deref())
            && let Some(failure) = text
        {
            tracing::error!("{failure}; trying again");
        }
        let unwritten = self.problems.unwritten().cloned();
        if let Some(unwritten) = unwritten.as_ref().filter(|_| failure.is_none()) {
            tracing::error!("{unwritten}; trying again");
        }
        let in_sync = failure.is_none();
        let state = failure.map(|f| f.to_string()).or(unwritten).map_or(Readiness::Ready, Readiness::NotReady);
        let again = state != Readiness::Ready;
        self.in_sync.note(!again, Instant::now(), jiff::Timestamp::now().as_second());
        self.listeners.ready.send_if_modified(|now| {
            let changed = *now != state;
            *now = state;
            changed
        });
        self.count_takeovers();
        self.publish(in_sync);
        self.set_targets();
        self.set_probes();
        self.set_held();
        self.set_roles();
        self.set_flow_view();
        self.set_owned_ips();
        self.set_fast_path();
        self.announce_pods();
        self.seek_unmanaged();
        let has_compared = self.pending.has_run(Step::Tunnel);
        PassResult {
            in_sync,
            can_enforce: in_sync && self.problems.offline_policies.is_none(),
            again,
            interest: has_compared.then(|| self.interest()),
            has_freed: has_compared || self.pending.has_run(Step::View),
        }
    }

    /// Runs the pending steps. Returns the number of changes in the kernel, or the first failure.
    async fn run_steps(&mut self) -> Result<usize> {
        let (mut changes, mut failure) = (0, None);
        self.pending.begin();
        self.problems.refusals.begin();
        while let Some(step) = self.pending.next() {
            let started = Instant::now();
            let result = match self.problems.refusals.paused(step, started) {
                Some(refusal) => Err(refusal),
                None => self.try_step(step).await,
            };
            let (done, elapsed) = (result.as_ref().ok(), started.elapsed());
            tracing::debug!(?step, changes = done, ?elapsed, "step");
            self.pending.end_step(result.is_ok());
            match result {
                Ok(n) => changes += n,
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        self.pending.end();
        if self.pending.has_run(Step::Peers) {
            self.log_faults();
        }
        failure.map_or(Ok(changes), Err)
    }

    async fn try_step(&mut self, step: Step) -> Result<usize> {
        let result = self.run_step(step).await;
        let words = |error: &str| refusals::words(step, error);
        self.problems.refusals.note(step, &result, Instant::now(), words);
        result
    }

    /// Runs one step. Returns the number of changes in the kernel.
    async fn run_step(&mut self, step: Step) -> Result<usize> {
        match step {
            Step::View => self.refresh_view(),
            Step::EndedPods => self.drop_ended_pods(),
            Step::PluginRecords => self.read_plugin_records().await?,
            Step::OfflinePolicies => self.store_offline_policies_again(),
            Step::Allocations => self.refresh_allocations(),
            Step::Tunnel => self.apply_tunnel().await?,
            Step::Vlans => return self.host.vlans(&self.view).await,
            Step::Routing => return self.host.routing(&self.view).await,
            Step::Uplinks => self.read_uplinks().await?,
            Step::Decision => self.decide(),
            Step::Handovers => self.update_handovers(),
            Step::Coming => self.find_coming(),
            Step::TablesAhead => return self.apply_tables_ahead(),
            Step::Addresses => return self.sync_addresses().await,
            Step::Announcements => self.announce_again(),
            Step::TakenOver => self.find_taken_over(),
            Step::Peers => return self.host.forwarding(&self.view).await,
            Step::Tables => return self.apply_tables(),
            Step::TunnelEntrance => return self.change_entrance().await,
            Step::Connections => self.clean_connections(),
            Step::Quarantine => self.quarantine_missing()?,
            Step::EndedConnections => self.delete_ended_connections().await,
            Step::Release => return self.lift_quarantines(),
            Step::Detached => self.forget_detached()?,
            Step::FirstOfflinePolicies => self.store_offline_policies(),
        }
        Ok(0)
    }

    fn publish(&mut self, in_sync: bool) {
        let (blocked, unreachable) = (self.blocked(), &self.unreachable());
        let own = Own {
            tunnel: self.host.tunnel_end(),
            facts: &self.facts,
            holding: &self.egress.holding,
            faults: self.problems.faults.known(),
            unreachable,
            reports_given: self.reports_given(unreachable),
            flow_log_since: self.flow_log_since(),
            over_limit: self.pods.over_limit(),
            failing_probes: self.failing_probes(),
            in_sync_since: self.in_sync.since(),
            ports_nearly_exhausted: &self.source_ports.nearly_exhausted(),
            kernel: match self.problems.refusals.lasting() {
                Some(words) => Some(Err(words)),
                None => in_sync.then_some(Ok(())),
            },
            fast_path: self.fast_path_status(),
            arrivals: self.host.arrivals(),
        };
        self.report.publish(&self.view, &own, blocked, self.cluster.nodes.len());
    }

    fn interest(&self) -> Interest {
        Interest {
            own_ports: self.host.ports(),
            underlay: self.host.underlay().map(|u| u.interfaces().clone()).unwrap_or_default(),
            peers: self.host.underlay().into_iter().flat_map(Underlay::peers).collect(),
            uplinks: self.host.uplinks().chain(self.host.ways_out()).collect(),
            addresses: self
                .view
                .allocations
                .allocations
                .values()
                .filter(|p| p.is_member())
                .flat_map(addresses)
                .collect(),
        }
    }

    /// Waits for the next deadline of egress IPs, handovers, faults, pods or reports.
    pub async fn due(&self) {
        let egress = &self.egress;
        let deadlines = [
            egress.holding.next(),
            egress.handovers.next(),
            self.problems.faults.next(),
            self.pods.next(),
            self.unreachable.next(),
        ];
        match deadlines.into_iter().flatten().min() {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Makes the next pass cover what is due.
    pub fn mark_due(&mut self) {
        self.pending.raise(Input::Host);
    }

    /// Makes the next pass try again what has failed. It reads everything back, unless it waits for the kernel alone.
    pub fn try_again(&mut self) {
        if self.problems.refusals.are_paused(Instant::now()) {
            self.mark_due();
        } else {
            self.invalidate();
        }
    }

    /// Makes the next pass read everything back.
    pub fn invalidate(&mut self) {
        self.host.invalidate();
        self.pending.raise(Input::Host);
        self.pending.raise(Input::PluginRecords);
    }
}
