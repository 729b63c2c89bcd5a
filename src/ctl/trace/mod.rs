//! `kubectl egret trace`: sends one packet as if a pod had sent it, or waits for the pod's next one, and shows its way
//! over the pod's node and the owner, and the reply's.

mod stream;
mod text;
mod way;

pub use way::{Egress, Hop, NotTraced, PacketOutcome, Reply, Traced};

use super::{state, why};
use crate::api;
use crate::cluster::kube::Client;
use crate::cluster::{PodsOf, SourceName};
use crate::model::ObjectKey;
use crate::model::target::Target;
use crate::model::trace::{Armed, MAX_SECONDS, Protocol, TraceEvent, TraceSpec};
use anyhow::{Context, bail};
use futures_util::future::join_all;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use stream::Stream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use way::Collected;

/// Source ports of probes: above Linux's default range for clients (`ip_local_port_range`), which ends at 60999.
const PORTS: std::ops::Range<u16> = 61_000..65_500;
/// How long the daemon may take to send the probe.
const TO_SEND: Duration = Duration::from_secs(5);
/// How long to wait for further steps when the packet's fate is known.
const LINGER: Duration = Duration::from_millis(200);

/// What is to be traced.
#[derive(Clone, Debug)]
pub struct TraceOptions {
    /// The pod.
    pub pod: ObjectKey,
    /// The destination's address.
    pub to: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination's port; 0 for ICMP.
    pub port: u16,
    /// Whether to wait for the pod's own next packet instead of sending one.
    pub wait: bool,
    /// How long to wait for the reply, or for the packet.
    pub patience: Duration,
    /// Networks that no policy covers, as the nodes' daemons are told them.
    pub direct: Vec<IpNetwork>,
    /// Without Kubernetes: the run directories of daemons on this host.
    pub run_dirs: Vec<PathBuf>,
}

/// Traces a packet. `say` is told what is being waited for.
///
/// # Errors
/// The cluster has no such pod, or the daemon on its node cannot be asked, or refuses.
pub async fn trace(source: &SourceName, asked: &TraceOptions, say: &dyn Fn(&str)) -> anyhow::Result<Traced> {
    let request = request(source, asked).await?;
    let mut open = open(source, &request, &asked.run_dirs).await?;
    let not_traced = std::mem::take(&mut open.not_traced);
    if asked.wait {
        let seconds = asked.patience.as_secs();
        say(&format!("waiting for the pod's next packet to {}, {seconds} s", way::target(&request)));
    } else if let Some(stream) = open.streams.get_mut(&request.node) {
        stream.go().await?;
    }
    let collected = collect(open.streams, &request, asked).await?;
    let mut traced = way::traced(&request, &open.of_pod, collected, not_traced);
    if traced.outcome == PacketOutcome::Dropped || traced.outcome == PacketOutcome::NotSent {
        traced.explanation = explain(source, asked).await;
    }
    Ok(traced)
}

/// What `why` says of the destination.
async fn explain(source: &SourceName, asked: &TraceOptions) -> Option<String> {
    let protocol = match asked.protocol {
        Protocol::Tcp => Some(api::Protocol::Tcp),
        Protocol::Udp => Some(api::Protocol::Udp),
        Protocol::Icmp => None,
    };
    let target = Target { address: asked.to, port: protocol.map(|protocol| (protocol, asked.port)) };
    Some(why::explain(source, &asked.pod, Some(target), &asked.direct).await.ok()?.text)
}

async fn request(source: &SourceName, asked: &TraceOptions) -> anyhow::Result<TraceSpec> {
    let key = &asked.pod;
    let open = state::open(source, PodsOf::One(key.clone())).await?;
    let cluster = open.snapshots.borrow().clone();
    let pod = cluster.pods.get(key).with_context(|| format!("the cluster has no pod {key}; write NAMESPACE/NAME"))?;
    let Some(node) = pod.node.as_deref() else { bail!("pod {key} is on no node yet") };
    if pod.host_network {
        bail!("pod {key} uses its host's network: it has no veth, and no policy selects it");
    }
    let same_family = |address: &&IpAddr| address.is_ipv4() == asked.to.is_ipv4();
    let Some(address) = pod.addresses.iter().find(same_family) else {
        bail!(
            "pod {key} has no address of the family of {}; its addresses: {}",
            asked.to,
            super::pods::list(&pod.addresses)
        );
    };
    let random = RandomState::new().hash_one(key.to_string()) % u64::from(PORTS.end - PORTS.start);
    Ok(TraceSpec {
        node: node.to_owned(),
        namespace: key.namespace.to_string(),
        pod: key.name.to_string(),
        source: *address,
        destination: asked.to,
        protocol: asked.protocol,
        port: asked.port,
        source_port: (!asked.wait).then_some(PORTS.start + random as u16),
        seconds: (asked.patience + TO_SEND).as_secs().min(MAX_SECONDS),
    })
}

/// The connections to daemons that trace.
struct Open {
    streams: BTreeMap<String, Stream>,
    /// What the daemon on the pod's node said.
    of_pod: Armed,
    not_traced: Vec<NotTraced>,
}

async fn open(source: &SourceName, request: &TraceSpec, run_dirs: &[PathBuf]) -> anyhow::Result<Open> {
    let mut open = match source {
        SourceName::Kube(options) => {
            let client = Client::connect(options).await?;
            let mut stream = Stream::of_node(&client, &request.node).await?;
            let of_pod = stream.ask(request).await.with_context(|| format!("node {}", request.node))?;
            let others = others(&of_pod, request);
            let mut open = Open { streams: [(request.node.clone(), stream)].into(), of_pod, not_traced: Vec::new() };
            let ask = async |node: &String| {
                let mut stream = Stream::of_node(&client, node).await?;
                stream.ask(request).await.map(|_| stream)
            };
            let opened = join_all(others.iter().map(ask)).await;
            for (node, stream) in others.into_iter().zip(opened) {
                match stream {
                    Ok(stream) => drop(open.streams.insert(node, stream)),
                    Err(e) => open.not_traced.push(NotTraced { node, why: format!("{e:#}") }),
                }
            }
            return Ok(open);
        }
        SourceName::Dir(_) => of_host(request, run_dirs).await?,
    };
    for node in others(&open.of_pod, request) {
        if !open.streams.contains_key(&node) {
            let why =
                "its daemon is on another host; without Kubernetes only those of this host can be asked".to_owned();
            open.not_traced.push(NotTraced { node, why });
        }
    }
    Ok(open)
}

/// The nodes that hold the pod's egress IPs, other than the pod's node.
fn others(of_pod: &Armed, request: &TraceSpec) -> BTreeSet<String> {
    let nodes = of_pod.egress_ips.iter().filter_map(|ip| ip.node.clone());
    nodes.filter(|node| *node != request.node).collect()
}

/// Without Kubernetes: the daemons of this host.
async fn of_host(request: &TraceSpec, run_dirs: &[PathBuf]) -> anyhow::Result<Open> {
    let (mut streams, mut of_pod, mut nodes) = (BTreeMap::new(), None, Vec::new());
    for run_dir in run_dirs {
        let mut stream = Stream::of_socket(run_dir).await?;
        let armed = stream.ask(request).await?;
        nodes.push(armed.node.clone());
        streams.insert(armed.node.clone(), stream);
        if armed.node == request.node {
            of_pod = Some(armed);
        }
    }
    let Some(of_pod) = of_pod else {
        bail!("the daemon on this host is that of node {}; run the command on node {}", nodes.join(", "), request.node);
    };
    Ok(Open { streams, of_pod, not_traced: Vec::new() })
}

/// Reads what the daemons tell until the packet's fate is known, or the time is over. The connections are closed then,
/// which ends the traces.
async fn collect(
    streams: BTreeMap<String, Stream>,
    request: &TraceSpec,
    asked: &TraceOptions,
) -> anyhow::Result<Collected> {
    let (sender, mut events) = mpsc::channel(64);
    let mut readers = tokio::task::JoinSet::new();
    for (node, mut stream) in streams {
        let sender = sender.clone();
        readers.spawn(async move {
            loop {
                let event = stream.next().await.and_then(|event| event.context("the daemon has closed the connection"));
                let is_end = event.is_err();
                if sender.send((node.clone(), event)).await.is_err() || is_end {
                    return;
                }
            }
        });
    }
    drop(sender);
    let mut collected = Collected::default();
    let mut deadline = Instant::now() + asked.patience;
    let mut is_sent = asked.wait;
    if !is_sent {
        deadline += TO_SEND;
    }
    loop {
        let received = tokio::select! {
            received = events.recv() => received,
            () = sleep_until(deadline) => return Ok(collected),
        };
        let Some((node, event)) = received else { return Ok(collected) };
        if !is_sent && matches!(event, Ok(TraceEvent::Step(_) | TraceEvent::Sent)) {
            is_sent = true;
            deadline = deadline.min(Instant::now() + asked.patience);
        }
        match event {
            Ok(TraceEvent::Step(step)) => {
                let is_first = collected.steps.is_empty();
                let is_known = collected.add(&node, step, request);
                if is_known {
                    deadline = deadline.min(Instant::now() + LINGER);
                } else if is_first && asked.wait {
                    deadline = Instant::now() + way::PATIENCE.min(asked.patience);
                }
            }
            Ok(TraceEvent::Lost) => collected.is_incomplete = true,
            Ok(TraceEvent::Ended) if node == request.node => return Ok(collected),
            Ok(TraceEvent::Refused { message }) if node == request.node => bail!("node {node}: {message}"),
            Ok(TraceEvent::Refused { message }) => collected.ended.push((node, message)),
            Ok(TraceEvent::Armed(_) | TraceEvent::Sent | TraceEvent::Ended) => {}
            Err(e) if node == request.node && collected.steps.is_empty() => {
                return Err(e.context(format!("node {node}")));
            }
            Err(e) => collected.ended.push((node, format!("{e:#}"))),
        }
    }
}
