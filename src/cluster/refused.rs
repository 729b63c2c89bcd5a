//! Refused objects: the fault of an object, and its substitute while it has no last good state.

use super::decode::fault::Fault;
use super::decode::manifest::Reader;
use super::decode::validate::{gateway_status, is_subdomain, key, parse_time, times};
use super::kind::Kind;
use super::object::{Key, Object, label};
use crate::api::{AllocationKind, EgressGatewaySpec, EgressGatewayStatus, EgressRule, Tier};
use crate::model::fallback_policy::ReadableParts;
use crate::model::selector::{Name, Selector};
use crate::model::shared::Shared;
use crate::model::{AddressRange, Gateway, Metadata, PodMatch, Policy, addresses_of, destinations};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;
use std::sync::Arc;

/// A refused object.
#[derive(Clone, Debug)]
pub struct Refused {
    /// What is wrong, with the field, the value and the remedy.
    pub text: String,
    /// `metadata.generation`.
    pub generation: Option<i64>,
    pub readable: Readable,
}

/// What can be read of a refused object.
#[derive(Clone, Debug)]
pub enum Readable {
    /// Nothing, or nothing of which a substitute could be made.
    Nothing,
    /// Parts of a policy.
    Policy(Box<ReadableParts>),
    /// All of a policy: the fault is elsewhere in its file.
    WholePolicy(Arc<Policy>),
    /// Parts of a gateway.
    Gateway(Box<ReadableGateway>),
}

/// What can be read of a gateway.
#[derive(Clone, Debug)]
pub struct ReadableGateway {
    /// As in [`Gateway`].
    pub version: Option<Box<str>>,
    /// The status; `None` if a file of its own has it.
    pub status: Option<Shared<EgressGatewayStatus>>,
    /// The spec without its addresses; `None` if nothing of it can be read and the reader is a node. Such a node does
    /// without the gateway: what the gateway would carry is blocked.
    pub spec: Option<Gateway>,
    /// If pods may ask for it: the namespaces that may.
    pub opt_in: Option<Selector>,
}

impl Refused {
    /// Reads what can be read of an object. `text` is the fault.
    pub fn new(kind: Kind, object: &Value, text: String, reader: &mut Reader<'_>) -> Refused {
        let readable = match kind {
            Kind::EgressPolicy | Kind::ClusterEgressPolicy => Readable::Policy(Box::new(readable_parts(object))),
            Kind::EgressGateway => ReadableGateway::new(object, reader).map_or(Readable::Nothing, Readable::from),
            _ => Readable::Nothing,
        };
        Refused { text, generation: object["metadata"]["generation"].as_i64(), readable }
    }
}

impl From<ReadableGateway> for Readable {
    fn from(gateway: ReadableGateway) -> Self {
        Readable::Gateway(Box::new(gateway))
    }
}

impl ReadableGateway {
    fn new(object: &Value, reader: &mut Reader<'_>) -> Option<Self> {
        let metadata = serde_json::from_value(object["metadata"].clone()).unwrap_or_default();
        let status = match reader.has_statuses() {
            true => {
                let status: Option<EgressGatewayStatus> = serde_json::from_value(object["status"].clone()).ok()?;
                Some(gateway_status(status.unwrap_or_default(), reader.names).ok()?.into())
            }
            false => None,
        };
        let times = times(&metadata).unwrap_or_default();
        let nothing = || reader.node.is_none().then(|| without_spec(times.clone()));
        let mut spec = without_addresses(&object["spec"], times.clone()).or_else(nothing);
        spec.iter_mut().for_each(|gateway| reader.names.gateway(gateway));
        let allowed = || {
            let text: Option<LabelSelector> =
                serde_json::from_value(object["spec"]["namespaceSelector"].clone()).ok()?;
            text.map_or_else(|| Some(Selector::default()), |text| Selector::try_from(&text).ok())
        };
        let opt_in = (object["spec"]["optIn"] == true).then(|| allowed().unwrap_or_default());
        Some(ReadableGateway { version: reader.version_of(&metadata), status, spec, opt_in })
    }

    /// The substitute of a gateway without a last good state: its policies keep their allocations, and no other policy
    /// gets them.
    pub fn frozen(&self, status: &Shared<EgressGatewayStatus>) -> Option<Gateway> {
        let allocated = status.allocations.iter().filter(|allocation| allocation.kind != AllocationKind::Node);
        let addresses = allocated.flat_map(|allocation| addresses_of(&allocation.address));
        let mut pool: Vec<AddressRange> =
            addresses.map(|address| AddressRange { first: address, last: address }).collect();
        pool.sort();
        pool.dedup();
        let gateway = self.spec.clone()?;
        Some(Gateway { pool: pool.into(), reservations: Box::default(), frozen: true, ..gateway })
    }
}

/// A gateway with a readable spec, but without the addresses and the probes. Its default address stays, so that its
/// policies keep it.
fn without_addresses(spec: &Value, meta: Metadata) -> Option<Gateway> {
    let mut spec: EgressGatewaySpec = serde_json::from_value(spec.clone()).ok()?;
    let default_address = spec.default_address.take().unwrap_or_default();
    let spec = EgressGatewaySpec {
        addresses: vec![],
        default_address: None,
        opt_in: spec.opt_in && spec.namespace_selector.is_some(),
        reservations: vec![],
        probes: vec![],
        probe_interval_milliseconds: None,
        probe_misses: None,
        ..spec
    };
    let without_capacity = || EgressGatewaySpec { capacity: vec![], ..spec.clone() };
    let gateway = Gateway::new(&spec, meta.clone()).or_else(|_| Gateway::new(&without_capacity(), meta)).ok()?;
    Some(Gateway { default_address, ..gateway })
}

fn without_spec(meta: Metadata) -> Gateway {
    // An empty spec is always valid.
    Gateway::new(&EgressGatewaySpec::default(), meta).unwrap_or_else(|e| unreachable!("an empty spec: {e}"))
}

/// The readable parts of a policy.
pub fn readable_parts(object: &Value) -> ReadableParts {
    let spec = &object["spec"];
    let selector = |field: &str| {
        let text: LabelSelector = serde_json::from_value(spec.get(field)?.clone()).ok()?;
        Selector::try_from(&text).ok()
    };
    let services: Vec<Name> =
        spec["services"].as_array().into_iter().flatten().filter_map(|s| Some(s.as_str()?.into())).collect();
    let egress = || {
        let rules: Option<Vec<EgressRule>> = serde_json::from_value(spec["egress"].clone()).ok()?;
        rules.as_deref().map(destinations).transpose().ok()
    };
    let priority = || match spec.get("priority") {
        None => Some(0),
        Some(value) => value.as_i64().and_then(|priority| priority.try_into().ok()),
    };
    let tier = || serde_json::from_value::<Option<Tier>>(spec["tier"].clone()).ok().map(Into::into);
    // An object without a spec has no readable parts.
    let is_object = spec.is_object();
    ReadableParts {
        namespaces: selector("namespaceSelector").unwrap_or_default(),
        pods: match services.as_slice() {
            [] => selector("podSelector").map(PodMatch::Labels),
            _ => Some(PodMatch::Services(services.into())),
        },
        tier: if is_object { tier() } else { None },
        priority: if is_object { priority() } else { None },
        created: object["metadata"]["creationTimestamp"].as_str().and_then(parse_time),
        egress: if is_object { egress() } else { None },
    }
}

/// A refused object of a file that is invalid.
pub struct Named {
    pub kind: Kind,
    pub key: Key,
    pub refused: Refused,
    /// The fault is in this object, and not elsewhere in its file.
    pub is_at_fault: bool,
}

/// The policies and gateways of an invalid document, which may be a list. `text` is the fault with its position.
pub fn named_in(document: &Value, reader: &mut Reader<'_>, fault: &Fault, text: &str) -> Vec<Named> {
    let objects = document["items"].as_array().map_or(std::slice::from_ref(document), Vec::as_slice);
    let mut named = Vec::new();
    for object in objects {
        let metadata = |field: &str| object["metadata"][field].as_str();
        let kind = match object["kind"].as_str() {
            Some("EgressGateway") => Kind::EgressGateway,
            Some("EgressPolicy") => Kind::EgressPolicy,
            Some("ClusterEgressPolicy") => Kind::ClusterEgressPolicy,
            _ => continue,
        };
        if let Some(name) = metadata("name").filter(|name| is_subdomain(name)) {
            let key = key(kind, metadata("namespace"), name, reader.names);
            let is_at_fault = objects.len() == 1 || fault.object == label((kind, key.0.as_deref(), &key.1));
            let refused = Refused::new(kind, object, text.to_owned(), reader);
            named.push(Named { kind, key, refused, is_at_fault });
        }
    }
    named
}

/// A valid policy or gateway that does not count, because something else in its file is invalid.
pub fn withheld(object: Object, text: &str) -> Option<Named> {
    let (kind, namespace, name) = object.identity();
    let key = (namespace.map(Into::into), name.into());
    let (generation, readable) = match object {
        Object::Policy(_, policy) => (policy.generation(), Readable::WholePolicy(policy)),
        Object::Gateway(_, gateway) => {
            let spec = Some(Gateway::clone(&gateway));
            let opt_in = gateway.opt_in.then(|| gateway.namespaces.clone());
            (gateway.generation, ReadableGateway { version: None, status: None, spec, opt_in }.into())
        }
        _ => return None,
    };
    let refused = Refused { text: text.to_owned(), generation, readable };
    Some(Named { kind, key, refused, is_at_fault: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;
    use serde_json::json;

    #[test]
    fn each_part_is_read_independently() {
        let policy = |spec: Value| {
            readable_parts(
                &json!({"metadata": {"name": "p", "creationTimestamp": "1970-01-01T00:01:00Z"}, "spec": spec}),
            )
        };
        let whole = policy(json!({"podSelector": {}, "priority": 7, "egress": [], "gatway": "g"}));
        assert_eq!((whole.priority, whole.created), (Some(7), Some(60)));
        assert!(whole.pods.is_some() && whole.egress.is_some_and(|egress| egress.is_some()));
        // An absent field has its default.
        let little = policy(json!({"podSelector": 7}));
        assert_eq!((little.pods, little.priority, little.egress), (None, Some(0), Some(None)));
        for unknown in [
            json!({"priority": "high", "egress": [{"to": 7}]}),
            json!({"priority": 1_i64 << 40, "egress": 7}),
            Value::Null,
        ] {
            let readable = policy(unknown);
            assert_eq!((readable.priority, readable.egress), (None, None));
        }
        for (tier, read) in [
            (json!("Admin"), Some(model::Tier::Admin)),
            (json!(null), Some(model::Tier::ByPriority)),
            (json!("Highest"), None),
        ] {
            assert_eq!(policy(json!({"tier": tier})).tier, read);
        }
    }
}
