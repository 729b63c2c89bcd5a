//! Lists of objects of any kind, for commands that read other software's objects.

use super::client::{Client, RequestFailure};
use crate::cluster::KubeOptions;
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::Value;

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
        let listed = match self.0.list::<Value>(&path, "").await {
            Ok(listed) => listed,
            Err(e) if e.is_not_found() => return Ok(None),
            Err(e) => bail!(refusal(&e, group, plural)),
        };
        let (version, kind) = (listed.api_version, listed.kind.strip_suffix("List").unwrap_or(&listed.kind).to_owned());
        let complete = |mut object: Value| {
            // In lists of Kubernetes' own kinds the items have neither.
            object["apiVersion"] = version.clone().into();
            object["kind"] = kind.clone().into();
            object
        };
        Ok(Some(listed.items.into_iter().map(complete).collect()))
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

fn refusal(failure: &RequestFailure, group: &str, plural: &str) -> String {
    let of = if group.is_empty() { String::new() } else { format!(".{group}") };
    let remedy = match failure.code() {
        Some(403) => "; use credentials that may list them, or give manifests with -f",
        _ => "",
    };
    format!("cannot list {plural}{of}: {failure}{remedy}")
}
