//! The chains that are the same on every node. Each rule costs every packet that comes to it, so what most packets have
//! nothing to do with is a chain of its own, behind one rule.

use super::sets::PORT_BITS;
use super::{base, counter, set};
use crate::kernel::names::{ASKING, DEVICE, HEALTH, HUB_MAC, TUNNEL_PORT};
use crate::kernel::nft::rule::{Ip, Rule, protocol};
use crate::kernel::nft::table::{Chain, hook};
use crate::kernel::nft::uapi::*;
use crate::plan::marks::Marks;

/// Types of ICMPv6 messages, RFC 4443.
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// Of an ICMP message, RFC 792.
const ECHO_REQUEST4: u8 = 8;
/// What VXLAN's group-based policy carries of a mark. In a request it is the path id, in a reply a peer's index with
/// bit 15 set, which is no path.
const WIRE_MASK: u32 = 0xffff;
/// What nobody has forwarded.
const HOP_LIMIT: u8 = 255;

/// All of them but the tunnel device's, by name.
pub(super) fn chains(marks: Marks) -> Vec<(&'static str, Chain)> {
    let at = |number, priority| base("filter", number, priority);
    vec![
        ("raw", Chain::new(at(hook::PREROUTING, -300), raw())),
        ("raw-tunnel", Chain::new(None, raw_tunnel())),
        ("input", Chain::new(at(hook::INPUT, -300), vec![tunnel_packet().goto("input-tunnel")])),
        ("input-tunnel", Chain::new(None, input_tunnel())),
        ("output", Chain::new(at(hook::OUTPUT, -300), output())),
        ("output-tunnel", Chain::new(None, output_tunnel())),
        ("prerouting", Chain::new(at(hook::PREROUTING, -90), prerouting(marks))),
        ("from-tunnel", Chain::new(None, from_tunnel(marks))),
        ("tracked", Chain::new(None, tracked(marks))),
        ("unsolicited", Chain::new(None, unsolicited())),
        ("known", Chain::new(None, known())),
        ("guard", Chain::new(at(hook::FORWARD, -225), guard(marks))),
        ("guard-arrived", Chain::new(None, guard_arrived(marks))),
        ("guard-late", Chain::new(None, guard_late(marks))),
        ("guard-path", Chain::new(None, guard_path(marks))),
        ("guard-tunnel", Chain::new(None, guard_tunnel())),
        ("srcnat", Chain::new(base("nat", hook::POSTROUTING, 99), srcnat(marks))),
        ("departure", Chain::new(at(hook::POSTROUTING, 300), departure(marks))),
        ("departure-path", Chain::new(None, departure_path(marks))),
        ("departure-first", Chain::new(None, departure_first())),
        ("departure-tunnel", Chain::new(None, departure_tunnel())),
        ("departure-translated", Chain::new(None, departure_translated())),
    ]
}

/// Tunnel packets between nodes need no connection tracking, nor do nodes' questions whether others live.
fn raw() -> Vec<Rule> {
    let echo = echo().map(|rule| rule.iif(DEVICE).notrack());
    [not_ours(), tunnel_packet().goto("raw-tunnel")].into_iter().chain(echo).collect()
}

fn raw_tunnel() -> Vec<Rule> {
    Ip::BOTH.into_iter().enumerate().map(|(at, ip)| Rule::new().saddr_in_set(ip, set::TUNNEL[at]).notrack()).collect()
}

/// Nodes' questions whether others live, and the answers: the kernel's own, and never forwarded.
fn echo() -> impl Iterator<Item = Rule> {
    [(ECHO_REQUEST, ASKING, HEALTH), (ECHO_REPLY, HEALTH, ASKING)].into_iter().map(|(kind, from, to)| {
        let between = Rule::new().l4(protocol::ICMPV6).saddr_in(from.into()).daddr_in(to.into());
        between.hop_limit(HOP_LIMIT).icmp_type(kind)
    })
}

/// Neither a tunnel packet nor a question: most packets are not.
fn not_ours() -> Rule {
    Rule::new().l4(protocol::TCP).accept()
}

fn tunnel_packet() -> Rule {
    Rule::new().l4(protocol::UDP).dport(TUNNEL_PORT, TUNNEL_PORT)
}

/// Only nodes may speak to the tunnel: the path id that a packet carries is believed.
fn input_tunnel() -> Vec<Rule> {
    let stranger = |(at, ip)| Rule::new().saddr_not_in_set(ip, set::TUNNEL[at]).counter(counter::FOREIGN).drop();
    Ip::BOTH.into_iter().enumerate().map(stranger).collect()
}

fn output() -> Vec<Rule> {
    let echo = echo().map(|rule| rule.oif(DEVICE).notrack());
    [not_ours(), tunnel_packet().goto("output-tunnel")].into_iter().chain(echo).collect()
}

/// The outer packet inherits the inner one's mark, which would route it into the tunnel again.
fn output_tunnel() -> Vec<Rule> {
    let ours = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]).set_mark(0).notrack();
    Ip::BOTH.into_iter().enumerate().map(ours).collect()
}

/// After connection tracking and destination NAT: a Service's address is already its backend's.
fn prerouting(marks: Marks) -> Vec<Rule> {
    let path = marks.connection(0);
    vec![
        Rule::new().iif(DEVICE).goto("from-tunnel"),
        Rule::new().ct_mark(marks.connection_mask(), path).jump("tracked"),
        Rule::new().ct_state(CT_STATE_NEW | CT_STATE_INVALID).jump("unsolicited"),
        Rule::new().mark_not(marks.kind_mask(), marks.tag_kind()).accept(),
        // A connection that was there before its pod had a policy is left alone; so is an answer of the pod's.
        Rule::new()
            .ct_state(CT_STATE_ESTABLISHED | CT_STATE_RELATED)
            .ct_mark_not(marks.connection_mask(), path)
            .clear_mark(!marks.kind_and_index_mask())
            .accept(),
        Rule::new().vmap_by_mark(marks.kind_and_index_mask(), set::PODS),
        Rule::new().counter(counter::BLOCKED).drop(),
    ]
}

/// What belongs to a connection of Egret's.
fn tracked(marks: Marks) -> Vec<Rule> {
    let path = marks.connection(0);
    vec![
        // A connection keeps its path.
        Rule::new().ct_original().ct_mark(marks.connection_kind_mask(), path).goto("known"),
        // On a gateway: a server's reply to another node's pod.
        reply_to_peer(marks),
        Rule::new()
            .ct_reply()
            .ct_mark(marks.connection_kind_mask(), path)
            .clear_mark(!marks.kind_and_index_mask())
            .accept(),
    ]
}

/// Back through the tunnel, to the node whose request made the connection.
fn reply_to_peer(marks: Marks) -> Rule {
    let of_peer = Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
    of_peer.set_mark(marks.reply()).accept()
}

/// An answer to somebody whom this gateway does not know would reset a connection that has just come here from another
/// gateway, and an entry in the connection table would take the port that it needs. An echo request takes none: it
/// passes, where the gateway says so and the address is on this node.
fn unsolicited() -> Vec<Rule> {
    let asks = |ip| match ip {
        Ip::V4 => Rule::new().l4(protocol::ICMP).icmp_type(ECHO_REQUEST4),
        Ip::V6 => Rule::new().l4(protocol::ICMPV6).icmp_type(ECHO_REQUEST),
    };
    let ping = |(at, ip)| asks(ip).daddr_in_set(ip, set::PING[at]).daddr_type(RTN_LOCAL).return_();
    let to_egress = |(at, ip)| Rule::new().daddr_in_set(ip, set::EGRESS[at]).counter(counter::UNSOLICITED).drop();
    let each = || Ip::BOTH.into_iter().enumerate();
    each().map(ping).chain(each().map(to_egress)).collect()
}

/// What comes out of the tunnel: on a director replies, on a gateway requests, and nodes' questions whether others
/// live; anything else is dropped.
fn from_tunnel(marks: Marks) -> Vec<Rule> {
    let mut rules = vec![
        Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection(0)).set_mark(0).accept(),
        Rule::new().ct_original().admit(set::PEER, WIRE_MASK, set::RX).accept(),
        // A server's reply, handed over by the node that the path is being moved to.
        reply_to_peer(marks),
        // The same to a pod here, whose connection has been forgotten meanwhile.
        late(marks).set_mark(0).accept(),
    ];
    rules.extend(echo().map(Rule::accept));
    rules.push(Rule::new().counter(counter::UNKNOWN).drop());
    rules
}

/// What a server has sent before it could know that the path was moved.
fn late(marks: Marks) -> Rule {
    Rule::new().ct_original().ct_mark(marks.connection_of_path_mask(), marks.handed(0))
}

/// A connection with a path goes where its path goes; a path that is not ready goes nowhere.
fn known() -> Vec<Rule> {
    vec![Rule::new().set_mark_by_ct_mark(set::PATH_OUT).accept(), Rule::new().counter(counter::BLOCKED).drop()]
}

/// What has a path leaves by it or not at all, and nobody forwards packets into the tunnel.
fn guard(marks: Marks) -> Vec<Rule> {
    vec![
        Rule::new().mark(marks.kind_mask(), marks.tag_kind()).counter(counter::LEAKED).drop(),
        tunnel_packet().jump("guard-tunnel"),
        Rule::new().iif(DEVICE).jump("guard-arrived"),
        Rule::new()
            .ct_mark(marks.connection_kind_mask(), marks.connection(0))
            .ct_original()
            .oif_not(DEVICE)
            .goto("guard-path"),
    ]
}

/// Out of the tunnel: a reply, or a request whose path is known here.
fn guard_arrived(marks: Marks) -> Vec<Rule> {
    vec![
        Rule::new().ct_mark_not(marks.connection_mask(), marks.connection(0)).counter(counter::LEAKED).drop(),
        Rule::new().ct_original().mark(marks.path_mask(), 0).goto("guard-late"),
    ]
}

/// A request without a path is none, or the datapath is not whole.
fn guard_late(marks: Marks) -> Vec<Rule> {
    vec![late(marks).accept(), Rule::new().counter(counter::LEAKED).drop()]
}

/// Not into the tunnel, so out of this node.
fn guard_path(marks: Marks) -> Vec<Rule> {
    vec![
        Rule::new().mark_not(marks.kind_mask(), 0).counter(counter::LEAKED).drop(),
        Rule::new().mark(marks.path_mask(), 0).counter(counter::LEAKED).drop(),
    ]
}

fn guard_tunnel() -> Vec<Rule> {
    let forged = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]).counter(counter::FOREIGN).drop();
    Ip::BOTH.into_iter().enumerate().map(forged).collect()
}

/// One before the masquerade of any CNI: whoever is translated here is translated there no more.
fn srcnat(marks: Marks) -> Vec<Rule> {
    let leaving = || {
        Rule::new().oif_not(DEVICE).ct_mark(marks.connection_mask(), marks.connection(0)).mark_not(marks.path_mask(), 0)
    };
    let mut rules = vec![];
    for (at, ip) in Ip::BOTH.into_iter().enumerate() {
        rules.push(Rule::new().oif(DEVICE).snat_identity(ip));
        rules.push(leaving().snat_by_mark(ip, marks.path_mask(), set::SNAT[at]));
    }
    // Its path has no address of this family.
    rules.push(leaving().counter(counter::BLOCKED).drop());
    rules
}

/// The last look at a packet.
fn departure(marks: Marks) -> Vec<Rule> {
    vec![
        Rule::new().oif(DEVICE).goto("departure-tunnel"),
        Rule::new()
            .ct_mark(marks.connection_mask(), marks.connection(0))
            .ct_original()
            // Without a path in its mark, and past the guard, it is the gateway's own: an ICMP error to a server.
            .mark_not(marks.path_mask(), 0)
            .goto("departure-path"),
    ]
}

/// Out of this node: it must bear its path's address, whatever translated it.
fn departure_path(marks: Marks) -> Vec<Rule> {
    let mask = marks.path_mask();
    let wrong = |(at, ip)| Rule::new().mark_and_saddr_not_in_set(mask, ip, set::PAIRS[at]);
    let wrong = Ip::BOTH.into_iter().enumerate().map(wrong).map(|rule| rule.counter(counter::STALE).drop());
    wrong.chain([Rule::new().ct_unconfirmed().goto("departure-first")]).collect()
}

/// The first packet of a connection, whose port another one may have had.
fn departure_first() -> Vec<Rule> {
    let other = |protocol, mask| Rule::new().l4(protocol).ports_not_in_set(mask, set::SAME_PORT);
    let each = [protocol::TCP, protocol::UDP, protocol::SCTP].into_iter();
    let rules = each.flat_map(|protocol| PORT_BITS.map(|mask| other(protocol, mask)));
    rules.map(|rule| rule.counter(counter::OTHER_PORT).accept()).collect()
}

/// Into the tunnel: the path's id goes into the mark, whose low 16 bits VXLAN's group-based policy carries to the other
/// side.
fn departure_tunnel() -> Vec<Rule> {
    vec![
        Rule::new().ct_snat().ct_original().jump("departure-translated"),
        Rule::new().tcp_syn().clamp_mss(),
        Rule::new().set_mark_from_ct(),
    ]
}

/// A connection that was this node's own to translate, until its path moved, would come to the other side with an
/// address that is the other side's own, and be answered with a reset.
fn departure_translated() -> Vec<Rule> {
    let stale = |(at, ip)| Rule::new().saddr_in_set(ip, set::EGRESS[at]).counter(counter::STALE).drop();
    Ip::BOTH.into_iter().enumerate().map(stale).collect()
}

/// On the tunnel device, the hub's MAC becomes the real one: of the path's owner, or of the pod's node.
pub(super) fn to_tunnel() -> Vec<Rule> {
    vec![
        Rule::new().ether_daddr_not(HUB_MAC).accept(),
        Rule::new().set_ether_daddr_by_mark(set::HOP).accept(),
        Rule::new().set_ether_daddr_by_mark(set::BACK).accept(),
        Rule::new().counter(counter::NO_HOP).drop(),
    ]
}
