//! Features that the kernel may lack and that the datapath does not need.

use crate::node_plan::NodePlan;
use std::collections::BTreeMap;

/// The same plan without features that the kernel may lack and that the datapath does not need. The plan that lacks
/// the least important feature comes last.
pub(super) fn without_extras(plan: &NodePlan) -> Vec<NodePlan> {
    let without_log = |plan: &NodePlan| plan.port_log.then(|| NodePlan { port_log: false, ..plan.clone() });
    let without_hashes = |plan: &NodePlan| plan.needs_hashes().then(|| plan.without_hashes());
    let without_handover =
        |plan: &NodePlan| (!plan.handed.is_empty()).then(|| NodePlan { handed: BTreeMap::new(), ..plan.clone() });
    // Each plan of the last feature comes behind those that lack more important ones.
    let mut others: Vec<NodePlan> = Vec::new();
    for without in [&without_log as &dyn Fn(&NodePlan) -> Option<NodePlan>, &without_hashes, &without_handover] {
        let more: Vec<NodePlan> = others.iter().chain([plan]).filter_map(without).collect();
        others.extend(more);
    }
    others.sort_by_key(|other| (other.port_log, other.needs_hashes(), !other.handed.is_empty()));
    others
}
