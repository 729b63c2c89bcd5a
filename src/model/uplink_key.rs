//! The key of an uplink of a node: the interface that a gateway names, and the address family.

use crate::api::AddressPair;
use crate::model::fnv::fnv1a;
use crate::model::selector::Name;
use std::fmt;

/// The number of codes, see [`UplinkKey::code`].
pub const CODES: u16 = 1 << 11;

/// One family of one uplink.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UplinkKey {
    /// The interface, where the gateway names one. Without one, each address uses the interface of its network, or
    /// else that of the default route.
    pub interface: Option<Name>,
    /// Whether the family is IPv4.
    pub ipv4: bool,
}

impl UplinkKey {
    /// The uplinks that addresses on that interface need.
    pub fn of(address: &AddressPair, interface: Option<&Name>) -> impl Iterator<Item = UplinkKey> + use<> {
        let interface = interface.cloned();
        let families = [address.ipv4.is_some().then_some(true), address.ipv6.is_some().then_some(false)];
        families.into_iter().flatten().map(move |ipv4| UplinkKey { interface: interface.clone(), ipv4 })
    }

    /// A number below [`CODES`] that all nodes compute alike. Two uplinks of one node may share a number; then
    /// neither counts as usable while one of them is not.
    pub fn code(&self) -> u16 {
        let name = self.interface.as_deref().unwrap_or_default().bytes();
        let hash = fnv1a(name.chain([u8::from(self.ipv4)]));
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
        match &self.interface {
            Some(interface) => write!(f, "{} by {interface}", self.family()),
            None => f.write_str(self.family()),
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
}
