//! Connections that pods have begun and that no policy has decided on: they have no mark of Egret's, and leave from
//! the node's address.
//!
//! There are some when a policy begins for a pod that runs. With `existingConnections: End` they are ended then, by
//! being forgotten: a packet that follows begins a new one. With `Keep` they go on, and it is remembered which ones
//! they are: others can only have begun while somebody had taken Egret's rules away, and would leave from the node's
//! address for as long as they last. Once the rules are back, those are ended.
//!
//! Nobody waits for this. One thread does it, in the order in which things happened.

use super::pods::{Holder, Use};
use crate::api::{ExistingConnections, Fallback};
use crate::kernel::conntrack::{self, Connection};
use crate::kernel::netlink::{NETLINK_NETFILTER, Socket};
use crate::model::marks::{EgressId, Marks};
use crate::model::networks::Networks;
use crate::model::shared::Shared;
use crate::node_plan::policy_chain::PolicyChain;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// What holds this node's selected pods.
pub type Uses = BTreeMap<Holder, Arc<Use>>;

/// The way to the thread that sees to such connections.
pub struct Existing {
    jobs: Sender<Job>,
    marks: Marks,
    /// What it was last told.
    told: (Uses, BTreeSet<EgressId>),
    /// Pods that have begun since, under their policies.
    new: BTreeSet<Holder>,
    /// Whether Egret's rules were away since.
    mended: bool,
}

/// What the kernel holds now.
struct Job {
    uses: Uses,
    /// The allocations that are ready.
    ready: BTreeSet<EgressId>,
    new: BTreeSet<Holder>,
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
    /// Starts the thread. With `mended`, Egret's rules are missing in the kernel, and were there before.
    pub fn start(marks: Marks, mended: bool) -> Self {
        let (jobs, incoming) = channel();
        thread::spawn(move || Seen::default().work(&incoming));
        Existing { jobs, marks, told: Default::default(), new: BTreeSet::new(), mended }
    }

    /// A pod has begun, and nothing left it before its policies were in force.
    pub fn begins(&mut self, pod: Holder) {
        self.new.insert(pod);
    }

    /// The kernel holds pods to `uses`, and these allocations are ready. With `mended`, rules had been taken away
    /// meanwhile.
    pub fn look(
        &mut self,
        uses: &Uses,
        ready: BTreeSet<EgressId>,
        mended: bool,
        networks: &Shared<Networks>,
        own: &BTreeSet<IpAddr>,
    ) {
        self.mended |= mended;
        let (told, were_ready) = &self.told;
        let same_uses = told.values().zip(uses.values()).all(|(old, new)| Arc::ptr_eq(old, new));
        let same = told.keys().eq(uses.keys()) && same_uses && *were_ready == ready;
        self.new.retain(|pod| uses.contains_key(pod));
        if same && !self.mended {
            self.new.clear();
            return;
        }
        self.told = (uses.clone(), ready.clone());
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

/// What the thread knows.
#[derive(Default)]
struct Seen {
    pods: BTreeMap<Holder, Pod>,
    ready: BTreeSet<EgressId>,
    /// Rules were away, and the connections of pods have not been looked at since.
    mended: bool,
    has_looked: bool,
}

/// A pod whose connections were looked at.
struct Pod {
    policy_chain: Arc<PolicyChain>,
    /// The ids of connections that began before its policies.
    kept: HashSet<u32>,
    /// Whether it has been held ever since it began, so that there are no such connections.
    is_new: bool,
}

impl Seen {
    fn work(mut self, jobs: &Receiver<Job>) {
        while let Ok(mut job) = jobs.recv() {
            // What came in a burst is seen to once.
            while let Ok(next) = jobs.try_recv() {
                job = Job { new: &job.new | &next.new, mended: job.mended | next.mended, ..next };
            }
            match self.look(&job) {
                Ok(0) => {}
                Ok(n) => tracing::info!(entries = n, "ended connections that had begun without their policies"),
                // They are looked at again with the next change.
                Err(e) => tracing::error!("connections that began without their policies cannot be ended: {e:#}"),
            }
        }
    }

    /// Returns how many connections were ended.
    fn look(&mut self, job: &Job) -> Result<usize> {
        self.pods.retain(|holder, _| job.uses.contains_key(holder));
        self.mended |= job.mended;
        for holder in job.new.iter().filter(|holder| job.uses.contains_key(*holder)) {
            let held = Pod { policy_chain: Arc::new(PolicyChain::Isolated), kept: HashSet::new(), is_new: true };
            self.pods.insert(holder.clone(), held);
        }
        let changed: Vec<(&Holder, &Use, &Arc<PolicyChain>)> = job
            .uses
            .iter()
            .filter_map(|(holder, used)| {
                let policy_chain = used.policy_chain.as_ref()?;
                self.is_to_be_looked_at(holder, policy_chain, &job.ready).then_some((holder, &**used, policy_chain))
            })
            .collect();
        let mut found = Found { kept: BTreeMap::new(), ended: 0 };
        if !changed.is_empty() {
            found = self.find(&changed, job)?;
        }
        for (holder, used) in &job.uses {
            let Some(policy_chain) = &used.policy_chain else { continue };
            let before = self.pods.remove(holder);
            let is_new = before.as_ref().is_some_and(|pod| pod.is_new) && **policy_chain == PolicyChain::Isolated;
            let kept = found.kept.remove(holder).or(before.map(|pod| pod.kept)).unwrap_or_default();
            self.pods.insert(holder.clone(), Pod { policy_chain: policy_chain.clone(), kept, is_new });
        }
        self.ready.clone_from(&job.ready);
        (self.mended, self.has_looked) = (false, true);
        Ok(found.ended)
    }

    fn is_to_be_looked_at(&self, holder: &Holder, policy_chain: &Arc<PolicyChain>, ready: &BTreeSet<EgressId>) -> bool {
        let Some(before) = self.pods.get(holder) else { return true };
        if self.mended {
            return true;
        }
        if before.is_new {
            return false;
        }
        let is_ready_now = |allocation: EgressId| ready.contains(&allocation) && !self.ready.contains(&allocation);
        let mut of_node = policy_chain.steps().iter().filter(|step| step.fallback == Fallback::NodeAddress);
        before.policy_chain != *policy_chain || of_node.any(|step| step.allocation.is_some_and(is_ready_now))
    }

    /// Ends what is to be ended of these pods, and finds what stays.
    fn find(&self, pods: &[(&Holder, &Use, &Arc<PolicyChain>)], job: &Job) -> Result<Found> {
        let of_address: HashMap<IpAddr, (&Holder, &PolicyChain)> = pods
            .iter()
            .flat_map(|(holder, used, policy_chain)| {
                used.addresses.iter().map(move |a| (*a, (*holder, &***policy_chain)))
            })
            .collect();
        let mut kept: BTreeMap<Holder, HashSet<u32>> =
            pods.iter().map(|(h, ..)| ((*h).clone(), HashSet::new())).collect();
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let ended = conntrack::delete_by_source(&mut socket, &of_address.keys().copied().collect(), |c| {
            let Some((holder, policy_chain)) = of_address.get(&c.source) else { return false };
            if c.mark & job.marks.connection_mask() == job.marks.connection(0) || job.inside.has(c.reply_source) {
                return false;
            }
            let before = self.pods.get(*holder);
            match self.fate(before, policy_chain, &job.ready, c) {
                Fate::Ended => return true,
                Fate::Kept => {
                    kept.entry((*holder).clone()).or_default().insert(c.id);
                }
                Fate::Passes => {}
            }
            false
        })?;
        Ok(Found { kept, ended })
    }

    fn fate(
        &self,
        before: Option<&Pod>,
        policy_chain: &PolicyChain,
        ready: &BTreeSet<EgressId>,
        c: &Connection,
    ) -> Fate {
        match decides(policy_chain, ready, c) {
            None => Fate::Passes,
            Some(ExistingConnections::End) => Fate::Ended,
            Some(ExistingConnections::Keep) => {
                let is_known = match before {
                    Some(before) => {
                        before.kept.contains(&c.id) || decides(&before.policy_chain, &self.ready, c).is_none()
                    }
                    // The rules were taken away before this daemon began: which connections were there is not known.
                    None => self.has_looked,
                };
                if is_known || !self.mended { Fate::Kept } else { Fate::Ended }
            }
        }
    }
}

/// See [`Seen::find`].
struct Found {
    kept: BTreeMap<Holder, HashSet<u32>>,
    ended: usize,
}

/// What becomes of a connection without a mark.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// No policy covers it.
    Passes,
    /// It began before its policy, and goes on.
    Kept,
    Ended,
}

impl Inside {
    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.networks.is_direct(address) || self.own.contains(&address)
    }
}

/// What is said of a connection that began before the policy that covers it. `None`: it may leave from the node's
/// address.
fn decides(policy_chain: &PolicyChain, ready: &BTreeSet<EgressId>, c: &Connection) -> Option<ExistingConnections> {
    if *policy_chain == PolicyChain::Isolated {
        return Some(ExistingConnections::Keep);
    }
    let step = policy_chain.step_for(c.reply_source, c.protocol, c.reply_port)?;
    let is_ready = step.allocation.is_some_and(|allocation| ready.contains(&allocation));
    (step.fallback == Fallback::Block || is_ready).then_some(step.existing_connections)
}

#[cfg(test)]
mod tests;
