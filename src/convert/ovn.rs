//! OVN-Kubernetes: `EgressIP`, and `EgressService` with the Service of the same name.

use super::draft::{Draft, GatewayDraft, PolicyDraft, has_label, pair_of, pairs_of};
use super::field::Invalid;
use super::input::Object;
use super::services;
use crate::api::{MAX_POLICY_ADDRESSES, Placement, Spread};
use crate::model::addresses_of;
use crate::model::blocks::covered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::net::IpAddr;

pub(super) const GROUP: &str = "k8s.ovn.org";
const GATEWAY: &str = "ovn-egress-ip";
const SERVICES: &str = "ovn-egress-service";
/// The label of nodes that can have the addresses of EgressIPs.
const ASSIGNABLE: &str = "k8s.ovn.org/egress-assignable";

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    for object in objects.iter().filter(|object| object.group() == GROUP) {
        match object.kind() {
            "EgressIP" => egress_ip(object, &mut draft)?,
            "EgressService" => egress_service(object, objects, &mut draft)?,
            _ => {}
        }
    }
    Ok(draft)
}

fn egress_ip(object: &Object, draft: &mut Draft) -> Result<(), Invalid> {
    let spec = object.field("spec");
    let mut all: Vec<IpAddr> = Vec::new();
    for item in spec.at("egressIPs").list()? {
        all.extend(item.address()?);
    }
    if all.is_empty() {
        return Err(spec.at("egressIPs").invalid("is empty; add the egress IP"));
    }
    let (pairs, others) = pairs_of(all.iter().copied());
    let Some(namespaces) = spec.at("namespaceSelector").selector()? else {
        return Err(spec.at("namespaceSelector").invalid("is missing; add it, {} for all namespaces"));
    };
    if draft.gateway(GATEWAY).is_none() {
        draft.gateways.push(GatewayDraft::new(GATEWAY, has_label(ASSIGNABLE)));
    }
    if let Some(gateway) = draft.gateway(GATEWAY) {
        gateway.add_from(object);
        all.iter().for_each(|address| gateway.add_addresses(&address.to_string()));
    }
    let mut policy = PolicyDraft::cluster(object, object.name());
    policy.notes.unknown(&spec, &["egressIPs", "namespaceSelector", "podSelector"])?;
    if !others.is_empty() {
        let others = others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        policy.notes.lost(format!(
            "spec.egressIPs: {others}. All egress IPs of a policy of Egret have the same families, and they are at most \
             {MAX_POLICY_ADDRESSES}. The gateway's pool has them; to use them, divide the pods among several policies"
        ));
    }
    policy.spec.gateway = Some(GATEWAY.to_owned());
    policy.spec.namespace_selector = Some(namespaces).filter(|all| *all != LabelSelector::default());
    policy.spec.pod_selector = Some(spec.at("podSelector").selector()?.unwrap_or_default());
    policy.set_addresses(pairs, Spread::Connection);
    policy.set_covered(covered(&[], &[], &[]))?;
    draft.policies.push(policy);
    Ok(())
}

fn egress_service(object: &Object, objects: &[&Object], draft: &mut Draft) -> Result<(), Invalid> {
    let spec = object.field("spec");
    if spec.at("sourceIPBy").text()? == Some("Network") {
        let text = "sourceIPBy: Network uses each node's own address in another routing table, without a gateway; Egret has \
                    no such policy";
        draft.not_converted(object, text);
        return Ok(());
    }
    let is_its = |o: &&&Object| {
        let (mine, its) = (object.namespace_or_default(), o.namespace_or_default());
        o.is("", "Service") && o.name() == object.name() && mine == its
    };
    let addresses = objects.iter().find(is_its).map(|service| services::addresses(service)).transpose()?;
    let (pair, others) = pair_of(addresses.unwrap_or_default());
    if pair.is_empty() {
        let text = format!(
            "the egress IP is the address of its Service, which is not in the input or has none; give what kubectl get \
             service -n {} {} -o yaml prints too",
            object.namespace_or_default(),
            object.name()
        );
        draft.not_converted(object, text);
        return Ok(());
    }
    let nodes = spec.at("nodeSelector").selector()?.unwrap_or_default();
    let gateway = service_gateway(draft, object, nodes);
    addresses_of(&pair).for_each(|address| gateway.add_addresses(&address.to_string()));
    let mut policy = PolicyDraft::namespaced(object, object.name());
    policy.spec.gateway = Some(gateway.name.clone());
    policy.spec.services = vec![object.name().to_owned()];
    policy.notes.unknown(&spec, &["sourceIPBy", "nodeSelector", "network"])?;
    if let Some(network) = spec.at("network").text()? {
        policy.notes.lost(format!(
            "spec.network: {network:?}. Egret routes by the main table: name the router of that network in the gateway's \
             nextHop and interface"
        ));
    }
    if !others.is_empty() {
        policy.notes.lost("the Service has more than one address of a family; a policy of Egret has one");
    }
    policy.set_address(pair);
    policy.set_covered(covered(&[], &[], &[]))?;
    draft.policies.push(policy);
    Ok(())
}

/// The gateway of EgressServices with this `nodeSelector`.
fn service_gateway<'d>(draft: &'d mut Draft, object: &Object, nodes: LabelSelector) -> &'d mut GatewayDraft {
    let ours = |g: &GatewayDraft| g.name.starts_with(SERVICES);
    let same = draft.gateways.iter().position(|g| ours(g) && g.spec.node_selector == nodes);
    let index = same.unwrap_or_else(|| {
        let number = draft.gateways.iter().filter(|g| ours(g)).count() + 1;
        let name = if number == 1 { SERVICES.to_owned() } else { format!("{SERVICES}-{number}") };
        let mut gateway = GatewayDraft::new(&name, nodes);
        gateway.spec.placement = Placement::External;
        gateway.notes.differs(
            "the addresses are Services' load balancer addresses: something else must put each onto a node's interface, and \
             that node is the owner. MetalLB's layer 2 mode answers for an address and puts it on no interface. To have \
             Egret place them, give the policies addresses that no Service has, and remove placement",
        );
        draft.gateways.push(gateway);
        draft.gateways.len() - 1
    });
    draft.gateways[index].add_from(object);
    &mut draft.gateways[index]
}
