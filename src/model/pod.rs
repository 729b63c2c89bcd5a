//! Kubernetes Pods.

use super::ObjectKey;
use super::selector::{Labels, Name};
use std::net::IpAddr;

/// What policies know of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// `metadata.namespace`.
    pub namespace: &'a str,
    /// `metadata.name`.
    pub name: &'a str,
    /// `metadata.uid`, empty where neither the cluster nor the runtime gives one.
    pub uid: &'a str,
    /// `metadata.labels`; `None`: the cluster does not know the pod yet.
    pub labels: Option<&'a Labels>,
}

impl<'a> Client<'a> {
    /// A pod of the cluster.
    pub fn of(key: &'a ObjectKey, pod: &'a Pod) -> Self {
        Client { namespace: &key.namespace, name: &key.name, uid: &pod.uid, labels: Some(&pod.labels) }
    }
}

/// A Kubernetes Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`, empty where the source gives none.
    pub uid: Box<str>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `spec.nodeName`.
    pub node: Option<Name>,
    /// `status.podIPs`; empty until the pod has been set up.
    pub addresses: Box<[IpAddr]>,
    /// Whether the pod shares the node's network. No policy selects such a pod.
    pub host_network: bool,
    /// Whether the phase is Succeeded or Failed. Another pod may have the address already.
    pub finished: bool,
}
