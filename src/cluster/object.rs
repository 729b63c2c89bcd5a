//! A valid object of the cluster, as both sources deliver it.

use super::kind::Kind;
use crate::api::{EgressGatewayStatus, EgressPolicyStatus};
use crate::model::egress_node::EgressNode;
use crate::model::selector::{Labels, Name};
use crate::model::shared::Shared;
use crate::model::{Announcement, Announcer, Endpoints, Gateway, Node, ObjectKey, Pod, Policy, PolicyKey, Service};
use ipnetwork::IpNetwork;
use std::sync::Arc;

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
    GatewayStatus(Name, Shared<EgressGatewayStatus>),
    /// A policy's status, from the directory of statuses.
    PolicyStatus(PolicyKey, Arc<EgressPolicyStatus>),
    /// Which node announces a Service's address.
    Announcement(Announcer, ObjectKey, Arc<Announcement>),
    /// Networks inside the cluster: a ServiceCIDR or an IPPool.
    Networks(Kind, Name, Box<[IpNetwork]>),
}

/// An object's namespace, if its kind has any, and name.
pub type Key = (Option<Name>, Name);

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
            Object::Announcement(by, key, _) => (Kind::of_announcer(*by), Some(&key.namespace), &key.name),
            Object::Networks(kind, name, _) => (*kind, None, name),
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
            (Object::GatewayStatus(_, a), Object::GatewayStatus(_, b)) => a == b,
            (Object::PolicyStatus(_, a), Object::PolicyStatus(_, b)) => a == b,
            (Object::Announcement(_, _, a), Object::Announcement(_, _, b)) => a == b,
            (Object::Networks(_, _, a), Object::Networks(_, _, b)) => a == b,
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
