//! Unmanaged pods: selected pods on this node that the plugin did not set up. A pod whose veth is found is adopted. A
//! pod whose veth is not found is quarantined by its address.

use super::Node;
use crate::model::ObjectKey;
use crate::node::adopted_files::Remembered;
use crate::node::adoption::{self, SearchResult};
use anyhow::Result;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The pause between two searches for the same pod.
const SEEK_AGAIN: Duration = Duration::from_secs(5);

impl Node {
    /// Starts searches for the veths of unmanaged pods.
    pub(super) fn seek_unmanaged(&mut self) {
        self.put_off.retain(|_, since| since.elapsed() < SEEK_AGAIN);
        let mut unmanaged = self.pods.unmanaged(&self.cluster, &self.view);
        let again = |key: &ObjectKey| self.missing.get(key).is_none_or(|(since, _)| since.elapsed() >= SEEK_AGAIN);
        unmanaged.retain(|(key, _)| again(key) && !self.put_off.contains_key(key) && self.sought.insert(key.clone()));
        adoption::spawn_search(&self.host.routes, unmanaged, &self.listeners.adopted);
    }

    /// Takes the result of a search: adopts the pod, or quarantines its addresses.
    pub fn adopt(&mut self, found: SearchResult) {
        self.sought.remove(&found.pod);
        let is_gone = found.interface.is_none() && self.pods.is_gone(&found.pod);
        if is_gone || found.addresses.iter().any(|a| self.pods.is_in_use(a, &found.pod)) {
            // Another pod has the address, the plugin has set up this one meanwhile, or it is gone and its DEL is
            // late.
            self.put_off.insert(found.pod, Instant::now());
            return;
        }
        let before = self.missing.remove(&found.pod);
        if let Some(interface) = found.interface {
            tracing::info!(pod = %found.pod, veth = %interface.name, "adopted unmanaged pod");
            self.left_behind |= before.is_some();
            self.stale |= found.addresses.iter().any(|x| !self.view.networks.is_of_pods(*x));
            let known = Remembered { pod: found.pod, interface, addresses: found.addresses, labels: None };
            self.ended.addresses.extend(self.pods.adopt(known));
            return;
        }
        if !self.is_to_be_held(&found.pod, &found.addresses) {
            // The pod ended during the search.
            self.left_behind |= before.is_some();
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
        self.missing.insert(found.pod, (Instant::now(), found.addresses));
    }

    /// Adopts the pods that an earlier daemon had adopted and whose veths still exist. The cluster may have dropped
    /// them.
    pub(super) async fn restore_adopted(&mut self, all: Vec<Remembered>) -> Result<()> {
        for known in all {
            let (interface, pod) = (&known.interface, &known.pod);
            let now = self.host.interface(interface.index, interface.peer_index).await?;
            if now.as_ref() == Some(interface) {
                tracing::info!(%pod, veth = %interface.name, "restored adopted pod");
                self.ended.addresses.extend(self.pods.adopt(known));
            }
        }
        Ok(())
    }

    /// Writes the files of adopted pods, for the next daemon.
    pub(super) fn write_adopted(&mut self) {
        self.forgetful = self.written.update(self.pods.adopted()).err().map(|e| {
            format!(
                "the files of adopted pods cannot be written to the run directory {}, and after a restart egretd would not \
                 know those that the cluster has dropped: {e}; make room there",
                self.options.run_dir.display()
            )
        });
    }

    /// Drops unmanaged pods without a veth that have ended, have other addresses now, or are no longer selected.
    pub(super) fn drop_missing(&mut self) {
        let before = self.missing.len();
        let mut missing = std::mem::take(&mut self.missing);
        missing.retain(|key, (_, held)| self.is_to_be_held(key, held));
        self.missing = missing;
        self.left_behind |= self.missing.len() < before;
    }

    /// Whether the cluster has a pod with these addresses that a policy selects.
    fn is_to_be_held(&self, key: &ObjectKey, addresses: &[IpAddr]) -> bool {
        let pod = self.cluster.pods.get(key).filter(|pod| *pod.addresses == *addresses);
        pod.is_some_and(|pod| self.view.policy_chain(&key.namespace, Some(&pod.labels)).is_some())
    }

    /// The addresses of unmanaged pods whose veth was not found.
    pub(super) fn unfound(&self) -> BTreeSet<IpAddr> {
        self.missing.values().flat_map(|(_, addresses)| addresses).copied().collect()
    }
}
