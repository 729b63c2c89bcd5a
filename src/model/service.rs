//! Kubernetes Services and their endpoints.

use super::ObjectKey;
use super::selector::Selector;
use crate::api::Protocol;
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
