//! The nftables tables, and the tracked connections that do not fit them.

use super::NodeDaemon;
use super::roles::RoleInputs;
use crate::model::marks::EgressId;
use crate::node::changed_ports::ChangedPorts;
use crate::node::ended::{self, EndedConnections};
use crate::node::existing::{Existing, Uses};
use crate::node::moved::{CleaningQueue, Moved};
use crate::node::pods::Census;
use anyhow::Result;
use std::collections::BTreeSet;

/// A change of the way into the tunnel takes two rounds of devices, routes and tables, or three.
const ROUNDS: usize = 3;

/// What the tables enforce since the kernel was last in sync.
#[derive(Debug, Default)]
pub(super) struct Enforced {
    /// What each pod uses.
    pub(super) uses: Uses,
    pub(super) census: Census,
}

/// The connections that the kernel tracks, as far as the daemon changes them.
pub(super) struct Connections {
    /// The translation that connection tracking was last cleaned for.
    moved: Option<Moved>,
    /// Serialises the cleaning of connection tracking.
    cleaning: CleaningQueue,
    /// The replication of connections with a changed port.
    pub(super) changed_ports: ChangedPorts,
    pub(super) roles_of: RoleInputs,
    /// Connections whose entries are to be deleted.
    pub(super) ended: EndedConnections,
    /// Connections that began before their policies.
    pub(super) existing: Existing,
    /// The counter of stale packets when it was last read.
    stale_packets: u64,
}

impl Connections {
    pub(super) fn new(changed_ports: ChangedPorts, existing: Existing) -> Self {
        Connections {
            moved: None,
            cleaning: CleaningQueue::default(),
            changed_ports,
            roles_of: RoleInputs::default(),
            ended: EndedConnections::default(),
            existing,
            stale_packets: 0,
        }
    }

    /// The translation that connection tracking was last cleaned for.
    pub(super) fn moved(&self) -> Option<&Moved> {
        self.moved.as_ref()
    }
}

impl NodeDaemon {
    /// The step [`TablesAhead`](super::steps::Step::TablesAhead). Returns the number of changes.
    pub(super) fn apply_tables_ahead(&mut self) -> Result<usize> {
        let (changes, _) = self.write_tables()?;
        self.clean_connections();
        Ok(changes)
    }

    /// The step [`Tables`](super::steps::Step::Tables). Returns the number of changes.
    pub(super) fn apply_tables(&mut self) -> Result<usize> {
        let (changes, uses) = self.write_tables()?;
        self.connections.ended.uses(&self.enforced.uses, &uses, &self.pods);
        self.enforced.uses = uses;
        Ok(changes)
    }

    /// The step [`TunnelEntrance`](super::steps::Step::TunnelEntrance): devices, routes and tables once more, until packets
    /// enter the tunnel by the way that the pods need. Returns the number of changes.
    pub(super) async fn change_entrance(&mut self) -> Result<usize> {
        let mut changes = 0;
        for _ in 0..ROUNDS {
            if !self.host.is_entrance_unsettled() {
                break;
            }
            self.apply_tunnel().await?;
            changes += self.host.routing(&self.view).await?;
            changes += self.apply_tables()?;
        }
        Ok(changes)
    }

    /// Brings the tables in sync with the view. Returns the number of changes, and what the pods use.
    fn write_tables(&mut self) -> Result<(usize, Uses)> {
        let (mut plan, uses, census) = self.pods.plan(&self.cluster, &self.view);
        // Before the chains, so that the next daemon knows every pod that has one.
        self.write_adopted();
        let allocations = &self.view.allocations.allocations;
        let of_allocation = |id: EgressId| allocations.get(&id).map(|allocation| allocation.address.clone());
        let handovers = &self.egress.handovers;
        // A packet that one node does not know is the other's: routers may send to both.
        let handed = handovers.withdrawn().chain(handovers.to_here());
        plan.handed = handed.filter_map(|(id, mac)| Some((id, (of_allocation(id)?, mac)))).collect();
        plan.left = handovers.moved_away();
        plan.unfound = self.unmanaged.missing();
        let ready = plan.allocations.keys().copied().collect();
        let changes = self.host.tables(plan)?;
        let mended = self.host.tables_were_changed_by_others();
        self.connections.existing.update(&uses, ready, mended, &self.view.networks, &self.facts.addresses);
        self.enforced.census = census;
        Ok((changes, uses))
    }

    /// The step [`Connections`](super::steps::Step::Connections): cleans connection tracking after egress IPs have
    /// moved to this node or away from it.
    pub(super) fn clean_connections(&mut self) {
        // First set the roles: the connections of an egress IP that has moved away are deleted here and have not
        // ended.
        self.set_roles();
        let mut here = self.egress.here.clone();
        here.extend(self.egress.handovers.withdrawn().map(|(id, _)| id));
        let moved = Moved::new(&self.view, &here);
        let connections = &mut self.connections;
        if connections.moved.as_ref().is_none_or(|before| moved.needs_cleaning(before)) {
            let handed_over: BTreeSet<EgressId> = self.egress.handovers.all();
            moved.clone().clean(self.options.marks, handed_over, &connections.changed_ports, &connections.cleaning);
        }
        connections.moved = Some(moved);
    }

    /// The step [`EndedConnections`](super::steps::Step::EndedConnections).
    pub(super) async fn delete_ended_connections(&mut self) {
        if !self.connections.ended.is_empty() {
            let context = self.connection_context();
            self.connections.ended.delete(&self.enforced.uses, context).await;
        }
    }

    fn connection_context(&self) -> ended::ConnectionContext {
        let of_pods = self.cluster.nodes.get(&*self.options.name).map(|node| node.pod_cidrs.clone());
        let listed = self.cluster.pods.values().flat_map(|pod| pod.addresses.iter().copied());
        ended::ConnectionContext {
            marks: self.options.marks,
            networks: self.view.networks.clone(),
            of_pods: of_pods.unwrap_or_default(),
            in_use: self.pods.addresses().chain(listed).chain(self.facts.addresses.iter().copied()).collect(),
        }
    }

    /// Reads the counters: deletes stale connections if stale packets were counted, and updates the detection of
    /// blocked forwarding. Returns whether the status changes.
    pub fn check_counters(&mut self) -> bool {
        let ports_changed = self.source_ports.has_changed() | self.fast_path_has_changed() | self.host.take_arrivals();
        let (stale, first) = match self.host.stale_and_first_packets() {
            Ok(counted) => counted,
            Err(e) => {
                tracing::warn!("the kernel's counters cannot be read: {e:#}");
                return ports_changed;
            }
        };
        let connections = &mut self.connections;
        if stale != connections.stale_packets {
            connections.stale_packets = stale;
            let local = connections.moved.as_ref().map(Moved::local).unwrap_or_default();
            ended::delete_stale(self.options.marks, local, connections.changed_ports.replicas());
        }
        self.forwarding_changed(first) || ports_changed
    }

    /// The number of pods in each state.
    pub(super) fn census(&self) -> Census {
        let census = self.enforced.census;
        Census { unmanaged: census.unmanaged + self.unmanaged.count_missing() as i64, ..census }
    }

    /// Updates the metrics.
    pub fn refresh_metrics(&mut self) {
        self.metrics.pods(&self.census());
        self.metrics.allocations(&self.view);
        match self.host.counts() {
            Ok(counts) => self.metrics.counts(&counts),
            Err(e) => tracing::warn!("the kernel's counters cannot be read: {e:#}"),
        }
        self.count_fast_packets();
    }
}
