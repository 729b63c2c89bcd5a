//! Services whose addresses are egress IPs: the addresses, and the nodes that announce them.
//!
//! A tenant decides which Service his policy names, and that is one of his own namespace. Which address the Service has
//! is written by its load balancer, into `status.loadBalancer`. `spec.externalIPs` and `spec.loadBalancerIP` do not
//! count: who may write the Service writes them, too.

use super::address_pair::{in_words, pair};
use super::cooldown::{COOLDOWN_SECONDS, Cooldowns};
use super::decision::{Reason, Rejection};
use super::index::PolicyIndex;
use crate::api::{AddressPair, Placement, Sharing};
use crate::model::condition::time;
use crate::model::selector::Name;
use crate::model::{
    Announcement, Announcer, Cluster, END_COOLDOWN, Gateway, LoadBalancer, Namespaces, ObjectKey, addresses_of,
};
use std::collections::HashMap;
use std::net::IpAddr;

/// The addresses of a Service of type LoadBalancer.
///
/// # Errors
/// There is no such Service, or it has no address.
pub(super) fn addresses<'a>(cluster: &'a Cluster, service: &ObjectKey) -> Result<&'a [IpAddr], Rejection> {
    let found = cluster.services.get(service).ok_or_else(|| {
        let message = format!("there is no Service {service}; create it, or name another one in spec.address.service");
        Rejection::new(Reason::ServiceUnknown, message)
    })?;
    match found.load_balancer.as_deref() {
        Some(LoadBalancer { addresses, .. }) if !addresses.is_empty() => Ok(addresses),
        _ => {
            let message = format!(
                "Service {service} has no address of a load balancer; give it the type LoadBalancer, or see why nothing \
                 writes an IP address into its status.loadBalancer"
            );
            Err(Rejection::new(Reason::ServiceWithoutAddress, message))
        }
    }
}

/// Whether the gateway can have the Service's address as an egress IP: something else places its addresses, and one of
/// these is in its pool.
pub(super) fn can_have(gateway: &Gateway, addresses: &[IpAddr]) -> bool {
    gateway.placement == Placement::External && addresses.iter().any(|address| is_in_pool(gateway, *address))
}

fn is_in_pool(gateway: &Gateway, address: IpAddr) -> bool {
    gateway.pool.iter().any(|range| range.contains(address))
}

/// The egress IP of a policy that names a Service: the Service's first address of each family that is in the gateway's
/// pool.
///
/// # Errors
/// The Service has no such address, or the gateway places its addresses itself.
pub(super) fn egress_ip(
    cluster: &Cluster,
    (name, gateway): (&Name, &Gateway),
    service: &ObjectKey,
) -> Result<AddressPair, Rejection> {
    let all = addresses(cluster, service)?;
    // A gateway that cannot be read may be of either kind.
    if gateway.placement != Placement::External && !gateway.frozen {
        let message = format!(
            "EgressGateway {name:?} places its addresses itself, and the address of Service {service} is announced by \
             something else; name a gateway with placement: External"
        );
        return Err(Rejection::new(Reason::GatewayNotExternal, message));
    }
    let found = pair(all.iter().copied().filter(|address| is_in_pool(gateway, *address)));
    if found.is_empty() {
        let message = format!(
            "{}, of Service {service}, is not in the pool of EgressGateway {name:?}; add it to the gateway's \
             spec.addresses, or name another gateway",
            in_words(&pair(all.iter().copied()))
        );
        return Err(Rejection::new(Reason::AddressOutsidePool, message));
    }
    Ok(found)
}

/// The rejection of a policy that names a Service and no gateway, if no gateway can have the Service's address.
pub(super) fn no_gateway(service: &ObjectKey, addresses: &[IpAddr]) -> Rejection {
    let message = format!(
        "no EgressGateway with placement: External has {}, of Service {service}, in its pool; add it to the \
         spec.addresses of one",
        in_words(&pair(addresses.iter().copied()))
    );
    Rejection::new(Reason::AddressOutsidePool, message)
}

/// The Services that have each address.
#[derive(Clone, Debug, Default)]
pub(super) struct ServicesByAddress<'a>(HashMap<IpAddr, Vec<&'a ObjectKey>>);

impl<'a> ServicesByAddress<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        let mut by_address: HashMap<IpAddr, Vec<&ObjectKey>> = HashMap::new();
        for (service, known) in &cluster.services {
            for address in known.load_balancer.iter().flat_map(|known| &known.addresses) {
                by_address.entry(*address).or_default().push(service);
            }
        }
        ServicesByAddress(by_address)
    }

    /// Checks that no policy gets an address, by naming it, that a Service of another namespace has. An allocation that
    /// exists stays: who may choose the address of a Service must not take an egress IP away by it.
    pub(super) fn check_foreign(
        &self,
        gateway: &Gateway,
        namespaces: &Namespaces,
        named: &AddressPair,
    ) -> Result<(), Rejection> {
        let Some(own) = confined(gateway, namespaces) else { return Ok(()) };
        let of_others = addresses_of(named).flat_map(|address| {
            let services = self.0.get(&address).into_iter().flatten();
            services.filter(|service| service.namespace != *own).map(move |service| (*service, address))
        });
        match of_others.min() {
            None => Ok(()),
            Some((service, address)) => {
                let message = format!(
                    "{address} is the address of Service {service}, and policies of other namespaces may not name it; \
                     name another address, or have sharing: Cluster set in the gateway"
                );
                Err(Rejection::new(Reason::AddressOfService, message))
            }
        }
    }
}

/// The namespace whose Services' addresses alone a policy may name; `None`: it may name all.
fn confined<'n>(gateway: &Gateway, namespaces: &'n Namespaces) -> Option<&'n Name> {
    match namespaces {
        Namespaces::One(own) if gateway.placement == Placement::External && gateway.sharing != Sharing::Cluster => {
            Some(own)
        }
        _ => None,
    }
}

/// Checks that no policy gets an address, by naming it, that was the egress IP of another namespace's policy as the
/// address of a Service. The Service has none for a moment, and gets it again.
pub(super) fn check_former(
    cooldowns: &Cooldowns,
    (gateway, namespaces): (&Gateway, &Namespaces),
    policies: &[PolicyIndex],
    named: &AddressPair,
) -> Result<(), Rejection> {
    let Some(own) = confined(gateway, namespaces) else { return Ok(()) };
    for address in addresses_of(named) {
        let Some(entry) = cooldowns.of_service(address, policies) else { continue };
        let Some(service) = entry.service.as_deref().filter(|service| !of_namespace(service, own)) else { continue };
        let (at, until) = (time(entry.at), time(entry.at + COOLDOWN_SECONDS));
        let message = format!(
            "{address} was the address of Service {service} until {at}, and policies of other namespaces may not name it \
             before {until}; name another address, or annotate the gateway with {END_COOLDOWN}={at}"
        );
        return Err(Rejection::new(Reason::AddressOfService, message));
    }
    Ok(())
}

/// Whether a Service, `namespace/name`, is of this namespace.
fn of_namespace(service: &str, namespace: &Name) -> bool {
    service.split_once('/').is_some_and(|(of, _)| *of == **namespace)
}

/// The nodes that announce Services' addresses, as load balancers say.
pub(super) struct Announcements<'a> {
    cluster: &'a Cluster,
    /// MetalLB's by `namespace/name`, Cilium's by `namespace-name`.
    by_service: HashMap<(Announcer, &'a str), Vec<&'a Announcement>>,
}

impl<'a> Announcements<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        let mut by_service: HashMap<(Announcer, &str), Vec<&Announcement>> = HashMap::new();
        for ((by, _), announcement) in &cluster.announcements {
            by_service.entry((*by, &announcement.service)).or_default().push(announcement);
        }
        Announcements { cluster, by_service }
    }

    /// The node that announces the Service's address, as far as its load balancer says so. kube-vip's word counts
    /// first, then MetalLB's, then Cilium's. A node that died leaves its ServiceL2Status behind, so of several those of
    /// nodes that live count, and of these the newest.
    pub(super) fn node_of(&self, service: &ObjectKey, lives: impl Fn(&Name) -> bool) -> Option<&'a Name> {
        let known = self.cluster.services.get(service).and_then(|service| service.load_balancer.as_deref());
        let said = |by, service: &str| {
            let all = self.by_service.get(&(by, service)).into_iter().flatten();
            all.max_by_key(|said| (lives(&said.node), said.created)).map(|said| &said.node)
        };
        known
            .and_then(|known| known.vip_host.as_ref())
            .or_else(|| said(Announcer::MetalLb, &service.to_string()))
            .or_else(|| said(Announcer::Cilium, &format!("{}-{}", service.namespace, service.name)))
    }
}
