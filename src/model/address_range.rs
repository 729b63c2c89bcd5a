//! Ranges of addresses, as users write them in a gateway's pool.

use super::destination::parse_cidr;
use super::metadata::Invalid;
use crate::api::AddressPair;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// Addresses `first` to `last`, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// First address.
    pub first: IpAddr,
    /// Last address, inclusive.
    pub last: IpAddr,
}

impl AddressRange {
    /// Whether `address` lies in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4() && self.first <= address && address <= self.last
    }

    /// Whether the two ranges have an address in common.
    pub fn overlaps(&self, other: &AddressRange) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4() && self.first <= other.last && other.first <= self.last
    }
}

impl From<&IpNetwork> for AddressRange {
    fn from(network: &IpNetwork) -> Self {
        let last = match network {
            IpNetwork::V4(n) => IpAddr::V4(n.broadcast()),
            IpNetwork::V6(n) => IpAddr::V6(n.broadcast()),
        };
        AddressRange { first: network.network(), last }
    }
}

/// The addresses of a pair, IPv4 first.
pub fn addresses_of(pair: &AddressPair) -> impl Iterator<Item = IpAddr> + use<> {
    pair.ipv4.map(IpAddr::V4).into_iter().chain(pair.ipv6.map(IpAddr::V6))
}

/// Networks whose addresses no host outside can have, each with its name.
const UNUSABLE: [(&str, &str); 10] = [
    ("0.0.0.0/8", "\"this network\" (RFC 1122)"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved or broadcast (RFC 1112)"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::ffff:0:0/96", "IPv4-mapped (RFC 4291)"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// The first address of a range that cannot be an egress IP, and the reason.
pub(super) fn first_unusable(range: &AddressRange) -> Option<(IpAddr, &'static str)> {
    UNUSABLE.iter().find_map(|(network, reason)| {
        let unusable = parse_range(network).ok()?;
        unusable.overlaps(range).then(|| (range.first.max(unusable.first), *reason))
    })
}

/// Parses each text; returns each range with its text.
pub(super) fn parse_ranges<'t>(field: &str, texts: &'t [String]) -> Result<Vec<(AddressRange, &'t String)>, Invalid> {
    let each = texts.iter().enumerate();
    each.map(|(i, text)| {
        let range = parse_range(text).map_err(|message| Invalid::new(format!("{field}[{i}]"), message))?;
        Ok((range, text))
    })
    .collect()
}

/// Parses `A`, `A-B` or `A/P` into an inclusive range.
fn parse_range(text: &str) -> Result<AddressRange, String> {
    let address = |part: &str| {
        part.trim().parse::<IpAddr>().map_err(|_| {
            format!(
                "{text:?}: {:?} is not an IP address; write 192.0.2.50, 192.0.2.50-192.0.2.59 or 192.0.2.0/28",
                part.trim()
            )
        })
    };
    if text.contains('/') {
        return Ok(AddressRange::from(&parse_cidr(text).map_err(|e| e.to_string())?));
    }
    let (first, last) = match text.split_once('-') {
        Some((a, b)) => (address(a)?, address(b)?),
        None => {
            let a = address(text)?;
            (a, a)
        }
    };
    if first.is_ipv4() != last.is_ipv4() {
        return Err(format!("{text:?} mixes IPv4 and IPv6; write one range for each family"));
    }
    if first > last {
        return Err(format!("{text:?} runs backwards; did you mean {last}-{first}?"));
    }
    Ok(AddressRange { first, last })
}
