use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What one node says of itself to the others. Written by that node alone.
#[derive(kube::CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[kube(
    group = "egret.dev",
    version = "v1alpha1",
    kind = "EgressNode",
    plural = "egressnodes",
    status = "EgressNodeStatus",
    shortname = "en",
    category = "egret",
    printcolumn = r#"{"name": "Tunnel", "type": "string", "jsonPath": ".status.tunnelAddress"}"#,
    printcolumn = r#"{"name": "Answers", "type": "boolean", "jsonPath": ".status.answers"}"#,
    printcolumn = r#"{"name": "Allocations", "type": "string", "jsonPath": ".status.allocations", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressNodeSpec {}

/// Where the node's end of the tunnel is, and which allocations it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeStatus {
    /// The address that tunnel packets are sent to, one of the node's own.
    pub tunnel_address: Option<IpAddr>,
    /// The MAC address of the node's end of the tunnel, `02:…`, derived from the node's name.
    pub tunnel_mac: Option<String>,
    /// Whether the node answers in the tunnel, while it can hold allocations, to those who ask whether it lives: its tunnel
    /// carries IPv6.
    #[serde(default)]
    pub answers: bool,
    /// The ids of the allocations whose addresses this node holds now, sorted.
    #[serde(default)]
    pub allocations: Vec<u16>,
    /// Allocations that this node has taken over because the allocations' node seemed dead.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taken: Vec<TakenAllocation>,
    /// Allocations that this node should hold and cannot, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedAllocation>,
    /// Gateways' nodes that do not answer this one, sorted; this one itself, while it cannot hold any allocation. Only a
    /// gateway's node says so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreachable_peers: Vec<String>,
    /// The uplinks of this node, by family, that it cannot use now, and why. Egress IPs that need them are on another node,
    /// if one can use more of what they need.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<LostUplink>,
    /// Allocations whose packets lead nowhere from here now, and why: that pods of this node use, or that it holds and whose new
    /// connections it drops.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocked: Vec<BlockedAllocation>,
    /// The networks that this node takes for the cluster's own, to which no policy's traffic goes by a gateway, and
    /// where each is known from. Nodes' and Services' single addresses are not in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub direct: Vec<DirectNetwork>,
    /// Other nodes, networks and addresses that this node had to pass over, sorted, and why; of many the first. All else is
    /// in sync, and they are tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
}

impl EgressNodeStatus {
    /// Without what is for people: five thousand nodes say the same.
    pub fn for_machines(self) -> Self {
        EgressNodeStatus { direct: Vec::new(), blocked: Vec::new(), faults: Vec::new(), ..self }
    }
}

/// What a node had to pass over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// What it is about: `node n2`, `network 10.9.0.0/16, table 7874`.
    pub of: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl From<(&String, &String)> for Fault {
    fn from((of, message): (&String, &String)) -> Self {
        Fault { of: of.clone(), message: message.clone() }
    }
}

/// A network inside the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DirectNetwork {
    /// In CIDR notation.
    pub network: String,
    /// Where it is known from.
    pub from: String,
}

/// An allocation that a node holds though the allocations name another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TakenAllocation {
    /// The allocation's id.
    pub id: u16,
    /// `since` of the allocations' entry at that time.
    pub since: i64,
}

/// One family of an uplink that a node cannot use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LostUplink {
    /// The interface, where the gateway names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// Why.
    pub message: String,
}

/// An allocation that leads nowhere from a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockedAllocation {
    /// The allocation's id.
    pub id: u16,
    /// `IPv4` or `IPv6`, if it is of one of them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub family: Option<String>,
    /// Why.
    pub message: String,
}

/// An allocation that its node cannot hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedAllocation {
    /// The allocation's id.
    pub id: u16,
    /// Why, and what to do.
    pub message: String,
}
