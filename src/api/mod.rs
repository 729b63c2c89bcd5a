//! The custom resources of the group `egret.dev/v1alpha1`, as users write them and as Kubernetes stores them.
//!
//! Types only. The doc comment of a field becomes its description in the CRD, which `kubectl explain` prints.
//! [`crate::model`] validates them.

#[cfg(test)]
mod cost;
pub mod crds;
mod gateway;
mod node;
mod policy;
mod policy_key;
mod policy_status;
mod rules;
mod selector;

pub use gateway::*;
pub use node::*;
pub use policy::*;
pub use policy_key::PolicyKey;
pub use policy_status::*;

use serde::{Deserialize, Serialize};

/// The API group of all of Egret's objects.
pub const GROUP: &str = "egret.dev";
/// The version that this build reads and writes.
pub const VERSION: &str = "v1alpha1";
/// `GROUP/VERSION`, as it stands in a manifest's `apiVersion`.
pub const API_VERSION: &str = "egret.dev/v1alpha1";

/// A name, or a label's key or value, shared: clusters repeat the same few words ten thousand times. It is one
/// machine word wide, since a big cluster refers to each name in many places.
pub type Name = arcstr::ArcStr;

/// One IPv4 address, one IPv6 address, or one of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AddressPair {
    /// The IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<std::net::Ipv4Addr>,
    /// The IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<std::net::Ipv6Addr>,
}

impl AddressPair {
    /// Whether neither family has an address.
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_none() && self.ipv6.is_none()
    }
}

/// A condition of an object, with the reason and what a user can do about it. It has the same fields as
/// `metav1.Condition` of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Accepted`, `Ready`, `Shadowed` (policies), `AddressesLeft`, `RoomLeft` or `ProbesSucceed` (gateways), `DatapathReady`,
    /// `FastPath`, `PodsArrive` (nodes),
    /// `PortsNearlyExhausted`; for policies also `OverNodeLimit`.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One CamelCase word for programs.
    pub reason: String,
    /// A message for users: what is the case, and what to do.
    pub message: String,
    /// When `status` last changed, RFC 3339.
    pub last_transition_time: String,
    /// The object's `metadata.generation` that this was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}
