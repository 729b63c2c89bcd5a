//! The kinds of objects that Egret reads.

use crate::api::{GROUP, PolicyKey, VERSION};
use crate::model::Announcer;
use std::fmt;

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
    /// `networking.k8s.io`, from Kubernetes 1.33 on.
    ServiceCidr,
    /// Calico's, where it is installed.
    IpPool,
    /// Cilium's, where it is installed: with its own pools, Nodes do not list their pods' networks, or other ones.
    CiliumNode,
    /// MetalLB's: the node that announces a Service's address.
    ServiceL2Status,
    /// `coordination.k8s.io`: Cilium has one for each Service whose address it announces.
    Lease,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Kind {
    /// The kinds that the store distinguishes: it holds Endpoints as EndpointSlices.
    pub const STORED: [Kind; 14] = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::EgressGateway,
        Kind::EgressPolicy,
        Kind::ClusterEgressPolicy,
        Kind::EgressNode,
        Kind::ServiceCidr,
        Kind::IpPool,
        Kind::CiliumNode,
        Kind::ServiceL2Status,
        Kind::Lease,
    ];

    /// The kinds that say which nodes announce Services' addresses.
    pub const ANNOUNCEMENTS: [Kind; 2] = [Kind::ServiceL2Status, Kind::Lease];

    /// The kind of a policy.
    pub fn of_policy(key: &PolicyKey) -> Kind {
        if key.namespace.is_some() { Kind::EgressPolicy } else { Kind::ClusterEgressPolicy }
    }

    /// The kind of the objects by which an announcer says what it announces.
    pub fn of_announcer(announcer: Announcer) -> Kind {
        match announcer {
            Announcer::MetalLb => Kind::ServiceL2Status,
            Announcer::Cilium => Kind::Lease,
        }
    }

    /// Who says by objects of this kind what it announces.
    pub fn announcer(self) -> Option<Announcer> {
        [Announcer::MetalLb, Announcer::Cilium].into_iter().find(|announcer| Kind::of_announcer(*announcer) == self)
    }

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
            ("metallb.io", "ServiceL2Status") => Kind::ServiceL2Status,
            ("coordination.k8s.io", "Lease") => Kind::Lease,
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
        matches!(
            self,
            Kind::Pod
                | Kind::Service
                | Kind::Endpoints
                | Kind::EndpointSlice
                | Kind::EgressPolicy
                | Kind::ServiceL2Status
                | Kind::Lease
        )
    }

    /// Whether the kind is Egret's own: then unknown fields are errors.
    pub fn is_ours(self) -> bool {
        matches!(self, Kind::EgressGateway | Kind::EgressPolicy | Kind::ClusterEgressPolicy | Kind::EgressNode)
    }
}
