//! Which nodes are alive, by the reports of nodes about each other.
//!
//! The nodes of a gateway probe each other, and each reports those that do not answer (`status.unreachablePeers`).
//! The controller does not probe nodes. A node that has died cannot withdraw its own reports.

use crate::model::Cluster;
use std::collections::{HashMap, HashSet};

/// The nodes that count as unreachable.
///
/// The node that most others report is unreachable, and its own reports no longer count. This repeats with the
/// remaining reports. A repeated report counts once. If two nodes report each other, both are unreachable, since
/// nothing tells which one is right. A node that reports itself, because it cannot hold any egress IP, is unreachable
/// too.
pub fn unreachable(cluster: &Cluster) -> HashSet<&str> {
    let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(*name));
    let each =
        nodes.flat_map(|(by, status)| status.of_allocations().unreachable_peers.iter().map(|of| (&**by, of.as_str())));
    let mut reports: HashSet<(&str, &str)> = each.collect();
    let mut unreachable: HashSet<&str> = reports.iter().filter(|(by, of)| by == of).map(|(by, _)| *by).collect();
    loop {
        reports.retain(|(by, of)| !unreachable.contains(by) && !unreachable.contains(of));
        let mut count: HashMap<&str, usize> = HashMap::new();
        for (_, of) in &reports {
            *count.entry(*of).or_default() += 1;
        }
        let Some(most) = count.values().max().copied() else { return unreachable };
        unreachable.extend(count.into_iter().filter(|(_, n)| *n == most).map(|(of, _)| of));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::World;
    use proptest::prelude::*;

    fn world(nodes: usize, reports: &[(usize, usize)]) -> World {
        let mut world = World::default();
        for node in 0..nodes {
            world.node(&format!("n{node}"), "g", &[]);
            let of = reports.iter().filter(|(by, _)| *by == node).map(|(_, of)| format!("n{of}"));
            world.misses(&format!("n{node}"), &of.collect::<Vec<_>>());
        }
        world
    }

    fn found(world: &World) -> Vec<&str> {
        let mut found: Vec<&str> = unreachable(&world.cluster).into_iter().collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn nodes_that_most_others_report_are_unreachable() {
        assert!(found(&world(3, &[])).is_empty());
        assert_eq!(found(&world(3, &[(0, 2), (1, 2)])), ["n2"]);
        assert_eq!(found(&world(3, &[(0, 1), (0, 2)])), ["n1", "n2"], "two of three have died");
        assert_eq!(
            found(&world(3, &[(0, 2), (1, 2), (2, 0), (2, 1)])),
            ["n2"],
            "a node that is cut off reports all others"
        );
        assert_eq!(
            found(&world(3, &[(0, 1), (1, 0), (2, 0)])),
            ["n0"],
            "n0 died after it had reported n1, which is back"
        );
        assert_eq!(found(&world(2, &[(0, 1), (1, 0)])), ["n0", "n1"], "one of them is dead, unknown which");
        assert_eq!(found(&world(2, &[(0, 0), (0, 1)])), ["n0"], "it cannot hold anything, and reports all others");
        assert_eq!(found(&world(3, &[(0, 1), (2, 1), (1, 2), (1, 2)])), ["n1"], "a repeated report counts once");
    }

    #[test]
    fn reports_of_removed_nodes_do_not_count() {
        let mut world = world(3, &[(0, 1)]);
        world.without_node("n0");
        assert!(found(&world).is_empty());
    }

    proptest! {
        #[test]
        fn a_dead_minority_is_found_whatever_it_had_reported(
            nodes in 3..9usize, dead in proptest::collection::btree_set(0..9usize, 0..4),
            old in proptest::collection::vec((0..9usize, 0..9usize), 0..12),
        ) {
            let dead: Vec<usize> = dead.into_iter().filter(|d| *d < nodes).collect();
            prop_assume!(2 * dead.len() < nodes);
            let lives = |n: &usize| !dead.contains(n);
            let mut reports: Vec<(usize, usize)> =
                (0..nodes).filter(lives).flat_map(|by| dead.iter().map(move |of| (by, *of))).collect();
            reports.extend(old.into_iter().filter(|(by, of)| dead.contains(by) && *of < nodes));
            let expected: Vec<String> = dead.iter().map(|n| format!("n{n}")).collect();
            let world = world(nodes, &reports);
            prop_assert_eq!(found(&world), expected);
        }
    }
}
