//! A node that was kept free of pods until Egret is ready is opened to them.

use crate::cluster::Statuses;
use std::time::Duration;

/// Between tries at first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Takes the taint `egret.dev/not-ready` off the node, and tries until it is off: with it no pod comes here.
pub async fn lift(statuses: Statuses, node: String) {
    let mut pause = PAUSE.0;
    loop {
        match statuses.untaint(&node).await {
            Ok(false) => return,
            Ok(true) => {
                tracing::info!("the taint egret.dev/not-ready is off this node");
                return;
            }
            Err(e) => tracing::warn!("cannot see to it that the taint egret.dev/not-ready is off this node: {e:#}"),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(PAUSE.1);
    }
}
