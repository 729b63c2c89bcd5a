//! The objects of the group `egret.dev/v1alpha1`, as users write them and as Kubernetes stores them.
//!
//! Types only: what a field means is told in its doc comment, which becomes the CRD's description and so
//! what `kubectl explain` prints. Meaning is given to them in [`crate::plan`].

#[cfg(test)]
mod cost;
pub mod crds;
mod gateway;
mod node;
mod policy;
mod policy_key;
mod rules;
mod selector;

pub use gateway::*;
pub use node::*;
pub use policy::*;
pub use policy_key::PolicyKey;

use serde::{Deserialize, Serialize};

/// The API group of all of Egret's objects.
pub const GROUP: &str = "egret.dev";
/// The version that this build reads and writes.
pub const VERSION: &str = "v1alpha1";
/// `GROUP/VERSION`, as it stands in a manifest's `apiVersion`.
pub const API_VERSION: &str = "egret.dev/v1alpha1";

/// A label's or an object's name, shared: clusters repeat the same few words ten thousand times. One word wide, since a
/// big cluster's names are held in ten times as many places.
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

/// One thing that is or is not so about an object, with the reason and what a person can do about it.
/// The same fields as Kubernetes' `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Accepted`, `Ready`, `Shadowed` (policies) or `AddressesLeft` (gateways).
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One CamelCase word for programs.
    pub reason: String,
    /// What a person should know and do.
    pub message: String,
    /// When `status` last changed, RFC 3339.
    pub last_transition_time: String,
    /// The object's `metadata.generation` that this was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}
