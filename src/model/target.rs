//! Destinations of packets, as users write them.

use crate::api::Protocol;
use crate::model::destination::Destination;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// The destination of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: IpAddr,
    /// The protocol and port, if the user gives them.
    pub port: Option<(Protocol, u16)>,
}

impl Target {
    /// Whether `destination` contains the target. A destination with ports does not contain a target without a port.
    pub fn is_in(&self, destination: &Destination) -> bool {
        let ports = &destination.ports;
        let of_port =
            |(protocol, port)| ports.iter().any(|p| p.protocol == protocol && (p.first..=p.last).contains(&port));
        destination.has_address(self.address) && (ports.is_empty() || self.port.is_some_and(of_port))
    }
}

impl FromStr for Target {
    type Err = String;

    /// `203.0.113.7`, `203.0.113.7:443`, `[2001:db8::7]:53/udp`.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Target { address, port: None });
        }
        let (socket, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match &*protocol.to_ascii_lowercase() {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "sctp" => Some(Protocol::Sctp),
            _ => None,
        };
        match (socket.parse::<SocketAddr>(), protocol) {
            (Ok(socket), Some(protocol)) => Ok(Target { address: socket.ip(), port: Some((protocol, socket.port())) }),
            _ => Err(format!(
                "{text:?} is not a destination; write it like 203.0.113.7, 203.0.113.7:443 or [2001:db8::7]:53/udp"
            )),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            None => write!(f, "{}", self.address),
            Some((protocol, port)) => write!(f, "{}, {} port {port},", self.address, protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_parsed() {
        let target = |text: &str| text.parse::<Target>();
        assert_eq!(target("[2001:db8::7]:53/sctp").unwrap().port, Some((Protocol::Sctp, 53)));
        assert_eq!(target("203.0.113.7:53/UDP").unwrap().port, Some((Protocol::Udp, 53)));
        assert_eq!(target("203.0.113.7:443").unwrap().port, Some((Protocol::Tcp, 443)));
        for wrong in ["db.example", "203.0.113.7:99999", "203.0.113.7:53/icmp", "203.0.113.7/udp", ""] {
            assert!(target(wrong).unwrap_err().contains("write it like"), "{wrong}");
        }
    }
}
