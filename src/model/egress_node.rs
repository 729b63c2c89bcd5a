//! EgressNode statuses, stored compactly.

use crate::api::{
    BlockedAllocation, Condition, EgressNodeStatus, FailingProbes, Fault, LostUplink, PortsNearlyExhausted,
    RefusedAllocation, ReportGiven, TakenAllocation,
};
use crate::model::PolicyKey;
use crate::model::marks::EgressId;
use crate::model::uplink_key::UplinkKey;
use egret_nft::mac::{self, Mac};
use std::net::IpAddr;

/// The status that a node's daemon writes ([`EgressNodeStatus`]). There may be thousands, and only gateway nodes
/// report more than their tunnel address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressNode {
    /// The address that tunnel packets are sent to.
    pub tunnel_address: Option<IpAddr>,
    /// The MAC address of the node's tunnel device; `None` also if the text is not a MAC address.
    pub tunnel_mac: Option<Mac>,
    /// Whether the node answers liveness probes.
    pub answers: bool,
    of_allocations: Option<Box<OfAllocations>>,
}

impl OfAllocations {
    /// The egress IPs whose addresses are on an interface of the node.
    pub fn on_interface(&self) -> impl Iterator<Item = EgressId> + '_ {
        self.held.iter().copied().filter(|id| !self.without_address.contains(id))
    }

    /// The report that the node has lost this uplink.
    pub fn loss(&self, key: &UplinkKey) -> Option<&LostUplink> {
        self.lost.iter().find(|lost| {
            lost.family == key.family()
                && lost.interface.as_deref() == key.interface.as_deref()
                && lost.gateway.as_deref() == key.gateway.as_deref()
        })
    }
}

/// The part of a node's status that concerns egress IPs and gateway nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OfAllocations {
    /// The egress IPs that it holds.
    pub held: Vec<EgressId>,
    /// Those of `held` whose address is on no interface of the node.
    pub without_address: Vec<EgressId>,
    /// The egress IPs that it has taken over.
    pub taken: Vec<TakenAllocation>,
    /// The egress IPs that it should hold and cannot.
    pub refused: Vec<RefusedAllocation>,
    /// Gateway nodes that do not answer this node. It lists itself while it cannot hold any egress IP.
    pub unreachable_peers: Vec<String>,
    /// Gateway nodes that do not answer this source node, while others do.
    pub unreachable_gateway_nodes: Vec<String>,
    /// The requests of gateways for reports that it knew when it wrote this.
    pub reports_given: Vec<ReportGiven>,
    /// Since when it records connections.
    pub flow_log_since: Option<i64>,
    /// The uplinks and families that it has lost.
    pub lost: Vec<LostUplink>,
    /// The probes of gateways that fail, although no other node's are known to succeed.
    pub failing_probes: Vec<FailingProbes>,
    /// The egress IPs that its pods use and whose traffic it blocks now.
    pub blocked: Vec<BlockedAllocation>,
    /// The policies whose pods are isolated there, because they list too many destinations for one node.
    pub over_limit: Vec<PolicyKey>,
    /// What it had to skip. Empty in node daemons.
    pub faults: Vec<Fault>,
    /// Destinations for which its egress IPs have few source ports left. Empty in node daemons.
    pub ports_nearly_exhausted: Vec<PortsNearlyExhausted>,
    /// The version of its daemon. Absent in node daemons.
    pub version: Option<Box<str>>,
    /// Since when it has been in sync, RFC 3339. Absent in node daemons.
    pub in_sync_since: Option<Box<str>>,
    /// The MTU of its tunnel device, bytes. Absent in node daemons.
    pub tunnel_mtu: Option<u32>,
    /// Its conditions that are false. Empty in node daemons.
    pub failing: Vec<Condition>,
}

impl EgressNode {
    /// The part of the status that concerns egress IPs.
    pub fn of_allocations(&self) -> &OfAllocations {
        static NOTHING: OfAllocations = OfAllocations {
            held: Vec::new(),
            without_address: Vec::new(),
            taken: Vec::new(),
            refused: Vec::new(),
            unreachable_peers: Vec::new(),
            unreachable_gateway_nodes: Vec::new(),
            reports_given: Vec::new(),
            flow_log_since: None,
            lost: Vec::new(),
            failing_probes: Vec::new(),
            blocked: Vec::new(),
            over_limit: Vec::new(),
            faults: Vec::new(),
            ports_nearly_exhausted: Vec::new(),
            version: None,
            in_sync_since: None,
            tunnel_mtu: None,
            failing: Vec::new(),
        };
        self.of_allocations.as_deref().unwrap_or(&NOTHING)
    }

    /// The part of the status that concerns egress IPs, for tests to change.
    #[cfg(test)]
    pub(crate) fn of_allocations_mut(&mut self) -> &mut OfAllocations {
        self.of_allocations.get_or_insert_default()
    }
}

impl From<EgressNodeStatus> for EgressNode {
    fn from(status: EgressNodeStatus) -> Self {
        let EgressNodeStatus {
            version,
            in_sync_since,
            tunnel_address,
            tunnel_mac,
            tunnel_mtu,
            answers,
            allocations,
            without_address,
            taken,
            refused,
            unreachable_peers,
            unreachable_gateway_nodes,
            reports_given,
            flow_log_since,
            lost,
            failing_probes,
            blocked,
            over_limit,
            ports_nearly_exhausted,
            direct: _,
            faults,
            conditions,
        } = status;
        let of_allocations = OfAllocations {
            held: allocations,
            without_address,
            taken,
            refused,
            unreachable_peers,
            unreachable_gateway_nodes,
            reports_given,
            flow_log_since,
            lost,
            failing_probes,
            blocked,
            over_limit: over_limit.iter().map(|key| PolicyKey::from(key.as_str())).collect(),
            faults,
            ports_nearly_exhausted,
            version: version.map(Into::into),
            in_sync_since: in_sync_since.map(Into::into),
            tunnel_mtu,
            failing: conditions.into_iter().filter(|condition| condition.status == "False").collect(),
        };
        EgressNode {
            tunnel_address,
            tunnel_mac: tunnel_mac.as_deref().and_then(|text| mac::parse(text).ok()),
            answers,
            of_allocations: (of_allocations != OfAllocations::default()).then(|| Box::new(of_allocations)),
        }
    }
}
