//! The cluster as the plan sees it: what users typed, validated and typed, and nothing that Egret does not use.
//!
//! A [`Cluster`] is a snapshot. Sources ([`crate::cluster`]) make a new one for each change; objects are shared
//! between snapshots.

pub mod backends;
pub mod condition;
pub mod covers;
pub mod destination;
pub mod drain;
pub mod egress_node;
pub mod fallback_policy;
pub mod fnv;
mod label_index;
pub mod mac;
pub mod marks;
pub mod networks;
pub mod notice;
pub mod ownership;
pub mod precedence;
pub mod quota;
pub mod selector;
pub mod shared;
pub mod target;
pub mod tunnel_family;
pub mod uplink_key;

use crate::api::{
    self, AddressPair, Allocate, ClusterEgressPolicySpec, EgressGatewaySpec, EgressGatewayStatus, EgressPolicySpec,
    EgressPolicyStatus, EgressRule, ExistingConnections, Fallback, NamespaceQuota, Placement, Protocol, Sharing,
};
use crate::model::covers::Covers;
use crate::model::destination::{Destination, DestinationError};
use crate::model::egress_node::EgressNode;
use crate::model::selector::{Labels, Name, Selector, SelectorError};
use crate::model::shared::Shared;

pub use crate::api::PolicyKey;
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// All of the cluster that Egret looks at. Snapshots share the kinds of objects that are the same in both.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Nodes by name.
    pub nodes: Shared<BTreeMap<Name, Arc<Node>>>,
    /// Labels of namespaces by name. A namespace that only objects speak of is not here.
    pub namespaces: Shared<BTreeMap<Name, Labels>>,
    /// Pods; a node daemon sees those of its own node only.
    pub pods: Shared<BTreeMap<ObjectKey, Arc<Pod>>>,
    /// Services.
    pub services: Shared<BTreeMap<ObjectKey, Arc<Service>>>,
    /// Endpoints, by the objects that tell them. A node daemon sees those of the API servers only.
    pub endpoints: Shared<BTreeMap<ObjectKey, Arc<Endpoints>>>,
    /// Gateways by name, with the allocations.
    pub gateways: Shared<BTreeMap<Name, Arc<Gateway>>>,
    /// Policies of both kinds.
    pub policies: Shared<BTreeMap<PolicyKey, Arc<Policy>>>,
    /// What the nodes say of themselves.
    pub egress_nodes: Shared<BTreeMap<Name, Arc<EgressNode>>>,
    /// The statuses of policies as they stand in the source: what a controller has already written.
    /// Node daemons leave it empty.
    pub policy_statuses: Shared<BTreeMap<PolicyKey, Arc<EgressPolicyStatus>>>,
    /// Policies that make no sense as they stand in the source; a last good state of one may be in `policies`.
    /// Node daemons leave it empty.
    pub unreadable: Shared<BTreeMap<PolicyKey, Arc<Unreadable>>>,
    /// What is known to be inside the cluster besides what nodes and Services say.
    pub inside: Shared<Inside>,
}

impl Cluster {
    /// The API servers' addresses: the endpoints of the Service `default/kubernetes`, which the API servers keep.
    pub fn api_servers(&self) -> impl Iterator<Item = IpAddr> {
        let of_api = self.endpoints.values().filter(|endpoints| endpoints.are_of_api());
        of_api.flat_map(|endpoints| endpoints.addresses.iter().copied())
    }
}

/// A pair's addresses.
pub fn addresses_of(pair: &AddressPair) -> impl Iterator<Item = IpAddr> + use<> {
    pair.ipv4.map(IpAddr::V4).into_iter().chain(pair.ipv6.map(IpAddr::V6))
}

/// A policy that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// What is wrong with it.
    pub message: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
}

/// Networks of the cluster, each with where that is known from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Where pods have their addresses.
    pub pods: BTreeMap<IpNetwork, Name>,
    /// Where Services have theirs.
    pub services: BTreeMap<IpNetwork, Name>,
}

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The namespace.
    pub namespace: Name,
    /// The name.
    pub name: Name,
}

impl ObjectKey {
    /// From its two parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        ObjectKey { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A Kubernetes Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its labels.
    pub labels: Labels,
    /// All its addresses of type InternalIP and ExternalIP; the InternalIPs come first.
    pub addresses: Box<[IpAddr]>,
    /// How many of `addresses` are InternalIPs.
    pub internal: usize,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Box<[IpNetwork]>,
    /// `spec.unschedulable`: no new pods come to it, and whoever is about to stop it says so by this.
    pub cordoned: bool,
    /// Since when Kubernetes has heard so little of its kubelet that its condition `Ready` is `Unknown`, seconds since the
    /// Unix epoch; 0 where that is not said.
    pub lost_since: Option<i64>,
}

/// So long a node that Kubernetes hears nothing of is not yet taken for lost, seconds. While the API server is away no
/// kubelet is heard of; when it is back, all nodes are `Unknown` until each kubelet has reported, which they do every 10 s
/// (`nodeStatusUpdateFrequency`).
const LOST_PATIENCE: i64 = 30;

impl Node {
    /// When the node counts as lost, if Kubernetes goes on hearing nothing of it.
    pub fn is_lost_at(&self) -> Option<i64> {
        self.lost_since.map(|since| since.saturating_add(LOST_PATIENCE))
    }

    /// Whether the node counts as lost.
    pub fn is_lost(&self, now: i64) -> bool {
        self.is_lost_at().is_some_and(|at| at <= now)
    }
}

/// A Kubernetes Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`, empty where the source gives none.
    pub uid: Box<str>,
    /// Its labels.
    pub labels: Labels,
    /// `spec.nodeName`.
    pub node: Option<Name>,
    /// `status.podIPs`; empty until the pod has been set up.
    pub addresses: Box<[IpAddr]>,
    /// Whether it shares the node's network; such pods are never selected.
    pub host_network: bool,
    /// Whether its phase is Succeeded or Failed: its address may be another pod's already.
    pub finished: bool,
}

/// A Kubernetes Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// `spec.selector`; `None` if it has none, and then it selects no pod.
    pub selector: Option<Selector>,
    /// `spec.clusterIPs`, without `None`.
    pub cluster_ips: Box<[IpAddr]>,
    /// What else it is reached by. Node daemons leave it out.
    pub front: Option<Box<Front>>,
}

/// What a Service is reached by besides its cluster addresses, and its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Front {
    /// `spec.externalIPs`, and the addresses in `status.loadBalancer`.
    pub addresses: Box<[IpAddr]>,
    /// Its ports.
    pub ports: Box<[ServicePort]>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name, by which endpoints tell theirs; empty for a Service's only one.
    pub name: Box<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// At the Service's addresses.
    pub port: u16,
    /// At each node's addresses.
    pub node_port: Option<u16>,
}

/// Some of a Service's endpoints: an EndpointSlice, or an Endpoints object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The Service.
    pub service: ObjectKey,
    /// Where its packets go.
    pub addresses: Box<[IpAddr]>,
    /// By the names of the Service's ports.
    pub ports: Box<[(Box<str>, u16)]>,
}

impl Endpoints {
    /// Whether they are the API servers.
    pub fn are_of_api(&self) -> bool {
        (&*self.service.namespace, &*self.service.name) == ("default", "kubernetes")
    }
}

/// An EgressGateway, validated, and its allocations.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// The nodes that can hold its addresses.
    pub nodes: Selector,
    /// Its pool: inclusive ranges, sorted, not overlapping.
    pub pool: Box<[AddressRange]>,
    /// Who places the addresses.
    pub placement: Placement,
    /// The interface to leave by.
    pub interface: Option<Name>,
    /// The router to leave through.
    pub next_hop: AddressPair,
    /// Whether nodes answer echo requests to its addresses.
    pub answer_ping: bool,
    /// Whether a cordoned node keeps its egress IPs.
    pub ignore_cordon: bool,
    /// Whether it is the default gateway.
    pub default: bool,
    /// The namespaces whose policies may use it.
    pub namespaces: Selector,
    /// Who may share an address that policies name.
    pub sharing: Sharing,
    /// Addresses that only some namespaces may name.
    pub reservations: Box<[Reserved]>,
    /// What the EgressPolicies of one namespace may have together.
    pub quota: NamespaceQuota,
    /// Whether its allocations are to be spread evenly over its nodes, by [`REBALANCE`].
    pub rebalance: bool,
    /// [`END_COOLDOWN`], as it was written.
    pub end_cooldown: Option<Name>,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// Which writing of the object this is, `metadata.resourceVersion`, where the source gives one and the reader
    /// writes the allocations: it writes in place of this one, and of no other.
    pub version: Option<Box<str>>,
    /// What is wrong with the spec as it stands now; the fields are then as they made sense last.
    pub fault: Option<Box<str>>,
    /// How the fields made sense last is not known: what the allocations say stays, and nothing new is given out.
    pub frozen: bool,
    /// The allocations.
    pub status: EgressGatewayStatus,
}

/// Addresses that only policies of some namespaces may name.
#[derive(Clone, Debug, PartialEq)]
pub struct Reserved {
    /// The addresses.
    pub addresses: Box<[AddressRange]>,
    /// The namespaces.
    pub namespaces: Selector,
}

impl Reserved {
    /// Whether it has the address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|range| range.contains(address))
    }
}

/// Addresses `first` to `last`, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// First address.
    pub first: IpAddr,
    /// Last address, inclusive.
    pub last: IpAddr,
}

impl AddressRange {
    /// Whether `address` lies in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4() && self.first <= address && address <= self.last
    }
}

/// How many combinations of a network and a range of ports a policy can cover: each is an entry of one of the kernel's sets.
const MAX_ENTRIES: usize = 100_000;

/// An EgressPolicy or a ClusterEgressPolicy, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The namespaces it reaches; for an EgressPolicy its own.
    pub namespaces: Namespaces,
    /// The pods in them.
    pub pods: PodMatch,
    /// The gateway; `None`: the default one.
    pub gateway: Option<Name>,
    /// The destinations; `None`: everything outside the cluster. Shared between policies that say the same.
    pub egress: Option<Arc<Covers>>,
    /// The address.
    pub address: AddressRequest,
    /// What happens while the allocation is not ready.
    pub fallback: Fallback,
    /// What happens to connections that began before it.
    pub existing_connections: ExistingConnections,
    /// The upper one goes first.
    pub tier: Tier,
    /// Within a tier, higher goes first.
    pub priority: i32,
    /// `metadata.creationTimestamp`, seconds since the Unix epoch; [`i64::MAX`], younger than all, where the source gives
    /// none.
    pub created: i64,
    /// What is only guessed of it, if it stands for one that cannot be read.
    pub guessed: Guessed,
    /// What the controller alone goes by, if there is any of it. There are ten thousand policies.
    pub for_controller: Option<Box<ForController>>,
}

/// What is not known of a policy that cannot be read. Where it matters, for another policy selects the same pod, the pod is
/// held: nobody knows which of the two decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guessed {
    /// Its place among others.
    pub rank: bool,
    /// The destinations.
    pub egress: bool,
}

/// What of a policy concerns the controller alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForController {
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// The node that is to have the policy's allocation, by [`MOVE_TO`].
    pub move_to: Option<Name>,
}

/// An annotation of a policy: the node of its gateway that its allocation is to be moved to.
pub const MOVE_TO: &str = "egret.dev/move-to";

/// An annotation of a gateway: with the value `"true"`, allocations are moved until each of its nodes has as many as the
/// others, and again when that is so no longer.
pub const REBALANCE: &str = "egret.dev/rebalance";

/// An annotation of a gateway, a time (RFC 3339): addresses that were given back until then are free at once. Ids are
/// not: a node that has not heard yet must not send by an id that is another policy's.
pub const END_COOLDOWN: &str = "egret.dev/end-cooldown";

/// Which policies go before which, whatever their priorities; the first is the upper one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// ClusterEgressPolicies that go before every EgressPolicy.
    Admin,
    /// EgressPolicies, and ClusterEgressPolicies of no tier.
    #[default]
    ByPriority,
    /// ClusterEgressPolicies that go after every EgressPolicy.
    Baseline,
}

impl From<Option<api::Tier>> for Tier {
    fn from(tier: Option<api::Tier>) -> Self {
        match tier {
            Some(api::Tier::Admin) => Tier::Admin,
            None => Tier::ByPriority,
            Some(api::Tier::Baseline) => Tier::Baseline,
        }
    }
}

/// The namespaces that a policy reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// An EgressPolicy's own.
    One(Name),
    /// A ClusterEgressPolicy's, by label.
    Selected(Box<Selector>),
}

/// The pods that a policy means, within a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodMatch {
    /// By their labels.
    Labels(Selector),
    /// The pods that Services of these names select.
    Services(Box<[Name]>),
}

/// Which address a policy asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressRequest {
    /// These addresses.
    Explicit(AddressPair),
    /// One that the controller finds.
    Allocate(Allocate),
}

/// Something in an object's spec that cannot be; the text has the field, the value and the remedy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// The field, `spec.addresses[2]`.
    pub field: String,
    /// What is wrong with the value, and what to write instead.
    pub message: String,
}

impl Invalid {
    fn new(field: impl Into<String>, message: impl ToString) -> Self {
        Invalid { field: field.into(), message: message.to_string() }
    }
}

/// What an object's metadata contributes to a [`Policy`] or a [`Gateway`].
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// `metadata.creationTimestamp`, seconds since the Unix epoch.
    pub created: Option<i64>,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// The annotation [`MOVE_TO`].
    pub move_to: Option<Name>,
    /// The annotation [`REBALANCE`].
    pub rebalance: bool,
    /// The annotation [`END_COOLDOWN`].
    pub end_cooldown: Option<Name>,
}

impl Metadata {
    /// Without what its reader has no use for; `node` names the node whose daemon it is, and is `None` for a controller.
    #[must_use]
    pub fn read_by(self, node: Option<&str>) -> Self {
        match node {
            Some(_) => Metadata { created: self.created, ..Metadata::default() },
            None => self,
        }
    }
}

impl Gateway {
    /// What is used of it while its spec makes no sense.
    pub fn used(&self) -> &'static str {
        if self.frozen {
            "its last good state is not known: until that is mended, its policies keep the egress IPs that they have, and no \
             other ones are given out"
        } else {
            "its last good state is used until that is mended"
        }
    }

    /// Validates a spec. The status starts empty.
    ///
    /// # Errors
    /// Addresses that cannot be parsed, ranges that run backwards or mix families, ranges that overlap, a next hop
    /// without an address, a selector that cannot be understood.
    pub fn new(spec: &EgressGatewaySpec, meta: Metadata) -> Result<Self, Invalid> {
        let selector =
            |field: &str, s| Selector::checked(s).map_err(|e: SelectorError| Invalid::new(format!("spec.{field}"), e));
        let mut pool = parse_ranges("spec.addresses", &spec.addresses)?;
        for (i, (range, text)) in pool.iter().enumerate() {
            if let Some((first, what)) = never_an_egress_address(range) {
                let message = format!("{text:?} has {first}, which is {what} and can be no egress IP; leave it out");
                return Err(Invalid::new(format!("spec.addresses[{i}]"), message));
            }
        }
        pool.sort();
        for pair in pool.windows(2) {
            if pair[0].0.contains(pair[1].0.first) {
                return Err(Invalid::new(
                    "spec.addresses",
                    format!("{:?} and {:?} overlap; each address may stand in the pool once", pair[0].1, pair[1].1),
                ));
            }
        }
        if spec.next_hop.as_ref().is_some_and(AddressPair::is_empty) {
            return Err(Invalid::new("spec.nextHop", "has no address; give ipv4, ipv6 or both, or leave nextHop out"));
        }
        let mut reservations = Vec::new();
        for (i, reservation) in spec.reservations.iter().enumerate() {
            let addresses = parse_ranges(&format!("spec.reservations[{i}].addresses"), &reservation.addresses)?;
            let namespaces =
                selector(&format!("reservations[{i}].namespaceSelector"), &reservation.namespace_selector)?;
            let addresses = addresses.into_iter().map(|(range, _)| range).collect();
            reservations.push(Reserved { addresses, namespaces });
        }
        Ok(Gateway {
            nodes: selector("nodeSelector", &spec.node_selector)?,
            pool: pool.into_iter().map(|(r, _)| r).collect(),
            placement: spec.placement,
            interface: spec.interface.as_deref().map(Into::into),
            next_hop: spec.next_hop.clone().unwrap_or_default(),
            answer_ping: spec.answer_ping,
            ignore_cordon: spec.ignore_cordon,
            default: spec.default,
            namespaces: match &spec.namespace_selector {
                Some(s) => selector("namespaceSelector", s)?,
                None => Selector::default(),
            },
            sharing: spec.sharing,
            reservations: reservations.into(),
            quota: spec.namespace_quota.unwrap_or_default(),
            rebalance: meta.rebalance,
            end_cooldown: meta.end_cooldown,
            generation: meta.generation,
            version: None,
            fault: None,
            frozen: false,
            status: EgressGatewayStatus::default(),
        })
    }
}

/// Validates `spec.egress`.
///
/// # Errors
/// Networks or ports that cannot be parsed or are too many.
pub fn destinations(rules: &[EgressRule]) -> Result<Arc<Covers>, Invalid> {
    let mut all = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let d =
            Destination::try_from(rule).map_err(|e: DestinationError| Invalid::new(format!("spec.egress[{i}]"), e))?;
        all.push(d);
    }
    let all = Covers::from(all);
    if all.entries_at_most() > MAX_ENTRIES && all.shape().entries > MAX_ENTRIES {
        return Err(Invalid::new(
            "spec.egress",
            format!(
                "makes {} combinations of a network and ports, and at most {MAX_ENTRIES} can be; use wider networks or \
                 ranges of ports",
                all.shape().entries
            ),
        ));
    }
    Ok(Arc::new(all))
}

/// What no server takes for the address of a host, and what it is.
const NEVER: [(&str, &str); 10] = [
    ("0.0.0.0/8", "\"this network\" (RFC 1122)"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved or broadcast (RFC 1112)"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::ffff:0:0/96", "an IPv4 address in IPv6 clothing (RFC 4291)"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// The first address of a range that can be no egress IP, and what it is.
fn never_an_egress_address(range: &AddressRange) -> Option<(IpAddr, &'static str)> {
    NEVER.iter().find_map(|(network, what)| {
        let never = parse_range(network).ok()?;
        let same_family = never.first.is_ipv4() == range.first.is_ipv4();
        (same_family && never.first <= range.last && range.first <= never.last)
            .then(|| (range.first.max(never.first), *what))
    })
}

/// Parses each; the text stays beside it.
fn parse_ranges<'t>(field: &str, texts: &'t [String]) -> Result<Vec<(AddressRange, &'t String)>, Invalid> {
    let each = texts.iter().enumerate();
    each.map(|(i, text)| {
        let range = parse_range(text).map_err(|message| Invalid::new(format!("{field}[{i}]"), message))?;
        Ok((range, text))
    })
    .collect()
}

/// Parses `A`, `A-B` or `A/P` into an inclusive range.
fn parse_range(text: &str) -> Result<AddressRange, String> {
    let address = |part: &str| {
        part.trim().parse::<IpAddr>().map_err(|_| {
            format!(
                "{text:?}: {:?} is not an IP address; write 192.0.2.50, 192.0.2.50-192.0.2.59 or 192.0.2.0/28",
                part.trim()
            )
        })
    };
    if text.contains('/') {
        let net = crate::model::destination::parse_cidr(text).map_err(|e| e.to_string())?;
        let last = match net {
            IpNetwork::V4(n) => IpAddr::V4(n.broadcast()),
            IpNetwork::V6(n) => IpAddr::V6(n.broadcast()),
        };
        return Ok(AddressRange { first: net.network(), last });
    }
    let (first, last) = match text.split_once('-') {
        Some((a, b)) => (address(a)?, address(b)?),
        None => {
            let a = address(text)?;
            (a, a)
        }
    };
    if first.is_ipv4() != last.is_ipv4() {
        return Err(format!("{text:?} mixes IPv4 and IPv6; write one range for each family"));
    }
    if first > last {
        return Err(format!("{text:?} runs backwards; did you mean {last}-{first}?"));
    }
    Ok(AddressRange { first, last })
}

impl Policy {
    /// Validates an EgressPolicy's spec.
    ///
    /// # Errors
    /// Both or neither of `podSelector` and `services`, both of `address` and `allocate`, networks or ports that
    /// cannot be parsed or are too many, a selector that cannot be understood.
    pub fn namespaced(namespace: &str, spec: &EgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        Policy::new(Namespaces::One(namespace.into()), spec, meta)
    }

    /// Validates a ClusterEgressPolicy's spec.
    ///
    /// # Errors
    /// As [`Policy::namespaced`].
    pub fn cluster(spec: &ClusterEgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        let namespaces = match &spec.namespace_selector {
            Some(s) => Selector::checked(s).map_err(|e| Invalid::new("spec.namespaceSelector", e))?,
            None => Selector::default(),
        };
        let rest = EgressPolicySpec {
            gateway: spec.gateway.clone(),
            pod_selector: spec.pod_selector.clone(),
            services: spec.services.clone(),
            egress: spec.egress.clone(),
            address: spec.address.clone(),
            allocate: spec.allocate,
            fallback: spec.fallback,
            existing_connections: spec.existing_connections,
            priority: spec.priority,
        };
        let policy = Policy::new(Namespaces::Selected(Box::new(namespaces)), &rest, meta)?;
        Ok(Policy { tier: spec.tier.into(), ..policy })
    }

    fn new(namespaces: Namespaces, spec: &EgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        let pods = match (&spec.pod_selector, spec.services.as_slice()) {
            (Some(s), []) => PodMatch::Labels(Selector::checked(s).map_err(|e| Invalid::new("spec.podSelector", e))?),
            (None, services @ [_, ..]) => PodMatch::Services(services.iter().map(|s| s.as_str().into()).collect()),
            (Some(_), _) => {
                return Err(Invalid::new("spec", "has both podSelector and services; keep the one that is meant"));
            }
            (None, []) => {
                return Err(Invalid::new(
                    "spec",
                    "selects no pods; add podSelector ({} for every pod of the namespace) or services",
                ));
            }
        };
        let address = match (&spec.address, spec.allocate) {
            (Some(_), Some(_)) => {
                return Err(Invalid::new("spec", "has both address and allocate; keep the one that is meant"));
            }
            (Some(a), None) if a.is_empty() => {
                return Err(Invalid::new("spec.address", "has neither ipv4 nor ipv6; give one, or leave address out"));
            }
            (Some(a), None) => AddressRequest::Explicit(a.clone()),
            (None, allocate) => AddressRequest::Allocate(allocate.unwrap_or_default()),
        };
        let egress = spec.egress.as_deref().map(destinations).transpose()?;
        Ok(Policy {
            namespaces,
            pods,
            gateway: spec.gateway.as_deref().map(Into::into),
            egress,
            address,
            fallback: spec.fallback,
            existing_connections: spec.existing_connections,
            tier: Tier::default(),
            priority: spec.priority,
            created: meta.created.unwrap_or(i64::MAX),
            guessed: Guessed::default(),
            for_controller: (meta.generation.is_some() || meta.move_to.is_some())
                .then(|| Box::new(ForController { generation: meta.generation, move_to: meta.move_to })),
        })
    }

    /// `metadata.generation`, where the reader is a controller.
    pub fn generation(&self) -> Option<i64> {
        self.for_controller.as_ref()?.generation
    }

    /// The node that is to have the policy's allocation, where the reader is a controller.
    pub fn move_to(&self) -> Option<&Name> {
        self.for_controller.as_ref()?.move_to.as_ref()
    }

    /// How many networks, exceptions and ports its `egress` lists.
    pub fn listed_destinations(&self) -> usize {
        let networks = |d: &Destination| d.networks.iter().map(|network| 1 + network.except.len()).sum::<usize>();
        self.egress.iter().flat_map(|all| all.iter()).map(|d| networks(d) + d.ports.len()).sum()
    }

    /// Whether the policy covers every destination outside the cluster.
    pub fn covers_everything(&self) -> bool {
        match &self.egress {
            None => true,
            Some(rules) => rules.iter().any(|d| d.networks.is_empty() && d.ports.is_empty()),
        }
    }
}
