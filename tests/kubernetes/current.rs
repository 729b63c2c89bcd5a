//! Users' work with a recent server: the manifests by kubectl, validation rules, descriptions of every field, several
//! writers of one object. Needs root.

use super::PATIENCE;
use lab::Lab;
use lab::api::{Role, has_server};
use serde_json::{Value, json};
use std::process::Output;

fn kubectl(lab: &Lab, arguments: &[&str]) -> Output {
    let program = lab::api::programs().join("kubectl").display().to_string();
    let kubeconfig = format!("--kubeconfig={}", lab.api().kubeconfig(Role::Admin).display());
    let cache = format!("--cache-dir={}", lab.api().kubeconfig(Role::Admin).with_file_name("kubectl").display());
    lab.host("api").try_run([&[&*program, &*kubeconfig, &*cache], arguments].concat())
}

/// The output of a command that must succeed without a warning.
#[track_caller]
fn quietly(lab: &Lab, arguments: &[&str]) -> String {
    let output = kubectl(lab, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "kubectl {arguments:?}: {}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn install(file: &str) -> String {
    format!("{}/install/{file}", env!("CARGO_MANIFEST_DIR"))
}

fn definitions(lab: &Lab) -> Vec<Value> {
    let list = lab.api().get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
    list["items"].as_array().cloned().unwrap_or_default()
}

fn schema(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
}

#[test]
fn the_manifests_are_applied_without_a_warning() {
    if !has_server((1, 25), true, "current::the_manifests_are_applied_without_a_warning") {
        return;
    }
    let lab = Lab::builder().kubernetes().bare().nodes(vec![]).build();
    let file = install("egret.yaml");
    let said = quietly(&lab, &["apply", "-f", &file]);
    assert!(said.lines().count() > 10 && said.lines().all(|line| line.ends_with(" created")), "{said}");
    let said = quietly(&lab, &["apply", "-f", &file]);
    assert!(!said.contains("created"), "{said}");
    quietly(&lab, &["wait", "--for=condition=Established", "--timeout=60s", "-f", &install("crds.yaml")]);
    // As GitOps tools do it.
    quietly(&lab, &["apply", "--server-side", "--force-conflicts", "--field-manager=gitops", "-k", &install("")]);
}

#[test]
fn every_field_is_explained() {
    if !has_server((1, 25), true, "current::every_field_is_explained") {
        return;
    }
    fn fields(schema: &Value, path: &str, found: &mut Vec<String>) {
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            let text = inner["description"].as_str().unwrap_or_default();
            assert!(!text.is_empty() || path.ends_with(".metadata"), "{path} has no description");
            fields(inner, &path, found);
            found.push(path);
        }
        for inner in ["items", "additionalProperties"].iter().filter_map(|name| schema.get(name)) {
            fields(inner, path, found);
        }
    }
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    // A server announces a new kind a moment after it serves it, and kubectl caches the list of kinds.
    lab.wait_until("kubectl finds every kind", PATIENCE, || {
        let cache = lab.api().kubeconfig(Role::Admin).with_file_name("kubectl");
        let _ = std::fs::remove_dir_all(cache);
        let plurals = definitions(&lab).into_iter().map(|d| d["spec"]["names"]["plural"].as_str().map(str::to_owned));
        plurals.flatten().all(|plural| kubectl(&lab, &["explain", &plural]).status.success())
    });
    for definition in definitions(&lab) {
        let plural = definition["spec"]["names"]["plural"].as_str().expect("a plural");
        let mut found = Vec::new();
        fields(schema(&definition), plural, &mut found);
        assert!(found.len() > 5, "{plural}: {found:?}");
        let said = quietly(&lab, &["explain", plural, "--recursive"]);
        for name in found.iter().filter_map(|path| path.rsplit('.').next()) {
            assert!(said.contains(name), "{plural}: {name} is not in {said}");
        }
    }
    let said = quietly(&lab, &["explain", "egresspolicies.spec.egress.to.ipBlock.except"]);
    assert!(said.contains("does not cover"), "{said}");
}

#[test]
fn every_validation_rule_accepts_and_rejects() {
    if !has_server((1, 25), false, "current::every_validation_rule_accepts_and_rejects") {
        return;
    }
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    lab.add_namespace("shop", &[]);
    let said = |kind: &str, spec: Value| {
        let object = json!({"apiVersion": "egret.dev/v1alpha1", "kind": kind,
                            "metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
        lab.api().try_apply(&object).err().unwrap_or_default()
    };
    let block = |cidr: &str, except: &str| json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": cidr, "except": [except]}}]}]});
    let port = |port: Value| json!({"podSelector": {}, "egress": [{"ports": [port]}]});
    let asks = |field: &str, operator: &str, values: Value| {
        let mut spec = json!({"podSelector": {}, "nodeSelector": {}});
        spec[field] = json!({"matchExpressions": [{"key": "a", "operator": operator, "values": values}]});
        spec.as_object_mut().map(|s| s.remove(if field == "nodeSelector" { "podSelector" } else { "nodeSelector" }));
        spec
    };
    let bandwidth = |bandwidth: Value| json!({"podSelector": {}, "bandwidth": bandwidth});
    let gateway = |field: &str, value: Value| json!({"nodeSelector": {}, field: value});
    let several = |last: &[u8]| {
        let pair = |n: &u8| json!({"ipv4": format!("192.0.2.{n}"), "ipv6": format!("2001:db8::{n}")});
        json!({"podSelector": {}, "addresses": last.iter().map(pair).collect::<Vec<_>>()})
    };
    let probe = |probe: Value| gateway("probes", json!([probe]));
    let mut refused = String::new();
    for (kind, good, bad) in [
        ("EgressPolicy", json!({"podSelector": {}}), json!({"podSelector": {}, "services": ["a"]})),
        (
            "EgressPolicy",
            json!({"podSelector": {}, "allocate": "Shared"}),
            json!({"podSelector": {}, "allocate": "Shared", "address": {"ipv4": "192.0.2.1"}}),
        ),
        (
            "ClusterEgressPolicy",
            json!({"podSelector": {}, "action": "Direct", "fallback": "Block"}),
            json!({"podSelector": {}, "action": "Direct", "fallback": "NodeAddress"}),
        ),
        (
            "EgressPolicy",
            json!({"podSelector": {}, "action": "Direct", "existingConnections": "End"}),
            json!({"podSelector": {}, "action": "Direct", "gateway": "g"}),
        ),
        ("EgressPolicy", bandwidth(json!({"egress": "64Kbit"})), bandwidth(json!({}))),
        ("ClusterEgressPolicy", bandwidth(json!({"ingress": "100Gbit"})), bandwidth(json!({"ingress": "101Gbit"}))),
        (
            "EgressPolicy",
            json!({"podSelector": {}, "address": {"ipv6": "2001:db8::1"}}),
            json!({"podSelector": {}, "address": {}}),
        ),
        (
            "EgressPolicy",
            json!({"podSelector": {}, "address": {"service": {"name": "web"}}}),
            json!({"podSelector": {}, "address": {"service": {"name": "web"}, "ipv4": "192.0.2.1"}}),
        ),
        (
            "ClusterEgressPolicy",
            json!({"podSelector": {}, "address": {"service": {"name": "web", "namespace": "shop"}}}),
            json!({"podSelector": {}, "address": {"service": {"name": "web"}}}),
        ),
        ("EgressPolicy", several(&[1, 2]), several(&[1, 2, 1])),
        ("ClusterEgressPolicy", several(&[1, 2]), {
            let mut spec = several(&[1, 2]);
            spec["addresses"][1].as_object_mut().map(|pair| pair.remove("ipv6"));
            spec
        }),
        ("EgressPolicy", several(&[1]), json!({"podSelector": {}, "addresses": [{}]})),
        (
            "ClusterEgressPolicy",
            json!({"podSelector": {}, "spread": "Pod", "preference": ["SameZone"]}),
            json!({"podSelector": {}, "spread": "Ordinal", "preference": ["SameZone"]}),
        ),
        (
            "EgressPolicy",
            json!({"podSelector": {}, "allocate": "Dedicated", "addressCount": 4}),
            json!({"podSelector": {}, "allocate": "Shared", "addressCount": 4}),
        ),
        ("EgressPolicy", block("203.0.113.0/24", "203.0.113.1/32"), block("203.0.113.0/24", "2001:db8::/64")),
        ("ClusterEgressPolicy", block("2001:db8::/32", "2001:db8::/64"), block("2001:db8::/32", "203.0.113.1/32")),
        ("EgressPolicy", port(json!({"port": 1, "endPort": 2})), port(json!({"endPort": 2}))),
        ("EgressPolicy", port(json!({"port": 2, "endPort": 2})), port(json!({"port": 2, "endPort": 1}))),
        ("EgressPolicy", asks("podSelector", "In", json!(["b"])), asks("podSelector", "In", json!([]))),
        ("EgressGateway", asks("nodeSelector", "Exists", json!([])), asks("nodeSelector", "Exists", json!(["b"]))),
        ("EgressGateway", gateway("addresses", json!(["192.0.2.1"])), gateway("addresses", json!(["192.0.2"]))),
        (
            "EgressGateway",
            gateway("addresses", json!(["2001:db8::1"])),
            gateway("addresses", json!(["2001:db8::/129"])),
        ),
        ("EgressGateway", gateway("addresses", json!(["192.0.2.1"])), gateway("addresses", json!(["127.0.0.1"]))),
        ("EgressGateway", gateway("nextHop", json!({"ipv4": "192.0.2.1"})), gateway("nextHop", json!({}))),
        (
            "EgressGateway",
            gateway("defaultAddress", json!({"ipv4": "192.0.2.1"})),
            gateway("defaultAddress", json!({})),
        ),
        (
            "EgressGateway",
            gateway("capacity", json!([{"nodeSelector": {}, "maxEgressIPs": 0}])),
            gateway("capacity", json!([{"nodeSelector": {}}])),
        ),
        (
            "EgressGateway",
            json!({"nodeSelector": {}, "optIn": true, "namespaceSelector": {}}),
            gateway("optIn", json!(true)),
        ),
        (
            "EgressGateway",
            gateway("announce", "Route".into()),
            json!({"nodeSelector": {}, "announce": "Route", "placement": "External"}),
        ),
        (
            "EgressGateway",
            gateway("interfaces", json!(["eth1", "ens192"])),
            json!({"nodeSelector": {}, "interface": "eth1", "interfaces": ["ens192"]}),
        ),
        ("EgressGateway", gateway("interfaces", json!(["eth1.100"])), gateway("interfaces", json!(["eth1/ens192"]))),
        (
            "EgressGateway",
            json!({"nodeSelector": {}, "vlan": 100, "nextHop": {"ipv4": "198.51.100.1"}}),
            json!({"nodeSelector": {}, "vlan": 100}),
        ),
        (
            "EgressGateway",
            json!({"nodeSelector": {}, "vlan": 4094, "nextHop": {"ipv4": "198.51.100.1"}}),
            json!({"nodeSelector": {}, "vlan": 1, "placement": "External", "nextHop": {"ipv4": "198.51.100.1"}}),
        ),
        (
            "EgressGateway",
            json!({"nodeSelector": {}, "vlan": 1, "nextHop": {"ipv4": "198.51.100.1"}}),
            json!({"nodeSelector": {}, "vlan": 4095, "nextHop": {"ipv4": "198.51.100.1"}}),
        ),
        (
            "EgressGateway",
            json!({"nodeSelector": {}, "announce": "ARP", "answerPing": true}),
            json!({"nodeSelector": {}, "announce": "Route", "answerPing": true}),
        ),
        (
            "EgressGateway",
            probe(json!({"icmp": "192.0.2.1"})),
            probe(json!({"icmp": "192.0.2.1", "tcp": "192.0.2.1:80"})),
        ),
        ("EgressGateway", probe(json!({"icmp": "2001:db8::1"})), probe(json!({"icmp": "router"}))),
        ("EgressGateway", probe(json!({"icmp": "192.0.2.1"})), probe(json!({"icmp": "127.0.0.1"}))),
        ("EgressGateway", probe(json!({"tcp": "[2001:db8::1]:443"})), probe(json!({"tcp": "192.0.2.1"}))),
    ] {
        let answer = said(kind, good.clone());
        assert!(answer.is_empty(), "{good}: {answer}");
        let answer = said(kind, bad.clone());
        assert!(!answer.is_empty(), "{bad} was taken");
        refused += &answer;
    }
    fn messages(schema: &Value, found: &mut Vec<String>) {
        match schema {
            Value::Object(fields) => {
                for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                    found.extend(rule["message"].as_str().map(str::to_owned));
                }
                fields.values().for_each(|inner| messages(inner, found));
            }
            Value::Array(all) => all.iter().for_each(|inner| messages(inner, found)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    definitions(&lab).iter().for_each(|definition| messages(schema(definition), &mut all));
    assert!(all.len() > 15, "{all:?}");
    for message in all {
        assert!(refused.contains(&message), "no object was refused for: {message}");
    }
}

#[test]
fn selectors_that_can_select_nothing_are_rejected() {
    // 1.20 stores null for an empty text, and for a map that an apply removes, and then rejects it.
    if !has_server((1, 25), false, "current::selectors_that_can_select_nothing_are_rejected") {
        return;
    }
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    lab.add_namespace("shop", &[]);
    let policy = |selector: Value| {
        let object = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
                            "metadata": {"namespace": "shop", "name": "p"}, "spec": {"podSelector": selector}});
        lab.api().try_apply(&object)
    };
    for selector in [
        json!({"matchLabels": {"app": "no spaces please"}}),
        json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["no spaces please"]}]}),
        json!({"matchExpressions": [{"key": "no spaces", "operator": "Exists"}]}),
    ] {
        let said = policy(selector.clone()).expect_err("nothing has such a label");
        assert!(said.contains("no spaces") && said.contains("podSelector"), "{selector}: {said}");
    }
    policy(json!({"matchLabels": {"example.org/app": "a_b.c", "empty": ""}})).expect("something can have such labels");
    policy(json!({"matchExpressions": [{"key": "example.org/app", "operator": "NotIn", "values": ["a", ""]}]}))
        .expect("something can have such labels");
    // Faults that no schema detects.
    policy(json!({"matchLabels": {"no spaces please": "x"}})).expect("the server does not see it");
    // There is no gateway yet, and the policy still gets the condition.
    let _controller = lab.start_controller();
    lab.wait_until("the policy is told", PATIENCE, || {
        super::condition(&lab, "shop/p", "Accepted").is_some_and(|(status, reason, message)| {
            status == "False" && reason == "Invalid" && message.contains("\"no spaces please\"")
        })
    });
}

#[test]
fn two_writers_of_one_field_get_a_conflict() {
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    lab.add_namespace("shop", &[]);
    let apply = |manager: &str, priority: i32, force: bool| {
        let object = json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
                            "metadata": {"namespace": "shop", "name": "p"},
                            "spec": {"podSelector": {}, "priority": priority}});
        let path = "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/p";
        let path = format!("{path}?fieldManager={manager}&force={force}");
        lab.api().try_ask("PATCH", &path, Some(("application/apply-patch+yaml", &object))).expect("an answer")
    };
    assert!(apply("first", 1, false).0.is_success());
    let (code, answer) = apply("second", 2, false);
    assert_eq!(code.as_u16(), 409, "{answer}");
    let said = answer["message"].as_str().unwrap_or_default();
    assert!(said.contains("first") && said.contains(".spec.priority"), "{said}");
    // The same value is no conflict, and force overwrites another writer's value.
    assert!(apply("second", 1, false).0.is_success());
    let (code, answer) = apply("second", 2, true);
    assert!(code.is_success() && answer["spec"]["priority"] == 2, "{answer}");
}

#[test]
fn networks_of_services_are_followed() {
    if !has_server((1, 33), false, "current::networks_of_services_are_followed") {
        return;
    }
    let lab = Lab::builder().kubernetes().scene();
    let inside = || lab.api().egret("egressnodes/n1")["status"]["direct"].to_string().contains("10.97.0.0/16");
    assert!(!inside());
    let more = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
                      "spec": {"cidrs": ["10.97.0.0/16"]}});
    lab.api().ask("POST", "/apis/networking.k8s.io/v1/servicecidrs", Some(("application/json", &more)));
    lab.wait_until("the node knows the new network", PATIENCE, inside);
}
