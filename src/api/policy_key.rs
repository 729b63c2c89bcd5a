//! The key of a policy.

use super::Name;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// The key of an EgressPolicy (with a namespace) or a ClusterEgressPolicy (without). As text, `namespace/name` or
/// `name`, which is how allocations list policies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// `metadata.namespace`; `None` for a ClusterEgressPolicy.
    pub namespace: Option<Name>,
    /// `metadata.name`.
    pub name: Name,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(ns) => write!(f, "{ns}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl From<&str> for PolicyKey {
    fn from(text: &str) -> Self {
        match text.split_once('/') {
            Some((ns, name)) => PolicyKey { namespace: Some(ns.into()), name: name.into() },
            None => PolicyKey { namespace: None, name: text.into() },
        }
    }
}

impl Serialize for PolicyKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PolicyKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from).map(|text| PolicyKey::from(text.as_str()))
    }
}
