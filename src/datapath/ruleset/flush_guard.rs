//! The flush guard: it blocks selected pods' packets while Egret's other tables are gone, on kernels where the daemon
//! cannot own those tables.
//!
//! It marks each packet that comes from a selected pod without a pod mark, and each packet that comes out of the
//! tunnel. `prerouting` decides on the packet and clears the mark. If `prerouting` is gone, the packet still has the
//! mark when it is routed, and a routing rule leads it to a table with the cluster's networks alone. A flush removes
//! no routing rules.
//!
//! The daemon's socket owns this table without `NFT_TABLE_F_PERSIST` (Linux 5.12): other programs' flushes skip it,
//! and it disappears with the socket. The other tables must stay when the daemon ends, so on these kernels they have
//! no owner.
//!
//! A routing rule for packets without a mark cannot do this. Reverse-path filtering looks up the route to a reply's
//! sender with the same addresses and mark 0, and would drop the reply (`__fib_validate_source`,
//! net/ipv4/fib_frontend.c).

use super::pods::without_address;
use super::{FLUSH_GUARD, ingress};
use crate::datapath::names::DEVICE;
use crate::model::marks::Marks;
use crate::node_plan::{NodePlan, PodPlan};
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, Hook, Lifetime, Policy, Table, TableName};
use std::sync::Arc;

/// The chain on the tunnel device.
const FROM_TUNNEL: &str = "from-tunnel";
/// After the chain of the table inet egret on the same device.
const PRIORITY: i32 = 1;

/// The table, or `None` if the plan has no flush guard because the daemon owns the other tables. Chains that are as
/// in `before` are reused.
pub(super) fn table(plan: &NodePlan, marks: Marks, before: Option<(&NodePlan, &Table)>) -> Option<(TableName, Table)> {
    if !plan.flush_guard {
        return None;
    }
    let mut table = Table { lifetime: Lifetime::OfSocket, ..Table::default() };
    let of_pods = super::chains(&plan.pods, before.map(|(last, table)| (&last.pods, table)), |pod| {
        let hook = Hook { priority: PRIORITY, ..ingress(&pod.interface) };
        Chain::of(Some(hook), move || from_pod(&pod, marks))
    });
    table.chains.extend(of_pods);
    let hook = Hook { priority: PRIORITY, policy: Policy::Accept, ..ingress(DEVICE) };
    let same = before.and_then(|(_, table)| table.chains.get(FROM_TUNNEL).cloned());
    let from_tunnel = same.unwrap_or_else(|| Arc::new(Chain::new(Some(hook), from_tunnel(marks))));
    table.chains.insert(FROM_TUNNEL.into(), from_tunnel);
    Some((FLUSH_GUARD, table))
}

/// The pod's packets have the pod mark as long as the other table exists, and the first rule accepts them.
fn from_pod(pod: &PodPlan, marks: Marks) -> Vec<Rule> {
    let mut rules = vec![Rule::new().mark(marks.kind_mask(), marks.pod_mark_kind()).accept()];
    rules.extend(pod.addresses.iter().map(|a| Rule::new().saddr_in((*a).into()).set_mark(marks.undecided()).accept()));
    rules.extend(without_address().map(Rule::accept));
    rules.push(Rule::new().not_ip().accept());
    rules
}

/// Sets the upper bits only, so that the egress ID in the mark stays.
fn from_tunnel(marks: Marks) -> Vec<Rule> {
    vec![Rule::new().set_mark_in(marks.kind_and_index_mask(), marks.undecided())]
}
