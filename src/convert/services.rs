//! The addresses of Services of type LoadBalancer, which some systems use as egress IPs.

use super::field::Invalid;
use super::input::Object;
use std::net::IpAddr;

/// Annotations that name a Service's addresses, separated by commas: kube-vip's, and MetalLB's by its two names.
const ANNOTATIONS: [&str; 3] =
    ["kube-vip.io/loadbalancerIPs", "metallb.io/loadBalancerIPs", "metallb.universe.tf/loadBalancerIPs"];

/// The addresses of a Service: those that it has, otherwise those that it asks for. An unspecified address asks for one
/// by DHCP, and names none.
pub(super) fn addresses(service: &Object) -> Result<Vec<IpAddr>, Invalid> {
    let mut found = Vec::new();
    for item in service.field("status.loadBalancer.ingress").list()? {
        found.extend(item.at("ip").address()?);
    }
    for key in ANNOTATIONS {
        if !found.is_empty() {
            break;
        }
        let field = service.annotation_field(key);
        for part in field.text()?.unwrap_or_default().split(',').filter(|part| !part.trim().is_empty()) {
            found.push(field.parse_address(part)?);
        }
    }
    if found.is_empty() {
        found.extend(service.field("spec.loadBalancerIP").address()?);
    }
    found.retain(|address| !address.is_unspecified());
    Ok(found)
}
