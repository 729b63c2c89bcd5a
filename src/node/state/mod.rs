//! The daemon's state, and what each occasion does to it.

mod blocked;
mod faults;
mod gateway;
mod plugins;
mod roles;
mod stopping;
mod unmanaged;
mod unreachable;

pub use gateway::Heard;
use plugins::Waiting;
pub use stopping::Stopping;

use crate::cluster::{Lookup, Statuses};
use crate::cni::attachment::{self, Attachment, AttachmentId};
use crate::cni::offline_policies::{OfflinePolicies, boot_id};
use crate::cni::protocol::{Failure, codes};
use crate::cni::run_dir;
use crate::datapath::watch::{Event, Interest};
use crate::model::mac::Mac;
use crate::model::marks::EgressId;
use crate::model::tunnel_family::{TunnelFamily, internal};
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
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// Those who work in the background, and where they tell what came of it.
pub struct Listeners {
    /// Where unmanaged pods that were looked for are told of.
    pub adopted: mpsc::UnboundedSender<SearchResult>,
    /// Where the link's answers are told of.
    pub heard: mpsc::UnboundedSender<Heard>,
    /// Which nodes are to be asked whether they live.
    pub targets: watch::Sender<Targets>,
    /// Who looks for pods that the cluster's source has not told of yet.
    pub lookup: Lookup,
}

/// Everything that the daemon knows.
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
    /// What is known of other nodes' being alive.
    seen: Seen,
    /// Who listens for claims of addresses, and on which interfaces.
    claims: Option<(Vec<u32>, AbortHandle)>,
    /// The allocations whose addresses are here.
    here: BTreeSet<EgressId>,
    /// `since` of the allocations' entries when the addresses that are here came, or when the allocations named this
    /// node last.
    since: BTreeMap<EgressId, i64>,
    /// Allocations that are being moved here or just were, from which node, and how long their packets are handed
    /// over to it.
    handed: BTreeMap<EgressId, (Mac, tokio::time::Instant)>,
    /// Allocations that were just moved away, and how long their connections may go on leaving from here.
    left: BTreeMap<EgressId, tokio::time::Instant>,
    /// What this node has taken over is to be announced once more.
    announce_again: bool,
    /// What the connections in the kernel's table were last made to be.
    moved: Option<Moved>,
    /// Who makes them so.
    cleaning: CleaningQueue,
    /// Connections whose port was changed.
    changed_ports: ChangedPorts,
    roles_of: roles::RoleInputs,
    /// Unmanaged pods that are being looked for.
    sought: BTreeSet<ObjectKey>,
    /// Unmanaged pods that were looked for in vain: when, and the addresses that are in quarantine for it.
    missing: BTreeMap<ObjectKey, (Instant, Vec<IpAddr>)>,
    /// Unmanaged pods of which nothing is to be made, and when that was found: they are not looked for again at once.
    put_off: BTreeMap<ObjectKey, Instant>,
    /// Whether the view is older than the snapshot, the facts or the pods' addresses.
    stale: bool,
    /// Whether what lies below the pods' chains must be brought in sync: tunnel, routes, addresses.
    base: bool,
    /// Whether much memory was taken and let go since that was last asked.
    untidy: bool,
    /// Whether others' changes that this daemon must know of may be other ones now.
    listen: bool,
    /// Whether it is not known where other nodes' pods have their addresses.
    unknown_pods: bool,
    /// The address that the tunnel was last made with.
    local: Option<IpAddr>,
    /// Why this node's end of the tunnel is of another family than the others', if it is.
    odd_family: Option<String>,
    known_faults: faults::Known,
    unreachable: unreachable::Unreachable,
    /// Whether the kernel was in sync the last time.
    in_sync: bool,
    /// Why the offline policy snapshot could not be written.
    unstored: Option<String>,
    /// Why the run directory cannot be written to.
    unwritable: Option<String>,
    /// What is written down of adopted pods.
    written: AdoptedFiles,
    /// Why it could not be.
    forgetful: Option<String>,
    /// Whether the plugin may have left attachments and quarantines behind.
    left_behind: bool,
    /// Connections that have ended and are still in the kernel's table.
    ended: EndedConnections,
    /// Connections that began before their policies.
    existing: Existing,
    /// What becomes of other nodes' pods' connections here.
    forwarding: Forwarding,
    /// How many packets had been dropped for their connections' age when that was last looked at.
    stale_packets: u64,
    /// Answers that wait for the kernel to be in sync.
    waiting: Vec<Waiting>,
    /// Attachments that go when everything of theirs is undone.
    leaving: Vec<AttachmentId>,
}

impl Node {
    /// Reads what an earlier daemon and the plugin left, and finds the pods that already run, so that the first
    /// transaction takes nothing away from them.
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
        // What an earlier daemon had taken over.
        let said = cluster
            .egress_nodes
            .get(&*options.name)
            .map(|said| said.of_allocations().taken.as_slice())
            .unwrap_or_default();
        facts.taken = said.iter().map(|taken| (taken.id, taken.since)).collect();
        let holding = Holding::new(options.liveness, tokio::time::Instant::now());
        // Where the rules were once, somebody has taken them away while no daemon ran.
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

    /// Takes in attachments that it does not know: the plugin wrote them while the daemon was away.
    async fn load_attachments(&mut self) -> Result<()> {
        let all = attachment::load_all(&self.options.run_dir).context("attachments")?;
        for a in all {
            // Of one whose DEL has come the file stays until everything else is undone.
            if self.pods.get(&a.id) == Some(&a) || self.leaving.contains(&a.id) {
                continue;
            }
            let interface = self.interface(&a).await?;
            // Which of two pods with one address is gone, and whose connections there are, is not known.
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

    /// The addresses of a new pod that another one has, which must be gone.
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

    /// A new state of the cluster.
    pub fn snapshot(&mut self, cluster: Arc<Cluster>) {
        self.cluster = cluster;
        self.stale = true;
        self.untidy = true;
    }

    /// Whether much memory was taken and let go since this was last asked.
    pub fn is_untidy(&mut self) -> bool {
        std::mem::take(&mut self.untidy)
    }

    /// What others change in the kernel and this daemon must know of.
    /// `None`: as it was said before.
    pub fn interest(&mut self) -> Option<Interest> {
        std::mem::take(&mut self.listen).then(|| Interest {
            own_ports: self.host.ports(),
            underlay: self.host.underlay(),
            uplinks: self.host.uplinks().collect(),
            addresses: self.view.allocations.allocations.values().filter(|p| p.member).flat_map(addresses).collect(),
        })
    }

    /// Something in the kernel was changed by somebody else.
    pub async fn disturbed(&mut self, events: &BTreeSet<Event>) {
        for event in events {
            match event {
                Event::VethGone { index } => self.veth_gone(*index).await,
                Event::Nftables => self.host.invalidate_tables(),
                Event::Uplinks => self.base = true,
                Event::Rules => {
                    self.left_behind = true;
                    self.host.invalidate_routing();
                    self.base = true;
                }
                _ => self.invalidate(),
            }
        }
    }

    /// A veth may be gone, and when word of it comes, another pod's may have its index.
    async fn veth_gone(&mut self, index: u32) {
        if !self.pods.has_interface(index) {
            return;
        }
        match self.host.veth(index).await {
            Ok(now) => self.ended.addresses.extend(self.pods.interface_gone(index, now.as_ref())),
            // If it is gone, the kernel refuses the pod's chain, and that is tried again.
            Err(e) => tracing::warn!(index, "it cannot be found out whether a pod's interface is gone: {e:#}"),
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

    /// Whether the kernel was in sync when that was last seen to.
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// Whether pods can be held, also by a plugin that finds this daemon away: the plugin may be in the chain then.
    pub fn can_hold(&self) -> bool {
        self.in_sync && self.unstored.is_none()
    }

    /// Writes down anew what the run directory is to hold.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_down(&mut self) -> Result<()> {
        self.written.invalidate();
        self.pods.attachments().try_for_each(|a| a.store(&self.options.run_dir)).context("attachments")
    }

    /// Brings the kernel in sync and answers who waits for it. Returns whether it has to be tried again.
    pub async fn reconcile_all(&mut self, ready: &watch::Sender<Result<(), String>>) -> bool {
        let started = Instant::now();
        let result = self.reconcile().await;
        let failure =
            result.as_ref().err().map(|e| Failure::new(codes::KERNEL, "the kernel is not in sync", format!("{e:#}")));
        self.metrics.applied(started.elapsed(), &result);
        self.in_sync = result.is_ok();
        for waiting in self.waiting.extract_if(.., |w| failure.is_some() || w.is_due(&self.pods)) {
            self.metrics.answered(waiting.verb, waiting.since.elapsed());
            // A plugin that has given up meanwhile will come with a DEL.
            let failure = failure.clone().filter(|_| !waiting.is_free(&self.pods, &self.cluster, &self.view));
            let _ = waiting.answer.send(failure.map_or(Ok(()), Err));
        }
        // The answers go out before all that nobody waits for.
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
        let Node { facts, holding, .. } = self;
        let faults = &self.known_faults.faults;
        let own = Own { tunnel: self.host.tunnel_end(), facts, holding, faults, unreachable };
        self.report.publish(&self.view, &own, blocked, self.cluster.nodes.len());
        self.set_targets();
        self.set_roles();
        self.seek_unmanaged();
        state.is_err()
    }

    async fn reconcile(&mut self) -> Result<usize> {
        let mut changes = 0;
        if self.stale {
            self.pods.drop_ended(&self.cluster);
            self.refresh_view();
            self.drop_missing();
        }
        // Before the tables, so that no policy is in force that a plugin would not know of. Not on a node that has
        // never been in sync: its pods are to start as if Egret were not there.
        let was_in_sync = OfflinePolicies::is_there(&self.options.state_dir);
        if was_in_sync {
            self.store_offline_policies();
        }
        let left_behind = self.left_behind;
        let mut quarantined = BTreeSet::new();
        if left_behind {
            // Before the attachments, for a plugin writes those first: whose quarantine is seen here is known then.
            quarantined = self.host.quarantined()?;
            // Word of one that is gone may have been lost, and the kernel takes no chain of an interface that is not
            // there.
            for index in self.pods.interfaces().collect::<Vec<_>>() {
                self.veth_gone(index).await;
            }
            self.load_attachments().await?;
            if self.stale {
                self.refresh_view();
            }
            self.try_writing();
        }
        let (base, mut trouble) = (self.base, None);
        if base {
            (self.listen, self.untidy) = (true, true);
            match self.reconcile_base().await? {
                Ok(n) => {
                    changes += n;
                    self.base = false;
                }
                Err(e) => trouble = Some(e),
            }
        }
        let (tables, uses) = self.reconcile_tables()?;
        changes += tables;
        if base || self.moved.is_none() {
            self.reconcile_connections();
        }
        self.ended.uses(&self.uses, &uses, &self.pods);
        self.uses = uses;
        let mut lifted = BTreeSet::new();
        if left_behind {
            let missing = self.unfound();
            self.host.quarantine(&missing)?;
            lifted = quarantined.difference(&missing).copied().collect();
            self.ended.quarantined = lifted.iter().filter(|a| self.pods.has_brought(a)).copied().collect();
        }
        // Before anybody is answered: the runtime may give a pod's address to the next one then.
        if !self.ended.is_empty() {
            let scene = self.scene();
            self.ended.delete(&self.uses, scene).await;
        }
        if left_behind {
            // Not before the tables hold those who were quarantined.
            self.host.lift_quarantines(&lifted)?;
            changes += lifted.len();
            self.left_behind = false;
        }
        while let Some(id) = self.leaving.last() {
            id.forget(&self.options.run_dir).context("attachments")?;
            self.leaving.pop();
        }
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        if !was_in_sync {
            self.store_offline_policies();
        }
        Ok(changes)
    }

    fn store_offline_policies(&mut self) {
        self.unstored = self.report.store_offline_policies(&self.view).err().map(|e| {
            let state_dir = self.options.state_dir.display();
            format!(
                "the offline policy snapshot cannot be written to {state_dir}, and while egretd is away pods wait for it: \
                 {e}; make room there, or name another directory with --state-dir"
            )
        });
    }

    /// Finds out whether the run directory can be written to. If it is full, every ADD fails, and this node is not
    /// ready.
    pub(super) fn try_writing(&mut self) {
        let run_dir = &self.options.run_dir;
        self.unwritable = run_dir::try_writing(run_dir).err().map(|e| {
            format!(
                "no pod can start: the run directory {} cannot be written to: {e}; make room there",
                run_dir.display()
            )
        });
    }

    fn scene(&self) -> ended::ConnectionContext {
        let of_pods = self.cluster.nodes.get(&*self.options.name).map(|node| node.pod_cidrs.clone());
        let listed = self.cluster.pods.values().flat_map(|pod| pod.addresses.iter().copied());
        ended::ConnectionContext {
            marks: self.options.marks,
            networks: self.view.networks.clone(),
            of_pods: of_pods.unwrap_or_default(),
            in_use: self.pods.addresses().chain(listed).chain(self.facts.addresses.iter().copied()).collect(),
        }
    }

    /// Brings the tables in sync with the view. Returns how many changes it took, and what the pods use.
    fn reconcile_tables(&mut self) -> Result<(usize, BTreeMap<Holder, Arc<Use>>)> {
        let (mut plan, uses, census) = self.pods.plan(&self.cluster, &self.view);
        // Before the chains: whom the kernel holds, the next daemon is to know of.
        self.write_adopted();
        let of_allocation =
            |id: &EgressId| self.view.allocations.allocations.get(id).map(|allocation| allocation.address.clone());
        plan.handed = self.handed.iter().filter_map(|(id, (mac, _))| Some((*id, (of_allocation(id)?, *mac)))).collect();
        plan.left = self.left.keys().copied().collect();
        plan.unfound = self.unfound();
        let ready = plan.allocations.keys().copied().collect();
        let changes = self.host.tables(plan)?;
        let mended = self.host.tables_were_changed_by_others();
        self.existing.update(&uses, ready, mended, &self.view.networks, &self.facts.addresses);
        self.census = census;
        Ok((changes, uses))
    }

    /// Brings in sync what lies below the tables. Returns how many changes it took, or what failed. An error is one
    /// with which the tables cannot be made.
    async fn reconcile_base(&mut self) -> Result<Result<usize>> {
        let local = self.tunnel_address().await?;
        self.host.tunnel(&self.options.name, local).await?;
        self.local = Some(local);
        // What fails must not keep the rest from being done: addresses go and come when nodes die.
        let routing = self.host.routing(&self.view).await;
        let addresses = self.reconcile_addresses().await;
        let forwarding = self.host.forwarding(&self.view).await;
        self.log_faults();
        Ok([routing, addresses, forwarding].into_iter().sum())
    }

    async fn tunnel_address(&mut self) -> Result<IpAddr> {
        self.odd_family = None;
        if let Some(address) = self.options.tunnel_address {
            let others = TunnelFamily::of_others(&self.cluster, &self.options.name);
            if let Some(family) = others.filter(|family| *family != TunnelFamily::of(address)) {
                self.odd_family = Some(format!(
                    "most nodes' ends of the tunnel are {family}: {address}, by --tunnel-address, reaches none of them; give an                      {family} address of this host"
                ));
            }
            return Ok(address);
        }
        let Some(node) = self.cluster.nodes.get(&*self.options.name) else {
            // Deleted while it runs: what it has is to go, in order.
            return self.local.with_context(|| {
                format!("the cluster has no Node {:?}; give the name that it has there with --name", self.options.name)
            });
        };
        let family = self.options.tunnel_family.unwrap_or_else(|| TunnelFamily::of_cluster(&self.cluster));
        let of_family = |address: &IpAddr| TunnelFamily::of(*address) == family;
        if let Some(address) = internal(node).filter(of_family).find(|a| self.facts.addresses.contains(a)) {
            return Ok(address);
        }
        // It may have come since that was last looked at.
        let here = self.host.facts(BTreeMap::new()).await?.addresses;
        let own: Vec<IpAddr> = internal(node).filter(|address| here.contains(address)).collect();
        let first = own.iter().copied().find(of_family).or(own.first().copied()).with_context(|| {
            format!(
                "none of the InternalIPs of Node {:?} is on this host; name one with --tunnel-address",
                self.options.name
            )
        })?;
        if !of_family(&first) {
            self.odd_family = Some(format!(
                "the cluster's tunnel is {family}, and no InternalIP of Node {:?} on this host is: {first} reaches no node whose end                  is {family}; give the Node an {family} InternalIP, or name the tunnel's family with --tunnel-family on all nodes",
                self.options.name
            ));
        }
        Ok(first)
    }

    /// Sees to connections that are older than their allocations, if there may be any, and to what this node admits
    /// and does not forward. Returns whether there is something new to tell.
    pub fn look_at_counters(&mut self) -> bool {
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

    /// Brings the metrics up to date.
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
