//! Strict parsing of label selectors: with an ignored misspelt `matchLabels`, the selector would select everything.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use serde::de::Error;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Strict {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<StrictRequirement>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StrictRequirement {
    key: String,
    operator: String,
    values: Option<Vec<String>>,
}

impl From<Strict> for LabelSelector {
    fn from(s: Strict) -> Self {
        let requirement =
            |r: StrictRequirement| LabelSelectorRequirement { key: r.key, operator: r.operator, values: r.values };
        LabelSelector {
            match_labels: s.match_labels,
            match_expressions: s.match_expressions.map(|all| all.into_iter().map(requirement).collect()),
        }
    }
}

/// Parses a required selector. A missing value (`nodeSelector:` alone) is an error, not a selector of everything.
pub(super) fn required<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LabelSelector, D::Error> {
    optional(deserializer)?.ok_or_else(|| D::Error::custom("the selector is empty; write {} to select everything"))
}

/// Parses an optional selector.
pub(super) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LabelSelector>, D::Error> {
    Ok(Option::<Strict>::deserialize(deserializer)?.map(Into::into))
}
