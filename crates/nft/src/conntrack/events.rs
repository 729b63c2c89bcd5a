//! Notifications of the kernel: connections that begin and end.

use super::*;
use crate::netlink::{HEADER, Message};
use std::io;

/// Multicast groups, include/uapi/linux/netfilter/nfnetlink_compat.h. The kernel makes their messages only while a
/// socket is in a group.
const NFNLGRP_CONNTRACK_NEW: u32 = 1;
const NFNLGRP_CONNTRACK_DESTROY: u32 = 3;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_COUNTERS_PACKETS: u16 = 1;
const CTA_COUNTERS_BYTES: u16 = 2;

/// Where the attributes of a notification begin, in bytes from the start of its datagram.
pub const ATTRIBUTES: u32 = (HEADER + NFGENMSG) as u32;
/// The attribute with the connection mark: four bytes, in network order. Connections without a mark have none.
pub const MARK: u32 = CTA_MARK as u32;

/// A connection has begun, or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionEvent {
    /// Whether it has ended.
    pub ended: bool,
    /// The original direction, before translation.
    pub out: Tuple,
    /// The reply direction, before the replies are translated back.
    pub back: Tuple,
    /// The connection mark.
    pub mark: u32,
    /// The kernel's id of the entry.
    pub id: u32,
    /// What was sent in the original direction. `None` if the connection has just begun, or if the kernel counts nothing
    /// (`net.netfilter.nf_conntrack_acct`).
    pub sent: Option<Traffic>,
    /// What was sent in the reply direction.
    pub received: Option<Traffic>,
}

/// An amount of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes, with the IP headers.
    pub bytes: u64,
}

/// Makes a socket receive the notifications of its network namespace.
///
/// # Errors
/// The kernel has no `nf_conntrack_netlink`.
pub fn subscribe(socket: &mut Socket) -> io::Result<()> {
    socket.join(NFNLGRP_CONNTRACK_NEW)?;
    socket.join(NFNLGRP_CONNTRACK_DESTROY)
}

/// Parses a notification. `None` if it is no connection's.
pub fn parse_event(message: &Message) -> Option<ConnectionEvent> {
    let ended = match message.kind {
        IPCTNL_MSG_CT_NEW => false,
        IPCTNL_MSG_CT_DELETE => true,
        _ => return None,
    };
    let (mut out, mut back, mut mark, mut id, mut sent, mut received) = (None, None, 0, 0, None, None);
    for (kind, value) in attributes(message.payload.get(NFGENMSG..)?) {
        match kind {
            CTA_TUPLE_ORIG => out = Tuple::parse(value),
            CTA_TUPLE_REPLY => back = Tuple::parse(value),
            CTA_MARK => mark = u32::from_be_bytes(value.try_into().ok()?),
            CTA_ID => id = u32::from_be_bytes(value.try_into().ok()?),
            CTA_COUNTERS_ORIG => sent = traffic(value),
            CTA_COUNTERS_REPLY => received = traffic(value),
            _ => {}
        }
    }
    Some(ConnectionEvent { ended, out: out?, back: back?, mark, id, sent, received })
}

fn traffic(counters: &[u8]) -> Option<Traffic> {
    let mut found = Traffic::default();
    for (kind, value) in attributes(counters) {
        match kind {
            CTA_COUNTERS_PACKETS => found.packets = u64::from_be_bytes(value.try_into().ok()?),
            CTA_COUNTERS_BYTES => found.bytes = u64::from_be_bytes(value.try_into().ok()?),
            _ => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Message<'_> {
        Message { kind, flags: 0, sequence: 0, port: 0, payload }
    }

    #[test]
    fn the_end_of_a_connection_has_counters_and_a_truncated_message_is_rejected() {
        let out = Tuple {
            source: "10.244.1.5".parse().unwrap(),
            destination: "198.51.100.7".parse().unwrap(),
            protocol: 6,
            ports: [40_000, 443],
        };
        let back = Tuple { destination: "192.0.2.50".parse().unwrap(), ..out.reversed() };
        let mut payload = vec![AF_INET as u8, 0, 0, 0];
        payload.nested(CTA_TUPLE_ORIG, |t| out.write(t));
        payload.nested(CTA_TUPLE_REPLY, |t| back.write(t));
        payload.be32(CTA_MARK, 0x4547_8001);
        payload.be32(CTA_ID, 7);
        payload.nested(CTA_COUNTERS_ORIG, |c| {
            c.attribute(CTA_COUNTERS_PACKETS, &5u64.to_be_bytes());
            c.attribute(CTA_COUNTERS_BYTES, &600u64.to_be_bytes());
        });
        let event = parse_event(&message(IPCTNL_MSG_CT_DELETE, &payload)).unwrap();
        let sent = Some(Traffic { packets: 5, bytes: 600 });
        assert_eq!(event, ConnectionEvent { ended: true, out, back, mark: 0x4547_8001, id: 7, sent, received: None });
        assert!(!parse_event(&message(IPCTNL_MSG_CT_NEW, &payload)).unwrap().ended);
        assert_eq!(parse_event(&message(IPCTNL_MSG_CT_GET, &payload)), None);
        for length in 0..payload.len() {
            let found = parse_event(&message(IPCTNL_MSG_CT_DELETE, &payload[..length]));
            assert!(found.is_none_or(|found| found.out == out && found.back == back), "{length} bytes");
        }
    }
}
