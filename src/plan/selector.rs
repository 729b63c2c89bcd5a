//! Label selectors, as Kubernetes defines them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub use crate::api::Name;

/// Labels, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Labels(Box<[(Name, Name)]>);

impl Labels {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Name> {
        self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok().map(|i| &self.0[i].1)
    }

    /// All labels, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Name)> {
        self.0.iter().map(|(k, v)| (k, v))
    }
}

impl<K: Into<Name>, V: Into<Name>> FromIterator<(K, V)> for Labels {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(labels: T) -> Self {
        let mut all: Vec<(Name, Name)> = labels.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        all.sort();
        all.dedup_by(|b, a| a.0 == b.0);
        Labels(all.into())
    }
}

/// A label selector. The empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selector(Box<[Requirement]>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Requirement {
    Equals(Name, Name),
    In(Name, Box<[Name]>),
    NotIn(Name, Box<[Name]>),
    Exists(Name),
    DoesNotExist(Name),
}

impl Requirement {
    fn key(&self) -> &str {
        match self {
            Requirement::Equals(k, _)
            | Requirement::In(k, _)
            | Requirement::NotIn(k, _)
            | Requirement::Exists(k)
            | Requirement::DoesNotExist(k) => k,
        }
    }

    fn matches(&self, labels: &Labels) -> bool {
        match self {
            Requirement::Equals(k, v) => labels.get(k) == Some(v),
            Requirement::In(k, vs) => labels.get(k).is_some_and(|v| vs.contains(v)),
            // Kubernetes: a missing key satisfies NotIn.
            Requirement::NotIn(k, vs) => labels.get(k).is_none_or(|v| !vs.contains(v)),
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

    /// A label that everything selected has, if the selector asks for one: what an index can be built on.
    pub fn required_label(&self) -> Option<(&Name, &Name)> {
        self.required_labels().next()
    }

    /// All labels that everything selected has.
    pub fn required_labels(&self) -> impl Iterator<Item = (&Name, &Name)> {
        self.0.iter().filter_map(|r| match r {
            Requirement::Equals(k, v) => Some((k, v)),
            _ => None,
        })
    }

    /// Exchanges each word for what `share` gives for it, an equal one: so that a word that many selectors have is
    /// kept once.
    pub fn share_names(&mut self, share: &mut impl FnMut(&Name) -> Name) {
        for requirement in &mut self.0 {
            let (key, values): (_, &mut [Name]) = match requirement {
                Requirement::Equals(k, v) => (k, std::slice::from_mut(v)),
                Requirement::In(k, vs) | Requirement::NotIn(k, vs) => (k, vs),
                Requirement::Exists(k) | Requirement::DoesNotExist(k) => (k, &mut []),
            };
            *key = share(key);
            values.iter_mut().for_each(|v| *v = share(v));
        }
    }

    /// Whether `name_label`, which every object is known to have, is the only label that it asks for.
    pub fn decides_by_name(&self, name_label: &str) -> bool {
        self.0.iter().all(|r| r.key() == name_label)
    }

    /// From equalities alone, as a Service's `spec.selector` has them.
    pub fn equals<K: Into<Name>, V: Into<Name>>(labels: impl IntoIterator<Item = (K, V)>) -> Self {
        Selector(labels.into_iter().map(|(k, v)| Requirement::Equals(k.into(), v.into())).collect())
    }
}

/// A selector that cannot be understood; the text names the requirement.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("matchExpressions: {0}")]
pub struct SelectorError(String);

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
                    "operator {} on key {:?} has {is} values, it needs {should}",
                    e.operator, e.key
                )));
            }
            all.push(match e.operator.as_str() {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                other => {
                    return Err(SelectorError(format!(
                        "operator {other:?} on key {:?} is unknown; use In, NotIn, Exists or DoesNotExist",
                        e.key
                    )));
                }
            });
        }
        Ok(Selector(all.into()))
    }
}
