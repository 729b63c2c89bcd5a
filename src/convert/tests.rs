//! The golden files in `tests/convert`: objects of other systems, `NAME.yaml`, and their conversion,
//! `NAME.egret.yaml`. `EGRET_WRITE_SNAPSHOTS=1 cargo test --lib convert` writes the latter anew.

use super::*;
use crate::api::crds;
use kube::core::cel::Validator;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The inputs, by system.
fn inputs() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert");
    let mut found = Vec::new();
    for system in std::fs::read_dir(directory).unwrap().flatten() {
        for entry in std::fs::read_dir(system.path()).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.ends_with(".yaml") && !name.ends_with(".egret.yaml") {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    assert!(found.len() > 10, "{found:?}");
    found
}

fn converted(path: &Path) -> Conversion {
    let text = std::fs::read_to_string(path).unwrap();
    convert(&read(&text).unwrap()).unwrap_or_else(|faults| panic!("{}: {faults:?}", path.display()))
}

#[test]
fn each_conversion_is_as_in_its_file() {
    for path in inputs() {
        let text = converted(&path).to_yaml().unwrap();
        let file = path.with_extension("egret.yaml");
        if std::env::var_os("EGRET_WRITE_SNAPSHOTS").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&file).unwrap_or_default();
        let differs = text.lines().zip(golden.lines()).find(|(now, before)| now != before);
        assert!(
            text == golden,
            "{} is not what the input is converted to now; run `make snapshots` and read the difference.\n\
             first line, now and in the file: {differs:#?}",
            file.display()
        );
    }
}

#[test]
fn the_api_server_accepts_each_conversion() {
    let definitions: Vec<Value> = serde_saphyr::from_multiple(&crds::yaml().unwrap()).unwrap();
    for path in inputs() {
        let text = std::fs::read_to_string(path.with_extension("egret.yaml")).unwrap();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        for object in objects.iter().filter(|object| !object.is_null()) {
            let definition = definitions.iter().find(|d| d["spec"]["names"]["kind"] == object["kind"]).unwrap();
            let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let result = Validator::new().validate(schema, object, None);
            assert!(result.is_ok(), "{}: {object}: {result:?}", path.display());
        }
    }
}

/// Whatever would be rejected for a pod later on is an error now, or a note.
#[test]
fn each_policy_has_a_gateway_with_its_address() {
    for path in inputs() {
        let conversion = converted(&path);
        let gateways: BTreeMap<&str, &Value> = conversion
            .objects()
            .filter(|o| o["kind"] == "EgressGateway")
            .map(|o| (o["metadata"]["name"].as_str().unwrap(), o))
            .collect();
        let is_policy = |o: &&Value| o["kind"] != "EgressGateway" && o["spec"]["action"] != "Direct";
        for policy in conversion.objects().filter(is_policy) {
            let named = policy["spec"]["gateway"].as_str();
            let default = gateways.values().any(|gateway| gateway["spec"]["default"] == true);
            assert!(named.map_or(default, |name| gateways.contains_key(name)), "{}: {policy}", path.display());
        }
        let missing = conversion.notes.iter().find(|note| note.text.contains("is not in the pool"));
        assert_eq!(missing, None, "{}", path.display());
    }
}

#[track_caller]
fn faults(text: &str) -> String {
    let faults = convert(&read(text).unwrap()).expect_err("it is invalid");
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn invalid_input_is_named_with_its_value_and_the_remedy() {
    let head = |version: &str, kind: &str| {
        format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: a, namespace: shop}}\n")
    };
    let antrea = |spec: &str| format!("{}spec: {spec}\n", head("crd.antrea.io/v1beta1", "Egress"));
    let applied = "appliedTo: {podSelector: {}}";
    let cilium = |spec: &str| format!("{}spec: {spec}\n", head("cilium.io/v2", "CiliumEgressGatewayPolicy"));
    for (text, words) in [
        (antrea(&format!("{{{applied}, egressIP: 192.0.2.300}}")), "Egress.crd.antrea.io shop/a: spec.egressIP: \"192.0.2.300\" is not an IP address; write one like"),
        (antrea("{appliedTo: {podSelector: {matchLabel: {a: b}}}, egressIP: 192.0.2.3}"), "spec.appliedTo.podSelector: unknown field \"matchLabel\"; the fields here are matchLabels"),
        (antrea("{appliedTo: {podSelector: {matchLabels: {a: \"b c\"}}}, egressIP: 192.0.2.3}"), "\"b c\""),
        (antrea(&format!("{{{applied}, egressIP: 127.0.0.1}}")), "is loopback and cannot be an egress IP; leave it out"),
        (cilium("{selectors: [], destinationCIDRs: [10.0.0.0/33], egressGateway: {nodeSelector: {}}}"), "spec.destinationCIDRs[0]: \"10.0.0.0/33\" is not a network"),
        (cilium("{selectors: [], destinationCIDRs: 10.0.0.0/8}"), "spec.destinationCIDRs: \"10.0.0.0/8\" is not a list"),
        (
            format!(
                "{}spec: {{ipRanges: [{{cidr: 192.0.2.0/28}}], subnetInfo: {{vlan: 10}}}}\n",
                head("crd.antrea.io/v1beta1", "ExternalIPPool")
            ),
            "spec.subnetInfo: has a vlan and no gateway, which Egret needs there; add the router's address",
        ),
        (cilium("{destinationCIDRs: [10.0.0.0/8]}"), "spec.egressGateway: is missing; add the gateway node"),
        (format!("{}spec: {{rules: [{{egressip: 192.0.2.1, cidr: 10.0.0.0/8}}]}}\n", head("staticegressips.nirmata.io/v1alpha1", "StaticEgressIP")), "spec.rules[0].service-name: is missing or empty; add it"),
        (format!("{}spec: {{egressIPs: []}}\n", head("k8s.ovn.org/v1", "EgressIP")), "spec.egressIPs: is empty; add the egress IP"),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: a, annotations: {kube-vip.io/egress: 'true', kube-vip.io/loadbalancerIPs: 192.0.2.1, kube-vip.io/egress-destination-ports: 'udp:many'}}\nspec: {selector: {a: b}}\n".to_owned(),
            "metadata.annotations.kube-vip.io/egress-destination-ports: \"udp:many\" is not a port; write tcp:443",
        ),
    ] {
        let found = faults(&text);
        assert!(found.contains(words), "{words:?} is not in {found:?}");
    }
}

#[test]
fn objects_of_unknown_systems_are_skipped_with_a_note() {
    let text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, namespace: shop}\n---\n\
                apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: {name: b}\n---\n\
                apiVersion: v1\nkind: Service\nmetadata: {name: c, namespace: shop}\n";
    let conversion = convert(&read(text).unwrap()).unwrap();
    assert!(conversion.is_empty());
    let notes: Vec<String> = conversion.notes.iter().map(ToString::to_string).collect();
    assert_eq!(
        notes,
        [
            "passed over: NetworkPolicy.networking.k8s.io shop/a: it is of no egress system that is known here",
            "passed over: EgressGateway.egret.dev b: it is Egret's own already",
        ]
    );
}

/// Two systems in one input, with names that both use.
#[test]
fn equal_names_of_two_systems_get_different_names() {
    let spidernet = "apiVersion: egressgateway.spidernet.io/v1beta1\nkind: EgressGateway\nmetadata: {name: pool}\n\
                     spec: {ippools: {ipv4: [192.0.2.1]}, nodeSelector: {selector: {}}}\n---\n\
                     apiVersion: egressgateway.spidernet.io/v1beta1\nkind: EgressClusterPolicy\nmetadata: {name: web}\n\
                     spec: {egressGatewayName: pool, egressIP: {ipv4: 192.0.2.1}, appliedTo: {podSelector: {}}}\n";
    let antrea = "apiVersion: crd.antrea.io/v1beta1\nkind: ExternalIPPool\nmetadata: {name: pool}\n\
                  spec: {ipRanges: [{cidr: 192.0.2.0/28}], nodeSelector: {}}\n---\n\
                  apiVersion: crd.antrea.io/v1beta1\nkind: Egress\nmetadata: {name: web}\n\
                  spec: {externalIPPool: pool, appliedTo: {podSelector: {}}}\n";
    let conversion = convert(&read(&format!("{antrea}---\n{spidernet}")).unwrap()).unwrap();
    let found: Vec<String> = conversion
        .objects()
        .map(|o| format!("{}:{}", o["metadata"]["name"].as_str().unwrap(), o["spec"]["gateway"]))
        .collect();
    assert_eq!(found, ["pool:null", "antrea-pool:null", "web:\"pool\"", "web-2:\"antrea-pool\""]);
    let notes: Vec<String> = conversion.notes.iter().map(ToString::to_string).collect();
    assert!(notes.iter().any(|note| note.contains("in the pool of EgressGateway pool as well")), "{notes:?}");
}
