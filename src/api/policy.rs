use super::{AddressPair, EgressPolicyStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Selects pods of its namespace. Their traffic to the given destinations leaves the cluster through a gateway, from
/// an egress IP.
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
    printcolumn = r#"{"name": "IPs", "type": "integer", "jsonPath": ".status.addressCount"}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".status.node"}"#,
    printcolumn = r#"{"name": "Pods", "type": "integer", "jsonPath": ".status.pods"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Since", "type": "date", "jsonPath": ".status.conditions[?(@.type=='Ready')].lastTransitionTime"}"#,
    printcolumn = r#"{"name": "Shadowed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Shadowed')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicySpec {
    /// `EgressIP`: covered traffic leaves from an egress IP. `Direct`: it leaves as if Egret were not there; then
    /// `gateway`, `fallback` and all fields about egress IPs have no meaning and must be absent.
    /// An EgressPolicy with `Direct` is passed over for pods that a ClusterEgressPolicy selects, unless that has
    /// `Direct` too or the tier `Admin`.
    #[serde(default, skip_serializing_if = "Action::is_default")]
    pub action: Action,
    /// The name of the gateway. Default: the gateway with `default: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The pods, by label; `{}` selects every pod of the namespace. Set either this or `services`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub pod_selector: Option<LabelSelector>,
    /// The pods that these Services of the namespace select. Set either this or `podSelector`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// The covered destinations. Default: everything outside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
    /// The egress IP: addresses from the pool of the gateway, or a Service's. Set either this or `allocate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<PolicyAddress>,
    /// How an egress IP is chosen if `address` is absent. Default: the `defaultAddress` of the gateway, or if that has none,
    /// `Dedicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// Several egress IPs, from the pool of the gateway, all of the same families; `spread` divides the traffic among
    /// them. Set either this, `address` or `allocate`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressPair>,
    /// How many egress IPs `allocate: Dedicated` gives; `spread` divides the traffic among them. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_count: Option<u16>,
    /// How the traffic is divided among several egress IPs. Default: `Pod`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    /// Of several egress IPs, a pod has one on a node that is near: on its own node, or on a node of its zone
    /// (`topology.kubernetes.io/zone`), in the given order. Where none is that near, it has any of them, by `spread`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preference: Vec<Preference>,
    /// The DSCP of packets that leave from the egress IP, 0 to 63. Default: what the pod has set. Policies with one
    /// egress IP have one DSCP, that of the oldest that gives one; across namespaces, only ClusterEgressPolicies give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dscp: Option<u8>,
    /// How much the pods of the policy may send and receive together, by each of its egress IPs. Packets beyond it are
    /// dropped. Policies with one egress IP have one bandwidth, by the same rule as for `dscp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// What happens to covered traffic while the egress IP is not ready.
    #[serde(default)]
    pub fallback: Fallback,
    /// What happens to covered connections that began before the policy applied to the pod. With `action: Direct`:
    /// `End` ends those that have an egress IP.
    #[serde(default)]
    pub existing_connections: ExistingConnections,
    /// Of several policies that cover a destination, the one with the highest priority decides; of those, an
    /// EgressPolicy before a ClusterEgressPolicy, then the oldest, then the first by name. ClusterEgressPolicies of
    /// tier `Admin` decide before all EgressPolicies, those of tier `Baseline` after them.
    #[serde(default)]
    pub priority: i32,
}

/// Like EgressPolicy, for pods of several namespaces.
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
    printcolumn = r#"{"name": "IPs", "type": "integer", "jsonPath": ".status.addressCount"}"#,
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".status.node"}"#,
    printcolumn = r#"{"name": "Pods", "type": "integer", "jsonPath": ".status.pods"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "Since", "type": "date", "jsonPath": ".status.conditions[?(@.type=='Ready')].lastTransitionTime"}"#,
    printcolumn = r#"{"name": "Tier", "type": "string", "jsonPath": ".spec.tier", "priority": 1}"#,
    printcolumn = r#"{"name": "Shadowed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Shadowed')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterEgressPolicySpec {
    /// `Admin`: decides before every EgressPolicy, whatever the priorities. `Baseline`: decides after every
    /// EgressPolicy. Absent: ranks among the EgressPolicies by `priority`. Within a tier, `priority` decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
    /// The namespaces of the pods. `{}` or absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub namespace_selector: Option<LabelSelector>,
    /// `EgressIP`: covered traffic leaves from an egress IP. `Direct`: it leaves as if Egret were not there; then
    /// `gateway`, `fallback` and all fields about egress IPs have no meaning and must be absent.
    #[serde(default, skip_serializing_if = "Action::is_default")]
    pub action: Action,
    /// The name of the gateway. Default: the gateway with `default: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The pods, by label; `{}` selects every pod of the namespaces. Set either this or `services`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub pod_selector: Option<LabelSelector>,
    /// The pods that Services of these names select, in each of the namespaces. Set either this or `podSelector`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// The covered destinations. Default: everything outside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
    /// The egress IP: addresses from the pool of the gateway, or a Service's. Set either this or `allocate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<PolicyAddress>,
    /// How an egress IP is chosen if `address` is absent. Default: the `defaultAddress` of the gateway, or if that has none,
    /// `Dedicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// Several egress IPs, from the pool of the gateway, all of the same families; `spread` divides the traffic among
    /// them. Set either this, `address` or `allocate`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressPair>,
    /// How many egress IPs `allocate: Dedicated` gives; `spread` divides the traffic among them. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_count: Option<u16>,
    /// How the traffic is divided among several egress IPs. Default: `Pod`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    /// Of several egress IPs, a pod has one on a node that is near: on its own node, or on a node of its zone
    /// (`topology.kubernetes.io/zone`), in the given order. Where none is that near, it has any of them, by `spread`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preference: Vec<Preference>,
    /// The DSCP of packets that leave from the egress IP, 0 to 63. Default: what the pod has set. Policies with one
    /// egress IP have one DSCP, that of the oldest that gives one; across namespaces, only ClusterEgressPolicies give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dscp: Option<u8>,
    /// How much the pods of the policy may send and receive together, by each of its egress IPs. Packets beyond it are
    /// dropped. Policies with one egress IP have one bandwidth, by the same rule as for `dscp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// What happens to covered traffic while the egress IP is not ready.
    #[serde(default)]
    pub fallback: Fallback,
    /// What happens to covered connections that began before the policy applied to the pod. With `action: Direct`:
    /// `End` ends those that have an egress IP.
    #[serde(default)]
    pub existing_connections: ExistingConnections,
    /// Of several policies of one tier that cover a destination, the one with the highest priority decides; of those,
    /// an EgressPolicy before a ClusterEgressPolicy, then the oldest, then the first by name.
    #[serde(default)]
    pub priority: i32,
}

/// What the two kinds have in common: neither tier nor namespaces.
impl From<ClusterEgressPolicySpec> for EgressPolicySpec {
    fn from(spec: ClusterEgressPolicySpec) -> Self {
        EgressPolicySpec {
            action: spec.action,
            gateway: spec.gateway,
            pod_selector: spec.pod_selector,
            services: spec.services,
            egress: spec.egress,
            address: spec.address,
            allocate: spec.allocate,
            addresses: spec.addresses,
            address_count: spec.address_count,
            spread: spec.spread,
            preference: spec.preference,
            dscp: spec.dscp,
            bandwidth: spec.bandwidth,
            fallback: spec.fallback,
            existing_connections: spec.existing_connections,
            priority: spec.priority,
        }
    }
}

/// The same for all namespaces, without a tier.
impl From<EgressPolicySpec> for ClusterEgressPolicySpec {
    fn from(spec: EgressPolicySpec) -> Self {
        ClusterEgressPolicySpec {
            tier: None,
            namespace_selector: None,
            action: spec.action,
            gateway: spec.gateway,
            pod_selector: spec.pod_selector,
            services: spec.services,
            egress: spec.egress,
            address: spec.address,
            allocate: spec.allocate,
            addresses: spec.addresses,
            address_count: spec.address_count,
            spread: spec.spread,
            preference: spec.preference,
            dscp: spec.dscp,
            bandwidth: spec.bandwidth,
            fallback: spec.fallback,
            existing_connections: spec.existing_connections,
            priority: spec.priority,
        }
    }
}

/// The egress IP that a policy names: one IPv4 address, one IPv6 address, or one of each; or the addresses of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyAddress {
    /// The IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// The IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// A Service of type LoadBalancer: the egress IP is the address that it has in `status.loadBalancer`, and its owner
    /// is the node that announces it. The address must be in the pool of a gateway with `placement: External`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceReference>,
}

impl From<AddressPair> for PolicyAddress {
    fn from(AddressPair { ipv4, ipv6 }: AddressPair) -> Self {
        PolicyAddress { ipv4, ipv6, service: None }
    }
}

impl PolicyAddress {
    /// The addresses that it lists.
    pub fn pair(&self) -> AddressPair {
        AddressPair { ipv4: self.ipv4, ipv6: self.ipv6 }
    }
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceReference {
    /// The name of the Service.
    pub name: String,
    /// The namespace of the Service, in a ClusterEgressPolicy. An EgressPolicy uses Services of its own namespace, and
    /// has no such field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// The largest DSCP, RFC 2474: six bits.
pub const MAX_DSCP: u8 = 63;

/// A bandwidth, in bits a second of IP packets with their headers: `64Kbit` to `100Gbit`, with powers of 1000.
pub const BANDWIDTH: &str =
    "^((6[4-9]|[7-9][0-9]|[1-9][0-9]{2,5})Kbit|([1-9][0-9]{0,4}|100000)Mbit|([1-9][0-9]?|100)Gbit)$";

/// The bandwidth of one egress IP: at least one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bandwidth {
    /// What pods send: a number with `Kbit`, `Mbit` or `Gbit`, from `64Kbit` to `100Gbit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// What pods receive, in the same units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<String>,
}

/// The rank of a ClusterEgressPolicy among the EgressPolicies. The names are those of Kubernetes'
/// ClusterNetworkPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Tier {
    /// Before every EgressPolicy.
    Admin,
    /// After every EgressPolicy.
    Baseline,
}

/// Destinations with their ports, as in NetworkPolicy: the rule covers packets that match both `to` and `ports`.
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
    /// A network, without some networks within it.
    pub ip_block: IpBlock,
}

/// How many exceptions a network can have. Each takes three expressions of the one rule that has them all. The kernel
/// allows 128 expressions (`NFT_RULE_MAXEXPRS`, net/netfilter/nf_tables_api.c) in less than 4,096 bytes.
pub const MAX_EXCEPTIONS: usize = 24;

/// A network, without some networks within it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IpBlock {
    /// The network in CIDR notation, `203.0.113.0/24` or `2001:db8::/32`.
    pub cidr: String,
    /// Networks within `cidr` that the rule does not cover, at most 24.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<String>,
}

/// A protocol, with a port or a range of ports.
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
    /// The protocol number in the IP header, assigned by IANA.
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

/// What happens to the traffic that a policy covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Action {
    /// It leaves from an egress IP.
    #[default]
    #[serde(rename = "EgressIP")]
    EgressIp,
    /// It leaves as if Egret were not there.
    Direct,
}

impl Action {
    /// The API server adds no default to objects: a daemon of an earlier version does not know the field.
    fn is_default(&self) -> bool {
        *self == Action::default()
    }
}

/// How an egress IP is chosen for a policy that names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Allocate {
    /// An egress IP for this policy alone, from the gateway's pool: an address of each family that the pool has.
    #[default]
    Dedicated,
    /// One egress IP for all policies of the gateway that have `allocate: Shared`.
    Shared,
    /// An egress IP for this policy alone while the gateway's pool has one; afterwards the one that the fewest policies with
    /// `allocate: Pooled` have, also those of other namespaces. A policy keeps what it has.
    Pooled,
    /// The own address of a node of the gateway. It needs no pool, but the address changes when the node does.
    Node,
}

/// The largest number of egress IPs of a policy.
pub const MAX_POLICY_ADDRESSES: u16 = 32;

/// How traffic is divided among several egress IPs of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Spread {
    /// Each pod has one of them, by the hash of its uid, as long as it lives. When an egress IP is added or removed,
    /// only pods that get it or had it change theirs.
    #[default]
    Pod,
    /// Each replica of a StatefulSet has the one of its ordinal: replica 0 the first, replica 1 the second, and so on; after
    /// the last one they begin again. A pod without an ordinal has one as by `Pod`.
    Ordinal,
    /// Each new connection of a pod has one of them, by the hash of its addresses and ports: for pods that use up an egress
    /// IP's source ports. Servers see a pod with several addresses.
    Connection,
}

/// Where the node is that holds a preferred egress IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Preference {
    /// It is the pod's own node.
    SameNode,
    /// It is in the pod's zone.
    SameZone,
}

/// What happens to covered traffic while the egress IP is not ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Fallback {
    /// The traffic is dropped and counted.
    #[default]
    Block,
    /// The traffic leaves as if there were no policy, with the node's address. While the policy has no egress IP at
    /// all, because it was rejected or is new, it is passed over: the next policy that covers the destination decides.
    NodeAddress,
}

/// What happens to covered connections that began before the policy applied to the pod. The address of a connection
/// cannot change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum ExistingConnections {
    /// The connections keep the node's address as long as they last.
    #[default]
    Keep,
    /// The connections are ended. TCP ends by the server's reset when the pod sends next; other protocols go on from
    /// the egress IP. Connections that left by `fallback: NodeAddress` are ended too, once the egress IP is ready.
    End,
}
