//! Destinations: networks, their exceptions, and ports.

use crate::api::{EgressPort, EgressRule, MAX_EXCEPTIONS, Protocol};
use ipnetwork::IpNetwork;
use std::fmt;
use std::net::IpAddr;

/// One rule of a policy. An empty list of networks or of ports means all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    /// The networks; empty: all addresses.
    pub networks: Box<[Network]>,
    /// The ports; empty: all ports of all protocols.
    pub ports: Box<[Ports]>,
}

/// A network without some networks within it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network {
    /// The network; its host bits are zero.
    pub cidr: IpNetwork,
    /// Networks within it that the rule does not cover.
    pub except: Box<[IpNetwork]>,
}

/// Ports `first` to `last` of a protocol. 0 to 65535 means every packet of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// The protocol.
    pub protocol: Protocol,
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
}

/// An invalid entry of `spec.egress`. The text has the value and the remedy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct DestinationError(pub String);

/// Parses CIDR notation strictly.
///
/// # Errors
/// The prefix length is missing, host bits are set, or the text is not a network.
pub fn parse_cidr(text: &str) -> Result<IpNetwork, DestinationError> {
    let wrong = |why: String| DestinationError(format!("{text:?} is not a network: {why}"));
    if !text.contains('/') {
        let hint = if text.contains(':') { 128 } else { 32 };
        return Err(wrong(format!("it has no prefix length; for one address write {text}/{hint}")));
    }
    let net: IpNetwork =
        text.parse().map_err(|e| wrong(format!("{e}; write it like 203.0.113.0/24 or 2001:db8::/32")))?;
    if net.ip() != net.network() {
        return Err(wrong(format!("it has host bits; did you mean {}/{}?", net.network(), net.prefix())));
    }
    Ok(net)
}

/// Whether `inner` lies within `outer`.
pub fn contains(outer: &IpNetwork, inner: &IpNetwork) -> bool {
    outer.is_ipv4() == inner.is_ipv4() && outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

impl Destination {
    /// How many combinations of a network and a range of ports the rule has.
    pub fn combinations(&self) -> usize {
        self.networks.len().max(1) * self.ports.len().max(1)
    }

    /// Whether an address is in the networks of the rule.
    pub fn has_address(&self, address: IpAddr) -> bool {
        let network = |n: &Network| n.cidr.contains(address) && !n.except.iter().any(|e| e.contains(address));
        self.networks.is_empty() || self.networks.iter().any(network)
    }

    /// Whether the rule covers packets to `address`, of the IP protocol `protocol` and to `port` (if they have
    /// ports).
    pub fn has(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> bool {
        let of_ports = |p: &Ports| {
            let whole = (p.first, p.last) == (0, u16::MAX);
            p.protocol.number() == protocol && (whole || port.is_some_and(|port| (p.first..=p.last).contains(&port)))
        };
        self.has_address(address) && (self.ports.is_empty() || self.ports.iter().any(of_ports))
    }
}

/// Joins the texts with commas.
pub fn comma_separated<T: ToString>(all: &[T]) -> String {
    all.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.ports.is_empty() {
            write!(f, "{} of ", comma_separated(&self.ports))?;
        }
        f.write_str(&if self.networks.is_empty() {
            "every address".to_owned()
        } else {
            comma_separated(&self.networks)
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cidr)?;
        if self.except.is_empty() { Ok(()) } else { write!(f, " without {}", comma_separated(&self.except)) }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (0, u16::MAX) => write!(f, "{}", self.protocol),
            (first, last) if first == last => write!(f, "{} {first}", self.protocol),
            (first, last) => write!(f, "{} {first}-{last}", self.protocol),
        }
    }
}

impl TryFrom<&EgressRule> for Destination {
    type Error = DestinationError;

    fn try_from(rule: &EgressRule) -> Result<Self, DestinationError> {
        let mut networks = Vec::new();
        for peer in &rule.to {
            let cidr = parse_cidr(&peer.ip_block.cidr)?;
            let count = peer.ip_block.except.len();
            if count > MAX_EXCEPTIONS {
                return Err(DestinationError(format!(
                    "{cidr} has {count} exceptions, and at most {MAX_EXCEPTIONS} are allowed; write several smaller \
                     networks instead, each with its own exceptions"
                )));
            }
            let mut except = Vec::new();
            for text in &peer.ip_block.except {
                let net = parse_cidr(text)?;
                if !contains(&cidr, &net) {
                    return Err(DestinationError(format!(
                        "except {net} is not within {cidr}; exceptions must be part of the network they are taken from"
                    )));
                }
                except.push(net);
            }
            networks.push(Network { cidr, except: except.into() });
        }
        let ports = rule.ports.iter().map(Ports::try_from).collect::<Result<_, _>>()?;
        Ok(Destination { networks: networks.into(), ports })
    }
}

impl TryFrom<&EgressPort> for Ports {
    type Error = DestinationError;

    fn try_from(p: &EgressPort) -> Result<Self, DestinationError> {
        let (first, last) = match (p.port, p.end_port) {
            (None, None) => (0, u16::MAX),
            (Some(first), None) => (first, first),
            (Some(first), Some(last)) if first <= last => (first, last),
            (Some(first), Some(last)) => {
                return Err(DestinationError(format!(
                    "endPort {last} is below port {first}; write the lower one as port"
                )));
            }
            (None, Some(last)) => {
                return Err(DestinationError(format!("endPort {last} without port; name the first port as port")));
            }
        };
        Ok(Ports { protocol: p.protocol, first, last })
    }
}
