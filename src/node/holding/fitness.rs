//! Whether this node can hold egress addresses at all.

use crate::node::host::{Look, Way};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// A node is unfit when a way out is down, or one that it had is gone. One that it never had makes it no less fit than
/// it was.
#[derive(Debug, Default)]
pub(super) struct Fitness {
    had: BTreeSet<Way>,
    unfit: Option<Instant>,
    cut_off: bool,
}

impl Fitness {
    /// Returns whether it has changed.
    pub(super) fn judge(&mut self, look: &Look, now: Instant) -> bool {
        let (broken, works) = look.judge();
        let lost: Vec<_> = broken.iter().filter(|b| b.down || self.had.contains(&b.way)).collect();
        let before = self.unfit.is_some();
        self.cut_off = !lost.is_empty() && works.is_empty();
        if lost.is_empty() {
            self.unfit = None;
        } else {
            self.unfit.get_or_insert(now);
        }
        match (before, self.unfit) {
            (false, Some(_)) => {
                let why: BTreeSet<&str> = lost.iter().map(|b| &*b.why).collect();
                let why = why.into_iter().collect::<Vec<_>>().join("; ");
                tracing::warn!("this node cannot hold egress addresses now: {why}");
            }
            (true, None) => tracing::info!("this node can hold egress addresses again"),
            _ => {}
        }
        self.had.extend(works);
        before != self.unfit.is_some()
    }

    /// Since when it cannot, if it cannot.
    pub(super) fn unfit_since(&self) -> Option<Instant> {
        self.unfit
    }

    /// Whether no way out is left.
    pub(super) fn is_cut_off(&self) -> bool {
        self.cut_off
    }
}
