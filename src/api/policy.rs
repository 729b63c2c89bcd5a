use super::{AddressPair, Condition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Which pods of its namespace leave the cluster to which destinations, through which gateway, from which address.
#[derive(kube::CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[kube(
    group = "egret.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    plural = "egresspolicies",
    namespaced,
    status = "EgressPolicyStatus",
    shortname = "egp",
    category = "egret",
    printcolumn = r#"{"name": "Gateway", "type": "string", "jsonPath": ".status.gateway"}"#,
    printcolumn = r#"{"name": "IPv4", "type": "string", "jsonPath": ".status.addresses.ipv4"}"#,
    printcolumn = r#"{"name": "IPv6", "type": "string", "jsonPath": ".status.addresses.ipv6"}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".status.node"}"#,
    printcolumn = r#"{"name": "Pods", "type": "integer", "jsonPath": ".status.pods"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Shadowed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Shadowed')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicySpec {
    /// The gateway's name. Default: the gateway that says `default: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The pods, by label; `{}` is every pod of the namespace. Either this or `services`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub pod_selector: Option<LabelSelector>,
    /// The pods that these Services of the namespace select. Either this or `podSelector`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// The destinations; absent: everything outside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
    /// The address to leave from, out of the gateway's pool. Either this or `allocate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<AddressPair>,
    /// How an address is found when none is named. Default: `Dedicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// What happens to covered traffic while the allocation is not ready.
    #[serde(default)]
    pub fallback: Fallback,
    /// What happens to covered connections that pods had begun before the policy began for them.
    #[serde(default)]
    pub existing_connections: ExistingConnections,
    /// Of several policies that cover a destination, the one with the higher number decides; then an EgressPolicy
    /// goes before a ClusterEgressPolicy, the older before the newer, then by name. ClusterEgressPolicies of tier
    /// `Admin` go before all EgressPolicies, those of tier `Baseline` after them.
    #[serde(default)]
    pub priority: i32,
}

/// The same as EgressPolicy, for pods of several namespaces.
#[derive(kube::CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[kube(
    group = "egret.dev",
    version = "v1alpha1",
    kind = "ClusterEgressPolicy",
    plural = "clusteregresspolicies",
    status = "EgressPolicyStatus",
    shortname = "cegp",
    category = "egret",
    printcolumn = r#"{"name": "Gateway", "type": "string", "jsonPath": ".status.gateway"}"#,
    printcolumn = r#"{"name": "IPv4", "type": "string", "jsonPath": ".status.addresses.ipv4"}"#,
    printcolumn = r#"{"name": "IPv6", "type": "string", "jsonPath": ".status.addresses.ipv6"}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".status.node"}"#,
    printcolumn = r#"{"name": "Pods", "type": "integer", "jsonPath": ".status.pods"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Tier", "type": "string", "jsonPath": ".spec.tier", "priority": 1}"#,
    printcolumn = r#"{"name": "Shadowed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Shadowed')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterEgressPolicySpec {
    /// `Admin`: goes before every EgressPolicy, whatever the priorities. `Baseline`: goes after every EgressPolicy.
    /// Absent: among the EgressPolicies, by `priority`. Within a tier `priority` decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
    /// The namespaces; `{}` or absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub namespace_selector: Option<LabelSelector>,
    /// The gateway's name. Default: the gateway that says `default: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The pods, by label; `{}` is every pod of the namespaces. Either this or `services`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub pod_selector: Option<LabelSelector>,
    /// The pods that Services of these names select, in each of the namespaces. Either this or `podSelector`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// The destinations; absent: everything outside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
    /// The address to leave from, out of the gateway's pool. Either this or `allocate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<AddressPair>,
    /// How an address is found when none is named. Default: `Dedicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// What happens to covered traffic while the allocation is not ready.
    #[serde(default)]
    pub fallback: Fallback,
    /// What happens to covered connections that pods had begun before the policy began for them.
    #[serde(default)]
    pub existing_connections: ExistingConnections,
    /// Of several policies of one tier that cover a destination, the one with the higher number decides; then an
    /// EgressPolicy goes before a ClusterEgressPolicy, the older before the newer, then by name.
    #[serde(default)]
    pub priority: i32,
}

/// Where a ClusterEgressPolicy stands beside the EgressPolicies, named as in Kubernetes' ClusterNetworkPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Tier {
    /// Before every EgressPolicy.
    Admin,
    /// After every EgressPolicy.
    Baseline,
}

/// Destinations with their ports. As in NetworkPolicy: the rule covers what is in `to` and in `ports`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressRule {
    /// The networks; empty or absent: everything outside the cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<EgressPeer>,
    /// The ports; empty or absent: all ports of all protocols.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EgressPort>,
}

/// One destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPeer {
    /// A network, and networks within it that are not meant.
    pub ip_block: IpBlock,
}

/// How many exceptions a network can have: each takes three expressions of the one rule that they all stand in, of
/// which the kernel allows 128 (`NFT_RULE_MAXEXPRS`, net/netfilter/nf_tables_api.c) in less than 4,096 bytes.
pub const MAX_EXCEPTIONS: usize = 24;

/// A network, and networks within it that are not meant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IpBlock {
    /// The network in CIDR notation, `203.0.113.0/24` or `2001:db8::/32`.
    pub cidr: String,
    /// Networks within `cidr` that are not meant, at most 24.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<String>,
}

/// A protocol, and a port or a range of ports of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPort {
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port, or the first of a range; absent: all ports of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The last port of a range that starts at `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
}

/// A transport protocol.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in IP's header, as IANA gives it.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// How an address is found for a policy that names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Allocate {
    /// An address of its own from the gateway's pool, of each family that the pool has.
    #[default]
    Dedicated,
    /// One address for all the gateway's policies that say so.
    Shared,
    /// The own address of one of the gateway's nodes. No pool is needed, but the address changes when the node does.
    Node,
}

/// What happens to covered traffic while its allocation is not ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Fallback {
    /// It is dropped and counted.
    #[default]
    Block,
    /// It leaves as if there were no policy, with the node's address. While the policy has no address at all - it is
    /// refused, or new - it is passed over: the next policy that covers the destination decides.
    NodeAddress,
}

/// What happens to covered connections that pods had begun before the policy began for them. A connection cannot change
/// its address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum ExistingConnections {
    /// They keep the node's address for as long as they last.
    #[default]
    Keep,
    /// They are ended: TCP by the server's reset, when the pod sends next; what the pod sends by other protocols goes on
    /// from the egress IP. The same happens to those that left by `fallback: NodeAddress`, once the egress IP is there.
    End,
}

/// What became of a policy. Written by the controller alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicyStatus {
    /// The gateway that the policy uses: the one that it names, else the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The address that servers see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressPair>,
    /// The node that holds the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How many pods the policy selects, as of ten seconds ago or less.
    #[serde(default)]
    pub pods: u32,
    /// `Accepted`: an address is set aside. `Ready`: its node holds it. `Shadowed`: other policies decide for all
    /// its pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
