//! The headers of a packet, as the kernel's trace messages quote them.

use crate::model::trace::Flow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
/// TCP's flags from bit 0 on, RFC 9293.
const FLAGS: [&str; 6] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];

/// Reads the beginnings of the IP header and of the transport header. `None` if it is no IP packet, or the header is
/// incomplete. Of an IPv6 packet with extension headers the protocol is that of the first one.
pub fn parse(network: &[u8], transport: &[u8]) -> Option<Flow> {
    let (protocol, source, destination): (u8, IpAddr, IpAddr) = match network.first()? >> 4 {
        4 => {
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(network.get(at..at + 4)?).ok()?).into());
            (*network.get(9)?, address(12)?, address(16)?)
        }
        6 => {
            let address =
                |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(network.get(at..at + 16)?).ok()?).into());
            (*network.get(6)?, address(8)?, address(24)?)
        }
        _ => return None,
    };
    let number = |at: usize| transport.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]));
    let (source_port, destination_port, what) = match protocol {
        TCP => (number(0), number(2), flags(transport.get(13).copied().unwrap_or_default())),
        UDP | SCTP => (number(0), number(2), String::new()),
        ICMP | ICMPV6 => {
            let what = icmp(protocol, transport.first().copied().unwrap_or_default());
            // The identifier of an echo, RFC 792 and RFC 4443.
            (if what.starts_with("echo") { number(4) } else { 0 }, 0, what)
        }
        _ => (0, 0, String::new()),
    };
    Some(Flow { protocol, source, source_port, destination, destination_port, what })
}

fn flags(bits: u8) -> String {
    let set = FLAGS.iter().enumerate().filter(|(bit, _)| bits & 1 << bit != 0).map(|(_, name)| *name);
    set.collect::<Vec<_>>().join(",")
}

fn icmp(protocol: u8, kind: u8) -> String {
    match (protocol, kind) {
        (ICMP, 8) | (ICMPV6, 128) => "echo-request",
        (ICMP, 0) | (ICMPV6, 129) => "echo-reply",
        (ICMP, 3) | (ICMPV6, 1) => "destination-unreachable",
        (ICMPV6, 2) => "packet-too-big",
        (ICMP, 11) | (ICMPV6, 3) => "time-exceeded",
        (ICMP, 12) | (ICMPV6, 4) => "parameter-problem",
        _ => return format!("ICMP type {kind}"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn a_reply_is_read() {
        let network = [&[0x45, 0, 0, 44, 0, 0, 0, 0, 64, TCP, 0, 0][..], &[192, 0, 2, 1, 10, 0, 0, 9]].concat();
        let transport = [&[0x1f, 0x90, 0xee, 0x48][..], &[0; 9], &[0x12, 0, 0, 0, 0, 0, 0]].concat();
        let flow = parse(&network, &transport).unwrap();
        assert_eq!(
            (flow.from(), flow.to(), &*flow.what),
            ("192.0.2.1:8080".into(), "10.0.0.9:61000".into(), "SYN,ACK")
        );
        let flow = parse(&network, &[]).unwrap();
        assert_eq!((flow.from(), flow.what), ("192.0.2.1".into(), String::new()));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_within_their_bounds(network in vec(any::<u8>(), 0..48), transport in vec(any::<u8>(), 0..24)) {
            prop_assert!(parse(&network, &transport).is_none() || network.len() >= 20);
        }
    }
}
