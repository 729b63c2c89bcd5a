//! `kubectl egret plan`: what would change if manifests were applied. It runs the controller's own computation on the
//! cluster's state with and without them, and compares.

mod changes;
mod egress;
mod text;

use super::state::ClusterState;
use crate::allocation::report::report;
use crate::allocation::{AllocationResult, allocate};
use crate::api::EgressPolicyStatus;
use crate::cluster::{Overlaid, OverlayVerb, overlay};
use crate::model::{Cluster, PolicyKey};
use egress::Egress;
use serde::Serialize;
use std::collections::BTreeMap;

/// What would change.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The objects of the manifests.
    pub objects: Vec<String>,
    /// Objects that the API server or Egret would reject, with the reason.
    pub rejected: Vec<String>,
    /// Pods whose egress changes, those with the same change together.
    pub pods: Vec<PodsChange>,
    /// Policies whose state changes.
    pub policies: Vec<Change>,
    /// Gateways whose state changes, and pools that run out.
    pub gateways: Vec<Change>,
    /// Egress IPs that move to another node.
    pub moves: Vec<Change>,
}

/// Pods with the same change.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodsChange {
    /// What kind of change.
    pub kind: Kind,
    /// How they leave the cluster now.
    pub from: Vec<Egress>,
    /// How they would leave.
    pub to: Vec<Egress>,
    /// What becomes of connections that are open then.
    pub connections: String,
    /// The pods, sorted.
    pub pods: Vec<String>,
}

/// What changes for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It has no policy now and would have one.
    Gain,
    /// It would have another egress IP, or the same for other destinations.
    Change,
    /// It would have no policy.
    Lose,
}

/// A change of one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// The object.
    pub object: String,
    /// Whether it becomes worse.
    pub worse: bool,
    /// What changes.
    pub message: String,
}

impl Plan {
    /// Whether anything changes.
    pub fn changes_anything(&self) -> bool {
        !(self.pods.is_empty() && self.policies.is_empty() && self.gateways.is_empty() && self.moves.is_empty())
    }
}

/// A manifest file.
pub struct File {
    /// Its name, for messages.
    pub name: String,
    /// Its text.
    pub text: Vec<u8>,
}

/// A state of the cluster with what follows from it.
struct Computed {
    cluster: Cluster,
    outcome: AllocationResult,
    reports: BTreeMap<PolicyKey, EgressPolicyStatus>,
}

impl Computed {
    fn new(cluster: Cluster, now: i64) -> Self {
        let outcome = allocate(&cluster, now);
        let reports = report(&cluster, &outcome, now);
        Computed { cluster, outcome, reports }
    }
}

/// What would change if the files were applied, or their objects deleted.
pub fn plan(state: &ClusterState, verb: OverlayVerb, files: &[File], namespace: &str) -> Plan {
    let mut cluster = Cluster::clone(&state.cluster);
    let mut result = Plan::default();
    for file in files {
        let Overlaid { objects, rejected } =
            overlay(&mut cluster, verb, (&file.name, &file.text), namespace, state.now);
        result.objects.extend(objects);
        result.rejected.extend(rejected);
    }
    let before = Computed::new(Cluster::clone(&state.cluster), state.now);
    let after = Computed::new(cluster, state.now);
    result.pods = egress::pods(&before, &after);
    result.policies = changes::policies(&before, &after);
    result.gateways = changes::gateways(&before, &after);
    result.moves = changes::moves(&before, &after);
    result
}

#[cfg(test)]
mod tests;
