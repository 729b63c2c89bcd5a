//! The validated object that a manifest becomes.

use crate::api::{EgressGatewayStatus, EgressPolicyStatus, GROUP, VERSION};
use crate::model::egress_node::EgressNode;
use crate::model::selector::{Labels, Name};
use crate::model::{Endpoints, Gateway, Node, ObjectKey, Pod, Policy, PolicyKey, Service};
use std::fmt;
use std::sync::Arc;

/// The kinds that Egret reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1`.
    Namespace,
    /// `v1`.
    Node,
    /// `v1`.
    Pod,
    /// `v1`.
    Service,
    /// `v1`.
    Endpoints,
    /// `discovery.k8s.io`.
    EndpointSlice,
    /// `egret.dev`.
    EgressGateway,
    /// `egret.dev`.
    EgressPolicy,
    /// `egret.dev`.
    ClusterEgressPolicy,
    /// `egret.dev`.
    EgressNode,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Kind {
    /// The kind that `apiVersion` and `kind` name; `None` if Egret does not use it.
    ///
    /// # Errors
    /// Egret's group has no such kind or version; the text names it.
    pub fn of(api_version: &str, kind: &str) -> Result<Option<Kind>, String> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        Ok(Some(match (group, kind) {
            ("", "Namespace") => Kind::Namespace,
            ("", "Node") => Kind::Node,
            ("", "Pod") => Kind::Pod,
            ("", "Service") => Kind::Service,
            ("", "Endpoints") => Kind::Endpoints,
            ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
            (GROUP, _) if version != VERSION => {
                return Err(format!("apiVersion {api_version:?} is unknown here; write {GROUP}/{VERSION}"));
            }
            (GROUP, "EgressGateway") => Kind::EgressGateway,
            (GROUP, "EgressPolicy") => Kind::EgressPolicy,
            (GROUP, "ClusterEgressPolicy") => Kind::ClusterEgressPolicy,
            (GROUP, "EgressNode") => Kind::EgressNode,
            (GROUP, _) => {
                return Err(format!(
                    "kind {kind:?} is unknown in {GROUP}; write EgressGateway, EgressPolicy, ClusterEgressPolicy or \
                     EgressNode"
                ));
            }
            _ => return Ok(None),
        }))
    }

    /// Whether objects of this kind are namespaced.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Kind::Pod | Kind::Service | Kind::Endpoints | Kind::EndpointSlice | Kind::EgressPolicy)
    }

    /// Whether the kind is Egret's own: then unknown fields are errors.
    pub fn is_ours(self) -> bool {
        matches!(self, Kind::EgressGateway | Kind::EgressPolicy | Kind::ClusterEgressPolicy | Kind::EgressNode)
    }
}

/// A validated object. There are tens of thousands, so it is kept small.
#[derive(Clone, Debug)]
pub enum Object {
    Namespace(Name, Box<Labels>),
    Node(Name, Arc<Node>),
    Pod(ObjectKey, Arc<Pod>),
    Service(ObjectKey, Arc<Service>),
    Endpoints(ObjectKey, Arc<Endpoints>),
    EndpointSlice(ObjectKey, Arc<Endpoints>),
    Gateway(Name, Arc<Gateway>),
    /// An EgressPolicy or ClusterEgressPolicy.
    Policy(PolicyKey, Arc<Policy>),
    EgressNode(Name, Arc<EgressNode>),
    /// A gateway's status, from the directory of statuses.
    GatewayStatus(Name, Box<GatewayStatus>),
    /// A policy's status, from the directory of statuses.
    PolicyStatus(PolicyKey, Arc<EgressPolicyStatus>),
}

/// A gateway's status. It is large, so it is stored once: in the snapshot, as soon as there is one.
#[derive(Clone, Debug)]
pub enum GatewayStatus {
    /// Read, and not yet in a snapshot.
    Read(EgressGatewayStatus),
    /// In a snapshot.
    Merged {
        /// The gateway without the status.
        spec: Arc<Gateway>,
        /// The gateway with the status.
        whole: Arc<Gateway>,
    },
}

impl GatewayStatus {
    /// The status, in either case.
    pub fn status(&self) -> &EgressGatewayStatus {
        match self {
            GatewayStatus::Read(status) => status,
            GatewayStatus::Merged { whole, .. } => &whole.status,
        }
    }

    /// The gateway `spec` with this status.
    pub fn merge(&mut self, spec: &Arc<Gateway>) -> Arc<Gateway> {
        let status = match self {
            GatewayStatus::Merged { spec: before, whole } if Arc::ptr_eq(before, spec) => return whole.clone(),
            GatewayStatus::Merged { whole, .. } => whole.status.clone(),
            GatewayStatus::Read(status) => std::mem::take(status),
        };
        let whole = Arc::new(Gateway { status, ..Gateway::clone(spec) });
        *self = GatewayStatus::Merged { spec: spec.clone(), whole: whole.clone() };
        whole
    }
}

/// An object's kind, namespace and name. A status has those of its object.
pub type Identity<'a> = (Kind, Option<&'a str>, &'a str);

impl Object {
    /// The object's kind, namespace and name.
    pub fn identity(&self) -> Identity<'_> {
        match self {
            Object::Namespace(name, _) => (Kind::Namespace, None, name),
            Object::Node(name, _) => (Kind::Node, None, name),
            Object::Pod(key, _) => (Kind::Pod, Some(&key.namespace), &key.name),
            Object::Service(key, _) => (Kind::Service, Some(&key.namespace), &key.name),
            Object::Endpoints(key, _) => (Kind::Endpoints, Some(&key.namespace), &key.name),
            Object::EndpointSlice(key, _) => (Kind::EndpointSlice, Some(&key.namespace), &key.name),
            Object::Gateway(name, _) | Object::GatewayStatus(name, _) => (Kind::EgressGateway, None, name),
            Object::Policy(key, _) | Object::PolicyStatus(key, _) => match &key.namespace {
                Some(namespace) => (Kind::EgressPolicy, Some(namespace), &key.name),
                None => (Kind::ClusterEgressPolicy, None, &key.name),
            },
            Object::EgressNode(name, _) => (Kind::EgressNode, None, name),
        }
    }

    /// Whether the contents are equal. Both objects have the same identity.
    pub fn has_same_contents(&self, other: &Object) -> bool {
        match (self, other) {
            (Object::Namespace(_, a), Object::Namespace(_, b)) => a == b,
            (Object::Node(_, a), Object::Node(_, b)) => a == b,
            (Object::Pod(_, a), Object::Pod(_, b)) => a == b,
            (Object::Service(_, a), Object::Service(_, b)) => a == b,
            (Object::Endpoints(_, a), Object::Endpoints(_, b)) => a == b,
            (Object::EndpointSlice(_, a), Object::EndpointSlice(_, b)) => a == b,
            (Object::Gateway(_, a), Object::Gateway(_, b)) => a == b,
            (Object::Policy(_, a), Object::Policy(_, b)) => a == b,
            (Object::EgressNode(_, a), Object::EgressNode(_, b)) => a == b,
            (Object::GatewayStatus(_, a), Object::GatewayStatus(_, b)) => a.status() == b.status(),
            (Object::PolicyStatus(_, a), Object::PolicyStatus(_, b)) => a == b,
            _ => false,
        }
    }
}

/// `Kind/name` or `Kind/namespace/name`, for error texts.
pub fn label((kind, namespace, name): Identity<'_>) -> String {
    match namespace {
        Some(namespace) => format!("{kind}/{namespace}/{name}"),
        None => format!("{kind}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::Object;

    #[test]
    fn objects_are_small() {
        assert!(size_of::<(u32, Object)>() <= 40);
    }
}
