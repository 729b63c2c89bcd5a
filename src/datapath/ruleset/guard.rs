//! What holds selected pods while somebody has flushed the other tables, on kernels that cannot keep others from it.
//!
//! A packet that a pod of a policy's has sent, or that came out of the tunnel, and on which nothing has decided before it is
//! routed, bears a mark that a routing rule leads to the cluster's networks alone. Routing rules outlive every flush. The marks
//! are given by a table of its own, which the daemon's socket owns: from Linux 5.12 on others' flush passes it over. It goes
//! with the socket, as all that is owned does before Linux 6.9; so it holds nothing but this, and the other tables, which are
//! to stay when the daemon ends, have no owner there.
//!
//! It cannot look at packets by their marks where they are routed instead, and hold those that have none: reverse-path
//! filtering asks for an answer's route back by the same addresses and without a mark, and would drop the answer
//! (`__fib_validate_source`, net/ipv4/fib_frontend.c).

use super::pods::without_address;
use super::{GUARD, ingress};
use crate::datapath::names::DEVICE;
use crate::kernel::nft::rule::Rule;
use crate::kernel::nft::table::{Chain, Hook, Table, TableName};
use crate::model::marks::Marks;
use crate::node_plan::{NodePlan, PodPlan};
use std::sync::Arc;

/// On the tunnel device.
const FROM_TUNNEL: &str = "from-tunnel";
/// Behind the chain of the other table on the same device.
const PRIORITY: i32 = 1;

/// The table, if there is to be one. What is as it was `before` is taken over.
pub(super) fn table(plan: &NodePlan, marks: Marks, before: Option<(&NodePlan, &Table)>) -> Option<(TableName, Table)> {
    if !plan.guarded {
        return None;
    }
    let mut table = Table { ends_with_socket: true, ..Table::default() };
    let of_pods = super::chains(&plan.pods, before.map(|(last, table)| (&last.pods, table)), |pod| {
        let hook = Hook { priority: PRIORITY, ..ingress(&pod.interface) };
        Chain::of(Some(hook), move || from_pod(&pod, marks))
    });
    table.chains.extend(of_pods);
    let hook = Hook { priority: PRIORITY, drop: false, ..ingress(DEVICE) };
    let same = before.and_then(|(_, table)| table.chains.get(FROM_TUNNEL).cloned());
    let from_tunnel = same.unwrap_or_else(|| Arc::new(Chain::new(Some(hook), from_tunnel(marks))));
    table.chains.insert(FROM_TUNNEL.into(), from_tunnel);
    Some((GUARD, table))
}

/// While the other table is there, a pod's packets come with its mark, and pass by the first rule.
fn from_pod(pod: &PodPlan, marks: Marks) -> Vec<Rule> {
    let mut rules = vec![Rule::new().mark(marks.kind_mask(), marks.pod_mark_kind()).accept()];
    rules.extend(pod.addresses.iter().map(|a| Rule::new().saddr_in((*a).into()).set_mark(marks.undecided()).accept()));
    rules.extend(without_address().map(Rule::accept));
    rules.push(Rule::new().not_ip().accept());
    rules
}

/// What came with the packet stays: an egress ID.
fn from_tunnel(marks: Marks) -> Vec<Rule> {
    vec![Rule::new().set_mark_in(marks.kind_and_index_mask(), marks.undecided())]
}
