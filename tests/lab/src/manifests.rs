//! What a user, and in a real cluster Kubernetes, would write: into the cluster directory, or to an API server.

use super::api::{Api, path_of};
use super::topology::Node;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The directory that `--cluster dir:PATH` names, or an API server that is given the same files.
#[derive(Clone)]
pub struct Manifests {
    directory: PathBuf,
    api: Option<Arc<Api>>,
    /// The paths of the objects that each file holds, at the API server.
    objects: Arc<Mutex<BTreeMap<String, BTreeSet<String>>>>,
}

impl Manifests {
    /// Makes the directory.
    pub fn create(directory: PathBuf) -> Manifests {
        fs::create_dir_all(&directory).expect("make the cluster directory");
        Manifests { directory, api: None, objects: Arc::default() }
    }

    /// From now on everything goes to an API server.
    pub fn use_api(&mut self, api: Arc<Api>) {
        self.api = Some(api);
    }

    /// The API server, if there is one.
    pub fn api(&self) -> Option<&Arc<Api>> {
        self.api.as_ref()
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Writes a file, whole or not at all.
    pub fn write(&self, file: &str, text: &str) {
        if let Some(api) = &self.api {
            let objects: Vec<Value> =
                serde_saphyr::from_multiple(text).unwrap_or_else(|e| panic!("{file}: {e}\n{text}"));
            let objects: Vec<&Value> = objects.iter().filter(|o| o.is_object()).collect();
            objects.iter().for_each(|object| drop(api.apply(object)));
            let now: BTreeSet<String> = objects.iter().map(|object| path_of(object)).collect();
            let mut files = self.objects.lock().expect("a lock");
            let before = files.insert(file.to_owned(), now.clone()).unwrap_or_default();
            return before.difference(&now).for_each(|path| api.delete(path));
        }
        let temporary = self.directory.join(format!(".{file}.new"));
        fs::write(&temporary, text).expect("write a manifest");
        fs::rename(temporary, self.directory.join(file)).expect("put a manifest in place");
    }

    /// Removes a file; it must be there.
    pub fn remove(&self, file: &str) {
        if let Some(api) = &self.api {
            let gone = self.objects.lock().expect("a lock").remove(file);
            let gone = gone.unwrap_or_else(|| panic!("remove {file}: there is none"));
            return gone.iter().for_each(|path| api.delete(path));
        }
        fs::remove_file(self.directory.join(file)).unwrap_or_else(|e| panic!("remove {file}: {e}"));
    }

    /// Writes an object as a file of its own; JSON is YAML too.
    pub fn write_object(&self, file: &str, object: &Value) {
        self.write(file, &serde_json::to_string_pretty(object).expect("JSON"));
    }

    /// The files under `status/`, for failure texts; of big ones the beginnings, of very many the first ones.
    pub fn statuses(&self) -> String {
        let mut text = String::new();
        for plural in ["egressgateways", "egressnodes", "clusteregresspolicies", "egresspolicies"] {
            let Some(api) = &self.api else { break };
            let answer = api.try_ask("GET", &format!("/apis/egret.dev/v1alpha1/{plural}"), None);
            let answer = answer.map(|(_, list)| list).unwrap_or_default();
            for object in answer["items"].as_array().into_iter().flatten().take(50) {
                let status = serde_saphyr::to_string(&object["status"]).unwrap_or_default();
                let shown: String = status.chars().take(4 << 10).collect();
                text += &format!("--- {}\n{shown}\n", path_of_item(plural, object));
            }
        }
        let mut directories = vec![self.directory.join("status")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let (Ok(content), true) = (fs::read_to_string(&path), text.len() < 64 << 10) {
                    let shown: String = content.chars().take(4 << 10).collect();
                    text += &format!("--- {}\n{shown}\n", path.display());
                }
            }
        }
        text
    }
}

fn path_of_item(plural: &str, object: &Value) -> String {
    let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    format!("{plural} {}/{}", part("namespace"), part("name"))
}

/// Labels as tests write them: `&[("app", "visitor")]`.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

fn labels(pairs: Labels) -> Value {
    Value::Object(pairs.iter().map(|(k, v)| ((*k).to_owned(), Value::from(*v))).collect::<Map<_, _>>())
}

/// A Kubernetes Node.
pub fn node(node: &Node) -> Value {
    let gateway = if node.spec.gateway { "true" } else { "false" };
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name, "labels": labels(&[
            ("kubernetes.io/hostname", node.name.as_str()), ("egret.dev/gateway", gateway)])},
        "spec": {"podCIDRs": [node.pods4(), node.pods6()], "podCIDR": node.pods4()},
        "status": {"addresses": [
            {"type": "InternalIP", "address": node.ipv4()},
            {"type": "InternalIP", "address": node.ipv6()},
            {"type": "Hostname", "address": node.name}]}
    })
}

/// A Kubernetes Namespace.
pub fn namespace(name: &str, pairs: Labels) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels(pairs)}})
}

/// A Kubernetes Pod; without addresses it has been scheduled and not yet set up.
pub fn pod(node: &str, namespace: &str, name: &str, uid: &str, pairs: Labels, addresses: &[IpAddr]) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": uid, "labels": labels(pairs)},
        "spec": {"nodeName": node},
        "status": {"phase": "Pending"}
    });
    if let Some(first) = addresses.first() {
        object["status"] = json!({"phase": "Running", "podIP": first,
            "podIPs": addresses.iter().map(|a| json!({"ip": a})).collect::<Vec<_>>()});
    }
    object
}

/// A gateway of all nodes with the label `egret.dev/gateway: "true"`, the default one.
pub fn gateway(name: &str, addresses: &[&str]) -> String {
    format!(
        "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata: {{ name: {name} }}\nspec:\n  \
         nodeSelector: {{ matchLabels: {{ egret.dev/gateway: \"true\" }} }}\n  addresses: {addresses:?}\n  \
         default: true\n"
    )
}

/// A policy; `spec` is YAML in one line or several, each indented by two.
pub fn policy(namespace: &str, name: &str, spec: &str) -> String {
    let spec = spec.trim_matches('\n').trim_start();
    format!(
        "---\napiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{ namespace: {namespace}, name: {name} }}\n\
         spec:\n  {spec}\n"
    )
}
