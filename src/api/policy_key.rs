//! What a policy is called.

use super::Name;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Names an EgressPolicy (with a namespace) or a ClusterEgressPolicy (without). Shown as `namespace/name` and
/// `name`, which is how the allocations write it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// `None` for a ClusterEgressPolicy.
    pub namespace: Option<Name>,
    /// The name.
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
