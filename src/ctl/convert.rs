//! `kubectl egret convert`: reads the objects of other egress systems, and shows what they become.

use super::output::{Format, few};
use crate::cluster::{Lists, SourceName};
use crate::convert::{Conversion, Invalid, KINDS, Needed, NoteKind, Object, convert, read};
use anyhow::{Context, bail};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};

/// How many objects a line names.
const NAMED: usize = 3;

/// The objects of files and directories; `-` is standard input.
///
/// # Errors
/// They cannot be read, or are no objects.
pub fn objects_of_files(files: &[PathBuf]) -> anyhow::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for path in files {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
            objects.extend(read(&text)?);
        } else {
            for file in manifests(path)? {
                let at = || format!("cannot read {}", file.display());
                let text = std::fs::read_to_string(&file).with_context(at)?;
                objects.extend(read(&text).with_context(|| file.display().to_string())?);
            }
        }
    }
    Ok(objects)
}

/// A file, or the manifests in a directory, as kubectl reads them: not those in directories within it.
fn manifests(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
        let file = entry.with_context(|| format!("cannot read {}", path.display()))?.path();
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if matches!(ending, "yaml" | "yml" | "json") && file.is_file() {
            found.push(file);
        }
    }
    found.sort();
    Ok(found)
}

/// The objects that the API server has of the kinds that are converted; of a directory, all manifests. With a
/// namespace, namespaced objects of that one only.
///
/// # Errors
/// They cannot be read.
pub async fn objects_of_cluster(source: &SourceName, namespace: Option<&str>) -> anyhow::Result<Vec<Object>> {
    let options = match source {
        SourceName::Dir(path) => return objects_of_files(std::slice::from_ref(path)),
        SourceName::Kube(options) => options,
    };
    let lists = Lists::connect(options).await?;
    let (mut objects, mut has_gateways_of_calico) = (Vec::new(), false);
    for kind in KINDS {
        if kind.needed == Needed::ByGatewaysOfCalico && !has_gateways_of_calico {
            continue;
        }
        let namespace = namespace.filter(|_| kind.is_namespaced);
        let Some(found) = lists.list(kind.group, kind.plural, namespace).await? else { continue };
        has_gateways_of_calico |= kind.needed == Needed::GatewaysOfCalico;
        for value in found {
            objects.push(Object::new(value)?);
        }
    }
    Ok(objects)
}

/// Converts objects.
///
/// # Errors
/// All that is invalid.
pub fn converted(objects: &[Object]) -> anyhow::Result<Conversion> {
    match convert(objects) {
        Ok(conversion) => Ok(conversion),
        Err(faults) => {
            let lines: Vec<String> = faults.iter().map(Invalid::to_string).collect();
            bail!("nothing was converted:\n  {}", lines.join("\n  "))
        }
    }
}

/// The objects as text: YAML with the notes as comments, or a list in JSON.
///
/// # Errors
/// They cannot be written.
pub fn text(conversion: &Conversion, format: Format) -> anyhow::Result<String> {
    match format {
        Format::Json => {
            let items: Vec<_> = conversion.objects().collect();
            let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
            Ok(serde_json::to_string_pretty(&list).context("cannot write the objects as JSON")? + "\n")
        }
        _ => conversion.to_yaml().context("cannot write the objects as YAML"),
    }
}

/// The notes as lines for standard error. Several objects that have the same note are one line.
pub fn notes(conversion: &Conversion) -> Vec<String> {
    let mut groups: Vec<((NoteKind, &str), Vec<&str>)> = Vec::new();
    let mut indices = std::collections::HashMap::new();
    for note in &conversion.notes {
        let key = (note.kind, note.text.as_str());
        let index = *indices.entry(key).or_insert(groups.len());
        match groups.get_mut(index) {
            Some((_, objects)) => objects.push(&note.object),
            None => groups.push((key, vec![&note.object])),
        }
    }
    groups.iter().map(|((kind, text), objects)| format!("{kind}: {}: {text}", few(objects, NAMED))).collect()
}

/// Whether something of the other systems' is not in the result, so that a person should look at it.
pub fn is_incomplete(conversion: &Conversion) -> bool {
    conversion.notes.iter().any(|note| matches!(note.kind, NoteKind::Lost | NoteKind::NotConverted))
}
