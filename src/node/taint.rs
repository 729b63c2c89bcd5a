//! Removal of the taint that keeps pods off the node until Egret is ready.

use crate::cluster::Statuses;
use std::time::Duration;

/// The first and the longest pause between two tries.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Removes the taint `egret.dev/not-ready` from the node, and tries until it succeeds: no pod is scheduled to a node
/// with it.
pub async fn remove(statuses: Statuses, node: String) {
    let mut pause = PAUSE.0;
    loop {
        match statuses.untaint(&node).await {
            Ok(false) => return,
            Ok(true) => {
                tracing::info!("removed the taint egret.dev/not-ready from this node");
                return;
            }
            Err(e) => tracing::warn!("cannot remove the taint egret.dev/not-ready from this node: {e:#}"),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(PAUSE.1);
    }
}
