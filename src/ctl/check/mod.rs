//! `kubectl egret check`: whether Egret can work in a cluster, before it is installed, and whether it does, after.
//! A list of requirements, each with what was found and the remedy, as `egretd check` is for one host.

mod installed;
mod nodes;
mod others;
pub(super) mod text;

use super::cni::{self, cni};
use super::problem::Severity;
use super::site::Objects;
use super::state;
use super::status::status;
use crate::cluster::{PodsOf, SourceName};
use serde::Serialize;

/// The requirements, in groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Checks {
    /// Whether Egret is installed.
    pub is_installed: bool,
    /// The requirements.
    pub checks: Vec<Check>,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// The group that it belongs to.
    pub group: &'static str,
    /// What is required.
    pub name: String,
    /// Whether it is met.
    pub state: CheckState,
    /// What was found.
    pub found: String,
    /// What to do; empty if there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// Whether a requirement is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// Met.
    Ok,
    /// It cannot be told.
    Unknown,
    /// Not met, and a part of Egret works less well or not at all.
    Warning,
    /// Not met, and Egret does not work.
    Failed,
}

impl Check {
    pub(super) fn new(
        group: &'static str,
        name: &str,
        state: CheckState,
        found: impl ToString,
        remedy: impl ToString,
    ) -> Self {
        Check { group, name: name.to_owned(), state, found: found.to_string(), remedy: remedy.to_string() }
    }

    pub(super) fn ok(group: &'static str, name: &str, found: impl ToString) -> Self {
        Check::new(group, name, CheckState::Ok, found, "")
    }

    pub(super) fn unknown(group: &'static str, name: &str, found: impl ToString, remedy: impl ToString) -> Self {
        Check::new(group, name, CheckState::Unknown, found, remedy)
    }

    pub(super) fn warning(group: &'static str, name: &str, found: impl ToString, remedy: impl ToString) -> Self {
        Check::new(group, name, CheckState::Warning, found, remedy)
    }

    pub(super) fn failed(group: &'static str, name: &str, found: impl ToString, remedy: impl ToString) -> Self {
        Check::new(group, name, CheckState::Failed, found, remedy)
    }
}

impl Checks {
    /// Whether a requirement fails.
    pub fn has_failed(&self) -> bool {
        self.checks.iter().any(|check| check.state == CheckState::Failed)
    }
}

/// Checks everything. With `before`, only what concerns the time before an installation.
///
/// # Errors
/// There are no credentials, or the API server cannot be reached.
pub async fn check(source: &SourceName, before: bool) -> anyhow::Result<Checks> {
    let objects = Objects::open(source).await?;
    let mut all = Vec::new();
    if let Objects::Kube(client) = &objects {
        all.push(installed::api_server(client).await?);
    }
    let nodes = nodes::read(&objects).await?;
    all.extend(nodes::checks(&nodes));
    let found = objects.read(&cni::OBJECTS).await;
    all.extend(of_cni(&cni(&found), &found.unread.values().cloned().collect::<Vec<_>>()));
    all.extend(others::checks(&objects.read(&others::OBJECTS).await));
    let definitions = installed::definitions(&objects).await;
    let is_installed = definitions.is_installed || matches!(objects, Objects::Dir(_));
    if is_installed && !before {
        all.extend(definitions.checks);
        all.extend(installed::workloads(&objects).await.checks);
        match state::read(source, PodsOf::Nobody).await {
            Ok(state) => all.extend(of_status(&status(&state, None))),
            Err(e) => all.push(Check::new(
                "state",
                "objects are readable",
                CheckState::Failed,
                format!("{e:#}"),
                "correct what the message names",
            )),
        }
    }
    Ok(Checks { is_installed, checks: all })
}

/// What of Egret is installed.
pub(super) struct Installation {
    /// Definitions and workloads.
    pub(super) checks: Vec<Check>,
    /// The image of the nodes' daemons.
    pub(super) image: Option<String>,
}

/// Checks the API server, the definitions and the workloads.
///
/// # Errors
/// The API server cannot be reached.
pub(super) async fn installation(objects: &Objects) -> anyhow::Result<Installation> {
    let mut checks = Vec::new();
    if let Objects::Kube(client) = objects {
        checks.push(installed::api_server(client).await?);
    }
    checks.extend(installed::definitions(objects).await.checks);
    let workloads = installed::workloads(objects).await;
    checks.extend(workloads.checks);
    Ok(Installation { checks, image: workloads.image })
}

fn of_cni(cni: &cni::Cni, unread: &[String]) -> Vec<Check> {
    let (group, name) = ("network", "the CNI uses netfilter");
    let mut all: Vec<Check> = cni
        .problems
        .iter()
        .map(|p| Check::new(group, name, CheckState::Failed, format!("{}: {}", p.object, p.message), &p.remedy))
        .collect();
    if all.is_empty() {
        all.push(match cni.names.as_slice() {
            [] => Check::new(
                group,
                name,
                CheckState::Unknown,
                match unread.first() {
                    Some(why) => format!("no CNI was recognised; {why}"),
                    None => "no CNI was recognised".to_owned(),
                },
                "see docs/limits.md for CNIs that bypass netfilter",
            ),
            names => Check::ok(group, name, names.join(", ")),
        });
    }
    all
}

/// The problems that `status` finds.
fn of_status(status: &super::status::Status) -> Vec<Check> {
    let group = "state";
    let mut all: Vec<Check> = Vec::new();
    for problem in &status.problems {
        let state = if problem.severity == Severity::Error { CheckState::Failed } else { CheckState::Warning };
        let found = format!("{}: {}", problem.reason, problem.message);
        all.push(Check::new(group, &problem.object, state, found, &problem.remedy));
    }
    if all.is_empty() {
        all.push(Check::ok(group, "gateways, nodes and policies", "no problems"));
    }
    all
}

#[cfg(test)]
mod tests;
