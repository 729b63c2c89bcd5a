//! The uplinks that this node can use, and whether it can hold egress IPs at all.

use crate::model::uplink_key::UplinkKey;
use crate::node::host::UplinkStatus;
use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

/// An uplink that cannot be used now.
#[derive(Clone, Debug)]
struct Unusable {
    since: Instant,
    why: String,
}

/// The uplinks of gateways with probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbedUplinks {
    /// All of them.
    pub all: BTreeSet<UplinkKey>,
    /// Those that count as lost because the probes fail here and succeed on another node, with the reasons.
    pub lost: BTreeMap<UplinkKey, String>,
}

/// Whether this node can hold egress IPs. It is unfit when none of its uplinks is left. An uplink whose interface it
/// never had does not make it unfit: the allocation's status says that its egress IP cannot be placed here.
#[derive(Debug, Default)]
pub(super) struct Fitness {
    had: BTreeSet<UplinkKey>,
    works: BTreeSet<UplinkKey>,
    lost: BTreeMap<UplinkKey, Unusable>,
    unfit: Option<Instant>,
    cut_off: bool,
    probed: ProbedUplinks,
}

impl Fitness {
    /// Sets the uplinks of gateways with probes. They count from the next [`judge`](Self::judge) on.
    pub(super) fn set_probed(&mut self, probed: ProbedUplinks) {
        self.probed = probed;
    }

    /// Updates the fitness from the state of the uplinks. Returns whether it has changed. `apart` is the reason why no
    /// other node reaches this one, if there is one.
    pub(super) fn judge(&mut self, uplinks_now: &UplinkStatus, apart: Option<&str>, now: Instant) -> bool {
        let (broken, mut works) = uplinks_now.judge();
        // Of two addresses with the same uplink, one may have no interface, because it is on no network of this node.
        let broken: Vec<_> = broken.into_iter().filter(|b| !works.contains(&b.key)).collect();
        let had = broken.iter().any(|b| self.had.contains(&b.key) || b.down);
        // A node whose probes fail can still be the best one that there is.
        self.cut_off = apart.is_some() || had && works.is_empty();
        let before = (self.unfit.is_some(), self.lost.keys().cloned().collect::<Vec<_>>());
        self.had.extend(works.iter().cloned());
        let mut lost = std::mem::take(&mut self.lost);
        let by_probes = self.probed.lost.iter().map(|(key, why)| (key.clone(), why.clone()));
        for (key, why) in broken.into_iter().map(|b| (b.key, b.why)).chain(by_probes) {
            let known = lost.remove(&key).map(|lost| lost.since);
            self.lost.insert(key, Unusable { since: known.unwrap_or(now), why });
        }
        works.extend(self.probed.all.iter().filter(|key| !self.probed.lost.contains_key(*key)).cloned());
        self.works = works;
        if self.cut_off {
            self.unfit.get_or_insert(now);
        } else {
            self.unfit = None;
        }
        let after = (self.unfit.is_some(), self.lost.keys().cloned().collect::<Vec<_>>());
        if before != after {
            self.log_changes(&before.1, before.0, apart);
        }
        before != after
    }

    fn log_changes(&self, before: &[UplinkKey], was_unfit: bool, apart: Option<&str>) {
        let why = self.lost.values().map(|lost| &*lost.why).chain(apart).collect::<BTreeSet<&str>>();
        let why = why.into_iter().collect::<Vec<_>>().join("; ");
        if self.unfit.is_some() && !was_unfit {
            tracing::warn!("this node cannot hold egress IPs now: {why}");
            return;
        }
        if was_unfit && self.unfit.is_none() {
            tracing::info!("this node can hold egress IPs again");
        }
        for (key, lost) in self.lost.iter().filter(|(key, _)| !before.contains(key)) {
            let what = if key.gateway.is_some() { "egress IPs move" } else { "egress IPs are not announced there" };
            tracing::warn!(uplink = %key, "uplink lost; {what}: {}", lost.why);
        }
        for key in before.iter().filter(|key| !self.lost.contains_key(key)) {
            tracing::info!(uplink = %key, "uplink usable again");
        }
    }

    /// Since when this node has been unfit, if it is.
    pub(super) fn unfit_since(&self) -> Option<Instant> {
        self.unfit
    }

    /// Since when one of these uplinks has been lost, if one is.
    pub(super) fn lost_since(&self, needs: impl Iterator<Item = UplinkKey>) -> Option<Instant> {
        needs.filter_map(|key| self.lost.get(&key)).map(|lost| lost.since).min()
    }

    /// Whether no uplink is left of those that this node had.
    pub(super) fn is_cut_off(&self) -> bool {
        self.cut_off
    }

    /// The uplinks that work.
    pub(super) fn works(&self) -> &BTreeSet<UplinkKey> {
        &self.works
    }

    /// The uplinks that cannot be used, with the reasons.
    pub(super) fn lost(&self) -> impl Iterator<Item = (&UplinkKey, &str)> {
        self.lost.iter().map(|(key, lost)| (key, &*lost.why))
    }
}
