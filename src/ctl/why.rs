//! `kubectl egret why`: with which address a pod leaves the cluster, and why. `egretd why` says the same.

use super::daemon::{self, Says};
use super::output::{Show, View};
use super::state;
use crate::cluster::{self, PodsOf, Scope, SourceName};
use crate::model::target::Target;
use crate::model::{Cluster, ObjectKey};
use crate::node_plan::why::why;
use anyhow::Context;
use ipnetwork::IpNetwork;
use serde::Serialize;
use std::net::IpAddr;
use std::path::Path;

/// The explanation, the pod's node, and what that says.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explained {
    /// The pod, `namespace/name`.
    pub pod: String,
    /// The pod's node, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Lines of text.
    #[serde(rename = "explanation")]
    pub text: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// What the daemon on the node says now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub now: Option<Says>,
    /// Why the daemon could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_asked: Option<String>,
}

impl Explained {
    /// Asks the daemon on the pod's node. If it cannot be asked, the result says why.
    pub async fn ask_daemon(&mut self, source: &SourceName, run_dir: &Path) {
        let Some(node) = self.node.clone() else { return };
        match daemon::ask(source, run_dir, &node, &self.addresses).await {
            Ok(says) => self.now = Some(says),
            Err(e) => self.not_asked = Some(format!("{e:#}")),
        }
    }
}

impl Show for Explained {
    fn text(&self, _: View) -> String {
        let node = self.node.as_deref().unwrap_or_default();
        let now = match (&self.now, &self.not_asked) {
            (Some(says), _) => {
                let lines: String = says.lines().iter().map(|line| format!("  {line}\n")).collect();
                format!("The daemon on node {node} says now:\n{lines}")
            }
            (None, Some(why)) => format!("The daemon on node {node} was not asked: {why}\n"),
            (None, None) => String::new(),
        };
        self.text.clone() + &now
    }
}

/// Explains how a pod leaves the cluster, or what happens to its packets to one destination. `direct` are networks that
/// no policy covers, as the nodes' daemons are told them.
///
/// # Errors
/// The cluster cannot be read, or has no such pod.
pub async fn explain(
    source: &SourceName,
    pod: &ObjectKey,
    to: Option<Target>,
    direct: &[IpNetwork],
) -> anyhow::Result<Explained> {
    let open = state::open(source, PodsOf::One(pod.clone())).await?;
    let mut cluster = Cluster::clone(&open.snapshots.borrow());
    let mut unread = Vec::clone(&open.problems.borrow());
    let of_pod = cluster.pods.get(pod).cloned();
    let node = of_pod.as_ref().and_then(|pod| pod.node.as_deref().map(str::to_owned));
    let addresses = of_pod.map(|pod| pod.addresses.to_vec()).unwrap_or_default();
    let explained =
        |text: String, node| Explained { pod: pod.to_string(), node, text, addresses, now: None, not_asked: None };
    // With a directory as the source, all scopes are the same.
    if let (Some(target), SourceName::Kube(_)) = (&to, source) {
        // Only a node's scope has the cluster's own networks, and the other pods of the node.
        let any = || cluster.nodes.keys().next().map(ToString::to_string);
        if let Some(node) = node.clone().or_else(any) {
            let as_node = state::open_as(source, Scope::Node(node)).await?.snapshots.borrow().clone();
            cluster.inside = as_node.inside.clone();
            cluster.services = as_node.services.clone();
            cluster.endpoints = as_node.endpoints.clone();
            for (key, neighbour) in as_node.pods.iter() {
                cluster.pods.insert(key.clone(), neighbour.clone());
            }
        }
        if let Err(e) = cluster::add_services(source, &mut cluster, target).await {
            unread.push(format!("{e:#}; a Service's address is explained as if it had no endpoints"));
        }
    }
    let of_site = state::problems_of_site(source).await?;
    let of_site: String = of_site.iter().map(|p| format!("{}: {}; {}\n", p.object, p.message, p.remedy)).collect();
    let text = why(&cluster, pod, to, direct).map(|text| text + &of_site);
    if unread.is_empty() {
        return Ok(explained(text?, node));
    }
    let unread =
        format!("these objects cannot be read, and nodes may use their earlier versions:\n  {}", unread.join("\n  "));
    let text = text.with_context(|| unread.clone())? + &unread + "\n";
    Ok(explained(text, node))
}
