//! Unmanaged pods: selected pods on this node that the plugin did not set up. A pod whose veth is found is adopted. A
//! pod whose veth is not found is quarantined by its address.

use super::NodeDaemon;
use super::steps::Input;
use crate::model::{Client, ObjectKey};
use crate::node::adopted_files::{AdoptedFiles, Remembered};
use crate::node::adoption::{self, SearchResult};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The pause between two searches for the same pod.
const SEEK_AGAIN: Duration = Duration::from_secs(5);

/// The state of the searches.
#[derive(Debug)]
pub(super) struct Unmanaged {
    /// Pods whose search is running.
    sought: BTreeSet<ObjectKey>,
    /// Pods whose veth was not found: when, and their addresses, which are in quarantine.
    missing: BTreeMap<ObjectKey, (Instant, Vec<IpAddr>)>,
    /// Pods whose search result was discarded, and when. They are not searched again at once.
    put_off: BTreeMap<ObjectKey, Instant>,
    /// The files of adopted pods.
    pub(super) files: AdoptedFiles,
}

impl Unmanaged {
    pub(super) fn new(files: AdoptedFiles) -> Self {
        Unmanaged { sought: BTreeSet::new(), missing: BTreeMap::new(), put_off: BTreeMap::new(), files }
    }

    /// Drops the pods without a veth whose addresses a pod has that the plugin attached. Returns whether there were
    /// any.
    pub(super) fn attached(&mut self, addresses: &[IpAddr]) -> bool {
        let before = self.missing.len();
        self.missing.retain(|_, (_, quarantined)| !quarantined.iter().any(|a| addresses.contains(a)));
        self.missing.len() < before
    }

    /// The addresses of pods whose veth was not found.
    pub(super) fn missing(&self) -> BTreeSet<IpAddr> {
        self.missing.values().flat_map(|(_, addresses)| addresses).copied().collect()
    }

    /// The number of pods whose veth was not found.
    pub(super) fn count_missing(&self) -> usize {
        self.missing.len()
    }
}

impl NodeDaemon {
    /// Starts searches for the veths of unmanaged pods.
    pub(super) fn seek_unmanaged(&mut self) {
        let Unmanaged { sought, missing, put_off, .. } = &mut self.unmanaged;
        put_off.retain(|_, since| since.elapsed() < SEEK_AGAIN);
        let mut unmanaged = self.pods.unmanaged(&self.cluster, &self.view);
        let again = |key: &ObjectKey| missing.get(key).is_none_or(|(since, _)| since.elapsed() >= SEEK_AGAIN);
        unmanaged.retain(|(key, _)| again(key) && !put_off.contains_key(key) && sought.insert(key.clone()));
        adoption::spawn_search(&self.host.routes, unmanaged, &self.listeners.adopted);
    }

    /// Takes the result of a search: adopts the pod, or quarantines its addresses.
    pub fn adopt(&mut self, found: SearchResult) {
        self.unmanaged.sought.remove(&found.pod);
        let is_gone = found.interface.is_none() && self.pods.is_gone(&found.pod);
        if is_gone || found.addresses.iter().any(|a| self.pods.is_in_use(a, &found.pod)) {
            // Another pod has the address, the plugin has set up this one meanwhile, or it is gone and its DEL is
            // late.
            self.unmanaged.put_off.insert(found.pod, Instant::now());
            return;
        }
        let before = self.unmanaged.missing.remove(&found.pod);
        if let Some(interface) = found.interface {
            tracing::info!(pod = %found.pod, veth = %interface.name, "adopted unmanaged pod");
            if before.is_some() {
                self.pending.raise(Input::PluginRecords);
            }
            if found.addresses.iter().any(|x| !self.view.networks.is_of_pods(*x)) {
                self.pending.raise(Input::PodAddresses);
            }
            let (uid, labels) = (Box::default(), None);
            let known = Remembered { pod: found.pod, interface, addresses: found.addresses, uid, labels };
            self.connections.ended.addresses.extend(self.pods.adopt(known));
            return;
        }
        if !self.is_to_be_quarantined(&found.pod, &found.addresses) {
            // The pod ended during the search.
            if before.is_some() {
                self.pending.raise(Input::PluginRecords);
            }
            return;
        }
        if before.is_none() {
            tracing::warn!(
                pod = %found.pod,
                "a policy selects this pod, and no veth of this host leads to it, so it reaches the cluster's networks \
                 alone; restart it with egret-cni in the node's CNI configuration"
            );
            let uid = self.cluster.pods.get(&found.pod).map(|pod| pod.uid.clone()).unwrap_or_default();
            self.report.unmanaged_pod(&found.pod, &uid);
        }
        if let Err(e) = self.host.quarantine(&found.addresses) {
            tracing::error!(pod = %found.pod, "cannot quarantine the unmanaged pod: {e:#}");
        }
        self.unmanaged.missing.insert(found.pod, (Instant::now(), found.addresses));
    }

    /// Adopts the pods that an earlier daemon had adopted and whose veths still exist. The cluster may have dropped
    /// them.
    pub(super) async fn restore_adopted(&mut self, all: Vec<Remembered>) -> Result<()> {
        for known in all {
            let (interface, pod) = (&known.interface, &known.pod);
            let now = self.host.interface(interface.index, interface.peer_index).await?;
            if now.as_ref() == Some(interface) {
                tracing::info!(%pod, veth = %interface.name, "restored adopted pod");
                self.connections.ended.addresses.extend(self.pods.adopt(known));
            }
        }
        Ok(())
    }

    /// Writes the files of adopted pods, for the next daemon.
    pub(super) fn write_adopted(&mut self) {
        self.problems.adopted_files = self.unmanaged.files.update(self.pods.adopted()).err().map(|e| {
            format!(
                "the files of adopted pods cannot be written to the run directory {}, and after a restart egretd would not \
                 know those that the cluster has dropped: {e}; make room there",
                self.options.run_dir.display()
            )
        });
    }

    /// The step [`EndedPods`](super::steps::Step::EndedPods). Unmanaged pods without a veth are dropped if they have
    /// ended, have other addresses now, or are no longer selected.
    pub(super) fn drop_ended_pods(&mut self) {
        self.pods.drop_ended(&self.cluster);
        let mut missing = std::mem::take(&mut self.unmanaged.missing);
        let before = missing.len();
        missing.retain(|key, (_, addresses)| self.is_to_be_quarantined(key, addresses));
        if missing.len() < before {
            self.pending.raise(Input::PluginRecords);
        }
        self.unmanaged.missing = missing;
    }

    /// Whether the cluster has a pod with these addresses that a policy selects.
    fn is_to_be_quarantined(&self, key: &ObjectKey, addresses: &[IpAddr]) -> bool {
        let pod = self.cluster.pods.get(key).filter(|pod| *pod.addresses == *addresses);
        pod.is_some_and(|pod| self.view.policy_chain(Client::of(key, pod)).is_some())
    }
}
