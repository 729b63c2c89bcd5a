//! Pods whose packets come by an ifb device, and so pass no chain on their veths. Routed ones get their pod marks back by the
//! veths, in `marked-again`. Packets of bridged ones come in by the bridge there. So the bridge's own hook marks them, where
//! they come in by the veth.

use super::{base, counter, pods, set};
use crate::model::marks::Marks;
use crate::node_plan::NodePlan;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, Data, DataType, Key, Set, SetKind, Table, hook};
use std::sync::Arc;

/// Before the bridge passes packets to the chains of IP (`NF_BR_PRI_BRNF`, 0, with `bridge-nf-call-iptables`).
const PRIORITY: i32 = -300;

/// The table; `None` if the node never had such pods. It is empty if it has none any more.
pub(super) fn table(plan: &NodePlan, marks: Marks) -> Option<Table> {
    let limited = plan.limited.as_ref()?;
    let mut table = Table { counters: [counter::SPOOFED].into(), ..Table::default() };
    let mut verdicts: Vec<(Key, Data)> = Vec::new();
    for pod in plan.pods.values().filter(|pod| limited.contains(&pod.interface_index)) {
        let name: Arc<str> = format!("limited-{}-{}", pod.pod_mark, pod.interface_index).into();
        table.chains.insert(name.clone(), Arc::new(Chain::new(None, pods::from_bridge_port(pod, marks))));
        verdicts.push((pod.interface_index.into(), Data::Jump(name)));
    }
    let kind = SetKind::plain(DataType::Interface, Some(DataType::Verdict));
    if !verdicts.is_empty() {
        let rules = vec![Rule::new().vmap_by_iif(set::LIMITED)];
        let chain = Chain::new(base("filter", hook::PREROUTING, PRIORITY), rules);
        table.chains.insert("prerouting".into(), Arc::new(chain));
    }
    table.sets.insert(set::LIMITED.into(), Set { kind, elements: Arc::new(verdicts.into_iter().collect()) });
    Some(table)
}
