//! The wire format of replicated connections.

use crate::datapath::node_messages::MAX_MESSAGE;
use egret_nft::conntrack::Tuple;
use egret_nft::mac::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first bytes of each message: its type and the version of the format.
const MAGIC: [u8; 4] = *b"egp\x01";
const REPLICATE: u8 = 1;
const ENDED: u8 = 2;
const RESEND: u8 = 3;
const KEPT: u8 = 4;
/// The magic bytes, the kind, and the number of connections.
const HEADER: usize = MAGIC.len() + 2;
const IPV6: u8 = 1;
/// The length of a connection without its addresses: family, protocol, three ports, MAC address, seconds.
const FIXED: usize = 1 + 1 + 3 * 2 + 6 + 4;

/// A connection whose source port the gateway changed; in [`Message::Kept`], one that has its pod's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Changed {
    /// The original direction, as it arrives at the gateway.
    pub out: Tuple,
    /// The egress IP.
    pub address: IpAddr,
    /// The source port that servers see.
    pub port: u16,
    /// The tunnel MAC address of the pod's node.
    pub source_node: Mac,
}

/// A message between two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// These connections exist, and expire after this many seconds without a packet.
    Replicate(Vec<(Changed, u32)>),
    /// These connections have ended.
    Ended(Vec<Changed>),
    /// The sender has just started and requests all connections.
    Resend,
    /// These connections of the sender's pods have their pod's port, and expire after this many seconds.
    Kept(Vec<(Changed, u32)>),
}

impl Message {
    /// Encodes into as many messages of at most [`MAX_MESSAGE`] bytes as needed.
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let none = |changed: &Changed| (*changed, 0);
        match self {
            Message::Replicate(connections) => encode(REPLICATE, connections),
            Message::Ended(connections) => encode(ENDED, &connections.iter().map(none).collect::<Vec<_>>()),
            Message::Resend => vec![begin(RESEND)],
            Message::Kept(connections) => encode(KEPT, connections),
        }
    }

    /// Decodes a message; `None` if the bytes are no message of this version.
    pub fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, count) = match bytes.strip_prefix(&MAGIC)? {
            [kind, count, ..] => (*kind, *count),
            _ => return None,
        };
        let mut rest = &bytes[HEADER..];
        let mut connections = Vec::new();
        for _ in 0..count {
            connections.push(take(&mut rest)?);
        }
        match (kind, rest.is_empty()) {
            (REPLICATE, true) => Some(Message::Replicate(connections)),
            (ENDED, true) => Some(Message::Ended(connections.into_iter().map(|(changed, _)| changed).collect())),
            (RESEND, true) if connections.is_empty() => Some(Message::Resend),
            (KEPT, true) => Some(Message::Kept(connections)),
            _ => None,
        }
    }
}

fn begin(kind: u8) -> Vec<u8> {
    let mut message = Vec::with_capacity(MAX_MESSAGE);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[kind, 0]);
    message
}

fn encode(kind: u8, connections: &[(Changed, u32)]) -> Vec<Vec<u8>> {
    let mut messages: Vec<Vec<u8>> = Vec::new();
    for (changed, seconds) in connections {
        let addresses = if changed.address.is_ipv4() { 3 * 4 } else { 3 * 16 };
        let fits = |m: &Vec<u8>| m.len() + FIXED + addresses <= MAX_MESSAGE && m[HEADER - 1] < u8::MAX;
        if !messages.last().is_some_and(fits) {
            messages.push(begin(kind));
        }
        if let Some(message) = messages.last_mut() {
            message[HEADER - 1] += 1;
            append(message, changed, *seconds);
        }
    }
    messages
}

fn append(message: &mut Vec<u8>, changed: &Changed, seconds: u32) {
    let Changed { out, address, port, source_node } = changed;
    message.extend_from_slice(&[if address.is_ipv4() { 0 } else { IPV6 }, out.protocol]);
    [out.ports[0], out.ports[1], *port].iter().for_each(|port| message.extend_from_slice(&port.to_be_bytes()));
    message.extend_from_slice(source_node);
    message.extend_from_slice(&seconds.to_be_bytes());
    for address in [out.source, out.destination, *address] {
        match address {
            IpAddr::V4(a) => message.extend_from_slice(&a.octets()),
            IpAddr::V6(a) => message.extend_from_slice(&a.octets()),
        }
    }
}

fn take(rest: &mut &[u8]) -> Option<(Changed, u32)> {
    let [family, protocol] = bytes::<2>(rest)?;
    let mut port = || bytes::<2>(rest).map(u16::from_be_bytes);
    let (ports, changed_port) = ([port()?, port()?], port()?);
    let source_node = bytes::<6>(rest)?;
    let seconds = u32::from_be_bytes(bytes::<4>(rest)?);
    let mut address = || -> Option<IpAddr> {
        match family {
            0 => bytes::<4>(rest).map(|a| Ipv4Addr::from(a).into()),
            IPV6 => bytes::<16>(rest).map(|a| Ipv6Addr::from(a).into()),
            _ => None,
        }
    };
    let out = Tuple { source: address()?, destination: address()?, protocol, ports };
    Some((Changed { out, address: address()?, port: changed_port, source_node }, seconds))
}

fn bytes<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk::<N>()?;
    *rest = left;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(n: u16, v6: bool) -> Changed {
        let address = |v4: &str, v6_text: &str| -> IpAddr { if v6 { v6_text } else { v4 }.parse().unwrap() };
        Changed {
            out: Tuple {
                source: address("10.244.1.5", "fd00:244:1::5"),
                destination: address("198.51.100.7", "2001:db8:1::7"),
                protocol: 6,
                ports: [n, 443],
            },
            address: address("192.0.2.50", "2001:db8::50"),
            port: n ^ 0x5555,
            source_node: [2, 0x65, 0x67, 0, 0, 7],
        }
    }

    #[test]
    fn encoded_messages_are_decoded_back_and_none_is_too_long() {
        let all: Vec<_> = (1..400).map(|n| (changed(n, n % 3 == 0), u32::from(n) * 1000)).collect();
        for part in [&all[..0], &all[..1], &all[..37], &all[..]] {
            let messages = Message::Replicate(part.to_vec()).encode();
            assert!(messages.iter().all(|m| m.len() <= MAX_MESSAGE));
            let read = messages.iter().flat_map(|m| match Message::decode(m) {
                Some(Message::Replicate(connections)) => connections,
                other => panic!("{other:?}"),
            });
            assert_eq!(read.collect::<Vec<_>>(), part);
        }
        let ended = Message::Ended(vec![changed(7, true)]);
        assert_eq!(Message::decode(&ended.encode()[0]), Some(ended));
        assert_eq!(Message::decode(&Message::Resend.encode()[0]), Some(Message::Resend));
        let kept = Message::Kept(vec![(changed(8, false), 9)]);
        assert_eq!(Message::decode(&kept.encode()[0]), Some(kept));
    }

    #[test]
    fn truncated_overlong_and_foreign_messages_are_rejected() {
        let whole = Message::Replicate(vec![(changed(1, false), 5), (changed(2, true), 6)]).encode().remove(0);
        for length in 0..whole.len() {
            assert_eq!(Message::decode(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(Message::decode(&[whole.as_slice(), &[0]].concat()), None);
        for at in [0, 3, 4, HEADER] {
            let mut other = whole.clone();
            other[at] = 9;
            assert_eq!(Message::decode(&other), None, "byte {at}");
        }
    }
}
