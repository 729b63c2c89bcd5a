//! kube-vip: Services of type LoadBalancer whose address is the egress IP of their pod, by annotations.

use super::destinations::{covered, everything_of};
use super::draft::{Draft, GatewayDraft, PolicyDraft, pair_of};
use super::field::Invalid;
use super::input::Object;
use super::services;
use crate::api::{AddressPair, EgressPort, ExistingConnections, Placement, Protocol};
use crate::model::addresses_of;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

const PREFIX: &str = "kube-vip.io/";
const GATEWAY: &str = "kube-vip";

/// Whether kube-vip gives the Service's pod its address.
pub(super) fn has_egress(object: &Object) -> bool {
    let annotation = object.annotation("kube-vip.io/egress");
    object.is("", "Service") && annotation.is_ok_and(|value| value.is_some_and(|v| v.eq_ignore_ascii_case("true")))
}

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    for object in objects.iter().filter(|object| has_egress(object)) {
        service(object, &mut draft)?;
    }
    Ok(draft)
}

fn service(object: &Object, draft: &mut Draft) -> Result<(), Invalid> {
    let text = |key: &str| object.annotation_field(&format!("{PREFIX}{key}"));
    if !object.field("spec.selector").is_present() {
        draft.not_converted(object, "the Service has no selector, so it names no pods");
        return Ok(());
    }
    let mut policy = PolicyDraft::namespaced(object, object.name());
    let ipv6 = text("egress-ipv6").text()? == Some("true");
    let of_family = services::addresses(object)?.into_iter().filter(|address| address.is_ipv6() == ipv6);
    let (pair, others) = pair_of(of_family);
    if pair.is_empty() {
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        draft.not_converted(
            object,
            format!(
                "it has no {family} address yet, neither in status.loadBalancer nor in kube-vip.io/loadbalancerIPs; give the \
                 Service as the API server has it"
            ),
        );
        return Ok(());
    }
    if !others.is_empty() {
        policy.notes.lost("the Service has more than one address of the family; a policy of Egret has one");
    }
    let networks = |key: &str| {
        let field = text(key);
        let parts = field.text()?.unwrap_or_default().split(',').filter(|part| !part.trim().is_empty());
        parts.map(|part| field.parse_network(part)).collect::<Result<Vec<_>, Invalid>>()
    };
    let (mut allowed, denied) = (networks("egress-allowed-networks")?, networks("egress-denied-networks")?);
    if allowed.is_empty() {
        // kube-vip leaves the other family to the node.
        allowed.push(everything_of(ipv6));
    }
    let ports = ports(&text("egress-destination-ports"))?;
    if !policy.set_covered(covered(&allowed, &denied, &ports))? {
        draft.not_converted(object, "egress-denied-networks contains all of egress-allowed-networks");
        return Ok(());
    }
    notes(object, &mut policy)?;
    policy.spec.gateway = Some(gateway(object, text("serviceInterface").text()?, &pair, draft));
    policy.spec.services = vec![object.name().to_owned()];
    policy.set_address(pair);
    draft.policies.push(policy);
    Ok(())
}

/// What the other annotations say.
fn notes(object: &Object, policy: &mut PolicyDraft) -> Result<(), Invalid> {
    policy.notes.differs(
        "kube-vip gives the address to one pod of the Service, on the node that has the address. Egret gives it to all pods \
         of the Service, wherever they run",
    );
    for (key, value) in object.annotations_of(PREFIX)? {
        match key {
            "egress-source-ports" => policy.notes.lost(format!(
                "{PREFIX}{key}: {value:?} is about traffic to the Service, with which Egret has nothing to do"
            )),
            "egress-no-internal-traffic" => policy.notes.lost(format!(
                "{PREFIX}{key}: {value:?}. Traffic to pods, Services and nodes always goes direct in Egret"
            )),
            "serviceVLAN" => policy.notes.lost(format!(
                "{PREFIX}{key}: {value:?}. Egret makes no VLAN; the address is used where kube-vip has put it"
            )),
            "flush-conntrack" => policy.spec.existing_connections = ExistingConnections::End,
            _ => {}
        }
    }
    Ok(())
}

/// `udp:5060,tcp:5060`; a port alone is TCP's.
fn ports(field: &super::field::Field<'_>) -> Result<Vec<EgressPort>, Invalid> {
    let mut ports = Vec::new();
    for part in field.text()?.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (protocol, port) = part.split_once(':').unwrap_or(("tcp", part));
        let protocol = match protocol.trim().to_ascii_lowercase().as_str() {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "sctp" => Some(Protocol::Sctp),
            _ => None,
        };
        match (protocol, port.trim().parse::<u16>().ok().filter(|port| *port > 0)) {
            (Some(protocol), Some(port)) => ports.push(EgressPort { protocol, port: Some(port), end_port: None }),
            _ => return Err(field.invalid(format!("{part:?} is not a port; write tcp:443 or udp:5060"))),
        }
    }
    Ok(ports)
}

/// The gateway of Services on one interface. kube-vip puts the addresses onto nodes, and goes on doing so.
fn gateway(object: &Object, interface: Option<&str>, pair: &AddressPair, draft: &mut Draft) -> String {
    let same = |g: &GatewayDraft| g.spec.interface.as_deref() == interface;
    let place = draft.gateways.iter().position(same).unwrap_or_else(|| {
        let name = interface.map_or(GATEWAY.to_owned(), |name| format!("{GATEWAY}-{}", name.replace('.', "-")));
        let mut gateway = GatewayDraft::new(&name.to_ascii_lowercase(), LabelSelector::default());
        (gateway.spec.placement, gateway.spec.interface) = (Placement::External, interface.map(str::to_owned));
        gateway.notes.differs(
            "kube-vip goes on putting the addresses onto nodes, and the node that has an address is its owner. Remove \
             kube-vip.io/egress from the Services when the policies are ready",
        );
        draft.gateways.push(gateway);
        draft.gateways.len() - 1
    });
    draft.gateways[place].add_from(object);
    addresses_of(pair).for_each(|address| draft.gateways[place].add_addresses(&address.to_string()));
    draft.gateways[place].name.clone()
}
