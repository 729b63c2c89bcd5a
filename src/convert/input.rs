//! The objects to convert, as they stand in a manifest or come from the API server.

use super::field::{Field, Invalid};
use serde_json::Value;

/// An object of another system, or one of Kubernetes' own that others refer to.
#[derive(Clone, Debug)]
pub struct Object {
    /// For messages: kind, group, namespace and name.
    label: String,
    group: String,
    kind: String,
    namespace: Option<String>,
    name: String,
    value: Value,
}

impl Object {
    /// Reads what every object has.
    ///
    /// # Errors
    /// The value has no `apiVersion`, `kind` or name.
    pub fn new(value: Value) -> Result<Object, Invalid> {
        let text =
            |path: &str| value.pointer(path).and_then(Value::as_str).filter(|t| !t.is_empty()).map(str::to_owned);
        let missing = |field: &str, object: String| {
            let message = format!("has no {field}; give whole objects, as kubectl get -o yaml prints them");
            Invalid { object, message }
        };
        let kind = text("/kind").ok_or_else(|| missing("kind", "an object".to_owned()))?;
        let version = text("/apiVersion").ok_or_else(|| missing("apiVersion", kind.clone()))?;
        let group = version.split_once('/').map_or("", |(group, _)| group).to_owned();
        let name = text("/metadata/name").ok_or_else(|| missing("metadata.name", label(&kind, &group, None, "?")))?;
        let namespace = text("/metadata/namespace");
        Ok(Object { label: label(&kind, &group, namespace.as_deref(), &name), group, kind, namespace, name, value })
    }

    /// For messages: `Egress.crd.antrea.io web`, `Service shop/frontend`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The kind.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The group of `apiVersion`; empty for Kubernetes' core group.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Whether the object is of this kind.
    pub(super) fn is(&self, group: &str, kind: &str) -> bool {
        self.group == group && self.kind == kind
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The namespace, if the object names it.
    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The namespace of a namespaced object; kubectl's default one if the object names none.
    pub(super) fn namespace_or_default(&self) -> &str {
        self.namespace().unwrap_or("default")
    }

    /// A top-level field, or a path of fields: `spec`, `spec.template.metadata`.
    pub(super) fn field(&self, path: &str) -> Field<'_> {
        let mut names = path.split('.');
        let first = names.next().unwrap_or_default();
        let field = Field::new(&self.label, first, self.value.get(first));
        names.fold(field, |field, name| field.at(name))
    }

    /// An annotation, if it is there and not empty.
    pub(super) fn annotation(&self, key: &str) -> Result<Option<&str>, Invalid> {
        self.annotation_field(key).text()
    }

    /// The field of an annotation.
    pub(super) fn annotation_field(&self, key: &str) -> Field<'_> {
        self.field("metadata.annotations").at(key)
    }

    /// The annotations whose keys begin with `prefix`, without it.
    pub(super) fn annotations_of(&self, prefix: &str) -> Result<Vec<(&str, &str)>, Invalid> {
        let all = self.field("metadata.annotations").labels()?;
        Ok(all.into_iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value))).collect())
    }
}

fn label(kind: &str, group: &str, namespace: Option<&str>, name: &str) -> String {
    let dot = if group.is_empty() { "" } else { "." };
    let slash = if namespace.is_some() { "/" } else { "" };
    format!("{kind}{dot}{group} {}{slash}{name}", namespace.unwrap_or_default())
}

/// A dump of a cluster has many documents, and a few million values. Each level takes stack, so there are not many.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        // `yes` and `on` are texts, as in YAML 1.2.
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_documents: 1_000_000,
            max_events: 50_000_000,
            max_nodes: 50_000_000,
            max_depth: 64,
        },
    }
}

/// The objects of a manifest: YAML documents or JSON, with the items of lists one by one.
///
/// # Errors
/// The text is not YAML, or has something that is no object.
pub fn read(text: &str) -> Result<Vec<Object>, Invalid> {
    let documents: Vec<Value> = match serde_json::from_str(text) {
        Ok(value) => vec![value],
        // JSON is YAML too, and the YAML parser names the line.
        Err(_) => serde_saphyr::from_multiple_with_options(text, options()).map_err(|e| Invalid {
            object: "the input".to_owned(),
            message: format!(
                "is not YAML: {}; correct it, or give what kubectl get -o yaml prints",
                e.without_snippet()
            ),
        })?,
    };
    let mut objects = Vec::new();
    for document in documents {
        collect(document, &mut objects)?;
    }
    Ok(objects)
}

fn collect(value: Value, objects: &mut Vec<Object>) -> Result<(), Invalid> {
    match value {
        // A document with comments only.
        Value::Null => Ok(()),
        Value::Object(mut fields) => {
            let is_list = fields.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
            match fields.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) if is_list => items.into_iter().try_for_each(|item| collect(item, objects)),
                _ => Object::new(Value::Object(fields)).map(|object| objects.push(object)),
            }
        }
        other => {
            let message = format!("{other} is not an object; give manifests with apiVersion, kind and metadata");
            Err(Invalid { object: "the input".to_owned(), message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_documents_and_json_are_read() {
        let one = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n";
        let two = "# a comment\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: b}}\n";
        let objects = read(&format!("{one}---\n{two}")).unwrap();
        let labels: Vec<_> = objects.iter().map(Object::label).collect();
        assert_eq!(labels, ["Service shop/a", "Egress.crd.antrea.io b"]);
        let json = r#"{"apiVersion": "v1", "kind": "ServiceList", "items": [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}}]}"#;
        assert_eq!(read(json).unwrap()[0].label(), "Service c");
        assert!(read("").unwrap().is_empty());
    }

    #[test]
    fn a_manifest_of_a_whole_cluster_is_read() {
        let one = |i: usize| {
            format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, annotations: {{a: yes}}}}\n")
        };
        let objects = read(&(0..5000).map(one).collect::<String>()).unwrap();
        assert_eq!((objects.len(), objects[4999].annotation("a").unwrap()), (5000, Some("yes")));
    }

    #[test]
    fn input_without_objects_is_an_error_with_the_remedy() {
        for (text, words) in [
            ("a: [b", "is not YAML"),
            ("- a\n", "is not an object"),
            ("kind: Egress\n", "has no apiVersion"),
            ("apiVersion: crd.antrea.io/v1beta1\nkind: Egress\n", "Egress.crd.antrea.io ?: has no metadata.name"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text:?}: {error}");
        }
    }
}
