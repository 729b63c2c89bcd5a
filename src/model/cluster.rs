//! A snapshot of everything in the cluster that Egret uses.

use super::egress_node::EgressNode;
use super::selector::{Labels, Name};
use super::shared::Shared;
use super::{Announcement, Announcer, Endpoints, Gateway, Node, Pod, Policy, Service};
use crate::api::{Allocation, EgressPolicyStatus, PolicyKey};
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// One state of the cluster. A new snapshot shares with the previous one every kind of object that has not changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Nodes by name.
    pub nodes: Shared<BTreeMap<Name, Arc<Node>>>,
    /// Labels of namespaces by name. It lacks a namespace that only other objects mention.
    pub namespaces: Shared<BTreeMap<Name, Labels>>,
    /// Pods. A node daemon has those of its own node only.
    pub pods: Shared<BTreeMap<ObjectKey, Arc<Pod>>>,
    /// Services.
    pub services: Shared<BTreeMap<ObjectKey, Arc<Service>>>,
    /// Which nodes announce Services' addresses, by the objects that say so. Empty in node daemons.
    pub announcements: Shared<BTreeMap<(Announcer, ObjectKey), Arc<Announcement>>>,
    /// Endpoints, by the objects that list them. A node daemon has those of the API servers only.
    pub endpoints: Shared<BTreeMap<ObjectKey, Arc<Endpoints>>>,
    /// Gateways by name, with their allocations.
    pub gateways: Shared<BTreeMap<Name, Arc<Gateway>>>,
    /// Policies of both kinds.
    pub policies: Shared<BTreeMap<PolicyKey, Arc<Policy>>>,
    /// The statuses that node daemons write.
    pub egress_nodes: Shared<BTreeMap<Name, Arc<EgressNode>>>,
    /// The statuses of policies as they stand in the source, which a controller wrote. Empty in node daemons.
    pub policy_statuses: Shared<BTreeMap<PolicyKey, Arc<EgressPolicyStatus>>>,
    /// Policies that are invalid as they stand in the source; `policies` may have the last valid state of one. Empty in
    /// node daemons.
    pub unreadable: Shared<BTreeMap<PolicyKey, Arc<Unreadable>>>,
    /// Networks inside the cluster that neither Nodes nor Services list.
    pub inside: Shared<Inside>,
}

impl Cluster {
    /// The allocations of all gateways.
    pub fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.gateways.values().flat_map(|gateway| &gateway.status.allocations)
    }

    /// The API servers' addresses: the endpoints of the Service `default/kubernetes`, which the API servers keep.
    pub fn api_servers(&self) -> impl Iterator<Item = IpAddr> {
        let of_api = self.endpoints.values().filter(|endpoints| endpoints.are_of_api());
        of_api.flat_map(|endpoints| endpoints.addresses.iter().copied())
    }
}

/// An invalid policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// What is invalid, and the remedy.
    pub message: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
}

/// Networks of the cluster, each with the name of the object that lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Networks of pods.
    pub pods: BTreeMap<IpNetwork, Name>,
    /// Networks of Services.
    pub services: BTreeMap<IpNetwork, Name>,
}

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// `metadata.namespace`.
    pub namespace: Name,
    /// `metadata.name`.
    pub name: Name,
}

impl ObjectKey {
    /// The key of the object `namespace/name`.
    pub fn new(namespace: &str, name: &str) -> Self {
        ObjectKey { namespace: namespace.into(), name: name.into() }
    }

    /// The key that `text` writes as `namespace/name`.
    pub fn parse(text: &str) -> Option<Self> {
        text.split_once('/').map(|(namespace, name)| ObjectKey::new(namespace, name))
    }

    /// Whether `text` is this key as `namespace/name`.
    pub fn is(&self, text: &str) -> bool {
        text.split_once('/') == Some((&*self.namespace, &*self.name))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
