//! EgressGateway of spidernet-io: `EgressGateway` with pools, `EgressPolicy` and `EgressClusterPolicy`.

use super::draft::{Draft, GatewayDraft, PolicyDraft, pair_of};
use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{AddressPair, Allocate};
use crate::model::blocks::covered;

pub(super) const GROUP: &str = "egressgateway.spidernet.io";
/// The label of a namespace that names the gateway of its policies.
const DEFAULT_OF_NAMESPACE: &str = "spidernet.io/egressgateway-default";

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    for object in objects.iter().filter(|object| object.is(GROUP, "EgressGateway")) {
        draft.gateways.push(gateway(object)?);
    }
    for object in objects.iter().filter(|object| object.group() == GROUP) {
        match object.kind() {
            "EgressPolicy" => {
                let mut draft_of_policy = PolicyDraft::namespaced(object, object.name());
                draft_of_policy.spec.gateway = default_of_namespace(objects, object)?;
                policy(object, draft_of_policy, &mut draft)?;
            }
            "EgressClusterPolicy" => {
                let mut of_cluster = PolicyDraft::cluster(object, object.name());
                of_cluster.spec.namespace_selector = object.field("spec.appliedTo.namespaceSelector").selector()?;
                policy(object, of_cluster, &mut draft)?;
            }
            _ => {}
        }
    }
    Ok(draft)
}

fn gateway(object: &Object) -> Result<GatewayDraft, Invalid> {
    let (spec, pools, nodes) = (object.field("spec"), object.field("spec.ippools"), object.field("spec.nodeSelector"));
    let selector = nodes.at("selector");
    let Some(node_selector) = selector.selector()? else {
        return Err(selector.invalid("is missing; add the labels of the gateway nodes, or {} for all nodes"));
    };
    let mut gateway = GatewayDraft::new(object.name(), node_selector);
    gateway.add_from(object);
    gateway.spec.default = spec.at("clusterDefault").boolean()?;
    for family in ["ipv4", "ipv6"] {
        for entry in pools.at(family).list()? {
            if let Some(text) = entry.text()? {
                gateway.add_addresses(&pool_entry(&entry, text)?);
            }
        }
    }
    if let Some(policy) = nodes.at("policy").text()? {
        gateway.notes.lost(format!(
            "spec.nodeSelector.policy: {policy:?}. Egret distributes egress IPs evenly over the nodes that live"
        ));
    }
    gateway.notes.unknown(&spec, &["ippools", "nodeSelector", "clusterDefault"])?;
    gateway.notes.unknown(&pools, &["ipv4", "ipv6", "ipv4DefaultEIP", "ipv6DefaultEIP"])?;
    gateway.notes.unknown(&nodes, &["selector", "policy"])?;
    let defaults = [pools.at("ipv4DefaultEIP").address()?, pools.at("ipv6DefaultEIP").address()?];
    let default = pair_of(defaults.into_iter().flatten()).0;
    gateway.spec.default_address = (!default.is_empty()).then_some(default);
    Ok(gateway)
}

/// An entry of a pool. Networks may have host bits there.
fn pool_entry(entry: &Field<'_>, text: &str) -> Result<String, Invalid> {
    match (text.contains('/'), text.split_once('-')) {
        (true, _) => Ok(entry.parse_network(text)?.to_string()),
        (false, Some((first, last))) => Ok(format!("{}-{}", entry.parse_address(first)?, entry.parse_address(last)?)),
        (false, None) => Ok(entry.parse_address(text)?.to_string()),
    }
}

/// The gateway that the namespace of a policy names, if the Namespace is in the input.
fn default_of_namespace(objects: &[&Object], policy: &Object) -> Result<Option<String>, Invalid> {
    let namespace = objects.iter().find(|o| o.is("", "Namespace") && o.name() == policy.namespace_or_default());
    let label = namespace.map(|o| o.field("metadata.labels").at(DEFAULT_OF_NAMESPACE).text()).transpose()?;
    Ok(label.flatten().map(str::to_owned))
}

fn policy(object: &Object, mut policy: PolicyDraft, draft: &mut Draft) -> Result<(), Invalid> {
    let (spec, applied) = (object.field("spec"), object.field("spec.appliedTo"));
    let address = spec.at("egressIP");
    policy.notes.unknown(&spec, &["egressGatewayName", "egressIP", "appliedTo", "destSubnet", "priority"])?;
    policy.notes.unknown(&applied, &["podSelector", "podSubnet", "namespaceSelector"])?;
    policy.notes.unknown(&address, &["ipv4", "ipv6", "useNodeIP", "allocatorPolicy"])?;
    if let Some(name) = spec.at("egressGatewayName").text()? {
        policy.spec.gateway = Some(name.to_owned());
    }
    let subnets = applied.at("podSubnet").texts()?;
    if !subnets.is_empty() {
        policy.notes.lost(format!(
            "spec.appliedTo.podSubnet: {}. Egret selects pods by labels or Services, not by address",
            subnets.join(", ")
        ));
    }
    let Some(pods) = applied.at("podSelector").selector()? else {
        draft.not_converted(object, "spec.appliedTo has no podSelector; add one, {} for every pod of the namespace");
        return Ok(());
    };
    policy.spec.pod_selector = Some(pods);
    policy.spec.priority = priority(&spec.at("priority"), &mut policy)?;
    choose_address(object, &mut policy, &draft.gateways)?;
    policy.set_covered(covered(&spec.at("destSubnet").networks()?, &[], &[]))?;
    draft.policies.push(policy);
    Ok(())
}

/// The peer's numbers are unsigned and have 64 bits.
fn priority(field: &Field<'_>, policy: &mut PolicyDraft) -> Result<i32, Invalid> {
    let Some(number) = field.number()? else { return Ok(0) };
    Ok(i32::try_from(number).unwrap_or_else(|_| {
        policy.notes.differs(format!("{}: {number} is more than Egret's highest priority, {}", field.path(), i32::MAX));
        i32::MAX
    }))
}

/// The egress IP: the one that the policy names or has, the gateway's default one, or one that Egret chooses.
fn choose_address(object: &Object, policy: &mut PolicyDraft, gateways: &[GatewayDraft]) -> Result<(), Invalid> {
    let (spec, status) = (object.field("spec.egressIP"), object.field("status.eip"));
    if spec.at("useNodeIP").boolean()? {
        policy.set_allocate(Allocate::Node);
        return Ok(());
    }
    let named = |field: &Field<'_>| -> Result<AddressPair, Invalid> {
        Ok(pair_of([field.at("ipv4").address()?, field.at("ipv6").address()?].into_iter().flatten()).0)
    };
    let (of_spec, of_status) = (named(&spec)?, named(&status)?);
    let gateway = match (&policy.spec.gateway, gateways) {
        (Some(name), all) => all.iter().find(|gateway| gateway.name == *name),
        (None, [only]) => Some(only),
        (None, all) => all.iter().find(|gateway| gateway.spec.default),
    };
    let default = gateway.and_then(|gateway| gateway.spec.default_address.as_ref());
    let is_rr = spec.at("allocatorPolicy").text()? == Some("rr");
    // What the status has includes what the spec names.
    let named = if of_status.is_empty() { of_spec } else { of_status };
    let is_part = |default: &AddressPair| {
        let same4 = named.ipv4.is_some() && named.ipv4 == default.ipv4;
        same4 || named.ipv6.is_some() && named.ipv6 == default.ipv6
    };
    match default {
        Some(default) if is_part(default) => {
            if named != *default {
                policy.notes.differs(
                    "spec.egressIP is a part of the gateway's default egress IP, which Egret gives as a whole: the pods have \
                     both addresses of it",
                );
            }
        }
        _ if !named.is_empty() => policy.set_address(named),
        // A policy that says nothing has the gateway's default address.
        Some(_) => policy.spec.allocate = is_rr.then_some(Allocate::Dedicated),
        _ if is_rr => policy.set_allocate(Allocate::Dedicated),
        // The other system draws the default address when the gateway is created.
        _ => {
            policy.set_allocate(Allocate::Shared);
            policy.notes.differs(
                "the gateway's default egress IP is not in the input; allocate: Shared gives all policies of the \
                 gateway one egress IP that Egret chooses. Convert what the API server has to keep the address",
            );
        }
    }
    Ok(())
}
