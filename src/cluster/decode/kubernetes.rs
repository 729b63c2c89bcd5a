//! Kubernetes' own kinds: the few fields that Egret uses, parsed strictly. All other fields are ignored. The offline
//! cache holds the same fields.

use super::fault::Fault;
use super::validate::parse_time;
use crate::api::Protocol;
use crate::cluster::names::Names;
use crate::model::capacity::{self, AnnotatedCapacity};
use crate::model::kube_vip;
use crate::model::selector::Selector;
use crate::model::{
    Announcement, AskedEgress, Endpoints, Exposure, LIKE_LABELS, LoadBalancer, Node, ObjectKey, Pod, Service,
    ServicePort, VIP_HOST,
};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

/// `metadata` of any kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    #[serde(skip_serializing)]
    pub resource_version: Option<String>,
}

impl Metadata {
    /// The labels, with the annotations that count as labels. Of those, texts that are no name are left out.
    pub fn labels_and_alike(&self) -> Cow<'_, BTreeMap<String, String>> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        let mut all = Cow::Borrowed(self.labels.as_ref().unwrap_or(&NONE));
        let annotations = self.annotations.iter().flatten().filter(|(_, text)| text.len() <= MAX_NAME);
        for (key, text) in annotations.filter(|(key, _)| LIKE_LABELS.contains(&key.as_str())) {
            all.to_mut().entry(key.clone()).or_insert_with(|| text.clone());
        }
        all
    }

    /// Drops the annotations that nodes do not read. `kubectl apply` stores the whole object there once more.
    pub fn prune(&mut self) {
        if let Some(annotations) = &mut self.annotations {
            let is_read = |key: &str| LIKE_LABELS.contains(&key) || capacity::ANNOTATIONS.contains(&key);
            annotations.retain(|key, text| is_read(key) && text.len() <= MAX_NAME);
        }
        self.annotations.take_if(|annotations| annotations.is_empty());
    }
}

/// The longest name of an object in Kubernetes (RFC 1123).
const MAX_NAME: usize = 253;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR", skip_serializing_if = "Option::is_none")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", skip_serializing_if = "Option::is_none")]
    pod_cidrs: Option<Vec<String>>,
    /// Set by `kubectl cordon` and `kubectl drain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    unschedulable: Option<bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    addresses: Option<Vec<NodeAddress>>,
    /// For the controller, which has no offline cache.
    #[serde(skip_serializing)]
    conditions: Option<Vec<NodeCondition>>,
}

#[derive(Debug, Deserialize)]
struct NodeCondition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
    #[serde(rename = "lastTransitionTime")]
    since: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    type_: String,
    address: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_network: Option<bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<String>,
    #[serde(rename = "podIP", skip_serializing_if = "Option::is_none")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs", skip_serializing_if = "Option::is_none")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct PodIp {
    ip: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    type_: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    selector: Option<BTreeMap<String, String>>,
    #[serde(rename = "clusterIP", skip_serializing_if = "Option::is_none")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", skip_serializing_if = "Option::is_none")]
    cluster_ips: Option<Vec<String>>,
    /// These fields are for `egretd why`; the offline cache does not have them.
    #[serde(rename = "externalIPs", skip_serializing)]
    external_ips: Option<Vec<String>>,
    #[serde(skip_serializing)]
    ports: Option<Vec<ServicePortSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePortSpec {
    name: Option<String>,
    protocol: Option<Protocol>,
    port: u16,
    node_port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    load_balancer: Option<LoadBalancerStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LoadBalancerStatus {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ingress {
    ip: Option<String>,
}

/// The endpoints of an EndpointSlice (`endpoints`, `ports`) or an Endpoints object (`subsets`).
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointsParts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<Endpoint>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<EndpointPort>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subsets: Option<Vec<Subset>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Subset {
    addresses: Option<Vec<PodIp>>,
    ports: Option<Vec<EndpointPort>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct EndpointPort {
    name: Option<String>,
    port: Option<u16>,
}

/// An EndpointSlice or an Endpoints object.
#[derive(Deserialize, Serialize)]
pub struct EndpointsObject {
    #[serde(default)]
    pub metadata: Metadata,
    #[serde(flatten)]
    pub parts: EndpointsParts,
}

/// The `spec` of a ServiceCIDR, of Calico's IPPool or of a CiliumNode.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworksSpec {
    cidrs: Vec<String>,
    cidr: Option<String>,
    ipam: Option<CiliumIpam>,
}

/// What Cilium's own pools have given to a node.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct CiliumIpam {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    /// With several pools (`ipam: multi-pool`).
    pools: CiliumPools,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct CiliumPools {
    allocated: Vec<CiliumPool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct CiliumPool {
    cidrs: Vec<String>,
}

impl NetworksSpec {
    /// The networks.
    ///
    /// # Errors
    /// One of them is invalid.
    pub fn parsed(&self) -> Result<Box<[IpNetwork]>, Fault> {
        let of_nodes = self
            .ipam
            .iter()
            .flat_map(|ipam| ipam.pod_cidrs.iter().chain(ipam.pools.allocated.iter().flat_map(|pool| &pool.cidrs)));
        let all = self.cidrs.iter().chain(&self.cidr).chain(of_nodes);
        all.map(|text| network(text, || "spec".into())).collect()
    }
}

/// Makes a Node.
///
/// # Errors
/// An address or a network is invalid.
pub fn node(meta: &Metadata, spec: &NodeSpec, status: &NodeStatus, names: &mut Names) -> Result<Node, Fault> {
    let (mut internal, mut external) = (Vec::new(), Vec::new());
    for (i, a) in status.addresses.iter().flatten().enumerate() {
        let to = match a.type_.as_str() {
            "InternalIP" => &mut internal,
            "ExternalIP" => &mut external,
            _ => continue,
        };
        to.push(address(&a.address, || format!("status.addresses[{i}].address"))?);
    }
    let pod_cidrs = match (&spec.pod_cidrs, &spec.pod_cidr) {
        (Some(all), _) if !all.is_empty() => all
            .iter()
            .enumerate()
            .map(|(i, c)| network(c, || format!("spec.podCIDRs[{i}]")))
            .collect::<Result<_, _>>()?,
        (_, Some(one)) if !one.is_empty() => [network(one, || "spec.podCIDR".into())?].into(),
        _ => Box::default(),
    };
    let labels = names.labels(meta.labels.as_ref().unwrap_or(&BTreeMap::new()));
    let count = internal.len();
    internal.append(&mut external);
    let lost = status.conditions.iter().flatten().find(|c| c.type_ == "Ready" && c.status == "Unknown");
    let lost_since = lost.map(|c| c.since.as_deref().and_then(parse_time).unwrap_or(0));
    let cordoned = spec.unschedulable.unwrap_or_default();
    let capacity = AnnotatedCapacity::new(meta.annotations.as_ref());
    Ok(Node { labels, addresses: internal.into(), internal: count, pod_cidrs, cordoned, capacity, lost_since })
}

/// Makes a Pod.
///
/// # Errors
/// An address is invalid.
pub fn pod(meta: &Metadata, spec: &PodSpec, status: &PodStatus, names: &mut Names) -> Result<Pod, Fault> {
    let addresses = match (&status.pod_ips, &status.pod_ip) {
        (Some(all), _) if !all.is_empty() => all
            .iter()
            .enumerate()
            .map(|(i, a)| address(&a.ip, || format!("status.podIPs[{i}].ip")))
            .collect::<Result<_, _>>()?,
        (_, Some(one)) if !one.is_empty() => [address(one, || "status.podIP".into())?].into(),
        _ => Box::default(),
    };
    Ok(Pod {
        uid: meta.uid.as_deref().unwrap_or_default().into(),
        labels: names.labels(&meta.labels_and_alike()),
        node: spec.node_name.as_deref().filter(|n| !n.is_empty()).map(|n| names.get(n)),
        addresses,
        host_network: spec.host_network.unwrap_or_default(),
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
    })
}

/// Makes a Service.
///
/// # Errors
/// A cluster IP is neither an address nor `None`.
pub fn service(spec: &ServiceSpec, names: &mut Names) -> Result<Service, Fault> {
    let listed = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(all), _) if !all.is_empty() => all.iter().enumerate().map(|(i, a)| (Some(i), a)).collect(),
        (_, Some(one)) => vec![(None, one)],
        _ => Vec::new(),
    };
    let mut cluster_ips = Vec::new();
    for (i, text) in listed.into_iter().filter(|(_, a)| !a.is_empty() && *a != "None") {
        let field = || i.map_or("spec.clusterIP".into(), |i| format!("spec.clusterIPs[{i}]"));
        cluster_ips.push(address(text, field)?);
    }
    // The endpoints controllers ignore Services of type ExternalName and those without a selector.
    let selector = spec.selector.as_ref().filter(|s| !s.is_empty() && spec.type_.as_deref() != Some("ExternalName"));
    let selector = selector.map(|s| Selector::equals(s.iter().map(|(k, v)| (names.get(k), names.get(v)))));
    Ok(Service { selector, cluster_ips: cluster_ips.into(), exposure: None, load_balancer: None })
}

/// The other addresses and ports of a Service. Invalid addresses are ignored.
pub fn exposure(spec: &ServiceSpec, status: &ServiceStatus) -> Exposure {
    let ingress = status.load_balancer.iter().flat_map(|lb| lb.ingress.iter().flatten()).filter_map(|i| i.ip.as_ref());
    let addresses = spec.external_ips.iter().flatten().chain(ingress).filter_map(|a| a.parse().ok());
    let port = |p: &ServicePortSpec| ServicePort {
        name: p.name.as_deref().unwrap_or_default().into(),
        protocol: p.protocol.unwrap_or(Protocol::Tcp),
        port: p.port,
        node_port: p.node_port.filter(|port| *port != 0),
    };
    Exposure { addresses: addresses.collect(), ports: spec.ports.iter().flatten().map(port).collect() }
}

/// What load balancers have written about a Service: `None` if it is of another type, or they have written nothing.
/// Invalid addresses are ignored.
pub fn load_balancer(
    meta: &Metadata,
    spec: &ServiceSpec,
    status: &ServiceStatus,
    names: &mut Names,
) -> Option<Box<LoadBalancer>> {
    if spec.type_.as_deref() != Some("LoadBalancer") {
        return None;
    }
    let ingress = status.load_balancer.iter().flat_map(|lb| lb.ingress.iter().flatten()).filter_map(|i| i.ip.as_ref());
    let vip_host = meta.annotations.as_ref().and_then(|all| all.get(VIP_HOST)).filter(|node| !node.is_empty());
    let found = LoadBalancer {
        addresses: ingress.filter_map(|address| address.parse().ok()).collect(),
        vip_host: vip_host.map(|node| names.get(node)),
        egress: meta.annotations.as_ref().and_then(|all| asked_egress(meta, all)),
    };
    (found != LoadBalancer::default()).then(|| Box::new(found))
}

/// What a Service's annotations for kube-vip ask for.
fn asked_egress(meta: &Metadata, all: &BTreeMap<String, String>) -> Option<Box<AskedEgress>> {
    let of_egress = all.iter().filter(|(key, _)| kube_vip::ANNOTATIONS.contains(&key.as_str()));
    let asked = || AskedEgress {
        annotations: of_egress.map(|(key, value)| (key.clone(), value.clone())).collect(),
        uid: meta.uid.as_deref().unwrap_or_default().into(),
    };
    kube_vip::has_egress(all).then(|| Box::new(asked()))
}

/// The `status` of MetalLB's ServiceL2Status.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceL2Status {
    node: String,
    service_name: String,
    service_namespace: String,
}

/// The `spec` of a Lease.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LeaseSpec {
    holder_identity: Option<String>,
}

/// The namespace of Cilium's Leases.
pub const CILIUM_LEASES: &str = "kube-system";
/// The names of Cilium's Leases for Services begin with this; the Service's namespace, a dash and its name follow.
const CILIUM_LEASE: &str = "cilium-l2announce-";

/// The node that announces a Service's address, as MetalLB says. `None` while it says nothing.
pub fn announced_by_metallb(meta: &Metadata, status: &ServiceL2Status, names: &mut Names) -> Option<Announcement> {
    let ServiceL2Status { node, service_name, service_namespace } = status;
    let created = meta.creation_timestamp.as_deref().and_then(parse_time).unwrap_or_default();
    let service = format!("{service_namespace}/{service_name}").into();
    (!node.is_empty()).then(|| Announcement { service, node: names.get(node), created })
}

/// The node that announces a Service's address, as a Lease of Cilium says. `None` for other Leases, and while nobody
/// holds it.
pub fn announced_by_cilium(key: &ObjectKey, spec: &LeaseSpec, names: &mut Names) -> Option<Announcement> {
    let service = key.name.strip_prefix(CILIUM_LEASE).filter(|_| *key.namespace == *CILIUM_LEASES)?;
    let node = spec.holder_identity.as_deref().filter(|node| !node.is_empty())?;
    Some(Announcement { service: service.into(), node: names.get(node), created: 0 })
}

/// The label of an EndpointSlice that names its Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Some endpoints of a Service. Entries that are no addresses, such as the names in a slice of the type FQDN, are
/// ignored, as kube-proxy does.
pub fn endpoints(meta: &Metadata, key: &ObjectKey, parts: &EndpointsParts) -> Endpoints {
    let named = meta.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let service = match named {
        Some(name) => ObjectKey { namespace: key.namespace.clone(), name: name.as_str().into() },
        None => key.clone(),
    };
    let subsets = || parts.subsets.iter().flatten();
    let of_subsets = subsets().flat_map(|s| s.addresses.iter().flatten()).map(|a| &a.ip);
    let addresses = parts.endpoints.iter().flatten().flat_map(|e| &e.addresses).chain(of_subsets);
    let ports = parts.ports.iter().flatten().chain(subsets().flat_map(|s| s.ports.iter().flatten()));
    let ports = ports.filter_map(|p| Some((p.name.as_deref().unwrap_or_default().into(), p.port?)));
    Endpoints { service, addresses: addresses.filter_map(|a| a.parse().ok()).collect(), ports: ports.collect() }
}

fn address(text: &str, field: impl Fn() -> String) -> Result<IpAddr, Fault> {
    text.parse().map_err(|_| Fault::field(field(), format!("{text:?} is not an IP address")))
}

fn network(text: &str, field: impl Fn() -> String) -> Result<IpNetwork, Fault> {
    let wrong = || Fault::field(field(), format!("{text:?} is not a network; write it like 10.244.1.0/24"));
    network_of(text).ok_or_else(wrong)
}

/// Parses a network. Kubernetes permits host bits, which have no meaning.
pub fn network_of(text: &str) -> Option<IpNetwork> {
    let network = IpNetwork::from_str(text.trim()).ok().filter(|_| text.contains('/'))?;
    IpNetwork::new(network.network(), network.prefix()).ok()
}
