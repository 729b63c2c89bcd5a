//! Validates a manifest's parts and makes an object of the model.

use super::fault::Fault;
use super::kubernetes::{self as k8s, Metadata};
use super::manifest::{Reader, StatusPath};
use super::{Decoded, allocations_text};
use crate::api;
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::{Key, Object, label};
use crate::model::egress_node::EgressNode;
use crate::model::{self, Announcer, Gateway, Invalid, ObjectKey, Policy, PolicyKey};
use serde::de::{IgnoredAny, MapAccess};
use std::sync::Arc;

/// The namespace of an object without one.
const DEFAULT_NAMESPACE: &str = "default";
/// The label that every namespace has from Kubernetes 1.21 on. Egret adds it where it is missing.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// An object's fields besides its metadata, by kind. `None`: the field is absent or `null`.
enum Fields {
    /// Namespaces, and kinds of which no field is used.
    None,
    Node(Option<k8s::NodeSpec>, Option<k8s::NodeStatus>),
    Pod(Option<k8s::PodSpec>, Option<k8s::PodStatus>),
    Service(Option<Box<k8s::ServiceSpec>>, Option<k8s::ServiceStatus>),
    Endpoints(k8s::EndpointsParts),
    Networks(Option<k8s::NetworksSpec>),
    ServiceL2Status(Option<k8s::ServiceL2Status>),
    Lease(Option<k8s::LeaseSpec>),
    Gateway(Option<Box<api::EgressGatewaySpec>>, Option<Box<api::EgressGatewayStatus>>),
    Policy(Option<Box<api::EgressPolicySpec>>, Option<Box<api::EgressPolicyStatus>>),
    ClusterPolicy(Option<Box<api::ClusterEgressPolicySpec>>, Option<Box<api::EgressPolicyStatus>>),
    EgressNode(Option<api::EgressNodeSpec>, Option<Box<api::EgressNodeStatus>>),
}

/// Reads an object's fields besides its metadata.
pub struct FieldReader {
    fields: Fields,
    /// In the directory of statuses a `spec` is ignored.
    reads_spec: bool,
    reads_status: bool,
}

impl FieldReader {
    pub fn new(kind: Kind, reader: &Reader<'_>) -> Self {
        let of_file = matches!(reader.statuses, StatusPath::Of(_));
        let in_objects = reader.statuses == StatusPath::InObjects;
        // Users cannot write the statuses of gateways and policies: those count only where Egret writes them.
        let (fields, reads_status) = match kind {
            Kind::Namespace => (Fields::None, false),
            Kind::Node => (Fields::Node(None, None), !of_file),
            Kind::Pod => (Fields::Pod(None, None), !of_file),
            Kind::Service => (Fields::Service(None, None), reader.node.is_none()),
            Kind::Endpoints | Kind::EndpointSlice => (Fields::Endpoints(Default::default()), false),
            Kind::ServiceCidr | Kind::IpPool | Kind::CiliumNode => (Fields::Networks(None), false),
            Kind::ServiceL2Status => (Fields::ServiceL2Status(None), true),
            Kind::Lease => (Fields::Lease(None), false),
            Kind::EgressGateway => (Fields::Gateway(None, None), of_file || in_objects),
            Kind::EgressPolicy => (Fields::Policy(None, None), of_file || (in_objects && reader.node.is_none())),
            Kind::ClusterEgressPolicy => {
                (Fields::ClusterPolicy(None, None), of_file || (in_objects && reader.node.is_none()))
            }
            Kind::EgressNode => (Fields::EgressNode(None, None), true),
        };
        FieldReader { fields, reads_spec: !of_file, reads_status }
    }

    /// Reads the value of a field. Returns whether the kind has such a field.
    ///
    /// # Errors
    /// The value is invalid.
    pub fn read<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<bool, A::Error> {
        match (&mut self.fields, field) {
            (_, "spec") if !self.reads_spec => drop(map.next_value::<IgnoredAny>()?),
            (_, "status") if !self.reads_status => drop(map.next_value::<IgnoredAny>()?),
            (Fields::Node(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::Node(_, status), "status") => *status = map.next_value()?,
            (Fields::Pod(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::Pod(_, status), "status") => *status = map.next_value()?,
            (Fields::Service(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::Service(_, status), "status") => *status = map.next_value()?,
            // Before Kubernetes 1.21, the API server has Endpoints in place of EndpointSlices.
            (Fields::Endpoints(parts), "endpoints") => parts.endpoints = map.next_value()?,
            (Fields::Endpoints(parts), "ports") => parts.ports = map.next_value()?,
            (Fields::Endpoints(parts), "subsets") => parts.subsets = map.next_value()?,
            (Fields::Networks(spec), "spec") => *spec = map.next_value()?,
            (Fields::ServiceL2Status(status), "status") => *status = map.next_value()?,
            (Fields::Lease(spec), "spec") => *spec = map.next_value()?,
            (Fields::Gateway(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::Gateway(_, status), "status") => *status = map.next_value()?,
            (Fields::Policy(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::ClusterPolicy(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::Policy(_, status) | Fields::ClusterPolicy(_, status), "status") => *status = map.next_value()?,
            (Fields::EgressNode(spec, _), "spec") => *spec = map.next_value()?,
            (Fields::EgressNode(_, status), "status") => *status = map.next_value()?,
            (_, "spec" | "status") => drop(map.next_value::<IgnoredAny>()?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl From<Invalid> for Fault {
    fn from(e: Invalid) -> Self {
        Fault::field(e.field, e.message)
    }
}

/// The key of an object.
pub fn key(kind: Kind, namespace: Option<&str>, name: &str, names: &mut Names) -> Key {
    let namespace = namespace.filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE);
    // Names of pods and Services occur once, so there is nothing to share.
    let occurs_once = kind.is_namespaced() && !kind.is_ours();
    let name = if occurs_once { name.into() } else { names.get(name) };
    (kind.is_namespaced().then(|| names.get(namespace)), name)
}

/// Makes an object of its metadata and its fields.
///
/// # Errors
/// The fault, with its field.
pub fn object(
    reader: &mut Reader<'_>,
    kind: Kind,
    meta: &Metadata,
    FieldReader { fields, .. }: FieldReader,
) -> Result<Decoded, Fault> {
    let name = meta.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(Fault::field("metadata.name", "is missing; every object needs a name"));
    }
    if !is_subdomain(name) {
        return Err(Fault::field("metadata.name", format!("{name:?} {NOT_A_NAME}")));
    }
    let key = key(kind, meta.namespace.as_deref(), name, reader.names);
    if let Some(namespace) = &key.0
        && (!is_subdomain(namespace) || namespace.contains('.'))
    {
        return Err(Fault::field("metadata.namespace", format!("{namespace:?} {NOT_A_NAME}")));
    }
    let mut policy_status = None;
    let object = match (reader.statuses, fields) {
        (StatusPath::Of(expected), fields) => {
            let found = (kind, key.0.as_deref(), name);
            if expected != found {
                let message = format!("does not match the file's path, which is of {}", label(expected));
                return Err(Fault::field("metadata", message));
            }
            status_object(reader, &key, fields)?
        }
        (_, Fields::Gateway(spec, status)) => {
            let mut gateway = Gateway::new(&*spec.ok_or_else(no_spec)?, times(meta)?)?;
            reader.names.gateway(&mut gateway);
            if let Some(status) = status {
                gateway.status = gateway_status(*status, reader.names)?.into();
            }
            gateway.version = reader.version_of(meta);
            Some(Object::Gateway(key.1.clone(), Arc::new(gateway)))
        }
        (_, Fields::Policy(spec, status)) => {
            policy_status = status;
            let namespace = key.0.as_deref().unwrap_or_default();
            let meta = times(meta)?.for_reader(reader.node);
            Some(policy(reader, &key, Policy::namespaced(namespace, &*spec.ok_or_else(no_spec)?, meta)?))
        }
        (_, Fields::ClusterPolicy(spec, status)) => {
            policy_status = status;
            let meta = times(meta)?.for_reader(reader.node);
            Some(policy(reader, &key, Policy::cluster(&*spec.ok_or_else(no_spec)?, meta)?))
        }
        (_, fields) => kubernetes_object(reader, kind, &key, meta, fields)?,
    };
    let version = meta.resource_version.clone().unwrap_or_default();
    let policy_status = policy_status.map(|mut status| {
        reader.names.policy_status(&mut status);
        Arc::from(status)
    });
    Ok(Decoded { key, version, object: Ok(object), policy_status })
}

fn no_spec() -> Fault {
    Fault::field("spec", "is missing")
}

fn policy(reader: &mut Reader<'_>, key: &Key, mut policy: Policy) -> Object {
    reader.names.policy(&mut policy);
    Object::Policy(policy_key(key), Arc::new(policy))
}

/// A status that is an object of its own; `None` if there is none.
fn status_object(reader: &mut Reader<'_>, key: &Key, fields: Fields) -> Result<Option<Object>, Fault> {
    Ok(match fields {
        Fields::Gateway(_, Some(status)) => {
            let status = gateway_status(*status, reader.names)?;
            Some(Object::GatewayStatus(key.1.clone(), status.into()))
        }
        Fields::Policy(_, Some(mut status)) | Fields::ClusterPolicy(_, Some(mut status)) => {
            reader.names.policy_status(&mut status);
            Some(Object::PolicyStatus(policy_key(key), status.into()))
        }
        Fields::EgressNode(_, Some(status)) => {
            // Other nodes do not need the parts that are for people.
            let status = if reader.node.is_some() { status.for_machines() } else { *status };
            Some(Object::EgressNode(key.1.clone(), Arc::new(EgressNode::from(status))))
        }
        _ => None,
    })
}

/// A gateway's status, with the allocations as objects and interned names.
pub fn gateway_status(status: api::EgressGatewayStatus, names: &mut Names) -> Result<api::EgressGatewayStatus, Fault> {
    let mut status = allocations_text::read(status).map_err(|e| Fault { message: e, ..Fault::default() })?;
    names.gateway_status(&mut status);
    Ok(status)
}

/// An object of Kubernetes' own kinds or a node's report; `None` if the reader does not need it.
fn kubernetes_object(
    reader: &mut Reader<'_>,
    kind: Kind,
    key: &Key,
    meta: &Metadata,
    fields: Fields,
) -> Result<Option<Object>, Fault> {
    let name = key.1.clone();
    Ok(Some(match fields {
        Fields::Node(spec, status) => {
            let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
            Object::Node(name, Arc::new(k8s::node(meta, &spec, &status, reader.names)?))
        }
        Fields::Pod(spec, status) => {
            let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
            let pod = k8s::pod(meta, &spec, &status, reader.names)?;
            if reader.node.is_some_and(|n| pod.node.as_deref() != Some(n)) {
                return Ok(None);
            }
            Object::Pod(object_key(key), Arc::new(pod))
        }
        Fields::Service(spec, status) => {
            let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
            let exposure = reader.has_exposure().then(|| Box::new(k8s::exposure(&spec, &status)));
            let is_controller = reader.node.is_none();
            let load_balancer = is_controller.then(|| k8s::load_balancer(meta, &spec, &status, reader.names)).flatten();
            let service = k8s::service(&spec, reader.names)?;
            Object::Service(object_key(key), Arc::new(model::Service { exposure, load_balancer, ..service }))
        }
        Fields::Endpoints(parts) => {
            let key = object_key(key);
            let endpoints = Arc::new(k8s::endpoints(meta, &key, &parts));
            match kind {
                _ if reader.node.is_some() && !endpoints.are_of_api() => return Ok(None),
                Kind::Endpoints => Object::Endpoints(key, endpoints),
                _ => Object::EndpointSlice(key, endpoints),
            }
        }
        Fields::ServiceL2Status(_) | Fields::Lease(_) if reader.node.is_some() => return Ok(None),
        Fields::ServiceL2Status(status) => {
            let said = k8s::announced_by_metallb(meta, &status.unwrap_or_default(), reader.names);
            return Ok(said.map(|said| Object::Announcement(Announcer::MetalLb, object_key(key), Arc::new(said))));
        }
        Fields::Lease(spec) => {
            let key = object_key(key);
            let said = k8s::announced_by_cilium(&key, &spec.unwrap_or_default(), reader.names);
            return Ok(said.map(|said| Object::Announcement(Announcer::Cilium, key, Arc::new(said))));
        }
        Fields::Networks(spec) => Object::Networks(kind, name, spec.unwrap_or_default().parsed()?),
        Fields::None => {
            let mut labels = meta.labels_and_alike().into_owned();
            labels.entry(NAMESPACE_NAME_LABEL.to_owned()).or_insert_with(|| name.to_string());
            Object::Namespace(name, Box::new(reader.names.labels(&labels)))
        }
        fields => return status_object(reader, key, fields),
    }))
}

pub fn policy_key((namespace, name): &Key) -> PolicyKey {
    PolicyKey { namespace: namespace.clone(), name: name.clone() }
}

pub fn object_key((namespace, name): &Key) -> ObjectKey {
    let namespace = namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.into());
    ObjectKey { namespace, name: name.clone() }
}

/// Parses RFC 3339 to seconds since the Unix epoch.
pub fn parse_time(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(|time| time.as_second())
}

/// The metadata of gateways and policies.
pub fn times(meta: &Metadata) -> Result<model::Metadata, Fault> {
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
    let made = annotation(model::MADE_FROM).is_some();
    Ok(model::Metadata { created, generation: meta.generation, move_to, made, rebalance, end_cooldown })
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
