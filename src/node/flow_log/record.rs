//! A record: one line of JSON.

use egret_nft::conntrack::{ConnectionEvent, Traffic, Tuple};
use egret_nft::rule::protocol::{ICMP, ICMPV6, TCP, UDP};
use serde::Serialize;
use std::borrow::Cow;
use std::net::IpAddr;

const SCTP: u8 = 132;
const UDPLITE: u8 = 136;
const DCCP: u8 = 33;

/// The fields of a line. Unknown ones are left out.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record<'a> {
    /// RFC 3339, in UTC, with microseconds.
    pub time: &'a str,
    pub event: &'static str,
    /// The kernel's id, the same in both lines of a connection.
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<&'a str>,
    pub pod_address: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<&'a str>,
    pub egress_node: &'a str,
    #[serde(rename = "egressIP")]
    pub egress_ip: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    pub destination: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
    pub protocol: Cow<'static, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_sent: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_sent: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_received: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_received: Option<u64>,
}

impl<'a> Record<'a> {
    /// Fills in what the kernel reports about the connection.
    pub(super) fn of(event: &ConnectionEvent, time: &'a str, egress_node: &'a str) -> Self {
        let ConnectionEvent { ended, out, back, id, sent, received, .. } = *event;
        let port = |port: u16| has_ports(out.protocol).then_some(port);
        let packets = |traffic: Option<Traffic>| traffic.map(|traffic| traffic.packets);
        let bytes = |traffic: Option<Traffic>| traffic.map(|traffic| traffic.bytes);
        Record {
            time,
            event: if ended { "end" } else { "begin" },
            connection: id,
            pod_namespace: None,
            pod_name: None,
            pod_uid: None,
            pod_address: out.source,
            pod_port: port(out.ports[0]),
            node: None,
            policy: None,
            gateway: None,
            egress_node,
            egress_ip: back.destination,
            egress_port: port(back.ports[1]),
            destination: back.source,
            destination_port: port(back.ports[0]),
            protocol: protocol(out.protocol),
            packets_sent: packets(sent),
            bytes_sent: bytes(sent),
            packets_received: packets(received),
            bytes_received: bytes(received),
        }
    }

    /// Appends the line.
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        let begin = to.len();
        match serde_json::to_writer(&mut *to, self) {
            Ok(()) => to.push(b'\n'),
            // A write to memory does not fail.
            Err(_) => to.truncate(begin),
        }
    }
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP | UDPLITE | DCCP)
}

/// The destination port of a connection, if its protocol has ports.
pub(super) fn destination_port(out: &Tuple) -> Option<u16> {
    has_ports(out.protocol).then_some(out.ports[1])
}

/// The name of a protocol, or its number.
fn protocol(number: u8) -> Cow<'static, str> {
    match number {
        TCP => "tcp".into(),
        UDP => "udp".into(),
        ICMP => "icmp".into(),
        ICMPV6 => "icmpv6".into(),
        SCTP => "sctp".into(),
        UDPLITE => "udplite".into(),
        DCCP => "dccp".into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "1970-01-01T00:00:00.000000Z";

    fn event(protocol: u8) -> ConnectionEvent {
        let out = Tuple {
            source: "10.244.1.5".parse().unwrap(),
            destination: "198.51.100.7".parse().unwrap(),
            protocol,
            ports: [40_000, 443],
        };
        let back = Tuple { destination: "192.0.2.50".parse().unwrap(), ports: [443, 1025], ..out.reversed() };
        let sent = Some(Traffic { packets: 5, bytes: 600 });
        ConnectionEvent { ended: true, out, back, mark: 0, id: 7, sent, received: None }
    }

    #[test]
    fn a_record_is_one_line_with_what_is_known() {
        let mut text = Vec::new();
        let mut record = Record::of(&event(TCP), TIME, "g1");
        (record.pod_namespace, record.pod_name) = (Some("shop"), Some("a"));
        record.write(&mut text);
        Record::of(&event(ICMP), TIME, "g1").write(&mut text);
        let lines = "{\"time\":\"1970-01-01T00:00:00.000000Z\",\"event\":\"end\",\"connection\":7,\"podNamespace\":\"shop\",\
            \"podName\":\"a\",\"podAddress\":\"10.244.1.5\",\"podPort\":40000,\"egressNode\":\"g1\",\
            \"egressIP\":\"192.0.2.50\",\"egressPort\":1025,\"destination\":\"198.51.100.7\",\"destinationPort\":443,\
            \"protocol\":\"tcp\",\"packetsSent\":5,\"bytesSent\":600}\n\
            {\"time\":\"1970-01-01T00:00:00.000000Z\",\"event\":\"end\",\"connection\":7,\"podAddress\":\"10.244.1.5\",\
            \"egressNode\":\"g1\",\"egressIP\":\"192.0.2.50\",\"destination\":\"198.51.100.7\",\"protocol\":\"icmp\",\
            \"packetsSent\":5,\"bytesSent\":600}\n";
        assert_eq!(String::from_utf8(text).unwrap(), lines);
    }
}
