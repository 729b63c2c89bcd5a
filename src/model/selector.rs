//! Label selectors, as Kubernetes defines them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub use crate::api::Name;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// The labels of an object, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Shared between objects: 5,000 nodes have the same few keys.
    keys: Arc<[Name]>,
    /// In the order of `keys`.
    values: Box<[Name]>,
}

impl Labels {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Name> {
        self.keys.binary_search_by(|k| (**k).cmp(key)).ok().map(|i| &self.values[i])
    }

    /// All labels, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Name)> {
        self.keys.iter().zip(&self.values)
    }

    /// Replaces the list of keys by the equal one that `share` returns.
    pub fn share_keys(&mut self, share: impl FnOnce(&Arc<[Name]>) -> Arc<[Name]>) {
        self.keys = share(&self.keys);
    }
}

impl<K: Into<Name>, V: Into<Name>> FromIterator<(K, V)> for Labels {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(labels: T) -> Self {
        let mut all: Vec<(Name, Name)> = labels.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        all.sort();
        all.dedup_by(|b, a| a.0 == b.0);
        let (keys, values): (Vec<Name>, Vec<Name>) = all.into_iter().unzip();
        Labels { keys: keys.into(), values: values.into() }
    }
}

/// A label selector. The empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selector(Requirements);

/// Most of ten thousand policies require one label, which needs no allocation of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Requirements {
    One(Requirement),
    Others(Box<[Requirement]>),
}

impl Default for Requirements {
    fn default() -> Self {
        Requirements::Others(Box::default())
    }
}

impl FromIterator<Requirement> for Requirements {
    fn from_iter<T: IntoIterator<Item = Requirement>>(all: T) -> Self {
        let mut all: Vec<Requirement> = all.into_iter().collect();
        match all.pop() {
            Some(one) if all.is_empty() => Requirements::One(one),
            last => {
                all.extend(last);
                Requirements::Others(all.into())
            }
        }
    }
}

impl Deref for Requirements {
    type Target = [Requirement];

    fn deref(&self) -> &[Requirement] {
        match self {
            Requirements::One(one) => std::slice::from_ref(one),
            Requirements::Others(all) => all,
        }
    }
}

impl DerefMut for Requirements {
    fn deref_mut(&mut self) -> &mut [Requirement] {
        match self {
            Requirements::One(one) => std::slice::from_mut(one),
            Requirements::Others(all) => all,
        }
    }
}

/// At most two machine words besides its kind. Longer and rarer requirements are boxed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Requirement {
    Equals(Name, Name),
    In(Box<KeyAndValues>),
    NotIn(Box<KeyAndValues>),
    Exists(Name),
    DoesNotExist(Name),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct KeyAndValues {
    key: Name,
    values: Box<[Name]>,
}

impl Requirement {
    fn key(&self) -> &str {
        match self {
            Requirement::Equals(k, _) | Requirement::Exists(k) | Requirement::DoesNotExist(k) => k,
            Requirement::In(of) | Requirement::NotIn(of) => &of.key,
        }
    }

    fn matches(&self, labels: &Labels) -> bool {
        match self {
            Requirement::Equals(k, v) => labels.get(k) == Some(v),
            Requirement::In(of) => labels.get(&of.key).is_some_and(|v| of.values.contains(v)),
            // Kubernetes: a missing key satisfies NotIn.
            Requirement::NotIn(of) => labels.get(&of.key).is_none_or(|v| !of.values.contains(v)),
            Requirement::Exists(k) => labels.get(k).is_some(),
            Requirement::DoesNotExist(k) => labels.get(k).is_none(),
        }
    }
}

impl Selector {
    /// Whether `labels` satisfy every requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }

    /// The labels that every selected object has. An index can be built on them.
    pub fn required_labels(&self) -> impl Iterator<Item = (&Name, &Name)> {
        self.0.iter().filter_map(|r| match r {
            Requirement::Equals(k, v) => Some((k, v)),
            _ => None,
        })
    }

    /// Replaces each key and value by the equal one that `share` returns, so that a word that many selectors have is
    /// stored once.
    pub fn share_names(&mut self, share: &mut impl FnMut(&Name) -> Name) {
        for requirement in &mut *self.0 {
            let (key, values): (_, &mut [Name]) = match requirement {
                Requirement::Equals(k, v) => (k, std::slice::from_mut(v)),
                Requirement::In(of) | Requirement::NotIn(of) => (&mut of.key, &mut of.values),
                Requirement::Exists(k) | Requirement::DoesNotExist(k) => (k, &mut []),
            };
            *key = share(key);
            values.iter_mut().for_each(|v| *v = share(v));
        }
    }

    /// Whether the selector requires no other label than `name_label`, which every object is known to have.
    pub fn decides_by_name(&self, name_label: &str) -> bool {
        self.0.iter().all(|r| r.key() == name_label)
    }

    /// This selector, which also requires a label.
    #[must_use]
    pub fn with(&self, key: Name, value: Name) -> Self {
        Selector(self.0.iter().cloned().chain([Requirement::Equals(key, value)]).collect())
    }

    /// A selector that requires these labels, as a Service's `spec.selector`.
    pub fn equals<K: Into<Name>, V: Into<Name>>(labels: impl IntoIterator<Item = (K, V)>) -> Self {
        Selector(labels.into_iter().map(|(k, v)| Requirement::Equals(k.into(), v.into())).collect())
    }
}

/// An invalid selector. The text names the requirement.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct SelectorError(String);

impl Selector {
    /// Converts a selector that a user has written. It refuses labels that no object can have.
    ///
    /// # Errors
    /// Keys or values that cannot be labels (`ValidateLabelName`, `IsValidLabelValue`, apimachinery), and the errors
    /// of [`Selector::try_from`].
    pub fn checked(s: &LabelSelector) -> Result<Self, SelectorError> {
        let selector = Selector::try_from(s)?;
        for (field, key, values) in words(s) {
            if !is_label_key(key) {
                return Err(SelectorError(format!(
                    "{field}: no object can have a label with the key {key:?}; a key is at most 63 letters, digits, \
                     '-', '_' and '.', with a letter or digit at both ends, and before it a DNS name and '/' if it \
                      has one"
                )));
            }
            if let Some(value) = values.into_iter().find(|value| !is_label_value(value)) {
                return Err(SelectorError(format!(
                    "{field}: no object can have a label {key:?} with the value {value:?}; a value is empty, or at \
                     most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"
                )));
            }
        }
        Ok(selector)
    }
}

/// The keys and values of a selector, each with its field.
fn words(s: &LabelSelector) -> impl Iterator<Item = (&'static str, &String, Vec<&String>)> {
    let labels = s.match_labels.iter().flatten().map(|(key, value)| ("matchLabels", key, vec![value]));
    let expressions = s.match_expressions.iter().flatten();
    labels.chain(expressions.map(|e| ("matchExpressions", &e.key, e.values.iter().flatten().collect())))
}

fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let is_part = |part: &str| {
        let inside = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        !part.is_empty() && part.bytes().all(inside) && !part.starts_with('-') && !part.ends_with('-')
    };
    let is_dns = |name: &str| name.len() <= 253 && name.split('.').all(is_part);
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(is_dns)
}

fn is_label_value(value: &str) -> bool {
    let inside = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let at_ends = |c: Option<u8>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    value.len() <= 63 && value.bytes().all(inside) && at_ends(value.bytes().next()) && at_ends(value.bytes().last())
}

impl TryFrom<&LabelSelector> for Selector {
    type Error = SelectorError;

    fn try_from(s: &LabelSelector) -> Result<Self, SelectorError> {
        let mut all = Vec::new();
        for (k, v) in s.match_labels.iter().flatten() {
            all.push(Requirement::Equals(k.as_str().into(), v.as_str().into()));
        }
        for e in s.match_expressions.iter().flatten() {
            let key: Name = e.key.as_str().into();
            let values: Box<[Name]> = e.values.iter().flatten().map(|v| v.as_str().into()).collect();
            let wants_values = matches!(e.operator.as_str(), "In" | "NotIn");
            if wants_values == values.is_empty() {
                let (is, should) = if wants_values { ("no", "at least one") } else { ("some", "none") };
                return Err(SelectorError(format!(
                    "matchExpressions: operator {} on key {:?} has {is} values, it needs {should}",
                    e.operator, e.key
                )));
            }
            all.push(match e.operator.as_str() {
                "In" => Requirement::In(Box::new(KeyAndValues { key, values })),
                "NotIn" => Requirement::NotIn(Box::new(KeyAndValues { key, values })),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                other => {
                    return Err(SelectorError(format!(
                        "matchExpressions: operator {other:?} on key {:?} is unknown; use In, NotIn, Exists or DoesNotExist",
                        e.key
                    )));
                }
            });
        }
        Ok(Selector(all.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn refusal(selector: serde_json::Value) -> String {
        let selector = serde_json::from_value(selector).unwrap();
        assert!(Selector::try_from(&selector).is_ok());
        Selector::checked(&selector).expect_err("no object can have such labels").to_string()
    }

    #[test]
    fn impossible_labels_are_refused() {
        let long = "x".repeat(64);
        for value in ["no spaces please", "-x", "x.", "ä", &long] {
            let error = refusal(json!({"matchLabels": {"app": value}}));
            assert!(error.starts_with("matchLabels: ") && error.contains(&format!("{value:?}")), "{error}");
            let error =
                refusal(json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a", value]}]}));
            assert!(error.starts_with("matchExpressions: ") && error.contains(&format!("{value:?}")), "{error}");
        }
        for key in ["", "a b", "/a", "a/", "a/b/c", "A.b/c", "a..b/c", "-a/b", &long, &format!("{}/a", "d".repeat(254))]
        {
            let error = refusal(json!({"matchLabels": {key: "x"}}));
            assert!(error.contains(&format!("{key:?}")), "{error}");
            refusal(json!({"matchExpressions": [{"key": key, "operator": "Exists"}]}));
        }
    }

    #[test]
    fn possible_labels_are_accepted() {
        let long = "x".repeat(63);
        for (key, value) in [("app", ""), ("A_b.c-1", "V.1_a-b"), ("kubernetes.io/metadata.name", "x"), (&long, &long)]
        {
            let selector = serde_json::from_value(json!({"matchLabels": {key: value}})).unwrap();
            assert!(Selector::checked(&selector).is_ok(), "{key}: {value}");
        }
        let prefix = format!("{}/{long}", vec!["a"; 127].join("."));
        let selector = serde_json::from_value(json!({"matchExpressions": [{"key": prefix, "operator": "Exists"}]}));
        assert!(Selector::checked(&selector.unwrap()).is_ok());
        assert!(Selector::checked(&LabelSelector::default()).is_ok());
    }
}
