//! Faults of a manifest, with their texts and lines.

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{MessageFormatter, Options, Spanned, UserMessageFormatter};
use std::fmt;

/// The YAML options: no snippets, `yes` and `on` are strings, and limits for each document.
pub fn options() -> Options {
    serde_saphyr::options! {
        with_snippet: false,
        emit_comments: false,
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            // The text's length is bounded already; a dump of a cluster has a few million of each.
            max_events: 50_000_000,
            max_nodes: 50_000_000,
            // Each level takes up to 20 KiB of stack (unoptimized); threads have 2 MiB.
            max_depth: 64,
            max_recorded_anchor_events: 20_000,
            max_recorded_anchor_bytes: 1 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 200_000 },
    }
}

/// A fault in a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// The line within the document, from 1; 0 if unknown.
    pub line: u32,
    /// The object, such as `EgressGateway/default`; empty if unknown.
    pub object: String,
    /// The field, such as `spec.addresses[1]`; empty if `message` names it or the fault concerns the whole object.
    pub field: String,
    /// What is wrong, with the value and the remedy.
    pub message: String,
}

impl Fault {
    /// A fault of a field.
    pub fn field(field: impl Into<String>, message: impl ToString) -> Self {
        Fault { field: field.into(), message: message.to_string(), ..Fault::default() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.object, &self.field].into_iter().filter(|p| !p.is_empty()) {
            write!(f, "{part}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl From<&serde_saphyr::Error> for Fault {
    fn from(e: &serde_saphyr::Error) -> Self {
        use serde_saphyr::Error as E;
        let message = match e.without_snippet() {
            E::DuplicateMappingKey { key: Some(key), .. } => format!("{key:?} is there twice; keep one"),
            E::DuplicateMappingKey { key: None, .. } => "a key is there twice; keep one".into(),
            E::SerdeUnknownField { field, expected, .. } if expected.is_empty() => {
                format!("unknown field {field:?}; no field can be set here")
            }
            E::SerdeUnknownField { field, expected, .. } => {
                format!("unknown field {field:?}; the fields here are {}", expected.join(", "))
            }
            E::SerdeUnknownVariant { variant, expected, .. } => {
                format!("{variant:?} is not possible here; write {}", expected.join(" or "))
            }
            E::SerdeMissingField { field, .. } => format!("the field {field:?} is missing"),
            E::InvalidBooleanStrict { .. } => "not a boolean; write true or false".into(),
            E::NullIntoString { .. } => "empty, but must be a string; write the value, or \"\" for none".into(),
            other => UserMessageFormatter.format_message(other).into_owned(),
        };
        let line = e.location().and_then(|l| u32::try_from(l.line()).ok()).unwrap_or(0);
        Fault { line, message, ..Fault::default() }
    }
}

/// The line, from 1, of `field` (such as `items[3].spec.addresses[1]`) in a document; if it does not exist, the line
/// of the nearest enclosing field.
pub fn line_of(text: &str, field: &str) -> Option<u32> {
    let path: Vec<Step> = field.split(['.', '[']).filter(|s| !s.is_empty()).map(Step::from).collect();
    let mut line = None;
    let find = Find { path: &path, line: &mut line };
    // Faults of the text are reported elsewhere.
    let _ = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |d| find.deserialize(d));
    line.filter(|l| *l > 0)
}

enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(text: &'a str) -> Self {
        match text.strip_suffix(']').and_then(|n| n.parse().ok()) {
            Some(index) => Step::Index(index),
            None => Step::Key(text),
        }
    }
}

struct Find<'a> {
    path: &'a [Step<'a>],
    line: &'a mut Option<u32>,
}

impl<'de> DeserializeSeed<'de> for Find<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        match self.path.first() {
            Some(Step::Key(_)) => d.deserialize_map(self),
            Some(Step::Index(_)) => d.deserialize_seq(self),
            None => IgnoredAny::deserialize_from(d),
        }
    }
}

/// [`IgnoredAny`] without its value.
trait DeserializeFrom {
    fn deserialize_from<'de, D: Deserializer<'de>>(d: D) -> Result<(), D::Error>;
}

impl DeserializeFrom for IgnoredAny {
    fn deserialize_from<'de, D: Deserializer<'de>>(d: D) -> Result<(), D::Error> {
        d.deserialize_ignored_any(IgnoredAny).map(|_| ())
    }
}

impl<'de> Visitor<'de> for Find<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping or a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            match self.path {
                [Step::Key(wanted), rest @ ..] if key.value == *wanted => {
                    *self.line = u32::try_from(key.referenced.line()).ok();
                    map.next_value_seed(Find { path: rest, line: self.line })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let [Step::Index(wanted), rest @ ..] = self.path else { return Ok(()) };
        for _ in 0..*wanted {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        if !rest.is_empty() {
            list.next_element_seed(Find { path: rest, line: self.line })?;
        } else if let Some(element) = list.next_element::<Spanned<IgnoredAny>>()? {
            *self.line = u32::try_from(element.referenced.line()).ok();
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_line() {
        let text = "a:\n  b:\n  - x\n  - c: 1\n    d:\n    - e\n    - f\n";
        for (field, line) in
            [("a", 1), ("a.b", 2), ("a.b[0]", 3), ("a.b[1].d", 5), ("a.b[1].d[1]", 7), ("a.b[1].z", 2), ("a.b[9]", 2)]
        {
            assert_eq!(line_of(text, field), Some(line), "{field}");
        }
        assert_eq!(line_of(text, "z"), None);
        assert_eq!(line_of("a: [1, 2,\n  3]", "a[2]"), Some(2));
    }
}
