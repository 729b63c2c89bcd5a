//! Plugins' requests, and the responses that wait until the kernel is in sync.

use super::Node;
use crate::model::{Cluster, ObjectKey};
use crate::node::pods::{self, Holder, Pods};
use crate::node::socket::PluginRequest;
use crate::node_plan::View;
use egret_cni::attachment::{Attachment, AttachmentId};
use egret_cni::protocol::{Failure, Verb, codes};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long ADD waits for the cluster's source to report the pod. A pod that starts isolated loses its first packets.
const UNKNOWN_WAIT: Duration = Duration::from_millis(500);

/// A request that waits for its response.
pub(super) struct Waiting {
    pub(super) since: Instant,
    pub(super) verb: &'static str,
    /// The attachment whose pod should be known before the response.
    unknown: Option<AttachmentId>,
    pub(super) answer: oneshot::Sender<Result<(), Failure>>,
}

impl Waiting {
    /// Whether it is the ADD of a pod that no policy selects. Such a pod starts even if the kernel cannot be brought
    /// in sync, because it needs nothing there.
    pub(super) fn is_free(&self, pods: &Pods, cluster: &Cluster, view: &View) -> bool {
        let attachment = self.unknown.as_ref().and_then(|id| pods.get(id));
        attachment.is_some_and(|a| pods.policy_chain(a, cluster, view).is_none())
    }

    pub(super) fn is_due(&self, pods: &Pods) -> bool {
        self.unknown.as_ref().is_none_or(|id| pods.is_decided(id)) || self.since.elapsed() >= UNKNOWN_WAIT
    }
}

impl Node {
    /// Takes plugins' requests. [`reconcile_all`](Self::reconcile_all) sends the responses when the kernel is in sync.
    pub async fn answer(&mut self, requests: Vec<PluginRequest>) {
        for PluginRequest { verb, response: answer } in requests {
            let mut unknown = None;
            let (verb, result) = match verb {
                Verb::Add(a) => {
                    unknown = Some(a.id.clone());
                    ("ADD", self.add(a).await)
                }
                Verb::Del(id) => ("DEL", self.del(id)),
                Verb::Check(a) => ("CHECK", self.check(&a)),
                Verb::Gc { network, valid } => ("GC", self.collect_garbage(&network, &valid)),
            };
            match result {
                Ok(()) => self.waiting.push(Waiting { since: Instant::now(), verb, unknown, answer }),
                Err(failure) => {
                    tracing::warn!(verb, "rejected the plugin's request: {failure}");
                    let _ = answer.send(Err(failure));
                }
            }
        }
    }

    async fn add(&mut self, a: Attachment) -> Result<(), Failure> {
        let io = |e: String| Failure::new(codes::IO, "egretd cannot take the pod in", e);
        let interface = self.interface(&a).await.map_err(|e| io(format!("{e:#}")))?;
        if interface.is_none() && self.pods.policy_chain(&a, &self.cluster, &self.view).is_some() {
            return Err(Failure::new(
                codes::NO_HOST_INTERFACE,
                format!("pod {}/{} has no veth peer on the host", a.pod.namespace, a.pod.name),
                "a policy selects it, and a pod with macvlan, ipvlan or SR-IOV cannot be held to a policy; use a CNI \
                 plugin that makes veth pairs for it, or exclude it from the policy's podSelector",
            ));
        }
        if let Err(e) = a.store(&self.options.run_dir) {
            self.try_writing();
            return Err(io(e.to_string()));
        }
        if !pods::is_known(&a, &self.cluster) {
            self.listeners.lookup.look_for(ObjectKey::new(&a.pod.namespace, &a.pod.name), &a.pod.uid);
        }
        // Tracked connections of these addresses are an earlier pod's.
        self.ended.addresses.extend(self.of_gone(&a));
        if self.pods.get(&a.id).is_none() {
            self.existing.add_new_pod(Holder::Attached(Arc::new(a.id.clone())));
        }
        self.attach(a, interface);
        Ok(())
    }

    fn del(&mut self, id: AttachmentId) -> Result<(), Failure> {
        self.ended.addresses.extend(self.pods.detach(&id));
        self.leaving.push(id);
        Ok(())
    }

    fn check(&mut self, a: &Attachment) -> Result<(), Failure> {
        let wrong = |msg: String, details: &str| Err(Failure::new(codes::NOT_PROGRAMMED, msg, details));
        match self.pods.get(&a.id) {
            None => {
                return wrong(
                    format!("egretd does not know container {}, interface {}", a.id.container_id, a.id.ifname),
                    "it was not added through egret-cni, or was deleted since; start the pod anew",
                );
            }
            Some(known) if known.addresses != a.addresses => {
                return wrong(
                    format!(
                        "the pod's addresses are {:?}, and were {:?} when it was added",
                        a.addresses, known.addresses
                    ),
                    "start the pod anew",
                );
            }
            Some(known) if known.host != a.host => {
                return wrong(
                    format!("the pod's interface {} is another one than when it was added", a.id.ifname),
                    "start the pod anew",
                );
            }
            Some(_) => {}
        }
        // The kernel's state is read and repaired before the response.
        self.invalidate();
        Ok(())
    }

    fn collect_garbage(&mut self, network: &str, valid: &[AttachmentId]) -> Result<(), Failure> {
        let gone: Vec<AttachmentId> = self.pods.of_network(network).filter(|id| !valid.contains(id)).cloned().collect();
        gone.into_iter().try_for_each(|id| self.del(id))
    }

    /// Waits for the deadline of the oldest waiting request.
    pub async fn next_deadline(&self) {
        match self.waiting.iter().map(|w| w.since + UNKNOWN_WAIT).min() {
            Some(due) => tokio::time::sleep_until(due.into()).await,
            None => std::future::pending().await,
        }
    }
}
