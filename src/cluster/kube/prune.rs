//! An object's text without all that Egret does not read of it: a tenth of a Node's.

use super::kind::Kind;
use crate::api;
use crate::cluster::dir::kubernetes as k8s;
use crate::cluster::kube::decode::{EndpointsObject, Networks};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// A part as it stands: of Egret's own kinds.
type All = Box<RawValue>;

/// A part that is left out.
#[derive(Serialize)]
struct Nothing;

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Nothing)
    }
}

/// A node's word without what is for people.
#[derive(Serialize)]
struct NodeStatus(api::EgressNodeStatus);

impl<'de> Deserialize<'de> for NodeStatus {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let status = api::EgressNodeStatus::deserialize(from)?;
        Ok(NodeStatus(status.for_machines()))
    }
}

#[derive(Serialize, Deserialize)]
struct Prune<Spec, Status> {
    #[serde(default)]
    metadata: k8s::Metadata,
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<Spec>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

/// Appends the prune of an object, on one line: for a node, [`decode`](super::decode::decode) makes the same of it as
/// of all.
///
/// # Errors
/// The object makes no sense.
pub fn prune(kind: Kind, text: &[u8], to: &mut Vec<u8>) -> serde_json::Result<()> {
    match kind {
        Kind::Namespace => of::<Nothing, Nothing>(text, to),
        Kind::Node => of::<k8s::NodeSpec, k8s::NodeStatus>(text, to),
        Kind::Pod => of::<k8s::PodSpec, k8s::PodStatus>(text, to),
        Kind::Service => of::<k8s::ServiceSpec, Nothing>(text, to),
        Kind::EgressGateway => of::<All, All>(text, to),
        Kind::EgressPolicy | Kind::ClusterEgressPolicy => of::<All, Nothing>(text, to),
        Kind::EgressNode => of::<Nothing, NodeStatus>(text, to),
        Kind::EndpointSlice => {
            let mut object: EndpointsObject = serde_json::from_slice(text)?;
            object.metadata.annotations = None;
            serde_json::to_writer(to, &object)
        }
        Kind::ServiceCidr | Kind::IpPool => of::<Networks, Nothing>(text, to),
    }
}

fn of<Spec: DeserializeOwned + Serialize, Status: DeserializeOwned + Serialize>(
    text: &[u8],
    to: &mut Vec<u8>,
) -> serde_json::Result<()> {
    let mut object: Prune<Spec, Status> = serde_json::from_slice(text)?;
    // What a person applied stands in it a second time. A node reads none of them.
    object.metadata.annotations = None;
    serde_json::to_writer(to, &object)
}
