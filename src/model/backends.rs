//! What a destination is to kube-proxy: an address of a Service is replaced by one of its endpoints' before Egret decides,
//! and where that endpoint is decides then.

use crate::model::target::Target;
use crate::model::{Cluster, Endpoints, ObjectKey, Service, ServicePort};
use std::net::IpAddr;

/// A Service that a destination is an address of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceMatch {
    /// The Service.
    pub service: ObjectKey,
    /// Which of its addresses the destination is.
    pub access: Access,
    /// Where its packets go.
    pub endpoints: Vec<Target>,
}

/// One of the ways to reach a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Its cluster address.
    Cluster,
    /// An external address, or a load balancer's.
    External,
    /// A port of the pod's own node.
    OwnNodePort,
    /// A port of another node.
    OtherNodePort,
}

/// The Service that packets of a pod on `node` to `target` are for.
pub fn service_at(cluster: &Cluster, node: Option<&str>, target: &Target) -> Option<ServiceMatch> {
    cluster.services.iter().find_map(|(key, service)| {
        let (access, port) = access(cluster, service, node, target)?;
        let of_service = cluster.endpoints.values().filter(|endpoints| endpoints.service == *key);
        let same_family = |a: &IpAddr| a.is_ipv4() == target.address.is_ipv4();
        let mut endpoints: Vec<Target> = Vec::new();
        for some in of_service {
            let port = target.port.and_then(|(protocol, _)| Some((protocol, endpoint_port(some, port)?)));
            let all = some.addresses.iter().filter(|a| same_family(a)).map(|a| Target { address: *a, port });
            endpoints.extend(all.filter(|target| !endpoints.contains(target)).collect::<Vec<_>>());
        }
        Some(ServiceMatch { service: key.clone(), access, endpoints })
    })
}

/// Whether packets to `target` may be for the Service, on whichever node.
pub fn may_lead_to(service: &Service, target: &Target) -> bool {
    let exposure = service.exposure.as_deref();
    let is_node_port = |p: &ServicePort| target.port.is_some() && p.node_port == target.port.map(|(_, port)| port);
    service.cluster_ips.contains(&target.address)
        || exposure.is_some_and(|f| f.addresses.contains(&target.address) || f.ports.iter().any(is_node_port))
}

/// How a destination leads to the Service, and to which of its ports.
fn access<'a>(
    cluster: &Cluster,
    service: &'a Service,
    node: Option<&str>,
    target: &Target,
) -> Option<(Access, Option<&'a ServicePort>)> {
    let exposure = service.exposure.as_deref();
    let ports = || exposure.iter().flat_map(|exposure| &exposure.ports);
    let of_target =
        |number: fn(&ServicePort) -> Option<u16>| ports().find(|p| target.port == number(p).map(|n| (p.protocol, n)));
    let port = of_target(|p| Some(p.port));
    // What comes to another port of an address that is not the cluster's is not for the Service.
    let is_one = target.port.is_none() || port.is_some();
    if service.cluster_ips.contains(&target.address) {
        return Some((Access::Cluster, port));
    }
    if is_one && exposure.is_some_and(|exposure| exposure.addresses.contains(&target.address)) {
        return Some((Access::External, port));
    }
    let port = of_target(|p| p.node_port)?;
    let (name, _) = cluster.nodes.iter().find(|(_, node)| node.addresses.contains(&target.address))?;
    Some((if Some(&**name) == node { Access::OwnNodePort } else { Access::OtherNodePort }, Some(port)))
}

/// The endpoints' port for one of the Service's.
fn endpoint_port(endpoints: &Endpoints, port: Option<&ServicePort>) -> Option<u16> {
    let name = &port?.name;
    endpoints.ports.iter().find(|(of, _)| of == name).map(|(_, port)| *port)
}
