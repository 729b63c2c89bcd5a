//! Features that the kernel may lack and that the datapath does not need.

use super::Host;
use crate::datapath::ruleset::Ruleset;
use crate::node_plan::{NodePlan, TunnelWay};
use anyhow::{Context, Result};
use egret_nft::netlink::Error;
use std::collections::BTreeMap;

impl Host {
    /// Applies the tables of `plan`, which the kernel has refused, without such features, the least important ones first.
    /// Limits of bandwidths come last: a tenant's limit must not cost the others their rules. Returns the tables and the
    /// number of changes.
    ///
    /// # Errors
    /// The kernel refuses all of these tables.
    pub(super) fn apply_without_extras(&mut self, plan: &NodePlan, refused: Error) -> Result<(Ruleset, usize)> {
        let (hands_over, hashes, mut refused) = (!plan.handed.is_empty(), plan.needs_hashes(), refused);
        let limited = self.shared.clone();
        let unlimited = limited.has_limits().then(|| limited.without_limits());
        let others = without_extras(plan);
        let with_limits = others.iter().rev().map(|other| (other, &limited));
        let all = || [plan].into_iter().chain(others.iter().rev());
        let without_limits = unlimited.iter().flat_map(|shared| all().map(move |other| (other, shared)));
        for (other, shared) in with_limits.chain(without_limits) {
            let ruleset = Ruleset::new(other.clone(), shared, self.marks, self.ruleset.as_ref());
            let changes = match self.nft.apply(ruleset.tables()) {
                Ok(changes) => changes,
                Err(e) => {
                    refused = e;
                    continue;
                }
            };
            if hands_over && other.handed.is_empty() {
                tracing::warn!("packets of moved egress IPs cannot be handed over, see `egretd check`: {refused}");
            }
            if plan.way != other.way {
                self.entrance.refuse_pair(&refused);
            }
            if plan.limited.is_some() && other.limited.is_none() {
                self.bridges = false;
                tracing::warn!(
                    "bridged pods that an ifb device limits (kubernetes.io/egress-bandwidth) are blocked, see `egretd check`: \
                     {refused}"
                );
            }
            if hashes && !other.needs_hashes() {
                self.hashes = false;
                tracing::warn!("spread: Connection uses one egress IP of each policy, see `egretd check`: {refused}");
            }
            if !other.port_log {
                self.port_log = false;
                if !std::mem::replace(&mut self.port_log_missed, true) {
                    tracing::warn!(
                        "connections with a changed port break when their egress IP moves, see `egretd check`: {refused}"
                    );
                }
            }
            if limited.has_limits() && !shared.has_limits() {
                self.limits = false;
                tracing::warn!("bandwidths of policies are not limited, see `egretd check`: {refused}");
                self.shared = shared.clone();
            }
            return Ok((ruleset, changes));
        }
        Err(refused).context("nf_tables rejects the datapath")
    }
}

/// The plan without one feature, if it has it.
type Without<'a> = &'a dyn Fn(&NodePlan) -> Option<NodePlan>;

/// The same plan without features that the kernel may lack and that the datapath does not need. The plan that lacks
/// the least important feature comes last.
fn without_extras(plan: &NodePlan) -> Vec<NodePlan> {
    let without_log = |plan: &NodePlan| plan.port_log.then(|| NodePlan { port_log: false, ..plan.clone() });
    let without_hashes = |plan: &NodePlan| plan.needs_hashes().then(|| plan.without_hashes());
    let without_handover =
        |plan: &NodePlan| (!plan.handed.is_empty()).then(|| NodePlan { handed: BTreeMap::new(), ..plan.clone() });
    let without_pair = |plan: &NodePlan| match plan.way {
        TunnelWay::Both { tunnel } => Some(NodePlan { way: TunnelWay::EgressHook, device: tunnel, ..plan.clone() }),
        _ => None,
    };
    let without_bridge = |plan: &NodePlan| plan.limited.is_some().then(|| NodePlan { limited: None, ..plan.clone() });
    let all: [Without; 5] = [&without_log, &without_hashes, &without_handover, &without_bridge, &without_pair];
    // Each plan of the last feature comes behind those that lack more important ones.
    let mut others: Vec<NodePlan> = Vec::new();
    for without in all {
        let more: Vec<NodePlan> = others.iter().chain([plan]).filter_map(without).collect();
        others.extend(more);
    }
    others.sort_by_key(|other| {
        let has_pair = matches!(other.way, TunnelWay::Both { .. });
        (other.port_log, other.needs_hashes(), !other.handed.is_empty(), other.limited.is_some(), has_pair)
    });
    others
}
