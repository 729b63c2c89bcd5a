//! What nodes tell each other of connections whose port was changed, as bytes.

use crate::datapath::node_messages::MOST;
use crate::kernel::conntrack::Tuple;
use crate::model::mac::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Begins each message: what it is, and the version of its form.
const MAGIC: [u8; 4] = *b"egp\x01";
const HOLD: u8 = 1;
const FORGET: u8 = 2;
const TELL: u8 = 3;
const KEPT: u8 = 4;
/// The kind, and how many connections follow.
const HEADER: usize = MAGIC.len() + 2;
const IPV6: u8 = 1;
/// All but the addresses of a connection: family, protocol, three ports, MAC, seconds.
const FIXED: usize = 1 + 1 + 3 * 2 + 6 + 4;

/// A connection that leaves from another port than its pod's; in [`Message::Kept`], from its pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Changed {
    /// As it comes to the gateway.
    pub out: Tuple,
    /// The egress IP.
    pub address: IpAddr,
    /// The port that servers see.
    pub port: u16,
    /// The node on which its pod runs, by its MAC address in the tunnel.
    pub source_node: Mac,
}

/// What one node tells another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// These connections are there, and live so many seconds more if they say nothing.
    Hold(Vec<(Changed, u32)>),
    /// These have ended.
    Forget(Vec<Changed>),
    /// The sender knows of none, and wants to be told.
    Tell,
    /// These of the sender's pods have their pod's port, and live so many seconds more.
    Kept(Vec<(Changed, u32)>),
}

impl Message {
    /// As many messages of at most [`MOST`] bytes as it takes.
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let none = |changed: &Changed| (*changed, 0);
        match self {
            Message::Hold(connections) => encode(HOLD, connections),
            Message::Forget(connections) => encode(FORGET, &connections.iter().map(none).collect::<Vec<_>>()),
            Message::Tell => vec![begun(TELL)],
            Message::Kept(connections) => encode(KEPT, connections),
        }
    }

    /// `None`: it is no such message, or not as this version writes them.
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
            (HOLD, true) => Some(Message::Hold(connections)),
            (FORGET, true) => Some(Message::Forget(connections.into_iter().map(|(changed, _)| changed).collect())),
            (TELL, true) if connections.is_empty() => Some(Message::Tell),
            (KEPT, true) => Some(Message::Kept(connections)),
            _ => None,
        }
    }
}

fn begun(kind: u8) -> Vec<u8> {
    let mut message = Vec::with_capacity(MOST);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[kind, 0]);
    message
}

fn encode(kind: u8, connections: &[(Changed, u32)]) -> Vec<Vec<u8>> {
    let mut messages: Vec<Vec<u8>> = Vec::new();
    for (changed, seconds) in connections {
        let addresses = if changed.address.is_ipv4() { 3 * 4 } else { 3 * 16 };
        let fits = |m: &Vec<u8>| m.len() + FIXED + addresses <= MOST && m[HEADER - 1] < u8::MAX;
        if !messages.last().is_some_and(fits) {
            messages.push(begun(kind));
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
    fn any_number_of_both_families_is_read_as_it_was_written_and_no_message_is_too_long() {
        let all: Vec<_> = (1..400).map(|n| (changed(n, n % 3 == 0), u32::from(n) * 1000)).collect();
        for part in [&all[..0], &all[..1], &all[..37], &all[..]] {
            let messages = Message::Hold(part.to_vec()).encode();
            assert!(messages.iter().all(|m| m.len() <= MOST));
            let read = messages.iter().flat_map(|m| match Message::decode(m) {
                Some(Message::Hold(connections)) => connections,
                other => panic!("{other:?}"),
            });
            assert_eq!(read.collect::<Vec<_>>(), part);
        }
        let ended = Message::Forget(vec![changed(7, true)]);
        assert_eq!(Message::decode(&ended.encode()[0]), Some(ended));
        assert_eq!(Message::decode(&Message::Tell.encode()[0]), Some(Message::Tell));
        let kept = Message::Kept(vec![(changed(8, false), 9)]);
        assert_eq!(Message::decode(&kept.encode()[0]), Some(kept));
    }

    #[test]
    fn what_is_cut_off_too_long_or_of_another_version_is_no_message() {
        let whole = Message::Hold(vec![(changed(1, false), 5), (changed(2, true), 6)]).encode().remove(0);
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
