use super::{Condition, Protocol};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The status of one node, for the other nodes and for the controller. Only the node itself writes it.
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
    printcolumn = r#"{"name": "Datapath", "type": "string", "jsonPath": ".status.conditions[?(@.type=='DatapathReady')].status"}"#,
    printcolumn = r#"{"name": "Answers", "type": "boolean", "jsonPath": ".status.answers"}"#,
    printcolumn = r#"{"name": "Version", "type": "string", "jsonPath": ".status.version"}"#,
    printcolumn = r#"{"name": "In Sync", "type": "date", "jsonPath": ".status.inSyncSince"}"#,
    printcolumn = r#"{"name": "Allocations", "type": "string", "jsonPath": ".status.allocations", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressNodeSpec {}

/// The tunnel address of a node, and the egress IPs that it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeStatus {
    /// The version of the node's daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Since when the node's kernel has been in sync with the cluster's state, RFC 3339; absent if it has not been for ten
    /// seconds. A shorter time out of sync leaves it as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_sync_since: Option<String>,
    /// The address that tunnel packets are sent to, one of the node's own.
    pub tunnel_address: Option<IpAddr>,
    /// The MAC address of the node's tunnel device, `02:…`, derived from the node's name.
    pub tunnel_mac: Option<String>,
    /// The MTU of the node's tunnel device, bytes: what its pods' packets to a gateway node may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_mtu: Option<u32>,
    /// Whether the node answers liveness probes in the tunnel while it can hold egress IPs: its tunnel carries IPv6.
    #[serde(default)]
    pub answers: bool,
    /// The ids of the egress IPs that this node holds now, sorted.
    #[serde(default)]
    pub allocations: Vec<u16>,
    /// Those of `allocations` whose address is on no interface of this node, sorted: addresses of Services that
    /// something announces from here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_address: Vec<u16>,
    /// Egress IPs that this node has taken over, because the node that the allocation names did not answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taken: Vec<TakenAllocation>,
    /// Egress IPs that this node should hold and cannot, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedAllocation>,
    /// Gateway nodes that do not answer this node, sorted. It lists itself while it cannot hold any egress IP. Only a
    /// gateway node reports this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreachable_peers: Vec<String>,
    /// Gateway nodes that have not answered this node for some seconds, sorted, while one of them holds an egress IP of
    /// this node's pods and another gateway node answers. Only a node that is not a gateway node reports this. If no node
    /// with such pods reaches the holder, the egress IP moves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreachable_gateway_nodes: Vec<String>,
    /// The requests of gateways (`status.reportsRequestedAt`) that this node knew when it wrote this status. A gateway node
    /// answers all of them, another node only while `unreachableGatewayNodes` is not empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reports_given: Vec<ReportGiven>,
    /// Since when this node's daemon records connections of egress IPs (`--flow-log`), seconds since the Unix epoch; absent
    /// if it does not. Other nodes tell it the names of their pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow_log_since: Option<i64>,
    /// The uplinks of this node, by family, that it cannot use now, with the reason. Egress IPs that need them move
    /// to another node, if one has lost fewer of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<LostUplink>,
    /// Probes of gateways (`spec.probes`) that fail on this node, while it knows of no other node on which they succeed.
    /// Nothing moves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failing_probes: Vec<FailingProbes>,
    /// Egress IPs whose packets this node drops now, with the reason: those that its own pods use, and those that it
    /// holds and whose new connections it drops.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocked: Vec<BlockedAllocation>,
    /// Policies, `namespace/name` or `name`, whose pods are isolated on this node, sorted: the policies of its pods list
    /// more destinations than one node takes, and these list the most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub over_limit: Vec<String>,
    /// Destinations to which connections from this node's egress IPs use most of the source ports, at most ten: an entry
    /// comes when more than 80 % of the ports are in use, and goes when less than 70 % are. When all are in use, the kernel
    /// drops new connections there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports_nearly_exhausted: Vec<PortsNearlyExhausted>,
    /// The networks inside the cluster, as this node knows them, each with its origin. Traffic to them goes direct.
    /// Single addresses of nodes and Services are not listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub direct: Vec<DirectNetwork>,
    /// Nodes, networks and addresses that this node had to skip, sorted, with the reason; only the first ones of
    /// many. Everything else is in sync, and these are retried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
    /// `FastPath`, with `--fast-path-lease`: whether packets of long connections take the fast path, or why not.
    /// `DatapathReady`: the kernel takes what policies need. It is false while the kernel refuses a part that it lacks; the
    /// message names the part and the remedy, as `egretd check` does.
    /// `PodsArrive`, where a CNI's eBPF is at pods' veths: whether packets of selected pods arrive at nf_tables. Where they do
    /// not, all that leaves the cluster is blocked for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl EgressNodeStatus {
    /// Removes the fields that only users read. Thousands of nodes have them.
    pub fn for_machines(self) -> Self {
        EgressNodeStatus {
            version: None,
            in_sync_since: None,
            tunnel_mtu: None,
            ports_nearly_exhausted: Vec::new(),
            direct: Vec::new(),
            blocked: Vec::new(),
            faults: Vec::new(),
            conditions: Vec::new(),
            ..self
        }
    }
}

/// Something that a node had to skip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// The subject: `node n2`, `network 10.9.0.0/16, table 7874`.
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
    /// The network in CIDR notation.
    pub network: String,
    /// The origin: the object or setting that lists it.
    pub from: String,
}

/// An egress IP that a node holds although the allocation names another node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TakenAllocation {
    /// The id of the allocation.
    pub id: u16,
    /// The `since` of the allocation at the takeover.
    pub since: i64,
}

/// The answer to a gateway's request for reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportGiven {
    /// The gateway.
    pub gateway: String,
    /// Its `status.reportsRequestedAt`, seconds since the Unix epoch.
    pub requested_at: i64,
}

/// Probes of a gateway that fail on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailingProbes {
    /// The gateway.
    pub gateway: String,
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// The targets that do not answer.
    pub message: String,
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
    /// The gateway whose probes fail here and succeed on another node; absent if the uplink itself is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The reason.
    pub message: String,
}

/// An egress IP whose packets a node drops.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockedAllocation {
    /// The id of the allocation.
    pub id: u16,
    /// `IPv4` or `IPv6`; absent: both.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub family: Option<String>,
    /// The reason.
    pub message: String,
}

/// A destination to which connections from an egress IP use most of the source ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortsNearlyExhausted {
    /// The id of the allocation.
    pub id: u16,
    /// The egress IP.
    pub address: IpAddr,
    /// The address of the server.
    pub destination: IpAddr,
    /// The port of the server.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The source ports among which the kernel chooses: `1024-65535`; `1-511` and `600-1023` for clients that send from
    /// such ports.
    pub ports: String,
}

/// An egress IP that its node cannot hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedAllocation {
    /// The id of the allocation.
    pub id: u16,
    /// The reason, and the remedy.
    pub message: String,
}
