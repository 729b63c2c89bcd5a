//! The probes of a gateway: targets outside the cluster, which tell whether an uplink leads anywhere.

use super::address_range::{AddressRange, first_unusable};
use super::metadata::Invalid;
use crate::api::{EgressGatewaySpec, MAX_PROBES, PROBE_INTERVAL, PROBE_MISSES, UplinkProbe};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What is probed, and how.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProbeTarget {
    /// An address that answers echo requests.
    Icmp(IpAddr),
    /// A port that accepts connections.
    Tcp(SocketAddr),
}

impl ProbeTarget {
    /// The address.
    pub fn address(&self) -> IpAddr {
        match self {
            ProbeTarget::Icmp(address) => *address,
            ProbeTarget::Tcp(address) => address.ip(),
        }
    }
}

impl fmt::Display for ProbeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeTarget::Icmp(address) => write!(f, "icmp {address}"),
            ProbeTarget::Tcp(address) => write!(f, "tcp {address}"),
        }
    }
}

/// The families of which a gateway has targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbedFamilies {
    /// Whether it has IPv4 targets.
    pub ipv4: bool,
    /// Whether it has IPv6 targets.
    pub ipv6: bool,
}

impl ProbedFamilies {
    /// Whether the family is probed.
    pub fn contains(self, ipv4: bool) -> bool {
        if ipv4 { self.ipv4 } else { self.ipv6 }
    }

    /// Whether any family is probed.
    pub fn is_any(self) -> bool {
        self.ipv4 || self.ipv6
    }
}

/// A gateway's probes, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkProbes {
    /// The targets, in the order of the spec.
    pub targets: Box<[ProbeTarget]>,
    /// The interval between two probes of a target.
    pub interval: Duration,
    /// The number of intervals without an answer after which a node's probes have failed.
    pub misses: u32,
}

impl UplinkProbes {
    /// Validates a gateway's probes.
    ///
    /// # Errors
    /// Too many targets, a target without or with several fields, an address that is none or that no host outside can
    /// have, a number out of range.
    pub fn new(spec: &EgressGatewaySpec) -> Result<Self, Invalid> {
        if spec.probes.len() > MAX_PROBES {
            let count = spec.probes.len();
            return Err(Invalid::new("spec.probes", format!("has {count} targets; name {MAX_PROBES} at most")));
        }
        let targets = spec.probes.iter().enumerate();
        let targets = targets.map(|(i, probe)| target(&format!("spec.probes[{i}]"), probe));
        let interval = within("spec.probeIntervalMilliseconds", spec.probe_interval_milliseconds, PROBE_INTERVAL)?;
        Ok(UplinkProbes {
            targets: targets.collect::<Result<_, _>>()?,
            interval: Duration::from_millis(interval.into()),
            misses: within("spec.probeMisses", spec.probe_misses, PROBE_MISSES)?,
        })
    }

    /// The targets of a family.
    pub fn of_family(&self, ipv4: bool) -> impl Iterator<Item = &ProbeTarget> {
        self.targets.iter().filter(move |target| target.address().is_ipv4() == ipv4)
    }

    /// The families of which there are targets.
    pub fn families(&self) -> ProbedFamilies {
        let [ipv4, ipv6] = [true, false].map(|ipv4| self.of_family(ipv4).next().is_some());
        ProbedFamilies { ipv4, ipv6 }
    }
}

fn within(field: &str, value: Option<u32>, (least, default, most): (u32, u32, u32)) -> Result<u32, Invalid> {
    match value.unwrap_or(default) {
        value if (least..=most).contains(&value) => Ok(value),
        value => Err(Invalid::new(field, format!("is {value}; give a number from {least} to {most}"))),
    }
}

fn target(field: &str, probe: &UplinkProbe) -> Result<ProbeTarget, Invalid> {
    let (target, field) = match (&probe.icmp, &probe.tcp) {
        (Some(text), None) => {
            let field = format!("{field}.icmp");
            let address = text.parse().map_err(|_| {
                Invalid::new(field.clone(), format!("{text:?} is not an IP address; write 192.0.2.1 or 2001:db8::1"))
            })?;
            (ProbeTarget::Icmp(address), field)
        }
        (None, Some(text)) => {
            let field = format!("{field}.tcp");
            let parsed = text.parse().ok().filter(|address: &SocketAddr| address.port() > 0);
            let address = parsed.ok_or_else(|| {
                let form = "write 203.0.113.1:443 or [2001:db8::1]:443";
                Invalid::new(field.clone(), format!("{text:?} is not an IP address with a port; {form}"))
            })?;
            (ProbeTarget::Tcp(address), field)
        }
        _ => return Err(Invalid::new(field, "give either icmp or tcp")),
    };
    let address = target.address();
    match first_unusable(&AddressRange { first: address, last: address }) {
        Some((_, reason)) => {
            Err(Invalid::new(field, format!("{address} is {reason}; name an address outside the cluster")))
        }
        None => Ok(target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(icmp: &[&str], tcp: &[&str]) -> EgressGatewaySpec {
        let icmp = icmp.iter().map(|text| UplinkProbe { icmp: Some((*text).to_owned()), tcp: None });
        let tcp = tcp.iter().map(|text| UplinkProbe { icmp: None, tcp: Some((*text).to_owned()) });
        EgressGatewaySpec { probes: icmp.chain(tcp).collect(), ..EgressGatewaySpec::default() }
    }

    #[test]
    fn targets_are_addresses_with_a_port_for_tcp() {
        let probes = UplinkProbes::new(&spec(&["192.0.2.1"], &["203.0.113.1:443", "[2001:db8::1]:53"])).unwrap();
        let texts: Vec<String> = probes.targets.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["icmp 192.0.2.1", "tcp 203.0.113.1:443", "tcp [2001:db8::1]:53"]);
        assert_eq!((probes.interval, probes.misses), (Duration::from_secs(1), 3));
        assert_eq!(probes.families(), ProbedFamilies { ipv4: true, ipv6: true });
        assert_eq!(UplinkProbes::new(&spec(&[], &[])).unwrap().families(), ProbedFamilies::default());
    }

    #[test]
    fn an_invalid_probe_is_named_with_a_remedy() {
        let refused = |spec: &EgressGatewaySpec| UplinkProbes::new(spec).unwrap_err().to_string();
        assert!(refused(&spec(&["example.com"], &[])).contains("spec.probes[0].icmp"));
        assert!(refused(&spec(&["fe80::1"], &[])).contains("link-local"));
        for text in ["203.0.113.1", "203.0.113.1:0", "2001:db8::1:443", "[fe80::1%1]:443", "127.0.0.1:80"] {
            assert!(refused(&spec(&["192.0.2.1"], &[text])).contains("spec.probes[1].tcp"), "{text}");
        }
        let both = UplinkProbe { icmp: Some("192.0.2.1".into()), tcp: Some("192.0.2.1:80".into()) };
        for probe in [UplinkProbe::default(), both] {
            let spec = EgressGatewaySpec { probes: vec![probe], ..EgressGatewaySpec::default() };
            assert!(refused(&spec).contains("either icmp or tcp"));
        }
        let often = EgressGatewaySpec { probe_interval_milliseconds: Some(199), ..EgressGatewaySpec::default() };
        assert!(refused(&often).contains("200 to 60000"));
        let once = EgressGatewaySpec { probe_misses: Some(1), ..EgressGatewaySpec::default() };
        assert!(refused(&once).contains("spec.probeMisses"));
        assert!(refused(&spec(&["192.0.2.1"; 9], &[])).contains("8 at most"));
    }
}
