//! What the daemon of one node says now, for one pod.
//!
//! The daemon answers on its socket, which only root on its host can open. In a cluster the command runs
//! `egretd state --json` in the daemon's container, by the API server (`pods/exec`), with the user's own rights. Nothing
//! listens on the network for it. On a host without Kubernetes it asks the socket itself.

use crate::cluster::kube::Client;
use crate::cluster::{KubeOptions, SourceName};
use anyhow::{Context, anyhow, bail};
use egret_cni::protocol::PROTOCOL;
use egret_cni::run_dir::SOCKET;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest answer, bytes. A node with 16,000 egress IPs has some 5 MB.
const LONGEST: u64 = 64 << 20;

/// What the daemon's answer has that concerns a pod; the rest of it is passed over.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeStateResponse {
    node: String,
    not_ready: Option<String>,
    desired: Desired,
    observed: Observed,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Desired {
    egress_ips: BTreeMap<u16, DesiredEgressIp>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DesiredEgressIp {
    address: crate::api::AddressPair,
    traffic: String,
    owner: Option<String>,
    sent_packets: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Observed {
    dead_nodes: Vec<String>,
    selected: Vec<SelectedPod>,
    faults: BTreeMap<String, String>,
    dropped_packets: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SelectedPod {
    addresses: Vec<IpAddr>,
    policy_chain: String,
    egress_ids: Vec<u16>,
    isolated: bool,
}

/// What the daemon says of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Says {
    /// The node.
    pub node: String,
    /// Why the node is not in sync.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Whether the kernel's tables have the pod.
    pub is_in_kernel: bool,
    /// Whether the pod is isolated.
    pub is_isolated: bool,
    /// The name of the pod's policy chain in the tables.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub policy_chain: String,
    /// The pod's egress IPs.
    pub egress_ips: BTreeMap<String, SaysOfEgressIp>,
    /// Gateway nodes that do not answer this node.
    pub unreachable_peers: Vec<String>,
    /// What the kernel has refused.
    pub faults: BTreeMap<String, String>,
    /// Packets that the node has dropped, of all pods, by reason.
    pub dropped_packets: BTreeMap<String, u64>,
}

/// What the daemon says of an egress IP of the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SaysOfEgressIp {
    /// Where the traffic goes: `local`, the tunnel MAC address of the owner, or `dropped` with the reason.
    pub traffic: String,
    /// The owner, if it is another node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Packets that this node's pods have sent by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_packets: Option<u64>,
}

/// Asks the daemon of a node about the pod with these addresses.
///
/// # Errors
/// It cannot be asked, with the reason.
pub async fn ask(source: &SourceName, run_dir: &Path, node: &str, addresses: &[IpAddr]) -> anyhow::Result<Says> {
    let text = match source {
        SourceName::Kube(options) => timeout(PATIENCE, by_exec(options, node))
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer within {} s", PATIENCE.as_secs())))?,
        SourceName::Dir(_) => by_socket(run_dir)?,
    };
    let answer: NodeStateResponse = serde_json::from_str(&text).context("the daemon's answer cannot be read")?;
    if answer.node != node {
        bail!("the daemon on this host is that of node {}; run the command on node {node}", answer.node);
    }
    Ok(about(answer, addresses))
}

fn about(answer: NodeStateResponse, addresses: &[IpAddr]) -> Says {
    let NodeStateResponse { node, not_ready, desired, observed } = answer;
    let pod = observed.selected.into_iter().find(|pod| pod.addresses.iter().any(|a| addresses.contains(a)));
    let is_in_kernel = pod.is_some();
    let pod = pod.unwrap_or_default();
    let egress_ips = pod.egress_ids.iter().filter_map(|id| {
        let of = desired.egress_ips.get(id)?;
        let all: Vec<IpAddr> = crate::model::addresses_of(&of.address).collect();
        let DesiredEgressIp { traffic, owner, sent_packets, .. } = of.clone();
        Some((super::pods::list(&all), SaysOfEgressIp { traffic, owner, sent_packets }))
    });
    Says {
        node,
        not_ready,
        is_in_kernel,
        is_isolated: pod.isolated,
        policy_chain: pod.policy_chain,
        egress_ips: egress_ips.collect(),
        unreachable_peers: observed.dead_nodes,
        faults: observed.faults,
        dropped_packets: observed.dropped_packets,
    }
}

/// The daemon's pods on a node, one if all is well.
async fn pods_on(client: &Client, node: &str) -> anyhow::Result<Value> {
    let path = format!(
        "/api/v1/pods?labelSelector=app.kubernetes.io%2Fname%3Degret%2Capp.kubernetes.io%2Fcomponent%3Dnode\
         &fieldSelector=spec.nodeName%3D{node}"
    );
    client.get(&path).await.context("cannot look for the daemon's pod")
}

/// Whether a node's daemon is ready.
///
/// # Errors
/// Its pod cannot be read.
pub(super) async fn is_ready(client: &Client, node: &str) -> anyhow::Result<bool> {
    let pods = pods_on(client, node).await?;
    let mut conditions = pods["items"][0]["status"]["conditions"].as_array().into_iter().flatten();
    Ok(conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
}

/// Runs a command in the daemon's container on the node. Returns it with the pod's name.
pub(super) async fn exec(
    client: &Client,
    node: &str,
    command: &[&str],
    stdin: bool,
) -> anyhow::Result<(AttachedProcess, String)> {
    let pods = pods_on(client, node).await?;
    let name = |field: &str| pods["items"][0]["metadata"][field].as_str().map(str::to_owned);
    let (namespace, name) = name("namespace").zip(name("name")).with_context(|| {
        format!("the DaemonSet egret-node has no pod on node {node}; see why with kubectl describe")
    })?;
    let api: Api<Pod> = Api::namespaced(client.of_kube(), &namespace);
    let parameters = AttachParams::default().container("node").stdin(stdin).stderr(true);
    let command = command.iter().copied();
    let refused = || {
        let command: Vec<&str> = command.clone().take(2).collect();
        format!(
            "cannot run `{}` in pod {namespace}/{name}: it needs the right to create pods/exec there",
            command.join(" ")
        )
    };
    let process = api.exec(&name, command.clone(), &parameters).await.with_context(refused)?;
    Ok((process, format!("{namespace}/{name}")))
}

/// Runs `egretd state` in the daemon's container on the node.
async fn by_exec(options: &KubeOptions, node: &str) -> anyhow::Result<String> {
    let client = Client::connect(options).await?;
    let (mut process, pod) = exec(&client, node, &["egretd", "state", "--json"], false).await?;
    let (mut out, mut err) = (String::new(), String::new());
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let read = async {
        if let Some(stdout) = stdout {
            stdout.take(LONGEST).read_to_string(&mut out).await?;
        }
        std::io::Result::Ok(())
    };
    let complain = async {
        if let Some(stderr) = stderr {
            stderr.take(LONGEST).read_to_string(&mut err).await?;
        }
        std::io::Result::Ok(())
    };
    let (read, complained) = tokio::join!(read, complain);
    read.and(complained).context("the answer broke off")?;
    if out.is_empty() {
        bail!("egretd in pod {pod} says: {}", err.trim());
    }
    Ok(out)
}

/// Asks the daemon on this host.
fn by_socket(run_dir: &Path) -> anyhow::Result<String> {
    let path = run_dir.join(SOCKET);
    let cannot = || {
        format!("cannot ask the daemon of this host at {}; run the command on the pod's node, as root", path.display())
    };
    let mut stream = UnixStream::connect(&path).with_context(cannot)?;
    stream.set_read_timeout(Some(PATIENCE)).with_context(cannot)?;
    writeln!(stream, r#"{{"version":{PROTOCOL},"verb":"STATE"}}"#).with_context(cannot)?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line).with_context(cannot)?;
    let answer: Value = serde_json::from_str(&line).with_context(cannot)?;
    match answer.get("state").filter(|state| !state.is_null()) {
        Some(state) => Ok(state.to_string()),
        None => bail!("the daemon at {} is of another version", path.display()),
    }
}

impl Says {
    /// The lines for people.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(why) = &self.not_ready {
            lines.push(format!("it is not in sync: {why}"));
        }
        lines.push(match (self.is_in_kernel, self.is_isolated) {
            (false, _) => "its kernel has no rules for the pod: the pod leaves as if Egret were not there".to_owned(),
            (true, true) => format!("its kernel has the pod, isolated (chain {})", self.policy_chain),
            (true, false) => format!("its kernel has the pod (chain {})", self.policy_chain),
        });
        for (egress_ip, says) in &self.egress_ips {
            let goes = match (&*says.traffic, &says.owner) {
                ("local", _) => format!("it holds {egress_ip} itself"),
                (some, _) if some.starts_with("dropped") => format!("packets for {egress_ip} are {some}"),
                (_, Some(node)) => format!("packets for {egress_ip} go through the tunnel to node {node}"),
                (mac, None) => format!("packets for {egress_ip} go through the tunnel to {mac}"),
            };
            let sent = says.sent_packets.map(|n| format!("; pods of this node have sent {}", packets(n)));
            lines.push(goes + &sent.unwrap_or_default());
        }
        if !self.dropped_packets.is_empty() {
            let dropped = self.dropped_packets.iter().map(|(reason, n)| format!("{reason} {n}"));
            let dropped: Vec<String> = dropped.collect();
            lines.push(format!("it has dropped packets, of all pods: {}", dropped.join(", ")));
        }
        if !self.unreachable_peers.is_empty() {
            lines.push(format!("it does not reach gateway nodes {}", self.unreachable_peers.join(", ")));
        }
        lines.extend(self.faults.iter().map(|(of, why)| format!("it had to skip {of}: {why}")));
        lines
    }
}

fn packets(n: u64) -> String {
    if n == 1 { "1 packet".to_owned() } else { format!("{n} packets") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(text: &str, address: &str) -> Says {
        about(serde_json::from_str(text).unwrap(), &[address.parse().unwrap()])
    }

    const STATE: &str = r#"{"node": "n1", "passes": 12, "pending": {}, "desired": {"healthAddress": true, "uplinks": [],
        "egressIps": {"7": {"gateway": "g", "address": {"ipv4": "192.0.2.50"}, "traffic": "02:00:00:00:00:15", "owner": "g1",
        "sentPackets": 12, "here": false}}},
        "observed": {"deadNodes": ["g2"], "selected": [{"addresses": ["10.244.1.2"], "policyChain": "policy-1",
        "egressIds": [7], "isolated": false}], "faults": {"node n3": "why"},
        "droppedPackets": {"blocked": 3}}}"#;

    #[test]
    fn what_concerns_the_pod_is_taken_from_the_daemons_state() {
        let lines = says(STATE, "10.244.1.2").lines();
        let wanted = [
            "its kernel has the pod (chain policy-1)",
            "packets for 192.0.2.50 go through the tunnel to node g1; pods of this node have sent 12 packets",
            "it has dropped packets, of all pods: blocked 3",
            "it does not reach gateway nodes g2",
            "it had to skip node n3: why",
        ];
        assert_eq!(lines, wanted);
    }

    #[test]
    fn a_pod_that_the_kernel_does_not_have_is_named() {
        assert!(says(STATE, "10.244.1.9").lines()[0].contains("its kernel has no rules for the pod"));
        let not_ready = r#"{"node": "n1", "notReady": "no rights"}"#;
        assert_eq!(says(not_ready, "10.244.1.9").lines()[0], "it is not in sync: no rights");
    }
}
