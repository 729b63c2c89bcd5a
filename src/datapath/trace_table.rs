//! The table that makes the kernel tell of the way of a pod's packets, while somebody traces them.
//!
//! The trace's socket owns the table without `NFT_TABLE_F_PERSIST`, so the table goes with the socket, whatever ends the
//! daemon. It is a table of its own, in front of all others, so that Egret's other tables stay as they are. Each rule
//! marks a few packets only: the kernel sends a message for each step of a marked packet.

use crate::datapath::names::DEVICE_GROUP;
use crate::model::trace::{Protocol, TraceSpec};
use egret_nft::rule::{Rule, protocol};
use egret_nft::table::{Chain, Hook, Lifetime, Policy, Table, hook};
use egret_nft::uapi::{ICMP_ECHO_REQUEST, ICMPV6_ECHO_REQUEST};
use std::net::IpAddr;
use std::sync::Arc;

/// The chain of packets from the pod.
pub const REQUEST: &str = "request";
/// The chain of replies from elsewhere.
pub const REPLY: &str = "reply";
/// The chain of replies that this host makes: an ICMP error, or a firewall's reset.
pub const REPLY_FROM_HERE: &str = "reply-from-here";

/// In front of the chain on the pod's veth, at 0.
const ON_VETH: i32 = -10;
/// In front of `raw`, at -300.
const FROM_TUNNEL: i32 = -400;
/// Behind connection tracking, at -200, which says of what connection a packet is.
const TRACKED: i32 = -199;
/// Replies to the probe that are traced: a server sends its SYN-ACK again.
const REPLIES: u32 = 4;
/// Packets that a node other than the pod's traces while it waits for one: it cannot know which one the pod's node has
/// chosen.
const WAITING: u32 = 64;

/// The table. `veth` is the host's end of the pod's veth; without it the packets come out of the tunnel.
pub fn table(request: &TraceSpec, veth: Option<&str>) -> Table {
    let base = |number, priority, device: Option<&str>| {
        let device = device.map(str::to_owned);
        Some(Hook { kind: "filter".into(), number, priority, policy: Policy::Accept, device })
    };
    let entrance = match veth {
        Some(name) => base(hook::INGRESS, ON_VETH, Some(name)),
        None => base(hook::PREROUTING, FROM_TUNNEL, None),
    };
    let reply = || vec![reply(request)];
    let chains = [
        (REQUEST, Chain::new(entrance, vec![self::request(request, veth.is_some())])),
        (REPLY, Chain::new(base(hook::PREROUTING, TRACKED, None), reply())),
        (REPLY_FROM_HERE, Chain::new(base(hook::OUTPUT, TRACKED, None), reply())),
    ];
    let chains = chains.into_iter().map(|(name, chain)| (name.into(), Arc::new(chain))).collect();
    Table { chains, lifetime: Lifetime::OfSocket, ..Table::default() }
}

fn request(of: &TraceSpec, is_on_veth: bool) -> Rule {
    let rule = if is_on_veth { Rule::new() } else { Rule::new().iif_group(DEVICE_GROUP) };
    let rule = rule.saddr_in(of.source.into());
    // What comes out of the tunnel is for a Service's backend already; a probe's source port says enough.
    let is_probe = of.source_port.is_some();
    let by_address = is_on_veth || !is_probe || of.protocol == Protocol::Icmp;
    let rule = if by_address { rule.daddr_in(of.destination.into()) } else { rule };
    let rule = match (of.protocol, of.source) {
        (Protocol::Icmp, IpAddr::V4(_)) => rule.l4(protocol::ICMP).icmp_type(ICMP_ECHO_REQUEST),
        (Protocol::Icmp, IpAddr::V6(_)) => rule.l4(protocol::ICMPV6).icmp_type(ICMPV6_ECHO_REQUEST),
        (Protocol::Tcp, _) => ports(rule.l4(protocol::TCP), of, by_address),
        (Protocol::Udp, _) => ports(rule.l4(protocol::UDP), of, by_address),
    };
    rule.limit_burst(if is_on_veth || is_probe { 1 } else { WAITING }).trace()
}

fn ports(rule: Rule, of: &TraceSpec, by_address: bool) -> Rule {
    let rule = of.source_port.into_iter().fold(rule, Rule::sport);
    if by_address { rule.dport(of.port) } else { rule }
}

/// By the connection that the pod began, also of an ICMP error about it.
fn reply(of: &TraceSpec) -> Rule {
    let rule = Rule::new().ct_reply().ct_original_saddr(of.source);
    let rule = rule.ct_original_protocol(of.protocol.number(of.destination));
    let rule = match of.source_port {
        Some(port) => rule.ct_original_sport(port),
        None if of.protocol == Protocol::Icmp => rule.ct_original_daddr(of.destination),
        None => rule.ct_original_daddr(of.destination).ct_original_dport(of.port),
    };
    rule.limit_burst(if of.source_port.is_some() { REPLIES } else { WAITING }).trace()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::trace_request;
    use egret_nft::table::TableName;
    use egret_nft::text::Listing;
    use egret_nft::uapi::NFPROTO_INET;

    fn listing(request: &TraceSpec, veth: Option<&str>) -> String {
        let name = TableName { family: NFPROTO_INET, name: "egret-trace" };
        Listing { name, table: &table(request, veth), interfaces: &Default::default() }.to_string()
    }

    #[test]
    fn only_packets_of_the_pod_to_the_destination_are_traced_and_only_a_few() {
        let mut request = trace_request(Some(61_000));
        let text = listing(&request, Some("veth1"));
        for words in [
            "hook ingress device \"veth1\" priority filter - 10",
            "ip saddr 10.244.1.2 ip daddr 192.0.2.100 tcp sport 61000 tcp dport 443 limit rate 1/hour burst 1 packets meta nftrace set 1",
            "ct direction reply ct original ip saddr 10.244.1.2 ct original protocol tcp ct original proto-src 61000 limit rate 1/hour burst 4 packets meta nftrace set 1",
        ] {
            assert!(text.contains(words), "{words} is not in {text}");
        }
        let text = listing(&request, None);
        assert!(text.contains("iifgroup 7871 ip saddr 10.244.1.2 tcp sport 61000 limit"), "{text}");
        request.source_port = None;
        let text = listing(&request, None);
        assert!(text.contains("ip daddr 192.0.2.100 tcp dport 443 limit rate 1/hour burst 64"), "{text}");
        let icmp = TraceSpec { protocol: Protocol::Icmp, port: 0, source_port: Some(7), ..request };
        let text = listing(&icmp, None);
        assert!(text.contains("ip daddr 192.0.2.100 icmp type echo-request limit rate 1/hour burst 1"), "{text}");
    }
}
