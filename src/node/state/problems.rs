//! What is wrong with this node. Faults of single nodes, networks and addresses are reported, skipped and tried again,
//! and all else is kept in sync.

use super::NodeDaemon;
use super::refusals::Refusals;
use crate::node::host::Faults;
use std::time::Duration;
use tokio::time::Instant;

/// The pause between two tries.
const AGAIN: Duration = Duration::from_secs(5);

/// The problems that are known.
#[derive(Debug, Default)]
pub(super) struct Problems {
    /// Why this node's tunnel address is of another family than the other nodes', if it is.
    pub(super) tunnel_family: Option<String>,
    /// Why the offline policy snapshot could not be written.
    pub(super) offline_policies: Option<String>,
    /// Why the run directory cannot be written to.
    pub(super) run_dir: Option<String>,
    /// Why the files of adopted pods could not be written.
    pub(super) adopted_files: Option<String>,
    /// Whether the networks of other nodes' pods are unknown.
    unknown_networks: bool,
    pub(super) faults: KnownFaults,
    /// What the kernel lacks.
    pub(super) refusals: Refusals,
}

impl Problems {
    /// Why something cannot be written, if it cannot. Then the node is not ready.
    pub(super) fn unwritten(&self) -> Option<&String> {
        [&self.run_dir, &self.offline_policies, &self.adopted_files].into_iter().flatten().next()
    }

    /// Sets whether the networks of other nodes' pods are unknown, and logs that once.
    pub(super) fn set_unknown_networks(&mut self, unknown: bool) {
        if unknown && !self.unknown_networks {
            tracing::warn!(
                "nothing tells where other nodes' pods have their addresses (no podCIDRs, no IPPools, no CiliumNodes): policies take them for \
                 destinations outside the cluster, and replies to them may get lost; name their networks with --direct"
            );
        }
        self.unknown_networks = unknown;
    }
}

/// The faults that are known.
#[derive(Debug, Default)]
pub(super) struct KnownFaults {
    /// As last logged.
    faults: Faults,
    /// When the next try is due.
    again: Option<Instant>,
}

impl KnownFaults {
    /// When the next try is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.again
    }

    /// The faults, by the object that they concern.
    pub(super) fn known(&self) -> &Faults {
        &self.faults
    }

    /// Logs new faults and faults that have gone.
    fn update(&mut self, now: Faults) {
        for (of, why) in now.iter().filter(|(of, why)| self.faults.get(*of) != Some(*why)) {
            tracing::warn!(of, "skipped, trying again: {why}");
        }
        for (of, _) in self.faults.iter().filter(|(of, _)| !now.contains_key(*of)) {
            tracing::info!(of, "no longer skipped");
        }
        let due = self.again.is_none_or(|at| at <= Instant::now());
        self.again = match (now.is_empty(), due) {
            (true, _) => None,
            (false, true) => Some(Instant::now() + AGAIN),
            (false, false) => self.again,
        };
        self.faults = now;
    }
}

impl NodeDaemon {
    /// Logs new faults and faults that have gone.
    pub(super) fn log_faults(&mut self) {
        let mut now = self.host.faults();
        if let Some(why) = &self.problems.tunnel_family {
            now.insert("tunnel".to_owned(), why.clone());
        }
        self.metrics.faults(now.len());
        self.problems.faults.update(now);
    }
}
