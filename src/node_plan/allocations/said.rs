//! What nodes say of paths: who holds which, who has taken which over, who cannot hold which.

use crate::api::LedgerPath;
use crate::model::Cluster;
use crate::model::egress_node::OfPaths;
use crate::model::marks::PathId;
use crate::node_plan::allocations::Facts;
use std::collections::{BTreeMap, HashMap, HashSet};

/// See the module. Of the node itself it is not what it last said but what is so.
pub(super) struct Said<'a> {
    node: &'a str,
    facts: &'a Facts,
    held: HashMap<&'a str, HashSet<PathId>>,
    refused: HashSet<(&'a str, PathId)>,
    taken: BTreeMap<PathId, Vec<(&'a str, i64)>>,
}

impl<'a> Said<'a> {
    pub(super) fn new(cluster: &'a Cluster, node: &'a str, facts: &'a Facts) -> Self {
        let mut said = Said { node, facts, held: HashMap::new(), refused: HashSet::new(), taken: BTreeMap::new() };
        let others = cluster.egress_nodes.iter().filter(|(name, _)| ***name != *node);
        for (name, status) in others.filter(|(name, _)| cluster.nodes.contains_key(&**name)) {
            let OfPaths { held, taken, refused, .. } = status.of_paths();
            if !held.is_empty() {
                said.held.insert(name, held.iter().copied().collect());
            }
            said.refused.extend(refused.iter().map(|r| (&**name, r.id)));
            for t in taken {
                said.taken.entry(t.id).or_default().push((name, t.since));
            }
        }
        for (id, since) in &facts.taken {
            said.taken.entry(*id).or_default().push((node, *since));
        }
        said
    }

    /// Whether `node` says that it holds the path. `here`: whether its address is on this node.
    pub(super) fn holds(&self, node: &str, path: PathId, here: bool) -> bool {
        if node == self.node {
            return here && !self.facts.refused.contains_key(&path);
        }
        self.held.get(node).is_some_and(|paths| paths.contains(&path))
    }

    /// Whether another node says that it cannot hold the path.
    pub(super) fn refuses(&self, node: &'a str, path: PathId) -> bool {
        self.refused.contains(&(node, path))
    }

    /// The nodes that have taken a path over from the ledger's node, as the ledger is now.
    pub(super) fn takers(&self, entry: &LedgerPath) -> Vec<&'a str> {
        let taken = self.taken.get(&entry.id).into_iter().flatten();
        taken.filter(|(_, since)| *since == entry.since).map(|(name, _)| *name).collect()
    }
}
