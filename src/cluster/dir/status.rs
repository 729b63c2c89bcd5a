//! Writes statuses to the subdirectory `status/`.

use super::area::{STATUS, status_of, status_path};
use crate::api::{API_VERSION, EgressGatewayStatus, EgressNodeStatus, EgressPolicySpec, EgressPolicyStatus};
use crate::cluster::decode::validate::is_subdomain;
use crate::cluster::kind::Kind;
use crate::cluster::object::Identity;
use crate::model::{Cluster, MADE_FROM, PolicyKey};
use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::json;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A status of at least this length, in bytes, is written as JSON, which is YAML too: the status of a gateway with
/// 10,000 allocations is written and read ten times faster.
const JSON_FROM: usize = 64 << 10;

/// Writes statuses into `PATH/status/`.
#[derive(Clone, Debug)]
pub struct Statuses {
    directory: PathBuf,
    /// Parts of the directory cannot be read: an object that is not in the snapshot may exist.
    incomplete: Arc<AtomicBool>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest<'a, S> {
    api_version: &'static str,
    kind: String,
    metadata: Metadata<'a>,
    status: &'a S,
}

#[derive(Serialize)]
struct Metadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
}

impl Statuses {
    pub(super) fn new(directory: PathBuf, incomplete: Arc<AtomicBool>) -> Self {
        Statuses { directory, incomplete }
    }

    pub(in crate::cluster) fn gateway(&self, name: &str, status: &EgressGatewayStatus) -> anyhow::Result<()> {
        self.write((Kind::EgressGateway, None, name), status)
    }

    pub(in crate::cluster) fn policy(&self, key: &PolicyKey, status: &EgressPolicyStatus) -> anyhow::Result<()> {
        self.write((Kind::of_policy(key), key.namespace.as_deref(), &key.name), status)
    }

    pub(in crate::cluster) fn node(&self, name: &str, status: &EgressNodeStatus) -> anyhow::Result<()> {
        self.write((Kind::EgressNode, None, name), status)
    }

    /// Writes a policy that was made of the annotations of the Service of its name, as a manifest.
    pub(in crate::cluster) fn write_made_policy(&self, key: &PolicyKey, spec: &EgressPolicySpec) -> anyhow::Result<()> {
        let manifest = json!({
            "apiVersion": API_VERSION,
            "kind": Kind::EgressPolicy.to_string(),
            "metadata": {"name": &*key.name, "namespace": key.namespace.as_deref(), "annotations": {MADE_FROM: &*key.name}},
            "spec": spec,
        });
        let path = made_policy(key)?;
        let text = serde_saphyr::to_string(&manifest).context("cannot write the policy as YAML")?;
        let full = self.directory.join(&path);
        self.replace(&path, text.as_bytes(), false).with_context(|| format!("cannot write {}", full.display()))
    }

    /// Removes the manifest of a policy that was made of a Service's annotations.
    pub(in crate::cluster) fn remove_made_policy(&self, key: &PolicyKey) -> anyhow::Result<()> {
        let path = self.directory.join(made_policy(key)?);
        gone_is_fine(fs::remove_file(&path)).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Removes the statuses of gateways and policies that are not in `cluster`. Nothing is removed while a part of
    /// the directory cannot be read: a mistake in one file must not lose a gateway's allocations.
    pub(in crate::cluster) fn forget(&self, cluster: &Cluster) -> anyhow::Result<()> {
        if self.incomplete.load(Ordering::Relaxed) {
            return Ok(());
        }
        let status = Path::new(STATUS);
        let mut directories: Vec<PathBuf> =
            ["egressgateways", "clusteregresspolicies"].iter().map(|d| status.join(d)).collect();
        let namespaces = status.join("egresspolicies");
        directories.extend(self.list(&namespaces)?.into_iter().map(|ns| namespaces.join(ns)));
        for directory in directories {
            for name in self.list(&directory)? {
                let path = directory.join(name);
                let known = match status_of(&path) {
                    Some((Kind::EgressGateway, _, name)) => cluster.gateways.contains_key(name),
                    Some((Kind::EgressPolicy | Kind::ClusterEgressPolicy, namespace, name)) => {
                        let key = PolicyKey { namespace: namespace.map(Into::into), name: name.into() };
                        cluster.policies.contains_key(&key) || cluster.unreadable.contains_key(&key)
                    }
                    _ => true,
                };
                if !known {
                    let path = self.directory.join(path);
                    gone_is_fine(fs::remove_file(&path))
                        .with_context(|| format!("cannot remove {}", path.display()))?;
                }
            }
            if directory.starts_with(&namespaces) {
                // A directory that is not empty stays.
                let _ = fs::remove_dir(self.directory.join(directory));
            }
        }
        Ok(())
    }

    /// The names in a directory; none if it does not exist.
    fn list(&self, directory: &Path) -> anyhow::Result<Vec<std::ffi::OsString>> {
        let full = self.directory.join(directory);
        let entries = match fs::read_dir(&full) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            other => other.and_then(|entries| entries.map(|e| Ok(e?.file_name())).collect()),
        };
        entries.with_context(|| format!("cannot read {}", full.display()))
    }

    fn write(&self, identity: Identity<'_>, status: &impl Serialize) -> anyhow::Result<()> {
        let (kind, namespace, name) = identity;
        if !is_subdomain(name) || namespace.is_some_and(|n| !is_subdomain(n)) {
            bail!("{name:?} is not a valid object name, so its status cannot be stored");
        }
        let Some(path) = status_path(identity) else { bail!("Egret writes no status of a {kind}") };
        let manifest = Manifest {
            api_version: API_VERSION,
            kind: kind.to_string(),
            metadata: Metadata { name, namespace },
            status,
        };
        let mut text = serde_json::to_string(&manifest).context("cannot write the status as JSON")? + "\n";
        if text.len() < JSON_FROM {
            text = serde_saphyr::to_string(&manifest).context("cannot write the status as YAML")?;
        }
        let full = self.directory.join(&path);
        self.replace(&path, text.as_bytes(), kind == Kind::EgressGateway)
            .with_context(|| format!("cannot write the status to {}", full.display()))
    }

    /// Writes a file atomically.
    fn replace(&self, path: &Path, text: &[u8], durable: bool) -> io::Result<()> {
        let full = self.directory.join(path);
        if fs::read(&full).is_ok_and(|before| before == text) {
            return Ok(());
        }
        // Do not create the root: if it is missing, an empty directory must not take its place.
        let parents: Vec<&Path> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        for parent in parents.into_iter().rev() {
            match fs::create_dir(self.directory.join(parent)) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        let temporary = unfinished(&full);
        let mut file = File::create(&temporary)?;
        file.write_all(text)?;
        if durable {
            // After a power failure, an empty file would give every policy another egress IP.
            file.sync_all()?;
        }
        fs::rename(&temporary, &full)
    }
}

/// The directory of policies that the controller has made of Services' annotations, in the directory of manifests.
const MADE: &str = "made-from-services";

/// The path of such a policy.
fn made_policy(key: &PolicyKey) -> anyhow::Result<PathBuf> {
    let namespace = key.namespace.as_deref().unwrap_or_default();
    if !is_subdomain(&key.name) || !is_subdomain(namespace) {
        bail!("{key} is not a valid object name, so no policy can be stored");
    }
    Ok(Path::new(MADE).join(namespace).join(format!("{}.yaml", key.name)))
}

/// Removes a node's report. Returns whether there was one.
pub(in crate::cluster) fn remove_node(directory: &Path, name: &str) -> anyhow::Result<bool> {
    if !is_subdomain(name) {
        bail!("{name:?} is not a valid node name; give the same name as to `egretd node`");
    }
    let Some(path) = status_path((Kind::EgressNode, None, name)) else { return Ok(false) };
    let path = directory.join(path);
    // Also remove the temporary file of a killed writer.
    gone_is_fine(fs::remove_file(unfinished(&path)))
        .with_context(|| format!("cannot remove what is beside {}", path.display()))?;
    match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// The path under which a status is written before it is renamed. Each status has one writer, so the name is fixed,
/// and the file of a killed writer is overwritten.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    path.with_file_name(name)
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
