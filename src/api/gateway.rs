use super::{AddressPair, Condition, EgressPolicyStatus, Name, PolicyKey};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// The largest number of targets of a gateway's probes.
pub const MAX_PROBES: usize = 8;
/// The least, default and largest interval of probes, in milliseconds.
pub const PROBE_INTERVAL: (u32, u32, u32) = (200, 1000, 60_000);
/// The least, default and largest number of intervals without an answer after which probes have failed.
pub const PROBE_MISSES: (u32, u32, u32) = (2, 3, 20);

/// A group of nodes and the egress IPs that these nodes hold.
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
    printcolumn = r#"{"name": "Nodes", "type": "integer", "jsonPath": ".status.nodeCount"}"#,
    printcolumn = r#"{"name": "Nodes Ready", "type": "integer", "jsonPath": ".status.readyNodes"}"#,
    printcolumn = r#"{"name": "IPv4", "type": "integer", "jsonPath": ".status.usage.ipv4.total"}"#,
    printcolumn = r#"{"name": "IPv4 Used", "type": "integer", "jsonPath": ".status.usage.ipv4.used"}"#,
    printcolumn = r#"{"name": "IPv6", "type": "integer", "jsonPath": ".status.usage.ipv6.total"}"#,
    printcolumn = r#"{"name": "IPv6 Used", "type": "integer", "jsonPath": ".status.usage.ipv6.used"}"#,
    printcolumn = r#"{"name": "Addresses", "type": "string", "jsonPath": ".status.conditions[?(@.type=='AddressesLeft')].message", "priority": 1}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status", "priority": 1}"#,
    printcolumn = r#"{"name": "Placement", "type": "string", "jsonPath": ".spec.placement", "priority": 1}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressGatewaySpec {
    /// The nodes that can hold the egress IPs of this gateway.
    #[serde(deserialize_with = "super::selector::required")]
    pub node_selector: LabelSelector,
    /// The pool: single addresses (`192.0.2.50`), ranges (`192.0.2.50-192.0.2.59`) and networks in CIDR notation
    /// (`198.51.100.16/28`, all its addresses), IPv4 and IPv6. It may be empty if all policies of the gateway have
    /// `allocate: Node`. Addresses that no host can have (loopback, link-local, multicast, 0.0.0.0/8, 240.0.0.0/4),
    /// addresses of pods and Services, and nodes' own addresses are rejected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// The egress IP of policies that name none: those without `address`, `addresses`, `allocate` and `addressCount`. They
    /// share it, whatever their namespaces, and other policies may name it. It must be in `addresses`; `allocate` gives it
    /// to no policy. Default: each such policy has an egress IP of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_address: Option<AddressPair>,
    /// `Managed`: Egret puts each egress IP onto the uplink of its owner. `External`: something else places the
    /// addresses, and the node that has an address is its owner.
    #[serde(default)]
    pub placement: Placement,
    /// How the network learns which node has an egress IP. `ARP`: the address is on an uplink of its owner, which answers
    /// ARP or neighbour discovery for it and announces itself. `Route`: the address is on the device `egret-ip` of its
    /// owner, nobody answers ARP for it, and the node's own router (FRR, BIRD, ...) announces it by BGP or OSPF. It need
    /// not be in a network of the node. Needs `placement: Managed`.
    #[serde(default)]
    pub announce: Announce,
    /// The interface that the addresses are put on, and that `nextHop` is reached by. Default: the interface in whose
    /// network the address is, else the one of the default route. With `announce: Route`, the interface without which the
    /// node gives its egress IPs up; default: the one of the default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The same for nodes that name it differently: each node uses the first one of these that it has. Instead of
    /// `interface`. Needs a version on all nodes that knows the field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// The number of a VLAN (IEEE 802.1Q) on that interface, or on the one of the default route: the addresses are put on the
    /// VLAN's interface, and `nextHop`, which must be given for each family, is reached by it. A node that may hold the
    /// gateway's egress IPs and has no interface of this VLAN makes one, and removes it when it does not need it any more.
    /// Needs `placement: Managed`, and a version on all nodes that knows the field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The router that the traffic leaves through. Default: as the main routing table says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<AddressPair>,
    /// Whether policies that name no gateway use this one. Set it on one gateway at most.
    #[serde(default)]
    pub default: bool,
    /// Whether nodes answer ICMP and ICMPv6 echo requests (ping) to the egress IPs that they hold. By default,
    /// packets to an egress IP are dropped unless they belong to a connection of a pod. It takes effect with
    /// `placement: Managed` only: the node itself answers for an address that Egret does not place.
    #[serde(default)]
    pub answer_ping: bool,
    /// Whether packets of long connections from the egress IPs may pass the node's rules by, on nodes whose daemon has
    /// `--fast-path-lease`. `Auto`: where nothing on their way must see every packet. `Off`: never.
    #[serde(default)]
    pub fast_path: FastPath,
    /// Whether egress IPs stay on a cordoned node (`spec.unschedulable`, set by `kubectl cordon` and `kubectl
    /// drain`). By default they move to other nodes of the gateway, one by one and without a pause, if one of these
    /// is alive and not cordoned. After `kubectl uncordon` they stay where they are.
    #[serde(default)]
    pub ignore_cordon: bool,
    /// How many of this gateway's egress IPs its nodes hold. The first entry that selects a node counts. The annotations
    /// `egret.dev/max-egress-ips` and `egret.dev/weight` of a Node replace its values. Takes effect with
    /// `placement: Managed`, and not for `allocate: Node`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capacity: Vec<NodeCapacity>,
    /// The namespaces whose policies may use this gateway. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "super::selector::optional")]
    pub namespace_selector: Option<LabelSelector>,
    /// Whether pods and namespaces may ask for this gateway by the annotation `egret.dev/egress-gateway: NAME`, without a
    /// policy: those of the namespaces that `namespaceSelector` selects, which must be given. They leave from `defaultAddress`, or if there is
    /// none, from the egress IP of `allocate: Shared`. A pod's annotation counts before its namespace's. EgressPolicies
    /// decide before it.
    #[serde(default)]
    pub opt_in: bool,
    /// Which policies may share an egress IP that they name (`address`). `Namespace`: policies of one namespace; the
    /// first policy has it, and those of other namespaces, and ClusterEgressPolicies, are rejected. `Cluster`: all
    /// policies that may use the gateway. The egress IP of `allocate: Shared` is always shared by all policies that
    /// request it.
    #[serde(default)]
    pub sharing: Sharing,
    /// Addresses that only policies of some namespaces may have, by naming them; `allocate` gives them to no policy.
    /// A ClusterEgressPolicy may name all of them. If several reservations contain an address, the namespaces of each
    /// may name it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reservations: Vec<Reservation>,
    /// How much of this gateway the EgressPolicies of one namespace may have together. Each namespace has the same
    /// quota. A policy that exceeds it is rejected, and the others stay as they are. ClusterEgressPolicies do not
    /// count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_quota: Option<NamespaceQuota>,
    /// Targets outside the cluster that the gateway's nodes probe, by the route that egress traffic takes. The probes
    /// of a node succeed while any target answers, for IPv4 and IPv6 separately. If they fail on a node and succeed on
    /// another one after that, egress IPs that need the family move there. If they fail on all nodes, nothing moves.
    /// Takes effect with `placement: Managed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<UplinkProbe>,
    /// The interval between two probes of a target, in milliseconds. Default: 1000. While no target answers, probes are
    /// five times as frequent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_interval_milliseconds: Option<u32>,
    /// How many intervals pass without an answer before a node's probes have failed. Default: 3. The loss of an uplink
    /// ends after three times as long without such a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_misses: Option<u32>,
}

/// The largest weight of a node.
pub const MAX_WEIGHT: u16 = 100;
/// The largest number of entries of a gateway's `capacity`.
pub const MAX_CAPACITIES: usize = 20;
/// How many names `spec.interfaces` may have.
pub const MAX_INTERFACES: usize = 8;
/// The largest number of a VLAN: 4095 is reserved (IEEE 802.1Q).
pub const MAX_VLAN: u16 = 4094;

/// How many of a gateway's egress IPs some of its nodes hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeCapacity {
    /// The nodes; `{}` selects all.
    #[serde(deserialize_with = "super::selector::required")]
    pub node_selector: LabelSelector,
    /// A node with the weight 3 gets three times as many egress IPs as one with the weight 1, which is the default. At
    /// most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// The largest number of egress IPs on each of the nodes; a pair counts once. While no other node has room, an egress
    /// IP whose node dies is on no node, and its traffic is blocked. Default: no limit.
    #[serde(rename = "maxEgressIPs", default, skip_serializing_if = "Option::is_none")]
    pub max_egress_ips: Option<u32>,
}

/// A target of probes: `icmp` or `tcp`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UplinkProbe {
    /// An address that answers ICMP or ICMPv6 echo requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<String>,
    /// An address and a port that accept TCP connections: `203.0.113.1:443`, `[2001:db8::1]:443`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
}

/// Which policies may share an egress IP that they name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Sharing {
    /// Policies of one namespace, or ClusterEgressPolicies among themselves.
    #[default]
    Namespace,
    /// All policies that may use the gateway.
    Cluster,
}

/// Addresses that are reserved for some namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reservation {
    /// The addresses, ranges and networks, written as in the gateway's `addresses`.
    pub addresses: Vec<String>,
    /// The namespaces whose policies may name them.
    #[serde(deserialize_with = "super::selector::required")]
    pub namespace_selector: LabelSelector,
}

/// How much the EgressPolicies of one namespace may have together. An absent field is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamespaceQuota {
    /// The number of policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<u32>,
    /// The number of egress IPs, named or by `allocate: Dedicated`. A pair counts once, and so does a shared one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<u32>,
    /// The number of networks, exceptions and ports that their `egress` may list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destinations: Option<u32>,
}

/// How the network learns which node has an egress IP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Announce {
    /// By ARP and IPv6 neighbour discovery, on the uplink.
    #[default]
    #[serde(rename = "ARP")]
    Arp,
    /// By the node's own router.
    Route,
}

/// What puts the egress IPs of a gateway onto its nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Placement {
    /// Egret.
    #[default]
    Managed,
    /// Something else. The node that has an address is its owner.
    External,
}

/// Whether packets of long connections may take the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum FastPath {
    /// Where nothing on their way must see every packet.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// The allocations and conditions of a gateway. Only the controller writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressGatewayStatus {
    /// The nodes that match `nodeSelector`, sorted.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// The number of `nodes`.
    #[serde(default)]
    pub node_count: u32,
    /// How many of `nodes` can hold an egress IP now. The number may be ten seconds old.
    #[serde(default)]
    pub ready_nodes: u32,
    /// Those of `nodes` that cannot, sorted: no daemon has reported, the kubelet reports nothing, the other
    /// gateway nodes do not reach it, or it reports that it cannot hold any egress IP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_ready_nodes: Vec<String>,
    /// How much of the pool is in use.
    #[serde(default, skip_serializing_if = "PoolUsage::is_empty")]
    pub usage: PoolUsage,
    /// The allocations: every egress IP in use, with its id, its node and its policies.
    #[serde(default)]
    pub allocations: Vec<Allocation>,
    /// Ids and addresses that were given back and are kept from reuse for ten minutes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub released: Vec<ReleasedAllocation>,
    /// `Accepted`: the spec is valid. `Ready`: nodes can hold the egress IPs. `AddressesLeft`: the pool is not
    /// exhausted. `RoomLeft` (where nodes have a maximum of egress IPs): all egress IPs are on nodes, and would be if any one
    /// node died. `ProbesSucceed` (with `spec.probes`): on no node the probes fail. `PortsNearlyExhausted` (absent if not
    /// so): connections from an egress IP to a destination use most of its source ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// When the controller asked the nodes to report anew, seconds since the Unix epoch; absent while it asks nothing. It
    /// asks before it moves an egress IP whose owner no source node reaches. A node answers with `reportsGiven` of its
    /// EgressNode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reports_requested_at: Option<i64>,
    /// With `spec.optIn`: the egress IP, number and conditions of the pods that ask for this gateway, as in a policy's
    /// status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opt_in: Option<Box<EgressPolicyStatus>>,
    /// The controller that wrote this status, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<AllocationsWriter>,
    /// A long list of `allocations` and `released` as lines of text: after the `node` lines, one line for each
    /// allocation with id, kind, addresses, the number of its node among those, since, leaving, policies. Lines of
    /// released entries begin with `-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// How much of a gateway's pool is in use, by family. A family of which the pool has no address is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolUsage {
    /// The IPv4 addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<FamilyUsage>,
    /// The IPv6 addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<FamilyUsage>,
}

impl PoolUsage {
    /// Whether the pool has no address.
    pub fn is_empty(&self) -> bool {
        *self == PoolUsage::default()
    }
}

/// How much of a gateway's pool is in use, of one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FamilyUsage {
    /// How many addresses the pool has, without those that belong to another gateway; 9223372036854775807 if there are
    /// more.
    pub total: i64,
    /// How many of them policies have.
    pub used: i64,
    /// How many of them were given back and are kept from reuse for ten minutes.
    pub cooling_down: i64,
}

/// The controller that wrote a gateway's allocations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocationsWriter {
    /// The name of the controller in the Lease.
    pub name: String,
    /// How often the Lease had changed hands when the controller got it.
    pub term: i64,
    /// How often the allocations were written.
    pub writes: i64,
}

/// How an egress IP was chosen.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub enum AllocationKind {
    /// Named by the policy, in `spec.address`. Policies that name the same address share it.
    Explicit,
    /// From the pool, for a single policy.
    #[default]
    Dedicated,
    /// From the pool, for all policies of the gateway that have `allocate: Shared`.
    Shared,
    /// From the pool, for policies that have `allocate: Pooled`: for one, and for several when the pool is exhausted.
    Pooled,
    /// The own address of a node of the gateway. When the allocation moves to another node, the address changes.
    Node,
    /// The address of a Service, named by the policy in `spec.address.service`. The node that announces it is the owner.
    Service,
    /// A kind of a later version, which must not make the whole gateway unreadable. Whoever reads it does without this
    /// allocation: what its policies cover is blocked.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

impl AllocationKind {
    /// All that this version knows, in the order in which they are allocated.
    pub const KNOWN: [AllocationKind; 6] = [
        AllocationKind::Explicit,
        AllocationKind::Service,
        AllocationKind::Node,
        AllocationKind::Shared,
        AllocationKind::Dedicated,
        AllocationKind::Pooled,
    ];

    /// The first version (major, minor, patch) whose node daemons know the kind. The controller allocates none while
    /// some node has an older one.
    pub fn known_since(self) -> (u32, u32, u32) {
        match self {
            AllocationKind::Explicit
            | AllocationKind::Dedicated
            | AllocationKind::Shared
            | AllocationKind::Pooled
            | AllocationKind::Node
            | AllocationKind::Service => (0, 1, 0),
            AllocationKind::Unknown => (u32::MAX, 0, 0),
        }
    }
}

/// The policies of an allocation. Nearly all of ten thousand allocations have one policy, which needs no memory of
/// its own.
pub type Users = SmallVec<[PolicyKey; 1]>;

/// One egress IP (an address or a pair) with its cluster-wide id and its node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// The cluster-wide id, 1 to 16383. It travels with each packet through the tunnel.
    pub id: u16,
    /// How the address was chosen.
    pub kind: AllocationKind,
    /// With `kind: Dedicated` and a policy that has several: its position among them, from 0.
    #[serde(default, skip_serializing_if = "is_first")]
    pub ordinal: u16,
    /// The address that servers see.
    #[serde(flatten)]
    pub address: AddressPair,
    /// The node that is to hold the egress IP; absent while the gateway has no node for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub node: Option<Name>,
    /// When `node` was assigned, seconds since the Unix epoch. Each assignment has another time. A node that takes
    /// the egress IP over reports the `since` that it saw, so that reports about older assignments do not count.
    #[serde(default)]
    pub since: i64,
    /// In a planned move, the node that holds the egress IP until `node` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub leaving: Option<Name>,
    /// The Service whose address it is, `namespace/name`, if `kind` is `Service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub service: Option<Name>,
    /// The policies that use it, sorted: `namespace/name` for an EgressPolicy, `name` for a ClusterEgressPolicy.
    #[schemars(with = "Vec<String>")]
    pub policies: Users,
}

fn is_first(ordinal: &u16) -> bool {
    *ordinal == 0
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
    /// The policies that had it. One that asks again in time gets the same id and addresses.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub policies: Users,
    /// When it was given back, seconds since the Unix epoch.
    pub at: i64,
    /// The Service whose address it was, `namespace/name`: policies of other namespaces may not name it for ten minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub service: Option<Name>,
}
