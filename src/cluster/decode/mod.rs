//! The one decoder: from the text of an object to a valid object of the model, or to a refusal that names the object.
//!
//! The API server's objects come one by one as JSON, and their kind is known ([`decode`]). Manifests are documents of
//! YAML or JSON, which may be lists and which name their objects' kinds ([`manifest::Reader::read`]). From the fields
//! on, both go the same way: `kubernetes` has the fields of Kubernetes' kinds, `validate` makes objects of them.

pub mod allocations_text;
pub mod fault;
pub mod kubernetes;
pub mod manifest;
pub mod validate;

use super::kind::Kind;
use super::names::Names;
use super::object::{Key, Object};
use super::refused::Refused;
use crate::api::EgressPolicyStatus;
use crate::model::selector::Name;
use manifest::{Reader, StatusPath};
use serde::Deserialize;
use std::sync::Arc;

/// An object, valid or refused.
#[derive(Clone, Debug)]
pub struct Decoded {
    pub key: Key,
    /// `metadata.resourceVersion`, or empty.
    pub version: String,
    /// The object; `None` if the reader does not need it.
    pub object: Result<Option<Object>, Box<Refused>>,
    /// The status that a policy has in itself, also a refused one, if the reader needs it.
    pub policy_status: Option<Arc<EgressPolicyStatus>>,
}

/// Who reads objects of the API server.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The node whose daemon reads, which needs only this node's pods and no statuses of policies; `None`: a
    /// controller.
    pub node: Option<Name>,
}

#[derive(Deserialize)]
struct Head {
    metadata: HeadMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMetadata {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    resource_version: String,
}

/// Decodes an object.
///
/// # Errors
/// The text is not an object with a name: then no refusal could name it.
pub fn decode(kind: Kind, text: &[u8], reading: &Reading, names: &mut Names) -> Result<Decoded, serde_json::Error> {
    let mut reader = Reader { names, node: reading.node.as_deref(), statuses: StatusPath::InObjects };
    let fault = match reader.read_object(kind, text) {
        Ok(decoded) => return Ok(decoded),
        Err(fault) => fault,
    };
    let Head { metadata } = serde_json::from_slice(text)?;
    let key = validate::key(kind, metadata.namespace.as_deref(), &metadata.name, names);
    let whole = serde_json::from_slice(text).unwrap_or_default();
    let mut reader = Reader { names, node: reading.node.as_deref(), statuses: StatusPath::InObjects };
    let refused = Refused::new(kind, &whole, fault.to_string(), &mut reader);
    let policy_status = reading.node.is_none() && matches!(kind, Kind::EgressPolicy | Kind::ClusterEgressPolicy);
    let policy_status = policy_status.then(|| serde_json::from_value(whole["status"].clone()).ok().flatten());
    Ok(Decoded {
        key,
        version: metadata.resource_version,
        object: Err(Box::new(refused)),
        policy_status: policy_status.flatten().map(Arc::new),
    })
}

#[cfg(test)]
mod tests;
