//! The packet that a trace sends: one TCP SYN, one UDP datagram or one ICMP echo request.

use crate::datapath::frames::{ETH_P_IPV6, checksum, ethernet};
use crate::model::trace::{Protocol, TraceSpec};
use egret_nft::mac::Mac;
use std::net::IpAddr;

const ETH_P_IP: u16 = 0x0800;
/// What a host sends itself has this hop limit by default.
const HOP_LIMIT: u8 = 64;
const ICMP: u8 = 1;
const SYN: u8 = 0x02;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
/// What a packet says for who looks at it.
const TEXT: &[u8] = b"egret trace ";
/// The UDP port of DNS.
const DNS: u16 = 53;
/// A question for the root's name servers (RFC 1035): any DNS server answers it, and none answers [`TEXT`].
const QUESTION: [u8; 17] = [0x65, 0x67, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];

/// The frame from the pod's interface to its gateway. `sequence` is TCP's first sequence number.
pub fn frame(request: &TraceSpec, source_port: u16, sequence: u32, from: Mac, to: Mac) -> Vec<u8> {
    let mut body = match request.protocol {
        Protocol::Tcp => syn(source_port, request.port, sequence),
        Protocol::Udp => datagram(source_port, request.port),
        Protocol::Icmp => echo(request.destination, source_port),
    };
    let number = request.protocol.number(request.destination);
    let at = match request.protocol {
        Protocol::Tcp => 16,
        Protocol::Udp => 6,
        Protocol::Icmp => 2,
    };
    let has_pseudo_header = number != ICMP;
    let sum = match has_pseudo_header {
        true => of_transport(&octets(request.source), &octets(request.destination), number, &body),
        false => checksum(&even(&body)),
    };
    // UDP says 0xffff for a sum of 0, which means that there is none (RFC 768).
    let sum = if sum == 0 && request.protocol == Protocol::Udp { 0xffff } else { sum };
    body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let is_ipv4 = request.destination.is_ipv4();
    let mut frame = ethernet(to, from, if is_ipv4 { ETH_P_IP } else { ETH_P_IPV6 });
    frame.extend(header(request, number, body.len() as u16));
    frame.extend(body);
    frame
}

fn header(request: &TraceSpec, number: u8, length: u16) -> Vec<u8> {
    let (source, destination) = (octets(request.source), octets(request.destination));
    if request.destination.is_ipv6() {
        let [a, b] = length.to_be_bytes();
        return [&[0x60, 0, 0, 0, a, b, number, HOP_LIMIT][..], &source, &destination].concat();
    }
    let [a, b] = (length + 20).to_be_bytes();
    // Don't fragment (RFC 791): the identification means nothing then (RFC 6864).
    let mut header = [&[0x45, 0, a, b, 0, 0, 0x40, 0, HOP_LIMIT, number, 0, 0][..], &source, &destination].concat();
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

/// With the option MSS, as every SYN has.
fn syn(source: u16, destination: u16, sequence: u32) -> Vec<u8> {
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    let rest = [0, 0, 0, 0, 6 << 4, SYN, 0xfa, 0xf0, 0, 0, 0, 0, 2, 4, 0x05, 0xa0];
    [&ports[..], &sequence.to_be_bytes(), &rest].concat()
}

fn datagram(source: u16, destination: u16) -> Vec<u8> {
    let payload = if destination == DNS { &QUESTION[..] } else { TEXT };
    let length = 8 + payload.len() as u16;
    let header = [source, destination, length, 0].map(u16::to_be_bytes).concat();
    [&header[..], payload].concat()
}

fn echo(to: IpAddr, identifier: u16) -> Vec<u8> {
    let kind = if to.is_ipv4() { ECHO_REQUEST } else { ECHO_REQUEST_V6 };
    let [a, b] = identifier.to_be_bytes();
    [&[kind, 0, 0, 0, a, b, 0, 1][..], TEXT].concat()
}

/// The checksum with the pseudo-header (RFC 9293, RFC 8200 section 8.1). The order of its fields does not matter.
fn of_transport(source: &[u8], destination: &[u8], number: u8, body: &[u8]) -> u16 {
    let [a, b] = (body.len() as u16).to_be_bytes();
    checksum(&[source, destination, &[0, number, a, b], &even(body)].concat())
}

fn even(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    bytes
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::packet_headers;

    fn request(protocol: Protocol, ends: [&str; 2], port: u16) -> TraceSpec {
        let [source, destination] = ends.map(|a| a.parse().unwrap());
        let (node, namespace, pod) = Default::default();
        TraceSpec { node, namespace, pod, source, destination, protocol, port, source_port: Some(61_000), seconds: 5 }
    }

    /// The sum over what the checksum covers, the checksum included, is zero.
    #[test]
    fn packets_have_right_checksums() {
        for ends in [["10.244.1.2", "192.0.2.100"], ["fd00::2", "2001:db8::100"]] {
            let at = if ends[0].contains(':') { 40 } else { 20 };
            for (protocol, port) in
                [(Protocol::Tcp, 443), (Protocol::Udp, 9001), (Protocol::Udp, DNS), (Protocol::Icmp, 0)]
            {
                let request = request(protocol, ends, port);
                let frame = frame(&request, 61_000, 7, [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
                let (network, body) = (&frame[14..14 + at], &frame[14 + at..]);
                let flow = packet_headers::parse(network, body).unwrap();
                assert_eq!((flow.source, flow.destination), (request.source, request.destination));
                assert_eq!((flow.source_port, flow.destination_port), (61_000, port), "{protocol}");
                let number = protocol.number(request.destination);
                let sum = match (protocol, at) {
                    (Protocol::Icmp, 20) => checksum(&even(body)),
                    _ => of_transport(&octets(request.source), &octets(request.destination), number, body),
                };
                assert_eq!(sum, 0, "{protocol} {ends:?}");
                if at == 20 {
                    assert_eq!(checksum(network), 0);
                }
                let length = if at == 20 { &network[2..4] } else { &network[4..6] };
                let length = u16::from_be_bytes([length[0], length[1]]);
                assert_eq!(usize::from(length), if at == 20 { frame.len() - 14 } else { body.len() });
            }
        }
        assert_eq!(syn(1, 2, 3).len(), 24);
    }
}
