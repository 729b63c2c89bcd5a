//! Which nodes live, as far as nodes tell of each other.
//!
//! The nodes of a gateway ask each other, and each tells who does not answer it. The allocations itself asks nobody, and
//! what was said by a node that has died since is not taken back.

use crate::model::Cluster;
use std::collections::{HashMap, HashSet};

/// The nodes that are not known to live. Whom the most do not hear, they are right about, and what it says itself counts
/// no more; so again with what is left. What a node says twice counts once. Of nodes of which each says it of the other,
/// none is known to live. A node that says of itself that it can hold nothing is one of them, too.
pub(crate) fn unreachable(cluster: &Cluster) -> HashSet<&str> {
    let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(*name));
    let each =
        nodes.flat_map(|(by, status)| status.of_allocations().unreachable_peers.iter().map(|of| (&**by, of.as_str())));
    let mut said: HashSet<(&str, &str)> = each.collect();
    let mut unreachable: HashSet<&str> = said.iter().filter(|(by, of)| by == of).map(|(by, _)| *by).collect();
    loop {
        said.retain(|(by, of)| !unreachable.contains(by) && !unreachable.contains(of));
        let mut count: HashMap<&str, usize> = HashMap::new();
        for (_, of) in &said {
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

    fn world(nodes: usize, said: &[(usize, usize)]) -> World {
        let mut world = World::default();
        for node in 0..nodes {
            world.node(&format!("n{node}"), "g", &[]);
            let of = said.iter().filter(|(by, _)| *by == node).map(|(_, of)| format!("n{of}"));
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
    fn whom_others_do_not_hear_is_not_known_to_live() {
        assert!(found(&world(3, &[])).is_empty());
        assert_eq!(found(&world(3, &[(0, 2), (1, 2)])), ["n2"]);
        assert_eq!(found(&world(3, &[(0, 1), (0, 2)])), ["n1", "n2"], "two of three have died");
        assert_eq!(found(&world(3, &[(0, 2), (1, 2), (2, 0), (2, 1)])), ["n2"], "who is cut off hears nobody");
        assert_eq!(found(&world(3, &[(0, 1), (1, 0), (2, 0)])), ["n0"], "n0 died, and spoke of n1, which is back");
        assert_eq!(found(&world(2, &[(0, 1), (1, 0)])), ["n0", "n1"], "one of them, and nobody knows which");
        assert_eq!(found(&world(2, &[(0, 0), (0, 1)])), ["n0"], "it cannot hold anything, and hears nobody");
        assert_eq!(found(&world(3, &[(0, 1), (2, 1), (1, 2), (1, 2)])), ["n1"], "who says a thing twice is not two");
    }

    #[test]
    fn what_a_node_said_that_is_no_more_does_not_count() {
        let mut world = world(3, &[(0, 1)]);
        world.without_node("n0");
        assert!(found(&world).is_empty());
    }

    proptest! {
        #[test]
        fn a_minority_that_died_is_found_whatever_it_said(
            nodes in 3..9usize, dead in proptest::collection::btree_set(0..9usize, 0..4),
            old in proptest::collection::vec((0..9usize, 0..9usize), 0..12),
        ) {
            let dead: Vec<usize> = dead.into_iter().filter(|d| *d < nodes).collect();
            prop_assume!(2 * dead.len() < nodes);
            let lives = |n: &usize| !dead.contains(n);
            let mut said: Vec<(usize, usize)> =
                (0..nodes).filter(lives).flat_map(|by| dead.iter().map(move |of| (by, *of))).collect();
            said.extend(old.into_iter().filter(|(by, of)| dead.contains(by) && *of < nodes));
            let expected: Vec<String> = dead.iter().map(|n| format!("n{n}")).collect();
            let world = world(nodes, &said);
            prop_assert_eq!(found(&world), expected);
        }
    }
}
