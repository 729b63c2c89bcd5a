//! The versions of nodes' daemons. A daemon blocks what has an allocation of a kind that it does not know, so the
//! controller makes none before all daemons know it.

use super::decision::{Reason, Rejection};
use crate::api::AllocationKind;
use crate::model::Cluster;
use crate::model::text::few;

/// At most so many nodes are named.
const NAMED: usize = 3;

/// The rejection of new allocations of a kind that some node's daemon is too old to know. A node that reports no version
/// has none.
pub(super) fn too_old(cluster: &Cluster, kind: AllocationKind) -> Option<Rejection> {
    let since = kind.known_since();
    let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(*name));
    let old = nodes.filter_map(|(name, node)| {
        let version = node.of_allocations().version.as_deref()?;
        (parse(version)? < since).then(|| format!("{name} ({version})"))
    });
    let old: Vec<String> = old.collect();
    let (major, minor, patch) = since;
    let message = || {
        format!(
            "egretd does not know egress IPs of the kind {kind:?}, which came with {major}.{minor}.{patch}, on {}; upgrade \
             it there",
            few(&old, NAMED)
        )
    };
    (!old.is_empty()).then(|| Rejection::new(Reason::NodesTooOld, message()))
}

/// Major, minor and patch version. A pre-release counts as its release.
fn parse(version: &str) -> Option<(u32, u32, u32)> {
    let release = version.split(['-', '+']).next()?;
    let mut numbers = release.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::Reason;
    use crate::api::Allocate;
    use crate::fixture::{World, asking, naming};

    #[test]
    fn nothing_new_is_allocated_before_all_nodes_know_the_kind() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        world.policy("a/old", asking(Allocate::Dedicated));
        let old = world.allocate().grant("a/old").clone();
        world.is_in_sync("n1", "0.1.0-rc.1+7", "2026-01-31T12:00:00Z");
        world.is_in_sync("n2", "0.0.9", "2026-01-31T12:00:00Z");
        // The daemon of a node that was removed does not count.
        world.is_in_sync("gone", "0.0.1", "2026-01-31T12:00:00Z");
        world.policy("a/new", asking(Allocate::Pooled));
        world.policy("a/named", naming(&["192.0.2.57"]));
        let outcome = world.allocate();
        assert_eq!(outcome.grant("a/old"), &old, "what exists stays");
        outcome.assert_refused("a/new", Reason::NodesTooOld, &["Pooled", "0.1.0", "n2 (0.0.9)", "upgrade"]);
        outcome.assert_refused("a/named", Reason::NodesTooOld, &["Explicit"]);
        assert!(!outcome.rejection("a/new").message.contains("gone"));
        world.is_in_sync("n2", "0.2.0", "2026-01-31T12:00:00Z");
        let outcome = world.allocate();
        assert_eq!(outcome.address("a/named"), "192.0.2.57");
        outcome.grant("a/new");
    }

    #[test]
    fn no_version_knows_an_unknown_kind() {
        let mut world = World::new(&["192.0.2.50"]);
        assert_eq!(too_old(&world.cluster, AllocationKind::Unknown), None, "nobody is too old where nobody reports");
        world.is_in_sync("n1", "999.0.0", "2026-01-31T12:00:00Z");
        assert!(too_old(&world.cluster, AllocationKind::Unknown).is_some());
        assert!(AllocationKind::KNOWN.into_iter().all(|kind| too_old(&world.cluster, kind).is_none()));
    }
}
