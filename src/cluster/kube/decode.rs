//! From an object's text to the model, one object at a time: one that makes no sense spoils no list.

use super::allocations_text;
use super::kind::Kind;
use crate::api;
use crate::cluster::dir::fault::Fault;
use crate::cluster::dir::kubernetes as k8s;
use crate::cluster::dir::names::Names;
use crate::cluster::dir::validate::times;
use crate::cluster::readable::{allocations_alone, gateway_of_allocations, readable_parts};
use crate::model::egress_node::EgressNode;
use crate::model::fallback_policy::ReadableParts;
use crate::model::selector::{Labels, Name};
use crate::model::{Endpoints, Gateway, Node, ObjectKey, Pod, Policy, PolicyKey, Service};
use ipnetwork::IpNetwork;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The label that every namespace has from Kubernetes 1.21 on; before, what it says was true all the same.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What an object is called: namespace and name.
pub type Key = (Option<Name>, Name);

/// An object that makes sense.
#[derive(Clone, Debug)]
pub enum Item {
    /// Its labels.
    Namespace(Name, Labels),
    Node(Name, Arc<Node>),
    Pod(ObjectKey, Arc<Pod>),
    Service(ObjectKey, Arc<Service>),
    /// With its allocations.
    Gateway(Name, Arc<Gateway>),
    /// With its status, if that is wanted.
    Policy(PolicyKey, Arc<Policy>, Option<Arc<api::EgressPolicyStatus>>),
    EgressNode(Name, Arc<EgressNode>),
    /// Of the API servers.
    Endpoints(ObjectKey, Arc<Endpoints>),
    /// Networks inside the cluster.
    Inside(Kind, Name, Vec<IpNetwork>),
}

/// An object, or what is wrong with it.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// What it is called.
    pub key: Key,
    /// `metadata.resourceVersion`.
    pub version: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// What it says; `None`: something that Egret does not look at.
    pub item: Result<Option<Item>, Fault>,
    /// The status of a policy that makes no sense, as it was written last.
    pub told: Option<Arc<api::EgressPolicyStatus>>,
    /// What can be read of a policy that makes no sense.
    pub readable: Option<Box<ReadableParts>>,
    /// What can be read of a gateway that makes no sense.
    pub gateway: Option<Box<ReadableGateway>>,
}

/// What can be read of a gateway that makes no sense.
#[derive(Clone, Debug)]
pub struct ReadableGateway {
    /// As in [`Gateway`].
    pub version: Option<Box<str>>,
    /// Its allocations.
    pub status: api::EgressGatewayStatus,
    /// What stands for it where no last good state is known; a node does without one of which nothing can be read.
    pub stands: Option<Gateway>,
}

/// How objects are to be read.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Only pods of this node are wanted, and no statuses that a node does not need.
    pub node: Option<Name>,
}

#[derive(Deserialize)]
struct Head {
    metadata: HeadMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMetadata {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    resource_version: String,
    generation: Option<i64>,
}

/// An object with its parts as the kind has them.
#[derive(Deserialize)]
struct Whole<Spec, Status> {
    #[serde(default)]
    metadata: k8s::Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

/// An EndpointSlice, or an Endpoints object.
#[derive(Deserialize, Serialize)]
pub struct EndpointsObject {
    /// Its metadata.
    #[serde(default)]
    pub metadata: k8s::Metadata,
    /// All else.
    #[serde(flatten)]
    pub parts: k8s::EndpointsParts,
}

/// A part that is not looked at, whatever it is.
type Ignored = serde::de::IgnoredAny;

/// Reads an object.
///
/// # Errors
/// It is no Kubernetes object at all: without a name nobody can be told of it.
pub fn decode(kind: Kind, text: &[u8], reading: &Reading, names: &mut Names) -> Result<Decoded, serde_json::Error> {
    let Head { metadata } = serde_json::from_slice(text)?;
    let key = (metadata.namespace.map(|n| names.get(&n)), Name::from(metadata.name));
    let item = item(kind, &key, &metadata.resource_version, text, reading, names);
    let is_policy = matches!(kind, Kind::EgressPolicy | Kind::ClusterEgressPolicy);
    let (mut told, mut readable) = (None, None);
    if is_policy && item.is_err() {
        told = whole::<Ignored, api::EgressPolicyStatus>(text).ok().and_then(|w| wanted(w.status, reading));
        readable = Some(Box::new(readable_parts(&serde_json::from_slice(text).unwrap_or_default())));
    }
    let faulty = kind == Kind::EgressGateway && item.is_err();
    let gateway = faulty.then(|| readable_gateway(text, &metadata.resource_version, reading, names)).flatten();
    let generation = metadata.generation;
    Ok(Decoded {
        key,
        version: metadata.resource_version,
        generation,
        item,
        told,
        readable,
        gateway: gateway.map(Box::new),
    })
}

fn readable_gateway(text: &[u8], version: &str, reading: &Reading, names: &mut Names) -> Option<ReadableGateway> {
    let Whole { metadata, spec, status } = whole::<Value, api::EgressGatewayStatus>(text).ok()?;
    let mut status = allocations_text::read(status.unwrap_or_default()).ok()?;
    names.gateway_status(&mut status);
    let meta = times(&metadata).unwrap_or_default();
    let of_allocations = gateway_of_allocations(&spec.unwrap_or_default(), meta.clone(), status.clone());
    let alone = || reading.node.is_none().then(|| allocations_alone(meta, status.clone()));
    let mut stands = of_allocations.or_else(alone);
    stands.iter_mut().for_each(|gateway| names.gateway(gateway));
    Some(ReadableGateway { version: reading.node.is_none().then(|| version.into()), status, stands })
}

fn item(
    kind: Kind,
    (namespace, name): &Key,
    version: &str,
    text: &[u8],
    reading: &Reading,
    names: &mut Names,
) -> Result<Option<Item>, Fault> {
    let object = |namespace: &Option<Name>| ObjectKey {
        namespace: namespace.clone().unwrap_or_else(|| Name::from("default")),
        name: name.clone(),
    };
    Ok(Some(match kind {
        Kind::Namespace => {
            let Whole { metadata, .. } = whole::<Ignored, Ignored>(text)?;
            let mut labels = metadata.labels.unwrap_or_default();
            labels.entry(NAMESPACE_NAME_LABEL.to_owned()).or_insert_with(|| name.to_string());
            Item::Namespace(names.get(name), names.labels(&labels))
        }
        Kind::Node => {
            let Whole { metadata, spec, status } = whole(text)?;
            let node = k8s::node(&metadata, &spec.unwrap_or_default(), &status.unwrap_or_default(), names)?;
            Item::Node(names.get(name), Arc::new(node))
        }
        Kind::Pod => {
            let Whole { metadata, spec, status } = whole(text)?;
            let pod = k8s::pod(&metadata, &spec.unwrap_or_default(), &status.unwrap_or_default(), names)?;
            if reading.node.is_some() && pod.node != reading.node {
                return Ok(None);
            }
            Item::Pod(object(namespace), Arc::new(pod))
        }
        Kind::Service => {
            let Whole { spec, .. } = whole::<_, Ignored>(text)?;
            Item::Service(object(namespace), Arc::new(k8s::service(&spec.unwrap_or_default(), names)?))
        }
        Kind::EgressGateway => {
            let Whole { metadata, spec, status } = whole::<_, api::EgressGatewayStatus>(text)?;
            let mut gateway = Gateway::new(&spec.ok_or_else(no_spec)?, times(&metadata)?)?;
            names.gateway(&mut gateway);
            gateway.status = allocations_text::read(status.unwrap_or_default())
                .map_err(|e| Fault { message: e, ..Fault::default() })?;
            names.gateway_status(&mut gateway.status);
            // A node writes no allocations, and need not hear of every version.
            gateway.version = reading.node.is_none().then(|| version.into());
            Item::Gateway(names.get(name), Arc::new(gateway))
        }
        Kind::EgressPolicy => {
            let Whole { metadata, spec, status } = whole(text)?;
            let namespace = namespace.clone().ok_or_else(|| Fault::field("metadata.namespace", "is missing"))?;
            let spec = spec.ok_or_else(no_spec)?;
            let mut policy =
                Policy::namespaced(&namespace, &spec, times(&metadata)?.for_reader(reading.node.as_deref()))?;
            names.policy(&mut policy);
            let key = PolicyKey { namespace: Some(namespace), name: names.get(name) };
            Item::Policy(key, Arc::new(policy), wanted(status, reading))
        }
        Kind::ClusterEgressPolicy => {
            let Whole { metadata, spec, status } = whole(text)?;
            let meta = times(&metadata)?.for_reader(reading.node.as_deref());
            let mut policy = Policy::cluster(&spec.ok_or_else(no_spec)?, meta)?;
            names.policy(&mut policy);
            let key = PolicyKey { namespace: None, name: names.get(name) };
            Item::Policy(key, Arc::new(policy), wanted(status, reading))
        }
        Kind::ServiceCidr | Kind::IpPool => {
            let Whole { spec, .. } = whole::<Networks, Ignored>(text)?;
            Item::Inside(kind, name.clone(), spec.unwrap_or_default().parsed()?)
        }
        Kind::EndpointSlice => {
            let EndpointsObject { metadata, parts } = parsed(text)?;
            let key = object(namespace);
            let endpoints = k8s::endpoints(&metadata, &key, &parts);
            Item::Endpoints(key, Arc::new(endpoints))
        }
        Kind::EgressNode => {
            let Whole { status, .. } = whole::<Ignored, api::EgressNodeStatus>(text)?;
            match status {
                // What is for people is nothing to other nodes.
                Some(status) if reading.node.is_some() => {
                    Item::EgressNode(names.get(name), Arc::new(EgressNode::from(status.for_machines())))
                }
                Some(status) => Item::EgressNode(names.get(name), Arc::new(EgressNode::from(status))),
                None => return Ok(None),
            }
        }
    }))
}

/// The `spec` of a ServiceCIDR, or of Calico's IPPool.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Networks {
    cidrs: Vec<String>,
    cidr: Option<String>,
}

impl Networks {
    fn parsed(&self) -> Result<Vec<IpNetwork>, Fault> {
        let all = self.cidrs.iter().chain(&self.cidr);
        let network =
            |text: &String| network(text).ok_or_else(|| Fault::field("spec", format!("{text:?} is no network")));
        all.map(network).collect()
    }
}

/// A network as Kubernetes writes it; host bits mean nothing.
pub fn network(text: &str) -> Option<IpNetwork> {
    let network: IpNetwork = text.trim().parse().ok().filter(|_| text.contains('/'))?;
    IpNetwork::new(network.network(), network.prefix()).ok()
}

fn whole<Spec: DeserializeOwned, Status: DeserializeOwned>(text: &[u8]) -> Result<Whole<Spec, Status>, Fault> {
    parsed(text)
}

fn parsed<T: DeserializeOwned>(text: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(text).map_err(|e| Fault {
        message: format!("{e}; this version of Egret cannot read it, see docs/kubernetes.md on upgrades"),
        ..Fault::default()
    })
}

fn no_spec() -> Fault {
    Fault::field("spec", "is missing")
}

fn wanted(status: Option<api::EgressPolicyStatus>, reading: &Reading) -> Option<Arc<api::EgressPolicyStatus>> {
    status.filter(|_| reading.node.is_none()).map(Arc::new)
}

/// The newer of two resource versions. They are numbers in every Kubernetes there is; what is none is older.
pub fn is_newer(a: &str, b: &str) -> bool {
    a.parse::<u64>().ok() > b.parse::<u64>().ok()
}

/// Everything that was listed, by what it is called.
pub type Listed = BTreeMap<Key, Decoded>;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(kind: Kind, object: &Value, node: Option<&str>) -> Decoded {
        let reading = Reading { node: node.map(Name::from) };
        decode(kind, object.to_string().as_bytes(), &reading, &mut Names::default()).unwrap()
    }

    #[test]
    fn an_object_that_makes_no_sense_is_told_of_by_name() {
        let policy = json!({"metadata": {"namespace": "shop", "name": "p", "resourceVersion": "7"},
            "spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.1/24"}}]}]}});
        let decoded = read(Kind::EgressPolicy, &policy, None);
        assert_eq!((decoded.key.1.as_ref(), decoded.version.as_str()), ("p", "7"));
        let fault = decoded.item.unwrap_err().to_string();
        assert!(fault.contains("spec.egress[0]") && fault.contains("203.0.113.1/24"), "{fault}");
        for spec in [json!({"podSelector": {}, "gatway": "g"}), json!({"podSelector": 7}), Value::Null] {
            let policy = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
            assert!(read(Kind::EgressPolicy, &policy, None).item.is_err());
        }
        assert!(decode(Kind::Pod, b"{}", &Reading { node: None }, &mut Names::default()).is_err());
    }

    #[test]
    fn a_node_reads_its_own_pods_and_no_statuses_of_policies() {
        let pod = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": {"nodeName": "n1"}});
        assert!(matches!(read(Kind::Pod, &pod, Some("n1")).item, Ok(Some(Item::Pod(..)))));
        assert!(matches!(read(Kind::Pod, &pod, Some("n2")).item, Ok(None)));
        let policy = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": {"podSelector": {}},
            "status": {"pods": 3}});
        assert!(matches!(read(Kind::EgressPolicy, &policy, Some("n1")).item, Ok(Some(Item::Policy(_, _, None)))));
        assert!(matches!(read(Kind::EgressPolicy, &policy, None).item, Ok(Some(Item::Policy(_, _, Some(_))))));
    }

    #[test]
    fn a_namespace_is_known_by_its_name_in_kubernetes_1_20_too() {
        let namespace = json!({"metadata": {"name": "shop"}});
        let Ok(Some(Item::Namespace(_, labels))) = read(Kind::Namespace, &namespace, None).item else { panic!() };
        assert_eq!(labels.get(NAMESPACE_NAME_LABEL).map(|v| &**v), Some("shop"));
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(is_newer("10", "9") && !is_newer("9", "10") && !is_newer("9", "9"));
        assert!(is_newer("1", "") && !is_newer("", "1"));
    }

    const KINDS: [Kind; 11] = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Service,
        Kind::EgressGateway,
        Kind::EgressPolicy,
        Kind::ClusterEgressPolicy,
        Kind::EgressNode,
        Kind::ServiceCidr,
        Kind::IpPool,
        Kind::EndpointSlice,
    ];

    /// An object with something in most fields that are looked at, of any kind.
    fn whole_object() -> Value {
        json!({
            "metadata": {"namespace": "a", "name": "b", "uid": "u", "resourceVersion": "7", "generation": 3,
                "labels": {"a": "b"}, "annotations": {"c": "d"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": "n1", "hostNetwork": false, "podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"],
                "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"a": "b"}, "cidr": "10.1.0.0/16",
                "cidrs": ["10.96.0.0/16"], "podSelector": {"matchLabels": {"a": "b"}}, "services": [], "priority": 5,
                "egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 80}]}],
                "nodeSelector": {}, "addresses": ["192.0.2.1"], "unschedulable": true},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}],
                "addresses": [{"type": "InternalIP", "address": "192.0.2.11"}], "allocations": [{"id": 1}], "nodes": ["n1"],
                "conditions": [{"type": "Ready", "status": "True"}], "pods": 3},
            "endpoints": [{"addresses": ["192.0.2.3"], "conditions": {"ready": true}}], "ports": [{"port": 80}],
            "addressType": "IPv4"
        })
    }

    /// The places of an object, each as a JSON pointer.
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, v)| places(v, &format!("{at}/{key}"), found)),
            Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), found)),
            _ => {}
        }
    }

    fn odd() -> impl Strategy<Value = Value> {
        prop_oneof![
            prop::sample::select(vec![
                Value::Null,
                json!({}),
                json!([]),
                json!([null]),
                json!(""),
                json!(-1),
                json!(1e300),
                json!(u64::MAX),
                json!(true),
                json!("::/0"),
                json!("0.0.0.0/33"),
                json!("999.1.1.1"),
                json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            ]),
            ".{0,6}".prop_map(Value::from),
        ]
    }

    proptest! {
        /// An object of a list costs that object, and no other: what is called by a name is told of by it.
        #[test]
        fn any_object_is_understood_or_told_of(
            changes in prop::collection::vec((any::<prop::sample::Index>(), odd()), 0..4), cut in any::<prop::sample::Index>(),
        ) {
            let mut object = whole_object();
            for (place, value) in changes {
                let mut all = Vec::new();
                places(&object, "", &mut all);
                if let Some(at) = object.pointer_mut(&all[place.index(all.len())]) {
                    *at = value;
                }
            }
            let text = object.to_string();
            let reading = Reading { node: Some("n1".into()) };
            let mut names = Names::default();
            for kind in KINDS {
                if let Ok(decoded) = decode(kind, text.as_bytes(), &reading, &mut names) {
                    prop_assert_eq!(object.pointer("/metadata/name").and_then(Value::as_str), Some(&*decoded.key.1));
                }
                let part = &text.as_bytes()[..cut.index(text.len())];
                prop_assert!(decode(kind, part, &reading, &mut names).is_err(), "half an object is none");
            }
        }
    }

    #[test]
    fn an_object_without_end_is_refused() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
            let text = format!("{{\"metadata\": {{\"name\": \"b\"}}, \"spec\": {deep}}}");
            let read = decode(Kind::EgressPolicy, text.as_bytes(), &Reading { node: None }, &mut Names::default());
            assert!(read.is_err() || read.is_ok_and(|decoded| decoded.item.is_err()));
        }
    }
}
