//! Which of the kernel's trace messages are about the packets of one trace. The kernel sends all traces' messages, also
//! those of `nft monitor trace`, to all listeners.

use crate::datapath::names::TRACES;
use crate::datapath::packet_headers;
use crate::datapath::trace_table::REQUEST;
use crate::model::trace::{Flow, Protocol, TraceSpec};
use egret_nft::trace::{Kind, Step};
use std::collections::BTreeMap;

/// How many packets are remembered.
const PACKETS: usize = 256;

/// Recognises the packets of a trace.
pub struct Filter {
    request: TraceSpec,
    /// The trace's own table.
    table: &'static str,
    /// The kernel's numbers of the packets, and whether each is a reply.
    packets: BTreeMap<u32, bool>,
}

/// A step of a packet of the trace.
pub struct Recognised {
    /// Whether the packet is a reply.
    pub is_reply: bool,
    /// The packet, if this is its first step in a base chain.
    pub flow: Option<Flow>,
}

impl Filter {
    /// For the trace that has this table.
    pub fn new(request: TraceSpec, table: &'static str) -> Self {
        Filter { request, table, packets: BTreeMap::new() }
    }

    /// Recognises a step. `None` for other packets, and for the steps in traces' own tables.
    pub fn recognise(&mut self, step: &Step) -> Option<Recognised> {
        let flow = step.packet.as_ref().and_then(|packet| packet_headers::parse(&packet.network, &packet.transport));
        if TRACES.contains(&&*step.table) {
            if step.table == self.table && matches!(step.kind, Kind::Rule { .. }) {
                self.marked(step, flow.as_ref());
            }
            return None;
        }
        // A packet gets another number behind a bridge, and where a packet socket looks at it.
        if let (None, Some(is_reply)) =
            (self.packets.get(&step.id), flow.as_ref().and_then(|flow| self.direction(flow)))
        {
            self.remember(step.id, is_reply);
        }
        let is_reply = *self.packets.get(&step.id)?;
        Some(Recognised { is_reply, flow })
    }

    /// The trace's own rule has matched a packet.
    fn marked(&mut self, step: &Step, flow: Option<&Flow>) {
        self.remember(step.id, step.chain != REQUEST);
        // The first packet that the pod has sent is the one that is traced.
        if let (None, Some(flow)) = (self.request.source_port, flow)
            && step.chain == REQUEST
        {
            self.request.source_port = Some(flow.source_port);
        }
    }

    fn remember(&mut self, id: u32, is_reply: bool) {
        if self.packets.len() >= PACKETS {
            self.packets.clear();
        }
        self.packets.insert(id, is_reply);
    }

    /// Whether a packet with these addresses and ports is a reply, if it is one of the trace's.
    fn direction(&self, flow: &Flow) -> Option<bool> {
        let TraceSpec { source, destination, protocol, port, source_port, .. } = &self.request;
        if flow.protocol != protocol.number(*destination) {
            return None;
        }
        let own = source_port.unwrap_or_default();
        if *protocol == Protocol::Icmp {
            let is_echo = flow.source_port == own && flow.what.starts_with("echo");
            let (out, back) = (flow.what == "echo-request", flow.what == "echo-reply");
            return match is_echo {
                true if out && (flow.source == *source || flow.destination == *destination) => Some(false),
                true if back && (flow.destination == *source || flow.source == *destination) => Some(true),
                _ => None,
            };
        }
        let out =
            flow.source_port == own && (flow.source == *source || self.is_at(flow.destination, flow.destination_port));
        let back =
            flow.destination_port == own && (flow.destination == *source || self.is_at(flow.source, flow.source_port));
        let is_of_port = |other: u16| *port == other || flow.source == *source || flow.destination == *source;
        match (out, back) {
            (true, _) if is_of_port(flow.destination_port) => Some(false),
            (_, true) if is_of_port(flow.source_port) => Some(true),
            _ => None,
        }
    }

    fn is_at(&self, address: std::net::IpAddr, port: u16) -> bool {
        address == self.request.destination && port == self.request.port
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::trace_request;
    use egret_nft::trace::{Packet, Verdict};

    fn request(source_port: Option<u16>) -> TraceSpec {
        let (source, destination) = ("10.0.0.9".parse().unwrap(), "192.0.2.1".parse().unwrap());
        TraceSpec { source, destination, protocol: Protocol::Udp, port: 53, ..trace_request(source_port) }
    }

    fn step(id: u32, table: &str, chain: &str, ends: Option<([u8; 4], u16, [u8; 4], u16)>) -> Step {
        let packet = ends.map(|(from, sport, to, dport)| Packet {
            network: [&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0][..], &from, &to].concat(),
            transport: [sport.to_be_bytes(), dport.to_be_bytes(), [0, 8], [0, 0]].concat(),
            ..Packet::default()
        });
        let kind = Kind::Rule { handle: 1, verdict: Verdict::Accept };
        Step { id, family: 1, table: table.into(), chain: chain.into(), kind, mark: 0, packet }
    }

    const POD: [u8; 4] = [10, 0, 0, 9];
    const SERVER: [u8; 4] = [192, 0, 2, 1];
    const EGRESS: [u8; 4] = [192, 0, 2, 50];

    fn seen(filter: &mut Filter, step: &Step) -> Option<bool> {
        filter.recognise(step).map(|seen| seen.is_reply)
    }

    #[test]
    fn packets_are_known_by_the_own_table_by_their_number_and_by_their_addresses() {
        let mut filter = Filter::new(request(Some(61_000)), "egret-trace");
        assert_eq!(seen(&mut filter, &step(1, "egret-trace", REQUEST, Some((POD, 61_000, SERVER, 53)))), None);
        assert_eq!(seen(&mut filter, &step(1, "egret", "raw", None)), Some(false));
        // Behind the bridge it has another number, and then another source.
        assert_eq!(seen(&mut filter, &step(2, "egret", "raw", Some((POD, 61_000, SERVER, 53)))), Some(false));
        assert_eq!(seen(&mut filter, &step(3, "egret", "guard", Some((EGRESS, 61_000, SERVER, 53)))), Some(false));
        assert_eq!(seen(&mut filter, &step(4, "egret", "guard", Some((SERVER, 53, EGRESS, 61_000)))), Some(true));
        assert_eq!(seen(&mut filter, &step(5, "egret-trace", "reply", None)), None);
        assert_eq!(seen(&mut filter, &step(5, "egret", "prerouting", None)), Some(true));
        for other in [(POD, 61_001, SERVER, 53), (EGRESS, 61_000, SERVER, 54), (SERVER, 54, EGRESS, 61_000)] {
            assert_eq!(seen(&mut filter, &step(9, "egret", "raw", Some(other))), None, "{other:?}");
        }
        assert_eq!(seen(&mut filter, &step(10, "egret", "raw", None)), None);
        // The packet passes the chain of replies, too, where no rule matches it.
        let passes = Step { kind: Kind::Policy(Verdict::Accept), ..step(1, "egret-trace", "reply", None) };
        assert_eq!(seen(&mut filter, &passes), None);
        assert_eq!(seen(&mut filter, &step(1, "egret", "srcnat", None)), Some(false));
        assert_eq!(seen(&mut filter, &step(1, "egret-trace-3", "reply", None)), None);
    }

    #[test]
    fn the_pods_next_packet_says_what_its_port_is() {
        let mut filter = Filter::new(request(None), "egret-trace-2");
        let next = step(1, "egret-trace-2", REQUEST, Some((POD, 40_000, SERVER, 53)));
        assert_eq!(seen(&mut filter, &next), None);
        assert_eq!(seen(&mut filter, &step(2, "x", "y", Some((SERVER, 53, POD, 40_000)))), Some(true));
        assert_eq!(seen(&mut filter, &step(3, "x", "y", Some((SERVER, 53, POD, 40_001)))), None);
    }
}
