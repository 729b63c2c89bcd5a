//! The reconciliation: snapshot for the plugin, tunnel, routes and addresses, tables, then connections and
//! quarantines.

use super::Node;
use crate::model::marks::EgressId;
use crate::model::tunnel_family::{TunnelFamily, internal};
use crate::node::ended;
use crate::node::pods::{Holder, Use};
use anyhow::{Context, Result};
use egret_cni::offline_policies::OfflinePolicies;
use egret_cni::run_dir;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

impl Node {
    /// Brings the kernel in sync. Returns the number of changes.
    pub(super) async fn reconcile(&mut self) -> Result<usize> {
        let mut changes = 0;
        if self.stale {
            self.pods.drop_ended(&self.cluster);
            self.refresh_view();
            self.drop_missing();
        }
        // Before the tables, so that the plugin knows every policy that is in force. Not on a node that has never
        // been in sync, whose pods must start as if Egret were not there.
        let was_in_sync = OfflinePolicies::is_there(&self.options.state_dir);
        if was_in_sync {
            self.store_offline_policies();
        }
        let left_behind = self.left_behind;
        let mut quarantined = BTreeSet::new();
        if left_behind {
            // Before the attachments: the plugin writes those first, so the attachment of every quarantine seen here
            // is loaded.
            quarantined = self.host.quarantined()?;
            // The notification about a removed veth may have been lost, and the kernel rejects a chain of a missing
            // interface.
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
            self.ended.quarantined = lifted.iter().filter(|a| self.pods.has_attached(a)).copied().collect();
        }
        // Before the responses: after them the runtime may give a pod's address to the next pod.
        if !self.ended.is_empty() {
            let context = self.connection_context();
            self.ended.delete(&self.uses, context).await;
        }
        if left_behind {
            // Only after the tables contain the quarantined pods.
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

    /// Checks whether the run directory can be written to. If it is full, every ADD fails, and this node is not ready.
    pub(super) fn try_writing(&mut self) {
        let run_dir = &self.options.run_dir;
        self.unwritable = run_dir::try_writing(run_dir).err().map(|e| {
            format!(
                "no pod can start: the run directory {} cannot be written to: {e}; make room there",
                run_dir.display()
            )
        });
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

    /// Brings the tables in sync with the view. Returns the number of changes, and what the pods use.
    pub(super) fn reconcile_tables(&mut self) -> Result<(usize, BTreeMap<Holder, Arc<Use>>)> {
        let (mut plan, uses, census) = self.pods.plan(&self.cluster, &self.view);
        // Before the chains, so that the next daemon knows every pod that has one.
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

    /// Brings the tunnel, routes and addresses in sync. The inner result is the number of changes, or a failure of
    /// one part. The outer error means that the tables cannot be created.
    async fn reconcile_base(&mut self) -> Result<Result<usize>> {
        let local = self.tunnel_address().await?;
        self.host.tunnel(&self.options.name, local, &self.view).await?;
        self.local = Some(local);
        // A failure of one part must not stop the others: addresses must move when nodes fail.
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
            // If the Node was deleted while the daemon runs, its egress IPs must still be handed over.
            return self.local.with_context(|| {
                format!("the cluster has no Node {:?}; give the name that it has there with --name", self.options.name)
            });
        };
        let family = self.options.tunnel_family.unwrap_or_else(|| TunnelFamily::of_cluster(&self.cluster));
        let of_family = |address: &IpAddr| TunnelFamily::of(*address) == family;
        if let Some(address) = internal(node).filter(of_family).find(|a| self.facts.addresses.contains(a)) {
            return Ok(address);
        }
        // The address may have been added since the facts were read.
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
}
