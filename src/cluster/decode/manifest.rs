//! Parses a document into objects: determines each object's kind, and reads its parts in any order.

use super::Decoded;
use super::fault::{Fault, line_of, options};
use super::kubernetes::Metadata;
use super::validate::{FieldReader, object};
use crate::api::API_VERSION;
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::{Identity, Object, label};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use std::fmt;
use tracing::{debug, info};

/// Reads objects for one reader of cluster state.
pub struct Reader<'a> {
    /// The interned names of the whole source.
    pub names: &'a mut Names,
    /// The node whose daemon reads: only this node's pods are read, and no statuses of policies. `None`: a controller
    /// reads.
    pub node: Option<&'a str>,
    pub statuses: StatusPath<'a>,
}

/// Where the source has the statuses of Egret's objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusPath<'a> {
    /// In the objects, as the API server has them.
    InObjects,
    /// In files of their own. A status in a manifest was written by a user and does not count.
    InFiles,
    /// The text is such a file: it must have the status of this object.
    Of(Identity<'a>),
}

impl Reader<'_> {
    /// Whether a Service's external addresses and ports are read, which `egretd why` needs. A reader of the API server
    /// asks for them when it needs them.
    pub fn has_exposure(&self) -> bool {
        self.node.is_none() && self.statuses == StatusPath::InFiles
    }

    /// Whether the objects have their statuses in themselves.
    pub fn has_statuses(&self) -> bool {
        self.statuses == StatusPath::InObjects
    }

    /// The version of a gateway that a controller replaces when it writes the status.
    pub fn version_of(&self, metadata: &Metadata) -> Option<Box<str>> {
        let has_versions = self.node.is_none() && self.has_statuses();
        metadata.resource_version.as_deref().filter(|_| has_versions).map(Into::into)
    }

    /// Reads a JSON object of a known kind.
    ///
    /// # Errors
    /// The fault, without a line.
    pub fn read_object(&mut self, kind: Kind, text: &[u8]) -> Result<Decoded, Fault> {
        let mut pass = Pass::new(self, vec![Some(Role::Used(kind))]);
        let mut json = serde_json::Deserializer::from_slice(text);
        let read = Part { pass: &mut pass, nested: false, kind_is_given: true }.deserialize(&mut json);
        let Pass { objects, fault, .. } = pass;
        let fault = fault.unwrap_or_default().fault;
        match read.and_then(|()| json.end()) {
            Err(e) if fault.message.is_empty() => Err(Fault {
                message: format!("{e}; this version of Egret cannot read it, see docs/kubernetes.md on upgrades"),
                ..Fault::default()
            }),
            Err(_) => Err(Fault { object: String::new(), ..fault }),
            Ok(()) => objects.into_iter().next().map(|(_, object)| object).ok_or_else(Fault::default),
        }
    }

    /// The objects of a document, each with its line in `text`, from 1.
    ///
    /// # Errors
    /// The first fault.
    pub fn read(&mut self, text: &str) -> Result<Vec<(u32, Object)>, Fault> {
        // JSON is YAML too, but its own parser is ten times faster. The YAML parser explains what it rejects.
        if text.trim_start().starts_with('{')
            && let Ok(objects) = self.passes(|pass| {
                let mut json = serde_json::Deserializer::from_str(text);
                Part { pass, nested: false, kind_is_given: false }.deserialize(&mut json)?;
                json.end()
            })
        {
            return Ok(objects);
        }
        self.passes(|pass| {
            serde_saphyr::with_deserializer_from_str_with_options(text, options(), |yaml| {
                Part { pass, nested: false, kind_is_given: false }.deserialize(yaml)
            })
        })
        .map_err(|(FaultPosition { mut fault, path, line }, e)| {
            if fault.message.is_empty() {
                let object = std::mem::take(&mut fault.object);
                fault = Fault { object, ..Fault::from(&e) };
            } else if fault.line == 0 && !fault.field.is_empty() {
                fault.line = line_of(text, &format!("{path}{}", fault.field)).unwrap_or(0);
            }
            if fault.line == 0 {
                fault.line = line;
            }
            fault
        })
    }

    /// Parses the text once, and again if an object's kind came after the parts that depend on it.
    fn passes<E>(
        &mut self,
        mut parse: impl FnMut(&mut Pass<'_, '_>) -> Result<(), E>,
    ) -> Result<Vec<(u32, Object)>, (FaultPosition, E)> {
        let mut kinds = Vec::new();
        loop {
            let mut pass = Pass::new(self, kinds);
            let result = parse(&mut pass);
            let Pass { kinds: found, again, objects, fault, .. } = pass;
            match result {
                Ok(()) if again => kinds = found,
                Ok(()) => {
                    let objects = objects.into_iter().filter_map(|(line, decoded)| Some((line, decoded.object.ok()??)));
                    return Ok(objects.collect());
                }
                Err(e) => return Err((fault.unwrap_or_default(), e)),
            }
        }
    }
}

/// How to read an object, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// `kind: List`.
    List,
    /// A kind that Egret uses.
    Used(Kind),
    /// A kind that Egret does not use.
    Foreign,
}

/// A fault with its object's position.
#[derive(Default)]
struct FaultPosition {
    /// Without a message if the parser has it.
    fault: Fault,
    /// The object's path within the document, such as `items[3].`, or empty.
    path: String,
    /// The object's line.
    line: u32,
}

/// One pass over a document.
struct Pass<'p, 'a> {
    reader: &'p mut Reader<'a>,
    /// The roles that the previous pass found, by the objects' order.
    known: Vec<Option<Role>>,
    kinds: Vec<Option<Role>>,
    /// A part was skipped because its object's kind was not known yet.
    again: bool,
    objects: Vec<(u32, Decoded)>,
    fault: Option<FaultPosition>,
}

impl<'p, 'a> Pass<'p, 'a> {
    fn new(reader: &'p mut Reader<'a>, known: Vec<Option<Role>>) -> Self {
        Pass { reader, known, kinds: Vec::new(), again: false, objects: Vec::new(), fault: None }
    }
}

/// One object of a document, or the list that holds the others.
struct Part<'x, 'p, 'a> {
    pass: &'x mut Pass<'p, 'a>,
    /// The object is in a list.
    nested: bool,
    /// The caller knows the kind. The object need not name it: objects of the API server's lists do not.
    kind_is_given: bool,
}

/// The parts of an object read so far.
#[derive(Default)]
struct Seen {
    line: u32,
    api_version: Option<Spanned<String>>,
    kind: Option<Spanned<String>>,
    role: Option<Role>,
    metadata: Option<Metadata>,
    fields: Option<FieldReader>,
    /// The names of the fields.
    names: Vec<String>,
    /// An unknown field and its line.
    unknown_field: Option<(String, u32)>,
}

fn line(at: serde_saphyr::Location) -> u32 {
    u32::try_from(at.line()).unwrap_or(0)
}

impl Seen {
    /// Determines the role once `apiVersion` and `kind` are both known.
    fn role(&mut self) -> Result<Option<Role>, Fault> {
        if let (None, Some(version), Some(kind)) = (self.role, &self.api_version, &self.kind) {
            self.role = Some(match Kind::of(&version.value, &kind.value) {
                _ if version.value == "v1" && kind.value == "List" => Role::List,
                Ok(Some(kind)) => Role::Used(kind),
                Ok(None) => {
                    log_ignored(&version.value, &kind.value);
                    Role::Foreign
                }
                Err(message) => {
                    let at = if version.value == API_VERSION { kind } else { version };
                    return Err(Fault { line: line(at.referenced), message, ..Fault::default() });
                }
            });
        }
        Ok(self.role)
    }

    fn label(&self) -> String {
        match (self.role, self.metadata.as_ref().and_then(|m| m.name.as_deref())) {
            (Some(Role::Used(kind)), Some(name)) => {
                let namespace = self.metadata.as_ref().and_then(|m| m.namespace.as_deref());
                label((kind, namespace.filter(|_| kind.is_namespaced()), name))
            }
            (Some(Role::Used(kind)), None) => kind.to_string(),
            _ => String::new(),
        }
    }
}

fn log_ignored(version: &str, kind: &str) {
    // Other projects have kinds of these names, and the group may be misspelt.
    if matches!(kind, "EgressGateway" | "EgressPolicy" | "ClusterEgressPolicy" | "EgressNode") {
        info!("ignored {kind} of apiVersion {version:?}: Egret's own kinds have {API_VERSION}");
    } else {
        debug!("ignored {kind} of apiVersion {version:?}");
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Part<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let index = self.pass.kinds.len();
        self.pass.kinds.push(None);
        let mut seen = Seen { role: self.pass.known.get(index).copied().flatten(), ..Seen::default() };
        let result =
            self.fields(&mut map, &mut seen).and_then(|()| self.finish(&mut seen).map_err(ParseFailure::Fault));
        self.pass.kinds[index] = seen.role;
        let (mut fault, e) = match result {
            Ok(()) => return Ok(()),
            Err(ParseFailure::Fault(fault)) => (fault, A::Error::custom("the manifest is invalid")),
            Err(ParseFailure::Parser(e)) => (Fault::default(), e),
        };
        // Keep the fault of a list's object: it is not the list's.
        if self.pass.fault.is_none() {
            if fault.object.is_empty() {
                fault.object = seen.label();
            }
            let path = if self.nested { format!("items[{}].", index.saturating_sub(1)) } else { String::new() };
            self.pass.fault = Some(FaultPosition { fault, path, line: seen.line });
        }
        Err(e)
    }
}

/// Why parsing an object failed.
enum ParseFailure<E> {
    Parser(E),
    Fault(Fault),
}

impl<E> From<E> for ParseFailure<E> {
    fn from(e: E) -> Self {
        ParseFailure::Parser(e)
    }
}

impl Part<'_, '_, '_> {
    fn fields<'de, A: MapAccess<'de>>(&mut self, map: &mut A, seen: &mut Seen) -> Result<(), ParseFailure<A::Error>> {
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let at = line(key.referenced);
            if seen.line == 0 {
                seen.line = at;
            }
            if seen.names.contains(&key.value) && seen.role != Some(Role::Foreign) {
                // The YAML parser reports it before this; the JSON parser does not.
                return Err(ParseFailure::Parser(A::Error::custom("a field is there twice")));
            }
            match (key.value.as_str(), seen.role) {
                ("apiVersion", _) => seen.api_version = Some(map.next_value()?),
                ("kind", _) => seen.kind = Some(map.next_value()?),
                ("metadata", Some(Role::Used(_) | Role::List) | None) => seen.metadata = Some(map.next_value()?),
                ("items", Some(Role::List) | None) if !self.nested => map.next_value_seed(Items(self.pass))?,
                ("spec" | "status" | "endpoints" | "ports" | "subsets", None) => {
                    self.pass.again = true;
                    map.next_value::<IgnoredAny>()?;
                }
                (field, Some(Role::Used(kind))) => {
                    let fields = seen.fields.get_or_insert_with(|| FieldReader::new(kind, self.pass.reader));
                    if !fields.read(field, map)? {
                        map.next_value::<IgnoredAny>()?;
                        seen.unknown_field.get_or_insert((key.value.clone(), at));
                    }
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    seen.unknown_field.get_or_insert((key.value.clone(), at));
                }
            }
            seen.names.push(key.value);
            seen.role().map_err(ParseFailure::Fault)?;
        }
        Ok(())
    }

    fn finish(&mut self, seen: &mut Seen) -> Result<(), Fault> {
        let missing = |field: &str| Fault { message: format!("has no {field}"), ..Fault::default() };
        let kind = match seen.role {
            _ if seen.kind.is_none() && !self.kind_is_given => return Err(missing("kind")),
            _ if seen.api_version.is_none() && !self.kind_is_given => return Err(missing("apiVersion")),
            Some(Role::Used(kind)) => kind,
            Some(Role::Foreign) | Some(Role::List) | None => return Ok(()),
        };
        if self.pass.again {
            return Ok(());
        }
        if let (Some((field, at)), true) = (&seen.unknown_field, kind.is_ours()) {
            return Err(Fault {
                line: *at,
                message: format!(
                    "unknown field {field:?}; the fields here are apiVersion, kind, metadata, spec and status"
                ),
                ..Fault::default()
            });
        }
        let fields = seen.fields.take().unwrap_or_else(|| FieldReader::new(kind, self.pass.reader));
        let decoded = object(self.pass.reader, kind, seen.metadata.get_or_insert_default(), fields)?;
        self.pass.objects.push((seen.line, decoded));
        Ok(())
    }
}

/// The objects of a list.
struct Items<'x, 'p, 'a>(&'x mut Pass<'p, 'a>);

impl<'de> DeserializeSeed<'de> for Items<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of manifests")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Part { pass: self.0, nested: true, kind_is_given: false })?.is_some() {}
        Ok(())
    }
}
