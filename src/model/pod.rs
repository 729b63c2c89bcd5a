//! Kubernetes Pods.

use super::selector::{Labels, Name};
use std::net::IpAddr;

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
