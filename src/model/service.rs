//! Kubernetes Services and their endpoints.

use super::ObjectKey;
use super::selector::{Name, Selector};
use crate::api::Protocol;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// A Kubernetes Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// `spec.selector`. A Service without one (`None`) selects no pod.
    pub selector: Option<Selector>,
    /// `spec.clusterIPs`, without `None`.
    pub cluster_ips: Box<[IpAddr]>,
    /// Other addresses, and the ports. `None` in node daemons.
    pub exposure: Option<Box<Exposure>>,
    /// Its load balancer's addresses. `None` without any, and in node daemons.
    pub load_balancer: Option<Box<LoadBalancer>>,
}

/// What load balancers have written about a Service of type LoadBalancer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancer {
    /// The addresses in `status.loadBalancer.ingress`, in their order.
    pub addresses: Box<[IpAddr]>,
    /// The annotation [`VIP_HOST`]: the node that announces them, as kube-vip says.
    pub vip_host: Option<Name>,
    /// What its annotations for kube-vip ask for, if they ask for egress.
    pub egress: Option<Box<AskedEgress>>,
}

/// What a Service's annotations for kube-vip ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskedEgress {
    /// The annotations that decide ([`kube_vip::ANNOTATIONS`](super::kube_vip::ANNOTATIONS)).
    pub annotations: BTreeMap<String, String>,
    /// `metadata.uid` of the Service; empty if unknown.
    pub uid: Box<str>,
}

/// kube-vip's annotation of a Service with the node that announces its address.
pub const VIP_HOST: &str = "kube-vip.io/vipHost";

/// What a load balancer says about the node that announces a Service's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// MetalLB: the Service, `namespace/name`. Cilium: `namespace-name`, as its Lease is called.
    pub service: Name,
    /// The node.
    pub node: Name,
    /// When the object was created, seconds since the Unix epoch; 0 if unknown.
    pub created: i64,
}

/// Who says which node announces a Service's address. The first variant counts more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Announcer {
    /// MetalLB in layer 2 mode, by a ServiceL2Status.
    MetalLb,
    /// Cilium's layer 2 announcements, by a Lease.
    Cilium,
}

/// The addresses that a Service has besides its cluster addresses, and its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// `spec.externalIPs`, and the addresses in `status.loadBalancer`.
    pub addresses: Box<[IpAddr]>,
    /// `spec.ports`.
    pub ports: Box<[ServicePort]>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name that endpoints refer to. The only port of a Service may have an empty one.
    pub name: Box<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port at the Service's addresses.
    pub port: u16,
    /// The port at every node's addresses.
    pub node_port: Option<u16>,
}

/// Some of a Service's endpoints: an EndpointSlice, or an Endpoints object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The Service that they belong to.
    pub service: ObjectKey,
    /// The addresses that packets to the Service go to.
    pub addresses: Box<[IpAddr]>,
    /// Port numbers by the names of the Service's ports.
    pub ports: Box<[(Box<str>, u16)]>,
}

impl Endpoints {
    /// Whether these endpoints are the API servers.
    pub fn are_of_api(&self) -> bool {
        (&*self.service.namespace, &*self.service.name) == ("default", "kubernetes")
    }
}
