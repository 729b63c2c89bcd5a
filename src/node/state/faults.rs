//! What could not be brought about of single nodes, networks and addresses: named, passed over, tried again. It keeps
//! nothing else from being in sync.

use super::Node;
use crate::node::host::Faults;
use std::time::Duration;
use tokio::time::Instant;

/// It is tried again after this long.
const AGAIN: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// As they were last told.
    pub(super) faults: Faults,
    /// When they are to be tried again.
    again: Option<Instant>,
}

impl Known {
    /// When something is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.again
    }
}

impl Node {
    /// Tells of what is new, and of what has been mended.
    pub(super) fn note_faults(&mut self) {
        let mut now = self.host.faults();
        if let Some(why) = &self.odd_family {
            now.insert("tunnel".to_owned(), why.clone());
        }
        for (of, why) in now.iter().filter(|(of, why)| self.known_faults.faults.get(*of) != Some(*why)) {
            tracing::warn!(of, "passed over, and tried again: {why}");
        }
        for (of, _) in self.known_faults.faults.iter().filter(|(of, _)| !now.contains_key(*of)) {
            tracing::info!(of, "is no longer passed over");
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
