//! The inputs of the thread that records connections, and the pods that are announced to other nodes that record.

use super::NodeDaemon;
use crate::model::ObjectKey;
use crate::model::egress_node::EgressNode;
use crate::model::selector::Name;
use crate::model::shared::Mark;
use crate::node::Options;
use crate::node::flow_log::{Announced, Announcer, FlowLog, FlowView, PodName, RecordedIp};
use crate::node::metrics::Metrics;
use crate::node::pods::PodId;
use crate::node_plan::addresses;
use crate::node_plan::allocations::AllocationState;
use anyhow::Result;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// The other nodes that record connections, with the time since when, as of the nodes' last statuses.
#[derive(Debug, Default)]
struct Recording {
    nodes: BTreeMap<Mac, i64>,
    of: Mark<BTreeMap<Name, Arc<EgressNode>>>,
}

/// The recording of connections, and the announcement of this node's pods to other nodes that record.
pub(super) struct FlowRecords {
    /// `None`: this node records nothing.
    log: Option<FlowLog>,
    announcer: Announcer,
    recording: Recording,
}

impl FlowRecords {
    /// Starts the threads and tasks.
    pub(super) fn start(options: &Options, metrics: &Metrics) -> Result<Self> {
        let log = options.flow_log.as_ref().map(|to| FlowLog::start(to, options.marks, metrics.flow_log()));
        Ok(FlowRecords { log: log.transpose()?, announcer: Announcer::start(), recording: Recording::default() })
    }
}

impl NodeDaemon {
    /// Since when this node records connections, seconds since the Unix epoch.
    pub(super) fn flow_log_since(&self) -> Option<i64> {
        self.flow_records.log.as_ref().map(|flow_log| flow_log.since())
    }

    /// Announces the pods that use egress IPs to the owners that record connections.
    pub(super) fn announce_pods(&mut self) {
        let to = self.recording_owners();
        if to.is_empty() && self.flow_records.announcer.is_idle() {
            return;
        }
        let pods = if to.is_empty() { Vec::new() } else { self.pod_names() };
        self.flow_records.announcer.set(Announced { end: self.host.prober(), to, pods });
    }

    /// Passes on the inputs of records.
    pub(super) fn set_flow_view(&self) {
        let Some(flow_log) = &self.flow_records.log else { return };
        let (allocations, mut egress_ips) = (&self.view.allocations, HashMap::new());
        for allocation in allocations.allocations.values().filter(|allocation| allocation.is_member()) {
            let owns = allocation.state == AllocationState::Local;
            let egress_ip = RecordedIp { gateway: allocation.gateway.clone(), owns };
            egress_ips.extend(addresses(allocation).map(|address| (address, egress_ip.clone())));
        }
        let peers = self.host.peer_indexes().iter().filter_map(|(mac, index)| {
            let peer = allocations.peers.get(mac)?;
            Some((*index, (*mac, peer.node.clone())))
        });
        let pods = self.pod_names().into_iter().map(Arc::new);
        flow_log.set_view(FlowView {
            node: (&*self.options.name).into(),
            end: self.host.prober(),
            egress_ips,
            peers: peers.collect(),
            pods: pods.flat_map(|pod| pod.addresses.clone().into_iter().map(move |a| (a, pod.clone()))).collect(),
            policies: self.cluster.policies.clone(),
        });
    }

    /// The other nodes that own egress IPs of this node's pods and record connections, with the time since when.
    fn recording_owners(&mut self) -> BTreeMap<Mac, i64> {
        let nodes = &self.cluster.egress_nodes;
        if !nodes.has(&self.flow_records.recording.of) {
            let recording = nodes.iter().filter_map(|(name, node)| {
                let since = node.of_allocations().flow_log_since.filter(|_| **name != *self.options.name)?;
                Some((node.tunnel_mac?, since))
            });
            self.flow_records.recording = Recording { nodes: recording.collect(), of: nodes.mark() };
        }
        let recording = &self.flow_records.recording.nodes;
        if recording.is_empty() {
            return BTreeMap::new();
        }
        let used = self.enforced.uses.values().flat_map(|used| &used.allocations);
        let owners = used.filter_map(|id| match self.view.allocations.allocations.get(id)?.state {
            AllocationState::Remote(mac) => recording.get(&mac).map(|since| (mac, *since)),
            _ => None,
        });
        owners.collect()
    }

    /// The pods of this node that policies select.
    fn pod_names(&self) -> Vec<PodName> {
        let attached: BTreeMap<_, _> = self.pods.attachments().map(|attachment| (&attachment.id, attachment)).collect();
        let adopted: BTreeMap<u32, _> = self.pods.adopted().map(|known| (known.interface.index, known)).collect();
        let name = |pod_id: &PodId| match pod_id {
            PodId::Attached(id) => {
                let pod = &attached.get(&**id)?.pod;
                Some((ObjectKey::new(&pod.namespace, &pod.name), pod.uid.clone()))
            }
            PodId::Adopted(index) => Some((adopted.get(index)?.pod.clone(), String::new())),
        };
        let names = self.enforced.uses.iter().filter_map(|(pod_id, used)| {
            let (key, uid) = name(pod_id)?;
            let known = self.cluster.pods.get(&key).map(|pod| pod.uid.to_string());
            let steps = used.policy_chain.iter().flat_map(|policy_chain| policy_chain.steps());
            Some(PodName {
                addresses: used.addresses.clone(),
                namespace: key.namespace.to_string(),
                name: key.name.to_string(),
                uid: if uid.is_empty() { known.unwrap_or_default() } else { uid },
                policies: steps.map(|step| step.policy.to_string()).collect(),
            })
        });
        names.collect()
    }
}
