//! Removes the taint that keeps pods off a node until Egret is ready there.

use super::client::{Client, RequestFailure};
use crate::cluster::kind::Kind;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

/// The taint's key. Its effects and values do not matter.
pub const TAINT: &str = "egret.dev/not-ready";
/// RFC 7396. The API server refuses a patch with a resource version if the object has changed.
const MERGE: &str = "application/merge-patch+json";
/// The number of attempts if others change the node at the same time.
const ATTEMPTS: usize = 5;

#[derive(Deserialize)]
struct NodeTaints {
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    resource_version: String,
}

#[derive(Default, Deserialize)]
struct Spec {
    #[serde(default)]
    taints: Vec<Value>,
}

/// Removes the taint. Returns whether the node had it.
pub async fn remove(client: &Client, node: &str) -> Result<bool, RequestFailure> {
    let path = Kind::Node.path_of(None, node);
    for _ in 0..ATTEMPTS {
        let now: NodeTaints = client.get(&path).await?;
        let Some(taints) = without(now.spec.taints) else { return Ok(false) };
        let patch = json!({"metadata": {"resourceVersion": now.metadata.resource_version}, "spec": {"taints": taints}});
        let content = (MERGE, patch.to_string().into_bytes());
        match client.ask::<Value>(Method::PATCH, &path, Some(content)).await {
            Err(e) if e.is_conflict() => {}
            other => return other.map(|_| true),
        }
    }
    Err(RequestFailure::Unknown(format!("the Node {node} changed at each of {ATTEMPTS} attempts")))
}

/// The other taints; `None` if the taint is not there.
fn without(taints: Vec<Value>) -> Option<Vec<Value>> {
    let all = taints.len();
    let others: Vec<Value> = taints.into_iter().filter(|t| t["key"] != TAINT).collect();
    (others.len() < all).then_some(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_taints_stay() {
        let other = json!({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "2026-11-20T00:00:00Z"});
        let ours = |effect: &str| json!({"key": TAINT, "effect": effect});
        assert_eq!(without(vec![]), None);
        assert_eq!(without(vec![other.clone()]), None);
        assert_eq!(without(vec![ours("NoSchedule"), other.clone(), ours("NoExecute")]), Some(vec![other]));
        assert_eq!(without(vec![ours("NoSchedule")]), Some(vec![]));
    }
}
