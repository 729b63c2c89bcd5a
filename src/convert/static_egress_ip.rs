//! kube-static-egress-ip: `StaticEgressIP`, a list of rules with a Service, a destination and an egress IP.

use super::draft::{Draft, GATEWAY_LABEL, GatewayDraft, PolicyDraft, labels, pair_of};
use super::field::Invalid;
use super::input::Object;
use crate::api::AddressPair;
use crate::model::addresses_of;
use crate::model::blocks::covered;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// The group of the CustomResourceDefinition, and the one that the project's first documents name.
pub(super) const GROUPS: [&str; 2] = ["staticegressips.nirmata.io", "staticegressips.io"];
const GATEWAY: &str = "static-egress-ip";

/// The rules of one object that have the same Service and egress IP: an address, or one of each family, because an IPv4
/// destination needs the one and an IPv6 destination the other.
struct Group<'a> {
    service: &'a str,
    address: AddressPair,
    networks: Vec<IpNetwork>,
}

impl Group<'_> {
    /// Adds an address. `false`: the group has another one of its family.
    fn takes(&mut self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(new) => *self.address.ipv4.get_or_insert(new) == new,
            IpAddr::V6(new) => *self.address.ipv6.get_or_insert(new) == new,
        }
    }
}

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut gateway = GatewayDraft::new(GATEWAY, labels([(GATEWAY_LABEL, "true")]));
    let mut draft = Draft::default();
    for object in objects.iter().filter(|o| GROUPS.contains(&o.group()) && o.kind() == "StaticEgressIP") {
        let groups = groups(object)?;
        for group in &groups {
            addresses_of(&group.address).for_each(|address| gateway.add_addresses(&address.to_string()));
            let name = match groups.as_slice() {
                [_] => object.name().to_owned(),
                _ => format!("{}-{}", object.name(), group.service),
            };
            let mut policy = PolicyDraft::namespaced(object, &name);
            policy.notes.unknown(&object.field("spec"), &["rules"])?;
            policy.spec.gateway = Some(GATEWAY.to_owned());
            policy.spec.services = vec![group.service.to_owned()];
            policy.set_address(group.address.clone());
            policy.set_covered(covered(&group.networks, &[], &[]))?;
            draft.policies.push(policy);
        }
        if groups.is_empty() {
            draft.not_converted(object, "spec.rules is empty");
        } else {
            gateway.add_from(object);
        }
    }
    if !gateway.from.is_empty() {
        gateway.notes.differs(format!(
            "StaticEgressIP does not say which nodes are gateways, its manager takes any. Label the nodes that are to \
             hold the egress IPs: kubectl label node NODE {GATEWAY_LABEL}=true"
        ));
        draft.gateways.push(gateway);
    }
    Ok(draft)
}

fn groups(object: &Object) -> Result<Vec<Group<'_>>, Invalid> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for rule in object.field("spec.rules").list()? {
        let service = rule.at("service-name").required_text()?;
        let (address, cidr) = (rule.at("egressip"), rule.at("cidr"));
        let address = address.parse_address(address.required_text()?)?;
        let network = cidr.parse_network(cidr.required_text()?)?;
        let same = groups.iter_mut().position(|group| group.service == service && group.takes(address));
        match same.and_then(|index| groups.get_mut(index)) {
            Some(group) => group.networks.push(network),
            None => groups.push(Group { service, address: pair_of([address]).0, networks: vec![network] }),
        }
    }
    Ok(groups)
}
