//! The chains that are the same on every node. Each rule costs every packet that comes to it, so what most packets have
//! nothing to do with is a chain of its own, behind one rule; and the packets of established connections, which are
//! most, are accepted by the first rules of a chain, each by one that says all that must be true of them. A rule like
//! that is never what blocks: whoever takes it away sends its packets down the longer way.

use super::pods::{direct, without_address};
use super::sets::PORT_BITS;
use super::{base, counter, set};
use crate::datapath::names::{DEVICE, DEVICE_GROUP, HEALTH, PROBER, TUNNEL_NEXT_HOP_MAC, TUNNEL_PORT, UPLINK_HEALTH};
use crate::datapath::port_log;
use crate::model::marks::Marks;
use egret_nft::Family;
use egret_nft::rule::{Rule, protocol};
use egret_nft::table::{Chain, hook};
use egret_nft::uapi::*;
use std::net::IpAddr;

/// What VXLAN's group-based policy carries of a mark. In a request it is the allocation id, in a reply a peer's index with
/// bit 15 set, which is no allocation.
const WIRE_MASK: u32 = 0xffff;
/// Before the masquerade of any CNI: kindnet's is at 90. All chains of this type run at one place of the hook, and their
/// priorities order them among each other; it must be above connection tracking's own, -200 (`nft_chain_parse_hook`,
/// net/netfilter/nf_tables_api.c).
const SRCNAT: i32 = -190;
/// Behind `output`, and before connection tracking: only what the kernel itself has made for a connection has one then.
const ERRORS: i32 = -299;
/// What nobody has forwarded.
const HOP_LIMIT: u8 = 255;

/// All of them but the tunnel device's, by name; `local` is this node's end of the tunnel, `port_log` whether the kernel can
/// log packets.
pub(super) fn chains(marks: Marks, local: Option<IpAddr>, port_log: bool) -> Vec<(&'static str, Chain)> {
    let at = |number, priority| base("filter", number, priority);
    vec![
        ("raw", Chain::new(at(hook::PREROUTING, -300), raw(local))),
        ("output", Chain::new(at(hook::OUTPUT, -300), output(marks))),
        ("errors", Chain::new(base("route", hook::OUTPUT, ERRORS), errors(marks))),
        ("output-tunnel", Chain::new(None, output_tunnel())),
        ("prerouting", Chain::new(at(hook::PREROUTING, -90), prerouting(marks, local))),
        ("from-tunnel", Chain::new(None, from_tunnel(marks))),
        ("tracked", Chain::new(None, tracked(marks))),
        ("tracked-marked", Chain::new(None, tracked_marked(marks))),
        ("related", Chain::new(None, related(marks))),
        ("foreign", Chain::new(None, foreign())),
        ("unsolicited", Chain::new(None, unsolicited())),
        ("unmarked", Chain::new(None, unmarked())),
        ("marked-again", Chain::new(None, marked_again(marks))),
        ("mark-lost", Chain::new(None, mark_lost())),
        ("to-owner", Chain::new(None, to_owner())),
        ("known", Chain::new(None, known())),
        ("srcnat", Chain::new(base("nat", hook::POSTROUTING, SRCNAT), srcnat(marks))),
        ("egress-guard", Chain::new(at(hook::POSTROUTING, 300), egress_guard(marks))),
        ("egress-guard-unmarked", Chain::new(None, egress_guard_unmarked(marks))),
        ("egress-guard-marked", Chain::new(None, egress_guard_marked(marks))),
        ("egress-guard-foreign", Chain::new(None, egress_guard_foreign())),
        ("egress-guard-allocation", Chain::new(None, egress_guard_allocation(marks))),
        ("egress-guard-first", Chain::new(None, egress_guard_first(port_log))),
        ("egress-guard-tunnel", Chain::new(None, egress_guard_tunnel())),
        ("egress-guard-translated", Chain::new(None, egress_guard_translated())),
    ]
}

/// Tunnel packets between nodes need no connection tracking, nor do nodes' questions whether others live. Only nodes may
/// speak to the tunnel, for the allocation id that a packet carries is believed.
fn raw(local: Option<IpAddr>) -> Vec<Rule> {
    let between_nodes = between_nodes(tunnel_packet, local).into_iter().map(|rule| rule.notrack().accept());
    let echo = echo().map(|rule| rule.iif_group(DEVICE_GROUP).notrack());
    [not_ours()].into_iter().chain(between_nodes).chain(echo).collect()
}

/// Tunnel packets from a node's end of the tunnel straight to this one's, or to another's for which this node routes.
///
/// An address is easily forged: they come in by an interface that has this end's address, or by the one that leads to
/// the node; a pod's does neither, whatever reverse-path filtering there is (IPv6 has none). Not only the latter: nodes
/// with several interfaces may answer by another one.
fn between_nodes(packet: impl Fn() -> Rule, local: Option<IpAddr>) -> Vec<Rule> {
    let Some(local) = local else { return vec![] };
    let (at, ip) = if local.is_ipv4() { (0, Family::V4) } else { (1, Family::V6) };
    let here = || packet().daddr_in(local.into()).saddr_in_set(ip, set::TUNNEL[at]);
    let routed = |nodes| packet().daddr_in_set(ip, set::TUNNEL[at]).saddr_in_set(ip, nodes).back_by_iif();
    // Ordinary nodes know only gateways' ends of the tunnel, but all nodes' addresses.
    vec![here().daddr_type_at_iif(RTN_LOCAL), here().back_by_iif(), routed(set::HOSTS[at]), routed(set::TUNNEL[at])]
}

/// Nodes' questions whether others live, and the answers: the kernel's own, and never forwarded.
fn echo() -> impl Iterator<Item = Rule> {
    let both = |health| [(ICMPV6_ECHO_REQUEST, PROBER, health), (ICMPV6_ECHO_REPLY, health, PROBER)];
    [HEALTH, UPLINK_HEALTH].into_iter().flat_map(both).map(|(kind, from, to)| {
        let between = Rule::new().l4(protocol::ICMPV6).saddr_in(from.into()).daddr_in(to.into());
        between.hop_limit(HOP_LIMIT).icmp_type(kind)
    })
}

/// Neither a tunnel packet nor a question: most packets are not.
fn not_ours() -> Rule {
    Rule::new().l4(protocol::TCP).accept()
}

fn tunnel_packet() -> Rule {
    Rule::new().l4(protocol::UDP).dport(TUNNEL_PORT)
}

fn output(marks: Marks) -> Vec<Rule> {
    let echo = echo().map(|rule| rule.oif_group(DEVICE_GROUP).notrack().set_mark(marks.connection(0)));
    // The outer packet inherits the inner one's mark, which would route it into the tunnel again. By it the tunnel
    // device's packets are known from those of sockets: a mark takes CAP_NET_ADMIN, or CAP_NET_RAW (Linux 5.17). What goes
    // into the tunnel with such a mark is handed over.
    let inherits = tunnel_packet().mark(marks.connection_mask(), marks.connection(0)).oif_group_not(DEVICE_GROUP);
    let outer = inherits.set_mark(0).notrack().accept();
    // An egress address is an address of its owner's, to which any process there can bind a socket.
    let egress = |(at, ip)| Rule::new().saddr_in_set(ip, set::EGRESS[at]).by_process().counter(counter::SPOOFED).drop();
    let egress = Family::BOTH.into_iter().enumerate().map(egress);
    let rest = [not_ours(), tunnel_packet().goto("output-tunnel")].into_iter().chain(echo);
    [outer].into_iter().chain(egress).chain(rest).collect()
}

/// This node's own ICMP errors about what servers have sent to its pods (a pod's MTU is below the tunnel's, say) go the
/// connection's way: its allocation's owner translates what they quote, which is the pod's address here and means nothing to the
/// server. `nf_ct_attach` gives them the connection (`icmp_glue_bits`, `icmpv6_getfrag`); a process's packet has none yet.
/// Packets without a connection end at the first expression.
fn errors(marks: Marks) -> Vec<Rule> {
    let of_allocation = Rule::new().ct_mark(marks.connection_kind_mask(), marks.connection(0)).ct_original();
    vec![of_allocation.ct_state(CT_STATE_RELATED).set_mark_by_ct_mark(set::EGRESS_ID_OUT)]
}

/// Without such a mark: what a process has sent is none of this node's tunnel packets. The kernel's own may be.
fn output_tunnel() -> Vec<Rule> {
    let to_node = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]);
    let each = || Family::BOTH.into_iter().enumerate().map(to_node);
    let forged = each().map(|rule| rule.by_process().counter(counter::FOREIGN).drop());
    forged.chain(each().map(|rule| rule.set_mark(0).notrack())).collect()
}

/// After connection tracking and destination NAT: a Service's address is already its backend's.
fn prerouting(marks: Marks, local: Option<IpAddr>) -> Vec<Rule> {
    let allocation = marks.connection(0);
    // Others untrack, too: that a packet is untracked does not make it a node's. What is tracked may have been sent
    // elsewhere, and here by a Service.
    let untracked = || tunnel_packet().ct_state(CT_STATE_UNTRACKED);
    let tunnel = between_nodes(untracked, local).into_iter().map(Rule::accept);
    let unmarked = |rule: Rule| rule.mark_not(marks.pod_mark_mask(), marks.pod_mark_kind());
    let others = || Rule::new().ct_state(CT_STATE_ESTABLISHED).ct_mark_not(marks.connection_mask(), allocation);
    let tracked = || Rule::new().ct_mark(marks.connection_mask(), allocation).jump("tracked");
    let before = [
        Rule::new().iif_group(DEVICE_GROUP).goto("from-tunnel"),
        // A connection keeps its allocation.
        of_allocation(marks).set_mark_by_ct_mark(set::EGRESS_ID_OUT).accept(),
        // On a gateway: a server's reply to another node's pod.
        reply_to_peer(marks),
        // Most packets of a node are none of Egret's, and no tunnel packets either.
        unmarked(others().dport_not(TUNNEL_PORT)).accept(),
    ];
    let after = [
        left_alone(others().dport_not(TUNNEL_PORT), marks),
        tracked(),
        tunnel_packet().jump("foreign"),
        Rule::new().ct_state(CT_STATE_NEW | CT_STATE_INVALID).jump("unsolicited"),
        unmarked(Rule::new()).jump("unmarked"),
        // What has got its pod mark back.
        tracked(),
        left_alone(others(), marks),
        Rule::new().ct_state(CT_STATE_RELATED).goto("related"),
        // By the pod mark to the pod's policy chain.
        Rule::new().vmap_by_mark(marks.kind_and_index_mask(), set::PODS),
        Rule::new().counter(counter::BLOCKED).drop(),
    ];
    before.into_iter().chain(tunnel).chain(after).collect()
}

/// A connection that was there before its pod had a policy is left alone; so is an answer of the pod's.
fn left_alone(rule: Rule, marks: Marks) -> Rule {
    rule.clear_mark(!marks.kind_and_index_mask()).accept()
}

/// A packet that the pod of a connection with an allocation has sent. Others on the node can send packets with the same
/// addresses and ports, which connection tracking takes for the connection's: it is the pod mark that says whose a packet is,
/// for the pod's own veth gives it, and only to the pod's own addresses. An ICMP error may be about any connection.
fn of_allocation(marks: Marks) -> Rule {
    let marked =
        Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED);
    marked.ct_original().ct_mark(marks.connection_kind_mask(), marks.connection(0))
}

/// What belongs to a connection of Egret's: of its packets whose allocation goes nowhere, of errors and of answers. What its
/// pod has not sent returns.
fn tracked(marks: Marks) -> Vec<Rule> {
    let (kind, allocation) = (marks.connection_kind_mask(), marks.connection(0));
    let of_peer = || Rule::new().ct_original().ct_mark(kind, marks.connection_of_peer(0));
    vec![
        Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).jump("tracked-marked"),
        // A server's answer to this node's pod.
        left_alone(
            Rule::new().mark_not(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_reply().ct_mark(kind, allocation),
            marks,
        ),
        // On a gateway: a connection that a helper has foreseen, from a server to another node's pod.
        of_peer().ct_expected_and_dnat().set_mark(marks.reply()).accept(),
        // The connection of another node's pod, whose packets come out of the tunnel.
        of_peer().counter(counter::SPOOFED).drop(),
    ]
}

/// The same, of packets that a selected pod has sent.
fn tracked_marked(marks: Marks) -> Vec<Rule> {
    let (kind, allocation) = (marks.connection_kind_mask(), marks.connection(0));
    let related = |(at, ip)| {
        let rule = Rule::new().ct_state(CT_STATE_RELATED).ct_original().ct_mark(kind, allocation);
        rule.mark_and_original_saddr_in_set(marks.kind_and_index_mask(), ip, set::OWN[at]).goto("known")
    };
    let known = [of_allocation(marks), of_expected(marks)].map(|rule| rule.goto("known"));
    known.into_iter().chain(Family::BOTH.into_iter().enumerate().map(related)).collect()
}

/// A pod's answer in a connection that the other end began: a helper has foreseen it (active FTP), and it has the allocation of
/// the connection in which it was agreed on.
fn of_expected(marks: Marks) -> Rule {
    let marked = Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_state(CT_STATE_ESTABLISHED);
    marked.ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection(0))
}

/// A selected pod's ICMP error, or the first packet of a connection that a helper has foreseen: about a connection that
/// the pod is an end of and that has no allocation, it goes where that goes. That it is for the other end is made sure of by
/// the kernel (`nf_conntrack_inet_error`, Linux 5.1); that it is about the pod's own connection is not: the pod writes
/// what the error is about, and with another's connection it would leave with that one's translation.
fn related(marks: Marks) -> Vec<Rule> {
    let mask = marks.kind_and_index_mask();
    let others = || Rule::new().ct_mark_not(marks.connection_mask(), marks.connection(0));
    let own = |(at, ip): (usize, Family)| {
        let began = others().ct_original().mark_and_original_saddr_in_set(mask, ip, set::OWN[at]);
        let answers = others().ct_reply().mark_and_reply_saddr_in_set(mask, ip, set::OWN[at]);
        [began, answers].map(|rule| left_alone(rule, marks))
    };
    let inside = direct().map(|rule| left_alone(rule.ct_mark_not(marks.connection_mask(), marks.connection(0)), marks));
    let mut rules: Vec<Rule> = Family::BOTH.into_iter().enumerate().flat_map(own).chain(inside).collect();
    rules.push(Rule::new().counter(counter::BLOCKED).drop());
    rules
}

/// Back through the tunnel, to the node whose request made the connection.
fn reply_to_peer(marks: Marks) -> Rule {
    let of_peer = Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
    of_peer.set_mark(marks.reply()).accept()
}

/// Tunnel packets for a node that did not come from one, or not straight. The tunnel's socket takes what comes for any
/// address of this node, and for everybody. After translation: an answer to a port that a masquerade has chosen is none.
fn foreign() -> Vec<Rule> {
    let forwarded = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]).counter(counter::FOREIGN).drop();
    let here = [RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST].map(|kind| Rule::new().daddr_type(kind));
    let here = here.map(|rule| rule.counter(counter::FOREIGN).drop());
    Family::BOTH.into_iter().enumerate().map(forwarded).chain(here).collect()
}

/// An answer to somebody whom this gateway does not know would reset a connection that has just come here from another
/// gateway, and an entry in the connection table would take the port that it needs. An echo request takes none: it
/// passes, where the gateway says so and the address is on this node.
fn unsolicited() -> Vec<Rule> {
    let asks = |ip| match ip {
        Family::V4 => Rule::new().l4(protocol::ICMP).icmp_type(ICMP_ECHO_REQUEST),
        Family::V6 => Rule::new().l4(protocol::ICMPV6).icmp_type(ICMPV6_ECHO_REQUEST),
    };
    let ping = |(at, ip)| asks(ip).daddr_in_set(ip, set::PING[at]).daddr_type(RTN_LOCAL).return_();
    let to_egress = |(at, ip)| Rule::new().daddr_in_set(ip, set::EGRESS[at]).counter(counter::UNSOLICITED).drop();
    let each = || Family::BOTH.into_iter().enumerate();
    // The device should be of its group; if it is not, nothing new comes out of it.
    let arrived = Rule::new().iif(DEVICE).counter(counter::UNKNOWN).drop();
    each().map(ping).chain(each().map(to_egress)).chain([arrived]).collect()
}

/// What is new and has no pod mark. It may be a selected pod's all the same: others set whole marks, and what the CNI plugin
/// `bandwidth` holds up comes back past the chain on the veth (`tc_skip_classify`, net/core/dev.c), and passes the one on the
/// tunnel device by, too (`nf_skip_egress`): its tunnel next hop's MAC stays, which is nobody's. What gets its pod mark back returns.
fn unmarked() -> Vec<Rule> {
    let selected = |(at, ip)| Rule::new().saddr_in_set(ip, set::SELECTED[at]).goto("mark-lost");
    let by_veth = Rule::new().set_mark_by_iif(set::VETHS).goto("marked-again");
    // Anybody's, with an egress IP: it comes from its owner, by the interface that leads there. The kernel's own filtering
    // may be off, or loose, and for IPv6 there is none.
    let forged =
        |(at, ip)| Rule::new().saddr_in_set(ip, set::POOLS[at]).not_back_by_iif().counter(counter::SPOOFED).drop();
    let each = || Family::BOTH.into_iter().enumerate();
    let rules = [by_veth].into_iter().chain(each().map(selected)).chain(each().map(forged));
    rules.chain([Rule::new().accept()]).collect()
}

/// From a routed pod's veth: as in the chain that is there. Bridged pods' packets come from the bridge.
fn marked_again(marks: Marks) -> Vec<Rule> {
    let own = |(at, ip)| Rule::new().mark_and_saddr_in_set(marks.kind_and_index_mask(), ip, set::OWN[at]).return_();
    let own = Family::BOTH.into_iter().enumerate().map(own);
    let others = without_address().map(|rule| rule.clear_mark(!marks.kind_and_index_mask()).accept());
    own.chain(others).chain([Rule::new().counter(counter::SPOOFED).drop()]).collect()
}

/// An address is not enough to say whose a packet is, but enough to keep it inside.
fn mark_lost() -> Vec<Rule> {
    let lost = Rule::new().counter(counter::UNMARKED).drop();
    direct().map(Rule::accept).chain([lost]).collect()
}

/// What comes out of the tunnel: on a source node replies, on a gateway requests, and nodes' questions whether others
/// live; anything else is dropped.
fn from_tunnel(marks: Marks) -> Vec<Rule> {
    let of_peer = Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
    let of_peer = of_peer.ct_expected_and_dnat();
    let of_allocation =
        || Rule::new().ct_original().ct_mark(marks.connection_kind_mask(), marks.connection(0)).ct_expected();
    let mut rules = vec![
        Rule::new().ct_state(CT_STATE_NEW).jump("to-owner"),
        Rule::new().ct_original().admit(set::PEER, WIRE_MASK, set::RX).accept(),
        Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection(0)).set_mark(0).accept(),
        // A pod's answer to a server that has begun a connection which a helper has foreseen.
        of_peer.admit(set::PEER, WIRE_MASK, set::RX).accept(),
        // A server's reply, handed over by the node that the allocation is being moved to.
        reply_to_peer(marks),
        // The same to a pod here, whose connection has been forgotten meanwhile.
        late(marks).set_mark(0).accept(),
    ];
    // What that server sends.
    let expected = |(at, ip)| of_allocation().daddr_in_set(ip, set::SELECTED[at]).set_mark(0).accept();
    rules.extend(Family::BOTH.into_iter().enumerate().map(expected));
    // Their outer packets bear a mark, of which a bit comes along.
    rules.extend(echo().map(|rule| rule.set_mark(0).accept()));
    rules.push(Rule::new().counter(counter::UNKNOWN).drop());
    rules
}

/// What a pod of another node sends to this node itself, an egress address of its own included, is not translated and
/// would come past the host's firewall of the uplink. A connection's first packet is admitted here, to be counted.
fn to_owner() -> Vec<Rule> {
    let here = [RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST].map(|kind| Rule::new().ct_original().daddr_type(kind));
    let here = here.map(|rule| rule.counter(counter::TO_OWNER).drop());
    let first = |(at, ip)| {
        let first = Rule::new().ct_unconfirmed().ct_original().ip(ip).admit(set::PEER, WIRE_MASK, set::RX);
        first.counter(counter::ENTERED[at]).accept()
    };
    here.into_iter().chain(Family::BOTH.into_iter().enumerate().map(first)).collect()
}

/// What a server has sent before it could know that the allocation was moved.
fn late(marks: Marks) -> Rule {
    Rule::new().ct_original().ct_mark(marks.connection_of_allocation_mask(), marks.handed(0))
}

/// A connection with an allocation goes where its allocation goes; an allocation that is not ready goes nowhere.
fn known() -> Vec<Rule> {
    vec![Rule::new().set_mark_by_ct_mark(set::EGRESS_ID_OUT).accept(), Rule::new().counter(counter::BLOCKED).drop()]
}

/// Before the masquerade of any CNI: whoever is translated here is translated there no more.
fn srcnat(marks: Marks) -> Vec<Rule> {
    let leaving = || {
        Rule::new()
            .oif_group_not(DEVICE_GROUP)
            .ct_mark(marks.connection_mask(), marks.connection(0))
            .mark_not(marks.allocation_mask(), 0)
    };
    // A chain of this type is shown a connection's first packet alone.
    let forwarded = |(at, ip)| {
        let of_peer = Rule::new().iif_group(DEVICE_GROUP).ip(ip);
        let of_peer = of_peer.ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
        of_peer.counter(counter::FORWARDED[at])
    };
    let mut rules: Vec<Rule> = Family::BOTH.into_iter().enumerate().map(forwarded).collect();
    for (at, ip) in Family::BOTH.into_iter().enumerate() {
        rules.push(Rule::new().oif_group(DEVICE_GROUP).snat_identity(ip));
        rules.push(leaving().snat_by_mark(ip, marks.allocation_mask(), set::SNAT[at]));
    }
    // Its allocation has no address of this family.
    rules.push(leaving().counter(counter::BLOCKED).drop());
    rules
}

/// The last look at a packet: what has an allocation leaves by it or not at all.
fn egress_guard(marks: Marks) -> Vec<Rule> {
    let unmarked = Rule::new().ct_mark(marks.connection_mask(), marks.connection(0)).ct_original();
    vec![
        Rule::new().oif_group(DEVICE_GROUP).goto("egress-guard-tunnel"),
        Rule::new().mark_not(marks.kind_mask() | marks.allocation_mask(), 0).goto("egress-guard-marked"),
        unmarked.goto("egress-guard-unmarked"),
        tunnel_packet().goto("egress-guard-foreign"),
    ]
}

/// Tunnel packets between nodes are not tracked. Others are tracked, and may have been sent to a Service that stands for a
/// node's end of the tunnel.
fn egress_guard_foreign() -> Vec<Rule> {
    let forged = |(at, ip)| Rule::new().ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED).daddr_in_set(ip, set::TUNNEL[at]);
    let forged = Family::BOTH.into_iter().enumerate().map(forged);
    forged.map(|rule| rule.counter(counter::FOREIGN).drop()).collect()
}

/// In the original direction of a connection of Egret's, without the mark that a request should have.
fn egress_guard_unmarked(marks: Marks) -> Vec<Rule> {
    let kinds = [
        (marks.connection_of_allocation_mask(), marks.connection(0)),
        (marks.connection_kind_mask(), marks.connection_of_peer(0)),
    ];
    // To a pod here, from a server that has begun a connection which a helper has foreseen.
    let to_pod = |(at, ip)| Rule::new().ct_expected().daddr_in_set(ip, set::SELECTED[at]).accept();
    let to_pod = Family::BOTH.into_iter().enumerate().map(to_pod);
    let leaked = kinds.into_iter().flat_map(|(mask, kind)| {
        let request = Rule::new().ct_mark(mask, kind);
        [
            request.clone().ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED),
            // The node's own is an ICMP error to a server.
            request.ct_state(CT_STATE_RELATED).forwarded(),
        ]
    });
    to_pod.chain(leaked.map(|rule| rule.counter(counter::LEAKED).drop())).collect()
}

/// Out of this node, with a mark that may be Egret's.
fn egress_guard_marked(marks: Marks) -> Vec<Rule> {
    let right = |(at, ip)| {
        Rule::new().mark_and_saddr_in_set(marks.allocation_mask(), ip, set::PAIRS[at]).ct_confirmed().accept()
    };
    let leaked = [
        // Nothing decided on a pod's packet. The node's own may have such a mark from somebody else.
        Rule::new().mark(marks.kind_mask(), marks.pod_mark_kind()).forwarded(),
        Rule::new().iif_group(DEVICE_GROUP).ct_mark_not(marks.connection_mask(), marks.connection(0)),
    ];
    let allocation =
        Rule::new().ct_original().ct_mark(marks.connection_mask(), marks.connection(0)).goto("egress-guard-allocation");
    let rules = Family::BOTH.into_iter().enumerate().map(right);
    rules.chain(leaked.map(|rule| rule.counter(counter::LEAKED).drop())).chain([allocation]).collect()
}

/// It must bear its allocation's address, whatever translated it, and was not to go into the tunnel.
fn egress_guard_allocation(marks: Marks) -> Vec<Rule> {
    let missed = Rule::new().mark_not(marks.kind_mask(), 0).counter(counter::LEAKED).drop();
    let wrong = |(at, ip)| Rule::new().mark_and_saddr_not_in_set(marks.allocation_mask(), ip, set::PAIRS[at]);
    let stale = |rule: Rule| rule.counter(counter::STALE).set_ct_mark(marks.stale()).drop();
    let wrong = Family::BOTH.into_iter().enumerate().map(wrong).map(stale);
    [missed].into_iter().chain(wrong).chain([Rule::new().ct_unconfirmed().goto("egress-guard-first")]).collect()
}

/// The first packet of a connection, whose port another one may have had: the daemon is told, see
/// [`port_log`](crate::datapath::port_log).
fn egress_guard_first(port_log: bool) -> Vec<Rule> {
    let other = |protocol, mask| Rule::new().l4(protocol).ports_not_in_set(mask, set::SAME_PORT);
    let each = [protocol::TCP, protocol::UDP, protocol::SCTP].into_iter();
    let rules = each.flat_map(|protocol| PORT_BITS.map(|mask| other(protocol, mask)));
    let counted = rules.map(|rule| rule.counter(counter::OTHER_PORT));
    let told = counted.map(|rule| if port_log { rule.log(port_log::GROUP) } else { rule });
    told.map(Rule::accept).collect()
}

/// Into the tunnel: the allocation's id goes into the mark, whose low 16 bits VXLAN's group-based policy carries to the other
/// side.
fn egress_guard_tunnel() -> Vec<Rule> {
    vec![
        // Connections that have been answered send no SYN; and the requests' source address is as the pod wrote it.
        Rule::new().ct_assured_and_not_snat().set_mark_from_ct().accept(),
        Rule::new().ct_reply().ct_assured().set_mark_from_ct().accept(),
        Rule::new().ct_snat().ct_original().jump("egress-guard-translated"),
        Rule::new().tcp_syn().clamp_mss(),
        Rule::new().set_mark_from_ct(),
    ]
}

/// A connection that was this node's own to translate, until its allocation moved, would come to the other side with an
/// address that is the other side's own, and be answered with a reset.
fn egress_guard_translated() -> Vec<Rule> {
    let stale = |(at, ip)| Rule::new().saddr_in_set(ip, set::EGRESS[at]).counter(counter::STALE).drop();
    Family::BOTH.into_iter().enumerate().map(stale).collect()
}

/// On the tunnel device, the tunnel next hop's MAC becomes the real one: of the allocation's owner, or of the pod's node.
pub(super) fn to_tunnel() -> Vec<Rule> {
    vec![
        Rule::new().set_ether_daddr_by_mark(set::HOP).accept(),
        Rule::new().set_ether_daddr_by_mark(set::BACK).accept(),
        Rule::new().ether_daddr_not(TUNNEL_NEXT_HOP_MAC).accept(),
        Rule::new().counter(counter::NO_HOP).drop(),
    ]
}
