//! Egret's nftables tables, with the chains in the order in which a packet meets them. Start with `fixed.rs` for the
//! chains that every node has, and with `pods.rs` for the chains of pods and policies.
//!
//! Every chain fails closed. A packet that needs a decision and gets none is dropped and counted. So if somebody
//! removes a rule or an element, packets are blocked and do not leak.

mod bandwidth;
mod choices;
mod covers;
mod dscp;
mod fixed;
mod flush_guard;
mod handover;
mod limited;
mod pods;
mod sets;
mod text;
mod unsolicited;
mod vrf;

pub use bandwidth::Direction;
pub use sets::{PeerIndexes, SharedSets, shared_sets};
pub use text::ExpectedRuleset;

use crate::datapath::names::{self, DEVICE, HOP_DEVICE, TABLE};
use crate::model::marks::Marks;
use crate::node_plan::allocations::AllocationState;
use crate::node_plan::{NodePlan, parse_chain_name};
use egret_nft::table::{Chain, Data, DataType, Elements, Hook, Key, Policy, Set, SetKind, Table, TableName, hook};
use egret_nft::uapi::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The table with all chains except those of [`NETDEV`], [`HANDOVER`] and [`FLUSH_GUARD`].
pub const INET: TableName = TableName { family: NFPROTO_INET, name: TABLE };
/// The table with the chains by which packets enter the tunnel.
pub const NETDEV: TableName = TableName { family: NFPROTO_NETDEV, name: TABLE };
/// The table that sets the pod marks of bridged pods whose packets come by ifb devices.
pub const BRIDGE: TableName = TableName { family: NFPROTO_BRIDGE, name: TABLE };
/// The tables of IPv4 and IPv6 that send packets to the old node during a planned move.
pub const HANDOVER: [TableName; 2] =
    [TableName { family: NFPROTO_IPV4, name: TABLE }, TableName { family: NFPROTO_IPV6, name: TABLE }];

/// The table that blocks selected pods' packets after a flush, on kernels where other programs can flush the other
/// tables.
pub const FLUSH_GUARD: TableName = TableName { family: NFPROTO_INET, name: names::FLUSH_GUARD };

/// The chain on the tunnel device's egress hook.
const TO_TUNNEL: &str = "to-tunnel";
/// The chain on the pair of veths before the tunnel device.
pub const INTO_TUNNEL: &str = "into-tunnel";

/// The named counters of dropped packets, and of some packets that pass.
pub mod counter {
    /// A selected pod's packet whose allocation is not ready, or on which no rule decided.
    pub const BLOCKED: &str = "blocked";
    /// A packet with an allocation that was about to leave by another way. It was dropped, but the datapath is not
    /// whole.
    pub const LEAKED: &str = "leaked";
    /// A selected pod's packet that has lost its pod mark, so that its policy chain is not known.
    pub const UNMARKED: &str = "unmarked";
    /// A pod's packet with a source address that is not the pod's, or a packet with an egress IP that its owner did
    /// not send.
    pub const SPOOFED: &str = "spoofed";
    /// A tunnel packet that comes from no node, or that a process on this node has made.
    pub const FOREIGN: &str = "foreign";
    /// A request from the tunnel whose egress ID or sender this node does not know.
    pub const UNKNOWN: &str = "unknown";
    /// A request from the tunnel whose destination is this node, the allocation's owner.
    pub const TO_OWNER: &str = "to_owner";
    /// A packet that was translated to another address than its allocation's, because its connection is older than
    /// the allocation.
    pub const STALE: &str = "stale";
    /// A packet to an egress IP that belongs to no connection.
    pub const UNSOLICITED: &str = "unsolicited";
    /// Not dropped: a connection left this node from another port than the pod used, because another connection had
    /// that port with the same address.
    pub const OTHER_PORT: &str = "other_port";
    /// Not dropped: the first packet of a connection, IPv4 and IPv6, that a gateway has admitted from the tunnel.
    pub const ENTERED: [&str; 2] = ["entered4", "entered6"];
    /// Not dropped: the same packet after the hook `forward`. Routing and other programs' firewalls lie between these
    /// two counters.
    pub const FORWARDED: [&str; 2] = ["forwarded4", "forwarded6"];
    /// A packet beyond the bandwidth of its egress IP.
    pub const BANDWIDTH: &str = "bandwidth";
    /// A packet on the tunnel device whose egress ID leads to no node.
    pub const NO_HOP: &str = "no_hop";
    /// A packet on the pair of veths that was not sent to the tunnel next hop: no route of Egret's led it there. The kernel's own
    /// multicast (neighbour discovery, MLD) is among them.
    pub const NOT_ROUTED: &str = "not_routed";
}

/// The names of maps and sets.
pub mod set {
    /// Map: pod mark to the pod's policy chain.
    pub const PODS: &str = "pods";
    /// Map: a selected pod's veth to its pod mark.
    pub const VETHS: &str = "veths";
    /// Map, of the table bridge: a selected pod's veth to the chain for packets that come by an ifb device.
    pub const LIMITED: &str = "limited";
    /// Set: a pod mark with one of the pod's addresses.
    pub const OWN: [&str; 2] = ["own4", "own6"];
    /// Set: the addresses of this node's selected pods, including pods whose veth was not found.
    pub const SELECTED: [&str; 2] = ["selected4", "selected6"];
    /// Map: a connection's mark with an egress ID to the mark that routes its packets.
    pub const EGRESS_ID_OUT: &str = "egress_id_out";
    /// Map: the egress ID from the tunnel header to the mark that routes the packet onwards.
    pub const RX: &str = "rx";
    /// Map: the MAC address of the sending node to the mark of its connections.
    pub const PEER: &str = "peer";
    /// Map: a connection mark with an egress ID to the owner's MAC address.
    pub const HOP: &str = "hop";
    /// Map: a peer's connection mark to the peer's MAC address.
    pub const BACK: &str = "back";
    /// Map: the mark of an allocation to its egress IP.
    pub const SNAT: [&str; 2] = ["snat4", "snat6"];
    /// Set: the mark of an allocation with its egress IP.
    pub const PAIRS: [&str; 2] = ["pairs4", "pairs6"];
    /// Set: direct networks, as ranges.
    pub const DIRECT: [&str; 2] = ["direct4", "direct6"];
    /// Set: direct single addresses.
    pub const HOSTS: [&str; 2] = ["hosts4", "hosts6"];
    /// Set: the addresses from which tunnel packets are accepted.
    pub const TUNNEL: [&str; 2] = ["tunnel4", "tunnel6"];
    /// Set: egress IPs that this node may hold.
    pub const EGRESS: [&str; 2] = ["egress4", "egress6"];
    /// Set: addresses of Services that are egress IPs and that this node may come to serve.
    pub const SERVICES: [&str; 2] = ["services4", "services6"];
    /// Set: the pools of all gateways. Only the owner of an egress IP sends from such an address.
    pub const POOLS: [&str; 2] = ["pools4", "pools6"];
    /// Set: the addresses of [`EGRESS`] that answer echo requests.
    pub const PING: [&str; 2] = ["ping4", "ping6"];
    /// Map: egress ID to the chain that writes its DSCP.
    pub const DSCP: &str = "dscp_values";
    /// Map: egress ID to the limit of what its pods send.
    pub const LIMIT_EGRESS: &str = "limit_egress";
    /// Map: egress IP to the limit of what its pods receive.
    pub const LIMIT_INGRESS: [&str; 2] = ["limit_ingress4", "limit_ingress6"];
    /// Set: the keys of [`LIMIT_EGRESS`], which count the packets beyond the limits.
    pub const BEYOND_EGRESS: &str = "beyond_egress";
    /// Set: the keys of [`LIMIT_INGRESS`], which count the packets beyond the limits.
    pub const BEYOND_INGRESS: [&str; 2] = ["beyond_ingress4", "beyond_ingress6"];
    /// Set: pairs of equal values of four bits of a port. A look-up of two ports tells whether they differ.
    pub const SAME_PORT: &str = "same_port";
    /// Map: egress IPs that are being moved to this node, to the mark of packets for the old node.
    pub const HANDED: &str = "handed";
    /// Map: a connection mark whose allocation was moved away just now, to the mark of connections that this node
    /// still translates.
    pub const LEFT: &str = "left";
    /// Map: a connection mark whose allocation was moved here just now, to the mark of connections that the old node
    /// still translates.
    pub const CAME: &str = "came";
}

/// The mark in the value of a map's element.
pub fn mark_of(data: &Data) -> Option<u32> {
    match data {
        Data::Value(bytes) => bytes.as_slice().try_into().ok().map(u32::from_ne_bytes),
        _ => None,
    }
}

/// The mark in the key of a map's element.
pub fn mark_in(key: &Key) -> Option<u32> {
    key.bytes.as_slice().try_into().ok().map(u32::from_ne_bytes)
}

fn value(mark: u32) -> Data {
    Data::Value(mark.into())
}

/// The tables of one plan. The next ones reuse what did not change: a pod's start changes one chain of hundreds.
#[derive(Debug)]
pub struct Ruleset {
    plan: NodePlan,
    /// The chains that do not depend on policies and pods.
    fixed: Arc<[(Arc<str>, Arc<Chain>)]>,
    tables: Vec<(TableName, Table)>,
}

impl Ruleset {
    /// The tables for `plan`. Parts of `before`, which was made with the same marks, are reused where nothing
    /// changed.
    pub fn new(plan: NodePlan, shared: &SharedSets, marks: Marks, before: Option<&Ruleset>) -> Self {
        fn of(plan: &NodePlan) -> impl PartialEq {
            (plan.local, plan.port_log, plan.foreign_marks, &plan.from_vrf)
        }
        let is_same = |before: &&Ruleset| of(&before.plan) == of(&plan);
        let fixed = before.filter(is_same).map_or_else(
            || fixed::chains(&plan, marks).into_iter().map(|(name, chain)| (name.into(), Arc::new(chain))).collect(),
            |before| before.fixed.clone(),
        );
        let mut tables = vec![(INET, inet(&plan, &fixed, shared, marks, before))];
        tables.extend(handover::tables(&plan, marks));
        tables.push((NETDEV, netdev(&plan, shared, marks, before)));
        tables.extend(limited::table(&plan, marks).map(|table| (BRIDGE, table)));
        let held = before.and_then(|before| Some((&before.plan, before.table(FLUSH_GUARD)?)));
        tables.extend(flush_guard::table(&plan, marks, held));
        Ruleset { plan, fixed, tables }
    }

    /// All tables, by name.
    pub fn tables(&self) -> &[(TableName, Table)] {
        &self.tables
    }

    /// The plan that the tables are of.
    pub fn plan(&self) -> &NodePlan {
        &self.plan
    }

    /// The indexes of the veths of the selected pods.
    pub fn veths(&self) -> impl Iterator<Item = u32> {
        self.plan.pods.keys().filter_map(|chain| parse_chain_name(chain)).map(|(_, index)| index)
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
    before: Option<&Ruleset>,
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
            counter::BANDWIDTH,
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
    for step in plan.policy_chains.values().flat_map(|policy_chain| policy_chain.steps()) {
        let before = before.map(|(_, table)| &table.sets);
        if !step.covers_everything() {
            covers::add_sets(&step.covers, before, &mut table.sets);
        }
        choices::add_map(&step.by_connection, marks, before, &mut table.sets);
    }
    let kind = SetKind::plain(DataType::Mark, Some(DataType::Mark)).counted();
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
    let of_bandwidth = bandwidth::chains(marks, plan.from_vrf.is_some(), |map| shared.sets.contains_key(map));
    let of_bandwidth = of_bandwidth.into_iter().map(|(name, chain)| (name.into(), chain));
    let of_treatments = dscp::chains(&shared.dscp, marks).into_iter().chain(of_bandwidth);
    let of_treatments = of_treatments.map(|(name, chain)| (name, Arc::new(chain)));
    table.chains = fixed.iter().cloned().chain(of_pods).chain(of_policy_chains).chain(of_treatments).collect();
    table.limits.clone_from(&shared.limits);
    handover::keep_old_ways(plan, marks, &mut table);
    table
}

type ByName<V> = BTreeMap<Arc<str>, Arc<V>>;

/// One chain for each value, by `make`. A chain of `before` is reused if its value did not change.
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

/// The elements, or the list of `before` if it is equal: sets that share a list need no comparison.
fn unless_same(elements: Elements, before: Option<&Set>) -> Arc<Elements> {
    let same = before.filter(|before| *before.elements == elements);
    same.map_or_else(|| Arc::new(elements), |before| before.elements.clone())
}

fn base(kind: &str, number: u32, priority: i32) -> Option<Hook> {
    Some(Hook { kind: kind.into(), number, priority, policy: Policy::Accept, device: None })
}

/// The ingress hook of a pod's own veth. Every packet there comes from the pod, whatever its source address. A packet
/// on which no rule decides is dropped.
fn ingress(device: &str) -> Hook {
    Hook {
        kind: "filter".into(),
        number: hook::INGRESS,
        priority: 0,
        policy: Policy::Drop,
        device: Some(device.into()),
    }
}

fn netdev(plan: &NodePlan, shared: &SharedSets, marks: Marks, before: Option<&Ruleset>) -> Table {
    let is_same_way = before.is_some_and(|before| before.plan.way == plan.way);
    let before = before.and_then(|before| before.table(NETDEV));
    let mut table = Table { counters: [counter::NO_HOP, counter::NOT_ROUTED].into(), ..Table::default() };
    let hop = plan.allocations.iter().filter_map(|(id, allocation)| match allocation.state {
        AllocationState::Remote(mac) => Some((marks.connection(*id).into(), Data::Value(mac.as_slice().into()))),
        _ => None,
    });
    // For a moment, the old owner still translates the earlier connections of an allocation that has just moved here.
    let came = plan.moved_here().map(|(id, mac)| (marks.connection(id).into(), Data::Value(mac.as_slice().into())));
    let handed =
        plan.handed.iter().map(|(id, (_, mac))| (marks.handed(*id).into(), Data::Value(mac.as_slice().into())));
    let kind = SetKind::plain(DataType::Mark, Some(DataType::Ether));
    let hop = unless_same(hop.chain(came).chain(handed).collect(), before.and_then(|table| table.sets.get(set::HOP)));
    table.sets.insert(set::HOP.into(), Set { kind, elements: hop });
    table.sets.extend(shared.sets.get(set::BACK).map(|s| (set::BACK.into(), s.clone())));
    let chain_of_before = |name: &str| before.filter(|_| is_same_way).and_then(|table| table.chains.get(name).cloned());
    let on = |number, device: &str, policy| {
        Some(Hook { kind: "filter".into(), number, priority: 0, policy, device: Some(device.into()) })
    };
    if plan.way.has_hook() {
        let make = || Arc::new(Chain::new(on(hook::NETDEV_EGRESS, DEVICE, Policy::Accept), fixed::to_tunnel()));
        table.chains.insert(TO_TUNNEL.into(), chain_of_before(TO_TUNNEL).unwrap_or_else(make));
    }
    if let Some(tunnel) = plan.way.by_veths() {
        let hook = || on(hook::NETDEV_INGRESS, HOP_DEVICE, Policy::Drop);
        let make = || Arc::new(Chain::new(hook(), fixed::into_tunnel(tunnel)));
        table.chains.insert(INTO_TUNNEL.into(), chain_of_before(INTO_TUNNEL).unwrap_or_else(make));
    }
    table
}
