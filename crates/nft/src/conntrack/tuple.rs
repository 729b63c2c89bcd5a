//! The tuple of one direction of a connection, with its ports.

use super::*;

const CTA_PROTO_DST_PORT: u16 = 3;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// The sender's address.
    pub source: IpAddr,
    /// The receiver's address.
    pub destination: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The sender's port and the receiver's port.
    pub ports: [u16; 2],
}

impl Tuple {
    /// Parses the content of `CTA_TUPLE_ORIG` or `CTA_TUPLE_REPLY`.
    pub(super) fn parse(tuple: &[u8]) -> Option<Tuple> {
        let (source, destination) = super::tuple(tuple)?;
        let mut found = Tuple { source, destination, protocol: 0, ports: [0; 2] };
        let (_, protocol) = attributes(tuple).find(|(kind, _)| *kind == CTA_TUPLE_PROTO)?;
        for (kind, value) in attributes(protocol) {
            match kind {
                CTA_PROTO_NUM => found.protocol = *value.first()?,
                CTA_PROTO_SRC_PORT => found.ports[0] = u16::from_be_bytes(value.try_into().ok()?),
                CTA_PROTO_DST_PORT => found.ports[1] = u16::from_be_bytes(value.try_into().ok()?),
                _ => {}
            }
        }
        Some(found)
    }

    /// The other direction.
    #[must_use]
    pub fn reversed(self) -> Tuple {
        let [from, to] = self.ports;
        Tuple { source: self.destination, destination: self.source, ports: [to, from], ..self }
    }

    pub(super) fn write(self, tuple: &mut Vec<u8>) {
        tuple.nested(CTA_TUPLE_IP, |ip| match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ip.attribute(CTA_IP_V4_SRC, &source.octets());
                ip.attribute(CTA_IP_V4_DST, &destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ip.attribute(CTA_IP_V6_SRC, &source.octets());
                ip.attribute(CTA_IP_V6_DST, &destination.octets());
            }
            _ => {}
        });
        tuple.nested(CTA_TUPLE_PROTO, |protocol| {
            protocol.attribute(CTA_PROTO_NUM, &[self.protocol]);
            protocol.attribute(CTA_PROTO_SRC_PORT, &self.ports[0].to_be_bytes());
            protocol.attribute(CTA_PROTO_DST_PORT, &self.ports[1].to_be_bytes());
        });
    }

    /// `struct nfgenmsg` of the tuple's family.
    pub(super) fn header(&self) -> Vec<u8> {
        let mut header = vec![0; NFGENMSG];
        header[0] = if self.source.is_ipv4() { AF_INET as u8 } else { AF_INET6 as u8 };
        header
    }
}
