//! The way of a packet: Egret's nftables tables, with the chains in the order in which a packet meets them.
//!
//! Every chain fails closed: what should have had a decision and has none is dropped and counted, so that a rule or
//! an element that somebody takes away blocks and does not leak.

mod covers;
mod fixed;
mod flush_guard;
mod handover;
mod pods;
mod sets;
mod text;

pub use sets::{PeerIndexes, SharedSets, shared_sets};
pub use text::Ruleset;

use crate::datapath::names::{self, DEVICE, TABLE};
use crate::model::marks::Marks;
use crate::node_plan::NodePlan;
use crate::node_plan::allocations::AllocationState;
use egret_nft::table::{Chain, Data, DataType, Elements, Hook, Key, Set, SetKind, Table, TableName, hook};
use egret_nft::uapi::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The table with all chains but the one on the tunnel device.
pub const INET: TableName = TableName { family: NFPROTO_INET, name: TABLE };
/// The table with the tunnel device's own chain.
pub const NETDEV: TableName = TableName { family: NFPROTO_NETDEV, name: TABLE };
/// The tables that hand packets over while allocations are moved on purpose: IPv4's and IPv6's.
pub const HANDOVER: [TableName; 2] =
    [TableName { family: NFPROTO_IPV4, name: TABLE }, TableName { family: NFPROTO_IPV6, name: TABLE }];

/// The table that marks selected pods' packets where others can flush the rest.
pub const FLUSH_GUARD: TableName = TableName { family: NFPROTO_INET, name: names::FLUSH_GUARD };

/// The chain on the tunnel device.
const TO_TUNNEL: &str = "to-tunnel";

/// What is dropped is counted under one of these names.
pub mod counter {
    /// A selected pod's packet whose allocation is not ready, or which nothing decided on.
    pub const BLOCKED: &str = "blocked";
    /// A packet with an allocation that was about to leave another way. It was dropped; but the datapath is not whole.
    pub const LEAKED: &str = "leaked";
    /// A selected pod's packet that has lost its pod mark: what its policies say of it is not known.
    pub const UNMARKED: &str = "unmarked";
    /// A pod's packet with a source address that is not its own, or one with an egress address by anybody but its owner.
    pub const SPOOFED: &str = "spoofed";
    /// A tunnel packet from somebody who is no node, or that a process on this node has made.
    pub const FOREIGN: &str = "foreign";
    /// A request from the tunnel whose allocation or sender is unknown here.
    pub const UNKNOWN: &str = "unknown";
    /// A request from the tunnel for this node itself, which is the allocation's owner.
    pub const TO_OWNER: &str = "to_owner";
    /// A packet that was translated to another address than its allocation's: its connection is older than the allocation.
    pub const STALE: &str = "stale";
    /// A packet to an egress address that belongs to no connection.
    pub const UNSOLICITED: &str = "unsolicited";
    /// Nothing was dropped: a connection left this node from another port than its pod's, which another connection
    /// with the same address had.
    pub const OTHER_PORT: &str = "other_port";
    /// Nothing was dropped: the first packet of a connection, of IPv4 and of IPv6, that a gateway has admitted from the
    /// tunnel.
    pub const ENTERED: [&str; 2] = ["entered4", "entered6"];
    /// The same, when it has come by the hook `forward`: what lies between is others' firewalls, and routing.
    pub const FORWARDED: [&str; 2] = ["forwarded4", "forwarded6"];
    /// A packet in the tunnel device for whose allocation no node is known.
    pub const NO_HOP: &str = "no_hop";
}

/// Maps and sets by name.
pub mod set {
    /// A pod's pod mark to its policy chain.
    pub const PODS: &str = "pods";
    /// A selected pod's veth to its pod mark.
    pub const VETHS: &str = "veths";
    /// A pod mark and an address of its pod's.
    pub const OWN: [&str; 2] = ["own4", "own6"];
    /// The addresses of this node's selected pods, also of those that have no veth here.
    pub const SELECTED: [&str; 2] = ["selected4", "selected6"];
    /// A connection's allocation to the mark that routes it.
    pub const EGRESS_ID_OUT: &str = "egress_id_out";
    /// An allocation off the wire to the mark that routes it on.
    pub const RX: &str = "rx";
    /// A sender's MAC to the mark of its connections.
    pub const PEER: &str = "peer";
    /// An allocation to the MAC of the node that owns it.
    pub const HOP: &str = "hop";
    /// A peer's connection mark to its MAC.
    pub const BACK: &str = "back";
    /// An allocation to its address.
    pub const SNAT: [&str; 2] = ["snat4", "snat6"];
    /// Which address goes with which allocation.
    pub const PAIRS: [&str; 2] = ["pairs4", "pairs6"];
    /// Direct ranges.
    pub const DIRECT: [&str; 2] = ["direct4", "direct6"];
    /// Single direct addresses.
    pub const HOSTS: [&str; 2] = ["hosts4", "hosts6"];
    /// Who may send tunnel packets.
    pub const TUNNEL: [&str; 2] = ["tunnel4", "tunnel6"];
    /// Egress addresses that this node's allocations may have.
    pub const EGRESS: [&str; 2] = ["egress4", "egress6"];
    /// All gateways' pools: what only an egress IP's owner sends from.
    pub const POOLS: [&str; 2] = ["pools4", "pools6"];
    /// The addresses of [`EGRESS`] that answer echo requests.
    pub const PING: [&str; 2] = ["ping4", "ping6"];
    /// Four bits of a port, wherever they stand in it, and the same again: to see whether two ports differ.
    pub const SAME_PORT: &str = "same_port";
    /// Egress addresses that are being moved here, to the marks of what is handed over.
    pub const HANDED: &str = "handed";
    /// An allocation that was moved away just now, to the mark of connections that this node goes on translating.
    pub const LEFT: &str = "left";
    /// An allocation that was moved here just now, to the mark of connections that the old node goes on translating.
    pub const CAME: &str = "came";
}

/// The mark that a map's element leads to, as it stands in the kernel.
pub fn mark_of(data: &Data) -> Option<u32> {
    match data {
        Data::Value(bytes) => bytes.as_slice().try_into().ok().map(u32::from_ne_bytes),
        _ => None,
    }
}

/// The mark that is a map's key.
pub fn mark_in(key: &Key) -> Option<u32> {
    key.bytes.as_slice().try_into().ok().map(u32::from_ne_bytes)
}

fn value(mark: u32) -> Data {
    Data::Value(mark.into())
}

/// The tables that were last made, and what of: a pod's start changes one chain of hundreds.
#[derive(Debug)]
pub struct Made {
    plan: NodePlan,
    /// The chains that follow from nothing but this node's address.
    fixed: Arc<[(Arc<str>, Arc<Chain>)]>,
    tables: Vec<(TableName, Table)>,
}

impl Made {
    /// The tables as they should be for `plan`. What is as it was in `before`, made with the same marks, is taken over.
    pub fn new(plan: NodePlan, shared: &SharedSets, marks: Marks, before: Option<&Made>) -> Self {
        let is_same = |before: &&Made| (before.plan.local, before.plan.port_log) == (plan.local, plan.port_log);
        let fixed = before.filter(is_same).map_or_else(
            || {
                fixed::chains(marks, plan.local, plan.port_log)
                    .into_iter()
                    .map(|(name, chain)| (name.into(), Arc::new(chain)))
                    .collect()
            },
            |before| before.fixed.clone(),
        );
        let mut tables = vec![(INET, inet(&plan, &fixed, shared, marks, before))];
        tables.extend(handover::tables(&plan, marks));
        tables.push((NETDEV, netdev(&plan, shared, marks, before)));
        let held = before.and_then(|before| Some((&before.plan, before.table(FLUSH_GUARD)?)));
        tables.extend(flush_guard::table(&plan, marks, held));
        Made { plan, fixed, tables }
    }

    /// The tables.
    pub fn tables(&self) -> &[(TableName, Table)] {
        &self.tables
    }

    fn table(&self, name: TableName) -> Option<&Table> {
        self.tables.iter().find(|(n, _)| *n == name).map(|(_, table)| table)
    }
}

fn inet(
    plan: &NodePlan,
    fixed: &[(Arc<str>, Arc<Chain>)],
    shared: &SharedSets,
    marks: Marks,
    before: Option<&Made>,
) -> Table {
    let before = before.and_then(|before| Some((&before.plan, before.table(INET)?)));
    let mut table = Table {
        counters: [
            counter::BLOCKED,
            counter::LEAKED,
            counter::UNMARKED,
            counter::SPOOFED,
            counter::FOREIGN,
            counter::UNKNOWN,
            counter::TO_OWNER,
            counter::STALE,
            counter::UNSOLICITED,
            counter::OTHER_PORT,
            counter::ENTERED[0],
            counter::ENTERED[1],
            counter::FORWARDED[0],
            counter::FORWARDED[1],
        ]
        .into(),
        ..Table::default()
    };
    table.sets.extend(shared.sets.iter().filter(|(n, _)| **n != set::BACK).map(|(n, s)| ((*n).into(), s.clone())));
    table.sets.extend(sets::of_pods(plan, marks, before).into_iter().map(|(name, set)| (name.into(), set)));
    for step in plan
        .policy_chains
        .values()
        .flat_map(|policy_chain| policy_chain.steps())
        .filter(|step| !step.covers_everything())
    {
        covers::add_sets(&step.covers, before.map(|(_, table)| &table.sets), &mut table.sets);
    }
    let kind = SetKind { counter: true, ..SetKind::plain(DataType::Mark, Some(DataType::Mark)) };
    let egress_id_out = plan.allocations.iter().map(|(id, p)| {
        let mark = if p.state == AllocationState::Local { marks.local(*id, p.uplink) } else { marks.request() };
        (marks.connection(*id).into(), value(mark))
    });
    let egress_id_out =
        unless_same(egress_id_out.collect(), before.and_then(|(_, table)| table.sets.get(set::EGRESS_ID_OUT)));
    table.sets.insert(set::EGRESS_ID_OUT.into(), Set { kind, elements: egress_id_out });

    let of_pods = before.map(|(last, table)| (&last.pods, table));
    let of_pods = chains(&plan.pods, of_pods, |pod| {
        let hook = ingress(&pod.interface);
        Chain::of(Some(hook), move || pods::from_pod(&pod, marks))
    });
    let of_policy_chains = before.map(|(last, table)| (&last.policy_chains, table));
    let of_policy_chains = chains(&plan.policy_chains, of_policy_chains, |policy_chain| {
        Chain::of(None, move || pods::of_policy_chain(&policy_chain, marks))
    });
    table.chains = fixed.iter().cloned().chain(of_pods).chain(of_policy_chains).collect();
    handover::keep_old_ways(plan, marks, &mut table);
    table
}

type ByName<V> = BTreeMap<Arc<str>, Arc<V>>;

/// The chain of each by `make`, or the one that there was before for the same.
fn chains<'a, V: Eq>(
    of: &'a ByName<V>,
    before: Option<(&'a ByName<V>, &'a Table)>,
    make: impl Fn(Arc<V>) -> Chain + 'a,
) -> impl Iterator<Item = (Arc<str>, Arc<Chain>)> + 'a {
    of.iter().map(move |(name, value)| {
        let before = before.filter(|(last, _)| last.get(name) == Some(value));
        let chain = before.and_then(|(_, table)| table.chains.get(name).cloned());
        (name.clone(), chain.unwrap_or_else(|| Arc::new(make(value.clone()))))
    })
}

/// The elements, or those of `before` if they are the same: then nobody needs to compare them again.
fn unless_same(elements: Elements, before: Option<&Set>) -> Arc<Elements> {
    let same = before.filter(|before| *before.elements == elements);
    same.map_or_else(|| Arc::new(elements), |before| before.elements.clone())
}

fn base(kind: &str, number: u32, priority: i32) -> Option<Hook> {
    Some(Hook { kind: kind.into(), number, priority, drop: false, device: None })
}

/// On the pod's own veth: what arrives there is the pod's, whatever address it bears. What no rule decides on is
/// dropped.
fn ingress(device: &str) -> Hook {
    Hook { kind: "filter".into(), number: hook::INGRESS, priority: 0, drop: true, device: Some(device.into()) }
}

fn netdev(plan: &NodePlan, shared: &SharedSets, marks: Marks, before: Option<&Made>) -> Table {
    let before = before.and_then(|before| before.table(NETDEV));
    let mut table = Table { counters: [counter::NO_HOP].into(), ..Table::default() };
    let hop = plan.allocations.iter().filter_map(|(id, allocation)| match allocation.state {
        AllocationState::Remote(mac) => Some((marks.connection(*id).into(), Data::Value(mac.as_slice().into()))),
        _ => None,
    });
    // Of what has come here, the connections of before go the old way for a moment.
    let came = plan.moved_here().map(|(id, mac)| (marks.connection(id).into(), Data::Value(mac.as_slice().into())));
    let handed =
        plan.handed.iter().map(|(id, (_, mac))| (marks.handed(*id).into(), Data::Value(mac.as_slice().into())));
    let kind = SetKind::plain(DataType::Mark, Some(DataType::Ether));
    let hop = unless_same(hop.chain(came).chain(handed).collect(), before.and_then(|table| table.sets.get(set::HOP)));
    table.sets.insert(set::HOP.into(), Set { kind, elements: hop });
    table.sets.extend(shared.sets.get(set::BACK).map(|s| (set::BACK.into(), s.clone())));
    let out = Hook {
        kind: "filter".into(),
        number: hook::NETDEV_EGRESS,
        priority: 0,
        drop: false,
        device: Some(DEVICE.into()),
    };
    let same = before.and_then(|table| table.chains.get(TO_TUNNEL).cloned());
    table.chains.insert(TO_TUNNEL.into(), same.unwrap_or_else(|| Arc::new(Chain::new(Some(out), fixed::to_tunnel()))));
    table
}
