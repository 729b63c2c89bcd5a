//! The daemon's state. Events change the inputs, and a pass brings the kernel in sync with what they desire: see
//! [`steps`].

mod assign;
mod blocked;
mod desired;
mod egress;
mod fast_path;
mod flow_records;
mod handovers;
mod holders;
mod in_sync;
mod link;
mod pass;
mod plugins;
mod probes;
mod problems;
mod records;
mod refusals;
mod roles;
mod source_ports;
mod state_dump;
mod steps;
mod stopping;
mod tables;
mod takeovers;
mod targets;
mod trace;
mod tunnel;
mod unmanaged;
mod unreachable;

pub use link::LinkMessage;
pub use pass::PassResult;
pub use stopping::Stopping;

use crate::cluster::{Lookup, Statuses};
use crate::datapath::probe;
use crate::datapath::watch::ForeignChange;
use crate::model::Cluster;
use crate::model::marks::EgressId;
use crate::model::shared::Mark;
use crate::node::Options;
use crate::node::adopted_files::{AdoptedFiles, Remembered};
use crate::node::adoption::{self, SearchResult};
use crate::node::assign::AssignHook;
use crate::node::changed_ports::ChangedPorts;
use crate::node::existing::Existing;
use crate::node::fast_path::FastPath;
use crate::node::forwarding::Forwarding;
use crate::node::holders::Held;
use crate::node::holding::Holding;
use crate::node::host::Host;
use crate::node::liveness::{PeerLiveness, Targets};
use crate::node::metrics::Metrics;
use crate::node::pods::Pods;
use crate::node::report::Report;
use crate::node::source_ports::SourcePorts;
use crate::node::uplink_probes::{self, Findings};
use crate::node_plan::View;
use crate::node_plan::allocations::Facts;
use crate::node_plan::allocations::NodeAllocations;
use crate::telemetry::server::Readiness;
use anyhow::{Context, Result};
use egress::Egress;
use egret_cni::offline_policies::{OfflinePolicies, boot_id};
use flow_records::FlowRecords;
use in_sync::InSync;
use plugins::Requests;
use problems::Problems;
use records::Quarantines;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use steps::{Input, Pending, Step};
use tables::{Connections, Enforced};
use tokio::sync::{mpsc, watch};
use unmanaged::Unmanaged;
use unreachable::Unreachable;

/// Channels to other tasks.
pub struct Listeners {
    /// Receives the results of searches for unmanaged pods.
    pub adopted: mpsc::UnboundedSender<SearchResult>,
    /// Receives the results of address probes, and claims of other nodes.
    pub link: mpsc::UnboundedSender<LinkMessage>,
    /// The nodes to probe for liveness.
    pub targets: watch::Sender<Targets>,
    /// What to probe by the uplinks.
    pub probes: watch::Sender<uplink_probes::Wanted>,
    /// The egress IPs about which other nodes may ask.
    pub held: watch::Sender<Held>,
    /// Looks up pods that the cluster's source has not reported yet.
    pub lookup: Lookup,
    /// Whether the node is ready, or why not.
    pub ready: watch::Sender<Readiness>,
}

/// The daemon's whole state.
pub struct NodeDaemon {
    options: Options,
    listeners: Listeners,
    metrics: Metrics,
    report: Report,
    host: Host,

    // The inputs.
    cluster: Arc<Cluster>,
    /// The liveness of other nodes.
    liveness: PeerLiveness,
    /// What the probes by the uplinks have found.
    findings: Findings,
    pods: Pods,
    unmanaged: Unmanaged,
    requests: Requests,

    // The desired state, and what the node has observed about itself.
    view: View,
    facts: Facts,
    egress: Egress,

    // What is applied.
    pending: Pending,
    /// The number of passes.
    passes: u64,
    /// The tunnel's last underlay address.
    tunnel_address: Option<IpAddr>,
    enforced: Enforced,
    connections: Connections,
    quarantines: Quarantines,
    /// Whether the host's firewall lets connections of other nodes' pods pass.
    forwarding: Forwarding,
    problems: Problems,
    in_sync: InSync,
    /// The gateway nodes that this node reports as unreachable.
    unreachable: Unreachable,
    flow_records: FlowRecords,
    /// `None`: all packets take the kernel's own way.
    fast_path: Option<FastPath>,
    source_ports: SourcePorts,
    /// `None`: nothing has to bring egress IPs to this node.
    assign_hook: Option<AssignHook>,
    /// The allocations from which its egress IPs were last taken.
    owned_of: Mark<NodeAllocations>,
}

impl NodeDaemon {
    /// Reads the state that an earlier daemon and the plugin left, and finds the pods that already run, so that the
    /// first transaction does not interrupt them.
    pub async fn start(
        options: Options,
        statuses: Statuses,
        cluster: Arc<Cluster>,
        metrics: Metrics,
        listeners: Listeners,
    ) -> Result<Self> {
        let mut host =
            Host::open(options.marks, options.own_tables, options.tunnel_egress, options.fast_path_lease.is_some())?;
        if let Err(e) = probe::remove_device() {
            tracing::warn!("a killed daemon's device of a trace is left: {e:#}");
        }
        let pods = Pods::new(host.pod_marks()?);
        let earlier_marks = host.connection_base()?.filter(|base| *base != options.marks.connection_base());
        let facts = Facts { taken: taken_before(&cluster, &options.name), ..host.facts(BTreeMap::new()).await? };
        let assign_hook = options.assign_hook.clone().map(|target| AssignHook::new(target, metrics.assign_hook()));
        let holding = Holding::new(options.liveness, tokio::time::Instant::now()).with_hook(assign_hook.is_some());
        // If the node has been in sync before, another program removed the rules while no daemon ran.
        let flushed = OfflinePolicies::is_there(&options.state_dir) && !host.has_tables()?;
        let changed_ports = ChangedPorts::start(options.marks, metrics.changed_ports())?;
        let flow_records = FlowRecords::start(&options, &metrics)?;
        let fast_path = options.fast_path_lease.map(|lease| FastPath::start(lease, options.marks, metrics.fast_path()));
        let fast_path = fast_path.transpose()?;
        let source_ports = SourcePorts::start(options.marks, metrics.source_ports())?;
        let boot = boot_id().context("the boot's id")?;
        let (files, adopted) = AdoptedFiles::load(&options.run_dir, boot).context("adopted pods")?;
        let report = Report::new(&options.name, statuses, options.state_dir.clone());
        let existing = Existing::start(options.marks, flushed);
        let findings = probes::findings_before(&cluster, &options.name);
        let mut node = NodeDaemon {
            options,
            listeners,
            metrics,
            report,
            host,
            cluster,
            liveness: PeerLiveness::default(),
            findings,
            pods,
            unmanaged: Unmanaged::new(files),
            requests: Requests::default(),
            view: View::default(),
            egress: Egress::new(holding, facts.taken.clone()),
            facts,
            pending: Pending::default(),
            passes: 0,
            tunnel_address: None,
            enforced: Enforced::default(),
            connections: Connections::new(changed_ports, existing),
            quarantines: Quarantines::default(),
            forwarding: Forwarding::default(),
            problems: Problems::default(),
            in_sync: InSync::default(),
            unreachable: Unreachable::default(),
            flow_records,
            fast_path,
            source_ports,
            assign_hook,
            owned_of: Mark::default(),
        };
        node.find_running_pods(adopted).await?;
        node.connections.ended.of_earlier = true;
        node.connections.ended.of_base = earlier_marks;
        Ok(node)
    }

    async fn find_running_pods(&mut self, adopted: Vec<Remembered>) -> Result<()> {
        self.load_attachments().await?;
        self.restore_adopted(adopted).await?;
        self.refresh_view();
        self.pending.drop_step(Step::View);
        let unmanaged = self.pods.unmanaged(&self.cluster, &self.view);
        for found in adoption::find_all(&self.host.routes, unmanaged).await {
            self.adopt(found);
        }
        self.pending.raise(Input::Host);
        self.pending.raise(Input::PluginRecords);
        Ok(())
    }

    /// Takes a new snapshot of the cluster.
    pub fn snapshot(&mut self, cluster: Arc<Cluster>) {
        if !cluster.policies.is(&self.cluster.policies) || !cluster.gateways.is(&self.cluster.gateways) {
            // The kernel may have refused what just one of them needs.
            self.problems.refusals.end_pauses(std::time::Instant::now());
        }
        self.cluster = cluster;
        self.pending.raise(Input::Cluster);
    }

    /// Takes notifications about changes that other programs have made in the kernel.
    pub async fn kernel_changed(&mut self, events: &BTreeSet<ForeignChange>) {
        for event in events {
            match event {
                ForeignChange::VethGone { index } => self.veth_gone(*index).await,
                ForeignChange::Nftables => self.host.invalidate_tables(),
                ForeignChange::Filters { index } => self.host.invalidate_ifb(*index),
                ForeignChange::Uplinks => self.pending.raise(Input::Host),
                ForeignChange::Underlay => {
                    self.host.invalidate_underlay();
                    self.pending.raise(Input::Host);
                }
                ForeignChange::Rules => {
                    self.host.invalidate_routing();
                    self.pending.raise(Input::PluginRecords);
                    self.pending.raise(Input::Host);
                }
                _ => self.invalidate(),
            }
        }
    }
}

/// The allocations that an earlier daemon on the node `name` had taken over.
fn taken_before(cluster: &Cluster, name: &str) -> BTreeMap<EgressId, i64> {
    let status = cluster.egress_nodes.get(name);
    let taken = status.map(|status| status.of_allocations().taken.as_slice()).unwrap_or_default();
    taken.iter().map(|taken| (taken.id, taken.since)).collect()
}
