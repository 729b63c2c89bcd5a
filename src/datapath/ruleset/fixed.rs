//! The chains that are the same on every node. Each rule costs time for every packet that comes to it. So what
//! concerns few packets is in a chain of its own, behind one rule. Packets of established connections are the most
//! frequent; the first rules of each chain accept them, each with one rule that checks everything about them. Such a
//! rule only saves time and never blocks: without it, its packets take the longer way.

use super::pods::{direct, without_address};
use super::sets::PORT_BITS;
use super::unsolicited::unsolicited;
use super::{base, counter, set, vrf};
use crate::datapath::names::{DEVICE, DEVICE_GROUP, HEALTH, PROBER, TUNNEL_NEXT_HOP_MAC, TUNNEL_PORT, UPLINK_HEALTH};
use crate::datapath::port_log;
use crate::model::marks::Marks;
use crate::node_plan::NodePlan;
use egret_nft::Family;
use egret_nft::rule::{Rule, protocol};
use egret_nft::table::{Chain, hook};
use egret_nft::uapi::*;
use std::net::IpAddr;

/// The bits of a mark that VXLAN's group-based policy carries: in a request the egress ID, in a reply a peer's index
/// with bit 15 set, which is no egress ID.
const WIRE_MASK: u32 = 0xffff;
/// Before the masquerade of any CNI: kindnet's is at 90. All chains of the type nat run at one place of the hook, and
/// their priority orders them among each other. It must be above the priority of connection tracking, -200
/// (`nft_chain_parse_hook`, net/netfilter/nf_tables_api.c).
const SRCNAT: i32 = -190;
/// Before the rules of others that change marks of the host's own packets, as Calico's in iptables' table `raw` do, at
/// -300. Of two chains of one priority, the kernel calls the later one first (`nf_hook_entries_grow`,
/// net/netfilter/core.c), so an equal priority would not be enough.
const OUTPUT: i32 = -310;
/// After the chain `output` and before connection tracking. Here only packets that the kernel itself made for a
/// connection have a connection.
const ERRORS: i32 = -299;
/// The hop limit of a packet that was not forwarded.
const HOP_LIMIT: u8 = 255;

/// All chains of the table inet except pods' and policies', by name.
pub(super) fn chains(plan: &NodePlan, marks: Marks) -> Vec<(&'static str, Chain)> {
    let NodePlan { local, port_log, foreign_marks, ref from_vrf, .. } = *plan;
    let at = |number, priority| base("filter", number, priority);
    let vrf = from_vrf.as_ref().map(|pods| vrf::chain(marks, pods));
    let all = vec![
        ("raw", Chain::new(at(hook::PREROUTING, -300), raw(local))),
        ("output", Chain::new(at(hook::OUTPUT, OUTPUT), output(marks))),
        ("errors", Chain::new(base("route", hook::OUTPUT, ERRORS), errors(marks))),
        ("output-tunnel", Chain::new(None, output_tunnel())),
        ("prerouting", Chain::new(at(hook::PREROUTING, -90), prerouting(marks, local, foreign_marks))),
        ("from-tunnel", Chain::new(None, from_tunnel(marks))),
        ("tracked", Chain::new(None, tracked(marks))),
        ("tracked-marked", Chain::new(None, tracked_marked(marks))),
        ("related", Chain::new(None, related(marks))),
        ("foreign", Chain::new(None, foreign())),
        ("unsolicited", Chain::new(None, unsolicited(from_vrf.is_some()))),
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
        ("egress-guard-tunnel", Chain::new(None, egress_guard_tunnel(marks))),
        ("egress-guard-translated", Chain::new(None, egress_guard_translated())),
    ];
    all.into_iter().chain(vrf).collect()
}

/// Takes tunnel packets between nodes and liveness probes out of connection tracking. Only nodes may send tunnel
/// packets, because the egress ID in a packet is trusted.
fn raw(local: Option<IpAddr>) -> Vec<Rule> {
    let between_nodes = between_nodes(tunnel_packet, local).into_iter().map(|rule| rule.notrack().accept());
    let echo = echo().map(|rule| rule.iif_group(DEVICE_GROUP).notrack());
    [not_ours()].into_iter().chain(between_nodes).chain(echo).collect()
}

/// Tunnel packets that come straight from a node's tunnel address, to this node's one or to that of another node for
/// which this node routes.
///
/// An address is easily forged, so the interface must fit too. It has the local tunnel address, or it leads to the
/// sender. A pod's veth does neither, whatever the reverse-path filter (IPv6 has none). The second condition alone is
/// not enough: nodes with several interfaces may answer by another one.
fn between_nodes(packet: impl Fn() -> Rule, local: Option<IpAddr>) -> Vec<Rule> {
    let Some(local) = local else { return vec![] };
    let (at, ip) = if local.is_ipv4() { (0, Family::V4) } else { (1, Family::V6) };
    let here = || packet().daddr_in(local.into()).saddr_in_set(ip, set::TUNNEL[at]);
    let routed = |nodes| packet().daddr_in_set(ip, set::TUNNEL[at]).saddr_in_set(ip, nodes).back_by_iif();
    // Ordinary nodes know the tunnel addresses of gateway nodes only, but the addresses of all nodes.
    vec![here().daddr_type_at_iif(RTN_LOCAL), here().back_by_iif(), routed(set::HOSTS[at]), routed(set::TUNNEL[at])]
}

/// Liveness probes and their replies. The kernel answers them, and nobody forwards them.
fn echo() -> impl Iterator<Item = Rule> {
    let both = |health| [(ICMPV6_ECHO_REQUEST, PROBER, health), (ICMPV6_ECHO_REPLY, health, PROBER)];
    [HEALTH, UPLINK_HEALTH].into_iter().flat_map(both).map(|(kind, from, to)| {
        let between = Rule::new().l4(protocol::ICMPV6).saddr_in(from.into()).daddr_in(to.into());
        between.hop_limit(HOP_LIMIT).icmp_type(kind)
    })
}

/// Accepts TCP early: most packets are neither tunnel packets nor probes.
fn not_ours() -> Rule {
    Rule::new().l4(protocol::TCP).accept()
}

fn tunnel_packet() -> Rule {
    Rule::new().l4(protocol::UDP).dport(TUNNEL_PORT)
}

fn output(marks: Marks) -> Vec<Rule> {
    let echo = echo().map(|rule| rule.oif_group(DEVICE_GROUP).notrack());
    // The outer packet inherits the inner one's mark, which would route it into the tunnel again. This mark also
    // distinguishes the tunnel device's packets from those of sockets, because setting a mark takes CAP_NET_ADMIN or
    // CAP_NET_RAW (Linux 5.17). A packet into the tunnel with such a mark is one of a handover.
    let inherits = tunnel_packet().mark(marks.connection_mask(), marks.connection(0)).oif_group_not(DEVICE_GROUP);
    let outer = inherits.set_mark(0).notrack().accept();
    // An egress IP is an address of its owner node, where any process can bind a socket to it.
    let egress = |(at, ip)| Rule::new().saddr_in_set(ip, set::EGRESS[at]).by_process().counter(counter::SPOOFED).drop();
    let egress = Family::BOTH.into_iter().enumerate().map(egress);
    let rest = [not_ours(), tunnel_packet().goto("output-tunnel")].into_iter().chain(echo);
    [outer].into_iter().chain(egress).chain(rest).collect()
}

/// Routes this node's own ICMP errors about servers' packets to its pods the way of the connection, for example if a
/// pod's MTU is below the tunnel's. The allocation's owner translates what they quote: the pod's address means
/// nothing to the server. `nf_ct_attach` gives them the connection (`icmp_glue_bits`, `icmpv6_getfrag`); a process's
/// packet has none yet. Packets without a connection end at the first expression.
fn errors(marks: Marks) -> Vec<Rule> {
    let of_allocation = Rule::new().ct_mark(marks.connection_kind_mask(), marks.connection(0)).ct_original();
    vec![of_allocation.ct_state(CT_STATE_RELATED).set_mark_by_ct_mark(set::EGRESS_ID_OUT)]
}

/// Tunnel packets without a connection mark. A process must not send them; the kernel may.
fn output_tunnel() -> Vec<Rule> {
    let to_node = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]);
    let each = || Family::BOTH.into_iter().enumerate().map(to_node);
    let forged = each().map(|rule| rule.by_process().counter(counter::FOREIGN).drop());
    forged.chain(each().map(|rule| rule.set_mark(0).notrack())).collect()
}

/// `MARK_MAGIC_HOST_MASK` and `MARK_MAGIC_IDENTITY`, bpf/lib/common.h of Cilium.
const CILIUM_MARK: u32 = 0xf00;
const CILIUM_IDENTITY: u32 = 0xf00;

/// Decides on every packet, after connection tracking and destination NAT: a Service's address is already its
/// backend's.
fn prerouting(marks: Marks, local: Option<IpAddr>, foreign_marks: bool) -> Vec<Rule> {
    let allocation = marks.connection(0);
    // Other programs take packets out of connection tracking too, so an untracked packet is not a node's for that
    // reason. A tracked packet may have been sent to a Service whose backend is here.
    let untracked = || tunnel_packet().ct_state(CT_STATE_UNTRACKED);
    let tunnel = between_nodes(untracked, local).into_iter().map(Rule::accept);
    let unmarked = |rule: Rule| rule.mark_not(marks.pod_mark_mask(), marks.pod_mark_kind());
    let others = || Rule::new().ct_state(CT_STATE_ESTABLISHED).ct_mark_not(marks.connection_mask(), allocation);
    let tracked = || Rule::new().ct_mark(marks.connection_mask(), allocation).jump("tracked");
    // No packet that does not come out of the tunnel has both yet, so another program's mark has Egret's bits: Cilium's eBPF
    // writes a pod's identity into bits 31 to 16 and 0xf00 below (`set_identity_mark`, bpf/lib/common.h). Routing rules
    // would take it for Egret's. Without a mark, Cilium finds the identity by the packet's source.
    // Marks with which it has a packet encrypted or decrypted (0xe00, 0xd00) or sends it to its proxy (0x200) stay.
    let identity = Rule::new().mark(CILIUM_MARK, CILIUM_IDENTITY);
    let foreign = identity.mark_not(marks.kind_and_index_mask(), 0).mark_not(marks.egress_id_mask(), 0).set_mark(0);
    let from_tunnel = Rule::new().iif_group(DEVICE_GROUP).goto("from-tunnel");
    let before = [
        // A connection keeps its allocation.
        of_allocation(marks).set_mark_by_ct_mark(set::EGRESS_ID_OUT).accept(),
        // On a gateway: a server's reply to another node's pod.
        reply_to_peer(marks),
        // Most packets of a node are neither Egret's nor tunnel packets.
        unmarked(others().dport_not(TUNNEL_PORT)).accept(),
    ];
    let after = [
        left_alone(others().dport_not(TUNNEL_PORT), marks),
        tracked(),
        tunnel_packet().jump("foreign"),
        Rule::new().ct_state(CT_STATE_NEW | CT_STATE_INVALID).jump("unsolicited"),
        unmarked(Rule::new()).jump("unmarked"),
        // Packets to which the chain `unmarked` gave the pod mark back.
        tracked(),
        left_alone(others(), marks),
        Rule::new().ct_state(CT_STATE_RELATED).goto("related"),
        // The pod mark leads to the pod's policy chain.
        Rule::new().vmap_by_mark(marks.kind_and_index_mask(), set::PODS),
        Rule::new().counter(counter::BLOCKED).drop(),
    ];
    let first = [Some(from_tunnel), foreign_marks.then_some(foreign)].into_iter().flatten();
    first.chain(before).chain(tunnel).chain(after).collect()
}

/// Accepts without an allocation: a connection that is older than the pod's policy, or a pod's reply.
fn left_alone(rule: Rule, marks: Marks) -> Rule {
    rule.clear_mark(!marks.kind_and_index_mask()).accept()
}

/// A packet with an allocation that the connection's own pod sent. Other pods on the node can send packets with the
/// same addresses and ports, which connection tracking takes for the connection's. The pod mark identifies the
/// sender: the pod's own veth sets it, for the pod's own addresses only. ICMP errors are excluded, because they may
/// quote any connection.
fn of_allocation(marks: Marks) -> Rule {
    let marked =
        Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED);
    marked.ct_original().ct_mark(marks.connection_kind_mask(), marks.connection(0))
}

/// Packets of Egret's connections that the first rules of `prerouting` did not accept: those of an allocation that is
/// not ready, errors and replies. Packets that the connection's pod did not send return.
fn tracked(marks: Marks) -> Vec<Rule> {
    let (kind, allocation) = (marks.connection_kind_mask(), marks.connection(0));
    let of_peer = || Rule::new().ct_original().ct_mark(kind, marks.connection_of_peer(0));
    vec![
        Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).jump("tracked-marked"),
        // A server's reply to this node's pod.
        left_alone(
            Rule::new().mark_not(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_reply().ct_mark(kind, allocation),
            marks,
        ),
        // On a gateway: a connection that a helper expected, from a server to another node's pod.
        of_peer().ct_expected_and_dnat().set_mark(marks.reply()).accept(),
        // A connection of another node's pod. Its packets come from the tunnel, so this one is forged.
        of_peer().counter(counter::SPOOFED).drop(),
    ]
}

/// The part of `tracked` for packets that a selected pod has sent.
fn tracked_marked(marks: Marks) -> Vec<Rule> {
    let (kind, allocation) = (marks.connection_kind_mask(), marks.connection(0));
    let related = |(at, ip)| {
        let rule = Rule::new().ct_state(CT_STATE_RELATED).ct_original().ct_mark(kind, allocation);
        rule.mark_and_original_saddr_in_set(marks.kind_and_index_mask(), ip, set::OWN[at]).goto("known")
    };
    let known = [of_allocation(marks), of_expected(marks)].map(|rule| rule.goto("known"));
    known.into_iter().chain(Family::BOTH.into_iter().enumerate().map(related)).collect()
}

/// A pod's reply in a connection that the server began and a helper expected (active FTP). It uses the allocation of
/// the parent connection.
fn of_expected(marks: Marks) -> Rule {
    let marked = Rule::new().mark(marks.pod_mark_mask(), marks.pod_mark_kind()).ct_state(CT_STATE_ESTABLISHED);
    marked.ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection(0))
}

/// A selected pod's ICMP error, or the first packet of a connection that a helper expected. If it is about a
/// connection of the pod without an allocation, it goes where the connection goes. The kernel makes sure that it is
/// addressed to the other end (`nf_conntrack_inet_error`, Linux 5.1). It does not make sure that the connection is
/// the pod's: the pod writes what the error quotes. With another pod's connection, the packet would get that
/// connection's translation.
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

/// A server's reply goes back through the tunnel, to the node whose request made the connection.
fn reply_to_peer(marks: Marks) -> Rule {
    let of_peer = Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
    of_peer.set_mark(marks.reply()).accept()
}

/// Drops tunnel packets that come from no node, or not straight from one. The tunnel's socket accepts packets to any
/// address of this node, from everybody. This happens after translation, so that replies to a port that a masquerade
/// has chosen are not hit.
fn foreign() -> Vec<Rule> {
    let forwarded = |(at, ip)| Rule::new().daddr_in_set(ip, set::TUNNEL[at]).counter(counter::FOREIGN).drop();
    let here = [RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST].map(|kind| Rule::new().daddr_type(kind));
    let here = here.map(|rule| rule.counter(counter::FOREIGN).drop());
    Family::BOTH.into_iter().enumerate().map(forwarded).chain(here).collect()
}

/// New packets without a pod mark. A selected pod may have sent such a packet all the same: other programs set whole
/// marks, and packets that the CNI plugin `bandwidth` delays come back past the chain on the veth
/// (`tc_skip_classify`, net/core/dev.c). They also bypass the chain on the tunnel device (`nf_skip_egress`), so they
/// keep the tunnel next hop's MAC address, which no host has. Packets that get their pod mark back return.
fn unmarked() -> Vec<Rule> {
    let selected = |(at, ip)| Rule::new().saddr_in_set(ip, set::SELECTED[at]).goto("mark-lost");
    let by_veth = Rule::new().set_mark_by_iif(set::VETHS).goto("marked-again");
    // Any sender with an egress IP: the packet must come by the interface that leads to the owner. The kernel's
    // reverse-path filter may be off or loose, and IPv6 has none.
    let forged =
        |(at, ip)| Rule::new().saddr_in_set(ip, set::POOLS[at]).not_back_by_iif().counter(counter::SPOOFED).drop();
    let each = || Family::BOTH.into_iter().enumerate();
    let rules = [by_veth].into_iter().chain(each().map(selected)).chain(each().map(forged));
    rules.chain([Rule::new().accept()]).collect()
}

/// From a routed pod's veth: the same decisions as in the chain on the veth. Bridged pods' packets come from the
/// bridge.
fn marked_again(marks: Marks) -> Vec<Rule> {
    let own = |(at, ip)| Rule::new().mark_and_saddr_in_set(marks.kind_and_index_mask(), ip, set::OWN[at]).return_();
    let own = Family::BOTH.into_iter().enumerate().map(own);
    let others = without_address().map(|rule| rule.clear_mark(!marks.kind_and_index_mask()).accept());
    own.chain(others).chain([Rule::new().counter(counter::SPOOFED).drop()]).collect()
}

/// The source address alone does not prove which pod sent a packet, but it is enough to keep the packet in the
/// cluster.
fn mark_lost() -> Vec<Rule> {
    let lost = Rule::new().counter(counter::UNMARKED).drop();
    direct().map(Rule::accept).chain([lost]).collect()
}

/// Packets from the tunnel: replies on a source node, requests on a gateway, and liveness probes. Everything else is
/// dropped.
fn from_tunnel(marks: Marks) -> Vec<Rule> {
    let of_peer = Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
    let of_peer = of_peer.ct_expected_and_dnat();
    let of_allocation =
        || Rule::new().ct_original().ct_mark(marks.connection_kind_mask(), marks.connection(0)).ct_expected();
    let mut rules = vec![
        Rule::new().ct_state(CT_STATE_NEW).jump("to-owner"),
        Rule::new().ct_original().admit(set::PEER, WIRE_MASK, set::RX).accept(),
        Rule::new().ct_reply().ct_mark(marks.connection_kind_mask(), marks.connection(0)).set_mark(0).accept(),
        // A pod's reply to a server that began a connection which a helper expected.
        of_peer.admit(set::PEER, WIRE_MASK, set::RX).accept(),
        // A server's reply that the new owner of the allocation handed over.
        reply_to_peer(marks),
        // The same for a pod on this node, whose connection has been deleted meanwhile.
        late(marks).set_mark(0).accept(),
    ];
    // Packets of a server in a connection that a helper expected.
    let expected = |(at, ip)| of_allocation().daddr_in_set(ip, set::SELECTED[at]).set_mark(0).accept();
    rules.extend(Family::BOTH.into_iter().enumerate().map(expected));
    // The outer packets of probes have a mark, of which one bit arrives here.
    rules.extend(echo().map(|rule| rule.set_mark(0).accept()));
    rules.push(Rule::new().counter(counter::UNKNOWN).drop());
    rules
}

/// Requests from the tunnel that begin a connection. A request to this node itself, to one of its egress IPs for
/// example, would not be translated and would bypass the host's firewall of the uplink, so it is dropped. The first
/// packet of any other connection is admitted here, to be counted.
fn to_owner() -> Vec<Rule> {
    let here = [RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST].map(|kind| Rule::new().ct_original().daddr_type(kind));
    let here = here.map(|rule| rule.counter(counter::TO_OWNER).drop());
    let first = |(at, ip)| {
        let first = Rule::new().ct_unconfirmed().ct_original().ip(ip).admit(set::PEER, WIRE_MASK, set::RX);
        first.counter(counter::ENTERED[at]).accept()
    };
    here.into_iter().chain(Family::BOTH.into_iter().enumerate().map(first)).collect()
}

/// A packet that a server sent before it could know that the allocation was moved.
fn late(marks: Marks) -> Rule {
    Rule::new().ct_original().ct_mark(marks.connection_of_allocation_mask(), marks.handed(0))
}

/// A connection with an allocation is routed by the allocation. If the allocation is not ready, the packet is
/// dropped.
fn known() -> Vec<Rule> {
    vec![Rule::new().set_mark_by_ct_mark(set::EGRESS_ID_OUT).accept(), Rule::new().counter(counter::BLOCKED).drop()]
}

/// Translates before the masquerade of any CNI, which does not translate again.
fn srcnat(marks: Marks) -> Vec<Rule> {
    let leaving = || {
        Rule::new()
            .oif_group_not(DEVICE_GROUP)
            .ct_mark(marks.connection_mask(), marks.connection(0))
            .mark_not(marks.egress_id_mask(), 0)
    };
    // Chains of the type nat see only the first packet of a connection.
    let forwarded = |(at, ip)| {
        let of_peer = Rule::new().iif_group(DEVICE_GROUP).ip(ip);
        let of_peer = of_peer.ct_mark(marks.connection_kind_mask(), marks.connection_of_peer(0));
        of_peer.counter(counter::FORWARDED[at])
    };
    let mut rules: Vec<Rule> = Family::BOTH.into_iter().enumerate().map(forwarded).collect();
    for (at, ip) in Family::BOTH.into_iter().enumerate() {
        rules.push(Rule::new().oif_group(DEVICE_GROUP).snat_identity(ip));
        rules.push(leaving().snat_by_mark(ip, marks.egress_id_mask(), set::SNAT[at]));
    }
    // The allocation has no address of this family.
    rules.push(leaving().counter(counter::BLOCKED).drop());
    rules
}

/// The last check: a packet with an allocation leaves by the allocation's way or is dropped.
fn egress_guard(marks: Marks) -> Vec<Rule> {
    let unmarked = Rule::new().ct_mark(marks.connection_mask(), marks.connection(0)).ct_original();
    vec![
        Rule::new().oif_group(DEVICE_GROUP).goto("egress-guard-tunnel"),
        Rule::new().mark_not(marks.kind_mask() | marks.egress_id_mask(), 0).goto("egress-guard-marked"),
        unmarked.goto("egress-guard-unmarked"),
        tunnel_packet().goto("egress-guard-foreign"),
    ]
}

/// Nodes' own tunnel packets are not tracked. Tracked tunnel packets may have been sent to a Service that stands for
/// a node's tunnel address.
fn egress_guard_foreign() -> Vec<Rule> {
    let forged = |(at, ip)| Rule::new().ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED).daddr_in_set(ip, set::TUNNEL[at]);
    let forged = Family::BOTH.into_iter().enumerate().map(forged);
    forged.map(|rule| rule.counter(counter::FOREIGN).drop()).collect()
}

/// Packets in the original direction of one of Egret's connections, without the mark that a request has.
fn egress_guard_unmarked(marks: Marks) -> Vec<Rule> {
    let kinds = [
        (marks.connection_of_allocation_mask(), marks.connection(0)),
        (marks.connection_kind_mask(), marks.connection_of_peer(0)),
    ];
    // To a pod on this node, from a server that began a connection which a helper expected.
    let to_pod = |(at, ip)| Rule::new().ct_expected().daddr_in_set(ip, set::SELECTED[at]).accept();
    let to_pod = Family::BOTH.into_iter().enumerate().map(to_pod);
    let leaked = kinds.into_iter().flat_map(|(mask, kind)| {
        let request = Rule::new().ct_mark(mask, kind);
        [
            request.clone().ct_state(CT_STATE_NEW | CT_STATE_ESTABLISHED),
            // The node's own related packet is an ICMP error to a server.
            request.ct_state(CT_STATE_RELATED).forwarded(),
        ]
    });
    to_pod.chain(leaked.map(|rule| rule.counter(counter::LEAKED).drop())).collect()
}

/// Packets that leave this node, with a mark that may be Egret's.
fn egress_guard_marked(marks: Marks) -> Vec<Rule> {
    let right = |(at, ip)| {
        Rule::new().mark_and_saddr_in_set(marks.egress_id_mask(), ip, set::PAIRS[at]).ct_confirmed().accept()
    };
    let leaked = [
        // No rule decided on a pod's packet. The node's own packets may have such a mark from another program.
        Rule::new().mark(marks.kind_mask(), marks.pod_mark_kind()).forwarded(),
        Rule::new().iif_group(DEVICE_GROUP).ct_mark_not(marks.connection_mask(), marks.connection(0)),
    ];
    let allocation =
        Rule::new().ct_original().ct_mark(marks.connection_mask(), marks.connection(0)).goto("egress-guard-allocation");
    let rules = Family::BOTH.into_iter().enumerate().map(right);
    rules.chain(leaked.map(|rule| rule.counter(counter::LEAKED).drop())).chain([allocation]).collect()
}

/// Packets with an allocation. The source must be the allocation's egress IP, whatever translated it, and the mark
/// must not be one for the tunnel.
fn egress_guard_allocation(marks: Marks) -> Vec<Rule> {
    let missed = Rule::new().mark_not(marks.kind_mask(), 0).counter(counter::LEAKED).drop();
    let wrong = |(at, ip)| Rule::new().mark_and_saddr_not_in_set(marks.egress_id_mask(), ip, set::PAIRS[at]);
    let stale = |rule: Rule| rule.counter(counter::STALE).set_ct_mark(marks.stale()).drop();
    let wrong = Family::BOTH.into_iter().enumerate().map(wrong).map(stale);
    [missed].into_iter().chain(wrong).chain([Rule::new().ct_unconfirmed().goto("egress-guard-first")]).collect()
}

/// The first packet of a connection. If its port was changed, the daemon gets a log message, see
/// [`port_log`](crate::datapath::port_log).
fn egress_guard_first(port_log: bool) -> Vec<Rule> {
    let other = |protocol, mask| Rule::new().l4(protocol).ports_not_in_set(mask, set::SAME_PORT);
    let each = [protocol::TCP, protocol::UDP, protocol::SCTP].into_iter();
    let rules = each.flat_map(|protocol| PORT_BITS.map(|mask| other(protocol, mask)));
    let counted = rules.map(|rule| rule.counter(counter::OTHER_PORT));
    let told = counted.map(|rule| if port_log { rule.log(port_log::GROUP) } else { rule });
    told.map(Rule::accept).collect()
}

/// Into the tunnel: the egress ID goes into the mark, whose low 16 bits VXLAN's group-based policy carries to the
/// peer.
///
/// Liveness probes have no connection. Their mark is set here and not in `output`: other programs clear bits of it in
/// between.
fn egress_guard_tunnel(marks: Marks) -> Vec<Rule> {
    let rules = [
        // Connections that have been answered send no SYN, and the source address of requests is the one that the pod
        // wrote.
        Rule::new().ct_assured_and_not_snat().set_mark_from_ct().accept(),
        Rule::new().ct_reply().ct_assured().set_mark_from_ct().accept(),
        Rule::new().ct_snat().ct_original().jump("egress-guard-translated"),
        Rule::new().tcp_syn().clamp_mss(),
        Rule::new().set_mark_from_ct(),
    ];
    rules.into_iter().chain(echo().map(|rule| rule.set_mark(marks.connection(0)))).collect()
}

/// Drops packets of a connection that this node translated before its allocation moved away. They would reach the new
/// owner with an address of its own, and be answered with a reset.
fn egress_guard_translated() -> Vec<Rule> {
    let stale = |(at, ip)| Rule::new().saddr_in_set(ip, set::EGRESS[at]).counter(counter::STALE).drop();
    Family::BOTH.into_iter().enumerate().map(stale).collect()
}

/// On the tunnel device, replaces the tunnel next hop's MAC address by that of the allocation's owner or of the pod's
/// node.
pub(super) fn to_tunnel() -> Vec<Rule> {
    vec![
        Rule::new().set_ether_daddr_by_mark(set::HOP).accept(),
        Rule::new().set_ether_daddr_by_mark(set::BACK).accept(),
        Rule::new().ether_daddr_not(TUNNEL_NEXT_HOP_MAC).accept(),
        Rule::new().counter(counter::NO_HOP).drop(),
    ]
}

/// As [`to_tunnel`] on the pair of veths, but packets that were not sent to the tunnel next hop are dropped: nothing else may
/// enter here. `tunnel` is the tunnel device's index.
pub(super) fn into_tunnel(tunnel: u32) -> Vec<Rule> {
    vec![
        Rule::new().set_ether_daddr_by_mark(set::HOP).forward(tunnel, DEVICE),
        Rule::new().set_ether_daddr_by_mark(set::BACK).forward(tunnel, DEVICE),
        Rule::new().ether_daddr_not(TUNNEL_NEXT_HOP_MAC).counter(counter::NOT_ROUTED).drop(),
        Rule::new().counter(counter::NO_HOP).drop(),
    ]
}
