//! Writes the few fields by which users steer Egret: an annotation or a label of one object.

use super::manifest::{self, Field};
use crate::cluster::SourceName;
use crate::cluster::kube::{Client, MERGE};
use crate::model::PolicyKey;
use anyhow::Context;
use http::Method;
use serde_json::{Value, json};
use std::path::Path;

/// An object that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteTarget {
    /// A policy of either kind.
    Policy(PolicyKey),
    /// A gateway.
    Gateway(String),
    /// A node.
    Node(String),
}

impl WriteTarget {
    /// The kind, the namespace and the name.
    pub fn identity(&self) -> (&'static str, Option<&str>, &str) {
        match self {
            WriteTarget::Policy(key) => match &key.namespace {
                Some(namespace) => ("EgressPolicy", Some(namespace), &key.name),
                None => ("ClusterEgressPolicy", None, &key.name),
            },
            WriteTarget::Gateway(name) => ("EgressGateway", None, name),
            WriteTarget::Node(name) => ("Node", None, name),
        }
    }

    fn path(&self) -> String {
        let (kind, namespace, name) = self.identity();
        match (kind, namespace) {
            ("EgressPolicy", Some(namespace)) => {
                format!("/apis/egret.dev/v1alpha1/namespaces/{namespace}/egresspolicies/{name}")
            }
            ("ClusterEgressPolicy", _) => format!("/apis/egret.dev/v1alpha1/clusteregresspolicies/{name}"),
            ("EgressGateway", _) => format!("/apis/egret.dev/v1alpha1/egressgateways/{name}"),
            _ => format!("/api/v1/nodes/{name}"),
        }
    }
}

impl std::fmt::Display for WriteTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.identity() {
            (kind, Some(namespace), name) => write!(f, "{kind} {namespace}/{name}"),
            (kind, None, name) => write!(f, "{kind} {name}"),
        }
    }
}

/// Sets an annotation or a label, or removes it. In a directory, it changes the text of the manifest, and nothing else
/// of it. Returns what was done, for people.
///
/// # Errors
/// The object cannot be written; the text says what to write by hand.
pub async fn write(
    source: &SourceName,
    target: &WriteTarget,
    field: Field,
    value: Option<&str>,
) -> anyhow::Result<String> {
    let done = match value {
        Some(value) => format!("set {field}={value} of {target}"),
        None => format!("removed {field} of {target}"),
    };
    match source {
        SourceName::Dir(path) => {
            let file = in_directory(path, target, field, value)?;
            Ok(format!("{done}, in {file}"))
        }
        SourceName::Kube(options) => {
            let client = Client::connect(options).await?;
            let (part, key) = field.parts();
            let patch = json!({ "metadata": { part: { key: value } } }).to_string().into_bytes();
            let written: Result<Value, _> = client.ask(Method::PATCH, &target.path(), Some((MERGE, patch))).await;
            written.with_context(|| format!("cannot change {target}"))?;
            Ok(done)
        }
    }
}

fn in_directory(path: &Path, target: &WriteTarget, field: Field, value: Option<&str>) -> anyhow::Result<String> {
    let by_hand = || {
        let (part, key) = field.parts();
        match value {
            Some(value) => format!("write it by hand: metadata.{part}: {{ {key}: {value:?} }} of {target}"),
            None => format!("remove it by hand: metadata.{part}.{key} of {target}"),
        }
    };
    manifest::change(path, target.identity(), field, value).with_context(by_hand)
}
