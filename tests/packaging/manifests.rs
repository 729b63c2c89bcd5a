//! Manifests as values: read, rendered, compared, and held against Kubernetes' own types.

use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Namespace, ResourceQuota, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A file of the repository.
pub fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// Its text.
pub fn read(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// The documents of a YAML file.
pub fn parse(text: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    documents.into_iter().filter(|d| !d.is_null()).collect()
}

/// The objects of a YAML file, by kind, namespace and name.
pub fn documents(text: &str) -> BTreeMap<String, Value> {
    let mut objects = BTreeMap::new();
    for object in parse(text) {
        let key = key(&object);
        assert!(objects.insert(key.clone(), object).is_none(), "{key} is there twice");
    }
    assert!(!objects.is_empty());
    objects
}

/// What an object is called here: `Kind namespace/name`.
pub fn key(object: &Value) -> String {
    let metadata = &object["metadata"];
    let namespace = metadata["namespace"].as_str().map(|n| format!("{n}/")).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!("{} {namespace}{}", text(&object["kind"]), text(&metadata["name"]))
}

/// Renders the chart into a namespace, with files of values.
pub fn render(namespace: &str, values: &[&str]) -> String {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(build);
    let mut command = Command::new(program);
    command.current_dir(path(".")).arg("install/chart").arg(namespace).args(values);
    let out = command.output().unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// With Debian's Go and its libraries; nothing is downloaded.
fn build() -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("render");
    fs::create_dir_all(&directory).expect("make a directory");
    let program = directory.join(format!("render-{}", std::process::id()));
    let mut command = Command::new("go");
    command.args(["build", "-o"]).arg(&program).arg(path("tests/packaging/render.go"));
    command.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode").env("GOFLAGS", "").env("CGO_ENABLED", "0");
    command.env("GOCACHE", directory.join("cache"));
    let out = command.output().unwrap_or_else(|e| panic!("go: {e}; tests/setup.sh installs what this needs"));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let last = directory.join("render");
    fs::rename(&program, &last).expect("rename");
    last
}

/// What differs between two sets of objects, a line each.
pub fn differences(a: &BTreeMap<String, Value>, b: &BTreeMap<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        match (a.get(key), b.get(key)) {
            (Some(a), Some(b)) => compare(key, a, b, &mut found),
            (a, _) => found.push(format!("{key}: only in the {} set", if a.is_some() { "first" } else { "second" })),
        }
    }
    found
}

fn compare(at: &str, a: &Value, b: &Value, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            for key in x.keys().chain(y.keys()).collect::<BTreeSet<_>>() {
                let null = Value::Null;
                compare(&format!("{at}.{key}"), x.get(key).unwrap_or(&null), y.get(key).unwrap_or(&null), found);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (n, (x, y)) in x.iter().zip(y).enumerate() {
                compare(&format!("{at}[{n}]"), x, y, found);
            }
        }
        // 0.0 and 0.
        (Value::Number(x), Value::Number(y)) if x.as_f64() == y.as_f64() => {}
        _ if a == b => {}
        _ => found.push(format!("{at}: {a} and {b}")),
    }
}

const ADMISSION: &str = "admissionregistration.k8s.io/v1";

/// An object of a kind that is used here.
pub struct Object;

impl Object {
    /// Whether Kubernetes' type of this kind takes it, and whether it keeps every field.
    ///
    /// # Errors
    /// What it does not take.
    pub fn check(object: &Value) -> Result<(), String> {
        let version = object["apiVersion"].as_str().unwrap_or_default();
        match (version, object["kind"].as_str().unwrap_or_default()) {
            ("v1", "Namespace") => keeps::<Namespace>(object),
            ("v1", "ServiceAccount") => keeps::<ServiceAccount>(object),
            ("v1", "ResourceQuota") => keeps::<ResourceQuota>(object),
            ("apps/v1", "DaemonSet") => keeps::<DaemonSet>(object),
            ("apps/v1", "Deployment") => keeps::<Deployment>(object),
            ("policy/v1", "PodDisruptionBudget") => keeps::<PodDisruptionBudget>(object),
            ("rbac.authorization.k8s.io/v1", "ClusterRole") => keeps::<ClusterRole>(object),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => keeps::<ClusterRoleBinding>(object),
            ("rbac.authorization.k8s.io/v1", "Role") => keeps::<Role>(object),
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => keeps::<RoleBinding>(object),
            (ADMISSION, "ValidatingAdmissionPolicy") => keeps::<ValidatingAdmissionPolicy>(object),
            (ADMISSION, "ValidatingAdmissionPolicyBinding") => keeps::<ValidatingAdmissionPolicyBinding>(object),
            ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => keeps::<CustomResourceDefinition>(object),
            (version, kind) => Err(format!("{version} {kind} is no kind that this test knows")),
        }
    }
}

fn keeps<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
    let kept = serde_json::to_value(&typed).map_err(|e| e.to_string())?;
    let mut lost = Vec::new();
    collect_lost("", object, &kept, &mut lost);
    if lost.is_empty() { Ok(()) } else { Err(format!("Kubernetes does not know {}", lost.join(", "))) }
}

/// What is empty may be left out.
fn collect_lost(at: &str, given: &Value, kept: &Value, lost: &mut Vec<String>) {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (key, value) in given {
                match kept.get(key) {
                    Some(other) => collect_lost(&format!("{at}.{key}"), value, other, lost),
                    None if value.is_null() || value.as_array().is_some_and(Vec::is_empty) => {}
                    None => lost.push(format!("{at}.{key}")),
                }
            }
        }
        (Value::Array(given), Value::Array(kept)) if given.len() == kept.len() => {
            for (n, (given, kept)) in given.iter().zip(kept).enumerate() {
                collect_lost(&format!("{at}[{n}]"), given, kept, lost);
            }
        }
        (Value::Number(given), Value::Number(kept)) if given.as_f64() == kept.as_f64() => {}
        _ if given == kept => {}
        _ => lost.push(format!("{at} = {given}: it makes {kept} of it")),
    }
}
