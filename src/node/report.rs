//! The node's reports: the status of its EgressNode, and the offline policy snapshot for the plugin.

use super::fast_path;
use super::holding::Holding;
use super::host::Faults;
use crate::api::{
    BlockedAllocation, Condition, DirectNetwork, EgressNodeStatus, FailingProbes, Fault, LostUplink,
    PortsNearlyExhausted, RefusedAllocation, ReportGiven, TakenAllocation,
};
use crate::cluster::Statuses;
use crate::datapath::tunnel::Tunnel;
use crate::model::condition::{Conditions, time};
use crate::model::notice::Notice;
use crate::model::precedence::PolicyIndex;
use crate::model::selector::Name;
use crate::model::shared::Mark;
use crate::model::tunnel_mac;
use crate::model::uplink_key::UplinkKey;
use crate::model::{ObjectKey, PolicyKey};
use crate::node_plan::View;
use crate::node_plan::allocations::Facts;
use egret_cni::offline_policies::{Elsewhere, OfflinePolicies};
use egret_nft::mac;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The pause after a status could not be written.
const AGAIN: Duration = Duration::from_secs(5);

/// The interval between two nodes' writes of status fields that only people read. When a node joins or leaves, those
/// fields change on all nodes, and every node watches every status.
const FOR_PEOPLE: Duration = Duration::from_millis(100);

/// The interval between two source nodes' answers to a gateway's request for reports. The controller waits for them.
const ANSWERS: Duration = Duration::from_millis(2);

/// The condition that says whether the kernel takes what policies need.
const DATAPATH_READY: &str = "DatapathReady";
/// The condition that says whether packets of established connections go the fast way, on nodes that are to have it.
const FAST_PATH: &str = "FastPath";
/// The condition that says whether packets of selected pods arrive at nf_tables, on nodes where other programs' eBPF could
/// take them elsewhere.
const PODS_ARRIVE: &str = "PodsArrive";

/// The largest number of faults in a node's status. A node with a tunnel address of the wrong family has one for every
/// other node.
const FAULTS: usize = 20;
/// At most so many policies over the node's limit are published.
const OVER_LIMIT: usize = 100;

/// Writes the status and the snapshot when they have changed.
pub struct Report {
    statuses: Statuses,
    state_dir: PathBuf,
    published: watch::Sender<Option<Published>>,
    /// The snapshot on disk, and the policies from which it was computed.
    stored: Option<OfflinePolicies>,
    stored_of: Mark<PolicyIndex>,
}

/// The node's own state that the status reports.
pub struct Own<'a> {
    /// The node's tunnel device.
    pub tunnel: Option<&'a Tunnel>,
    pub facts: &'a Facts,
    /// The state of its uplinks.
    pub holding: &'a Holding,
    pub faults: &'a Faults,
    /// The gateway nodes that this source node reports as unreachable.
    pub unreachable: &'a BTreeSet<Name>,
    /// The requests for reports that it answers.
    pub reports_given: Vec<ReportGiven>,
    /// Since when it records connections.
    pub flow_log_since: Option<i64>,
    /// The policies that list too many destinations for this node.
    pub over_limit: &'a BTreeSet<PolicyKey>,
    /// The probes that fail, although no other node's are known to succeed.
    pub failing_probes: Vec<FailingProbes>,
    /// Since when its kernel has been in sync, seconds since the Unix epoch.
    pub in_sync_since: Option<i64>,
    /// The destinations for which its egress IPs have few source ports left.
    pub ports_nearly_exhausted: &'a [PortsNearlyExhausted],
    /// Whether the kernel is in sync, or what it lacks; `None` while neither is known.
    pub kernel: Option<Result<(), &'a str>>,
    /// Whether packets go the fast way; `None` if they are not to.
    pub fast_path: Option<fast_path::Status>,
    /// Whether selected pods' packets arrive at nf_tables, or what takes them elsewhere; `None` if nothing could.
    pub arrivals: Option<Result<(), String>>,
}

/// A status to write.
#[derive(Clone, Debug, PartialEq)]
struct Published {
    status: EgressNodeStatus,
    /// The number of the cluster's nodes.
    nodes: u32,
}

impl Report {
    /// Starts the task that writes the status of the node `name`.
    pub fn new(name: &str, statuses: Statuses, state_dir: PathBuf) -> Self {
        let (published, wanted) = watch::channel(None);
        tokio::spawn(publish(name.to_owned(), statuses.clone(), wanted));
        Report { statuses, state_dir, published, stored: None, stored_of: Mark::default() }
    }

    /// Publishes the node's tunnel address, its egress IPs and the `blocked` allocations. `nodes` is the number of
    /// the cluster's nodes. It does not wait for the write: an API server that does not respond must not keep this
    /// node from taking over egress IPs.
    pub fn publish(&self, view: &View, own: &Own, blocked: Vec<BlockedAllocation>, nodes: usize) {
        let Own {
            tunnel,
            facts,
            holding,
            faults,
            unreachable,
            ref reports_given,
            flow_log_since,
            over_limit,
            kernel,
            ..
        } = *own;
        // A kernel without VXLAN has no tunnel, and that is to be said.
        if tunnel.is_none() && !matches!(kernel, Some(Err(_))) {
            return;
        }
        let refused = facts.refused.iter().map(|(id, why)| RefusedAllocation { id: *id, message: why.clone() });
        let direct = view.networks.origins.iter();
        let direct = direct.map(|(n, from)| DirectNetwork { network: n.to_string(), from: from.to_string() });
        let status = EgressNodeStatus {
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            in_sync_since: own.in_sync_since.map(time),
            tunnel_address: tunnel.map(|tunnel| tunnel.local),
            tunnel_mac: tunnel.map(|tunnel| mac::Shown(tunnel.mac).to_string()),
            tunnel_mtu: tunnel.map(|tunnel| tunnel.mtu),
            answers: tunnel.is_some_and(|tunnel| tunnel.ipv6),
            allocations: view.allocations.held.iter().copied().collect(),
            without_address: view.allocations.without_address.iter().copied().collect(),
            taken: facts.taken.iter().map(|(id, since)| TakenAllocation { id: *id, since: *since }).collect(),
            refused: refused.collect(),
            // Source nodes are asked too, but reports of thousands of them at once would cost more than they are
            // worth.
            unreachable_peers: facts
                .dead
                .iter()
                .filter(|_| view.allocations.is_gateway)
                .map(ToString::to_string)
                .collect(),
            unreachable_gateway_nodes: unreachable.iter().map(ToString::to_string).collect(),
            reports_given: reports_given.clone(),
            flow_log_since,
            lost: holding.lost().map(lost_uplink).collect(),
            failing_probes: own.failing_probes.clone(),
            blocked,
            over_limit: over_limit.iter().take(OVER_LIMIT).map(ToString::to_string).collect(),
            ports_nearly_exhausted: own.ports_nearly_exhausted.to_vec(),
            direct: direct.collect(),
            faults: faults.iter().take(FAULTS).map(Fault::from).collect(),
            conditions: self.conditions(kernel, own),
        };
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        self.published.send_if_modified(|published| {
            let changed = published.as_ref().is_none_or(|before| before.status != status);
            *published = Some(Published { status, nodes });
            changed
        });
    }

    /// The conditions `DatapathReady` and, where they are of use, `FastPath` and `PodsArrive`. A failure that passes does
    /// not change them.
    fn conditions(&self, kernel: Option<Result<(), &str>>, own: &Own) -> Vec<Condition> {
        let published = self.published.borrow();
        let before = published.as_ref().map(|published| published.status.conditions.as_slice()).unwrap_or_default();
        let mut conditions = Conditions::new(before, None, Timestamp::now().as_second());
        match kernel {
            None => return before.to_vec(),
            Some(Ok(())) => conditions.add(DATAPATH_READY, true, "InSync", "the kernel has what policies need"),
            Some(Err(lacking)) => conditions.add(DATAPATH_READY, false, "KernelRefuses", lacking),
        }
        if let Some(status) = &own.fast_path {
            let reason = if status.closed.is_some() { "Closed" } else { "Open" };
            conditions.add(FAST_PATH, status.closed.is_none(), reason, status.to_string());
        }
        match &own.arrivals {
            None => {}
            Some(Ok(())) => conditions.add(PODS_ARRIVE, true, "Arrive", "packets of selected pods arrive at nf_tables"),
            Some(Err(why)) => conditions.add(PODS_ARRIVE, false, "Diverted", why.clone()),
        }
        conditions.finish()
    }

    /// Writes an event about a pod whose veth was not found and which is blocked therefore.
    pub fn unmanaged_pod(&self, pod: &ObjectKey, uid: &str) {
        let note = "blocked: a policy selects this pod, and no veth of its node leads to it; restart it with egret-cni \
                    in the node's CNI configuration, or exclude it from the policy's podSelector";
        self.statuses.pod(pod, uid, Notice::warning("NoHostInterface", note.to_owned()));
    }

    /// Stores the offline policy snapshot, which the plugin reads while the daemon is away.
    ///
    /// # Errors
    /// The snapshot cannot be written.
    pub fn store_offline_policies(&mut self, view: &View) -> io::Result<()> {
        let is_there = OfflinePolicies::is_there(&self.state_dir);
        if view.policies.has(&self.stored_of) && is_there {
            return Ok(());
        }
        let snapshot = offline_policies(&view.policies);
        if self.stored.as_ref() != Some(&snapshot) || !is_there {
            self.stored = None;
            // By an outdated snapshot, the plugin could start a pod that a policy selects now.
            snapshot.store(&self.state_dir).inspect_err(|_| OfflinePolicies::invalidate(&self.state_dir))?;
            self.stored = Some(snapshot);
        }
        self.stored_of = view.policies.mark();
        Ok(())
    }
}

fn lost_uplink((key, why): (&UplinkKey, &str)) -> LostUplink {
    LostUplink {
        interface: key.interface.as_ref().map(ToString::to_string),
        family: key.family().to_owned(),
        gateway: key.gateway.as_ref().map(ToString::to_string),
        message: why.to_owned(),
    }
}

fn offline_policies(index: &PolicyIndex) -> OfflinePolicies {
    let reach = index.reach();
    let texts = |policies: Vec<PolicyKey>| policies.iter().map(ToString::to_string).collect::<Vec<String>>();
    let selectable = reach.selectable.into_iter().map(|(namespace, by)| (namespace.to_string(), texts(by))).collect();
    let elsewhere = (!reach.in_unknown.is_empty()).then(|| Elsewhere {
        policies: texts(reach.in_unknown),
        free: reach.free.iter().map(ToString::to_string).collect(),
    });
    OfflinePolicies::new(selectable, elsewhere)
}

/// The interval between two nodes' writes of this change; `None`: it is written at once.
fn pace(before: &EgressNodeStatus, now: &EgressNodeStatus) -> Option<Duration> {
    // Only gateway nodes report it, and at most once in half a minute.
    let is_urgent = before.ports_nearly_exhausted != now.ports_nearly_exhausted;
    let (before, now) = (before.clone().for_machines(), now.clone().for_machines());
    if before == now && !is_urgent {
        return Some(FOR_PEOPLE);
    }
    let is_source_node = !now.unreachable_gateway_nodes.is_empty();
    let answer_only = EgressNodeStatus { reports_given: now.reports_given.clone(), ..before } == now;
    (is_source_node && answer_only && !is_urgent).then_some(ANSWERS)
}

/// Writes the newest status, until the sender is dropped.
async fn publish(name: String, statuses: Statuses, mut wanted: watch::Receiver<Option<Published>>) {
    let mut written: Option<EgressNodeStatus> = None;
    let mut due: Option<Instant> = None;
    // This node's position among all nodes, which have seen the same change.
    let [.., high, low] = tunnel_mac::of_node(&name);
    let turn = f64::from(u16::from_be_bytes([high, low])) / f64::from(u16::MAX);
    let mut refused = false;
    loop {
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
        let Some(Published { status, nodes }) = wanted.borrow_and_update().clone() else { continue };
        if written.as_ref() == Some(&status) {
            due = None;
            continue;
        }
        if let Some(pace) = written.as_ref().and_then(|before| pace(before, &status)) {
            let now = Instant::now();
            if *due.get_or_insert(now + (pace * nodes).mul_f64(turn)) > now {
                continue;
            }
        }
        let result = statuses.node(&name, &status).await;
        if let (Err(e), false) = (&result, refused) {
            tracing::warn!("cannot write the status of EgressNode {name}; trying again: {e:#}");
        }
        refused = result.is_err();
        due = refused.then(|| Instant::now() + AGAIN);
        written = Some(status).filter(|_| !refused);
    }
}
