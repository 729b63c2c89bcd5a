//! Cilium: `CiliumEgressGatewayPolicy`, with pods, destinations, the gateway node and the egress IP in one object.

use super::draft::{Draft, GatewayDraft, Notes, PolicyDraft, pair_of};
use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{AddressPair, Allocate, Placement, Spread};
use crate::model::addresses_of;
use crate::model::blocks::covered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::collections::BTreeMap;

pub(super) const GROUP: &str = "cilium.io";
/// Cilium has a pod's namespace, and the labels of it, among the pod's labels.
const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const OWN_LABELS: &str = "io.cilium.k8s.";
/// The label that every Namespace has, with its name.
const NAME_OF_NAMESPACE: &str = "kubernetes.io/metadata.name";

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    for object in objects.iter().filter(|object| object.is(GROUP, "CiliumEgressGatewayPolicy")) {
        convert_policy(object, &mut draft)?;
    }
    Ok(draft)
}

fn convert_policy(object: &Object, draft: &mut Draft) -> Result<(), Invalid> {
    let spec = object.field("spec");
    let networks = spec.at("destinationCIDRs").networks()?;
    if networks.is_empty() {
        return Err(spec.at("destinationCIDRs").invalid("is empty; add 0.0.0.0/0 or the networks that are meant"));
    }
    let covered = covered(&networks, &spec.at("excludedCIDRs").networks()?, &[]);
    let (gateway, addresses) = gateway(object, draft)?;
    let selectors = spec.at("selectors").list()?;
    let mut first = true;
    for (i, selector) in selectors.iter().enumerate() {
        let name = if i == 0 { object.name().to_owned() } else { format!("{}-{}", object.name(), i + 1) };
        let mut policy = PolicyDraft::cluster(object, &name);
        if first {
            policy.notes.unknown(
                &spec,
                &["selectors", "destinationCIDRs", "excludedCIDRs", "egressGateway", "egressGateways"],
            )?;
        }
        let Some(pods) = pods(selector, &mut policy.notes)? else {
            draft.not_converted(object, format!("{} selects by labels that only Cilium knows", selector.path()));
            continue;
        };
        (policy.spec.namespace_selector, policy.spec.pod_selector) = pods;
        policy.spec.gateway = Some(gateway.clone());
        match addresses.as_slice() {
            [] => policy.set_allocate(Allocate::Node),
            // There, too, a pod has one of them by its identity.
            pairs => policy.set_addresses(pairs.to_vec(), Spread::Pod),
        }
        if !policy.set_covered(covered.clone())? {
            draft.not_converted(object, "spec.excludedCIDRs contains all of spec.destinationCIDRs");
            return Ok(());
        }
        first = false;
        draft.policies.push(policy);
    }
    Ok(())
}

/// One gateway node of a policy, as Cilium describes it.
struct CiliumNode {
    selector: LabelSelector,
    interface: Option<String>,
    address: AddressPair,
}

/// The name of the gateway of a policy, and the egress IPs; none: the node's own address.
fn gateway(object: &Object, draft: &mut Draft) -> Result<(String, Vec<AddressPair>), Invalid> {
    let mut notes = Notes::default();
    let mut fields = object.field("spec.egressGateways").list()?;
    let single = object.field("spec.egressGateway");
    if single.is_present() {
        fields.insert(0, single.clone());
    }
    let mut nodes = Vec::new();
    for field in &fields {
        let Some(selector) = field.at("nodeSelector").selector()? else {
            return Err(field.at("nodeSelector").invalid("is missing; add the labels of the gateway node"));
        };
        notes.unknown(field, &["nodeSelector", "interface", "egressIP"])?;
        let interface = field.at("interface").text()?.map(str::to_owned);
        let address = pair_of(field.at("egressIP").address()?).0;
        nodes.push(CiliumNode { selector, interface, address });
    }
    let [node, others @ ..] = nodes.as_slice() else {
        return Err(single.invalid("is missing; add the gateway node"));
    };
    let selector = selector_of_all(&nodes, &mut notes);
    let mut addresses: Vec<AddressPair> = vec![node.address.clone()];
    for other in others.iter().filter(|other| !addresses_of(&other.address).eq(addresses_of(&node.address))) {
        let families = |pair: &AddressPair| (pair.ipv4.is_some(), pair.ipv6.is_some());
        if families(&other.address) == families(&node.address) && other.interface == node.interface {
            addresses.push(other.address.clone());
        } else {
            notes.lost(
                "spec.egressGateways: all egress IPs of a policy of Egret have the same families and the same interface; an \
                 entry that differs from the first in them is not used. For these, divide the pods among several policies",
            );
        }
    }
    addresses.retain(|pair| !pair.is_empty());
    if addresses.len() > 1 {
        notes.differs(
            "spec.egressGateways: the node that has an address is its owner, whatever its entry's nodeSelector",
        );
    } else if !others.is_empty() {
        notes.differs(
            "spec.egressGateways: all pods of a policy leave through one of these nodes, not each through its own",
        );
    }
    Ok((join(object, draft, node, &addresses, (selector, notes)), addresses))
}

/// A gateway that an earlier policy has made, if it has the same nodes and the same interface.
fn join(
    object: &Object,
    draft: &mut Draft,
    node: &CiliumNode,
    addresses: &[AddressPair],
    (selector, notes): (LabelSelector, Notes),
) -> String {
    let placement = match node.address.is_empty() {
        true => Placement::Managed,
        false => Placement::External,
    };
    let same = |g: &GatewayDraft| {
        let spec = &g.spec;
        (&spec.node_selector, &spec.interface, spec.placement) == (&selector, &node.interface, placement)
    };
    let index = draft.gateways.iter().position(same).unwrap_or_else(|| {
        let mut gateway = GatewayDraft::new(object.name(), selector.clone());
        (gateway.spec.interface, gateway.spec.placement) = (node.interface.clone(), placement);
        match placement {
            Placement::External => gateway.notes.differs(
                "Cilium's egress IP is on a node already, and the node that has it is the owner. For failover, take the \
                 addresses off the nodes and remove placement: then Egret puts them onto a node that lives",
            ),
            Placement::Managed => gateway.notes.differs(match &node.interface {
                Some(interface) => format!(
                    "the egress IP is the node's own, as its Node object lists it (InternalIP). If {interface} has another \
                     address, name it: addresses here with placement: External, and address in the policy"
                ),
                None => "the egress IP is the node's own, as its Node object lists it (InternalIP)".to_owned(),
            }),
        }
        draft.gateways.push(gateway);
        draft.gateways.len() - 1
    });
    let gateway = &mut draft.gateways[index];
    gateway.add_from(object);
    addresses.iter().flat_map(addresses_of).for_each(|address| gateway.add_addresses(&address.to_string()));
    gateway.notes.0.extend(notes.0);
    gateway.name.clone()
}

/// A selector of the nodes of all entries: they differ in the value of one label at most, or it is the first entry's.
fn selector_of_all(nodes: &[CiliumNode], notes: &mut Notes) -> LabelSelector {
    let first = nodes.first().map(|node| node.selector.clone()).unwrap_or_default();
    if nodes.iter().all(|node| node.selector == first) {
        return first;
    }
    let single = |node: &CiliumNode| match (&node.selector.match_labels, &node.selector.match_expressions) {
        (Some(labels), None) if labels.len() == 1 => labels.iter().next().map(|(k, v)| (k.clone(), v.clone())),
        _ => None,
    };
    let labels: Option<Vec<(String, String)>> = nodes.iter().map(single).collect();
    match labels.as_deref() {
        Some(all @ [(key, _), ..]) if all.iter().all(|(other, _)| other == key) => {
            let values = Some(all.iter().map(|(_, value)| value.clone()).collect());
            let requirement = LabelSelectorRequirement { key: key.clone(), operator: "In".to_owned(), values };
            LabelSelector { match_labels: None, match_expressions: Some(vec![requirement]) }
        }
        _ => {
            notes.lost(
                "spec.egressGateways: no one selector has the nodes of all entries, that of the first is used. Give all \
                 gateway nodes a common label and select it",
            );
            first
        }
    }
}

/// Selectors of namespaces and of pods.
type Selectors = (Option<LabelSelector>, Option<LabelSelector>);

/// What an entry of `selectors` selects; `None` if it needs labels that only Cilium has.
fn pods(entry: &Field<'_>, notes: &mut Notes) -> Result<Option<Selectors>, Invalid> {
    let mut namespaces = Parts::of(entry.at("namespaceSelector").selector()?);
    let mut pods = Parts::default();
    for requirement in Parts::of(entry.at("podSelector").selector_of_any_labels()?).0 {
        let key = requirement.key.clone();
        let key = key.strip_prefix("k8s:").or(key.strip_prefix("any:")).unwrap_or(&key);
        let (parts, key) = match (key, key.strip_prefix(NAMESPACE_LABELS)) {
            (_, Some(label)) => (&mut namespaces, label),
            (NAMESPACE, _) => (&mut namespaces, NAME_OF_NAMESPACE),
            (other, _) if other.starts_with(OWN_LABELS) => return Ok(None),
            (other, _) => (&mut pods, other),
        };
        parts.0.push(LabelSelectorRequirement { key: key.to_owned(), ..requirement });
    }
    if entry.at("nodeSelector").is_present() {
        notes.lost(format!(
            "{}: {}. Egret's policies select pods on all nodes: this one selects more pods. Label those that are meant, and \
             select the label",
            entry.at("nodeSelector").path(),
            entry.at("nodeSelector").shown()
        ));
    }
    notes.unknown(entry, &["namespaceSelector", "podSelector", "nodeSelector"])?;
    let namespaces = Some(namespaces.selector()).filter(|selector| *selector != LabelSelector::default());
    Ok(Some((namespaces, Some(pods.selector()))))
}

/// The requirements of a selector. Equality is an `In` with one value, until the selector is made again.
#[derive(Default)]
struct Parts(Vec<LabelSelectorRequirement>);

impl Parts {
    fn of(selector: Option<LabelSelector>) -> Self {
        let LabelSelector { match_labels, match_expressions } = selector.unwrap_or_default();
        let equal =
            |(key, value)| LabelSelectorRequirement { key, operator: "In".to_owned(), values: Some(vec![value]) };
        let labels = match_labels.into_iter().flatten().map(equal);
        Parts(labels.chain(match_expressions.into_iter().flatten()).collect())
    }

    fn selector(self) -> LabelSelector {
        let (mut labels, mut expressions) = (BTreeMap::new(), Vec::new());
        for requirement in self.0 {
            match (requirement.operator.as_str(), requirement.values.as_deref()) {
                ("In", Some([value])) if !labels.contains_key(&requirement.key) => {
                    labels.insert(requirement.key.clone(), value.clone());
                }
                _ => expressions.push(requirement),
            }
        }
        LabelSelector {
            match_labels: Some(labels).filter(|all| !all.is_empty()),
            match_expressions: Some(expressions).filter(|all| !all.is_empty()),
        }
    }
}
