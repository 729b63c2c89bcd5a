//! Emits events (<https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/>), which
//! `kubectl describe` shows below an object. An event is sent once and may be lost: the object's status has the same.

use super::client::{Client, JSON, RequestFailure};
use super::watch::random;
use crate::model::notice::Notice;
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};
use tracing::debug;

/// The namespace of events about cluster-scoped objects.
const DEFAULT: &str = "default";
/// The longest note, in bytes (`noteLengthLimit` in pkg/apis/core/validation).
const MAX_NOTE: usize = 1000;

/// The object that an event is about.
#[derive(Clone, Debug)]
pub struct Regarding {
    /// `apiVersion`.
    pub version: &'static str,
    /// `kind`.
    pub kind: String,
    /// The namespace; `None` for a cluster-scoped object.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
    /// `metadata.uid`, by which `kubectl describe` finds events.
    pub uid: String,
}

/// Emits events about an object in the background.
pub fn emit(client: &Client, reporter: &'static str, regarding: &Regarding, notices: Vec<Notice>) {
    for notice in notices {
        let mut event = event(reporter, regarding, &notice);
        let namespace = regarding.namespace.as_deref().unwrap_or(DEFAULT);
        let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
        let client = client.clone();
        tokio::spawn(async move {
            let mut answer = send(&client, &path, &event).await;
            // Kubernetes 1.20 refuses an event about a cluster-scoped object, unless `regarding` has the event's
            // namespace.
            if event["regarding"]["namespace"].is_null() && answer.as_ref().is_err_and(|e| e.code() == Some(422)) {
                event["regarding"]["namespace"] = DEFAULT.into();
                answer = send(&client, &path, &event).await;
            }
            if let Err(e) = answer {
                debug!("an event was not sent: {e}");
            }
        });
    }
}

async fn send(client: &Client, path: &str, event: &Value) -> Result<Value, RequestFailure> {
    client.ask(Method::POST, path, Some((JSON, event.to_string().into_bytes()))).await
}

fn event(reporter: &'static str, about: &Regarding, notice: &Notice) -> Value {
    let now = format!("{:.6}", Timestamp::now());
    let note: String = match notice.note.char_indices().find(|(at, c)| at + c.len_utf8() > MAX_NOTE) {
        Some((end, _)) => notice.note[..end].to_owned(),
        None => notice.note.clone(),
    };
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": format!("{}.{:016x}", about.name, random(u64::MAX)),
            "namespace": about.namespace.as_deref().unwrap_or(DEFAULT),
        },
        "eventTime": now,
        "reportingController": format!("egret.dev/{reporter}"),
        "reportingInstance": reporter,
        "action": notice.reason,
        "reason": notice.reason,
        "type": if notice.is_warning { "Warning" } else { "Normal" },
        "note": note,
        "regarding": {
            "apiVersion": about.version,
            "kind": about.kind,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_truncated_between_letters() {
        let about = Regarding {
            version: "v1",
            kind: "Pod".into(),
            namespace: Some("shop".into()),
            name: "p".into(),
            uid: "7".into(),
        };
        let event = event("node", &about, &Notice::warning("Held", "ä".repeat(900)));
        let note = event["note"].as_str().unwrap();
        assert!(note.len() <= MAX_NOTE && note.len() > MAX_NOTE - 4);
        assert_eq!(event["regarding"]["uid"], "7");
    }
}
