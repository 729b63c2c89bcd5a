//! The key of an uplink of a node: the interface that a gateway names, and the address family; for a gateway with
//! probes, one more key for each family that it probes.

use crate::api::AddressPair;
use crate::model::fnv::fnv1a;
use crate::model::selector::Name;
use crate::model::uplink_probes::ProbedFamilies;
use std::fmt;

/// Stands for the interface of the default route where an uplink has a name. No interface has a name with a space
/// (`dev_valid_name`, net/core/dev.c).
pub const DEFAULT_ROUTE: Name = arcstr::literal!("default route");
/// Between the names of a gateway's `interfaces`, which are one name of an uplink. No interface has it in its name.
pub const BETWEEN_INTERFACES: char = '/';
/// Between an interface, or [`DEFAULT_ROUTE`], and the number of a VLAN on it, in the name of an uplink. No interface has it in
/// its name.
pub const BEFORE_VLAN: char = ':';
/// The number of codes, see [`UplinkKey::code`].
pub const CODES: u16 = 1 << 11;

/// The interfaces that the name of an uplink stands for, in the order in which they are preferred; with a number, the VLAN on it
/// is meant.
pub fn interfaces_of(uplink: &str) -> impl Iterator<Item = (&str, Option<u16>)> {
    uplink.split(BETWEEN_INTERFACES).map(|one| match one.split_once(BEFORE_VLAN) {
        // No VLAN has the number 0: what cannot be read has no interface.
        Some((interface, vlan)) => (interface, Some(vlan.parse().unwrap_or(0))),
        None => (one, None),
    })
}

/// Whether the name of an uplink stands for a VLAN.
pub fn is_on_vlan(uplink: Option<&str>) -> bool {
    uplink.is_some_and(|uplink| uplink.contains(BEFORE_VLAN))
}

/// One family of one uplink. An uplink with a gateway works while the probes of this gateway do not fail there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UplinkKey {
    /// The interface, where the gateway names one, or [`DEFAULT_ROUTE`]. Without one, each address uses the interface of
    /// its network, or else that of the default route.
    pub interface: Option<Name>,
    /// Whether the family is IPv4.
    pub ipv4: bool,
    /// The gateway whose probes are meant; `None`: the uplink itself.
    pub gateway: Option<Name>,
}

impl UplinkKey {
    /// The uplinks that addresses on that interface need, without probes.
    pub fn of(address: &AddressPair, interface: Option<&Name>) -> impl Iterator<Item = UplinkKey> + use<> {
        let interface = interface.cloned();
        let families = [address.ipv4.is_some().then_some(true), address.ipv6.is_some().then_some(false)];
        families.into_iter().flatten().map(move |ipv4| UplinkKey { interface: interface.clone(), ipv4, gateway: None })
    }

    /// The uplinks that addresses of a gateway need on that interface. The gateway probes these families.
    pub fn with_probes(
        address: &AddressPair,
        interface: Option<&Name>,
        gateway: &Name,
        probed: ProbedFamilies,
    ) -> impl Iterator<Item = UplinkKey> + use<> {
        let gateway = probed.is_any().then(|| gateway.clone());
        UplinkKey::of(address, interface).flat_map(move |key| {
            let probes = gateway.clone().filter(|_| probed.contains(key.ipv4));
            let probes = probes.map(|gateway| UplinkKey { gateway: Some(gateway), ..key.clone() });
            [Some(key), probes].into_iter().flatten()
        })
    }

    /// A number below [`CODES`] that all nodes compute alike. Two uplinks of one node may share a number; then
    /// neither counts as usable while one of them is not.
    pub fn code(&self) -> u16 {
        let name = self.interface.as_deref().unwrap_or_default().bytes();
        // No name contains a zero byte, so no two keys are the same text.
        let gateway = self.gateway.iter().flat_map(|gateway| [0].into_iter().chain(gateway.bytes()));
        let hash = fnv1a(name.chain([u8::from(self.ipv4)]).chain(gateway));
        // FNV-1a mixes the last byte into the lower bits only, so the upper bits are folded in.
        ((hash ^ hash >> 32) % u64::from(CODES)) as u16
    }

    /// The family's name.
    pub fn family(&self) -> &'static str {
        if self.ipv4 { "IPv4" } else { "IPv6" }
    }
}

impl fmt::Display for UplinkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.family())?;
        if let Some(interface) = &self.interface {
            write!(f, " by {interface}")?;
        }
        match &self.gateway {
            Some(gateway) => write!(f, " as gateway {gateway} probes it"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_differ_in_interface_and_family() {
        let pair = AddressPair { ipv4: Some([192, 0, 2, 1].into()), ipv6: "2001:db8::1".parse().ok() };
        let names = [None, Some("eth0"), Some("eth1"), Some("bond0.7")].map(|name| name.map(Name::from));
        let keys: Vec<UplinkKey> = names.iter().flat_map(|name| UplinkKey::of(&pair, name.as_ref())).collect();
        assert_eq!(keys.len(), 8);
        let codes: std::collections::BTreeSet<u16> = keys.iter().map(UplinkKey::code).collect();
        assert_eq!(codes.len(), 8);
        assert!(codes.iter().all(|code| *code < CODES));
        assert_eq!(keys[3].to_string(), "IPv6 by eth0");
        let one = AddressPair { ipv6: None, ..pair };
        assert_eq!(UplinkKey::of(&one, None).map(|key| key.to_string()).collect::<Vec<_>>(), ["IPv4"]);
    }

    #[test]
    fn a_name_stands_for_interfaces_and_vlans() {
        let of = |name| interfaces_of(name).collect::<Vec<_>>();
        assert_eq!(of("eth1/bond0.7"), [("eth1", None), ("bond0.7", None)]);
        assert_eq!(of("eth1:100/ens192:100"), [("eth1", Some(100)), ("ens192", Some(100))]);
        assert_eq!(of("default route:7"), [("default route", Some(7))]);
        assert_eq!(of("eth1:x"), [("eth1", Some(0))]);
        assert!(is_on_vlan(Some("eth1:7")) && !is_on_vlan(Some("eth1")) && !is_on_vlan(None));
    }

    #[test]
    fn a_gateway_with_probes_needs_a_further_key_for_each_family_that_it_probes() {
        let pair = AddressPair { ipv4: Some([192, 0, 2, 1].into()), ipv6: "2001:db8::1".parse().ok() };
        let keys = |gateway: &str, probed| UplinkKey::with_probes(&pair, None, &gateway.into(), probed);
        let texts = |probed| keys("web", probed).map(|key| key.to_string()).collect::<Vec<_>>();
        assert_eq!(texts(ProbedFamilies::default()), ["IPv4", "IPv6"]);
        let ipv4 = ProbedFamilies { ipv4: true, ipv6: false };
        assert_eq!(texts(ipv4), ["IPv4", "IPv4 as gateway web probes it", "IPv6"]);
        let both = ProbedFamilies { ipv4: true, ipv6: true };
        let codes: std::collections::BTreeSet<u16> =
            keys("web", both).chain(keys("db", both)).map(|key| key.code()).collect();
        assert_eq!(codes.len(), 6);
    }
}
