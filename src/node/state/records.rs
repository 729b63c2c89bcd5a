//! What the plugin has written while the daemon was away, and what the daemon writes for it.

use super::NodeDaemon;
use super::steps::Input;
use crate::node::pods::Interface;
use anyhow::{Context, Result};
use egret_cni::attachment::{self, Attachment};
use egret_cni::offline_policies::OfflinePolicies;
use egret_cni::run_dir;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The quarantines that this pass has read.
#[derive(Debug, Default)]
pub(super) struct Quarantines {
    found: BTreeSet<IpAddr>,
    lifted: BTreeSet<IpAddr>,
}

impl NodeDaemon {
    /// The step [`PluginRecords`](super::steps::Step::PluginRecords).
    pub(super) async fn read_plugin_records(&mut self) -> Result<()> {
        // Before the attachments: the plugin writes those first, so the attachment of every quarantine seen here is
        // loaded.
        self.quarantines.found = self.host.quarantined()?;
        // The notification about a removed veth may have been lost, and the kernel rejects a chain of a missing
        // interface.
        for index in self.pods.interfaces().collect::<Vec<_>>() {
            self.veth_gone(index).await;
        }
        self.load_attachments().await?;
        self.try_writing();
        Ok(())
    }

    /// Loads the attachments that the plugin wrote while the daemon was away.
    pub(super) async fn load_attachments(&mut self) -> Result<()> {
        let all = attachment::load_all(&self.options.run_dir).context("attachments")?;
        for a in all {
            // After a DEL, the file stays until all else of the attachment is removed.
            if self.pods.get(&a.id) == Some(&a) || self.requests.is_detached(&a.id) {
                continue;
            }
            let interface = self.interface(&a).await?;
            // Of two pods with one address, it is unknown which one is gone and whose the connections are.
            self.connections.ended.of_earlier |= !self.of_gone(&a).is_empty();
            self.attach(a, interface);
        }
        Ok(())
    }

    pub(super) async fn interface(&self, a: &Attachment) -> Result<Option<Interface>> {
        match &a.host {
            Some(host) => self.host.interface(host.index, host.peer_index).await,
            None => Ok(None),
        }
    }

    /// The addresses of a new pod that another pod has. That other pod must be gone.
    pub(super) fn of_gone(&self, a: &Attachment) -> Vec<IpAddr> {
        let is_new = self.pods.get(&a.id).is_none();
        a.addresses.iter().filter(|x| is_new && self.pods.has_address(x)).copied().collect()
    }

    /// Adds a pod. Returns whether an unmanaged pod with one of its addresses was in quarantine.
    pub(super) fn attach(&mut self, a: Attachment, interface: Option<Interface>) -> bool {
        if a.addresses.iter().any(|x| !self.view.networks.is_of_pods(*x)) {
            self.pending.raise(Input::PodAddresses);
        }
        let was_missing = self.unmanaged.attached(&a.addresses);
        self.connections.ended.addresses.extend(self.pods.attach(a, interface));
        was_missing
    }

    /// Handles the removal of a veth. When the notification arrives, another pod's veth may have its index.
    pub(super) async fn veth_gone(&mut self, index: u32) {
        if !self.pods.has_interface(index) {
            return;
        }
        // The kernel may have rejected the chain of just this pod.
        self.problems.refusals.end_pauses(std::time::Instant::now());
        match self.host.veth(index).await {
            Ok(now) => self.connections.ended.addresses.extend(self.pods.interface_gone(index, now.as_ref())),
            // If it is gone, the kernel rejects the pod's chain, and the next pass tries again.
            Err(e) => tracing::warn!(index, "cannot read a pod's veth: {e:#}"),
        }
    }

    /// Writes the files of the run directory again.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn restore_run_dir(&mut self) -> Result<()> {
        self.unmanaged.files.invalidate();
        self.pods.attachments().try_for_each(|a| a.store(&self.options.run_dir)).context("attachments")
    }

    /// The step [`Quarantine`](super::steps::Step::Quarantine).
    pub(super) fn quarantine_missing(&mut self) -> Result<()> {
        let missing = self.unmanaged.missing();
        self.host.quarantine(&missing)?;
        let lifted: BTreeSet<IpAddr> = self.quarantines.found.difference(&missing).copied().collect();
        self.connections.ended.quarantined = lifted.iter().filter(|a| self.pods.has_attached(a)).copied().collect();
        self.quarantines.lifted = lifted;
        Ok(())
    }

    /// The step [`Release`](super::steps::Step::Release). Returns the number of changes.
    pub(super) fn lift_quarantines(&mut self) -> Result<usize> {
        self.host.lift_quarantines(&self.quarantines.lifted)?;
        let changes = self.quarantines.lifted.len();
        self.quarantines = Quarantines::default();
        Ok(changes)
    }

    /// The step [`Detached`](super::steps::Step::Detached).
    pub(super) fn forget_detached(&mut self) -> Result<()> {
        self.requests.forget_detached(&self.options.run_dir).context("attachments")
    }

    /// The step [`OfflinePolicies`](super::steps::Step::OfflinePolicies).
    pub(super) fn store_offline_policies_again(&mut self) {
        if OfflinePolicies::is_there(&self.options.state_dir) {
            self.store_offline_policies();
        } else {
            self.pending.raise(Input::NeverInSync);
        }
    }

    /// The step [`FirstOfflinePolicies`](super::steps::Step::FirstOfflinePolicies).
    pub(super) fn store_offline_policies(&mut self) {
        self.problems.offline_policies = self.report.store_offline_policies(&self.view).err().map(|e| {
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
        self.problems.run_dir = run_dir::try_writing(run_dir).err().map(|e| {
            format!(
                "no pod can start: the run directory {} cannot be written to: {e}; make room there",
                run_dir.display()
            )
        });
    }
}
