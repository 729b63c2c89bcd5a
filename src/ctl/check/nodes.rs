//! The nodes, by their Node objects.

use super::{Check, CheckState};
use crate::check::KERNEL;
use crate::ctl::output::{count, few};
use crate::ctl::site::{Objects, Wanted};
use anyhow::Context;
use serde_json::Value;
use std::collections::BTreeMap;

/// What a Node says of its host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) kernel: String,
    pub(super) runtime: String,
    pub(super) system: String,
    pub(super) has_pod_networks: bool,
}

/// Reads the nodes.
///
/// # Errors
/// They cannot be read.
pub(super) async fn read(objects: &Objects) -> anyhow::Result<Vec<Host>> {
    let nodes = match objects {
        Objects::Kube(client) => client.list("/api/v1/nodes", "").await.context("cannot read the nodes")?.items,
        Objects::Dir(_) => {
            let wanted = Wanted { path: "/api/v1/nodes", kind: "Node", name: "" };
            objects.read(&[wanted]).await.all(&wanted).to_vec()
        }
    };
    Ok(nodes.iter().map(host).collect())
}

fn host(node: &Value) -> Host {
    let info = &node["status"]["nodeInfo"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Host {
        name: text(&node["metadata"]["name"]),
        kernel: text(&info["kernelVersion"]),
        runtime: text(&info["containerRuntimeVersion"]),
        system: format!("{}/{}", text(&info["operatingSystem"]), text(&info["architecture"])),
        has_pod_networks: node["spec"]["podCIDR"].is_string() || node["spec"]["podCIDRs"].is_array(),
    }
}

/// The requirements of nodes. Nodes with the same answer are one check.
pub(super) fn checks(nodes: &[Host]) -> Vec<Check> {
    let told: Vec<&Host> = nodes.iter().filter(|host| !host.kernel.is_empty()).collect();
    if told.is_empty() {
        let found = "no Node tells its kernel";
        return vec![Check::new("nodes", "kernel", CheckState::Unknown, found, "run `egretd check` on the nodes")];
    }
    vec![kernels(&told), runtimes(&told), systems(&told), networks(nodes)]
}

fn names(hosts: &[&&Host]) -> String {
    few(hosts.iter().map(|host| host.name.as_str()), 3)
}

fn kernels(nodes: &[&Host]) -> Check {
    let name = format!("kernel {}.{} or newer", KERNEL.0, KERNEL.1);
    let is_old = |host: &&&Host| version(&host.kernel).is_none_or(|version| version < KERNEL);
    let old: Vec<&&Host> = nodes.iter().filter(is_old).collect();
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    nodes.iter().for_each(|host| *kinds.entry(&host.kernel).or_default() += 1);
    let kinds: Vec<String> = kinds.iter().map(|(kernel, n)| format!("{kernel} ({n})")).collect();
    if old.is_empty() {
        return Check::ok("nodes", &name, few(&kinds, 3));
    }
    let found = format!("{} on {}", old[0].kernel, names(&old));
    let remedy = "run `egretd check` there: it tries what Egret needs, which some distributions have added to older \
                  kernels; else use a newer kernel";
    Check::new("nodes", &name, CheckState::Warning, found, remedy)
}

/// `6.8.0-45-generic` to 6 and 8.
fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut parts = kernel.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn runtimes(nodes: &[&Host]) -> Check {
    let name = "container runtime with CNI";
    let is_known = |host: &&Host| ["containerd://", "cri-o://"].iter().any(|known| host.runtime.starts_with(known));
    let others: Vec<&&Host> = nodes.iter().filter(|host| !is_known(host)).collect();
    let mut kinds: Vec<&str> = nodes.iter().map(|host| host.runtime.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    if others.is_empty() {
        return Check::ok("nodes", name, few(&kinds, 3));
    }
    let found = format!("{:?} on {}", others[0].runtime, names(&others));
    Check::new(
        "nodes",
        name,
        CheckState::Warning,
        found,
        "Egret was tried with containerd and CRI-O only; try it on one node first",
    )
}

fn systems(nodes: &[&Host]) -> Check {
    let name = "Linux on amd64 or arm64";
    let is_known = |host: &&Host| ["linux/amd64", "linux/arm64"].contains(&host.system.as_str());
    let others: Vec<&&Host> = nodes.iter().filter(|host| !is_known(host)).collect();
    if others.is_empty() {
        return Check::ok("nodes", name, count(nodes.len(), "node", "nodes"));
    }
    let found = format!("{} on {}", others[0].system, names(&others));
    Check::new(
        "nodes",
        name,
        CheckState::Warning,
        found,
        "no daemon of Egret's runs there, and policies have no effect on pods of these nodes",
    )
}

fn networks(nodes: &[Host]) -> Check {
    let name = "pods' networks are known";
    let without: Vec<&Host> = nodes.iter().filter(|host| !host.has_pod_networks).collect();
    let without: Vec<&&Host> = without.iter().collect();
    if without.is_empty() {
        return Check::ok("nodes", name, "each node has podCIDRs");
    }
    let remedy = "if the CNI is not Calico, name the pods' networks to the daemons (EGRET_DIRECT): policies take the \
                  pods of other nodes for destinations outside the cluster otherwise";
    Check::new("nodes", name, CheckState::Warning, format!("no podCIDRs in {}", names(&without)), remedy)
}
