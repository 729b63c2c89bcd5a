//! Removes from an object's text all that Egret does not read. A tenth of a Node remains.

use crate::api;
use crate::cluster::decode::kubernetes as k8s;
use crate::cluster::kind::Kind;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// A part that stays as it is, of Egret's own kinds.
type All = Box<RawValue>;

/// A part that is removed.
#[derive(Serialize)]
struct Nothing;

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Nothing)
    }
}

/// A node's status without the parts that are for people.
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

/// Appends the pruned object, on one line. A node decodes it to the same as the whole object.
///
/// # Errors
/// The object is invalid.
pub fn prune(kind: Kind, text: &[u8], to: &mut Vec<u8>) -> serde_json::Result<()> {
    match kind {
        Kind::Namespace => of::<Nothing, Nothing>(text, to),
        Kind::Node => of::<k8s::NodeSpec, k8s::NodeStatus>(text, to),
        Kind::Pod => of::<k8s::PodSpec, k8s::PodStatus>(text, to),
        Kind::Service => of::<k8s::ServiceSpec, Nothing>(text, to),
        Kind::EgressGateway => of::<All, All>(text, to),
        Kind::EgressPolicy | Kind::ClusterEgressPolicy => of::<All, Nothing>(text, to),
        Kind::EgressNode => of::<Nothing, NodeStatus>(text, to),
        Kind::EndpointSlice | Kind::Endpoints => {
            let mut object: k8s::EndpointsObject = serde_json::from_slice(text)?;
            object.metadata.annotations = None;
            serde_json::to_writer(to, &object)
        }
        // Only the controller reads them, which has no offline cache.
        Kind::ServiceL2Status | Kind::Lease => of::<Nothing, Nothing>(text, to),
        Kind::ServiceCidr | Kind::IpPool | Kind::CiliumNode => of::<k8s::NetworksSpec, Nothing>(text, to),
    }
}

fn of<Spec: DeserializeOwned + Serialize, Status: DeserializeOwned + Serialize>(
    text: &[u8],
    to: &mut Vec<u8>,
) -> serde_json::Result<()> {
    let mut object: Prune<Spec, Status> = serde_json::from_slice(text)?;
    object.metadata.prune();
    serde_json::to_writer(to, &object)
}
