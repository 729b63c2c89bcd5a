//! Reads the valid parts of a policy or gateway that is invalid as a whole.

use crate::api::{AllocationKind, EgressGatewaySpec, EgressGatewayStatus, EgressRule, PolicyKey, Tier};
use crate::cluster::dir::validate::parse_time;
use crate::model::addresses_of;
use crate::model::fallback_policy::ReadableParts;
use crate::model::selector::{Name, Selector};
use crate::model::{AddressRange, Gateway, Metadata, PodMatch, destinations};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

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

/// Stands for an invalid gateway without a last good state: its allocations, and its spec without the addresses.
/// `None` if the rest of the spec is invalid too.
pub fn gateway_of_allocations(spec: &Value, meta: Metadata, status: EgressGatewayStatus) -> Option<Gateway> {
    let spec: EgressGatewaySpec = serde_json::from_value(spec.clone()).ok()?;
    let spec = EgressGatewaySpec { addresses: vec![], reservations: vec![], ..spec };
    Some(frozen(Gateway::new(&spec, meta).ok()?, status))
}

/// Stands for a gateway whose spec cannot be read at all: its policies keep their allocations, and no other policy
/// gets them.
pub fn allocations_alone(meta: Metadata, status: EgressGatewayStatus) -> Gateway {
    let empty = EgressGatewaySpec::default();
    // An empty spec is always valid.
    let gateway = Gateway::new(&empty, meta).unwrap_or_else(|e| unreachable!("an empty spec: {e}"));
    frozen(gateway, status)
}

fn frozen(gateway: Gateway, status: EgressGatewayStatus) -> Gateway {
    let mut pool: Vec<AddressRange> = status
        .allocations
        .iter()
        .filter(|allocation| allocation.kind != AllocationKind::Node)
        .flat_map(|allocation| addresses_of(&allocation.address))
        .map(|address| AddressRange { first: address, last: address })
        .collect();
    pool.sort();
    pool.dedup();
    Gateway { pool: pool.into(), frozen: true, status, ..gateway }
}

/// The policies of a document, which may be a list.
pub fn policies_of(document: &Value) -> Vec<(PolicyKey, ReadableParts)> {
    let objects = document["items"].as_array().map_or(std::slice::from_ref(document), Vec::as_slice);
    let policy = |object: &Value| {
        let text = |field: &str| object["metadata"][field].as_str();
        let namespace = match object["kind"].as_str()? {
            "EgressPolicy" => Some(text("namespace").unwrap_or("default").into()),
            "ClusterEgressPolicy" => None,
            _ => return None,
        };
        Some((PolicyKey { namespace, name: text("name")?.into() }, readable_parts(object)))
    };
    objects.iter().filter_map(policy).collect()
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
