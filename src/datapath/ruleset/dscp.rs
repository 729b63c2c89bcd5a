//! The DSCP of packets that leave from this node's egress IPs: one lookup, and a chain for each value. There are no
//! chains if no egress IP has a DSCP. The owner writes it, because routers outside see its packets.

use super::{base, set};
use crate::datapath::names::DEVICE_GROUP;
use crate::model::marks::Marks;
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, hook};
use std::collections::BTreeSet;
use std::sync::Arc;

/// After `egress-guard`.
const AFTER_GUARD: i32 = 301;

/// The name of the chain that writes a DSCP.
pub(super) fn chain_of(dscp: u8) -> Arc<str> {
    format!("dscp-{dscp}").into()
}

/// The chains that write `values`.
pub(super) fn chains(values: &BTreeSet<u8>, marks: Marks) -> Vec<(Arc<str>, Chain)> {
    if values.is_empty() {
        return Vec::new();
    }
    let leaving = Rule::new()
        .oif_group_not(DEVICE_GROUP)
        .ct_original()
        .ct_mark(marks.connection_mask(), marks.connection(0))
        .vmap_by_mark(marks.egress_id_mask(), set::DSCP);
    let after_guard = Chain::new(base("filter", hook::POSTROUTING, AFTER_GUARD), vec![leaving]);
    let of_value = |value: &u8| {
        let rules = Family::BOTH.map(|ip| Rule::new().set_dscp(ip, *value));
        (chain_of(*value), Chain::new(None, rules.into()))
    };
    values.iter().map(of_value).chain([("write-dscp".into(), after_guard)]).collect()
}
