//! Packets to egress IPs that belong to no connection.

use super::{counter, set};
use crate::datapath::names::DEVICE;
use egret_nft::Family;
use egret_nft::rule::{Rule, protocol};
use egret_nft::uapi::*;

/// Drops packets to an egress IP that belong to no connection. An answer to a sender that this gateway does not know
/// would reset a connection that has just moved here from another gateway. An entry in the connection table would
/// occupy the port that this connection needs. An echo request needs no port: it passes if the gateway allows it and
/// the address is on this node.
///
/// New connections to the address of a Service are the Service's, or the host's. kube-proxy has translated most of them
/// before this chain, and in IPVS mode it does so later. Only TCP packets that begin no connection are dropped.
///
/// In a VRF, the kernel finds the address by the interface alone. When the packet passes the hook again, for the VRF, the
/// interface is another one; the first time has decided.
pub(super) fn unsolicited(from_vrf: bool) -> Vec<Rule> {
    let asks = |ip| match ip {
        Family::V4 => Rule::new().l4(protocol::ICMP).icmp_type(ICMP_ECHO_REQUEST),
        Family::V6 => Rule::new().l4(protocol::ICMPV6).icmp_type(ICMPV6_ECHO_REQUEST),
    };
    let asked = |(at, ip)| asks(ip).daddr_in_set(ip, set::PING[at]);
    let ping = |which| asked(which).daddr_type(RTN_LOCAL).return_();
    let in_vrf = |which| [asked(which).daddr_type_at_iif(RTN_LOCAL).return_(), asked(which).from_vrf().return_()];
    let dropped = |rule: Rule| rule.counter(counter::UNSOLICITED).drop();
    let to_egress = |(at, ip)| dropped(Rule::new().daddr_in_set(ip, set::EGRESS[at]));
    let to_service = |(at, ip)| dropped(Rule::new().daddr_in_set(ip, set::SERVICES[at]).tcp_not_syn());
    let each = || Family::BOTH.into_iter().enumerate();
    // The tunnel device should be in its group. If it is not, no new connection is accepted from it.
    let arrived = Rule::new().iif(DEVICE).counter(counter::UNKNOWN).drop();
    let in_vrf = each().filter(|_| from_vrf).flat_map(in_vrf);
    each().map(ping).chain(in_vrf).chain(each().map(to_egress)).chain(each().map(to_service)).chain([arrived]).collect()
}
