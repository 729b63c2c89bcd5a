//! The handover: packets of connections that another node still translates.
//!
//! During a planned move, servers send to the new node before the source nodes do. A packet of a connection that the
//! new node does not know goes through the tunnel to the old node, which knows it and sends it on to the pod. A copy
//! goes there. The original is dropped like any unsolicited packet, before connection tracking confirms an entry that
//! would occupy the port that the connection needs here.
//!
//! The connections of this node's own pods were translated on another node and are translated here from now on, or
//! the other way round. An entry's translation cannot be changed. Until these entries are deleted, which takes a
//! moment, their packets use the old way. The next packet after that makes a new entry.

use super::{HANDOVER, base, set, value};
use crate::datapath::names::{DEVICE, DEVICE_GROUP, OUT_DEVICE, TUNNEL_NEXT_HOP4, TUNNEL_NEXT_HOP6};
use crate::model::addresses_of;
use crate::model::marks::{EgressId, Marks};
use crate::node_plan::NodePlan;
use crate::node_plan::allocations::AllocationState;
use egret_nft::Family;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, DataType, Elements, Set, SetKind, Table, TableName, hook};
use egret_nft::uapi::{CT_STATE_INVALID, CT_STATE_NEW, CT_STATE_UNTRACKED};
use std::net::IpAddr;
use std::sync::Arc;

/// Before the chain that drops unsolicited packets.
const PRIORITY: i32 = -91;

/// After the chain `egress-guard`, and after the rules of others at the hook `output`, which copies pass. Calico's
/// clear bits of the marks of the host's own packets there.
const PRIORITY_MARK: i32 = 301;

/// After the chain that sets the routing mark.
const PRIORITY_OLD_WAYS: i32 = -89;

/// Adds the sets, and the chain that sends connections of allocations that have just been moved by the old way.
/// Without such connections there is no chain.
pub(super) fn keep_old_ways(plan: &NodePlan, marks: Marks, table: &mut Table) {
    let uplink = |id: &EgressId| {
        let allocation =
            plan.allocations.get(id).filter(|allocation| matches!(allocation.state, AllocationState::Remote(_)))?;
        Some((marks.connection(*id).into(), value(marks.local(*id, allocation.uplink))))
    };
    let left: Elements = plan.left.iter().filter_map(uplink).collect();
    let came: Elements =
        plan.moved_here().map(|(id, _)| (marks.connection(id).into(), value(marks.request()))).collect();
    if !(left.is_empty() && came.is_empty()) {
        let rules = vec![
            Rule::new().ct_original().ct_snat().set_mark_by_ct_mark(set::LEFT),
            Rule::new().ct_original().ct_not_snat().set_mark_by_ct_mark(set::CAME),
        ];
        let chain = Chain::new(base("filter", hook::PREROUTING, PRIORITY_OLD_WAYS), rules);
        table.chains.insert("old-ways".into(), Arc::new(chain));
    }
    for (name, elements) in [(set::LEFT, left), (set::CAME, came)] {
        let kind = SetKind::plain(DataType::Mark, Some(DataType::Mark));
        table.sets.insert(name.into(), Set { kind, elements: Arc::new(elements) });
    }
}

/// Both tables. Without a planned move they have no chain, because every packet would pass it.
pub(super) fn tables(plan: &NodePlan, marks: Marks) -> impl Iterator<Item = (TableName, Table)> {
    let ips = [
        (Family::V4, DataType::Ipv4, IpAddr::V4(TUNNEL_NEXT_HOP4)),
        (Family::V6, DataType::Ipv6, IpAddr::V6(TUNNEL_NEXT_HOP6)),
    ];
    let is_pair = plan.way.by_veths().is_some_and(|tunnel| plan.device != tunnel);
    let name_of_device = if is_pair { OUT_DEVICE } else { DEVICE };
    HANDOVER.into_iter().zip(ips).map(move |(name, (ip, key, tunnel_next_hop))| {
        let of_family = |a: &IpAddr| ip.has(a);
        let addresses = plan.handed.iter().flat_map(|(id, (pair, _))| addresses_of(pair).map(|a| (*id, a)));
        let moved = addresses.filter(|(_, a)| of_family(a));
        let elements: Elements = moved.map(|(id, a)| (a.into(), value(marks.handed(id)))).collect();
        let mut table = Table::default();
        if !elements.is_empty() {
            let rule = Rule::new().iif_group_not(DEVICE_GROUP).ct_state(CT_STATE_NEW | CT_STATE_INVALID);
            let rules = vec![rule.set_mark_by_daddr(ip, set::HANDED).dup(tunnel_next_hop, plan.device, name_of_device)];
            table
                .chains
                .insert("handover".into(), Arc::new(Chain::new(base("filter", hook::PREROUTING, PRIORITY), rules)));
            let copy = Rule::new().oif_group(DEVICE_GROUP).ct_state(CT_STATE_UNTRACKED);
            let mark = Chain::new(
                base("filter", hook::POSTROUTING, PRIORITY_MARK),
                vec![copy.set_mark_by_daddr(ip, set::HANDED)],
            );
            table.chains.insert("handover-mark".into(), Arc::new(mark));
        }
        let kind = SetKind::plain(key, Some(DataType::Mark));
        table.sets.insert(set::HANDED.into(), Set { kind, elements: Arc::new(elements) });
        (name, table)
    })
}
