//! Egret's objects as YAML, with the notes as comments.

use super::draft::{Draft, Note, NoteKind, Notes, Scope};
use crate::api::{API_VERSION, ClusterEgressPolicySpec, EgressGatewaySpec, EgressPolicySpec};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// How wide a line of comments is.
const WIDTH: usize = 100;

/// The result of a conversion.
#[derive(Clone, Debug, Default)]
pub struct Conversion {
    pub(super) objects: Vec<Converted>,
    /// What the user should know, by the objects of the input.
    pub notes: Vec<Note>,
    /// The names of the systems whose objects were converted.
    pub(super) systems: Vec<&'static str>,
}

/// An object of Egret's with its comments.
#[derive(Clone, Debug)]
pub(super) struct Converted {
    comments: Vec<String>,
    value: Value,
}

impl Conversion {
    /// Whether nothing was converted.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Egret's objects: gateways first, then policies.
    pub fn objects(&self) -> impl Iterator<Item = &Value> {
        self.objects.iter().map(|object| &object.value)
    }

    /// Egret's objects as YAML documents, ready for `kubectl apply -f -`, with the notes as comments.
    ///
    /// # Errors
    /// An object cannot be written as YAML; that is a mistake in this program.
    pub fn to_yaml(&self) -> Result<String, serde_saphyr::ser_error::Error> {
        let mut text = String::new();
        let mut head = Vec::new();
        if !self.is_empty() {
            head.push(format!("Converted from objects of {}.", self.systems.join(", ")));
            head.push(
                "Packets that a policy covers are dropped while its egress IP is not ready; fallback: NodeAddress lets them \
                 leave with the node's address. Traffic inside the cluster goes direct."
                    .to_owned(),
            );
        }
        let elsewhere = self.notes.iter().filter(|note| note.kind == NoteKind::NotConverted);
        head.extend(elsewhere.map(|note| format!("Not converted: {}: {}.", note.object, note.text)));
        head.iter().for_each(|comment| write_comment(&mut text, comment));
        for object in &self.objects {
            text.push_str("---\n");
            object.comments.iter().for_each(|comment| write_comment(&mut text, comment));
            text.push_str(&serde_saphyr::to_string(&object.value)?);
        }
        Ok(text)
    }
}

/// Writes a comment, with lines of at most [`WIDTH`] characters where words allow it.
fn write_comment(text: &mut String, comment: &str) {
    let mut line = String::from("#");
    for word in comment.split_whitespace() {
        if line.len() > 3 && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(text, "{line}");
            line = String::from("#  ");
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(text, "{line}");
}

pub(super) fn objects(draft: &Draft) -> Vec<Converted> {
    let mut objects = Vec::new();
    for gateway in &draft.gateways {
        let spec = spec(&gateway.spec, &EgressGatewaySpec::default(), "nodeSelector");
        let comments = comments(&gateway.from, &gateway.notes);
        objects.push(Converted { comments, value: object("EgressGateway", None, &gateway.name, spec) });
    }
    for policy in &draft.policies {
        let (kind, namespace, spec) = match &policy.scope {
            Scope::Cluster => {
                let spec = spec(&policy.spec, &ClusterEgressPolicySpec::default(), "podSelector");
                ("ClusterEgressPolicy", None, spec)
            }
            Scope::Namespace(namespace) => {
                let spec =
                    spec(&EgressPolicySpec::from(policy.spec.clone()), &EgressPolicySpec::default(), "podSelector");
                ("EgressPolicy", namespace.as_deref(), spec)
            }
        };
        let comments = comments(std::slice::from_ref(&policy.from), &policy.notes);
        objects.push(Converted { comments, value: object(kind, namespace, &policy.name, spec) });
    }
    objects
}

fn comments(from: &[String], notes: &Notes) -> Vec<String> {
    let mut all = vec![format!("From {}.", from.join(", "))];
    all.extend(notes.0.iter().map(|(kind, text)| match kind {
        NoteKind::Lost => format!("Lost: {text}."),
        _ => format!("Differs: {text}."),
    }));
    all
}

fn object(kind: &str, namespace: Option<&str>, name: &str, spec: Value) -> Value {
    let mut metadata = json!({"name": name});
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    json!({"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec})
}

/// The fields of a spec that differ from their defaults. `kept` is written in any case: it must be there.
fn spec<T: Serialize>(spec: &T, default: &T, kept: &str) -> Value {
    let fields = |spec: &T| match serde_json::to_value(spec) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let default = fields(default);
    let mut fields = fields(spec);
    fields.retain(|name, value| name == kept || default.get(name) != Some(value));
    Value::Object(fields)
}
