//! Explains what happens to a pod's packets to one destination: inside the cluster, a Service, or outside.

use super::decision::decided;
use crate::model::backends::{Access, ServiceMatch, service_at};
use crate::model::destination::comma_separated;
use crate::model::networks::Networks;
use crate::model::precedence::Ranked;
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey, Pod};
use ipnetwork::IpNetwork;

/// What happens to a pod's packets to one destination.
pub(super) fn explain(
    cluster: &Cluster,
    named: (&ObjectKey, &Pod),
    policies: &[&Ranked],
    target: Target,
    direct: &[IpNetwork],
) -> Vec<String> {
    let (_, pod) = named;
    // The pod's node does the same: it knows the addresses of its own pods, and the networks of the others.
    let neighbours = cluster.pods.values().filter(|other| other.node == pod.node);
    let networks = Networks::new(cluster, direct, neighbours.flat_map(|pod| pod.addresses.iter().copied()));
    match service_at(cluster, pod.node.as_deref(), &target) {
        Some(service) => explain_service(cluster, named, policies, target, &networks, &service),
        None if networks.is_direct(target.address) => vec![goes_direct(cluster, &networks, target)],
        None => decided(cluster, named, policies, target),
    }
}

/// Why a destination is direct.
fn goes_direct(cluster: &Cluster, networks: &Networks, target: Target) -> String {
    let origin = networks.origins.iter().find(|(network, _)| network.contains(target.address));
    let origin = match origin {
        Some((network, of)) => format!("in {network}, from {of}"),
        None if cluster.api_servers().any(|address| address == target.address) => {
            "an API server's address, an endpoint of the Service default/kubernetes".to_owned()
        }
        None => "an address of a node, a Service or a pod, or link-local or multicast".to_owned(),
    };
    format!("{target} goes direct: it is {origin}, and no policy covers traffic inside the cluster.")
}

/// What happens to packets to an address of a Service.
fn explain_service(
    cluster: &Cluster,
    pod: (&ObjectKey, &Pod),
    policies: &[&Ranked],
    target: Target,
    networks: &Networks,
    ServiceMatch { service, access, endpoints }: &ServiceMatch,
) -> Vec<String> {
    let outside: Vec<Target> = endpoints.iter().filter(|e| !networks.is_direct(e.address)).copied().collect();
    let mut lines = Vec::new();
    match access {
        Access::OtherNodePort => {
            let node = "that node's kube-proxy sends it on, and endpoints outside the cluster see that node's address";
            return vec![format!(
                "{target} goes direct: it is a port of the Service {service} at another node; {node}."
            )];
        }
        // The address of the Service itself decides where kube-proxy does not replace it.
        _ if networks.is_direct(target.address) && outside.is_empty() => {
            lines.push(goes_direct(cluster, networks, target));
            let known = match endpoints.as_slice() {
                [] => "which has no known endpoints".to_owned(),
                _ => format!("whose endpoints are inside the cluster: {}", few(endpoints)),
            };
            lines.push(format!("It is an address of the Service {service}, {known}."));
        }
        _ if endpoints.is_empty() => {
            lines.push(format!("It is an address of the Service {service}, which has no known endpoints."));
            lines.extend(decided(cluster, pod, policies, target));
        }
        _ => {
            lines.push(format!(
                "{target} is an address of the Service {service}. kube-proxy replaces it by an endpoint's address \
                 before policies decide (except in mode IPVS: there it goes direct, see docs/limits.md):"
            ));
            let inside: Vec<Target> = endpoints.iter().filter(|e| !outside.contains(e)).copied().collect();
            if !inside.is_empty() {
                lines.push(format!("{} goes direct: inside the cluster.", few(&inside)));
            }
            for endpoint in outside.iter().take(FEW) {
                lines.extend(decided(cluster, pod, policies, *endpoint));
            }
            if outside.len() > FEW {
                lines.push(format!("and {} more endpoints outside the cluster", outside.len() - FEW));
            }
        }
    }
    lines
}

/// How many endpoints of a Service are listed.
const FEW: usize = 8;

fn few(endpoints: &[Target]) -> String {
    let more = endpoints.len().saturating_sub(FEW);
    let shown: Vec<String> = endpoints.iter().take(FEW).map(|e| e.address.to_string()).collect();
    comma_separated(&shown) + &if more > 0 { format!(" and {more} more") } else { String::new() }
}
