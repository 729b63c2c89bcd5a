//! Validates a manifest's parts and makes an object of the model.

use super::fault::Fault;
use super::kubernetes::{self as k8s, Metadata};
use super::manifest::Reader;
use super::names::Names;
use super::object::{GatewayStatus, Identity, Kind, Object, label};
use crate::api;
use crate::model::egress_node::EgressNode;
use crate::model::{self, Gateway, Invalid, ObjectKey, Policy, PolicyKey};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny};
use std::sync::Arc;

/// The namespace of an object without one.
const DEFAULT_NAMESPACE: &str = "default";

/// `spec` of each kind.
pub enum Spec {
    /// Not read.
    Ignored,
    Node(k8s::NodeSpec),
    Pod(k8s::PodSpec),
    Service(Box<k8s::ServiceSpec>),
    Gateway(Box<api::EgressGatewaySpec>),
    Policy(Box<api::EgressPolicySpec>),
    ClusterPolicy(Box<api::ClusterEgressPolicySpec>),
    EgressNode,
}

/// `status` of each kind.
pub enum Status {
    /// Not read.
    Ignored,
    Node(k8s::NodeStatus),
    Pod(k8s::PodStatus),
    Service(k8s::ServiceStatus),
    Gateway(Box<api::EgressGatewayStatus>),
    Policy(Box<api::EgressPolicyStatus>),
    EgressNode(Box<api::EgressNodeStatus>),
}

/// Reads a `spec` of a kind.
pub struct SpecSeed(Kind, bool);

/// Reads a `status` of a kind.
pub struct StatusSeed(Kind, bool);

impl Spec {
    /// Reads a `spec` of `kind`. In the directory of statuses it is ignored.
    pub fn seed(kind: Kind, of_status: bool) -> SpecSeed {
        SpecSeed(kind, of_status)
    }
}

impl Status {
    /// Reads a `status` of `kind`. Those of gateways and policies are read only in the directory of statuses.
    pub fn seed(kind: Kind, of_status: bool) -> StatusSeed {
        StatusSeed(kind, of_status)
    }
}

impl<'de> DeserializeSeed<'de> for SpecSeed {
    type Value = Spec;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Spec, D::Error> {
        Ok(match self {
            SpecSeed(Kind::Namespace | Kind::Endpoints | Kind::EndpointSlice, _) | SpecSeed(_, true) => {
                IgnoredAny::deserialize(d)?;
                Spec::Ignored
            }
            SpecSeed(Kind::Node, _) => Spec::Node(Deserialize::deserialize(d)?),
            SpecSeed(Kind::Pod, _) => Spec::Pod(Deserialize::deserialize(d)?),
            SpecSeed(Kind::Service, _) => Spec::Service(Deserialize::deserialize(d)?),
            SpecSeed(Kind::EgressGateway, _) => Spec::Gateway(Deserialize::deserialize(d)?),
            SpecSeed(Kind::EgressPolicy, _) => Spec::Policy(Deserialize::deserialize(d)?),
            SpecSeed(Kind::ClusterEgressPolicy, _) => Spec::ClusterPolicy(Deserialize::deserialize(d)?),
            SpecSeed(Kind::EgressNode, _) => {
                api::EgressNodeSpec::deserialize(d)?;
                Spec::EgressNode
            }
        })
    }
}

impl<'de> DeserializeSeed<'de> for StatusSeed {
    type Value = Status;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Status, D::Error> {
        Ok(match self {
            StatusSeed(Kind::Node, false) => Status::Node(Deserialize::deserialize(d)?),
            StatusSeed(Kind::Pod, false) => Status::Pod(Deserialize::deserialize(d)?),
            StatusSeed(Kind::Service, false) => Status::Service(Deserialize::deserialize(d)?),
            StatusSeed(Kind::EgressNode, _) => Status::EgressNode(Deserialize::deserialize(d)?),
            StatusSeed(Kind::EgressGateway, true) => Status::Gateway(Deserialize::deserialize(d)?),
            StatusSeed(Kind::EgressPolicy | Kind::ClusterEgressPolicy, true) => {
                Status::Policy(Deserialize::deserialize(d)?)
            }
            _ => {
                IgnoredAny::deserialize(d)?;
                Status::Ignored
            }
        })
    }
}

impl From<Invalid> for Fault {
    fn from(e: Invalid) -> Self {
        Fault::field(e.field, e.message)
    }
}

/// Makes an object of its parts; `None` if the reader does not need it.
///
/// # Errors
/// The fault, with its field.
pub fn object(
    reader: &mut Reader<'_>,
    kind: Kind,
    meta: &Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
    endpoints: k8s::EndpointsParts,
) -> Result<Option<Object>, Fault> {
    let name = meta.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(Fault::field("metadata.name", "is missing; every object needs a name"));
    }
    if !is_subdomain(name) {
        return Err(Fault::field("metadata.name", format!("{name:?} {NOT_A_NAME}")));
    }
    let namespace = meta.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE);
    if kind.is_namespaced() && (!is_subdomain(namespace) || namespace.contains('.')) {
        return Err(Fault::field("metadata.namespace", format!("{namespace:?} {NOT_A_NAME}")));
    }
    if let Some(expected) = reader.status_of {
        return match_status(reader, expected, (kind, kind.is_namespaced().then_some(namespace), name), status);
    }
    let names = &mut *reader.names;
    // Names of pods and Services occur once, so there is nothing to share.
    let key = |names: &mut Names| ObjectKey { namespace: names.get(namespace), name: name.into() };
    Ok(Some(match (kind, spec, status) {
        (Kind::Namespace, ..) => {
            let labels = names.labels(meta.labels.as_ref().unwrap_or(&Default::default()));
            Object::Namespace(names.get(name), Box::new(labels))
        }
        (Kind::Node, spec, status) => {
            let spec = if let Some(Spec::Node(s)) = spec { s } else { Default::default() };
            let status = if let Some(Status::Node(s)) = status { s } else { Default::default() };
            Object::Node(names.get(name), Arc::new(k8s::node(meta, &spec, &status, names)?))
        }
        (Kind::Pod, spec, status) => {
            let spec = if let Some(Spec::Pod(s)) = spec { s } else { Default::default() };
            let status = if let Some(Status::Pod(s)) = status { s } else { Default::default() };
            let pod = k8s::pod(meta, &spec, &status, names)?;
            if reader.node.is_some_and(|n| pod.node.as_deref() != Some(n)) {
                return Ok(None);
            }
            Object::Pod(key(names), Arc::new(pod))
        }
        (Kind::Service, spec, status) => {
            let spec = if let Some(Spec::Service(s)) = spec { s } else { Default::default() };
            let status = if let Some(Status::Service(s)) = status { s } else { Default::default() };
            let exposure = reader.node.is_none().then(|| Box::new(k8s::exposure(&spec, &status)));
            Object::Service(key(names), Arc::new(model::Service { exposure, ..k8s::service(&spec, names)? }))
        }
        (Kind::Endpoints | Kind::EndpointSlice, ..) => {
            let key = key(names);
            let endpoints = k8s::endpoints(meta, &key, &endpoints);
            if reader.node.is_some() && !endpoints.are_of_api() {
                return Ok(None);
            }
            let endpoints = Arc::new(endpoints);
            if kind == Kind::Endpoints {
                Object::Endpoints(key, endpoints)
            } else {
                Object::EndpointSlice(key, endpoints)
            }
        }
        (Kind::EgressGateway, Some(Spec::Gateway(spec)), _) => {
            let mut gateway = Gateway::new(&spec, times(meta)?)?;
            names.gateway(&mut gateway);
            Object::Gateway(names.get(name), Arc::new(gateway))
        }
        (Kind::EgressPolicy, Some(Spec::Policy(spec)), _) => {
            let mut policy = Policy::namespaced(namespace, &spec, times(meta)?.for_reader(reader.node))?;
            names.policy(&mut policy);
            let key = PolicyKey { namespace: Some(names.get(namespace)), name: names.get(name) };
            Object::Policy(key, Arc::new(policy))
        }
        (Kind::ClusterEgressPolicy, Some(Spec::ClusterPolicy(spec)), _) => {
            let mut policy = Policy::cluster(&spec, times(meta)?.for_reader(reader.node))?;
            names.policy(&mut policy);
            Object::Policy(PolicyKey { namespace: None, name: names.get(name) }, Arc::new(policy))
        }
        (Kind::EgressNode, _, Some(Status::EgressNode(status))) => {
            let status = if reader.node.is_some() { status.for_machines() } else { *status };
            Object::EgressNode(names.get(name), Arc::new(EgressNode::from(status)))
        }
        (Kind::EgressNode, ..) => return Ok(None),
        (Kind::EgressGateway | Kind::EgressPolicy | Kind::ClusterEgressPolicy, ..) => {
            return Err(Fault::field("spec", "is missing"));
        }
    }))
}

/// Returns a status if it is of the object that the file's path names.
fn match_status(
    reader: &mut Reader<'_>,
    expected: Identity<'_>,
    found: Identity<'_>,
    status: Option<Status>,
) -> Result<Option<Object>, Fault> {
    if expected != found {
        let message = format!("does not match the file's path, which is of {}", label(expected));
        return Err(Fault::field("metadata", message));
    }
    let (_, namespace, name) = found;
    let name = reader.names.get(name);
    Ok(match status {
        Some(Status::Gateway(mut status)) => {
            reader.names.gateway_status(&mut status);
            Some(Object::GatewayStatus(name, Box::new(GatewayStatus::Read(*status))))
        }
        Some(Status::Policy(status)) => {
            let namespace = namespace.map(|n| reader.names.get(n));
            Some(Object::PolicyStatus(PolicyKey { namespace, name }, status.into()))
        }
        Some(Status::EgressNode(status)) => {
            // Other nodes do not need the parts that are for people.
            let status = if reader.node.is_some() { status.for_machines() } else { *status };
            Some(Object::EgressNode(name, Arc::new(EgressNode::from(status))))
        }
        _ => None,
    })
}

/// Parses RFC 3339 to seconds since the Unix epoch.
pub(in crate::cluster) fn parse_time(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(|time| time.as_second())
}

/// The metadata of gateways and policies.
pub(in crate::cluster) fn times(meta: &Metadata) -> Result<model::Metadata, Fault> {
    let created = match meta.creation_timestamp.as_deref() {
        None | Some("") => None,
        Some(text) => Some(parse_time(text).ok_or_else(|| {
            let message = format!("{text:?} is not a time; write it like 2026-01-31T12:00:00Z, or leave it out");
            Fault::field("metadata.creationTimestamp", message)
        })?),
    };
    let annotation = |key: &str| meta.annotations.as_ref().and_then(|all| all.get(key)).map(String::as_str);
    // The policy's status reports a wrong node name: a request that cannot be met must not invalidate the policy.
    let move_to = annotation(model::MOVE_TO).filter(|node| !node.is_empty()).map(Into::into);
    let rebalance = annotation(model::REBALANCE) == Some("true");
    let end_cooldown = annotation(model::END_COOLDOWN).filter(|time| !time.is_empty()).map(Into::into);
    Ok(model::Metadata { created, generation: meta.generation, move_to, rebalance, end_cooldown })
}

const NOT_A_NAME: &str = "cannot be a name; names have lower-case letters, digits, '-' and '.', begin and end with a \
                          letter or a digit, and have at most 253 characters";

/// Whether the name is a DNS subdomain name (RFC 1123), as Kubernetes requires. Such a name is safe as a part of a
/// path.
pub fn is_subdomain(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('-')
            && !p.ends_with('-')
            && p.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    name.len() <= 253 && name.split('.').all(part)
}

#[cfg(test)]
mod tests {
    use super::is_subdomain;

    #[test]
    fn names_are_harmless_in_paths() {
        assert!(["a", "node-1", "gw.example.org", "0"].into_iter().all(is_subdomain));
        assert!(!["", ".", "..", "../a", "a/b", "A", "a_b", "-a", "a.", "a..b"].into_iter().any(is_subdomain));
        assert!(!is_subdomain(&"a".repeat(254)));
    }
}
