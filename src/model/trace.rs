//! Traces of a packet's way: what a node's daemon and `kubectl egret trace` say to each other, as lines of JSON.
//!
//! The command sends a [`TraceSpec`] to the daemon of the pod's node, and then to those of the nodes that hold the pod's
//! egress IPs. Each answers [`TraceEvent::Armed`] when it sees the packets that are asked for. On [`GO`], the daemon of the
//! pod's node sends the probe. Each tells of the packets' way until the command closes the connection, or the time is
//! over.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// The verb of a request to the daemon.
pub const VERB: &str = "TRACE";
/// The line that makes the pod's node send the probe.
pub const GO: &str = "go";
/// How long a trace lasts at most, seconds.
pub const MAX_SECONDS: u64 = 30;

/// The protocol of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, or ICMPv6 to an IPv6 address.
    Icmp,
}

/// What a daemon is to trace: packets of one pod to one destination, and the replies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceSpec {
    /// The pod's node. Its daemon looks at what comes out of the pod, others at what comes out of the tunnel.
    pub node: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's address.
    pub source: IpAddr,
    /// The destination's address, as the pod writes it.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination's port; 0 for ICMP.
    pub port: u16,
    /// The probe's source port, or for ICMP its identifier. `None`: the pod's next own packet is traced.
    pub source_port: Option<u16>,
    /// How long to trace, seconds.
    pub seconds: u64,
}

/// What a daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum TraceEvent {
    /// The trace has begun.
    Armed(Armed),
    /// The probe was sent.
    Sent,
    /// A packet went a step.
    Step(TraceStep),
    /// The packet cannot be traced, or the probe cannot be sent.
    Refused {
        /// Why, with the remedy.
        message: String,
    },
    /// The time is over.
    Ended,
    /// The kernel dropped messages, so that steps are missing.
    Lost,
}

/// The beginning of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Armed {
    /// The daemon's node.
    pub node: String,
    /// Why the node is not in sync.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// On the pod's node, the host's end of the pod's veth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// On the pod's node, the egress IPs that the pod can have.
    pub egress_ips: Vec<EgressIp>,
}

/// Where the pod's node sends packets that leave from an egress IP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressIp {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// The node that holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Why packets are dropped, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<String>,
}

/// A step of a packet's way: a rule matched it, a chain returned, or a chain's policy decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceStep {
    /// Microseconds since the trace began on this node.
    pub at: u64,
    /// The kernel's number of the packet.
    pub packet: u32,
    /// Whether it is a reply.
    pub is_reply: bool,
    /// Family and name of the table, as `inet egret`.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule, in the syntax of nft; of other programs' rules their handle, which `nft -a list table` shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// What follows: `accept`, `drop`, `jump CHAIN`, `continue` and so on.
    pub verdict: String,
    /// The packet as it came into the base chain, in the first step there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow: Option<Flow>,
    /// The interface that it came in by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The interface that it leaves by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// The addresses and ports of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// The number of the IP protocol.
    pub protocol: u8,
    /// The source address.
    pub source: IpAddr,
    /// The source port, or the identifier of an ICMP echo.
    pub source_port: u16,
    /// The destination address.
    pub destination: IpAddr,
    /// The destination port; 0 for ICMP.
    pub destination_port: u16,
    /// What kind of packet it is: `SYN,ACK`, `echo-reply`, `destination-unreachable`; empty for UDP.
    pub what: String,
}

impl TraceStep {
    /// Whether the packet ended here.
    pub fn is_drop(&self) -> bool {
        self.verdict == "drop"
    }

    /// Whether the chain is one of Egret's.
    pub fn is_of_egret(&self) -> bool {
        self.table.split(' ').nth(1).is_some_and(|name| name.split('-').next() == Some("egret"))
    }
}

impl Protocol {
    /// The number of the IP protocol towards this address.
    pub fn number(self, to: IpAddr) -> u8 {
        match (self, to) {
            (Protocol::Tcp, _) => 6,
            (Protocol::Udp, _) => 17,
            (Protocol::Icmp, IpAddr::V4(_)) => 1,
            (Protocol::Icmp, IpAddr::V6(_)) => 58,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Icmp => "ICMP",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match &*text.to_ascii_lowercase() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "icmp" => Ok(Protocol::Icmp),
            _ => Err(format!("{text:?} cannot be traced; write tcp, udp or icmp")),
        }
    }
}

impl Flow {
    fn end(address: IpAddr, port: u16) -> String {
        if port == 0 { address.to_string() } else { SocketAddr::new(address, port).to_string() }
    }

    /// The source with its port.
    pub fn from(&self) -> String {
        Flow::end(self.source, self.source_port)
    }

    /// The destination with its port.
    pub fn to(&self) -> String {
        Flow::end(self.destination, self.destination_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_of_json_that_are_read_back() {
        let flow = Flow {
            protocol: 6,
            source: "2001:db8::1".parse().unwrap(),
            source_port: 61_000,
            destination: "2001:db8::2".parse().unwrap(),
            destination_port: 443,
            what: "SYN".into(),
        };
        assert_eq!((flow.from(), flow.to()), ("[2001:db8::1]:61000".into(), "[2001:db8::2]:443".into()));
        let step = TraceStep {
            at: 5,
            packet: 1,
            is_reply: false,
            table: "inet egret-flush-guard".into(),
            chain: "known".into(),
            rule: None,
            verdict: "drop".into(),
            flow: Some(flow),
            input: Some("eth0".into()),
            output: None,
        };
        assert!(step.is_drop() && step.is_of_egret());
        assert!(!TraceStep { table: "ip egrets".into(), ..step.clone() }.is_of_egret());
        for event in [TraceEvent::Sent, TraceEvent::Step(step), TraceEvent::Armed(Armed::default()), TraceEvent::Lost] {
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<TraceEvent>(&line).unwrap(), event, "{line}");
        }
        assert!("sctp".parse::<Protocol>().unwrap_err().contains("tcp, udp or icmp"));
    }
}
