//! Drained nodes: egress IPs move away from them.

use super::{Gateway, Node};

/// A node with this label, set to `"true"`, gets no new egress IPs, and those that it holds move away.
pub const DRAIN_LABEL: &str = "egret.dev/drain";

/// Whether a node has [`DRAIN_LABEL`].
pub fn has_drain_label(node: &Node) -> bool {
    node.labels.get(DRAIN_LABEL).is_some_and(|value| &**value == "true")
}

/// Whether a gateway's egress IPs are to move away from a node, because of the label or because the node is cordoned.
/// Tools that upgrade or remove nodes cordon them first and do not know Egret's label.
pub fn is_drained(gateway: &Gateway, node: &Node) -> bool {
    has_drain_label(node) || node.cordoned && !gateway.ignore_cordon
}
