use super::{AddressPair, Condition, Name, PolicyKey};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// A group of nodes and the addresses that they hold between them.
#[derive(kube::CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[kube(
    group = "egret.dev",
    version = "v1alpha1",
    kind = "EgressGateway",
    plural = "egressgateways",
    status = "EgressGatewayStatus",
    shortname = "egw",
    category = "egret",
    printcolumn = r#"{"name": "Default", "type": "boolean", "jsonPath": ".spec.default"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Nodes", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message"}"#,
    printcolumn = r#"{"name": "Addresses", "type": "string", "jsonPath": ".status.conditions[?(@.type=='AddressesLeft')].message"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Placement", "type": "string", "jsonPath": ".spec.placement", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressGatewaySpec {
    /// The nodes that can hold this gateway's addresses.
    #[serde(deserialize_with = "super::selector::required")]
    pub node_selector: LabelSelector,
    /// The pool: single addresses (`192.0.2.50`), ranges (`192.0.2.50-192.0.2.59`) and networks in CIDR notation
    /// (`198.51.100.16/28`, every address of it), IPv4 and IPv6. May be empty for a gateway whose policies all say
    /// `allocate: Node`. What can be no host's address (loopback, link-local, multicast, 0.0.0.0/8, 240.0.0.0/4), what is
    /// a pod's or a Service's, and what a node has on its own is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// `Managed`: Egret puts each address onto the owning node's uplink. `External`: something else places the
    /// addresses, and the node that has one locally owns it.
    #[serde(default)]
    pub placement: Placement,
    /// The interface that the addresses are put on, and that `nextHop` is behind. Default: the interface whose network
    /// holds the address, else the one of the default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The router that the traffic leaves through. Default: what the main routing table says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<AddressPair>,
    /// Whether policies that name no gateway use this one. At most one gateway should say so.
    #[serde(default)]
    pub default: bool,
    /// Whether nodes answer ICMP and ICMPv6 echo requests (ping) to the addresses that they hold. Without it nothing
    /// that comes to an egress address is answered, but what belongs to a pod's connection. Of use with
    /// `placement: Managed` alone: an address that Egret does not place is the node's to answer for.
    #[serde(default)]
    pub answer_ping: bool,
    /// Whether egress IPs stay on a node that is cordoned (`spec.unschedulable`, set by `kubectl cordon` and `kubectl
    /// drain`). Without it they move to the gateway's other nodes, one by one and without a pause, if one of those
    /// lives and is not cordoned; after `kubectl uncordon` they stay where they are.
    #[serde(default)]
    pub ignore_cordon: bool,
    /// The namespaces whose policies may use this gateway. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub namespace_selector: Option<LabelSelector>,
    /// Who may share an egress IP that policies name (`address`). `Namespace`: policies of one namespace; the first one has
    /// it, and those of other namespaces, and ClusterEgressPolicies, are refused. `Cluster`: all policies that may use the
    /// gateway. The address that policies get by `allocate: Shared` is shared by all of them, as they ask for.
    #[serde(default)]
    pub sharing: Sharing,
    /// Addresses that only policies of some namespaces may have, and only by naming them: nobody gets them by `allocate`.
    /// A ClusterEgressPolicy may name all. An address that several of these have may be named by the namespaces of each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reservations: Vec<Reservation>,
    /// How much of this gateway the EgressPolicies of one namespace may have together; of each namespace the same. A policy
    /// that goes beyond is refused, and the others are as they were. ClusterEgressPolicies do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_quota: Option<NamespaceQuota>,
}

/// Who may share an egress IP that policies name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Sharing {
    /// Policies of one namespace; or several ClusterEgressPolicies.
    #[default]
    Namespace,
    /// All policies that may use the gateway.
    Cluster,
}

/// Addresses that are for some namespaces alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reservation {
    /// The addresses, ranges and networks, written as in the gateway's `addresses`.
    pub addresses: Vec<String>,
    /// The namespaces whose policies may name them.
    #[serde(deserialize_with = "super::selector::required")]
    pub namespace_selector: LabelSelector,
}

/// How much the EgressPolicies of one namespace may have together. What is absent has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamespaceQuota {
    /// How many policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<u32>,
    /// How many egress IPs, named or by `allocate: Dedicated`; a pair counts once, and so does what several share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<u32>,
    /// How many networks, exceptions and ports their `egress` may list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destinations: Option<u32>,
}

/// Who puts a gateway's addresses onto its nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Placement {
    /// Egret does.
    #[default]
    Managed,
    /// Something else does; the node that has the address locally owns it.
    External,
}

/// The allocations, and what a person should know. Written by the controller alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressGatewayStatus {
    /// The nodes that match `nodeSelector`, sorted.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// The allocations: every address in use, its id, its node, and who uses it.
    #[serde(default)]
    pub allocations: Vec<Allocation>,
    /// Ids and addresses given back, kept from reuse for ten minutes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub released: Vec<ReleasedAllocation>,
    /// What is so and what is not, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Who wrote this, where several controllers take turns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<AllocationsWriter>,
    /// Of a long list, `allocations` and `released` as lines: after the `node` lines, each allocation's id, kind, addresses, node
    /// by its number among those, since, leaving, policies; with a `-`, what was released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// The controller that wrote a gateway's allocations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocationsWriter {
    /// Its name in the Lease.
    pub name: String,
    /// How often the Lease had changed hands when it got it.
    pub term: i64,
    /// How often the allocations were written.
    pub writes: i64,
}

/// How an allocation's address came to be.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub enum AllocationKind {
    /// Named by the policy, `spec.address`; policies that name the same address share it.
    Explicit,
    /// From the pool, for one policy alone.
    #[default]
    Dedicated,
    /// From the pool, for all the gateway's policies that say `allocate: Shared`.
    Shared,
    /// The gateway node's own address. It does not move with the allocation: another node has another address.
    Node,
}

/// The policies of an allocation: of ten thousand allocations nearly each has one, and that one needs no room of its own.
pub type Users = SmallVec<[PolicyKey; 1]>;

/// One egress address (or a pair) with its cluster-wide id and the node that is to hold it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// Cluster-wide id, 1 to 16383; it travels with each packet through the tunnel.
    pub id: u16,
    /// How the address came to be.
    pub kind: AllocationKind,
    /// The address that servers see.
    #[serde(flatten)]
    pub address: AddressPair,
    /// The node that is to hold the address; absent while no node of the gateway can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub node: Option<Name>,
    /// When `node` got it, seconds since the Unix epoch; each change of `node` has another. A node that takes the allocation
    /// over says since when the allocations were as it saw it, so that what is said of older allocations counts no more.
    #[serde(default)]
    pub since: i64,
    /// The node that holds the address until `node` does: the allocation is being moved on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub leaving: Option<Name>,
    /// The policies that use it: `namespace/name` of an EgressPolicy, `name` of a ClusterEgressPolicy. Sorted.
    #[schemars(with = "Vec<String>")]
    pub policies: Users,
}

/// An allocation that was given back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleasedAllocation {
    /// The id it had.
    pub id: u16,
    /// The address it had.
    #[serde(flatten)]
    pub address: AddressPair,
    /// The policies that had it; one that comes back within the time gets the same again.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub policies: Users,
    /// When it was given back, seconds since the Unix epoch.
    pub at: i64,
}
