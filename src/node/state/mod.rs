//! The daemon's state, and how each event changes it.

mod blocked;
mod faults;
mod gateway;
mod plugins;
mod reconcile;
mod roles;
mod stopping;
mod unmanaged;
mod unreachable;

pub use gateway::Heard;
use plugins::Waiting;
pub use stopping::Stopping;

use crate::cluster::{Lookup, Statuses};
use crate::datapath::underlay::Underlay;
use crate::datapath::watch::{Event, Interest};
use crate::model::marks::EgressId;
use crate::model::{Cluster, ObjectKey};
use crate::node::Options;
use crate::node::adopted_files::AdoptedFiles;
use crate::node::adoption::{self, SearchResult};
use crate::node::changed_ports::ChangedPorts;
use crate::node::ended::{self, EndedConnections};
use crate::node::existing::Existing;
use crate::node::forwarding::Forwarding;
use crate::node::holding::Holding;
use crate::node::host::Host;
use crate::node::liveness::{Seen, Targets};
use crate::node::metrics::Metrics;
use crate::node::moved::{CleaningQueue, Moved};
use crate::node::pods::{Census, Holder, Interface, Pods, Use};
use crate::node::report::{Own, Report};
use crate::node_plan::allocations::Facts;
use crate::node_plan::{View, addresses};
use anyhow::{Context, Result};
use egret_cni::attachment::{self, Attachment, AttachmentId};
use egret_cni::offline_policies::{OfflinePolicies, boot_id};
use egret_cni::protocol::{Failure, codes};
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// Channels to and from background tasks.
pub struct Listeners {
    /// Receives the results of searches for unmanaged pods.
    pub adopted: mpsc::UnboundedSender<SearchResult>,
    /// Receives the results of address probes, and claims of other nodes.
    pub heard: mpsc::UnboundedSender<Heard>,
    /// The nodes to probe for liveness.
    pub targets: watch::Sender<Targets>,
    /// Looks up pods that the cluster's source has not reported yet.
    pub lookup: Lookup,
}

/// The daemon's whole state.
pub struct Node {
    options: Options,
    host: Host,
    cluster: Arc<Cluster>,
    view: View,
    facts: Facts,
    pods: Pods,
    /// What each pod used when the kernel was last in sync.
    uses: BTreeMap<Holder, Arc<Use>>,
    census: Census,
    metrics: Metrics,
    report: Report,
    listeners: Listeners,
    holding: Holding,
    /// The liveness of other nodes.
    seen: Seen,
    /// The task that listens for claims, and its interfaces.
    claims: Option<(Vec<u32>, AbortHandle)>,
    /// The allocations whose egress IPs are on this node.
    here: BTreeSet<EgressId>,
    /// For each egress IP on this node, `since` of its allocation when it was added, or when the allocation last
    /// named this node.
    since: BTreeMap<EgressId, i64>,
    /// Allocations that move or just moved to this node: the former owner, and until when packets are handed over to
    /// it.
    handed: BTreeMap<EgressId, (Mac, tokio::time::Instant)>,
    /// Allocations that just moved away, and until when their connections may continue through this node.
    left: BTreeMap<EgressId, tokio::time::Instant>,
    /// Whether the egress IPs that this node has taken over are to be announced again.
    announce_again: bool,
    /// The translation that connection tracking was last cleaned for.
    moved: Option<Moved>,
    /// Serialises the cleaning of connection tracking.
    cleaning: CleaningQueue,
    /// The replication of connections with a changed port.
    changed_ports: ChangedPorts,
    roles_of: roles::RoleInputs,
    /// Unmanaged pods whose search is running.
    sought: BTreeSet<ObjectKey>,
    /// Unmanaged pods whose veth was not found: when, and their addresses, which are in quarantine.
    missing: BTreeMap<ObjectKey, (Instant, Vec<IpAddr>)>,
    /// Unmanaged pods whose search result was discarded, and when. They are not searched again at once.
    put_off: BTreeMap<ObjectKey, Instant>,
    /// Whether the view is older than the snapshot, the facts or the pods' addresses.
    stale: bool,
    /// Whether the tunnel, routes and addresses must be brought in sync.
    base: bool,
    /// Whether memory was freed that can be returned to the system.
    untidy: bool,
    /// Whether the interest in kernel notifications may have changed.
    listen: bool,
    /// Whether the networks of other nodes' pods are unknown.
    unknown_pods: bool,
    /// The tunnel's last underlay address.
    local: Option<IpAddr>,
    /// Why this node's tunnel address is of another family than the other nodes', if it is.
    odd_family: Option<String>,
    known_faults: faults::Known,
    unreachable: unreachable::Unreachable,
    /// Whether the last reconciliation succeeded.
    in_sync: bool,
    /// Why the offline policy snapshot could not be written.
    unstored: Option<String>,
    /// Why the run directory cannot be written to.
    unwritable: Option<String>,
    /// The files of adopted pods.
    written: AdoptedFiles,
    /// Why those files could not be written.
    forgetful: Option<String>,
    /// Whether the plugin may have written attachments and quarantines while the daemon was away.
    left_behind: bool,
    /// Connections whose entries are to be deleted.
    ended: EndedConnections,
    /// Connections that began before their policies.
    existing: Existing,
    /// Whether the host's firewall lets connections of other nodes' pods pass.
    forwarding: Forwarding,
    /// The counter of stale packets when it was last read.
    stale_packets: u64,
    /// Requests that wait until the kernel is in sync.
    waiting: Vec<Waiting>,
    /// Attachments whose files are removed when all else of theirs is.
    leaving: Vec<AttachmentId>,
}

impl Node {
    /// Reads the state that an earlier daemon and the plugin left, and finds the pods that already run, so that the
    /// first transaction does not interrupt them.
    pub async fn start(
        options: Options,
        statuses: Statuses,
        cluster: Arc<Cluster>,
        metrics: Metrics,
        listeners: Listeners,
    ) -> Result<Self> {
        let mut host = Host::open(options.marks, options.own_tables)?;
        let pods = Pods::new(host.pod_marks()?);
        let base = host.connection_base()?.filter(|base| *base != options.marks.connection_base());
        let mut facts = host.facts(BTreeMap::new()).await?;
        // The allocations that an earlier daemon had taken over.
        let taken = cluster
            .egress_nodes
            .get(&*options.name)
            .map(|status| status.of_allocations().taken.as_slice())
            .unwrap_or_default();
        facts.taken = taken.iter().map(|taken| (taken.id, taken.since)).collect();
        let holding = Holding::new(options.liveness, tokio::time::Instant::now());
        // If the node has been in sync before, another program removed the rules while no daemon ran.
        let flushed = OfflinePolicies::is_there(&options.state_dir) && !host.has_tables()?;
        let changed_ports = ChangedPorts::start(options.marks, metrics.changed_ports())?;
        let boot = boot_id().context("the boot's id")?;
        let (written, adopted) = AdoptedFiles::load(&options.run_dir, boot).context("adopted pods")?;
        let report = Report::new(&options.name, statuses, options.state_dir.clone());
        let mut node = Node {
            existing: Existing::start(options.marks, flushed),
            options,
            host,
            cluster,
            view: View::default(),
            facts,
            pods,
            uses: BTreeMap::new(),
            census: Census::default(),
            metrics,
            report,
            listeners,
            holding,
            seen: Seen::default(),
            claims: None,
            here: BTreeSet::new(),
            since: BTreeMap::new(),
            handed: BTreeMap::new(),
            left: BTreeMap::new(),
            announce_again: false,
            moved: None,
            cleaning: CleaningQueue::default(),
            changed_ports,
            roles_of: roles::RoleInputs::default(),
            sought: BTreeSet::new(),
            missing: BTreeMap::new(),
            put_off: BTreeMap::new(),
            stale: true,
            base: true,
            untidy: true,
            listen: true,
            unknown_pods: false,
            local: None,
            odd_family: None,
            known_faults: faults::Known::default(),
            unreachable: unreachable::Unreachable::default(),
            in_sync: false,
            unstored: None,
            unwritable: None,
            written,
            forgetful: None,
            left_behind: true,
            ended: EndedConnections::default(),
            forwarding: Forwarding::default(),
            stale_packets: 0,
            waiting: Vec::new(),
            leaving: Vec::new(),
        };
        node.load_attachments().await?;
        node.restore_adopted(adopted).await?;
        node.refresh_view();
        let unmanaged = node.pods.unmanaged(&node.cluster, &node.view);
        for found in adoption::find_all(&node.host.routes, unmanaged).await {
            node.adopt(found);
        }
        node.ended.of_earlier = true;
        node.ended.of_base = base;
        Ok(node)
    }

    /// Loads the attachments that the plugin wrote while the daemon was away.
    async fn load_attachments(&mut self) -> Result<()> {
        let all = attachment::load_all(&self.options.run_dir).context("attachments")?;
        for a in all {
            // After a DEL, the file stays until all else of the attachment is removed.
            if self.pods.get(&a.id) == Some(&a) || self.leaving.contains(&a.id) {
                continue;
            }
            let interface = self.interface(&a).await?;
            // Of two pods with one address, it is unknown which one is gone and whose the connections are.
            self.ended.of_earlier |= !self.of_gone(&a).is_empty();
            self.attach(a, interface);
        }
        Ok(())
    }

    async fn interface(&self, a: &Attachment) -> Result<Option<Interface>> {
        match &a.host {
            Some(host) => self.host.interface(host.index, host.peer_index).await,
            None => Ok(None),
        }
    }

    /// The addresses of a new pod that another pod has. That other pod must be gone.
    fn of_gone(&self, a: &Attachment) -> Vec<IpAddr> {
        let is_new = self.pods.get(&a.id).is_none();
        a.addresses.iter().filter(|x| is_new && self.pods.has_address(x)).copied().collect()
    }

    fn attach(&mut self, a: Attachment, interface: Option<Interface>) {
        self.stale |= a.addresses.iter().any(|x| !self.view.networks.is_of_pods(*x));
        let before = self.missing.len();
        self.missing.retain(|_, (_, held)| !held.iter().any(|x| a.addresses.contains(x)));
        self.left_behind |= self.missing.len() < before;
        self.ended.addresses.extend(self.pods.attach(a, interface));
    }

    /// Takes a new snapshot of the cluster.
    pub fn snapshot(&mut self, cluster: Arc<Cluster>) {
        self.cluster = cluster;
        self.stale = true;
        self.untidy = true;
    }

    /// Whether memory was freed since the last call that can be returned to the system.
    pub fn is_untidy(&mut self) -> bool {
        std::mem::take(&mut self.untidy)
    }

    /// Which kernel notifications concern the daemon; `None` if that has not changed since the last call.
    pub fn interest(&mut self) -> Option<Interest> {
        std::mem::take(&mut self.listen).then(|| Interest {
            own_ports: self.host.ports(),
            underlay: self.host.underlay().map(|u| u.interfaces().clone()).unwrap_or_default(),
            peers: self.host.underlay().into_iter().flat_map(Underlay::peers).collect(),
            uplinks: self.host.uplinks().collect(),
            addresses: self.view.allocations.allocations.values().filter(|p| p.member).flat_map(addresses).collect(),
        })
    }

    /// Takes notifications about changes that other programs have made in the kernel.
    pub async fn kernel_changed(&mut self, events: &BTreeSet<Event>) {
        for event in events {
            match event {
                Event::VethGone { index } => self.veth_gone(*index).await,
                Event::Nftables => self.host.invalidate_tables(),
                Event::Uplinks => self.base = true,
                Event::Underlay => {
                    self.host.invalidate_underlay();
                    self.base = true;
                }
                Event::Rules => {
                    self.left_behind = true;
                    self.host.invalidate_routing();
                    self.base = true;
                }
                _ => self.invalidate(),
            }
        }
    }

    /// Handles the removal of a veth. When the notification arrives, another pod's veth may have its index.
    async fn veth_gone(&mut self, index: u32) {
        if !self.pods.has_interface(index) {
            return;
        }
        match self.host.veth(index).await {
            Ok(now) => self.ended.addresses.extend(self.pods.interface_gone(index, now.as_ref())),
            // If it is gone, the kernel rejects the pod's chain, and the reconciliation is tried again.
            Err(e) => tracing::warn!(index, "cannot read a pod's veth: {e:#}"),
        }
    }

    /// The next [`reconcile_all`](Self::reconcile_all) reads everything back.
    pub fn invalidate(&mut self) {
        self.host.invalidate();
        self.base = true;
        self.left_behind = true;
    }

    fn refresh_view(&mut self) {
        let pods: BTreeSet<IpAddr> = self.pods.addresses().collect();
        let (allocations, networks) = (self.view.allocations.mark(), self.view.networks.mark());
        self.view.update(&self.cluster, &self.options.name, &self.facts, &self.options.direct, pods);
        self.stale = false;
        let unknown = !self.view.networks.pods_are_known && self.cluster.nodes.len() > 1;
        if unknown && !self.unknown_pods {
            tracing::warn!(
                "nothing tells where other nodes' pods have their addresses (no podCIDRs, no IPPools): policies take them for \
                 destinations outside the cluster, and replies to them may get lost; name their networks with --direct"
            );
        }
        self.unknown_pods = unknown;
        // Most changes are of policies alone, and then nothing below the pods' chains is to be looked at.
        if !self.view.allocations.has(&allocations) || !self.view.networks.has(&networks) {
            self.host.view(&self.view);
            self.base = true;
        }
    }

    /// Whether the last reconciliation succeeded.
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// Whether policies can be enforced, also by the plugin while this daemon is away. Then the plugin's entry may be
    /// written.
    pub fn can_enforce(&self) -> bool {
        self.in_sync && self.unstored.is_none()
    }

    /// Writes the files of the run directory again.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn restore_run_dir(&mut self) -> Result<()> {
        self.written.invalidate();
        self.pods.attachments().try_for_each(|a| a.store(&self.options.run_dir)).context("attachments")
    }

    /// Brings the kernel in sync, sends the waiting responses, and publishes the status. Returns whether it must be
    /// tried again.
    pub async fn reconcile_all(&mut self, ready: &watch::Sender<Result<(), String>>) -> bool {
        let started = Instant::now();
        let result = self.reconcile().await;
        let failure =
            result.as_ref().err().map(|e| Failure::new(codes::KERNEL, "the kernel is not in sync", format!("{e:#}")));
        self.metrics.applied(started.elapsed(), &result);
        self.in_sync = result.is_ok();
        for waiting in self.waiting.extract_if(.., |w| failure.is_some() || w.is_due(&self.pods)) {
            self.metrics.answered(waiting.verb, waiting.since.elapsed());
            // If the plugin has timed out meanwhile, the runtime calls DEL.
            let failure = failure.clone().filter(|_| !waiting.is_free(&self.pods, &self.cluster, &self.view));
            let _ = waiting.answer.send(failure.map_or(Ok(()), Err));
        }
        // Let the responses be sent before the work that no plugin waits for.
        tokio::task::yield_now().await;
        if let Some(failure) = &failure {
            tracing::error!("{failure}; trying again");
        }
        let unwritten = [&self.unwritable, &self.unstored, &self.forgetful].into_iter().flatten().next().cloned();
        if let Some(unwritten) = unwritten.as_ref().filter(|_| failure.is_none()) {
            tracing::error!("{unwritten}; trying again");
        }
        let state = failure.map(|f| f.to_string()).or(unwritten).map_or(Ok(()), Err);
        ready.send_if_modified(|now| {
            let changed = *now != state;
            now.clone_from(&state);
            changed
        });
        let (blocked, unreachable) = (self.blocked(), &self.unreachable());
        let reports_given = self.reports_given(unreachable);
        let Node { facts, holding, .. } = self;
        let faults = &self.known_faults.faults;
        let own = Own {
            tunnel: self.host.tunnel_end(),
            facts,
            holding,
            faults,
            unreachable,
            reports_given,
            over_limit: self.pods.over_limit(),
        };
        self.report.publish(&self.view, &own, blocked, self.cluster.nodes.len());
        self.set_targets();
        self.set_roles();
        self.seek_unmanaged();
        state.is_err()
    }

    /// Reads the counters: deletes stale connections if stale packets were counted, and updates the detection of
    /// blocked forwarding. Returns whether the status changes.
    pub fn check_counters(&mut self) -> bool {
        let (stale, first) = match self.host.stale_and_first_packets() {
            Ok(counted) => counted,
            Err(e) => {
                tracing::warn!("the kernel's counters cannot be read: {e:#}");
                return false;
            }
        };
        if stale != self.stale_packets {
            self.stale_packets = stale;
            let local = self.moved.as_ref().map(Moved::local).unwrap_or_default();
            ended::delete_stale(self.options.marks, local, self.changed_ports.replicas());
        }
        self.forwarding_changed(first)
    }

    /// Updates the metrics.
    pub fn refresh_metrics(&mut self) {
        let unmanaged = self.census.unmanaged + self.missing.len() as i64;
        self.metrics.pods(&Census { unmanaged, ..self.census });
        self.metrics.allocations(&self.view);
        match self.host.counts() {
            Ok(counts) => self.metrics.counts(&counts),
            Err(e) => tracing::warn!("the kernel's counters cannot be read: {e:#}"),
        }
    }
}
