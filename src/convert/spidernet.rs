//! EgressGateway of spidernet-io: `EgressGateway` with pools, `EgressPolicy` and `EgressClusterPolicy`.

use super::draft::{Draft, GatewayDraft, PolicyDraft, pair_of};
use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{AddressPair, Allocate};
use crate::model::blocks::covered;
use std::collections::BTreeMap;

pub(super) const GROUP: &str = "egressgateway.spidernet.io";
/// The label of a namespace that names the gateway of its policies.
const DEFAULT_OF_NAMESPACE: &str = "spidernet.io/egressgateway-default";

/// The egress IP of policies that name none, by the name of the gateway.
type DefaultAddresses = BTreeMap<String, AddressPair>;

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    let mut defaults = DefaultAddresses::new();
    for object in objects.iter().filter(|object| object.is(GROUP, "EgressGateway")) {
        let (gateway, default) = gateway(object)?;
        defaults.insert(gateway.name.clone(), default);
        draft.gateways.push(gateway);
    }
    for object in objects.iter().filter(|object| object.group() == GROUP) {
        match object.kind() {
            "EgressPolicy" => {
                let mut draft_of_policy = PolicyDraft::namespaced(object, object.name());
                draft_of_policy.spec.gateway = default_of_namespace(objects, object)?;
                policy(object, draft_of_policy, &defaults, &mut draft)?;
            }
            "EgressClusterPolicy" => {
                let mut of_cluster = PolicyDraft::cluster(object, object.name());
                of_cluster.spec.namespace_selector = object.field("spec.appliedTo.namespaceSelector").selector()?;
                policy(object, of_cluster, &defaults, &mut draft)?;
            }
            _ => {}
        }
    }
    Ok(draft)
}

fn gateway(object: &Object) -> Result<(GatewayDraft, AddressPair), Invalid> {
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
    Ok((gateway, pair_of(defaults.into_iter().flatten()).0))
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

fn policy(
    object: &Object,
    mut policy: PolicyDraft,
    defaults: &DefaultAddresses,
    draft: &mut Draft,
) -> Result<(), Invalid> {
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
    choose_address(object, &mut policy, defaults)?;
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
fn choose_address(object: &Object, policy: &mut PolicyDraft, defaults: &DefaultAddresses) -> Result<(), Invalid> {
    let (spec, status) = (object.field("spec.egressIP"), object.field("status.eip"));
    if spec.at("useNodeIP").boolean()? {
        policy.set_allocate(Allocate::Node);
        return Ok(());
    }
    let named = |field: &Field<'_>| -> Result<AddressPair, Invalid> {
        Ok(pair_of([field.at("ipv4").address()?, field.at("ipv6").address()?].into_iter().flatten()).0)
    };
    let (of_spec, of_status) = (named(&spec)?, named(&status)?);
    let default = policy.spec.gateway.as_ref().and_then(|name| defaults.get(name));
    let only = defaults.values().next().filter(|_| policy.spec.gateway.is_none() && defaults.len() == 1);
    let is_rr = spec.at("allocatorPolicy").text()? == Some("rr");
    match default.or(only) {
        // What the status has includes what the spec names.
        _ if !of_status.is_empty() => policy.set_address(of_status),
        _ if !of_spec.is_empty() => policy.set_address(of_spec),
        _ if is_rr => policy.set_allocate(Allocate::Dedicated),
        Some(pair) if !pair.is_empty() => policy.set_address(pair.clone()),
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
