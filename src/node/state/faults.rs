//! Faults of single nodes, networks and addresses. They are reported, skipped and tried again, and all else is kept
//! in sync.

use super::Node;
use crate::node::host::Faults;
use std::time::Duration;
use tokio::time::Instant;

/// The pause between two tries.
const AGAIN: Duration = Duration::from_secs(5);

/// The faults that are known.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// As last logged.
    pub(super) faults: Faults,
    /// When the next try is due.
    again: Option<Instant>,
}

impl Known {
    /// When the next try is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.again
    }
}

impl Node {
    /// Logs new faults and faults that have gone.
    pub(super) fn log_faults(&mut self) {
        let mut now = self.host.faults();
        if let Some(why) = &self.odd_family {
            now.insert("tunnel".to_owned(), why.clone());
        }
        for (of, why) in now.iter().filter(|(of, why)| self.known_faults.faults.get(*of) != Some(*why)) {
            tracing::warn!(of, "skipped, trying again: {why}");
        }
        for (of, _) in self.known_faults.faults.iter().filter(|(of, _)| !now.contains_key(*of)) {
            tracing::info!(of, "no longer skipped");
        }
        let due = self.known_faults.again.is_none_or(|at| at <= Instant::now());
        self.known_faults.again = match (now.is_empty(), due) {
            (true, _) => None,
            (false, true) => Some(Instant::now() + AGAIN),
            (false, false) => self.known_faults.again,
        };
        self.metrics.faults(now.len());
        self.known_faults.faults = now;
    }
}
