//! Whether this node can hold egress addresses at all.

use crate::node::host::{Look, Way};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// A node is unfit when a way out that it had is down or gone, or if it has none and one is down. One that it never had
/// makes it no less fit than it was: not for what goes out by others.
#[derive(Debug, Default)]
pub(super) struct Fitness {
    had: BTreeSet<Way>,
    unfit: Option<Instant>,
    cut_off: bool,
}

impl Fitness {
    /// Returns whether it has changed.
    pub(super) fn judge(&mut self, look: &Look, apart: Option<&str>, now: Instant) -> bool {
        let (broken, works) = look.judge();
        // Of two addresses with the same way one may have no interface, being on no network of this node's.
        let is_lost = |had: bool, down: bool| had || down && works.is_empty();
        let broken = broken.iter().filter(|b| !works.contains(&b.way));
        let lost: Vec<_> = broken.filter(|b| is_lost(self.had.contains(&b.way), b.down)).collect();
        let before = self.unfit.is_some();
        self.cut_off = apart.is_some() || !lost.is_empty() && works.is_empty();
        if lost.is_empty() && apart.is_none() {
            self.unfit = None;
        } else {
            self.unfit.get_or_insert(now);
        }
        match (before, self.unfit) {
            (false, Some(_)) => {
                let why: BTreeSet<&str> = lost.iter().map(|b| &*b.why).chain(apart).collect();
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
