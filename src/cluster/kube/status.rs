//! Writes statuses by server-side apply. Each role has its field manager, and each field one writer.

use super::client::{APPLY, Client, JSON, RequestFailure};
use super::events::{self, Regarding};
use super::offline_cache::Files;
use super::taint;
use crate::api::{API_VERSION, EgressGatewayStatus, EgressNodeStatus, EgressPolicySpec, EgressPolicyStatus};
use crate::cluster::NotWritten;
use crate::cluster::decode::allocations_text;
use crate::cluster::kind::Kind;
use crate::model::notice::Notice;
use crate::model::selector::Name;
use crate::model::{MADE_FROM, ObjectKey, PolicyKey};
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// The field manager of the controller.
const CONTROLLER: &str = "egret-controller";
/// The field manager of the policies that the controller makes of Services' annotations.
const OF_SERVICES: &str = "egret-controller-services";
/// The field manager of node daemons.
const NODE: &str = "egret-node";
/// More allocations than this are written as text. It is half as long, and the API server does not merge it entry by
/// entry.
const MAX_OBJECTS: usize = 500;
/// The longest status that is sent, in bytes: etcd takes requests of 1.5 MiB by default, and the API server adds the
/// object's metadata (<https://etcd.io/docs/v3.5/dev-guide/limit/>).
const MAX_STATUS: usize = 1_400_000;

/// Writes statuses to the API server.
#[derive(Clone)]
pub struct Statuses {
    client: Client,
    files: Files,
}

impl fmt::Debug for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Statuses")
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Applied<'a, S> {
    api_version: &'static str,
    kind: String,
    metadata: Metadata<'a>,
    status: &'a S,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    /// The API server refuses the write if the object has another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_version: Option<&'a str>,
}

/// The parts of an answer that are used.
#[derive(Deserialize)]
struct ObjectResponse {
    metadata: AnswerMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl From<RequestFailure> for NotWritten {
    fn from(e: RequestFailure) -> Self {
        if e.is_uncertain() { NotWritten::Uncertain(e.into()) } else { NotWritten::Refused(e.into()) }
    }
}

impl Statuses {
    pub(super) fn new(client: Client, files: Files) -> Self {
        Statuses { client, files }
    }

    /// Writes a gateway's status, replacing this version of the object. Returns the new version.
    pub(in crate::cluster) async fn gateway(
        &self,
        name: &str,
        status: &EgressGatewayStatus,
        in_place_of: Option<&str>,
        notices: Vec<Notice>,
    ) -> Result<Option<Box<str>>, NotWritten> {
        let is_short = status.allocations.len() + status.released.len() <= MAX_OBJECTS;
        let status = if is_short { Cow::Borrowed(status) } else { Cow::Owned(allocations_text::write(status)) };
        let answer = self.apply(Kind::EgressGateway, (None, name), CONTROLLER, &*status, in_place_of).await?;
        self.emit(Kind::EgressGateway, (None, name), &answer, notices);
        Ok(Some(answer.metadata.resource_version.into()))
    }

    /// The versions of all gateways, as etcd has them.
    pub(in crate::cluster) async fn gateway_versions(&self) -> Result<Vec<(Name, Box<str>)>, RequestFailure> {
        #[derive(Deserialize)]
        struct List {
            /// `null` if there are none.
            items: Option<Vec<ObjectResponse>>,
        }
        let list: List = self.client.list_metadata(Kind::EgressGateway.path()).await?;
        let each = |a: ObjectResponse| (Name::from(a.metadata.name), a.metadata.resource_version.into());
        Ok(list.items.into_iter().flatten().map(each).collect())
    }

    pub(in crate::cluster) async fn policy(
        &self,
        key: &PolicyKey,
        status: &EgressPolicyStatus,
        notices: Vec<Notice>,
    ) -> Result<(), NotWritten> {
        let kind = Kind::of_policy(key);
        let written = self.apply(kind, (key.namespace.as_deref(), &key.name), CONTROLLER, status, None).await;
        match written {
            // The policy was deleted and needs no status.
            Err(e) if e.is_not_found() => Ok(()),
            other => {
                self.emit(kind, (key.namespace.as_deref(), &key.name), &other?, notices);
                Ok(())
            }
        }
    }

    fn emit(&self, kind: Kind, (namespace, name): (Option<&str>, &str), answer: &ObjectResponse, notices: Vec<Notice>) {
        let about = Regarding {
            version: API_VERSION,
            kind: kind.to_string(),
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            uid: answer.metadata.uid.clone(),
        };
        events::emit(&self.client, "controller", &about, notices);
    }

    /// Writes a policy that was made of the annotations of the Service of its name, which owns it: Kubernetes deletes
    /// both together.
    pub(in crate::cluster) async fn write_made_policy(
        &self,
        key: &PolicyKey,
        uid: &str,
        spec: &EgressPolicySpec,
    ) -> Result<(), RequestFailure> {
        let (namespace, name) = (key.namespace.as_deref(), &*key.name);
        let object = json!({
            "apiVersion": API_VERSION,
            "kind": Kind::EgressPolicy.to_string(),
            "metadata": {"name": name, "namespace": namespace, "annotations": {MADE_FROM: name}, "ownerReferences": [
                {"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid}]},
            "spec": spec,
        });
        let path = Kind::EgressPolicy.path_of(namespace, name);
        let path = format!("{path}?fieldManager={OF_SERVICES}&force=true");
        self.client
            .ask::<ObjectResponse>(Method::PATCH, &path, Some((APPLY, object.to_string().into_bytes())))
            .await
            .map(drop)
    }

    /// Deletes such a policy, if it is still one that was made: somebody may have written another one of its name.
    pub(in crate::cluster) async fn remove_made_policy(&self, key: &PolicyKey) -> Result<(), RequestFailure> {
        let path = Kind::EgressPolicy.path_of(key.namespace.as_deref(), &key.name);
        // The controller may list policies, and need not be allowed to get one.
        let collection = path.rsplit_once('/').map_or(&*path, |(collection, _)| collection);
        let selector = format!("fieldSelector=metadata.name%3D{}", key.name);
        let found = self.client.list::<ObjectResponse>(collection, &selector).await?;
        let made = found.items.into_iter().find(|policy| policy.metadata.annotations.contains_key(MADE_FROM));
        let Some(ObjectResponse { metadata: AnswerMetadata { uid, resource_version, .. } }) = made else {
            return Ok(());
        };
        let options = json!({
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
        });
        let content = Some((JSON, options.to_string().into_bytes()));
        match self.client.ask::<serde_json::Value>(Method::DELETE, &path, content).await {
            Err(e) if e.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }

    pub(in crate::cluster) fn service(&self, key: &ObjectKey, uid: &str, notice: Notice) {
        events::emit(&self.client, "controller", &core("Service", key, uid), vec![notice]);
    }

    pub(in crate::cluster) fn pod(&self, key: &ObjectKey, uid: &str, notice: Notice) {
        events::emit(&self.client, "node", &core("Pod", key, uid), vec![notice]);
    }

    pub(in crate::cluster) async fn node(&self, name: &str, status: &EgressNodeStatus) -> Result<(), NotWritten> {
        self.files.note_own(name, status);
        let written = self.apply(Kind::EgressNode, (None, name), NODE, status, None).await;
        match written {
            Err(e) if e.is_not_found() => {
                self.create_node(name).await?;
                Ok(self.apply(Kind::EgressNode, (None, name), NODE, status, None).await.map(drop)?)
            }
            other => Ok(other.map(drop)?),
        }
    }

    pub(in crate::cluster) async fn untaint(&self, node: &str) -> Result<bool, RequestFailure> {
        taint::remove(&self.client, node).await
    }

    /// Creates the EgressNode. The Node owns it, so Kubernetes deletes both together.
    async fn create_node(&self, name: &str) -> Result<(), RequestFailure> {
        let node: ObjectResponse = self.client.get(&Kind::Node.path_of(None, name)).await?;
        let object = json!({
            "apiVersion": API_VERSION,
            "kind": "EgressNode",
            "metadata": {"name": name, "ownerReferences": [
                {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node.metadata.uid}]},
            "spec": {},
        });
        let content = (JSON, object.to_string().into_bytes());
        match self.client.ask::<ObjectResponse>(Method::POST, Kind::EgressNode.path(), Some(content)).await {
            // Another process has created it.
            Err(e) if e.is_conflict() => Ok(()),
            other => other.map(drop),
        }
    }

    async fn apply<S: Serialize>(
        &self,
        kind: Kind,
        (namespace, name): (Option<&str>, &str),
        manager: &str,
        status: &S,
        version: Option<&str>,
    ) -> Result<ObjectResponse, RequestFailure> {
        let object = Applied {
            api_version: API_VERSION,
            kind: kind.to_string(),
            metadata: Metadata { name, namespace, resource_version: version },
            status,
        };
        let text = serde_json::to_vec(&object).map_err(|e| RequestFailure::Unreachable(e.to_string()))?;
        if text.len() > MAX_STATUS {
            return Err(RequestFailure::Refused {
                code: 413,
                reason: "TooLarge".into(),
                message: format!(
                    "the status of {kind} {name} has {} bytes, and etcd takes 1.5 MiB at most; divide the gateway into \
                     several with fewer allocations each",
                    text.len()
                ),
            });
        }
        // Forced, because fields that a person has set by hand in a status belong to Egret.
        let path = format!("{}/status?fieldManager={manager}&force=true", kind.path_of(namespace, name));
        self.client.ask(Method::PATCH, &path, Some((APPLY, text))).await
    }
}

/// An object of the core API that an event is about.
fn core(kind: &str, key: &ObjectKey, uid: &str) -> Regarding {
    Regarding {
        version: "v1",
        kind: kind.to_owned(),
        namespace: Some(key.namespace.to_string()),
        name: key.name.to_string(),
        uid: uid.to_owned(),
    }
}
