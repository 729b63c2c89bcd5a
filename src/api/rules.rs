//! Validation by the API server: bounds, formats and CEL rules, which are added to the generated schemas.
//!
//! The rules use only what the CEL of Kubernetes 1.25 has: a server that does not know a function refuses the whole
//! definition. So `isIP` (1.30) and `cidr` (1.31) are not used here. The condition `Accepted` reports what the rules
//! cannot check. Servers before 1.25 ignore the rules, and still apply bounds and formats.
//!
//! The server estimates the cost of a rule from the possible sizes of lists and texts, so those that rules read have
//! bounds.

mod gateway;

use super::{BANDWIDTH, MAX_DSCP, MAX_EXCEPTIONS, MAX_POLICY_ADDRESSES};
use serde_json::{Value, json};

/// A place in a schema, and the fields to add there.
type Addition = (String, Value);

/// The additions to the schema of a kind. Places are below `spec`.
fn additions(kind: &str) -> Vec<Addition> {
    let mut all = match kind {
        "EgressGateway" => gateway::gateway(),
        "EgressPolicy" | "ClusterEgressPolicy" => policy(),
        _ => Vec::new(),
    };
    if kind == "ClusterEgressPolicy" {
        all.extend(selector("/properties/namespaceSelector"));
        // It has no namespace of its own.
        all.push((SERVICE.to_owned(), json!({"required": ["name", "namespace"]})));
        all.push((format!("{SERVICE}/properties/namespace"), json!({"maxLength": 63, "minLength": 1})));
    }
    all
}

/// The Service whose address a policy has.
const SERVICE: &str = "/properties/address/properties/service";

/// The fields that only other kinds have, though the types are the same. Places are below `spec`.
fn removals(kind: &str) -> Vec<(String, &'static str)> {
    match kind {
        // It uses Services of its own namespace.
        "EgressPolicy" => vec![(format!("{SERVICE}/properties"), "namespace")],
        // What the API server adds to objects by itself, a daemon of an earlier version does not know, and it could not read
        // any gateway.
        "EgressGateway" => {
            ["announce", "fastPath", "optIn"].map(|field| (format!("/properties/{field}"), "default")).into()
        }
        _ => Vec::new(),
    }
}

fn bandwidth() -> Value {
    let rule = format!("self.matches('{BANDWIDTH}')");
    let message = "not a bandwidth; write 64Kbit to 999999Kbit, 1Mbit to 100000Mbit or 1Gbit to 100Gbit";
    with_rules(json!({"maxLength": 10, "minLength": 1}), &[(&rule, message)])
}

fn policy() -> Vec<Addition> {
    let pods = "(has(self.podSelector) ? 1 : 0) + (has(self.services) && size(self.services) > 0 ? 1 : 0) == 1";
    let pods_message = "give either podSelector ({} for every pod of the namespace) or services";
    let one_of = "(has(self.address) ? 1 : 0) + (has(self.allocate) ? 1 : 0) + \
                  (has(self.addresses) && size(self.addresses) > 0 ? 1 : 0) <= 1";
    let one_of_message = "has more than one of address, addresses and allocate; keep the one that is meant";
    let count = "!has(self.addressCount) || !(has(self.address) || has(self.addresses)) && \
                 (!has(self.allocate) || self.allocate == 'Dedicated')";
    let count_message = "addressCount needs allocate: Dedicated";
    let direct = "!has(self.action) || self.action != 'Direct' || !(has(self.gateway) || has(self.address) || \
                  has(self.allocate) || has(self.addresses) || has(self.addressCount) || has(self.spread) || \
                  has(self.preference) || has(self.dscp) || has(self.bandwidth) || \
                  has(self.fallback) && self.fallback != 'Block')";
    let direct_message = "with action: Direct leave out gateway, fallback and all fields about egress IPs";
    let preference = "!has(self.preference) || !has(self.spread) || self.spread != 'Ordinal'";
    let preference_message = "preference has no meaning with spread: Ordinal; leave one of them out";
    let rule = "/properties/egress/items";
    let block = format!("{rule}/properties/to/items/properties/ipBlock");
    let port = format!("{rule}/properties/ports/items");
    let families =
        "!has(self.except) || self.except.size() == 0 || self.except[0].contains(':') == self.cidr.contains(':')";
    let mut all = vec![
        (
            String::new(),
            with_rules(
                json!({}),
                &[
                    (pods, pods_message),
                    (one_of, one_of_message),
                    (count, count_message),
                    (preference, preference_message),
                    (direct, direct_message),
                ],
            ),
        ),
        ("/properties/gateway".to_owned(), json!({"maxLength": 253, "minLength": 1})),
        ("/properties/services".to_owned(), json!({"maxItems": 100})),
        ("/properties/services/items".to_owned(), json!({"maxLength": 253, "minLength": 1})),
        ("/properties/address".to_owned(), policy_address()),
        (format!("{SERVICE}/properties/name"), json!({"maxLength": 253, "minLength": 1})),
        ("/properties/addressCount".to_owned(), json!({"minimum": 1, "maximum": MAX_POLICY_ADDRESSES})),
        ("/properties/preference".to_owned(), json!({"maxItems": 2, "x-kubernetes-list-type": "set"})),
        ("/properties/dscp".to_owned(), json!({"maximum": MAX_DSCP})),
        ("/properties/bandwidth".to_owned(), {
            let either = "has(self.egress) || has(self.ingress)";
            with_rules(json!({}), &[(either, "give egress, ingress or both, or leave bandwidth out")])
        }),
        ("/properties/bandwidth/properties/egress".to_owned(), bandwidth()),
        ("/properties/bandwidth/properties/ingress".to_owned(), bandwidth()),
        ("/properties/egress".to_owned(), json!({"maxItems": 100})),
        (format!("{rule}/properties/to"), json!({"maxItems": 100})),
        (format!("{rule}/properties/ports"), json!({"maxItems": 100})),
        (block.clone(), {
            let message = "except must have the address family of cidr";
            with_rules(json!({"anyOf": [of_family("^[^:]*$"), of_family(":")]}), &[(families, message)])
        }),
        (format!("{block}/properties/cidr"), json!({"format": "cidr", "maxLength": 64})),
        (format!("{block}/properties/except"), json!({"maxItems": MAX_EXCEPTIONS})),
        (format!("{block}/properties/except/items"), json!({"format": "cidr", "maxLength": 64})),
        (
            port.clone(),
            with_rules(
                json!({}),
                &[
                    ("!has(self.endPort) || has(self.port)", "endPort without port; name the first port as port"),
                    (
                        "!has(self.endPort) || !has(self.port) || self.port <= self.endPort",
                        "endPort is below port; write the lower one as port",
                    ),
                ],
            ),
        ),
        (format!("{port}/properties/port"), json!({"minimum": 1})),
        (format!("{port}/properties/endPort"), json!({"minimum": 1})),
    ];
    all.extend(several_addresses());
    all.extend(selector("/properties/podSelector"));
    all
}

/// The list of a policy's egress IPs.
fn several_addresses() -> Vec<Addition> {
    let families = "self.all(a, has(a.ipv4) == has(self[0].ipv4) && has(a.ipv6) == has(self[0].ipv6))";
    let families_message = "all of addresses need the same families: ipv4, ipv6 or both";
    let once = |family: &str| {
        format!("self.all(a, !has(a.{family}) || self.exists_one(b, has(b.{family}) && a.{family} == b.{family}))")
    };
    let once_message = "addresses has an address twice; name each once";
    let at = "/properties/addresses";
    // The longest texts that the formats allow bound the cost of the rules.
    let length = |family: &str, most: usize| (format!("{at}/items/properties/{family}"), json!({"maxLength": most}));
    vec![
        (at.to_owned(), {
            let (ipv4, ipv6) = (once("ipv4"), once("ipv6"));
            let rules = [(families, families_message), (&*ipv4, once_message), (&*ipv6, once_message)];
            with_rules(json!({"maxItems": MAX_POLICY_ADDRESSES}), &rules)
        }),
        (format!("{at}/items"), address_pair("give ipv4, ipv6 or both in each of addresses")),
        length("ipv4", 15),
        length("ipv6", 45),
    ]
}

/// A CEL rule that reads all of `except` costs too much where lists hold ten thousand exceptions. Patterns cost
/// nothing. The rule reads only the first exception, to give a clear message.
fn of_family(pattern: &str) -> Value {
    json!({"properties": {"cidr": {"pattern": pattern}, "except": {"items": {"pattern": pattern}}}})
}

/// The key of a label: a name, optionally after a DNS name and a slash (`ValidateLabelName`, pkg/api/validate/content
/// of apimachinery).
const LABEL_KEY: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
/// 253 of the DNS name, the slash, 63 of the name.
const LABEL_KEY_LENGTH: usize = 317;
/// A label's value; it may be empty.
const LABEL_VALUE: &str = "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$";

fn address_pair(message: &str) -> Value {
    with_rules(json!({}), &[("has(self.ipv4) || has(self.ipv6)", message)])
}

fn policy_address() -> Value {
    let some = "has(self.ipv4) || has(self.ipv6) || has(self.service)";
    let one = "!has(self.service) || !has(self.ipv4) && !has(self.ipv6)";
    with_rules(
        json!({}),
        &[
            (some, "give ipv4, ipv6 or both, or service, or leave address out"),
            (one, "service has addresses of its own; leave out ipv4 and ipv6, or service"),
        ],
    )
}

/// The requirements of Kubernetes for label selectors, which its schema does not express. A schema cannot check the
/// keys of `matchLabels`, and a CEL rule costs too much because a key has no maximum length. The condition `Accepted`
/// reports them.
fn selector(at: &str) -> Vec<Addition> {
    let labels = format!("{at}/properties/matchLabels");
    let requirement = format!("{at}/properties/matchExpressions/items");
    let values = "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)";
    let message = "In and NotIn need values, Exists and DoesNotExist have none";
    let key = json!({"minLength": 1, "maxLength": LABEL_KEY_LENGTH, "pattern": LABEL_KEY});
    let value = json!({"maxLength": 63, "pattern": LABEL_VALUE});
    vec![
        (labels.clone(), json!({"maxProperties": 100})),
        (format!("{labels}/additionalProperties"), value.clone()),
        (format!("{at}/properties/matchExpressions"), json!({"maxItems": 50})),
        (requirement.clone(), with_rules(json!({}), &[(values, message)])),
        (format!("{requirement}/properties/key"), key),
        (format!("{requirement}/properties/operator"), json!({"enum": ["In", "NotIn", "Exists", "DoesNotExist"]})),
        (format!("{requirement}/properties/values"), json!({"maxItems": 100})),
        (format!("{requirement}/properties/values/items"), value),
    ]
}

fn with_rules(mut fields: Value, rules: &[(&str, &str)]) -> Value {
    fields["x-kubernetes-validations"] =
        rules.iter().map(|(rule, message)| json!({"rule": rule, "message": message})).collect();
    fields
}

/// Adds everything to a CustomResourceDefinition.
///
/// # Errors
/// The schema has no such place: a field was renamed without its rule.
pub(super) fn add(crd: &mut Value) -> Result<(), String> {
    let kind = crd["spec"]["names"]["kind"].as_str().unwrap_or_default().to_owned();
    let versions = crd["spec"]["versions"].as_array_mut().into_iter().flatten();
    for version in versions {
        let spec = &mut version["schema"]["openAPIV3Schema"]["properties"]["spec"];
        for (place, fields) in additions(&kind) {
            let schema = spec.pointer_mut(&place).and_then(Value::as_object_mut);
            let schema = schema.ok_or_else(|| format!("the schema of {kind} has no spec{place}"))?;
            schema.extend(fields.as_object().cloned().unwrap_or_default());
        }
        for (place, field) in removals(&kind) {
            let fields = spec.pointer_mut(&place).and_then(Value::as_object_mut);
            let removed = fields.and_then(|fields| fields.remove(field));
            removed.ok_or_else(|| format!("the schema of {kind} has no spec{place}/{field}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{cost, crds};
    use super::*;
    use kube::core::cel::{Validator, compile_schema};

    /// The messages with which the API server would refuse a `spec`, by the CEL rules.
    fn refusal_messages(kind: &str, spec: &Value) -> Vec<String> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&crds::yaml().unwrap()).unwrap();
        let crd = documents.iter().find(|d| d["spec"]["names"]["kind"] == kind).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        match Validator::new().validate(schema, &json!({ "spec": spec }), None) {
            Ok(()) => Vec::new(),
            Err(errors) => errors.as_slice().iter().map(|e| e.message.clone()).collect(),
        }
    }

    /// The fields below a schema that the API server sets if they are absent, as paths.
    fn defaults(schema: &Value, path: &str) -> Vec<String> {
        let fields = schema["properties"].as_object().into_iter().flatten();
        let of = |(name, field): (&String, &Value)| {
            let path = format!("{path}.{name}");
            let mut all = [defaults(field, &path), defaults(&field["items"], &format!("{path}[]"))].concat();
            all.extend(field.get("default").map(|_| path));
            all
        };
        fields.flat_map(of).collect()
    }

    /// The definitions are installed first. A daemon of an earlier version reads no object with a field that it does not
    /// know, so the API server must not add one by itself.
    #[test]
    fn the_api_server_adds_no_field_that_an_earlier_version_does_not_know() {
        let documents: Vec<Value> = serde_saphyr::from_multiple(&crds::yaml().unwrap()).unwrap();
        let of_policies = ["egress[].ports[].protocol", "existingConnections", "fallback", "priority"];
        for (kind, known) in [
            ("EgressGateway", &["answerPing", "default", "ignoreCordon", "placement", "sharing"][..]),
            ("EgressPolicy", &of_policies),
            ("ClusterEgressPolicy", &of_policies),
        ] {
            let crd = documents.iter().find(|d| d["spec"]["names"]["kind"] == kind).unwrap();
            let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
            let mut found = defaults(schema, "spec");
            found.sort();
            let known: Vec<String> = known.iter().map(|field| format!("spec.{field}")).collect();
            assert_eq!(found, known, "{kind}: take the default of a new field out of the schema (`removals`)");
        }
    }

    #[track_caller]
    pub(super) fn assert_good(kind: &str, spec: &Value) {
        let messages = refusal_messages(kind, spec);
        assert!(messages.is_empty(), "{spec}: {messages:?}");
    }

    #[track_caller]
    pub(super) fn assert_refused(kind: &str, spec: &Value, words: &str) {
        let messages = refusal_messages(kind, spec);
        assert!(messages.iter().any(|m| m.contains(words)), "{spec}: {words:?} is not in {messages:?}");
    }

    #[test]
    fn a_policy_selects_pods_in_one_way() {
        for kind in ["EgressPolicy", "ClusterEgressPolicy"] {
            assert_good(kind, &json!({"podSelector": {}}));
            assert_good(kind, &json!({"services": ["frontend"], "address": {"ipv4": "192.0.2.50"}}));
            assert_refused(kind, &json!({}), "podSelector");
            assert_refused(kind, &json!({"services": []}), "podSelector");
            assert_refused(kind, &json!({"podSelector": {}, "services": ["frontend"]}), "podSelector");
            let both = json!({"podSelector": {}, "address": {"ipv4": "192.0.2.50"}, "allocate": "Shared"});
            assert_refused(kind, &both, "allocate");
            assert_refused(kind, &json!({"podSelector": {}, "address": {}}), "ipv4");
        }
    }

    #[test]
    fn a_policy_names_addresses_or_a_service() {
        let named = |address: Value| json!({"podSelector": {}, "address": address});
        assert_good("EgressPolicy", &named(json!({"service": {"name": "web"}})));
        assert_good("ClusterEgressPolicy", &named(json!({"service": {"name": "web", "namespace": "shop"}})));
        let both = named(json!({"service": {"name": "web"}, "ipv4": "192.0.2.50"}));
        assert_refused("EgressPolicy", &both, "leave out ipv4 and ipv6");
    }

    #[test]
    fn several_egress_ips_are_validated() {
        let several = |addresses: Value| json!({"podSelector": {}, "addresses": addresses, "spread": "Ordinal"});
        let pair = |last: u8| json!({"ipv4": format!("192.0.2.{last}"), "ipv6": format!("2001:db8::{last}")});
        for kind in ["EgressPolicy", "ClusterEgressPolicy"] {
            assert_good(kind, &several(json!([pair(1), pair(2)])));
            assert_good(kind, &several(json!([{"ipv4": "192.0.2.1"}])));
            assert_good(kind, &json!({"podSelector": {}, "allocate": "Dedicated", "addressCount": 4}));
            assert_good(kind, &json!({"podSelector": {}, "addressCount": 4}));
            assert_refused(kind, &several(json!([pair(1), {"ipv4": "192.0.2.2"}])), "same families");
            assert_refused(kind, &several(json!([pair(1), pair(2), pair(1)])), "twice");
            assert_refused(kind, &several(json!([{}])), "ipv4, ipv6 or both in each");
            let mut both = several(json!([pair(1)]));
            both["allocate"] = "Dedicated".into();
            assert_refused(kind, &both, "addresses and allocate");
            for other in [json!({"allocate": "Shared"}), json!({"address": pair(1)}), json!({"addresses": [pair(1)]})] {
                let mut counted = json!({"podSelector": {}, "addressCount": 2});
                counted.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
                assert_refused(kind, &counted, "addressCount needs");
            }
            let near =
                |spread: &str| json!({"podSelector": {}, "spread": spread, "preference": ["SameNode", "SameZone"]});
            assert_good(kind, &near("Connection"));
            assert_refused(kind, &near("Ordinal"), "preference has no meaning");
            let direct = json!({"podSelector": {}, "action": "Direct", "spread": "Pod"});
            assert_refused(kind, &direct, "action: Direct");
        }
    }

    #[test]
    fn destinations_make_sense() {
        let to = |block: Value| json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": block}]}]});
        assert_good("EgressPolicy", &to(json!({"cidr": "203.0.113.0/24", "except": ["203.0.113.7/32"]})));
        assert_refused("EgressPolicy", &to(json!({"cidr": "203.0.113.0/24", "except": ["2001:db8::/64"]})), "family");
        let port = |port: Value| json!({"podSelector": {}, "egress": [{"ports": [port]}]});
        assert_good("EgressPolicy", &port(json!({"protocol": "UDP", "port": 5060, "endPort": 5070})));
        assert_good("EgressPolicy", &port(json!({"protocol": "SCTP"})));
        assert_refused("EgressPolicy", &port(json!({"port": 5070, "endPort": 5060})), "below");
        assert_refused("EgressPolicy", &port(json!({"endPort": 5060})), "without port");
    }

    #[test]
    fn selectors_are_whole() {
        let of = |requirement: Value| json!({"podSelector": {"matchExpressions": [requirement]}});
        assert_good("EgressPolicy", &of(json!({"key": "a", "operator": "In", "values": ["b"]})));
        assert_good("EgressPolicy", &of(json!({"key": "a", "operator": "Exists"})));
        assert_refused("EgressPolicy", &of(json!({"key": "a", "operator": "In"})), "need values");
        assert_refused("EgressPolicy", &of(json!({"key": "a", "operator": "Exists", "values": ["b"]})), "need values");
    }

    #[test]
    fn every_rule_compiles_on_the_oldest_server_that_knows_rules() {
        let crds: Vec<Value> = serde_saphyr::from_multiple(&crds::yaml().unwrap()).unwrap();
        let found: Vec<_> = crds.iter().flat_map(cost::rules).collect();
        assert!(found.len() > 15, "{}", found.len());
        for rule in found {
            let compiled = compile_schema(rule.schema);
            assert!(!compiled.has_errors(), "{}: {:?}", rule.text, compiled.compilation_errors());
            for newer in ["isIP", "isCIDR", "ip(", "cidr(", "format(", "optional"] {
                assert!(!rule.text.contains(newer), "{}: Kubernetes 1.25 does not know {newer}", rule.text);
            }
        }
    }
}
