//! EgressGateways, validated.

use super::address_range::{AddressRange, addresses_of, first_unusable, parse_ranges};
use super::capacity::{SelectedCapacity, capacities};
use super::metadata::{Invalid, Metadata};
use super::selector::{Name, Selector, SelectorError};
use super::shared::Shared;
use super::uplink_key::{BEFORE_VLAN, BETWEEN_INTERFACES, DEFAULT_ROUTE};
use super::uplink_probes::{ProbedFamilies, UplinkProbes};
use crate::api::{
    AddressPair, Announce, EgressGatewaySpec, EgressGatewayStatus, FastPath, MAX_VLAN, NamespaceQuota, Placement,
    Sharing,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::net::IpAddr;

/// An EgressGateway, validated, and its allocations.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// The nodes that can hold its egress IPs.
    pub nodes: Selector,
    /// The pool: inclusive ranges, sorted, not overlapping.
    pub pool: Box<[AddressRange]>,
    /// The egress IP of policies that name none; empty: each has one of its own.
    pub default_address: AddressPair,
    /// Whether Egret or something else places the addresses.
    pub placement: Placement,
    /// How the network learns which node has an egress IP.
    pub announce: Announce,
    /// The interface that traffic leaves by, or several names of it with [`BETWEEN_INTERFACES`] between them: each node uses
    /// the first one that it has. For a VLAN on it, each name has [`BEFORE_VLAN`] and the VLAN's number at its end.
    pub interface: Option<Name>,
    /// The router that traffic leaves through.
    pub next_hop: AddressPair,
    /// Whether nodes answer echo requests to the egress IPs.
    pub answer_ping: bool,
    /// Whether packets of long connections may take the fast path.
    pub fast_path: FastPath,
    /// Whether a cordoned node keeps its egress IPs.
    pub ignore_cordon: bool,
    /// How many of its egress IPs nodes hold, by their labels.
    pub capacity: Box<[SelectedCapacity]>,
    /// Whether this is the default gateway.
    pub default: bool,
    /// Whether pods and namespaces may ask for it.
    pub opt_in: bool,
    /// The namespaces whose policies may use it.
    pub namespaces: Selector,
    /// Which policies may share an egress IP that they name.
    pub sharing: Sharing,
    /// Addresses that only policies of some namespaces may name.
    pub reservations: Box<[Reserved]>,
    /// What its nodes probe by their uplinks.
    pub probes: UplinkProbes,
    /// What the EgressPolicies of one namespace may have together.
    pub quota: NamespaceQuota,
    /// Whether its egress IPs are to be spread evenly over its nodes ([`REBALANCE`](super::REBALANCE)).
    pub rebalance: bool,
    /// The text of the annotation [`END_COOLDOWN`](super::END_COOLDOWN).
    pub end_cooldown: Option<Name>,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// `metadata.resourceVersion`, where the source gives one and the reader writes the allocations: it replaces this
    /// version and no other.
    pub version: Option<Box<str>>,
    /// What is invalid in the spec as it stands now. The other fields then have their last valid values.
    pub fault: Option<Box<str>>,
    /// The spec is invalid and its last good state is unknown: existing allocations stay, and no new ones are made.
    pub frozen: bool,
    /// The allocations. There can be 10,000, so a source and its snapshots share them.
    pub status: Shared<EgressGatewayStatus>,
}

/// Addresses that only policies of some namespaces may name.
#[derive(Clone, Debug, PartialEq)]
pub struct Reserved {
    /// The reserved addresses.
    pub addresses: Box<[AddressRange]>,
    /// The namespaces that they are reserved for.
    pub namespaces: Selector,
}

impl Reserved {
    /// Whether the reservation contains the address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|range| range.contains(address))
    }
}

impl Gateway {
    /// A sentence for users: what applies while the spec is invalid.
    pub fn while_invalid(&self) -> &'static str {
        if self.frozen {
            "its last good state is not known: until it is corrected, its policies keep the egress IPs that they have, \
             and no other ones are given out"
        } else {
            "its last good state is used until it is corrected"
        }
    }

    /// The families that its nodes probe. An egress IP that Egret does not place moves by no probe.
    pub fn probed(&self) -> ProbedFamilies {
        match self.placement {
            Placement::Managed => self.probes.families(),
            Placement::External => ProbedFamilies::default(),
        }
    }

    /// Whether the nodes' own routers announce its egress IPs.
    pub fn is_routed(&self) -> bool {
        self.announce == Announce::Route
    }

    /// The name of the uplink that its egress IPs need; `None`: the interface of each one's network, or else that of the
    /// default route.
    pub fn uplink_name(&self) -> Option<Name> {
        self.interface.clone().or_else(|| self.is_routed().then_some(DEFAULT_ROUTE))
    }

    /// Validates a spec. The status starts empty.
    ///
    /// # Errors
    /// Addresses that cannot be parsed, ranges that run backwards or mix families, ranges that overlap, a next hop
    /// without an address, an invalid selector, an invalid probe, a default address outside the pool, `announce: Route` with
    /// what excludes it, names that no interface has, a VLAN without a next hop or that
    /// something else is to have addresses on.
    pub fn new(spec: &EgressGatewaySpec, meta: Metadata) -> Result<Self, Invalid> {
        let pool = pool(&spec.addresses)?;
        let interface = interface(spec, &pool)?;
        if spec.next_hop.as_ref().is_some_and(AddressPair::is_empty) {
            return Err(Invalid::new("spec.nextHop", "has no address; give ipv4, ipv6 or both, or leave nextHop out"));
        }
        if spec.opt_in && spec.namespace_selector.is_none() {
            let message = "needs namespaceSelector, which says who may ask; give it, {} for all namespaces";
            return Err(Invalid::new("spec.optIn", message));
        }
        let reservations = reservations(spec)?;
        if spec.announce == Announce::Route {
            let excluded = match (spec.placement, spec.answer_ping) {
                (Placement::External, _) => Some("needs placement: Managed: what places the addresses announces them"),
                (_, true) => Some("excludes answerPing; leave one of them out"),
                _ => None,
            };
            if let Some(why) = excluded {
                return Err(Invalid::new("spec.announce", format!("\"Route\" {why}")));
            }
        }
        Ok(Gateway {
            default_address: default_address(spec, &pool, &reservations)?,
            pool,
            reservations,
            nodes: selector("nodeSelector", &spec.node_selector)?,
            placement: spec.placement,
            announce: spec.announce,
            interface,
            next_hop: spec.next_hop.clone().unwrap_or_default(),
            answer_ping: spec.answer_ping,
            fast_path: spec.fast_path,
            ignore_cordon: spec.ignore_cordon,
            capacity: capacities(spec)?,
            default: spec.default,
            opt_in: spec.opt_in,
            namespaces: match &spec.namespace_selector {
                Some(s) => selector("namespaceSelector", s)?,
                None => Selector::default(),
            },
            sharing: spec.sharing,
            probes: UplinkProbes::new(spec)?,
            quota: spec.namespace_quota.unwrap_or_default(),
            rebalance: meta.rebalance,
            end_cooldown: meta.end_cooldown,
            generation: meta.generation,
            version: None,
            fault: None,
            frozen: false,
            status: Shared::default(),
        })
    }
}

fn selector(field: &str, selector: &LabelSelector) -> Result<Selector, Invalid> {
    Selector::checked(selector).map_err(|e: SelectorError| Invalid::new(format!("spec.{field}"), e))
}

/// Validates `spec.interface`, `spec.interfaces` and `spec.vlan`.
fn interface(spec: &EgressGatewaySpec, pool: &[AddressRange]) -> Result<Option<Name>, Invalid> {
    if !spec.interfaces.is_empty() && spec.interface.is_some() {
        return Err(Invalid::new("spec.interfaces", "excludes interface; write all names into interfaces"));
    }
    let is_none = |name: &&str| {
        name.is_empty()
            || name.len() > 15
            || name.contains([BETWEEN_INTERFACES, BEFORE_VLAN])
            || name.contains(char::is_whitespace)
    };
    let field = if spec.interface.is_some() { "spec.interface" } else { "spec.interfaces" };
    let mut names: Vec<&str> = spec.interface.iter().chain(&spec.interfaces).map(String::as_str).collect();
    if let Some(name) = names.iter().copied().find(is_none) {
        let message = format!("no interface has the name {name:?}; write names as `ip link` shows them");
        return Err(Invalid::new(field, message));
    }
    let Some(vlan) = spec.vlan else {
        let joined = names.join(&BETWEEN_INTERFACES.to_string());
        return Ok((!names.is_empty()).then(|| joined.into()));
    };
    let next_hop = spec.next_hop.clone().unwrap_or_default();
    let lacks_router = |range: &AddressRange| match range.first {
        IpAddr::V4(_) => next_hop.ipv4.is_none(),
        IpAddr::V6(_) => next_hop.ipv6.is_none(),
    };
    let fault = match () {
        () if !(1..=MAX_VLAN).contains(&vlan) => Some(format!("is no number of a VLAN; use 1 to {MAX_VLAN}")),
        () if spec.placement == Placement::External => {
            Some("needs placement: Managed; name the interface that has the addresses in interface".to_owned())
        }
        () if next_hop.is_empty() => Some("needs nextHop, the router in the VLAN; give it".to_owned()),
        () => pool.iter().find(|range| lacks_router(range)).map(|range| {
            let family = if range.first.is_ipv4() { "ipv4" } else { "ipv6" };
            format!("needs a router in the VLAN for {}; give nextHop.{family}", range.first)
        }),
    };
    if let Some(fault) = fault {
        return Err(Invalid::new("spec.vlan", format!("{vlan} {fault}")));
    }
    let by_default_route = DEFAULT_ROUTE;
    if names.is_empty() {
        names.push(&by_default_route);
    }
    let names: Vec<String> = names.iter().map(|name| format!("{name}{BEFORE_VLAN}{vlan}")).collect();
    Ok(Some(names.join(&BETWEEN_INTERFACES.to_string()).into()))
}

/// Validates `spec.addresses`.
fn pool(addresses: &[String]) -> Result<Box<[AddressRange]>, Invalid> {
    let mut pool = parse_ranges("spec.addresses", addresses)?;
    for (i, (range, text)) in pool.iter().enumerate() {
        if let Some((first, reason)) = first_unusable(range) {
            let message =
                format!("{text:?} contains {first}, which is {reason} and cannot be an egress IP; leave it out");
            return Err(Invalid::new(format!("spec.addresses[{i}]"), message));
        }
    }
    pool.sort();
    for pair in pool.windows(2) {
        if pair[0].0.contains(pair[1].0.first) {
            return Err(Invalid::new(
                "spec.addresses",
                format!("{:?} and {:?} overlap; list each address once", pair[0].1, pair[1].1),
            ));
        }
    }
    Ok(pool.into_iter().map(|(range, _)| range).collect())
}

/// Validates `spec.defaultAddress`.
fn default_address(
    spec: &EgressGatewaySpec,
    pool: &[AddressRange],
    reservations: &[Reserved],
) -> Result<AddressPair, Invalid> {
    let Some(pair) = &spec.default_address else { return Ok(AddressPair::default()) };
    let invalid = |message: String| Err(Invalid::new("spec.defaultAddress", message));
    if pair.is_empty() {
        return invalid("has no address; give ipv4, ipv6 or both, or leave defaultAddress out".to_owned());
    }
    let mut addresses = addresses_of(pair);
    if let Some(outside) = addresses.find(|address| !pool.iter().any(|range| range.contains(*address))) {
        return invalid(format!("{outside} is not in spec.addresses; add it there"));
    }
    if let Some(reserved) = addresses_of(pair).find(|address| reservations.iter().any(|r| r.contains(*address))) {
        let message =
            "is in spec.reservations, and policies of all namespaces have the default address; choose another one";
        return invalid(format!("{reserved} {message}"));
    }
    Ok(pair.clone())
}

/// Validates `spec.reservations`.
fn reservations(spec: &EgressGatewaySpec) -> Result<Box<[Reserved]>, Invalid> {
    let each = spec.reservations.iter().enumerate();
    each.map(|(i, reservation)| {
        let addresses = parse_ranges(&format!("spec.reservations[{i}].addresses"), &reservation.addresses)?;
        let namespaces = selector(&format!("reservations[{i}].namespaceSelector"), &reservation.namespace_selector)?;
        Ok(Reserved { addresses: addresses.into_iter().map(|(range, _)| range).collect(), namespaces })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(spec: serde_json::Value) -> Result<Option<String>, String> {
        let mut all = serde_json::json!({"nodeSelector": {}, "nextHop": {"ipv4": "198.51.100.1"}});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let spec = serde_json::from_value(all).unwrap();
        let gateway = Gateway::new(&spec, Metadata::default()).map_err(|e| e.to_string())?;
        Ok(gateway.interface.map(|name| name.to_string()))
    }

    #[test]
    fn an_uplink_has_the_names_of_its_interfaces_and_the_vlan() {
        let of = |spec| uplink(spec).unwrap();
        assert_eq!(of(serde_json::json!({})), None);
        assert_eq!(of(serde_json::json!({"interface": "eth1"})).unwrap(), "eth1");
        assert_eq!(of(serde_json::json!({"interfaces": ["eth1", "ens192"]})).unwrap(), "eth1/ens192");
        let named = serde_json::json!({"interfaces": ["eth1", "ens192"], "vlan": 100});
        assert_eq!(of(named).unwrap(), "eth1:100/ens192:100");
        assert_eq!(of(serde_json::json!({"vlan": 7})).unwrap(), "default route:7");
    }

    #[test]
    fn what_can_be_no_uplink_is_rejected() {
        for (spec, word) in [
            (serde_json::json!({"interface": "eth1:100"}), "spec.interface: no interface has the name"),
            (serde_json::json!({"interfaces": ["eth1/eth2"]}), "spec.interfaces: no interface has the name"),
            (serde_json::json!({"interface": "eth1", "interfaces": ["eth2"]}), "excludes interface"),
            (serde_json::json!({"vlan": 4095}), "use 1 to 4094"),
            (serde_json::json!({"vlan": 7, "nextHop": null}), "needs nextHop"),
            (serde_json::json!({"vlan": 7, "placement": "External"}), "needs placement: Managed"),
            (serde_json::json!({"vlan": 7, "addresses": ["2001:db8::50"]}), "for 2001:db8::50; give nextHop.ipv6"),
        ] {
            let error = uplink(spec).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
