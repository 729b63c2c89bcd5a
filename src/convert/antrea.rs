//! Antrea: `Egress`, and `ExternalIPPool` with the addresses and the nodes that can hold them.

use super::draft::{Draft, GatewayDraft, PolicyDraft, pair_of};
use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{Bandwidth, MAX_VLAN, Placement};
use crate::model::addresses_of;
use crate::model::bandwidth::BitRate;
use crate::model::blocks::covered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::collections::BTreeMap;
use std::net::IpAddr;

pub(super) const GROUP: &str = "crd.antrea.io";
/// The gateway of Egresses without a pool: their addresses are on nodes already.
const STATIC: &str = "antrea-static";

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    let egresses: Vec<&Object> = objects.iter().copied().filter(|o| o.is(GROUP, "Egress")).collect();
    let joined = joined_pools(&egresses)?;
    for object in objects.iter().filter(|object| object.is(GROUP, "ExternalIPPool")) {
        add_pool(object, &joined, &mut draft)?;
    }
    for object in egresses {
        add_egress(object, objects, &joined, &mut draft)?;
    }
    Ok(draft)
}

/// Pools that one Egress uses together, IPv4 and IPv6 for instance, become one gateway: a policy has one. The gateway
/// of each pool, by the pool's name, where it is another pool's.
fn joined_pools(egresses: &[&Object]) -> Result<BTreeMap<String, String>, Invalid> {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for object in egresses {
        if let [first, others @ ..] = object.field("spec.externalIPPools").texts()?.as_slice() {
            let gateway = joined.get(*first).cloned().unwrap_or_else(|| (*first).to_owned());
            for other in others.iter().filter(|other| **other != gateway) {
                joined.entry((*other).to_owned()).or_insert_with(|| gateway.clone());
            }
        }
    }
    Ok(joined)
}

fn add_pool(object: &Object, joined: &BTreeMap<String, String>, draft: &mut Draft) -> Result<(), Invalid> {
    let spec = object.field("spec");
    let nodes = spec.at("nodeSelector").selector()?.unwrap_or_default();
    let name = joined.get(object.name()).map_or(object.name(), String::as_str);
    if draft.gateways.iter().all(|gateway| gateway.name != name) {
        draft.gateways.push(GatewayDraft::new(name, nodes.clone()));
    }
    let Some(gateway) = draft.gateways.iter_mut().find(|gateway| gateway.name == name) else { return Ok(()) };
    gateway.add_from(object);
    if gateway.from.len() > 1 {
        gateway.notes.differs("pools that one Egress uses together are one gateway, because a policy has one gateway");
        if gateway.spec.node_selector != nodes {
            gateway.notes.lost(format!(
                "the nodeSelector of {} is another one; the gateway has that of {}",
                object.label(),
                gateway.from[0]
            ));
        }
    }
    for range in spec.at("ipRanges").list()? {
        gateway.add_addresses(&addresses(&range)?);
    }
    subnet(&spec.at("subnetInfo"), gateway)?;
    gateway.notes.unknown(&spec, &["ipRanges", "subnetInfo", "nodeSelector"])
}

/// An entry of `ipRanges`.
fn addresses(range: &Field<'_>) -> Result<String, Invalid> {
    if let Some(network) = range.at("cidr").network()? {
        return Ok(network.to_string());
    }
    match (range.at("start").address()?, range.at("end").address()?) {
        (Some(first), Some(last)) if first == last => Ok(first.to_string()),
        (Some(first), Some(last)) => Ok(format!("{first}-{last}")),
        _ => Err(range.invalid("has neither cidr nor start and end; add one of them")),
    }
}

fn subnet(info: &Field<'_>, gateway: &mut GatewayDraft) -> Result<(), Invalid> {
    let vlan = info.at("vlan").number()?.filter(|vlan| *vlan != 0);
    let vlan = vlan.map(|vlan| {
        let number = u16::try_from(vlan).ok().filter(|number| *number <= MAX_VLAN);
        number.ok_or_else(|| info.at("vlan").invalid(format!("{vlan} is no number of a VLAN; use 1 to {MAX_VLAN}")))
    });
    let vlan = vlan.transpose()?;
    // Pools that one Egress uses together become one gateway.
    let is_other_vlan = gateway.from.len() > 1 && gateway.spec.vlan != vlan;
    if is_other_vlan {
        gateway.notes.lost(
            "spec.subnetInfo: pools that one Egress uses together are in different VLANs; the gateway has VLAN and router of \
             the first one",
        );
    } else {
        gateway.spec.vlan = vlan;
    }
    if !info.is_present() {
        return Ok(());
    }
    if let Some(router) = info.at("gateway").address()?.filter(|_| !is_other_vlan) {
        let next_hop = gateway.spec.next_hop.get_or_insert_default();
        match router {
            IpAddr::V4(a) => next_hop.ipv4 = Some(a),
            IpAddr::V6(a) => next_hop.ipv6 = Some(a),
        }
    }
    if gateway.spec.vlan.is_some() && gateway.spec.next_hop.is_none() {
        return Err(info.invalid("has a vlan and no gateway, which Egret needs there; add the router's address"));
    }
    if let Some(length) = info.at("prefixLength").number()? {
        gateway.notes.differs(format!(
            "spec.subnetInfo.prefixLength: {length} is not needed: all traffic goes to nextHop, which must be on a link of \
             the gateway nodes"
        ));
    }
    gateway.notes.unknown(info, &["gateway", "vlan", "prefixLength"])
}

/// Antrea's rate is in bits a second, with `k`, `M` or `G`, and limits each egress IP on its node, as here.
fn add_bandwidth(bandwidth: &Field<'_>, policy: &mut PolicyDraft) -> Result<(), Invalid> {
    let rate = bandwidth.at("rate").text()?.unwrap_or_default();
    let unit = [('k', "Kbit"), ('M', "Mbit"), ('G', "Gbit")].into_iter().find(|(unit, _)| rate.ends_with(*unit));
    let egress = unit.map(|(from, to)| rate.trim_end_matches(from).to_owned() + to);
    match egress.filter(|egress| BitRate::parse(egress).is_ok()) {
        Some(egress) => {
            policy.spec.bandwidth = Some(Bandwidth { egress: Some(egress), ingress: None });
            if let Some(burst) = bandwidth.at("burst").text()? {
                policy.notes.differs(format!("spec.bandwidth.burst: {burst}. Here it is what comes in one second"));
            }
        }
        None => {
            policy.notes.lost(format!("spec.bandwidth: {}. It is no number of kbit, Mbit or Gbit", bandwidth.shown()))
        }
    }
    policy.notes.unknown(bandwidth, &["rate", "burst"])
}

fn add_egress(
    object: &Object,
    objects: &[&Object],
    joined: &BTreeMap<String, String>,
    draft: &mut Draft,
) -> Result<(), Invalid> {
    let spec = object.field("spec");
    let mut policy = PolicyDraft::cluster(object, object.name());
    policy
        .notes
        .unknown(&spec, &["appliedTo", "egressIP", "egressIPs", "externalIPPool", "externalIPPools", "bandwidth"])?;
    let Some((namespaces, pods)) = applied_to(object, objects)? else {
        draft.not_converted(
            object,
            "spec.appliedTo selects nothing that the input has; add podSelector or namespaceSelector, or give its \
             ClusterGroup too",
        );
        return Ok(());
    };
    (policy.spec.namespace_selector, policy.spec.pod_selector) = (namespaces, Some(pods.unwrap_or_default()));
    let bandwidth = spec.at("bandwidth");
    if bandwidth.is_present() {
        add_bandwidth(&bandwidth, &mut policy)?;
    }
    let pools = [vec![spec.at("externalIPPool").text()?.unwrap_or_default()], spec.at("externalIPPools").texts()?];
    let pool = pools.iter().flatten().find(|pool| !pool.is_empty()).copied();
    let (pair, others) = pair_of(egress_ips(object)?);
    if !others.is_empty() {
        let others = others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        policy.notes.lost(format!("{others}: a policy of Egret has one egress IP of each family"));
    }
    match (pool, pair.is_empty()) {
        (None, true) => {
            draft.not_converted(object, "it has neither an egress IP nor a pool; add spec.externalIPPool");
            return Ok(());
        }
        (None, false) => {
            policy.spec.gateway = Some(STATIC.to_owned());
            let gateway = static_gateway(draft, object);
            addresses_of(&pair).for_each(|address| gateway.add_addresses(&address.to_string()));
        }
        (Some(pool), _) => {
            let gateway = joined.get(pool).map_or(pool, String::as_str);
            policy.spec.gateway = Some(gateway.to_owned());
        }
    }
    // Without an address the policy gets one of its own from the pool, as there.
    if !pair.is_empty() {
        policy.set_address(pair);
    }
    policy.set_covered(covered(&[], &[], &[]))?;
    draft.policies.push(policy);
    Ok(())
}

/// The addresses that the Egress names, or that Antrea has given it.
fn egress_ips(object: &Object) -> Result<Vec<IpAddr>, Invalid> {
    let spec = object.field("spec");
    let mut found: Vec<IpAddr> = spec.at("egressIP").address()?.into_iter().collect();
    for item in spec.at("egressIPs").list()? {
        found.extend(item.address()?);
    }
    if found.is_empty() {
        found.extend(object.field("status.egressIP").address()?);
    }
    Ok(found)
}

/// Nodes have these addresses already.
fn static_gateway<'d>(draft: &'d mut Draft, object: &Object) -> &'d mut GatewayDraft {
    let index = draft.gateways.iter().position(|gateway| gateway.name == STATIC).unwrap_or_else(|| {
        let mut gateway = GatewayDraft::new(STATIC, LabelSelector::default());
        gateway.spec.placement = Placement::External;
        gateway.notes.differs(
            "these Egresses have no pool: their addresses are on nodes already, and the node that has an address is its \
             owner. For failover, take the addresses off the nodes, select the gateway nodes, and remove placement",
        );
        draft.gateways.push(gateway);
        draft.gateways.len() - 1
    });
    draft.gateways[index].add_from(object);
    &mut draft.gateways[index]
}

/// Selectors of namespaces and of pods.
type Selectors = (Option<LabelSelector>, Option<LabelSelector>);

/// What `appliedTo` selects. `None`: nothing, or a group that the input does not have.
fn applied_to(object: &Object, objects: &[&Object]) -> Result<Option<Selectors>, Invalid> {
    let applied = object.field("spec.appliedTo");
    let group = applied.at("group").text()?;
    let named = group.and_then(|name| objects.iter().find(|o| o.is(GROUP, "ClusterGroup") && o.name() == name));
    let field = match (group, named) {
        (None, _) => applied,
        (Some(_), Some(group)) => group.field("spec"),
        (Some(_), None) => return Ok(None),
    };
    let selectors = (field.at("namespaceSelector").selector()?, field.at("podSelector").selector()?);
    Ok(Some(selectors).filter(|(namespaces, pods)| namespaces.is_some() || pods.is_some()))
}
