//! What a user names on the command line: a policy, an egress IP, a node.

use crate::cluster::PodsOf;
use crate::model::selector::Name;
use crate::model::{Cluster, Namespaces, ObjectKey, PolicyKey, addresses_of};
use anyhow::bail;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Something that pods belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A policy.
    Policy(PolicyKey),
    /// An egress IP, with the policies that use it.
    EgressIp(IpAddr, Vec<PolicyKey>),
    /// A node.
    Node(Name),
}

impl Subject {
    /// Finds what `text` names: an address, else a policy `namespace/name`, else a node, else a ClusterEgressPolicy,
    /// else a policy of the namespace.
    ///
    /// # Errors
    /// The cluster has nothing of this name.
    pub fn find(cluster: &Cluster, text: &str, namespace: &str) -> anyhow::Result<Self> {
        if let Ok(address) = text.parse() {
            return Self::egress_ip(cluster, address);
        }
        if let Some((namespace, name)) = text.split_once('/') {
            let key = PolicyKey { namespace: Some(namespace.into()), name: name.into() };
            if cluster.policies.contains_key(&key) {
                return Ok(Subject::Policy(key));
            }
            bail!("the cluster has no EgressPolicy {text}; `kubectl get egresspolicies -A` lists them");
        }
        let of_cluster = PolicyKey { namespace: None, name: text.into() };
        let of_namespace = PolicyKey { namespace: Some(namespace.into()), name: text.into() };
        match cluster.nodes.get_key_value(text) {
            Some((name, _)) => Ok(Subject::Node(name.clone())),
            None if cluster.policies.contains_key(&of_cluster) => Ok(Subject::Policy(of_cluster)),
            None if cluster.policies.contains_key(&of_namespace) => Ok(Subject::Policy(of_namespace)),
            None => bail!(
                "{text:?} is no node, no ClusterEgressPolicy and no EgressPolicy of namespace {namespace:?}; write an \
                 egress IP, a node, or a policy as NAMESPACE/NAME"
            ),
        }
    }

    fn egress_ip(cluster: &Cluster, address: IpAddr) -> anyhow::Result<Self> {
        let allocations = cluster.allocations().filter(|a| addresses_of(&a.address).any(|of| of == address));
        let policies: BTreeSet<PolicyKey> = allocations.flat_map(|a| a.policies.iter().cloned()).collect();
        if policies.is_empty() {
            bail!("{address} is the egress IP of no policy; `kubectl egret ip {address}` tells what it is");
        }
        Ok(Subject::EgressIp(address, policies.into_iter().collect()))
    }

    /// The pods that have to be read.
    pub fn pods(&self, cluster: &Cluster) -> PodsOf {
        match self {
            Subject::Node(name) => PodsOf::Node(name.to_string()),
            Subject::Policy(key) => of_policies(cluster, std::slice::from_ref(key)),
            Subject::EgressIp(_, policies) => of_policies(cluster, policies),
        }
    }

    /// The policies that it names; `None`: a node.
    pub fn policies(&self) -> Option<&[PolicyKey]> {
        match self {
            Subject::Policy(key) => Some(std::slice::from_ref(key)),
            Subject::EgressIp(_, policies) => Some(policies),
            Subject::Node(_) => None,
        }
    }
}

/// The pods that policies can select.
pub fn of_policies(cluster: &Cluster, policies: &[PolicyKey]) -> PodsOf {
    let mut namespaces: BTreeSet<&str> = BTreeSet::new();
    for key in policies {
        match cluster.policies.get(key).map(|policy| &policy.namespaces) {
            Some(Namespaces::One(name)) => drop(namespaces.insert(name)),
            Some(Namespaces::Selected(_)) => return PodsOf::All,
            None => {}
        }
    }
    match namespaces.iter().next() {
        None => PodsOf::Nobody,
        Some(only) if namespaces.len() == 1 => PodsOf::Namespace((*only).to_owned()),
        Some(_) => PodsOf::All,
    }
}

/// A pod as a user names it: `NAMESPACE/NAME`, or `NAME` in the namespace.
pub fn pod(text: &str, namespace: &str) -> ObjectKey {
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    ObjectKey::new(namespace, name)
}
