//! Other people's objects that tell whether Egret can work here: the CNI's configuration, other egress systems.
//!
//! They are read as they are, from the Kubernetes API or from a directory, and one that may not be read is passed over.

use crate::cluster::SourceName;
use crate::cluster::kube::{Client, RequestFailure};
use futures_util::future::join_all;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where objects are read from.
pub enum Objects {
    /// The Kubernetes API.
    Kube(Client),
    /// The documents of a directory.
    Dir(Vec<Value>),
}

/// An object that is looked for: where the API server has it, and its kind, namespace and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The path in the API.
    pub path: &'static str,
    /// The kind.
    pub kind: &'static str,
    /// The name; empty: all of the kind, the path is that of the collection.
    pub name: &'static str,
}

/// What was found of the objects that were looked for.
#[derive(Clone, Debug, Default)]
pub struct SiteObjects {
    objects: BTreeMap<&'static str, Vec<Value>>,
    /// What may not be read, by path, with the reason.
    pub unread: BTreeMap<&'static str, String>,
}

impl SiteObjects {
    /// The objects that were found for a path.
    pub fn all(&self, wanted: &Wanted) -> &[Value] {
        self.objects.get(wanted.path).map(Vec::as_slice).unwrap_or_default()
    }

    /// The first object that was found for a path.
    pub fn one(&self, wanted: &Wanted) -> Option<&Value> {
        self.all(wanted).first()
    }
}

impl Objects {
    /// Opens the source.
    ///
    /// # Errors
    /// There are no credentials, or the directory cannot be read.
    pub async fn open(source: &SourceName) -> anyhow::Result<Self> {
        Ok(match source {
            SourceName::Kube(options) => Objects::Kube(Client::connect(options).await?),
            SourceName::Dir(path) => {
                let mut all = Vec::new();
                documents(path, &mut all);
                Objects::Dir(all)
            }
        })
    }

    /// Reads the objects, all at once.
    pub async fn read(&self, wanted: &[Wanted]) -> SiteObjects {
        let mut found = SiteObjects::default();
        match self {
            Objects::Dir(all) => {
                for wanted in wanted {
                    let is = |object: &&Value| {
                        object["kind"] == wanted.kind
                            && (wanted.name.is_empty() || object["metadata"]["name"] == wanted.name)
                    };
                    found.objects.insert(wanted.path, all.iter().filter(is).cloned().collect());
                }
            }
            Objects::Kube(client) => {
                let answers = join_all(wanted.iter().map(|wanted| client.get::<Value>(wanted.path))).await;
                for (wanted, answer) in wanted.iter().zip(answers) {
                    match answer {
                        Ok(list) if wanted.name.is_empty() => {
                            let items = list["items"].as_array().cloned().unwrap_or_default();
                            found.objects.insert(wanted.path, items);
                        }
                        Ok(object) => drop(found.objects.insert(wanted.path, vec![object])),
                        Err(e) if e.is_not_found() => {}
                        Err(e) => drop(found.unread.insert(wanted.path, unread(&e))),
                    }
                }
            }
        }
        found
    }
}

fn unread(e: &RequestFailure) -> String {
    format!("cannot read it: {e}")
}

/// All documents of a directory that can be read; the source of cluster state tells what is wrong with the others.
fn documents(directory: &Path, all: &mut Vec<Value>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name == "status" {
            continue;
        }
        if path.is_dir() {
            documents(&path, all);
        } else if [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending))
            && let Ok(text) = fs::read_to_string(&path)
            // Ten thousand policies need not be parsed again.
            && FOREIGN.iter().any(|word| text.contains(word))
            && let Ok(documents) = serde_saphyr::from_multiple::<Value>(&text)
        {
            all.extend(documents.into_iter().filter(Value::is_object));
        }
    }
}

/// Words of which a file has one if it has an object that is looked for.
const FOREIGN: [&str; 14] = [
    "nodeInfo",
    "ConfigMap",
    "DaemonSet",
    "Deployment",
    "FelixConfiguration",
    "Installation",
    "operator.openshift.io",
    "CiliumEgressGatewayPolicy",
    "egressgateway.spidernet.io",
    "crd.antrea.io",
    "k8s.ovn.org",
    "staticegressip",
    "CustomResourceDefinition",
    "projectcalico.org",
];
