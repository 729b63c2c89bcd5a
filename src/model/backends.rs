//! Services as destinations. kube-proxy replaces a Service's address by an endpoint's before Egret decides, so the
//! endpoint's address is the one that counts.

use crate::model::target::Target;
use crate::model::{Cluster, Endpoints, ObjectKey, Service, ServicePort};
use std::net::IpAddr;

/// The Service that a destination belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceMatch {
    /// The Service.
    pub service: ObjectKey,
    /// The kind of address that the destination is.
    pub access: Access,
    /// The endpoints that its packets are sent to.
    pub endpoints: Vec<Target>,
}

/// The kind of address at which a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `spec.clusterIPs`.
    Cluster,
    /// `spec.externalIPs`, or a load balancer's address.
    External,
    /// A node port at the pod's own node.
    OwnNodePort,
    /// A node port at another node.
    OtherNodePort,
}

/// The Service that receives packets that a pod on `node` sends to `target`.
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

/// The kind of address that a destination is of the Service, and the port.
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
    // An address that is not the cluster's may have other ports, which do not belong to the Service.
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

/// The endpoints' number for a port of the Service.
fn endpoint_port(endpoints: &Endpoints, port: Option<&ServicePort>) -> Option<u16> {
    let name = &port?.name;
    endpoints.ports.iter().find(|(of, _)| of == name).map(|(_, port)| *port)
}
