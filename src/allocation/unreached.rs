//! Moves egress IPs from a gateway node that other gateway nodes reach and no source node does, to one that all their
//! source nodes reach.
//!
//! An egress IP that one of its source nodes reaches stays, whatever the others report: that node would lose it.

use super::allocator::Allocator;
use super::index::{AllocationIndex, GatewayIndex};
use super::load::Load;
use super::moves::{self, NodeReports};
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
    pub(super) fn is_unreached_by_any(&self, node: &Name) -> bool {
        self.unreached.values().any(|unreached| unreached.contains(&**node))
    }

    /// The nodes with pods that the allocation's policies select. The gateway's own nodes are not among them, because
    /// they probe each other, nor are nodes that count as lost.
    fn source_nodes_of(&self, allocator: &Allocator<'a>, allocation: AllocationIndex) -> Vec<&'a Name> {
        let users = allocator.users(allocation).into_iter().map(|index| allocator.requests.requesters[index].key);
        let nodes: BTreeSet<&Name> = users.filter_map(|key| self.of_policies.get(key)).flatten().copied().collect();
        let members = &allocator.gateway_pools[allocator.allocations[allocation].gateway].nodes;
        let is_member = |name: &Name| members.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok();
        let is_known = |name: &Name| allocator.cluster.nodes.get(name).is_some_and(|node| !node.is_lost(allocator.now));
        nodes.into_iter().filter(|name| !is_member(name) && is_known(name)).collect()
    }

    /// Whether the allocation has source nodes and none of them reaches the node.
    pub(super) fn is_unreached_by_all(
        &self,
        allocator: &Allocator<'a>,
        allocation: AllocationIndex,
        node: &Name,
    ) -> bool {
        if !self.is_unreached_by_any(node) {
            return false;
        }
        let sources = self.source_nodes_of(allocator, allocation);
        let does_not_reach = |source: &&Name| self.unreached.get(&***source).is_some_and(|u| u.contains(&**node));
        !sources.is_empty() && sources.iter().all(does_not_reach)
    }

    /// Whether all source nodes of the allocation reach the node.
    fn all_reach(&self, allocator: &Allocator<'a>, allocation: AllocationIndex, node: &Name) -> bool {
        let reaches = |source: &Name| self.unreached.get(&**source).is_none_or(|u| !u.contains(&**node));
        self.source_nodes_of(allocator, allocation).into_iter().all(reaches)
    }
}

/// How long nodes have at least to report anew, seconds.
const SETTLE_SECONDS: i64 = 2;
/// How long their reports count, seconds; in large clusters longer, because nodes report one after the other.
pub(super) const VALID_SECONDS: i64 = 5;
/// So many nodes report in a second.
const NODES_PER_SECOND: usize = 500;
/// An egress IP stays at least so long on a node that was assigned to it, seconds.
const STAY_SECONDS: i64 = 10;

/// A gateway's request for reports.
///
/// A report does not say how old its knowledge is. After an API server was away, a source node's report that the
/// owner is unreachable can arrive before the report of the node that has taken the egress IP over since; a planned
/// move would then begin at a node that no longer holds it. So the controller moves nothing by a report that stands
/// there. It asks, and decides by reports that were written since then, and not long ago.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReportRequest {
    /// When it was made, seconds since the Unix epoch. It is also its name.
    pub(super) requested_at: Option<i64>,
    /// When the controller is to look again, seconds since the Unix epoch.
    pub(super) due: Option<i64>,
}

impl ReportRequest {
    /// The request that stands at `now`: the earlier one while reports that answer it are fresh, or else a new one.
    /// `nodes` is the number of the cluster's nodes.
    fn standing(earlier: Option<i64>, now: i64, nodes: usize) -> Self {
        let valid = VALID_SECONDS.saturating_add_unsigned((nodes / NODES_PER_SECOND) as u64);
        let requested_at = earlier.filter(|at| (0..=valid).contains(&now.saturating_sub(*at))).unwrap_or(now);
        let settled = requested_at.saturating_add(SETTLE_SECONDS);
        let due = if now < settled { settled } else { requested_at.saturating_add(valid + 1) };
        ReportRequest { requested_at: Some(requested_at), due: Some(due) }
    }

    /// The time of the request whose answers count at `now`.
    fn settled(&self, now: i64) -> Option<i64> {
        self.requested_at.filter(|at| now.saturating_sub(*at) >= SETTLE_SECONDS)
    }
}

/// Moves the allocations that no source node reaches. `ready` has the nodes that an allocation can be moved to, with
/// their indices.
pub(super) fn move_on<'a>(
    allocator: &mut Allocator<'a>,
    gateway: GatewayIndex,
    allocations: &[AllocationIndex],
    (ready, load): (&HashMap<&'a Name, usize>, &mut Load),
    (sources, reports): (&SourceNodes<'a>, &NodeReports),
) {
    if sources.unreached.is_empty() {
        return;
    }
    let names: HashMap<usize, &Name> = ready.iter().map(|(name, index)| (*index, *name)).collect();
    let better = |allocator: &Allocator<'a>, allocation: AllocationIndex, index: &usize| {
        names.get(index).is_some_and(|name| sources.all_reach(allocator, allocation, name))
    };
    let (mut unreached, mut moves_at): (Vec<AllocationIndex>, Option<i64>) = (Vec::new(), None);
    for allocation in allocations.iter().copied() {
        let is_better = |index: usize| better(allocator, allocation, &index);
        if is_unreached(allocator, allocation, sources, reports) && load.indices().any(is_better) {
            // Unless the clock was set back.
            let stayed = allocator.now.saturating_sub(allocator.allocations[allocation].since);
            if (0..STAY_SECONDS).contains(&stayed) {
                let until = allocator.now + STAY_SECONDS - stayed;
                moves_at = Some(moves_at.map_or(until, |at| at.min(until)));
            } else {
                unreached.push(allocation);
            }
        }
    }
    allocator.gateway_pools[gateway].reports.due = moves_at;
    if unreached.is_empty() {
        return;
    }
    let (name, known) = (allocator.gateway_pools[gateway].name, allocator.gateway_pools[gateway].gateway);
    let request =
        ReportRequest::standing(known.status.reports_requested_at, allocator.now, allocator.cluster.nodes.len());
    let due = [request.due, moves_at].into_iter().flatten().min();
    allocator.gateway_pools[gateway].reports = ReportRequest { due, ..request };
    let Some(requested_at) = request.settled(allocator.now) else { return };
    let answers = |node: &str| {
        let status = allocator.cluster.egress_nodes.get(node);
        let mut given = status.into_iter().flat_map(|status| &status.of_allocations().reports_given);
        given.any(|given| *given.gateway == **name && given.requested_at == requested_at)
    };
    let answered: HashSet<&Name> = allocator.cluster.nodes.keys().filter(|node| answers(node)).collect();
    for allocation in unreached {
        let owner = allocator.allocations[allocation].node.as_ref();
        if !owner.into_iter().chain(sources.source_nodes_of(allocator, allocation)).all(|node| answered.contains(node))
        {
            continue;
        }
        let fits = |index: &usize| {
            better(allocator, allocation, index) && names.get(index).is_some_and(|name| answered.contains(name))
        };
        let found = load.indices().find(fits);
        if let Some(index) = found {
            let from = allocator.allocations[allocation].node.as_ref().and_then(|from| ready.get(from));
            from.into_iter().for_each(|from| load.move_from(*from));
            moves::move_to(allocator, allocation, Some(names[&index].clone()), reports);
            load.add(index);
        }
    }
}

/// Whether the owner of an allocation holds the egress IP, and no source node reaches it.
fn is_unreached(
    allocator: &Allocator,
    allocation: AllocationIndex,
    sources: &SourceNodes,
    reports: &NodeReports,
) -> bool {
    let entry = &allocator.allocations[allocation];
    let Some(node) = entry.node.as_ref() else { return false };
    // Other code replaces a dead node. A node whose kubelet reports nothing may not get to know of the move, and two
    // nodes would have the address.
    let reports_to_kubernetes = allocator.cluster.nodes.get(node).is_some_and(|known| known.lost_since.is_none());
    entry.kind != AllocationKind::Node
        && entry.leaving.is_none()
        && reports_to_kubernetes
        && allocator.lives(node)
        && reports.holds(node, entry.id)
        && sources.is_unreached_by_all(allocator, allocation, node)
}
