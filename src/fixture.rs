//! Small clusters for tests.

use crate::allocation::report::report;
use crate::allocation::{AllocationResult, Decision, Grant, Reason, Rejection, allocate};
use crate::api::{
    AddressPair, Allocate, ClusterEgressPolicySpec, EgressGatewaySpec, EgressNodeStatus, EgressPolicySpec,
    EgressPolicyStatus, LostUplink, Placement, PolicyAddress, PortsNearlyExhausted, ReportGiven, Reservation,
    ServiceReference, Tier,
};
use crate::model::selector::Name;
use crate::model::{
    Announcement, Announcer, Client, Cluster, Gateway, LoadBalancer, Metadata, Node, ObjectKey, Pod, Policy, PolicyKey,
    Service, trace,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// A pod of which only the name is known.
pub(crate) const CLIENT: Client<'static> = Client { namespace: "a", name: "p", uid: "", labels: None };

/// A request to trace a pod's TCP packets to port 443 of a server.
pub(crate) fn trace_request(source_port: Option<u16>) -> trace::TraceSpec {
    trace::TraceSpec {
        node: "n1".into(),
        namespace: "shop".into(),
        pod: "visitor".into(),
        source: "10.244.1.2".parse().unwrap(),
        destination: "192.0.2.100".parse().unwrap(),
        protocol: trace::Protocol::Tcp,
        port: 443,
        source_port,
        seconds: 5,
    }
}

/// A cluster that is changed step by step.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) now: i64,
}

pub(crate) fn selector(pairs: &[(&str, &str)]) -> LabelSelector {
    let match_labels = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    LabelSelector { match_labels: Some(match_labels), match_expressions: None }
}

pub(crate) fn pair(addresses: &[&str]) -> AddressPair {
    let mut pair = AddressPair::default();
    for address in addresses {
        match address.parse().unwrap() {
            IpAddr::V4(a) => pair.ipv4 = Some(a),
            IpAddr::V6(a) => pair.ipv6 = Some(a),
        }
    }
    pair
}

/// A reservation of addresses for these namespaces.
pub(crate) fn reservation(addresses: &[&str], namespaces: &[&str]) -> Reservation {
    let requirement = LabelSelectorRequirement {
        key: "kubernetes.io/metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(namespaces.iter().map(|name| name.to_string()).collect()),
    };
    Reservation {
        addresses: addresses.iter().map(|address| address.to_string()).collect(),
        namespace_selector: LabelSelector { match_labels: None, match_expressions: Some(vec![requirement]) },
    }
}

/// A policy for all pods that names these addresses.
pub(crate) fn naming(addresses: &[&str]) -> EgressPolicySpec {
    EgressPolicySpec { address: Some(pair(addresses).into()), pod_selector: Some(selector(&[])), ..Default::default() }
}

/// A policy for all pods that names a Service of its namespace.
pub(crate) fn naming_service(name: &str) -> EgressPolicySpec {
    let service = ServiceReference { name: name.to_owned(), namespace: None };
    let address = PolicyAddress { service: Some(service), ..PolicyAddress::default() };
    EgressPolicySpec { address: Some(address), pod_selector: Some(selector(&[])), ..Default::default() }
}

/// A policy for all pods that names several egress IPs of one address each.
pub(crate) fn naming_several(addresses: impl IntoIterator<Item = impl AsRef<str>>) -> EgressPolicySpec {
    let addresses = addresses.into_iter().map(|address| pair(&[address.as_ref()])).collect();
    EgressPolicySpec { addresses, pod_selector: Some(selector(&[])), ..Default::default() }
}

/// A policy for all pods that lets an address be allocated.
pub(crate) fn asking(allocate: Allocate) -> EgressPolicySpec {
    EgressPolicySpec { allocate: Some(allocate), pod_selector: Some(selector(&[])), ..Default::default() }
}

impl World {
    /// A cluster with the default gateway `g`, its nodes `n1` and `n2`, and this pool.
    pub(crate) fn new(pool: &[&str]) -> Self {
        let mut world = World { now: 1_000_000, ..World::default() };
        world.gateway("g", pool, |spec| spec.default = true);
        world.node("n1", "g", &["10.0.0.1", "fd00::1"]);
        world.node("n2", "g", &["10.0.0.2", "fd00::2"]);
        world
    }

    /// Adds a gateway whose nodes have the label `gateway: NAME`, or changes its spec and keeps its status.
    pub(crate) fn gateway(&mut self, name: &str, pool: &[&str], change: impl Fn(&mut EgressGatewaySpec)) {
        let mut spec = EgressGatewaySpec {
            node_selector: selector(&[("gateway", name)]),
            addresses: pool.iter().map(|a| a.to_string()).collect(),
            ..Default::default()
        };
        change(&mut spec);
        let mut gateway = Gateway::new(&spec, Metadata { generation: Some(1), ..Metadata::default() }).unwrap();
        if let Some(before) = self.cluster.gateways.get(name) {
            gateway.status = before.status.clone();
            gateway.end_cooldown.clone_from(&before.end_cooldown);
        }
        self.cluster.gateways.insert(name.into(), Arc::new(gateway));
    }

    pub(crate) fn external(&mut self, name: &str, pool: &[&str]) {
        self.gateway(name, pool, |spec| {
            spec.placement = Placement::External;
            spec.default = true;
        });
    }

    pub(crate) fn node(&mut self, name: &str, gateway: &str, addresses: &[&str]) {
        let addresses: Box<[IpAddr]> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let labels = [("gateway", gateway)].into_iter().collect();
        let node = Node { labels, internal: addresses.len(), addresses, ..Node::default() };
        self.cluster.nodes.insert(name.into(), Arc::new(node));
    }

    pub(crate) fn without_node(&mut self, name: &str) {
        self.cluster.nodes.remove(name).unwrap();
    }

    /// Adds a policy, created at the current time.
    pub(crate) fn policy(&mut self, key: &str, spec: EgressPolicySpec) {
        self.policy_of_tier(key, spec, None);
    }

    /// The same, with a tier if it is a ClusterEgressPolicy.
    pub(crate) fn policy_of_tier(&mut self, key: &str, spec: EgressPolicySpec, tier: Option<Tier>) {
        let key = PolicyKey::from(key);
        let created = Some(self.cluster.policies.get(&key).map_or(self.now, |p| p.created));
        let meta = Metadata { created, generation: Some(1), ..Metadata::default() };
        let policy = match &key.namespace {
            Some(namespace) => Policy::namespaced(namespace, &spec, meta),
            None => {
                let spec = ClusterEgressPolicySpec { tier, ..spec.into() };
                Policy::cluster(&spec, meta)
            }
        };
        self.cluster.policies.insert(key, Arc::new(policy.unwrap()));
    }

    /// Adds a Service of type LoadBalancer with these addresses, or changes them. `vip_host` is the node that kube-vip
    /// names.
    pub(crate) fn service(&mut self, key: &str, addresses: &[&str], vip_host: Option<&str>) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let load_balancer = LoadBalancer { addresses, vip_host: vip_host.map(Into::into), egress: None };
        let service = Service { load_balancer: Some(load_balancer.into()), ..Service::default() };
        self.cluster.services.insert(ObjectKey::parse(key).unwrap(), Arc::new(service));
    }

    /// Lets a load balancer say which node announces a Service's address, by an object of this name.
    pub(crate) fn announces(&mut self, by: Announcer, object: &str, service: &str, node: &str) {
        let said = Announcement { service: service.into(), node: node.into(), created: self.now };
        self.cluster.announcements.insert((by, ObjectKey::new("kube-system", object)), Arc::new(said));
    }

    pub(crate) fn without_policy(&mut self, key: &str) {
        self.cluster.policies.remove(&PolicyKey::from(key)).unwrap();
    }

    pub(crate) fn pod(&mut self, namespace: &str, name: &str, labels: &[(&str, &str)]) {
        let pod = Pod { labels: labels.iter().copied().collect(), ..Pod::default() };
        self.cluster.pods.insert(ObjectKey::new(namespace, name), Arc::new(pod));
    }

    /// Adds a pod without labels on a node.
    pub(crate) fn pod_on(&mut self, node: &str, namespace: &str, name: &str) {
        let pod = Pod { node: Some(node.into()), ..Pod::default() };
        self.cluster.pods.insert(ObjectKey::new(namespace, name), Arc::new(pod));
    }

    /// Lets a node report that it holds these egress IPs.
    pub(crate) fn holds(&mut self, node: &str, allocations: &[u16]) {
        let status = EgressNodeStatus { allocations: allocations.to_vec(), ..EgressNodeStatus::default() };
        self.cluster.egress_nodes.insert(node.into(), Arc::new(status.into()));
    }

    /// Lets a node report the version of its daemon, and since when it is in sync.
    pub(crate) fn is_in_sync(&mut self, node: &str, version: &str, since: &str) {
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default()).of_allocations_mut();
        status.version = Some(version.into());
        status.in_sync_since = Some(since.into());
    }

    /// Lets a node report the MTU of its tunnel device.
    pub(crate) fn has_tunnel_mtu(&mut self, node: &str, mtu: u32) {
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().tunnel_mtu = Some(mtu);
    }

    /// Lets a node report that its egress IPs have few source ports left.
    pub(crate) fn has_few_ports(&mut self, node: &str, found: &[PortsNearlyExhausted]) {
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().ports_nearly_exhausted = found.to_vec();
    }

    /// Lets a node report these peers as unreachable.
    pub(crate) fn misses(&mut self, node: &str, unreachable: &[String]) {
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().unreachable_peers = unreachable.to_vec();
    }

    /// Lets a source node report which gateway nodes do not answer it.
    pub(crate) fn does_not_reach(&mut self, node: &str, unreachable: &[&str]) {
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().unreachable_gateway_nodes = unreachable.iter().map(ToString::to_string).collect();
    }

    /// Lets nodes report anew, as the gateway `g` requests.
    pub(crate) fn give_reports(&mut self, nodes: &[&str]) {
        let requested_at = self.cluster.gateways["g"].status.reports_requested_at;
        let given = requested_at.map(|requested_at| ReportGiven { gateway: "g".to_owned(), requested_at });
        for node in nodes {
            let status = Arc::make_mut(self.cluster.egress_nodes.entry((*node).into()).or_default());
            status.of_allocations_mut().reports_given = given.iter().cloned().collect();
        }
    }

    /// Lets a node report that its main uplink has lost these families.
    pub(crate) fn loses(&mut self, node: &str, families: &[&str]) {
        let lost = |family: &&str| LostUplink {
            family: (*family).to_owned(),
            message: "no default route".to_owned(),
            ..LostUplink::default()
        };
        let status = Arc::make_mut(self.cluster.egress_nodes.entry(node.into()).or_default());
        status.of_allocations_mut().lost = families.iter().map(lost).collect();
    }

    /// Lets each node report that it holds what the allocations assign to it.
    pub(crate) fn settle(&mut self) {
        let mut held: BTreeMap<Name, Vec<u16>> = BTreeMap::new();
        for allocation in self.cluster.allocations() {
            held.entry(allocation.node.clone().unwrap_or_default()).or_default().push(allocation.id);
        }
        for node in self.cluster.nodes.keys().cloned().collect::<Vec<_>>() {
            let allocations = held.remove(&*node).unwrap_or_default();
            let status = Arc::make_mut(self.cluster.egress_nodes.entry(node).or_default());
            status.tunnel_mac = Some([2, 0, 0, 0, 0, 1]);
            status.of_allocations_mut().held = allocations;
        }
    }

    /// Computes the allocations, and stores them.
    pub(crate) fn allocate(&mut self) -> AllocationResult {
        let outcome = allocate(&self.cluster, self.now);
        for (name, status) in &outcome.gateways {
            Arc::make_mut(self.cluster.gateways.get_mut(name).unwrap()).status = status.clone().into();
        }
        outcome
    }

    /// Computes the allocations and the statuses of policies, and stores them.
    pub(crate) fn report(&mut self) -> BTreeMap<PolicyKey, EgressPolicyStatus> {
        let outcome = self.allocate();
        let statuses = report(&self.cluster, &outcome, self.now);
        for (key, status) in &statuses {
            self.cluster.policy_statuses.insert(key.clone(), Arc::new(status.clone()));
        }
        statuses
    }
}

impl AllocationResult {
    pub(crate) fn grant(&self, key: &str) -> &Grant {
        match &self.decisions[&PolicyKey::from(key)] {
            Decision::Granted(grants) => &grants.first,
            Decision::Rejected(rejection) => panic!("{key} is rejected: {}: {}", rejection.reason, rejection.message),
            Decision::Direct => panic!("{key} asks for nothing"),
        }
    }

    pub(crate) fn rejection(&self, key: &str) -> &Rejection {
        match &self.decisions[&PolicyKey::from(key)] {
            other @ (Decision::Granted(_) | Decision::Direct) => panic!("{key} has {other:?}"),
            Decision::Rejected(rejection) => rejection,
        }
    }

    /// Asserts that a policy is rejected for this reason, with these words in the message.
    #[track_caller]
    pub(crate) fn assert_refused(&self, key: &str, reason: Reason, words: &[&str]) {
        let rejection = self.rejection(key);
        assert_eq!(rejection.reason, reason, "{}", rejection.message);
        for word in words {
            assert!(rejection.message.contains(word), "{word:?} is not in {:?}", rejection.message);
        }
    }

    /// The egress IP of a policy as text.
    pub(crate) fn address(&self, key: &str) -> String {
        crate::allocation::in_words(&self.grant(key).address)
    }

    pub(crate) fn node(&self, key: &str) -> Option<&str> {
        self.grant(key).node.as_deref()
    }
}
