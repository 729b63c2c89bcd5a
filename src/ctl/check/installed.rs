//! The API server, and what of Egret is installed: definitions and workloads.

use super::{Check, CheckState};
use crate::api::crds;
use crate::cluster::kube::Client;
use crate::ctl::site::{Objects, SiteObjects, Wanted};
use anyhow::Context;
use serde_json::Value;

/// The oldest API server that Egret was tried with, docs/install.md.
const API_SERVER: (u32, u32) = (1, 21);

const DEFINITIONS: [Wanted; 4] = [
    definition(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/egressgateways.egret.dev",
        "egressgateways.egret.dev",
    ),
    definition(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/egresspolicies.egret.dev",
        "egresspolicies.egret.dev",
    ),
    definition(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/clusteregresspolicies.egret.dev",
        "clusteregresspolicies.egret.dev",
    ),
    definition(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/egressnodes.egret.dev",
        "egressnodes.egret.dev",
    ),
];

const fn definition(path: &'static str, name: &'static str) -> Wanted {
    Wanted { path, kind: "CustomResourceDefinition", name }
}

const NODES: Wanted = Wanted {
    path: "/apis/apps/v1/daemonsets?labelSelector=app.kubernetes.io%2Fname%3Degret%2Capp.kubernetes.io%2Fcomponent%3Dnode",
    kind: "DaemonSet",
    name: "",
};
const CONTROLLERS: Wanted = Wanted {
    path: "/apis/apps/v1/deployments?labelSelector=app.kubernetes.io%2Fname%3Degret%2Capp.kubernetes.io%2Fcomponent%3Dcontroller",
    kind: "Deployment",
    name: "",
};

/// The version of the API server.
///
/// # Errors
/// It cannot be reached.
pub(super) async fn api_server(client: &Client) -> anyhow::Result<Check> {
    let version: Value = client.get("/version").await.context("cannot ask the API server for its version")?;
    let number = |field: &str| version[field].as_str().and_then(|text| text.trim_end_matches('+').parse::<u32>().ok());
    let found = version["gitVersion"].as_str().unwrap_or_default();
    let name = format!("Kubernetes {}.{} or newer", API_SERVER.0, API_SERVER.1);
    Ok(match number("major").zip(number("minor")) {
        Some(version) if version >= API_SERVER => Check::ok("kubernetes", &name, found),
        Some(_) => Check::new("kubernetes", &name, CheckState::Failed, found, "upgrade the cluster"),
        None => Check::new("kubernetes", &name, CheckState::Unknown, found, ""),
    })
}

/// The CustomResourceDefinitions.
pub(super) struct Definitions {
    /// Whether there is one.
    pub(super) is_installed: bool,
    pub(super) checks: Vec<Check>,
}

/// Whether the definitions are as this version wants them.
pub(super) async fn definitions(objects: &Objects) -> Definitions {
    let (group, name, remedy) =
        ("egret", "CustomResourceDefinitions", "kubectl apply -f install/crds.yaml of this version");
    if matches!(objects, Objects::Dir(_)) {
        return Definitions { is_installed: true, checks: Vec::new() };
    }
    let found = objects.read(&DEFINITIONS).await;
    let wanted: Vec<Value> =
        crds::yaml().ok().and_then(|text| serde_saphyr::from_multiple(&text).ok()).unwrap_or_default();
    let mut bad = Vec::new();
    for definition in &DEFINITIONS {
        let Some(there) = found.one(definition) else {
            bad.push(match found.unread.get(definition.path) {
                Some(why) => format!("{}: {why}", definition.name),
                None => format!("{} is missing", definition.name),
            });
            continue;
        };
        let wanted = wanted.iter().find(|wanted| wanted["metadata"]["name"] == definition.name);
        if let Some(lacks) =
            wanted.and_then(|wanted| lacks(&wanted["spec"]["versions"], &there["spec"]["versions"], ""))
        {
            bad.push(format!("{} is of another version: {lacks}", definition.name));
        }
    }
    let is_installed = DEFINITIONS.iter().any(|definition| found.one(definition).is_some());
    let is_unread = DEFINITIONS.iter().all(|definition| found.unread.contains_key(definition.path));
    let check = match bad.first() {
        None => Check::ok(
            group,
            name,
            format!("{} as this version ({}) wants them", DEFINITIONS.len(), env!("CARGO_PKG_VERSION")),
        ),
        Some(first) if is_unread => {
            Check::new(group, name, CheckState::Unknown, first, "ask for the right to read them")
        }
        Some(first) => Check::new(group, name, CheckState::Failed, first, remedy),
    };
    Definitions { is_installed: is_installed || is_unread, checks: vec![check] }
}

/// The first part of `wanted` that `there` lacks. The API server adds defaults, which do not count.
fn lacks(wanted: &Value, there: &Value, at: &str) -> Option<String> {
    match (wanted, there) {
        (Value::Object(fields), Value::Object(_)) => fields
            .iter()
            .filter(|(name, _)| name.as_str() != "description")
            .find_map(|(name, value)| lacks(value, &there[name], &format!("{at}.{name}"))),
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => {
            items.iter().zip(others).enumerate().find_map(|(i, (a, b))| lacks(a, b, &format!("{at}[{i}]")))
        }
        (a, b) if a == b => None,
        // What the API server leaves out is `false`.
        (Value::Bool(false), Value::Null) => None,
        _ => Some(format!("versions{at} is another")),
    }
}

/// The DaemonSet and the Deployment.
pub(super) struct Workloads {
    pub(super) checks: Vec<Check>,
    /// The image of the nodes' daemons.
    pub(super) image: Option<String>,
}

/// Whether the workloads are there and ready.
pub(super) async fn workloads(objects: &Objects) -> Workloads {
    if matches!(objects, Objects::Dir(_)) {
        return Workloads { checks: Vec::new(), image: None };
    }
    let found = objects.read(&[NODES, CONTROLLERS]).await;
    let fields = ["desiredNumberScheduled", "numberReady"];
    let nodes =
        workload(&found, &NODES, "DaemonSet egret-node", |set| fields.map(|f| set["status"][f].as_u64().unwrap_or(0)));
    let controllers = workload(&found, &CONTROLLERS, "Deployment egret-controller", |set| {
        [set["spec"]["replicas"].as_u64().unwrap_or(1), set["status"]["readyReplicas"].as_u64().unwrap_or(0)]
    });
    Workloads { checks: [nodes, controllers].into_iter().flatten().collect(), image: image(&found) }
}

fn image(found: &SiteObjects) -> Option<String> {
    let containers = found.one(&NODES)?["spec"]["template"]["spec"]["containers"].as_array()?;
    let node = containers.iter().find(|container| container["name"] == "node").or(containers.first())?;
    node["image"].as_str().map(str::to_owned)
}

/// Whether a workload is there, ready, and of this version.
fn workload(found: &SiteObjects, wanted: &Wanted, name: &str, counts: impl Fn(&Value) -> [u64; 2]) -> Vec<Check> {
    let group = "egret";
    let Some(set) = found.one(wanted) else {
        return vec![match found.unread.get(wanted.path) {
            Some(why) => Check::new(group, name, CheckState::Unknown, why, "ask for the right to read it"),
            None => Check::new(group, name, CheckState::Failed, "it is missing", "install Egret: docs/install.md"),
        }];
    };
    let [wanted, ready] = counts(set);
    let namespace = set["metadata"]["namespace"].as_str().unwrap_or_default();
    let text = format!("{ready} of {wanted} ready");
    let mut all = vec![if ready >= wanted && wanted > 0 {
        Check::ok(group, name, text)
    } else {
        let remedy = format!("see `kubectl -n {namespace} get pods` and their logs");
        Check::new(group, name, if ready == 0 { CheckState::Failed } else { CheckState::Warning }, text, remedy)
    }];
    let image = set["spec"]["template"]["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
    let tag = image.rsplit_once(':').map(|(_, tag)| tag).filter(|tag| !tag.contains('/'));
    let this = format!("v{}", env!("CARGO_PKG_VERSION"));
    if let Some(tag) = tag.filter(|tag| tag.starts_with('v') && *tag != this) {
        let remedy = "use the `kubectl egret` of the version that is installed, or upgrade Egret";
        all.push(Check::new(
            group,
            &format!("version of {name}"),
            CheckState::Warning,
            format!("{tag}, and this program is {this}"),
            remedy,
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_definition_with_defaults_is_the_same_and_one_that_lacks_a_field_is_not() {
        let wanted =
            json!([{"name": "v1alpha1", "schema": {"properties": {"a": {"type": "string", "description": "old"}}}}]);
        let mut there = json!([{"name": "v1alpha1", "served": true,
            "schema": {"properties": {"a": {"type": "string", "description": "new", "x": 1}, "b": {}}}}]);
        assert_eq!(lacks(&wanted, &there, ""), None);
        there[0]["schema"]["properties"]["a"]["type"] = "integer".into();
        assert_eq!(lacks(&wanted, &there, ""), Some("versions[0].schema.properties.a.type is another".to_owned()));
    }
}
