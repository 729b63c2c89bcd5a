//! The state of a running daemon, as `egretd state` prints it: what is desired, and what the node observes.

use crate::api::AddressPair;
use anyhow::{Context, Result};
use egret_cni::protocol::PROTOCOL;
use egret_cni::run_dir::SOCKET;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::{BufRead, BufReader, Read, Write as _};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The verb of the request.
pub(super) const VERB: &str = "STATE";
/// How long to wait for the daemon. A pass over ten thousand allocations takes less.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The largest response, bytes. A node with 16,000 allocations has some 5 MB.
const MAX_RESPONSE: u64 = 64 << 20;

/// The state of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeState {
    /// The node's name.
    pub node: String,
    /// Why the kernel is not in sync, or the node is not ready; `None` if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// The number of passes since the daemon's start.
    pub passes: u64,
    /// The steps that the next pass runs because they have failed or wait for one that has, with what they apply.
    pub pending: BTreeMap<String, String>,
    /// What the kernel is to have.
    pub desired: Desired,
    /// What the node has observed.
    pub observed: Observed,
}

/// The desired state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Desired {
    /// The egress IPs, by egress ID.
    pub egress_ips: BTreeMap<u16, DesiredEgressIp>,
    /// Whether the node has its health address, so that other nodes find it alive.
    pub health_address: bool,
    /// The uplinks whose health addresses the node has.
    pub uplinks: Vec<String>,
    /// The networks that no policy covers.
    pub direct: Vec<String>,
}

/// What a node does for an egress IP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredEgressIp {
    /// The gateway.
    pub gateway: String,
    /// The addresses.
    pub address: AddressPair,
    /// Where the traffic of this node's pods goes: `local`, the tunnel MAC address of the owner, or `dropped` with the
    /// reason.
    pub traffic: String,
    /// The name of the owner, if it is another node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Packets that this node's pods have sent by it since the node's tables have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_packets: Option<u64>,
    /// Whether the address is to be on this node.
    pub here: bool,
}

/// What the node has observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    /// The address to which other nodes send tunnel packets, if the tunnel is in sync.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnel_address: Option<IpAddr>,
    /// The addresses of the node.
    pub addresses: Vec<IpAddr>,
    /// The egress IPs that are not in standby, by egress ID.
    pub egress_ips: BTreeMap<u16, ObservedEgressIp>,
    /// The gateway nodes that do not answer. It includes this node while it cannot hold egress IPs.
    pub dead_nodes: Vec<String>,
    /// The uplinks that nodes have lost.
    pub lost_uplinks: BTreeMap<String, Vec<String>>,
    /// The number of selected pods, of isolated ones among them, and of others.
    pub pods: Pods,
    /// The selected pods, by the host's end of their veth pairs or by their attachment.
    pub selected: Vec<SelectedPod>,
    /// What the kernel has refused.
    pub faults: BTreeMap<String, String>,
    /// Packets that were dropped, by reason, since the node's tables exist; without reasons of which there are none.
    #[serde(default)]
    pub dropped_packets: BTreeMap<String, u64>,
}

/// An egress IP on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObservedEgressIp {
    /// `Owner`, `TakenOver`, `InGracePeriod`, `Contested`, `Conflict`, `Relinquished` or `Standby`.
    pub state: String,
    /// Whether the address is on this node.
    pub here: bool,
    /// Why it cannot be added, if it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// The number of pods in each state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pods {
    /// Policies select them.
    pub selected: i64,
    /// Their policies are unknown.
    pub isolated: i64,
    /// No policy selects them.
    pub free: i64,
    /// Policies select them, and they have no veth on the host.
    pub unmanaged: i64,
}

/// A pod that the tables enforce policies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelectedPod {
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The name of its policy chain in the tables.
    pub policy_chain: String,
    /// The egress IDs that it can use.
    pub egress_ids: Vec<u16>,
    /// Whether it is isolated.
    pub isolated: bool,
}

#[derive(Serialize)]
struct StateRequest {
    version: u32,
    verb: &'static str,
}

/// The response of a daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StateResponse {
    pub(super) version: u32,
    #[serde(default)]
    pub(super) state: Option<NodeState>,
}

/// Asks the daemon on this host for its state, through the plugins' socket in its run directory.
///
/// # Errors
/// The daemon does not run, has not been in sync since its start, or is of another version.
pub fn ask(run_dir: &Path) -> Result<NodeState> {
    let path = run_dir.join(SOCKET);
    let remedy = || {
        format!(
            "cannot ask the daemon at {}; it opens the socket when the kernel is in sync for the first time: look at its \
             log and at /readyz, or give its --run-dir",
            path.display()
        )
    };
    let mut stream = UnixStream::connect(&path).with_context(remedy)?;
    stream.set_read_timeout(Some(TIMEOUT)).with_context(remedy)?;
    let mut request = serde_json::to_vec(&StateRequest { version: PROTOCOL, verb: VERB })?;
    request.push(b'\n');
    stream.write_all(&request).with_context(remedy)?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_RESPONSE)).read_until(b'\n', &mut line).with_context(remedy)?;
    let response = serde_json::from_slice::<StateResponse>(&line).with_context(|| {
        format!("the daemon at {} does not know the request; use the egretd of its release", path.display())
    })?;
    response.state.with_context(|| {
        format!("the daemon at {} cannot tell its state; use the egretd of its release", path.display())
    })
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Observed { pods, .. } = &self.observed;
        match &self.not_ready {
            None => writeln!(f, "node {}: in sync after {} passes", self.node, self.passes)?,
            Some(why) => writeln!(f, "node {}: not ready after {} passes: {why}", self.node, self.passes)?,
        }
        for (step, applies) in &self.pending {
            writeln!(f, "  pending: {step}: {applies}")?;
        }
        let Pods { selected, isolated, free, unmanaged } = pods;
        writeln!(f, "pods: {selected} selected, {isolated} isolated, {free} free, {unmanaged} unmanaged")?;
        if let Some(address) = self.observed.tunnel_address {
            writeln!(f, "tunnel: {address}")?;
        }
        let health = if self.desired.health_address { "answers" } else { "does not answer" };
        writeln!(f, "health: this node {health} probes; uplinks: {}", list(&self.desired.uplinks))?;
        if !self.observed.dead_nodes.is_empty() {
            writeln!(f, "unreachable: {}", list(&self.observed.dead_nodes))?;
        }
        for (node, uplinks) in &self.observed.lost_uplinks {
            writeln!(f, "lost uplinks of {node}: {}", list(uplinks))?;
        }
        for (of, why) in &self.observed.faults {
            writeln!(f, "fault of {of}: {why}")?;
        }
        self.fmt_egress_ips(f)?;
        for pod in &self.observed.selected {
            let SelectedPod { addresses, policy_chain, egress_ids, isolated } = pod;
            let isolated = if *isolated { " isolated" } else { "" };
            writeln!(f, "pod {}: {policy_chain}{isolated}, egress IDs {}", list(addresses), list(egress_ids))?;
        }
        Ok(())
    }
}

impl NodeState {
    fn fmt_egress_ips(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, desired) in &self.desired.egress_ips {
            let DesiredEgressIp { gateway, address, traffic, here, .. } = desired;
            let mut addresses = String::new();
            for address in address.ipv4.map(IpAddr::from).into_iter().chain(address.ipv6.map(IpAddr::from)) {
                let separator = if addresses.is_empty() { "" } else { ", " };
                write!(addresses, "{separator}{address}")?;
            }
            let place = |here| if here { "here" } else { "elsewhere" };
            let observed = self.observed.egress_ips.get(id);
            let (state, is_here) = observed.map_or(("Standby", false), |observed| (&*observed.state, observed.here));
            write!(
                f,
                "egress IP {id} ({addresses}, gateway {gateway}): desired {}, traffic {traffic}{}; ",
                place(*here),
                desired.owner.as_ref().map(|node| format!(" (node {node})")).unwrap_or_default()
            )?;
            writeln!(f, "observed {}, {state}", place(is_here))?;
            if let Some(why) = observed.and_then(|observed| observed.refused.as_ref()) {
                writeln!(f, "  refused: {why}")?;
            }
        }
        Ok(())
    }
}

fn list<T: fmt::Display>(all: &[T]) -> String {
    if all.is_empty() { "none".to_owned() } else { all.iter().map(T::to_string).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests;
