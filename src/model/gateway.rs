//! EgressGateways, validated.

use super::address_range::{AddressRange, first_unusable, parse_ranges};
use super::metadata::{Invalid, Metadata};
use super::selector::{Name, Selector, SelectorError};
use super::shared::Shared;
use super::uplink_probes::{ProbedFamilies, UplinkProbes};
use crate::api::{AddressPair, EgressGatewaySpec, EgressGatewayStatus, NamespaceQuota, Placement, Sharing};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::net::IpAddr;

/// An EgressGateway, validated, and its allocations.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// The nodes that can hold its egress IPs.
    pub nodes: Selector,
    /// The pool: inclusive ranges, sorted, not overlapping.
    pub pool: Box<[AddressRange]>,
    /// Whether Egret or something else places the addresses.
    pub placement: Placement,
    /// The interface that traffic leaves by.
    pub interface: Option<Name>,
    /// The router that traffic leaves through.
    pub next_hop: AddressPair,
    /// Whether nodes answer echo requests to the egress IPs.
    pub answer_ping: bool,
    /// Whether a cordoned node keeps its egress IPs.
    pub ignore_cordon: bool,
    /// Whether this is the default gateway.
    pub default: bool,
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

    /// Validates a spec. The status starts empty.
    ///
    /// # Errors
    /// Addresses that cannot be parsed, ranges that run backwards or mix families, ranges that overlap, a next hop
    /// without an address, an invalid selector, an invalid probe.
    pub fn new(spec: &EgressGatewaySpec, meta: Metadata) -> Result<Self, Invalid> {
        let pool = pool(&spec.addresses)?;
        if spec.next_hop.as_ref().is_some_and(AddressPair::is_empty) {
            return Err(Invalid::new("spec.nextHop", "has no address; give ipv4, ipv6 or both, or leave nextHop out"));
        }
        Ok(Gateway {
            pool,
            reservations: reservations(spec)?,
            nodes: selector("nodeSelector", &spec.node_selector)?,
            placement: spec.placement,
            interface: spec.interface.as_deref().map(Into::into),
            next_hop: spec.next_hop.clone().unwrap_or_default(),
            answer_ping: spec.answer_ping,
            ignore_cordon: spec.ignore_cordon,
            default: spec.default,
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
