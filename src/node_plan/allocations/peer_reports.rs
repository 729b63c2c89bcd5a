//! What nodes report about egress IPs: which they hold, have taken over, and cannot hold.

use crate::api::Allocation;
use crate::model::Cluster;
use crate::model::egress_node::OfAllocations;
use crate::model::marks::EgressId;
use crate::node_plan::allocations::Facts;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The reports of all nodes. Of this node they are its current facts, not its last status.
pub(super) struct PeerReports<'a> {
    node: &'a str,
    facts: &'a Facts,
    held: HashMap<&'a str, HashSet<EgressId>>,
    /// Egress IPs that nodes hold without having their addresses.
    without_address: HashSet<(&'a str, EgressId)>,
    /// What any other node holds.
    held_by_others: HashSet<EgressId>,
    refused: HashSet<(&'a str, EgressId)>,
    taken: BTreeMap<EgressId, Vec<(&'a str, i64)>>,
}

impl<'a> PeerReports<'a> {
    pub(super) fn new(cluster: &'a Cluster, node: &'a str, facts: &'a Facts) -> Self {
        let mut reports = PeerReports {
            node,
            facts,
            held: HashMap::new(),
            without_address: HashSet::new(),
            held_by_others: HashSet::new(),
            refused: HashSet::new(),
            taken: BTreeMap::new(),
        };
        let others = cluster.egress_nodes.iter().filter(|(name, _)| ***name != *node);
        for (name, status) in others.filter(|(name, _)| cluster.nodes.contains_key(&**name)) {
            let OfAllocations { held, without_address, taken, refused, .. } = status.of_allocations();
            if !held.is_empty() {
                reports.held.insert(name, held.iter().copied().collect());
                reports.held_by_others.extend(held);
            }
            reports.without_address.extend(without_address.iter().map(|id| (&**name, *id)));
            reports.refused.extend(refused.iter().map(|r| (&**name, r.id)));
            for t in taken {
                reports.taken.entry(t.id).or_default().push((name, t.since));
            }
        }
        for (id, since) in &facts.taken {
            reports.taken.entry(*id).or_default().push((node, *since));
        }
        reports
    }

    /// Whether `node` reports that it holds the egress IP. `here`: whether the address is on this node.
    pub(super) fn holds(&self, node: &str, allocation: EgressId, here: bool) -> bool {
        if node == self.node {
            return here && !self.facts.refused.contains_key(&allocation);
        }
        self.held.get(node).is_some_and(|allocations| allocations.contains(&allocation))
    }

    /// Whether `node` reports that it holds the egress IP and has its address on an interface.
    pub(super) fn has_address(&self, node: &'a str, allocation: EgressId, here: bool) -> bool {
        self.holds(node, allocation, here) && !self.without_address.contains(&(node, allocation))
    }

    /// Whether some node reports that it holds the egress IP. `here`: whether the address is on this node.
    pub(super) fn any_holds(&self, allocation: EgressId, here: bool) -> bool {
        self.held_by_others.contains(&allocation) || self.holds(self.node, allocation, here)
    }

    /// Whether another node reports that it cannot hold the egress IP.
    pub(super) fn refuses(&self, node: &'a str, allocation: EgressId) -> bool {
        self.refused.contains(&(node, allocation))
    }

    /// The nodes that report that they have taken the egress IP over since the allocation last changed its node.
    pub(super) fn takers(&self, entry: &Allocation) -> Vec<&'a str> {
        let taken = self.taken.get(&entry.id).into_iter().flatten();
        taken.filter(|(_, since)| *since == entry.since).map(|(name, _)| *name).collect()
    }
}
