//! What is wrong, with the remedy.

use super::output::{Colour, View, count, few};
use serde::Serialize;
use std::fmt::Write;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Traffic is blocked, or leaves past Egret.
    Error,
    /// Something will fail sooner or later, or has no effect.
    Warning,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The object, `EgressGateway small`; of several, what they have in common.
    pub object: String,
    /// One CamelCase word for programs.
    pub reason: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
    /// The policies that it concerns, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
    /// How many pods these policies select.
    pub pods: u64,
}

/// How many policies of a problem are named.
const NAMED: usize = 4;

impl Problem {
    /// A problem that concerns no policies.
    pub fn new(severity: Severity, object: impl ToString, reason: &str, message: impl ToString) -> Self {
        let (message, remedy) = split_remedy(&message.to_string());
        Problem {
            severity,
            object: object.to_string(),
            reason: reason.to_owned(),
            message,
            remedy,
            policies: Vec::new(),
            pods: 0,
        }
    }

    /// With this remedy, if the message has none.
    #[must_use]
    pub fn or_else(mut self, remedy: impl ToString) -> Self {
        if self.remedy.is_empty() {
            self.remedy = remedy.to_string();
        }
        self
    }

    /// Adds lines of text for people.
    pub fn write(&self, view: View, out: &mut String) {
        let (colour, word) = match self.severity {
            Severity::Error => (Colour::Bad, "error  "),
            Severity::Warning => (Colour::Doubtful, "warning"),
        };
        let (object, reason) = (view.paint(Colour::Heading, &self.object), &self.reason);
        let _ = writeln!(out, "  {}  {object}: {reason}: {}", view.paint(colour, word), self.message);
        if !self.policies.is_empty() {
            let most = if view.wide { usize::MAX } else { NAMED };
            let pods = usize::try_from(self.pods).unwrap_or(usize::MAX);
            let _ = writeln!(
                out,
                "           concerns {} with {}: {}",
                count(self.policies.len(), "policy", "policies"),
                count(pods, "pod", "pods"),
                few(&self.policies, most)
            );
        }
        if !self.remedy.is_empty() {
            let _ = writeln!(out, "           remedy: {}", self.remedy);
        }
    }
}

/// Conditions end with the remedy, after a semicolon.
pub(super) fn split_remedy(message: &str) -> (String, String) {
    match message.rsplit_once("; ") {
        Some((what, remedy)) => (what.to_owned(), remedy.to_owned()),
        None => (message.to_owned(), String::new()),
    }
}
