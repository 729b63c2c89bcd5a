//! Packets that come in by an interface in a VRF. They pass prerouting twice: by the interface, and by the VRF's device
//! (`vrf_ip_rcv`, drivers/net/vrf.c). Then the kernel looks the destination up in the VRF's table, which has no route to
//! pods (`l3mdev_fib_rule_match`).
//!
//! The second time, replies to this node's pods get a mark, by which a routing rule leads to the main table. In source
//! validation of what pods send by a VRF, the kernel looks the pod up as if the packet came in by the VRF
//! (`__fib_validate_source`), without a mark, and so other rules lead to the main table for the pods' networks. Packets from
//! the VRF itself must not use these: they get another mark, which leaves them to the VRF's table.

use super::{base, set};
use crate::model::marks::Marks;
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, hook};
use ipnetwork::IpNetwork;

/// After all other chains that set marks.
const PRIORITY: i32 = -88;

/// The chain, with its name. `pods` are the networks for which there are routing rules of source validation.
pub(super) fn chain(marks: Marks, pods: &[IpNetwork]) -> (&'static str, Chain) {
    let of_allocation = || Rule::new().from_vrf().ct_mark(marks.connection_kind_mask(), marks.connection(0));
    let mask = marks.kind_and_index_mask();
    let reply = of_allocation().ct_reply().set_mark_in(mask, marks.reply_here()).accept();
    // In a connection that a helper expected.
    let expected = |(at, ip)| {
        let expected = of_allocation().ct_original().ct_expected().daddr_in_set(ip, set::SELECTED[at]);
        expected.set_mark_in(mask, marks.reply_here()).accept()
    };
    let expected = Family::BOTH.into_iter().enumerate().map(expected);
    let stays = |network: &IpNetwork| {
        let unmarked = Rule::new().from_vrf().mark(marks.kind_mask(), 0).daddr_in(*network);
        unmarked.set_mark_in(mask, marks.stays_in_vrf())
    };
    let rules = [reply].into_iter().chain(expected).chain(pods.iter().map(stays)).collect();
    ("from-vrf", Chain::new(base("filter", hook::PREROUTING, PRIORITY), rules))
}
