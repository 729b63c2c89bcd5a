//! Every field of every object is stored as it was written. The API server silently drops fields that a definition
//! does not have, unless a client asks for a warning. Needs root.

use lab::Lab;
use lab::api::path_of;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const EXPRESSIONS: [(&str, bool); 4] = [("In", true), ("NotIn", true), ("Exists", false), ("DoesNotExist", false)];

fn selector() -> Value {
    let expressions = EXPRESSIONS.map(|(operator, values)| {
        let mut expression = json!({"key": "tier", "operator": operator});
        if values {
            expression["values"] = json!(["web", "db"]);
        }
        expression
    });
    json!({"matchLabels": {"app": "visitor"}, "matchExpressions": expressions})
}

fn conditions() -> Value {
    json!([{"type": "Ready", "status": "True", "reason": "AddressHeld", "message": "all is well",
            "lastTransitionTime": "2026-01-31T12:00:00Z", "observedGeneration": 3}])
}

fn object(kind: &str, name: &str, spec: Value, status: Value) -> Value {
    let mut object = json!({"apiVersion": "egret.dev/v1alpha1", "kind": kind, "metadata": {"name": name},
                            "spec": spec, "status": status});
    if kind == "EgressPolicy" {
        object["metadata"]["namespace"] = "shop".into();
    }
    object
}

fn policy_status() -> Value {
    json!({"gateway": "g", "addresses": {"ipv4": "192.0.2.50", "ipv6": "2001:db8::50"}, "node": "g1",
                        "addressCount": 1, "egressIPs": [{"ipv4": "192.0.2.50", "ipv6": "2001:db8::50", "ordinal": 0,
                                                           "node": "g1", "ready": "True"}],
                        "pods": 3, "podsByNode": [{"node": "n1", "pods": 3}], "conditions": conditions()})
}

fn gateways() -> Vec<Value> {
    let spec = |placement: &str, sharing: &str| {
        json!({
            "nodeSelector": selector(), "addresses": ["192.0.2.50-192.0.2.59", "2001:db8::50"], "placement": placement,
            "defaultAddress": {"ipv4": "192.0.2.58", "ipv6": "2001:db8::50"},
            "announce": "ARP", "interface": "eth1", "nextHop": {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}, "answerPing": true, "fastPath": "Off",
            "ignoreCordon": true, "default": true,
            "optIn": true, "capacity": [{"nodeSelector": selector(), "weight": 3, "maxEgressIPs": 7}], "namespaceSelector": selector(), "sharing": sharing,
            "reservations": [{"addresses": ["192.0.2.59"], "namespaceSelector": selector()}],
            "namespaceQuota": {"policies": 3, "addresses": 2, "destinations": 100},
            "probes": [{"icmp": "192.0.2.1"}, {"tcp": "[2001:db8::1]:443"}], "probeIntervalMilliseconds": 500, "probeMisses": 4,
        })
    };
    let allocation = |id: u16, kind: &str| {
        json!({"id": id, "kind": kind, "ordinal": 2, "ipv4": format!("192.0.2.{id}"), "ipv6": format!("2001:db8::{id}"), "node": "g1",
               "since": 1_700_000_000, "leaving": "g2", "service": "shop/web", "policies": ["shop/a", "everywhere"]})
    };
    let kinds = ["Explicit", "Dedicated", "Shared", "Pooled", "Node", "Service"];
    let allocations: Vec<Value> = kinds.into_iter().zip(50..).map(|(kind, id)| allocation(id, kind)).collect();
    let released = json!([{"id": 7, "ipv4": "192.0.2.57", "ipv6": "2001:db8::57", "policies": ["shop/b"], "at": 1_700_000_000,
                "service": "shop/web"}]);
    let writer = json!({"name": "controller", "term": 2, "writes": 7});
    let family = json!({"total": 10, "used": 3, "coolingDown": 1});
    let listed = json!({"nodes": ["g1"], "nodeCount": 1, "readyNodes": 0, "notReadyNodes": ["g1"],
                        "usage": {"ipv4": family, "ipv6": family}, "allocations": allocations, "released": released, "conditions": conditions(), "writer": writer,
                        "reportsRequestedAt": 1_700_000_000, "optIn": policy_status()});
    let mut routed = spec("Managed", "Namespace");
    (routed["announce"], routed["answerPing"]) = ("Route".into(), false.into());
    routed["fastPath"] = "Auto".into();
    routed.as_object_mut().expect("a spec").remove("interface");
    routed["interfaces"] = json!(["eth1", "ens192"]);
    routed["vlan"] = json!(100);
    // The form of many allocations.
    let text = json!({"nodes": ["g1"], "nodeCount": 1, "readyNodes": 1, "allocations": [], "conditions": conditions(), "writer": writer,
                      "text": "node g1\n1 Dedicated 192.0.2.50 - 0 1700000000 - shop/a\n"});
    vec![
        object("EgressGateway", "listed", spec("Managed", "Namespace"), listed),
        object("EgressGateway", "as-text", spec("External", "Cluster"), text.clone()),
        object("EgressGateway", "routed", routed, text),
    ]
}

fn policies(kind: &str, more: &Value) -> Vec<Value> {
    let port = |protocol: &str| json!({"protocol": protocol, "port": 443, "endPort": 445});
    let egress = json!([{"to": [{"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}],
                         "ports": [port("TCP"), port("UDP"), port("SCTP")]}]);
    let status = policy_status();
    let spec = |fallback: &str, pods: Value, address: Value| {
        let existing = if fallback == "Block" { "Keep" } else { "End" };
        let mut spec = json!({"gateway": "g", "dscp": 46, "bandwidth": {"egress": "100Mbit", "ingress": "64Kbit"}, "egress": egress, "fallback": fallback, "priority": -7,
                              "existingConnections": existing});
        for part in [pods, address, more.clone()] {
            let part = part.as_object().cloned().unwrap_or_default();
            spec.as_object_mut().expect("an object").extend(part);
        }
        spec
    };
    let by_labels = || json!({"podSelector": selector()});
    let named = json!({"address": {"ipv4": "192.0.2.50", "ipv6": "2001:db8::50"}});
    let mut specs = vec![spec("Block", by_labels(), named)];
    for allocate in ["Dedicated", "Shared", "Pooled", "Node"] {
        specs.push(spec("NodeAddress", by_labels(), json!({"allocate": allocate})));
    }
    let several = json!({"addresses": [{"ipv4": "192.0.2.50", "ipv6": "2001:db8::50"}], "spread": "Pod"});
    specs.push(spec("Block", by_labels(), several));
    specs.push(spec("Block", by_labels(), json!({"addressCount": 4, "spread": "Ordinal"})));
    let near = json!({"addressCount": 4, "spread": "Connection", "preference": ["SameNode", "SameZone"]});
    specs.push(spec("Block", by_labels(), near));
    specs.push(spec("Block", json!({"services": ["frontend"]}), json!({"action": "EgressIP"})));
    let mut service = json!({"name": "web"});
    if kind == "ClusterEgressPolicy" {
        service["namespace"] = "shop".into();
    }
    specs.push(spec("Block", by_labels(), json!({"address": {"service": service}})));
    let mut direct = spec("Block", by_labels(), json!({"action": "Direct"}));
    for field in ["gateway", "dscp", "bandwidth"] {
        direct.as_object_mut().expect("an object").remove(field);
    }
    specs.push(direct);
    let object = |(number, spec)| object(kind, &format!("p{number}"), spec, status.clone());
    specs.into_iter().enumerate().map(object).collect()
}

fn nodes() -> Vec<Value> {
    let few_ports = ["TCP", "UDP", "SCTP"].map(|protocol| {
        json!({"id": 1, "address": "192.0.2.50", "destination": "2001:db8::7", "port": 443, "protocol": protocol,
               "ports": "1024-65535"})
    });
    let status = json!({
        "version": "0.1.0", "inSyncSince": "2026-01-31T12:00:00Z", "tunnelAddress": "192.0.2.1", "tunnelMac": "02:00:00:00:00:01",
        "tunnelMtu": 1450, "answers": true, "allocations": [1, 2], "withoutAddress": [2],
        "taken": [{"id": 1, "since": 1_700_000_000}], "refused": [{"id": 2, "message": "another host has it"}],
        "blocked": [{"id": 3, "message": "no node has it", "family": "IPv6"}], "unreachablePeers": ["g2"],
        "unreachableGatewayNodes": ["g3"],
        "flowLogSince": 1_700_000_000, "reportsGiven": [{"gateway": "g", "requestedAt": 1_700_000_000}], "overLimit": ["shop/p"],
        "direct": [{"network": "10.0.0.0/8", "from": "spec.podCIDRs of Nodes"}],
        "faults": [{"of": "peer g2", "message": "no route"}], "conditions": conditions(),
        "portsNearlyExhausted": few_ports,
        "lost": [{"interface": "eth0", "family": "IPv6", "gateway": "listed", "message": "no route"}],
        "failingProbes": [{"gateway": "listed", "family": "IPv4", "message": "no answer"}],
    });
    vec![object("EgressNode", "n1", json!({}), status)]
}

/// The fields of a schema, `spec.egress[].to[]`, and the values of fields with few values.
fn of_schema(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    if let Some(properties) = schema["properties"].as_object() {
        properties.iter().for_each(|(name, field)| of_schema(field, &format!("{path}.{name}"), found));
    } else if schema["items"].is_object() {
        of_schema(&schema["items"], &format!("{path}[]"), found);
    } else if let Some(values) = schema["enum"].as_array() {
        found.extend(values.iter().filter_map(Value::as_str).map(|value| format!("{path}={value}")));
    } else {
        found.insert(path.to_owned());
    }
}

/// The fields of an object, with the same names as in the schema.
fn of_object(value: &Value, schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    if schema["properties"].is_object() {
        let fields = value.as_object().into_iter().flatten();
        fields
            .for_each(|(name, field)| of_object(field, &schema["properties"][name], &format!("{path}.{name}"), found));
    } else if schema["items"].is_object() {
        let items = value.as_array().into_iter().flatten();
        items.for_each(|item| of_object(item, &schema["items"], &format!("{path}[]"), found));
    } else if schema["enum"].is_array() {
        found.insert(format!("{path}={}", value.as_str().unwrap_or_default()));
    } else {
        found.insert(path.to_owned());
    }
}

#[test]
fn every_field_of_every_object_is_stored() {
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    lab.add_namespace("shop", &[]);
    let list = lab.api().get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
    for definition in list["items"].as_array().expect("definitions") {
        let kind = definition["spec"]["names"]["kind"].as_str().expect("a kind");
        let objects = match kind {
            "EgressGateway" => gateways(),
            "EgressPolicy" => policies(kind, &json!({})),
            "ClusterEgressPolicy" => ["Admin", "Baseline"]
                .iter()
                .flat_map(|tier| policies(kind, &json!({"tier": tier, "namespaceSelector": selector()})))
                .collect(),
            "EgressNode" => nodes(),
            other => panic!("what is a {other}?"),
        };
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let (mut all, mut written) = (BTreeSet::new(), BTreeSet::new());
        for part in ["spec", "status"] {
            of_schema(&schema["properties"][part], part, &mut all);
            for object in &objects {
                of_object(&object[part], &schema["properties"][part], part, &mut written);
            }
        }
        assert_eq!(written, all, "fields of {kind}: those of this test, and those of the definition");
        for object in &objects {
            let path = path_of(object);
            lab.api().apply(object);
            let status = json!({"status": object["status"]});
            let patch = Some(("application/merge-patch+json", &status));
            lab.api().ask("PATCH", &format!("{path}/status"), patch);
            let stored = lab.api().get(&path);
            for part in ["spec", "status"] {
                assert_eq!(stored[part], object[part], "{part} of {path}");
            }
        }
    }
}
