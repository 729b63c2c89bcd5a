//! kube-vip: Services of type LoadBalancer whose address is the egress IP of their pod, by annotations.

use super::draft::{Draft, GatewayDraft, PolicyDraft, pair_of};
use super::field::Invalid;
use super::input::Object;
use super::services;
use crate::api::{AddressPair, EgressPolicySpec, Placement};
use crate::model::addresses_of;
use crate::model::kube_vip::{self, PREFIX};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::collections::{BTreeMap, HashMap};

const GATEWAY: &str = "kube-vip";

/// The first Service of each namespace with an address: several may have the same one, and policies share an egress IP
/// if they name the same Service.
type Owners = HashMap<(String, AddressPair), String>;

/// Whether kube-vip gives the Service's pod its address.
pub(super) fn has_egress(object: &Object) -> bool {
    object.is("", "Service") && annotations(object).is_ok_and(|all| kube_vip::has_egress(&all))
}

fn annotations(object: &Object) -> Result<BTreeMap<String, String>, Invalid> {
    let all = object.annotations_of(PREFIX)?.into_iter();
    Ok(all.map(|(key, value)| (format!("{PREFIX}{key}"), value.to_owned())).collect())
}

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let (mut draft, mut owners) = (Draft::default(), Owners::new());
    for object in objects.iter().filter(|object| has_egress(object)) {
        service(object, &mut draft, &mut owners)?;
    }
    Ok(draft)
}

fn service(object: &Object, draft: &mut Draft, owners: &mut Owners) -> Result<(), Invalid> {
    let annotations = annotations(object)?;
    if !object.field("spec.selector").is_present() {
        draft.not_converted(object, "the Service has no selector, so it names no pods");
        return Ok(());
    }
    let mut policy = PolicyDraft::namespaced(object, object.name());
    let ipv6 = kube_vip::is_ipv6(&annotations);
    let (pair, _) = pair_of(services::addresses(object)?);
    if if ipv6 { pair.ipv6.is_none() } else { pair.ipv4.is_none() } {
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
    let owner = (object.namespace().unwrap_or_default().to_owned(), pair.clone());
    let named = owners.entry(owner).or_insert_with(|| object.name().to_owned()).clone();
    let asked = kube_vip::policy(&named, &annotations)
        .map_err(|fault| Invalid { object: object.label().to_owned(), message: fault.to_string() })?;
    let EgressPolicySpec { address, egress, existing_connections, .. } = asked;
    (policy.spec.address, policy.spec.egress) = (address, egress);
    policy.spec.existing_connections = existing_connections;
    notes(object, &mut policy)?;
    let interface = object.annotation("kube-vip.io/serviceInterface")?;
    policy.spec.gateway = Some(gateway(object, interface, &pair, draft));
    policy.spec.services = vec![object.name().to_owned()];
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
            "serviceVLAN" => {
                policy.notes.lost(format!("{PREFIX}{key}: {value:?}. The address is used where kube-vip has put it"))
            }
            _ => {}
        }
    }
    Ok(())
}

/// The gateway of Services on one interface. kube-vip puts the addresses onto nodes, and goes on doing so.
fn gateway(object: &Object, interface: Option<&str>, pair: &AddressPair, draft: &mut Draft) -> String {
    let same = |g: &GatewayDraft| g.spec.interface.as_deref() == interface;
    let index = draft.gateways.iter().position(same).unwrap_or_else(|| {
        let name = interface.map_or(GATEWAY.to_owned(), |name| format!("{GATEWAY}-{}", name.replace('.', "-")));
        let mut gateway = GatewayDraft::new(&name.to_ascii_lowercase(), LabelSelector::default());
        (gateway.spec.placement, gateway.spec.interface) = (Placement::External, interface.map(str::to_owned));
        gateway.notes.differs(
            "kube-vip goes on putting the addresses onto nodes, and the node that has an address is its owner. Remove \
             kube-vip.io/egress from the Services when the policies are ready. List all addresses that kube-vip may give to \
             Services",
        );
        draft.gateways.push(gateway);
        draft.gateways.len() - 1
    });
    draft.gateways[index].add_from(object);
    addresses_of(pair).for_each(|address| draft.gateways[index].add_addresses(&address.to_string()));
    draft.gateways[index].name.clone()
}
