//! What the metadata of policies and gateways contributes, and the error that validation returns.

use super::selector::Name;

/// Annotation of a policy: the node of its gateway that its egress IP is to be moved to.
pub const MOVE_TO: &str = "egret.dev/move-to";

/// Annotation of a gateway: while its value is `"true"`, egress IPs are moved until all nodes of the gateway hold
/// equally many.
pub const REBALANCE: &str = "egret.dev/rebalance";

/// Annotation of a gateway, a time (RFC 3339): addresses that were given back until then have no cooldown. Ids keep
/// theirs, because a node that has not seen the change yet must not send with an id of another policy.
pub const END_COOLDOWN: &str = "egret.dev/end-cooldown";

/// Annotation of a policy: the Service of whose annotations the controller has made it.
pub const MADE_FROM: &str = "egret.dev/made-from-service";

/// Annotation or label of a Namespace: the gateway of its EgressPolicies that name none.
pub const DEFAULT_GATEWAY: &str = "egret.dev/default-gateway";

/// Annotation or label of a Pod or Namespace: the gateway that it asks for. It has an effect by policies that select it.
pub const ASKED_GATEWAY: &str = "egret.dev/egress-gateway";

/// Annotations of Pods and Namespaces that count as labels. A label of the same key counts before the annotation.
pub const LIKE_LABELS: [&str; 2] = [DEFAULT_GATEWAY, ASKED_GATEWAY];

/// The parts of an object's metadata that a [`Policy`](super::Policy) or a [`Gateway`](super::Gateway) needs.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// `metadata.creationTimestamp`, seconds since the Unix epoch.
    pub created: Option<i64>,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// The annotation [`MOVE_TO`].
    pub move_to: Option<Name>,
    /// Whether it has the annotation [`MADE_FROM`].
    pub made: bool,
    /// Whether the annotation [`REBALANCE`] is `"true"`.
    pub rebalance: bool,
    /// The annotation [`END_COOLDOWN`].
    pub end_cooldown: Option<Name>,
}

impl Metadata {
    /// Drops what the reader does not use. `node` is the name of the reading daemon's node, `None` for a controller.
    #[must_use]
    pub fn for_reader(self, node: Option<&str>) -> Self {
        match node {
            Some(_) => Metadata { created: self.created, ..Metadata::default() },
            None => self,
        }
    }
}

/// An invalid field of an object's spec. The text has the field, the value and the remedy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// The field, `spec.addresses[2]`.
    pub field: String,
    /// What is wrong with the value, and what to write instead.
    pub message: String,
}

impl Invalid {
    pub(super) fn new(field: impl Into<String>, message: impl ToString) -> Self {
        Invalid { field: field.into(), message: message.to_string() }
    }
}
