//! Connections of pods that began before a policy covered them. They have no connection mark of Egret's and leave
//! from the node's address.
//!
//! They exist when a policy starts to select a running pod. With `existingConnections: End` their entries are deleted
//! then, and the next packet begins a new connection. With `Keep` they continue, and their ids are stored. Any other
//! unmarked connection began while another program had removed Egret's rules, and would leave from the node's address
//! as long as it lasts. It is ended when the rules are back.
//!
//! One thread does this in the background, in the order of events.

use super::pods::{PodId, Use};
use crate::api::{ExistingConnections, Fallback};
use crate::model::marks::{EgressId, Marks};
use crate::model::networks::Networks;
use crate::model::shared::Shared;
use crate::node_plan::policy_chain::{PolicyAction, PolicyChain};
use anyhow::Result;
use egret_nft::conntrack::{self, Connection};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// What each of this node's selected pods uses.
pub type Uses = BTreeMap<PodId, Arc<Use>>;

/// The handle of the thread that handles such connections.
pub struct Existing {
    jobs: Sender<Job>,
    marks: Marks,
    /// The state in the last job.
    sent: (Uses, BTreeSet<EgressId>),
    /// Pods that have started under their policies since the last job.
    new: BTreeSet<PodId>,
    /// Whether Egret's rules were removed and restored since the last job.
    mended: bool,
}

/// The state of the kernel after it was brought in sync.
struct Job {
    uses: Uses,
    /// The allocations that are ready.
    ready: BTreeSet<EgressId>,
    new: BTreeSet<PodId>,
    mended: bool,
    inside: Inside,
    marks: Marks,
}

/// Destinations that no policy covers.
struct Inside {
    networks: Shared<Networks>,
    /// The node's own addresses.
    own: BTreeSet<IpAddr>,
}

impl Existing {
    /// Starts the thread. `mended` says that Egret's rules are missing in the kernel although they were there before.
    pub fn start(marks: Marks, mended: bool) -> Self {
        let (jobs, incoming) = channel();
        thread::spawn(move || ConnectionReview::default().work(&incoming));
        Existing { jobs, marks, sent: Default::default(), new: BTreeSet::new(), mended }
    }

    /// Adds a pod that has started, and that sent nothing before its policies were in force.
    pub fn add_new_pod(&mut self, pod: PodId) {
        self.new.insert(pod);
    }

    /// Sends a job if the state has changed. `uses` and `ready` are in force in the kernel. `mended` says that rules
    /// had been removed by another program and were restored.
    pub fn update(
        &mut self,
        uses: &Uses,
        ready: BTreeSet<EgressId>,
        mended: bool,
        networks: &Shared<Networks>,
        own: &BTreeSet<IpAddr>,
    ) {
        self.mended |= mended;
        let (sent, were_ready) = &self.sent;
        let same_uses = sent.values().zip(uses.values()).all(|(old, new)| Arc::ptr_eq(old, new));
        let same = sent.keys().eq(uses.keys()) && same_uses && *were_ready == ready;
        self.new.retain(|pod| uses.contains_key(pod));
        if same && !self.mended {
            self.new.clear();
            return;
        }
        self.sent = (uses.clone(), ready.clone());
        let job = Job {
            uses: uses.clone(),
            ready,
            new: std::mem::take(&mut self.new),
            mended: std::mem::take(&mut self.mended),
            inside: Inside { networks: networks.clone(), own: own.clone() },
            marks: self.marks,
        };
        // The thread ends with this.
        let _ = self.jobs.send(job);
    }
}

/// The thread's state.
#[derive(Default)]
struct ConnectionReview {
    pods: BTreeMap<PodId, Pod>,
    ready: BTreeSet<EgressId>,
    /// Rules were removed and restored, and the pods' connections have not been reviewed since.
    mended: bool,
    /// Whether a review has been completed.
    is_complete: bool,
}

/// A pod whose connections were reviewed.
struct Pod {
    policy_chain: Arc<PolicyChain>,
    /// The ids of connections that began before its policies.
    kept: HashSet<u32>,
    /// Whether it has been isolated since its start, so that it has no such connections.
    is_new: bool,
}

impl ConnectionReview {
    fn work(mut self, jobs: &Receiver<Job>) {
        while let Ok(mut job) = jobs.recv() {
            // Jobs that have queued up are merged.
            while let Ok(next) = jobs.try_recv() {
                job = Job { new: &job.new | &next.new, mended: job.mended | next.mended, ..next };
            }
            match self.review(&job) {
                Ok(0) => {}
                Ok(n) => tracing::info!(entries = n, "ended connections that had begun without their policies"),
                // The next job tries again.
                Err(e) => tracing::error!("connections that began without their policies cannot be ended: {e:#}"),
            }
        }
    }

    /// Reviews the pods whose policies have changed, and returns how many connections were ended.
    fn review(&mut self, job: &Job) -> Result<usize> {
        self.pods.retain(|pod_id, _| job.uses.contains_key(pod_id));
        self.mended |= job.mended;
        for pod_id in job.new.iter().filter(|pod_id| job.uses.contains_key(*pod_id)) {
            let isolated = Pod { policy_chain: Arc::new(PolicyChain::Isolated), kept: HashSet::new(), is_new: true };
            self.pods.insert(pod_id.clone(), isolated);
        }
        let changed: Vec<(&PodId, &Use, &Arc<PolicyChain>)> = job
            .uses
            .iter()
            .filter_map(|(pod_id, used)| {
                let policy_chain = used.policy_chain.as_ref()?;
                self.needs_review(pod_id, policy_chain, &job.ready).then_some((pod_id, &**used, policy_chain))
            })
            .collect();
        let mut found = ReviewFindings { kept: BTreeMap::new(), ended: 0 };
        if !changed.is_empty() {
            found = self.find(&changed, job)?;
        }
        for (pod_id, used) in &job.uses {
            let Some(policy_chain) = &used.policy_chain else { continue };
            let before = self.pods.remove(pod_id);
            let is_new = before.as_ref().is_some_and(|pod| pod.is_new) && **policy_chain == PolicyChain::Isolated;
            let kept = found.kept.remove(pod_id).or(before.map(|pod| pod.kept)).unwrap_or_default();
            self.pods.insert(pod_id.clone(), Pod { policy_chain: policy_chain.clone(), kept, is_new });
        }
        self.ready.clone_from(&job.ready);
        (self.mended, self.is_complete) = (false, true);
        Ok(found.ended)
    }

    fn needs_review(&self, pod_id: &PodId, policy_chain: &Arc<PolicyChain>, ready: &BTreeSet<EgressId>) -> bool {
        let Some(before) = self.pods.get(pod_id) else { return true };
        if self.mended {
            return true;
        }
        if before.is_new {
            return false;
        }
        let is_ready_now = |allocation: EgressId| ready.contains(&allocation) && !self.ready.contains(&allocation);
        let mut of_node = policy_chain.steps().iter().filter(|step| step.falls_back());
        before.policy_chain != *policy_chain || of_node.any(|step| step.allocation().is_some_and(is_ready_now))
    }

    /// Ends connections of these pods, and collects the ones that continue.
    fn find(&self, pods: &[(&PodId, &Use, &Arc<PolicyChain>)], job: &Job) -> Result<ReviewFindings> {
        let of_address: HashMap<IpAddr, (&PodId, &PolicyChain)> = pods
            .iter()
            .flat_map(|(pod_id, used, policy_chain)| {
                used.addresses.iter().map(move |a| (*a, (*pod_id, &***policy_chain)))
            })
            .collect();
        let mut kept: BTreeMap<PodId, HashSet<u32>> =
            pods.iter().map(|(h, ..)| ((*h).clone(), HashSet::new())).collect();
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let ended = conntrack::delete_by_source(&mut socket, &of_address.keys().copied().collect(), |c| {
            let Some((pod_id, policy_chain)) = of_address.get(&c.source) else { return false };
            if job.inside.has(c.reply_source) {
                return false;
            }
            if c.mark & job.marks.connection_mask() == job.marks.connection(0) {
                // It has an egress IP, and keeps it unless a direct policy says otherwise.
                return ends_at_direct(policy_chain, c);
            }
            let before = self.pods.get(*pod_id);
            match self.action(before, policy_chain, &job.ready, c) {
                Action::End => return true,
                Action::Keep => {
                    kept.entry((*pod_id).clone()).or_default().insert(c.id);
                }
                Action::Ignore => {}
            }
            false
        })?;
        Ok(ReviewFindings { kept, ended })
    }

    fn action(
        &self,
        before: Option<&Pod>,
        policy_chain: &PolicyChain,
        ready: &BTreeSet<EgressId>,
        c: &Connection,
    ) -> Action {
        match decides(policy_chain, ready, c) {
            None => Action::Ignore,
            Some(ExistingConnections::End) => Action::End,
            Some(ExistingConnections::Keep) => {
                let is_known = match before {
                    Some(before) => {
                        before.kept.contains(&c.id) || decides(&before.policy_chain, &self.ready, c).is_none()
                    }
                    // The rules were removed before this daemon started, so the earlier connections are unknown.
                    None => self.is_complete,
                };
                if is_known || !self.mended { Action::Keep } else { Action::End }
            }
        }
    }
}

/// See [`ConnectionReview::find`].
struct ReviewFindings {
    kept: BTreeMap<PodId, HashSet<u32>>,
    ended: usize,
}

/// What to do with a connection without a mark.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    /// Nothing: no policy covers it.
    Ignore,
    /// Keep it: it began before its policy.
    Keep,
    /// End it.
    End,
}

impl Inside {
    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.networks.is_direct(address) || self.own.contains(&address)
    }
}

/// What the policy that covers a connection says about existing ones. `None` if the connection may leave from the
/// node's address.
fn decides(policy_chain: &PolicyChain, ready: &BTreeSet<EgressId>, c: &Connection) -> Option<ExistingConnections> {
    if *policy_chain == PolicyChain::Isolated {
        return Some(ExistingConnections::Keep);
    }
    let step = policy_chain.step_for(c.reply_source, c.protocol, c.reply_port)?;
    let PolicyAction::EgressIp { allocation, fallback } = step.action else { return None };
    let is_ready = allocation.is_some_and(|allocation| ready.contains(&allocation));
    (fallback == Fallback::Block || is_ready).then_some(step.existing_connections)
}

/// Whether a connection with an egress IP is ended, because a direct policy decides now and says so.
fn ends_at_direct(policy_chain: &PolicyChain, c: &Connection) -> bool {
    let step = policy_chain.step_for(c.reply_source, c.protocol, c.reply_port);
    step.is_some_and(|step| {
        step.action == PolicyAction::Direct && step.existing_connections == ExistingConnections::End
    })
}

#[cfg(test)]
mod tests;
