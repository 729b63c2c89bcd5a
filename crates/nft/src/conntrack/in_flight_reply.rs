//! Entries for replies that are in flight when a connection's own entry is deleted.
//!
//! The kernel never changes the translation of a tracked connection. To change it, the daemon deletes the entry, and
//! the pod's next packet creates a new one. Replies that the server sent before that carry the old translation. A
//! second entry for the same direction of the connection is impossible. An entry that begins at the server is
//! possible, if its reply direction is in a zone of its own in which no packet is ever looked up
//! (`nf_conntrack_zone::dir`, nf_conntrack_zones.h).

use super::tuple::Tuple;
use super::*;
use crate::rule::protocol::{TCP, UDP};

pub(super) const CTA_STATUS: u16 = 3;
pub(super) const CTA_PROTOINFO: u16 = 4;
pub(super) const CTA_TIMEOUT: u16 = 7;
const CTA_NAT_DST: u16 = 13;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_V4_MAXIP: u16 = 2;
const CTA_NAT_PROTO: u16 = 3;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_NAT_V6_MAXIP: u16 = 5;
const CTA_PROTONAT_PORT_MIN: u16 = 1;
const CTA_PROTONAT_PORT_MAX: u16 = 2;
pub(super) const CTA_PROTOINFO_TCP: u16 = 1;
pub(super) const CTA_PROTOINFO_TCP_STATE: u16 = 1;
pub(super) const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
pub(super) const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// `TCP_CONNTRACK_ESTABLISHED` and `IP_CT_TCP_FLAG_BE_LIBERAL`, include/uapi/linux/netfilter/nf_conntrack_tcp.h. The
/// flag turns window checks off, because the windows are unknown.
pub(super) const ESTABLISHED: u8 = 3;
pub(super) const BE_LIBERAL: u8 = 8;
/// `IPS_SEEN_REPLY`, `IPS_ASSURED`, `IPS_CONFIRMED`, include/uapi/linux/netfilter/nf_conntrack_common.h.
pub(super) const ASSURED: u32 = 1 << 1 | 1 << 2 | 1 << 3;
/// `IPS_FIXED_TIMEOUT`: packets do not extend the entry's lifetime.
pub(super) const FIXED_TIMEOUT: u32 = 1 << 10;
const STATUS: u32 = ASSURED | FIXED_TIMEOUT;
/// The entry's lifetime, in seconds.
const LIFE: u32 = 1;
/// The zone of the entry's reply direction.
const ZONE: u16 = 7871;

/// The request that creates an entry for replies in flight to the connection in `message`. `None` for a protocol other
/// than TCP and UDP, and for a connection whose destination is translated.
pub(super) fn after(message: &[u8], mark: u32) -> Option<Vec<u8>> {
    let (header, rest) = message.split_at_checked(NFGENMSG)?;
    let direction = |wanted| Tuple::parse(attributes(rest).find(|(kind, _)| *kind == wanted)?.1);
    let (out, back) = (direction(CTA_TUPLE_ORIG)?, direction(CTA_TUPLE_REPLY)?);
    let same_server = (out.destination, out.ports[1]) == (back.source, back.ports[0]);
    if !same_server || !matches!(out.protocol, TCP | UDP) {
        return None;
    }
    let mut request = header.to_vec();
    request.nested(CTA_TUPLE_ORIG, |tuple| back.write(tuple));
    request.nested(CTA_TUPLE_REPLY, |tuple| {
        back.reversed().write(tuple);
        tuple.attribute(CTA_TUPLE_ZONE, &ZONE.to_be_bytes());
    });
    request.be32(CTA_STATUS, STATUS);
    request.be32(CTA_TIMEOUT, LIFE);
    request.be32(CTA_MARK, mark);
    if back.reversed() != out {
        request.nested(CTA_NAT_DST, |nat| to(nat, out.source, out.ports[0]));
    }
    if out.protocol == TCP {
        established(&mut request);
    }
    Some(request)
}

/// Appends the attributes of an established TCP connection.
pub(super) fn established(request: &mut Vec<u8>) {
    request.nested(CTA_PROTOINFO, |info| {
        info.nested(CTA_PROTOINFO_TCP, |tcp| {
            tcp.attribute(CTA_PROTOINFO_TCP_STATE, &[ESTABLISHED]);
            // `struct nf_ct_tcp_flags`: flags and mask.
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[BE_LIBERAL; 2]);
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, &[BE_LIBERAL; 2]);
        });
    });
}

/// Appends a NAT range of one address and one port.
pub(super) fn to(nat: &mut Vec<u8>, address: IpAddr, port: u16) {
    let (least, most, bytes) = match address {
        IpAddr::V4(a) => (CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP, a.octets().to_vec()),
        IpAddr::V6(a) => (CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP, a.octets().to_vec()),
    };
    nat.attribute(least, &bytes);
    nat.attribute(most, &bytes);
    nat.nested(CTA_NAT_PROTO, |ports| {
        ports.attribute(CTA_PROTONAT_PORT_MIN, &port.to_be_bytes());
        ports.attribute(CTA_PROTONAT_PORT_MAX, &port.to_be_bytes());
    });
}
