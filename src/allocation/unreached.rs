//! Moves egress IPs from a gateway node that other gateway nodes reach and no source node does, to one that all their
//! source nodes reach.
//!
//! An egress IP that one of its source nodes reaches stays, whatever the others report: that node would lose it.

use super::allocator::Allocator;
use super::moves::{self, Reports};
use super::placement::Load;
use crate::api::AllocationKind;
use crate::model::PolicyKey;
use crate::model::precedence::PolicyIndex;
use crate::model::selector::Name;
use std::collections::{BTreeSet, HashMap, HashSet};

/// What source nodes report about gateway nodes.
pub(super) struct SourceNodes<'a> {
    /// The gateway nodes that a source node does not reach, by source node.
    unreached: HashMap<&'a str, HashSet<&'a str>>,
    /// The nodes of the pods that each policy selects. Empty while no node reports anything.
    of_policies: HashMap<PolicyKey, BTreeSet<&'a Name>>,
}

impl<'a> SourceNodes<'a> {
    pub(super) fn new(allocator: &Allocator<'a>) -> Self {
        let cluster = allocator.cluster;
        let reports = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(*name));
        let reports = reports.map(|(name, node)| (&**name, &node.of_allocations().unreachable_gateway_nodes));
        let unreached: HashMap<&str, HashSet<&str>> = reports
            .filter(|(_, unreachable)| !unreachable.is_empty())
            .map(|(name, unreachable)| (name, unreachable.iter().map(String::as_str).collect()))
            .collect();
        let mut of_policies: HashMap<PolicyKey, BTreeSet<&Name>> = HashMap::new();
        if !unreached.is_empty() {
            let index = PolicyIndex::new(cluster);
            let pods = cluster.pods.iter().filter(|(_, pod)| !pod.host_network && !pod.finished);
            for (key, pod, node) in pods.filter_map(|(key, pod)| Some((key, pod, pod.node.as_ref()?))) {
                for policy in index.policies_for(&key.namespace, &pod.labels) {
                    of_policies.entry(policy.key.clone()).or_default().insert(node);
                }
            }
        }
        SourceNodes { unreached, of_policies }
    }

    /// Whether some source node does not reach the node.
    pub(super) fn miss(&self, node: &Name) -> bool {
        self.unreached.values().any(|unreached| unreached.contains(&**node))
    }

    /// The nodes with pods that the allocation's policies select. The gateway's own nodes are not among them, because they
    /// probe each other, nor are nodes that count as lost.
    fn of(&self, allocator: &Allocator<'a>, allocation: usize) -> Vec<&'a Name> {
        let users = allocator.users(allocation).into_iter().map(|place| allocator.requests.requesters[place].key);
        let nodes: BTreeSet<&Name> = users.filter_map(|key| self.of_policies.get(key)).flatten().copied().collect();
        let members = &allocator.gateway_pools[allocator.allocations[allocation].gateway].nodes;
        let is_member = |name: &Name| members.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok();
        let hears = |name: &Name| allocator.cluster.nodes.get(name).is_some_and(|node| !node.is_lost(allocator.now));
        nodes.into_iter().filter(|name| !is_member(name) && hears(name)).collect()
    }

    /// Whether the allocation has source nodes and none of them reaches the node.
    pub(super) fn all_miss(&self, allocator: &Allocator<'a>, allocation: usize, node: &Name) -> bool {
        if !self.miss(node) {
            return false;
        }
        let sources = self.of(allocator, allocation);
        let misses = |source: &&Name| self.unreached.get(&***source).is_some_and(|u| u.contains(&**node));
        !sources.is_empty() && sources.iter().all(misses)
    }

    /// Whether all source nodes of the allocation reach the node.
    fn all_reach(&self, allocator: &Allocator<'a>, allocation: usize, node: &Name) -> bool {
        let reaches = |source: &Name| self.unreached.get(&**source).is_none_or(|u| !u.contains(&**node));
        self.of(allocator, allocation).into_iter().all(reaches)
    }
}

/// Moves the allocations that no source node reaches. `ready` has the nodes that an allocation can be moved to, with their
/// places.
pub(super) fn move_on<'a>(
    allocator: &mut Allocator<'a>,
    allocations: &[usize],
    (ready, load): (&HashMap<&'a Name, usize>, &mut Load),
    (sources, reports): (&SourceNodes<'a>, &Reports),
) {
    if sources.unreached.is_empty() {
        return;
    }
    let names: HashMap<usize, &Name> = ready.iter().map(|(name, place)| (*place, *name)).collect();
    for allocation in allocations {
        let entry = &allocator.allocations[*allocation];
        let Some(node) = entry.node.clone().filter(|_| entry.kind != AllocationKind::Node && entry.leaving.is_none())
        else {
            continue;
        };
        // Other code replaces a dead node. A node that Kubernetes does not hear may not hear of the move, and two nodes
        // would have the address.
        let heard = allocator.cluster.nodes.get(&node).is_some_and(|known| known.lost_since.is_none());
        if !heard
            || !allocator.lives(&node)
            || !reports.holds(&node, entry.id)
            || !sources.all_miss(allocator, *allocation, &node)
        {
            continue;
        }
        let fits = |place: &usize| names.get(place).is_some_and(|name| sources.all_reach(allocator, *allocation, name));
        let found = load.places().find(fits);
        if let Some(place) = found {
            moves::move_to(allocator, *allocation, Some(names[&place].clone()), reports);
            load.add(place);
        }
    }
}
