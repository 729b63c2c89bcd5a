//! Kubernetes Nodes.

use super::capacity::AnnotatedCapacity;
use super::selector::Labels;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// A Kubernetes Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.labels`.
    pub labels: Labels,
    /// All addresses of type InternalIP and ExternalIP; the InternalIPs come first.
    pub addresses: Box<[IpAddr]>,
    /// How many of `addresses` are InternalIPs.
    pub internal: usize,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Box<[IpNetwork]>,
    /// `spec.unschedulable`: new pods are not placed on the node. Tools set it before they stop a node.
    pub cordoned: bool,
    /// What its annotations say of how many egress IPs it holds.
    pub capacity: AnnotatedCapacity,
    /// Since when the condition `Ready` is `Unknown`, because the kubelet reports nothing: seconds
    /// since the Unix epoch, 0 where the time is missing.
    pub lost_since: Option<i64>,
}

/// How long the condition `Ready` has to be `Unknown` before the node counts as lost, seconds. No kubelet can report
/// while the API server is away. After that all nodes are `Unknown` until each kubelet has reported, which it does
/// every 10 s (`nodeStatusUpdateFrequency`).
const LOST_AFTER_SECONDS: i64 = 30;

impl Node {
    /// When the node counts as lost if its kubelet reports nothing until then, seconds since the Unix epoch.
    pub fn is_lost_at(&self) -> Option<i64> {
        self.lost_since.map(|since| since.saturating_add(LOST_AFTER_SECONDS))
    }

    /// Whether the node counts as lost at `now`, seconds since the Unix epoch.
    pub fn is_lost(&self, now: i64) -> bool {
        self.is_lost_at().is_some_and(|at| at <= now)
    }
}
