//! The API server accepts what `kubectl egret convert` prints for other systems' objects, the golden files in
//! `tests/convert`. Needs root.

use crate::{PATIENCE, documents};
use lab::Lab;
use lab::api::{Role, has_server, path_of};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

#[test]
fn the_api_server_accepts_every_golden_file_of_convert() {
    // Debian's 1.20 takes a label without a value in a custom resource for null.
    if !has_server((1, 21), false, "convert::the_api_server_accepts_every_golden_file_of_convert") {
        return;
    }
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert");
    let systems = std::fs::read_dir(&directory).expect("tests/convert").flatten();
    let files = systems.flat_map(|system| std::fs::read_dir(system.path()).expect("a directory").flatten());
    let (mut namespaces, mut kinds, mut count) = (BTreeSet::new(), BTreeSet::new(), 0);
    for path in files.map(|entry| entry.path()).filter(|path| path.to_string_lossy().ends_with(".egret.yaml")) {
        let text = std::fs::read_to_string(&path).expect("a golden file");
        for object in documents(&text).iter().filter(|object| !object.is_null()) {
            if let Some(namespace) = object["metadata"]["namespace"].as_str()
                && namespaces.insert(namespace.to_owned())
            {
                lab.add_namespace(namespace, &[]);
            }
            let place = path_of(object);
            let collection = place.rsplit_once('/').map_or("", |(collection, _)| collection);
            // As kubectl apply --dry-run=server does. Servers from 1.25 on name unknown fields.
            let ask = format!("{collection}?dryRun=All&fieldValidation=Strict");
            let (code, answer) =
                lab.api().try_ask("POST", &ask, Some(("application/json", object))).expect("an answer");
            assert!(code.is_success(), "{}: {object}: {code}: {}", path.display(), answer["message"]);
            assert_eq!(answer["spec"]["podSelector"], object["spec"]["podSelector"], "{}", path.display());
            kinds.insert(object["kind"].as_str().unwrap_or_default().to_owned());
            count += 1;
        }
    }
    assert!(count > 30 && kinds.len() == 3, "{count} objects of {kinds:?}");
    // Nothing was stored.
    assert_eq!(lab.api().egret("egressgateways")["items"], json!([]));
}

/// A definition of another system's kind that takes any object.
fn definition(group: &str, version: &str, kind: &str, plural: &str, scope: &str) -> Value {
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{group}")},
        "spec": {
            "group": group, "scope": scope,
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{"name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
        },
    })
}

/// The API path of an object whose kind the lab does not know.
fn collection_of(object: &Value, plural: &str) -> String {
    let version = object["apiVersion"].as_str().expect("a version");
    let root = if version.contains('/') { "/apis" } else { "/api" };
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{plural}"),
        None => format!("{root}/{version}/{plural}"),
    }
}

#[test]
fn objects_of_other_systems_in_the_api_server_are_converted() {
    let lab = Lab::builder().kubernetes().nodes(vec![]).build();
    let json_type = "application/json";
    for (group, version, kind, plural, scope) in [
        ("crd.antrea.io", "v1beta1", "Egress", "egresses", "Cluster"),
        ("crd.antrea.io", "v1beta1", "ExternalIPPool", "externalippools", "Cluster"),
        ("cilium.io", "v2", "CiliumEgressGatewayPolicy", "ciliumegressgatewaypolicies", "Cluster"),
        ("operator.tigera.io", "v1", "EgressGateway", "egressgateways", "Namespaced"),
        ("crd.projectcalico.org", "v1", "IPPool", "ippools", "Cluster"),
    ] {
        let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        lab.api().ask("POST", definitions, Some((json_type, &definition(group, version, kind, plural, scope))));
        lab.wait_until(kind, PATIENCE, || {
            lab.api().try_ask("GET", &format!("/apis/{group}/{version}/{plural}"), None).is_ok_and(|a| a.0.is_success())
        });
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert");
    let files = ["antrea/pool", "cilium/egress-ip", "calico/annotations", "kube-vip/services"];
    lab.add_namespace("billing", &[]);
    let create = |object: &Value| {
        let plural = match object["kind"].as_str().expect("a kind") {
            "Egress" => "egresses".to_owned(),
            "CiliumEgressGatewayPolicy" => "ciliumegressgatewaypolicies".to_owned(),
            kind => format!("{}s", kind.to_lowercase()),
        };
        lab.api().ask("POST", &collection_of(object, &plural), Some((json_type, object)));
    };
    for file in files {
        let text = std::fs::read_to_string(directory.join(file).with_extension("yaml")).expect("an input");
        for mut object in documents(&text) {
            if object["apiVersion"] == "projectcalico.org/v3" {
                // As it is stored.
                object["apiVersion"] = "crd.projectcalico.org/v1".into();
            }
            if object["kind"] == "Pod" {
                object["spec"] = json!({"containers": [{"name": "main", "image": "example.org/none"}]});
            }
            create(&object);
            if object["kind"] == "Service" && object["status"].is_object() {
                let path = format!(
                    "{}/{}/status",
                    collection_of(&object, "services"),
                    object["metadata"]["name"].as_str().expect("a name")
                );
                let status = json!({"status": object["status"]});
                lab.api().ask("PATCH", &path, Some(("application/merge-patch+json", &status)));
            }
        }
    }
    // More than one response of the API server holds.
    for number in 0..501 {
        let spec = json!({"appliedTo": {"podSelector": {}}, "externalIPPool": "external-ip-pool"});
        let name = format!("many-{number}");
        create(
            &json!({"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": name}, "spec": spec}),
        );
    }
    let kubeconfig = lab.api().kubeconfig(Role::Admin).display().to_string();
    let convert = |more: &[&str]| {
        let program = env!("CARGO_BIN_EXE_kubectl-egret");
        lab.host("api").run([&[program, "convert", "--from-cluster", "--kubeconfig", &kubeconfig], more].concat())
    };
    let found = documents(&convert(&[]));
    for file in files {
        let text = std::fs::read_to_string(directory.join(file).with_extension("egret.yaml")).expect("a golden file");
        for object in documents(&text).iter().filter(|object| !object.is_null()) {
            assert!(found.contains(object), "{file}: {object} is not in the output");
        }
    }
    let many = found.iter().filter(|o| o["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("many-")));
    assert_eq!(many.count(), 501);
    // One namespace, and cluster-scoped objects.
    let of_shop = documents(&convert(&["-n", "shop"]));
    let has = |name: &str| of_shop.iter().any(|object| object["metadata"]["name"] == name);
    assert!(has("service3") && has("egress-sample") && !has("my-client"), "{of_shop:?}");
}
