//! Calico's egress gateways: the operator's `EgressGateway`, and before 3.16 a Deployment of such pods.

use super::super::draft::{Draft, GatewayDraft, labels};
use super::super::field::{Field, Invalid};
use super::super::input::Object;
use super::selector::Selector;
use std::collections::BTreeMap;

pub(super) const OPERATOR: &str = "operator.tigera.io";
/// Calico's own API, and the group in which it is stored.
pub(super) const GROUPS: [&str; 2] = ["projectcalico.org", "crd.projectcalico.org"];
/// What the image of the gateways' pods is called.
const IMAGE: &str = "egress-gateway";

/// A gateway that clients select by its pods' labels.
pub(super) struct CalicoGateway {
    /// The name of the EgressGateway that it becomes.
    pub(super) name: String,
    namespace: String,
    labels: BTreeMap<String, String>,
    /// Whether its traffic leaves from the address of the node, because the pool has `natOutgoing`.
    pub(super) by_node_address: bool,
}

impl CalicoGateway {
    pub(super) fn matches(&self, selector: &Selector) -> bool {
        selector.matches(&self.labels)
    }

    pub(super) fn is_in(&self, namespace: &str) -> bool {
        self.namespace == namespace
    }

    /// Whether the gateway's namespace matches, by its name and by the labels of the Namespace, if the input has it.
    pub(super) fn namespace_matches(&self, selector: &Selector, objects: &[&Object]) -> Result<bool, Invalid> {
        let mut known: BTreeMap<String, String> = BTreeMap::new();
        for object in objects.iter().filter(|o| o.is("", "Namespace") && o.name() == self.namespace) {
            known.extend(owned(object.field("metadata.labels").labels()?));
        }
        for key in ["projectcalico.org/name", "kubernetes.io/metadata.name"] {
            known.insert(key.to_owned(), self.namespace.clone());
        }
        Ok(selector.matches(&known))
    }
}

fn owned(pairs: Vec<(&str, &str)>) -> impl Iterator<Item = (String, String)> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()))
}

/// Whether the object is a workload of gateways' pods.
pub(super) fn is_workload_of_gateways(object: &Object) -> Result<bool, Invalid> {
    let containers = object.field("spec.template.spec.containers").list()?;
    let images = containers.iter().map(|container| container.at("image").text()).collect::<Result<Vec<_>, _>>()?;
    Ok(object.is("apps", "Deployment") && images.into_iter().flatten().any(|image| image.contains(IMAGE)))
}

/// The gateways of the input. They are added to the draft.
pub(super) fn gateways(objects: &[&Object], draft: &mut Draft) -> Result<Vec<CalicoGateway>, Invalid> {
    let mut known: Vec<CalicoGateway> = Vec::new();
    for object in objects {
        let of_operator = object.is(OPERATOR, "EgressGateway");
        if !of_operator && !is_workload_of_gateways(object)? {
            continue;
        }
        let namespace = object.namespace_or_default().to_owned();
        let is_free = !known.iter().any(|other| other.name == object.name());
        let name = if is_free { object.name().to_owned() } else { format!("{namespace}-{}", object.name()) };
        let template = object.field("spec.template");
        let nodes = template.at("spec").at("nodeSelector").labels()?;
        let mut gateway = GatewayDraft::new(&name, labels(nodes));
        gateway.add_from(object);
        let mut pod_labels: BTreeMap<String, String> = owned(template.at("metadata").at("labels").labels()?).collect();
        if pod_labels.is_empty() && of_operator {
            // The operator's default.
            pod_labels.insert("projectcalico.org/egw".to_owned(), object.name().to_owned());
        }
        pod_labels.insert("projectcalico.org/namespace".to_owned(), namespace.clone());
        let pools = if of_operator { pools_of_operator(object)? } else { pools_of_workload(object)? };
        let by_node_address = add_pools(&pools, objects, &mut gateway)?;
        note(object, of_operator, &mut gateway)?;
        known.push(CalicoGateway { name, namespace, labels: pod_labels, by_node_address });
        draft.gateways.push(gateway);
    }
    Ok(known)
}

/// Names or networks of pools.
fn pools_of_operator(object: &Object) -> Result<Vec<(Field<'_>, String)>, Invalid> {
    let mut found = Vec::new();
    for pool in object.field("spec.ipPools").list()? {
        match (pool.at("cidr").text()?, pool.at("name").text()?) {
            (Some(cidr), _) => found.push((pool.at("cidr"), cidr.to_owned())),
            (None, Some(name)) => found.push((pool.at("name"), name.to_owned())),
            (None, None) => return Err(pool.invalid("has neither name nor cidr; add one of them")),
        }
    }
    Ok(found)
}

/// Annotations with lists in JSON: names or networks of pools, or addresses.
fn pools_of_workload(object: &Object) -> Result<Vec<(Field<'_>, String)>, Invalid> {
    let annotations = object.field("spec.template.metadata.annotations");
    let mut found = Vec::new();
    for key in ["ipv4pools", "ipv6pools", "ipAddrs"] {
        let field = annotations.at(&format!("cni.projectcalico.org/{key}"));
        let Some(text) = field.text()? else { continue };
        let list: Vec<String> = serde_json::from_str(text)
            .map_err(|_| field.invalid(format!("{text:?} is not a list; write one like [\"10.10.10.0/31\"]")))?;
        found.extend(list.into_iter().map(|pool| (field.clone(), pool)));
    }
    Ok(found)
}

/// Adds the addresses of pools. Returns whether a pool's traffic leaves from the address of the node.
fn add_pools(pools: &[(Field<'_>, String)], objects: &[&Object], gateway: &mut GatewayDraft) -> Result<bool, Invalid> {
    let mut by_node_address = false;
    for (field, pool) in pools {
        let mut found = None;
        for object in objects.iter().filter(|o| GROUPS.contains(&o.group()) && o.kind() == "IPPool") {
            let cidr = object.field("spec.cidr");
            if object.name() == pool || cidr.text()? == Some(pool) {
                found = cidr.network()?;
                gateway.add_from(object);
                by_node_address |= object.field("spec.natOutgoing").boolean()?;
            }
        }
        match found {
            Some(network) => gateway.add_addresses(&network.to_string()),
            None if pool.contains(['/', ':']) || pool.parse::<std::net::IpAddr>().is_ok() => {
                let network = field.parse_network(pool)?;
                let is_one = network.prefix() == if network.is_ipv4() { 32 } else { 128 };
                gateway.add_addresses(&if is_one { network.ip().to_string() } else { network.to_string() });
            }
            None => gateway.notes.lost(format!(
                "{}: the IPPool {pool:?} is not in the input; give it too, or add its addresses to spec.addresses",
                field.path()
            )),
        }
    }
    if by_node_address {
        gateway.spec.addresses.clear();
    }
    Ok(by_node_address)
}

fn note(object: &Object, of_operator: bool, gateway: &mut GatewayDraft) -> Result<(), Invalid> {
    let spec = object.field("spec");
    if let Some(replicas) = spec.at("replicas").number()?.filter(|replicas| *replicas > 1) {
        gateway.notes.differs(format!(
            "spec.replicas: {replicas}. There, connections leave from one of as many addresses. Here all policies with \
             allocate: Shared leave from one egress IP, and another node of the gateway takes it over"
        ));
    }
    if spec.at("template").at("spec").at("affinity").is_present() {
        gateway.notes.lost("spec.template.spec.affinity: say by nodeSelector which nodes can hold the egress IPs");
    }
    if !of_operator {
        return Ok(());
    }
    let remedies = [
        ("externalNetworks", "name the router and the interface of that network in nextHop and interface"),
        ("aws", "use placement: External with what assigns addresses to the instances, or allocate: Node"),
        ("egressGatewayFailureDetection", "Egret's nodes probe each other, and no host outside"),
    ];
    for (name, remedy) in remedies {
        let field = spec.at(name);
        if field.is_present() {
            gateway.notes.lost(format!("{}: {}; {remedy}", field.path(), field.shown()));
        }
    }
    let known =
        ["replicas", "ipPools", "template", "logSeverity", "externalNetworks", "aws", "egressGatewayFailureDetection"];
    gateway.notes.unknown(&spec, &known)
}
