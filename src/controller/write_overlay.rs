//! The write overlay: the controller's own writes that the source has not shown yet.
//!
//! A snapshot may be older than the last write. Computed from old allocations, a policy would get another address
//! than the one that its status already shows. So a write counts until the source shows it.

use crate::api::{EgressGatewayStatus, EgressPolicyStatus};
use crate::model::selector::Name;
use crate::model::shared::Shared;
use crate::model::{Cluster, PolicyKey};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a write counts if the source shows something else. After that, another writer has overwritten it.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct WriteOverlay {
    gateways: BTreeMap<Name, Written<GatewayStatus>>,
    policies: BTreeMap<PolicyKey, Written<Arc<EgressPolicyStatus>>>,
}

/// The written status of a gateway, and the version of the object that the write made.
#[derive(Debug, PartialEq)]
struct GatewayStatus {
    status: Shared<EgressGatewayStatus>,
    version: Option<Box<str>>,
}

#[derive(Debug)]
struct Written<S> {
    status: S,
    /// When the pass that wrote it ended. The source cannot be expected to keep up with a pass.
    at: Option<Instant>,
}

impl<S> Written<S> {
    fn is_awaited(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now < at + PATIENCE)
    }
}

impl WriteOverlay {
    /// Adds a written status of a gateway, with the version of the object that the write made.
    pub(super) fn gateway(&mut self, name: Name, status: EgressGatewayStatus, version: Option<Box<str>>) {
        self.gateways.insert(name, Written { status: GatewayStatus { status: status.into(), version }, at: None });
    }

    /// Adds a written status of a policy.
    pub(super) fn policy(&mut self, key: PolicyKey, status: EgressPolicyStatus) {
        self.policies.insert(key, Written { status: Arc::new(status), at: None });
    }

    /// The pass has ended: from now on the source is expected to show its writes.
    pub(super) fn count_from(&mut self, now: Instant) {
        self.gateways.values_mut().for_each(|written| _ = written.at.get_or_insert(now));
        self.policies.values_mut().for_each(|written| _ = written.at.get_or_insert(now));
    }

    /// The snapshot with all writes that the source has not shown yet.
    pub(super) fn merge(&mut self, snapshot: Arc<Cluster>, now: Instant) -> Arc<Cluster> {
        self.gateways.retain(|name, written| {
            let Some(shown) = snapshot.gateways.get(name) else { return false };
            match (&shown.version, &written.status.version) {
                // Every later version contains the write. Until then the write counts, however long that takes.
                (Some(shown), Some(version)) => is_older(shown, version),
                _ => shown.status != written.status.status && written.is_awaited(now),
            }
        });
        self.policies.retain(|key, written| {
            let there = snapshot.policies.contains_key(key);
            there && snapshot.policy_statuses.get(key) != Some(&written.status) && written.is_awaited(now)
        });
        if self.gateways.is_empty() && self.policies.is_empty() {
            return snapshot;
        }
        let mut cluster = (*snapshot).clone();
        for (name, written) in &self.gateways {
            if let Some(gateway) = cluster.gateways.get_mut(name) {
                let gateway = Arc::make_mut(gateway);
                gateway.status = written.status.status.clone();
                if written.status.version.is_some() {
                    gateway.version.clone_from(&written.status.version);
                }
            }
        }
        for (key, written) in &self.policies {
            cluster.policy_statuses.insert(key.clone(), written.status.clone());
        }
        Arc::new(cluster)
    }

    /// How long until a write stops counting; `None` if the source has shown all writes.
    pub(super) fn until(&self, now: Instant) -> Option<Duration> {
        // A write with a version does not expire.
        let gateways = self.gateways.values().filter(|w| w.status.version.is_none()).map(|written| written.at);
        let policies = self.policies.values().map(|written| written.at);
        gateways.chain(policies).min().map(|at| (at.unwrap_or(now) + PATIENCE).saturating_duration_since(now))
    }
}

/// Whether one version of an object is older than another. Versions are numbers in all Kubernetes implementations; of
/// other texts only the equal one counts as not older.
pub(super) fn is_older(shown: &str, version: &str) -> bool {
    match (shown.parse::<u64>(), version.parse::<u64>()) {
        (Ok(shown), Ok(version)) => shown < version,
        _ => shown != version,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, naming};

    fn id_of(cluster: &Cluster) -> Option<u16> {
        cluster.gateways["g"].status.allocations.first().map(|allocation| allocation.id)
    }

    /// A snapshot from before the allocations were written, one from after, and the allocations.
    fn before_and_after() -> (Arc<Cluster>, Arc<Cluster>, EgressGatewayStatus) {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", naming(&["192.0.2.50"]));
        let before = Arc::new(world.cluster.clone());
        let status = world.allocate().gateways["g"].clone();
        (before, Arc::new(world.cluster), status)
    }

    #[test]
    fn a_write_counts_until_the_source_shows_it() {
        let (before, after, status) = before_and_after();
        let (mut write_overlay, now) = (WriteOverlay::default(), Instant::now());
        write_overlay.gateway("g".into(), status.clone(), None);
        write_overlay.count_from(now);
        assert_eq!(id_of(&write_overlay.merge(before.clone(), now)), Some(status.allocations[0].id));
        assert_eq!(write_overlay.until(now), Some(PATIENCE));
        assert!(Arc::ptr_eq(&write_overlay.merge(after.clone(), now), &after));
        assert_eq!(write_overlay.until(now), None);
        assert_eq!(id_of(&write_overlay.merge(before, now)), None, "a write that was shown no longer counts");
    }

    #[test]
    fn a_write_that_the_source_does_not_show_in_time_expires() {
        let (before, _, status) = before_and_after();
        let (mut write_overlay, now) = (WriteOverlay::default(), Instant::now());
        write_overlay.gateway("g".into(), status, None);
        write_overlay.count_from(now);
        assert_eq!(id_of(&write_overlay.merge(before, now + PATIENCE)), None);
        assert_eq!(write_overlay.until(now + PATIENCE), None);
    }

    #[test]
    fn a_write_with_a_version_counts_until_that_version_is_shown() {
        let (before, after, status) = before_and_after();
        let (mut write_overlay, now) = (WriteOverlay::default(), Instant::now());
        let versioned = |cluster: &Arc<Cluster>, version: &str| {
            let mut cluster = Cluster::clone(cluster);
            Arc::make_mut(cluster.gateways.get_mut("g").unwrap()).version = Some(version.into());
            Arc::new(cluster)
        };
        write_overlay.gateway("g".into(), status.clone(), Some("10".into()));
        write_overlay.count_from(now);
        let merged = write_overlay.merge(versioned(&before, "9"), now + 10 * PATIENCE);
        assert_eq!(id_of(&merged), Some(status.allocations[0].id));
        assert_eq!(merged.gateways["g"].version.as_deref(), Some("10"));
        // A person has changed it since.
        assert_eq!(id_of(&write_overlay.merge(versioned(&before, "11"), now)), None);
        assert_eq!(id_of(&write_overlay.merge(versioned(&after, "12"), now)), Some(status.allocations[0].id));
    }

    #[test]
    fn a_deleted_object_is_not_waited_for() {
        let (_, _, status) = before_and_after();
        let (mut write_overlay, now) = (WriteOverlay::default(), Instant::now());
        write_overlay.gateway("g".into(), status, None);
        write_overlay.count_from(now);
        write_overlay.policy("a/p".into(), EgressPolicyStatus::default());
        write_overlay.merge(Arc::default(), now);
        assert_eq!(write_overlay.until(now), None);
    }
}
