//! Nodes that egress IPs are to leave.

use super::{Gateway, Node};

/// A node with this label, `"true"`, gets no new allocations, and those that it has move away.
pub const DRAIN_LABEL: &str = "egret.dev/drain";

/// Whether a node has the label.
pub fn has_drain_label(node: &Node) -> bool {
    node.labels.get(DRAIN_LABEL).is_some_and(|value| &**value == "true")
}

/// Whether a gateway's egress IPs are to leave a node: by the label, or because it is cordoned. Tools that upgrade or
/// remove nodes cordon them first, and know no label of Egret's.
pub fn is_drained(gateway: &Gateway, node: &Node) -> bool {
    has_drain_label(node) || node.cordoned && !gateway.ignore_cordon
}
