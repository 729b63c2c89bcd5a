//! The taint by which a node is kept free of pods until Egret is ready there.

use super::client::{Client, Failure};
use super::kind::Kind;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

/// The taint's key; whatever its effects and values are.
pub const TAINT: &str = "egret.dev/not-ready";
/// RFC 7396. With a resource version in it, the API server refuses it if the object has changed.
const MERGE: &str = "application/merge-patch+json";
/// A node that others write meanwhile is read again so many times.
const TRIES: usize = 5;

#[derive(Deserialize)]
struct Node {
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

/// Takes the taint off the node; whether it was there.
pub async fn lift(client: &Client, node: &str) -> Result<bool, Failure> {
    let path = Kind::Node.path_of(None, node);
    for _ in 0..TRIES {
        let now: Node = client.get(&path).await?;
        let Some(taints) = without(now.spec.taints) else { return Ok(false) };
        let patch = json!({"metadata": {"resourceVersion": now.metadata.resource_version}, "spec": {"taints": taints}});
        let content = (MERGE, patch.to_string().into_bytes());
        match client.ask::<Value>(Method::PATCH, &path, Some(content)).await {
            Err(e) if e.is_conflict() => {}
            other => return other.map(|_| true),
        }
    }
    Err(Failure::Unknown(format!("others change the Node {node} all the time")))
}

/// The other taints; `None` if this one is not among them.
fn without(taints: Vec<Value>) -> Option<Vec<Value>> {
    let all = taints.len();
    let others: Vec<Value> = taints.into_iter().filter(|t| t["key"] != TAINT).collect();
    (others.len() < all).then_some(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_taints_stay_as_they_are() {
        let other = json!({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "2026-11-20T00:00:00Z"});
        let ours = |effect: &str| json!({"key": TAINT, "effect": effect});
        assert_eq!(without(vec![]), None);
        assert_eq!(without(vec![other.clone()]), None);
        assert_eq!(without(vec![ours("NoSchedule"), other.clone(), ours("NoExecute")]), Some(vec![other]));
        assert_eq!(without(vec![ours("NoSchedule")]), Some(vec![]));
    }
}
