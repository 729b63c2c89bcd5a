//! Reads fields of other systems' objects. Each value knows its path, for messages.

use crate::model::selector::Selector;
use ipnetwork::IpNetwork;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;
use std::net::IpAddr;

/// An object or a field that cannot be read. The text has the object, the field, the value and the remedy.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{object}: {message}")]
pub struct Invalid {
    /// The object, `Egress.crd.antrea.io web`; or the place in the input.
    pub object: String,
    /// The field, what is wrong with it, and what to write instead.
    pub message: String,
}

/// A value in an object, or its absence.
#[derive(Clone, Debug)]
pub(super) struct Field<'a> {
    object: &'a str,
    path: String,
    value: &'a Value,
}

static ABSENT: Value = Value::Null;

impl<'a> Field<'a> {
    /// The field `path` of the object `object`.
    pub(super) fn new(object: &'a str, path: &str, value: Option<&'a Value>) -> Self {
        Field { object, path: path.to_owned(), value: value.unwrap_or(&ABSENT) }
    }

    /// The path, `spec.rules[0].cidr`.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// A field of this object; absent if this is none.
    pub(super) fn at(&self, name: &str) -> Field<'a> {
        Field {
            object: self.object,
            path: format!("{}.{name}", self.path),
            value: self.value.get(name).unwrap_or(&ABSENT),
        }
    }

    /// Whether there is a value. An empty text, list or object counts as a value.
    pub(super) fn is_present(&self) -> bool {
        !self.value.is_null()
    }

    /// An error about this value.
    pub(super) fn invalid(&self, why: impl std::fmt::Display) -> Invalid {
        let message = format!("{}: {why}", self.path);
        Invalid { object: self.object.to_owned(), message }
    }

    fn wrong(&self, wanted: &str) -> Invalid {
        self.invalid(format!("{} is not {wanted}", self.value))
    }

    /// The text; `None` if it is absent or empty.
    pub(super) fn text(&self) -> Result<Option<&'a str>, Invalid> {
        match self.value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.trim()).filter(|text| !text.is_empty())),
            _ => Err(self.wrong("a text; write it in quotes")),
        }
    }

    /// The text, which must be there.
    pub(super) fn required_text(&self) -> Result<&'a str, Invalid> {
        self.text()?.ok_or_else(|| self.invalid("is missing or empty; add it"))
    }

    /// The boolean; `false` if it is absent.
    pub(super) fn boolean(&self) -> Result<bool, Invalid> {
        match self.value {
            Value::Null => Ok(false),
            Value::Bool(value) => Ok(*value),
            _ => Err(self.wrong("a boolean; write true or false")),
        }
    }

    /// The whole number, if it is there.
    pub(super) fn number(&self) -> Result<Option<i64>, Invalid> {
        match self.value {
            Value::Null => Ok(None),
            value => value.as_i64().map(Some).ok_or_else(|| self.wrong("a whole number of 64 bits")),
        }
    }

    /// The items of a list; none if it is absent.
    pub(super) fn list(&self) -> Result<Vec<Field<'a>>, Invalid> {
        match self.value {
            Value::Null => Ok(Vec::new()),
            Value::Array(items) => {
                let path = |i| format!("{}[{i}]", self.path);
                let field = |(i, value)| Field { object: self.object, path: path(i), value };
                Ok(items.iter().enumerate().map(field).collect())
            }
            _ => Err(self.wrong("a list; write each item in a line that begins with \"- \"")),
        }
    }

    /// The texts of a list, without empty ones.
    pub(super) fn texts(&self) -> Result<Vec<&'a str>, Invalid> {
        self.list()?.iter().filter_map(|item| item.text().transpose()).collect()
    }

    /// The labels of an object with texts as values.
    pub(super) fn labels(&self) -> Result<Vec<(&'a str, &'a str)>, Invalid> {
        match self.value {
            Value::Null => Ok(Vec::new()),
            Value::Object(fields) => {
                let text = |name: &str, value: &'a Value| {
                    value.as_str().ok_or_else(|| self.at(name).wrong("a text; write it in quotes"))
                };
                fields.iter().map(|(name, value)| Ok((name.as_str(), text(name, value)?))).collect()
            }
            _ => Err(self.wrong("an object with a text for each label")),
        }
    }

    /// The IP address, if it is there.
    pub(super) fn address(&self) -> Result<Option<IpAddr>, Invalid> {
        self.text()?.map(|text| self.parse_address(text)).transpose()
    }

    /// An IP address that stands in this field.
    pub(super) fn parse_address(&self, text: &str) -> Result<IpAddr, Invalid> {
        let why = || self.invalid(format!("{text:?} is not an IP address; write one like 192.0.2.50 or 2001:db8::50"));
        text.trim().parse().map_err(|_| why())
    }

    /// The network, if it is there. Host bits are cut off, as the other systems do; an address is a network of one.
    pub(super) fn network(&self) -> Result<Option<IpNetwork>, Invalid> {
        self.text()?.map(|text| self.parse_network(text)).transpose()
    }

    /// A network that stands in this field.
    pub(super) fn parse_network(&self, text: &str) -> Result<IpNetwork, Invalid> {
        let why = || self.invalid(format!("{text:?} is not a network; write one like 203.0.113.0/24 or 2001:db8::/32"));
        let network: IpNetwork = text.trim().parse().map_err(|_| why())?;
        IpNetwork::new(network.network(), network.prefix()).map_err(|_| why())
    }

    /// The networks of a list.
    pub(super) fn networks(&self) -> Result<Vec<IpNetwork>, Invalid> {
        self.list()?.iter().filter_map(|item| item.network().transpose()).collect()
    }

    /// The label selector, if it is there. A misspelt field in it would select everything, so unknown fields are
    /// errors.
    pub(super) fn selector(&self) -> Result<Option<LabelSelector>, Invalid> {
        let selector = self.selector_of_any_labels()?;
        selector.iter().try_for_each(|s| Selector::checked(s).map(drop).map_err(|e| self.invalid(e)))?;
        Ok(selector)
    }

    /// The same, with keys that are no labels of Kubernetes'.
    pub(super) fn selector_of_any_labels(&self) -> Result<Option<LabelSelector>, Invalid> {
        if !self.is_present() {
            return Ok(None);
        }
        if let Some(name) = self.unknown(&["matchLabels", "matchExpressions"])?.first() {
            return Err(
                self.invalid(format!("unknown field {name:?}; the fields here are matchLabels, matchExpressions"))
            );
        }
        let selector: LabelSelector = serde_json::from_value(self.value.clone())
            .map_err(|e| self.invalid(format!("not a label selector: {e}")))?;
        Ok(Some(selector))
    }

    /// The names of the fields that are not in `known`, sorted.
    pub(super) fn unknown(&self, known: &[&str]) -> Result<Vec<String>, Invalid> {
        match self.value {
            Value::Null => Ok(Vec::new()),
            Value::Object(fields) => {
                Ok(fields.keys().filter(|name| !known.contains(&name.as_str())).cloned().collect())
            }
            _ => Err(self.wrong("an object")),
        }
    }

    /// The value as one line of JSON, for notes.
    pub(super) fn shown(&self) -> String {
        self.value.to_string()
    }
}
