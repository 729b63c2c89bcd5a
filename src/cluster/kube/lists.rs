//! Lists of objects of any kind, for commands that read other software's objects.

use super::client::{Client, Failure};
use crate::cluster::KubeOptions;
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::Value;

/// Objects in one answer of the API server, as kubectl asks for.
const PIECE: usize = 500;

/// Reads lists with a person's credentials.
pub struct Lists(Client);

/// A group in the API, `metav1.APIGroup`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    preferred_version: GroupVersion,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GroupVersion {
    group_version: String,
}

/// A part of a list.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    api_version: String,
    kind: String,
    #[serde(default)]
    metadata: Value,
    #[serde(default)]
    items: Option<Vec<Value>>,
}

impl Lists {
    /// With the credentials that the options name.
    ///
    /// # Errors
    /// There are none, or they are invalid.
    pub async fn connect(options: &KubeOptions) -> anyhow::Result<Self> {
        Ok(Lists(Client::connect(options).await?))
    }

    /// The objects of a kind: of a namespace, or all. `None`: the API server has no such kind.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn list(&self, group: &str, plural: &str, namespace: Option<&str>) -> anyhow::Result<Option<Vec<Value>>> {
        let Some(version) = self.version(group).await? else { return Ok(None) };
        let within = namespace.map(|namespace| format!("namespaces/{namespace}/")).unwrap_or_default();
        let path = format!("{version}/{within}{plural}");
        let (mut objects, mut token) = (Vec::new(), String::new());
        loop {
            let more = if token.is_empty() { String::new() } else { format!("&continue={token}") };
            let part: Part = match self.0.get(&format!("{path}?limit={PIECE}{more}")).await {
                Ok(part) => part,
                Err(e) if e.is_not_found() => return Ok(None),
                Err(e) => bail!(refusal(&e, group, plural)),
            };
            let kind = part.kind.strip_suffix("List").unwrap_or(&part.kind).to_owned();
            for mut object in part.items.unwrap_or_default() {
                // In lists of Kubernetes' own kinds the items have neither.
                object["apiVersion"] = part.api_version.clone().into();
                object["kind"] = kind.clone().into();
                objects.push(object);
            }
            match part.metadata["continue"].as_str().filter(|token| !token.is_empty()) {
                // It is base64 for URLs (k8s.io/apiserver, pkg/storage/continue.go).
                Some(next) => token = next.to_owned(),
                None => return Ok(Some(objects)),
            }
        }
    }

    /// The path of a group in the version that the API server prefers; `None` if it has no such group.
    async fn version(&self, group: &str) -> anyhow::Result<Option<String>> {
        if group.is_empty() {
            return Ok(Some("/api/v1".to_owned()));
        }
        match self.0.get::<Group>(&format!("/apis/{group}")).await {
            Ok(found) => Ok(Some(format!("/apis/{}", found.preferred_version.group_version))),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot ask the API server for the group {group}")),
        }
    }
}

fn refusal(failure: &Failure, group: &str, plural: &str) -> String {
    let of = if group.is_empty() { String::new() } else { format!(".{group}") };
    let remedy = match failure.code() {
        Some(403) => "; use credentials that may list them, or give manifests with -f",
        _ => "",
    };
    format!("cannot list {plural}{of}: {failure}{remedy}")
}
