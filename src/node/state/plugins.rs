//! Plugins' requests, and the responses that wait until the kernel is in sync.

use super::NodeDaemon;
use super::steps::Input;
use crate::model::{Cluster, ObjectKey};
use crate::node::pods::{self, PodId, Pods};
use crate::node::socket::PluginRequest;
use crate::node_plan::View;
use egret_cni::attachment::{Attachment, AttachmentId};
use egret_cni::protocol::{CniError, Verb, codes};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long ADD waits for the cluster's source to report the pod. A pod that starts isolated loses its first packets.
const UNKNOWN_WAIT: Duration = Duration::from_millis(500);

/// A request that waits for its response.
struct Waiting {
    since: Instant,
    verb: &'static str,
    /// The attachment whose pod should be known before the response.
    unknown: Option<AttachmentId>,
    answer: oneshot::Sender<Result<(), CniError>>,
}

impl Waiting {
    /// Whether it is the ADD of a pod that no policy selects. Such a pod starts even if the kernel cannot be brought
    /// in sync, because it needs nothing there.
    fn is_free(&self, pods: &Pods, cluster: &Cluster, view: &View) -> bool {
        let attachment = self.unknown.as_ref().and_then(|id| pods.get(id));
        attachment.is_some_and(|a| pods.policy_chain(a, cluster, view).is_none())
    }

    fn is_due(&self, pods: &Pods) -> bool {
        self.unknown.as_ref().is_none_or(|id| pods.is_decided(id)) || self.since.elapsed() >= UNKNOWN_WAIT
    }
}

/// Plugins' requests that are not completed.
#[derive(Default)]
pub(super) struct Requests {
    /// Requests that wait until the kernel is in sync.
    waiting: Vec<Waiting>,
    /// Attachments whose files are removed when all else of theirs is.
    detached: Vec<AttachmentId>,
}

impl Requests {
    /// Whether the attachment's DEL has come.
    pub(super) fn is_detached(&self, id: &AttachmentId) -> bool {
        self.detached.contains(id)
    }

    /// Removes the files of attachments whose DEL has come.
    ///
    /// # Errors
    /// A file cannot be removed; the next call tries again.
    pub(super) fn forget_detached(&mut self, run_dir: &Path) -> io::Result<()> {
        while let Some(id) = self.detached.last() {
            id.forget(run_dir)?;
            self.detached.pop();
        }
        Ok(())
    }
}

impl NodeDaemon {
    /// Takes plugins' requests. [`pass`](Self::pass) sends the responses when the kernel is in sync.
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
                Ok(()) => self.requests.waiting.push(Waiting { since: Instant::now(), verb, unknown, answer }),
                Err(failure) => {
                    tracing::warn!(verb, "rejected the plugin's request: {failure}");
                    let _ = answer.send(Err(failure));
                }
            }
        }
    }

    async fn add(&mut self, a: Attachment) -> Result<(), CniError> {
        let io = |e: String| CniError::new(codes::IO, "egretd cannot take the pod in", e);
        let interface = self.interface(&a).await.map_err(|e| io(format!("{e:#}")))?;
        if interface.is_none() && self.pods.policy_chain(&a, &self.cluster, &self.view).is_some() {
            return Err(CniError::new(
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
        self.connections.ended.addresses.extend(self.of_gone(&a));
        if self.pods.get(&a.id).is_none() {
            self.connections.existing.add_new_pod(PodId::Attached(Arc::new(a.id.clone())));
        }
        if self.attach(a, interface) {
            self.pending.raise(Input::PluginRecords);
        }
        Ok(())
    }

    fn del(&mut self, id: AttachmentId) -> Result<(), CniError> {
        self.connections.ended.addresses.extend(self.pods.detach(&id));
        self.requests.detached.push(id);
        Ok(())
    }

    fn check(&mut self, a: &Attachment) -> Result<(), CniError> {
        let wrong = |msg: String, details: &str| Err(CniError::new(codes::NOT_PROGRAMMED, msg, details));
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

    fn collect_garbage(&mut self, network: &str, valid: &[AttachmentId]) -> Result<(), CniError> {
        let gone: Vec<AttachmentId> = self.pods.of_network(network).filter(|id| !valid.contains(id)).cloned().collect();
        gone.into_iter().try_for_each(|id| self.del(id))
    }

    /// Sends the responses that are due, or `failure` to all requests that wait.
    pub(super) fn respond(&mut self, failure: Option<&CniError>) {
        for waiting in self.requests.waiting.extract_if(.., |w| failure.is_some() || w.is_due(&self.pods)) {
            self.metrics.answered(waiting.verb, waiting.since.elapsed());
            // If the plugin has timed out meanwhile, the runtime calls DEL.
            let failure = failure.filter(|_| !waiting.is_free(&self.pods, &self.cluster, &self.view));
            let _ = waiting.answer.send(failure.cloned().map_or(Ok(()), Err));
        }
    }

    /// Waits for the deadline of the oldest waiting request.
    pub async fn next_request_deadline(&self) {
        match self.requests.waiting.iter().map(|w| w.since + UNKNOWN_WAIT).min() {
            Some(due) => tokio::time::sleep_until(due.into()).await,
            None => std::future::pending().await,
        }
    }
}
