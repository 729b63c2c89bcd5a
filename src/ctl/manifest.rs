//! Changes one label or annotation in the text of a manifest. Everything else of the file stays as it is, comments
//! too. A change is written only if the file then reads as it should.

use anyhow::{Context, bail};
use serde_json::Value;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A label or an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// An annotation of this name.
    Annotation(&'static str),
    /// A label of this name.
    Label(&'static str),
}

impl Field {
    /// The part of the metadata, and the key within it.
    pub fn parts(self) -> (&'static str, &'static str) {
        match self {
            Field::Annotation(key) => ("annotations", key),
            Field::Label(key) => ("labels", key),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Field::Annotation(key) => write!(f, "the annotation {key}"),
            Field::Label(key) => write!(f, "the label {key}"),
        }
    }
}

/// The kind, namespace and name of an object.
type Identity<'a> = (&'a str, Option<&'a str>, &'a str);

/// Changes the manifest of an object in a directory. Returns the file.
///
/// # Errors
/// No file has the object, or its text cannot be changed without changing more.
pub fn change(directory: &Path, of: Identity<'_>, field: Field, value: Option<&str>) -> anyhow::Result<String> {
    let mut files = Vec::new();
    find(directory, directory, &mut files)?;
    files.sort();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let Some(changed) = changed(&text, of, field, value).with_context(|| file.display().to_string())? else {
            continue;
        };
        if changed != text {
            replace(&file, &changed).with_context(|| format!("cannot write {}", file.display()))?;
        }
        return Ok(file.display().to_string());
    }
    bail!("no manifest in {} has the object", directory.display())
}

fn find(root: &Path, directory: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_status = directory == root && name == "status";
        if name.starts_with('.') || is_status {
            continue;
        }
        if path.is_dir() {
            find(root, &path, found)?;
        } else if [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
    Ok(())
}

/// Writes the file under another name and renames it, so that no reader sees half of it.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let temporary = file.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, text)?;
    fs::set_permissions(&temporary, fs::metadata(file)?.permissions())?;
    fs::rename(&temporary, file)
}

/// The text with the change; `None` if it does not have the object.
fn changed(text: &str, of: Identity<'_>, field: Field, value: Option<&str>) -> anyhow::Result<Option<String>> {
    let mut out = String::new();
    let mut found = false;
    for document in documents(text) {
        let Some(before) = value_of(document).filter(|_| !found).filter(|object| is(object, of)) else {
            out += document;
            continue;
        };
        found = true;
        let mut wanted = before.clone();
        set(&mut wanted, field, value);
        if wanted == before {
            out += document;
            continue;
        }
        let candidate = match serde_json::from_str::<Value>(document) {
            // JSON has no comments that could be lost.
            Ok(_) => serde_json::to_string_pretty(&wanted).ok().map(|text| text + "\n"),
            Err(_) => edited(document, field, value),
        };
        let Some(candidate) = candidate.filter(|text| value_of(text).as_ref() == Some(&wanted)) else {
            bail!("the text of the manifest is written in a way that this program does not change");
        };
        out += &candidate;
    }
    Ok(found.then_some(out))
}

/// The documents of a YAML stream, each with the marker before it.
fn documents(text: &str) -> Vec<&str> {
    let mut starts = vec![0];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if at > 0 && line.starts_with("---") {
            starts.push(at);
        }
        at += line.len();
    }
    starts.push(text.len());
    starts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

fn value_of(document: &str) -> Option<Value> {
    serde_saphyr::from_str(document).ok()
}

fn is(object: &Value, (kind, namespace, name): Identity<'_>) -> bool {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    text("/kind") == Some(kind)
        && text("/metadata/name") == Some(name)
        && namespace.is_none_or(|namespace| text("/metadata/namespace").unwrap_or("default") == namespace)
}

/// Sets the field of the parsed object. An empty map is removed.
fn set(object: &mut Value, field: Field, value: Option<&str>) {
    let (part, key) = field.parts();
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    match value {
        Some(value) => {
            let map = metadata.entry(part).or_insert_with(|| Value::Object(Default::default()));
            if !map.is_object() {
                *map = Value::Object(Default::default());
            }
            map[key] = Value::from(value);
        }
        None => {
            let Some(map) = metadata.get_mut(part).and_then(Value::as_object_mut) else { return };
            map.remove(key);
            if map.is_empty() {
                metadata.remove(part);
            }
        }
    }
}

/// The document with the change, in block or in flow style; `None` if it is written in another way.
fn edited(document: &str, field: Field, value: Option<&str>) -> Option<String> {
    let (part, key) = field.parts();
    let mut lines: Vec<String> = document.split_inclusive('\n').map(str::to_owned).collect();
    let metadata = lines.iter().position(|line| line.starts_with("metadata:"))?;
    let of_metadata = lines[metadata].trim_end().trim_start_matches("metadata:").trim_start().to_owned();
    let entry = |value: &str| format!("{key}: {}", serde_json::to_string(value).unwrap_or_default());
    if of_metadata.starts_with('{') {
        lines[metadata] = in_braces(&lines[metadata], part, key, value.map(entry))?;
        return Some(lines.concat());
    }
    let end = lines[metadata + 1..].iter().position(|line| !line.starts_with([' ', '#', '\n']));
    let end = end.map_or(lines.len(), |end| metadata + 1 + end);
    let first =
        lines[metadata + 1..end].iter().find(|line| !line.trim().is_empty() && !line.trim().starts_with('#'))?;
    let indent = " ".repeat(first.len() - first.trim_start().len());
    let head = format!("{indent}{part}:");
    match (metadata + 1..end).find(|at| lines[*at].starts_with(&head)) {
        None => lines.insert(metadata + 1, format!("{indent}{part}:\n{indent}  {}\n", entry(value?))),
        Some(at) if lines[at].contains('{') => {
            lines[at] = in_braces(&lines[at], part, key, value.map(entry))?;
        }
        Some(at) => {
            let depth = |line: &str| line.len() - line.trim_start().len();
            let last = (at + 1..end).find(|i| depth(&lines[*i]) <= indent.len()).unwrap_or(end);
            let there = (at + 1..last).find(|i| lines[*i].trim_start().starts_with(&format!("{key}:")));
            let inner = lines.get(at + 1).filter(|_| last > at + 1).map_or(indent.len() + 2, |line| depth(line));
            let line = |value: &str| format!("{}{}\n", " ".repeat(inner), entry(value));
            match (there, value) {
                (Some(there), Some(value)) => lines[there] = line(value),
                (None, Some(value)) => lines.insert(at + 1, line(value)),
                (Some(there), None) => {
                    lines.remove(there);
                    if last == at + 2 {
                        lines.remove(at);
                    }
                }
                (None, None) => {}
            }
        }
    }
    Some(lines.concat())
}

/// Changes a map in flow style: `metadata: { name: a }`, or `annotations: { b: "c" }` within it or alone.
fn in_braces(line: &str, part: &str, key: &str, entry: Option<String>) -> Option<String> {
    let of_part = line.find(&format!("{part}:")).and_then(|at| Some(at + line[at..].find('{')?));
    let (open, is_part) = match of_part {
        Some(open) => (open, true),
        None => (line.find('{')?, false),
    };
    if let Some(at) = line.find(&format!("{key}:")) {
        let length = line[at..].find([',', '}'])?;
        return Some(match entry {
            Some(entry) => format!("{}{entry} {}", &line[..at], line[at + length..].trim_start()),
            None => {
                let rest = line[at + length..].trim_start_matches(',').trim_start();
                let map = format!("{}{rest}", &line[..at]);
                // An empty map goes as a whole.
                let begin = line.find(&format!("{part}:")).filter(|_| map[open + 1..].trim_start().starts_with('}'));
                match begin {
                    Some(begin) => {
                        let close = open + 1 + map[open + 1..].find('}')? + 1;
                        let tail = map[close..].trim_start_matches(',').trim_start();
                        let head =
                            map[..begin].trim_end().trim_end_matches(if tail.starts_with('}') { ',' } else { '\0' });
                        format!("{head} {tail}")
                    }
                    None => map,
                }
            }
        });
    }
    let entry = entry?;
    let empty = line[open + 1..].trim_start().starts_with('}');
    let comma = if empty { " " } else { "," };
    let new = if is_part { entry } else { format!("{part}: {{ {entry} }}") };
    Some(format!("{} {new}{comma}{}", &line[..=open], &line[open + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOVE: Field = Field::Annotation("egret.dev/move-to");

    fn policy(metadata: &str) -> String {
        format!(
            "# kept\napiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\n{metadata}spec: {{ podSelector: {{}} }} # kept too\n"
        )
    }

    fn set_and_removed(metadata: &str) -> String {
        let of = ("EgressPolicy", Some("shop"), "a");
        let before = policy(metadata);
        let text = format!("---\nkind: Other\n---\n{before}---\nkind: Last\n");
        let set = changed(&text, of, MOVE, Some("g2")).unwrap().unwrap();
        assert!(
            set.contains("# kept\n") && set.contains("# kept too\n") && set.ends_with("---\nkind: Last\n"),
            "{set}"
        );
        let again = changed(&set, of, MOVE, Some("g3")).unwrap().unwrap();
        assert!(again.contains("g3") && !again.contains("g2"), "{again}");
        let removed = changed(&again, of, MOVE, None).unwrap().unwrap();
        assert!(!removed.contains("move-to"), "{removed}");
        assert_eq!(value_of(documents(&removed)[1]), value_of(&before), "{removed}");
        set
    }

    #[test]
    fn block_and_flow_style_are_changed_and_changed_back() {
        let set = set_and_removed("metadata:\n  namespace: shop\n  # a comment\n  name: a\n");
        assert!(set.contains("metadata:\n  annotations:\n    egret.dev/move-to: \"g2\"\n  namespace: shop\n"), "{set}");
        let set = set_and_removed("metadata:\n    namespace: shop\n    name: a\n    annotations:\n        b: c\n");
        assert!(set.contains("    annotations:\n        egret.dev/move-to: \"g2\"\n        b: c\n"), "{set}");
        set_and_removed("metadata:\n  namespace: shop\n  name: a\n  annotations: { b: c }\n");
        set_and_removed("metadata: { namespace: shop, name: a }\n");
        set_and_removed("metadata: { namespace: shop, annotations: { b: \"c\" }, name: a }\n");
    }

    #[test]
    fn a_node_written_as_json_is_labelled() {
        let text = r#"{"kind": "Node", "metadata": {"name": "g1", "labels": {"a": "b"}}}"#;
        let label = Field::Label("egret.dev/drain");
        let set = changed(text, ("Node", None, "g1"), label, Some("true")).unwrap().unwrap();
        assert!(set.contains("\"egret.dev/drain\": \"true\""), "{set}");
        let removed = changed(&set, ("Node", None, "g1"), label, None).unwrap().unwrap();
        assert_eq!(value_of(&removed), value_of(text));
    }

    #[test]
    fn what_cannot_be_changed_alone_is_not_changed() {
        let of = ("EgressPolicy", Some("shop"), "a");
        for metadata in [
            "metadata: &m\n  namespace: shop\n  name: a\n  annotations: *none\n",
            "? metadata\n: { namespace: shop, name: a }\n",
        ] {
            let result = changed(&policy(metadata), of, MOVE, Some("g2"));
            assert!(result.is_err() || result.unwrap().is_none(), "{metadata}");
        }
        let other = policy("metadata: { namespace: shop, name: other }\n");
        assert!(changed(&other, of, MOVE, Some("g2")).unwrap().is_none());
    }
}
