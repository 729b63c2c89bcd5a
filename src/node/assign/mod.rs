//! The assign hook (`--assign-hook`): a program or a server that brings an address to this node before this node uses it,
//! for instance as a secondary address of the machine's network interface at a cloud. Egret knows no cloud.
//!
//! [`Assignments`] decides what to ask; [`AssignHook`] asks.

mod client;
mod metrics;
mod states;

pub use client::HookUrl;
pub use metrics::AssignMetrics;
pub use states::{Assignments, Requests};

use client::HookFailure;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// How many requests are open at a time.
const AT_ONCE: usize = 8;
/// The pause before the hook is told of a release for the second time.
const AGAIN: Duration = Duration::from_secs(2);

/// What the hook is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// To bring the address to the node, wherever it is.
    Assign,
    /// To take it off the node. Another node may have it by now.
    Release,
}

/// A request to the hook, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HookRequest {
    /// What to do.
    pub action: Action,
    /// The address.
    pub address: IpAddr,
    /// The node's name in the cluster.
    pub node: String,
    /// The EgressGateway of the address.
    pub gateway: String,
    /// The interface that the address is put on; empty if the node has none for it.
    pub interface: String,
    /// The interface's MAC address; empty if it has none.
    pub mac: String,
}

/// The answer to a request to assign an address.
pub type AssignmentResult = Result<(), String>;

/// Sends requests to the hook in the background.
#[derive(Debug)]
pub struct AssignHook {
    target: Arc<HookUrl>,
    permits: Arc<Semaphore>,
    metrics: AssignMetrics,
    /// The last request of each address. The next one waits for its end, so that the hook sees them in their order.
    last: BTreeMap<IpAddr, JoinHandle<()>>,
}

impl AssignHook {
    /// A hook that has not been asked anything.
    pub fn new(target: HookUrl, metrics: AssignMetrics) -> Self {
        AssignHook {
            target: Arc::new(target),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            metrics,
            last: BTreeMap::new(),
        }
    }

    /// Sends a request. `answered` gets the answer to one that assigns.
    pub fn send(&mut self, request: HookRequest, answered: impl FnOnce(IpAddr, AssignmentResult) + Send + 'static) {
        self.last.retain(|_, task| !task.is_finished());
        let before = self.last.remove(&request.address);
        let address = request.address;
        let (target, permits, metrics) = (Arc::clone(&self.target), Arc::clone(&self.permits), self.metrics.clone());
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                // It has ended, whether it panicked or not.
                let _ = before.await;
            }
            // The semaphore is never closed.
            let _permit = permits.acquire().await;
            match request.action {
                Action::Assign => {
                    let answer = ask(&target, &request, &metrics).await;
                    answered(address, answer.map_err(|failure| failure.to_string()));
                }
                Action::Release => tell(&target, &request, &metrics).await,
            }
        });
        self.last.insert(address, task);
    }
}

async fn ask(target: &HookUrl, request: &HookRequest, metrics: &AssignMetrics) -> Result<(), HookFailure> {
    let answer = client::post(target, request).await;
    metrics.count(request.action, &answer);
    answer
}

/// Tells the hook of a release, twice if it fails. Nothing depends on it: the next owner's request moves the address.
async fn tell(target: &HookUrl, request: &HookRequest, metrics: &AssignMetrics) {
    for pause in [AGAIN, Duration::ZERO] {
        let Err(failure) = ask(target, request, metrics).await else { return };
        let address = request.address;
        tracing::warn!(%address, "the assign hook does not take notice that this node has given an egress IP up: {failure}");
        tokio::time::sleep(pause).await;
    }
}
