//! The pods of this node: those that the plugin brought, and those that ran before Egret came.

use crate::cni::attachment::{Attachment, AttachmentId};
use crate::datapath::pod_veth::Veth;
use crate::model::marks::{EgressId, MAX_INDEX};
use crate::model::precedence::PolicyIndex;
use crate::model::selector::Labels;
use crate::model::shared::Mark;
use crate::model::{Cluster, ObjectKey, Pod};
use crate::node::adopted_files::Remembered;
use crate::node::policy_delay::PolicyDelay;
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::policy_chain::PolicyChain;
use crate::node_plan::{NodePlan, PodPlan, View, chain_name};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::time::Instant;

/// The pod mark that pods share for which there is none left: its policy chain lets nothing out.
const OVERFLOW_MARK: u16 = MAX_INDEX;

/// A veth on the host that is a pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// The index of the pod's end, in the pod's network namespace.
    pub peer_index: u32,
}

/// A pod that the plugin brought.
#[derive(Debug)]
struct Attached {
    holder: Holder,
    attachment: Attachment,
    /// `None`: it has none on the host, or it is gone.
    interface: Option<Interface>,
    /// What the pod's labels were when the cluster last knew it: it may be gone there before it is gone here.
    labels: Option<Labels>,
    judged: Judged,
    policy_delay: PolicyDelay,
}

impl Attached {
    /// Whether it had an interface on the host that is there no more.
    fn is_gone(&self) -> bool {
        self.interface.is_none() && self.attachment.host.is_some()
    }
}

/// A pod that ran before Egret came. It is here as long as its interface: what becomes of the Pod object says nothing
/// of the container, which may go on sending.
#[derive(Debug)]
struct Adopted {
    /// With the labels that it had last, as of an attached one.
    known: Arc<Remembered>,
    judged: Judged,
    policy_delay: PolicyDelay,
}

/// What policies say of a pod, and what follows from it. A pod's start changes it for no other.
#[derive(Debug, Default)]
enum Judged {
    /// To be found out.
    #[default]
    Unknown,
    /// No policy selects it.
    Free,
    /// Policies select it, or could.
    Selected(Selected),
}

/// See [`Judged`].
#[derive(Debug)]
struct Selected {
    policy_chain: Arc<PolicyChain>,
    /// With the pod mark that it last had.
    planned: Option<Planned>,
}

/// A selected pod's part of the plan.
#[derive(Debug)]
struct Planned {
    chain: Arc<str>,
    pod: Arc<PodPlan>,
    policy_chain: Arc<PolicyChain>,
    used: Arc<Use>,
}

/// What all pods were judged by.
#[derive(Debug, Default)]
struct JudgedBy {
    pods: Mark<BTreeMap<ObjectKey, Arc<Pod>>>,
    policies: Mark<PolicyIndex>,
    allocations: Mark<NodeAllocations>,
}

/// Names a pod of either kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// By the runtime's names.
    Attached(Arc<AttachmentId>),
    /// By its interface's index.
    Adopted(u32),
}

/// Which addresses a pod has and which allocations its packets can take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The allocations.
    pub allocations: BTreeSet<EgressId>,
    /// Whether it is not known which policies select the pod.
    pub held: bool,
    /// What the policies say; `None` in a [`Default`] one.
    pub policy_chain: Option<Arc<PolicyChain>>,
}

/// How many pods are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Selected by a policy, and held to it.
    pub selected: i64,
    /// Not known to the cluster yet; nothing leaves.
    pub held: i64,
    /// Selected by no policy.
    pub free: i64,
    /// Selected, and without an interface on the host that could hold them.
    pub unmanaged: i64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pods {
    attached: BTreeMap<AttachmentId, Attached>,
    /// By their interfaces' indexes.
    adopted: BTreeMap<u32, Adopted>,
    /// Pods whose DEL has come and which the cluster still lists, with the addresses that they had: not unmanaged.
    ended: BTreeMap<ObjectKey, Vec<IpAddr>>,
    /// Pods that are held because the cluster does not know them, or their namespaces.
    undecided: BTreeSet<AttachmentId>,
    /// Pods that nobody brought, and that have not been found, or were not looked for: no policy selects them.
    unmanaged: HashMap<ObjectKey, PolicyDelay>,
    pod_marks: PodMarks,
    judged_by: JudgedBy,
    /// How many policy chains were held for what they list.
    too_long: usize,
}

impl Pods {
    /// With the pod marks that the kernel holds, by interface index.
    pub fn new(pod_marks: impl IntoIterator<Item = (u16, u32)>) -> Self {
        Pods { pod_marks: PodMarks::new(pod_marks), ..Pods::default() }
    }

    /// Adds a pod, in place of one of the same id. Others that claim its interface are gone: indexes and names are
    /// unique. Returns the addresses of adopted ones among them that nobody has now.
    pub fn attach(&mut self, attachment: Attachment, interface: Option<Interface>) -> Vec<IpAddr> {
        let displaced = interface.clone();
        let same = |i: &Interface| displaced.as_ref().is_some_and(|new| i.index == new.index || i.name == new.name);
        for other in self.attached.values_mut().filter(|a| a.interface.as_ref().is_some_and(same)) {
            other.interface = None;
        }
        let before = self.attached.remove(&attachment.id);
        let (labels, policy_delay) = before.map(|a| (a.labels, a.policy_delay)).unwrap_or_default();
        self.ended.remove(&ObjectKey::new(&attachment.pod.namespace, &attachment.pod.name));
        let (id, judged) = (attachment.id.clone(), Judged::Unknown);
        let holder = Holder::Attached(Arc::new(id.clone()));
        self.attached.insert(id, Attached { holder, attachment, interface, labels, judged, policy_delay });
        self.drop_adopted(|a| same(&a.known.interface))
    }

    /// Removes a pod. Returns its addresses that no other pod has.
    pub fn detach(&mut self, id: &AttachmentId) -> Vec<IpAddr> {
        let Some(gone) = self.attached.remove(id) else { return Vec::new() };
        let pod = &gone.attachment.pod;
        self.ended.insert(ObjectKey::new(&pod.namespace, &pod.name), gone.attachment.addresses.clone());
        gone.attachment.addresses.into_iter().filter(|a| !self.has_address(a)).collect()
    }

    /// Whether a pod has this address.
    pub fn has_address(&self, address: &IpAddr) -> bool {
        self.has_brought(address) || self.adopted.values().any(|a| a.known.addresses.contains(address))
    }

    /// Whether another pod than this one, which is not gone, has this address.
    pub fn is_in_use(&self, address: &IpAddr, but: &ObjectKey) -> bool {
        let living = self.attached.values().filter(|a| !a.is_gone());
        living.flat_map(|a| &a.attachment.addresses).any(|a| a == address)
            || self.adopted.values().any(|a| a.known.pod != *but && a.known.addresses.contains(address))
    }

    /// Whether the plugin brought this pod, and it is gone: its DEL is still to come, or never comes.
    pub fn is_gone(&self, key: &ObjectKey) -> bool {
        let of_pod =
            |a: &&Attached| *a.attachment.pod.namespace == *key.namespace && *a.attachment.pod.name == *key.name;
        self.attached.values().filter(of_pod).any(Attached::is_gone)
    }

    /// Whether the plugin brought a pod with this address.
    pub fn has_brought(&self, address: &IpAddr) -> bool {
        self.attached.values().any(|a| a.attachment.addresses.contains(address))
    }

    /// Whether the plugin brought this.
    pub fn get(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.attached.get(id).map(|a| &a.attachment)
    }

    /// All that the plugin brought.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.values().map(|a| &a.attachment)
    }

    /// Whether the pod is still here.
    pub fn has(&self, holder: &Holder) -> bool {
        match holder {
            Holder::Attached(id) => self.attached.contains_key(&**id),
            Holder::Adopted(index) => self.adopted.contains_key(index),
        }
    }

    /// Whether it is known what is to become of the pod: it is not one that is held because the cluster does not know
    /// it.
    pub fn is_decided(&self, id: &AttachmentId) -> bool {
        !self.undecided.contains(id)
    }

    /// The attachments of one network.
    pub fn of_network<'a>(&'a self, network: &'a str) -> impl Iterator<Item = &'a AttachmentId> {
        self.attached.iter().filter(move |(_, a)| a.attachment.network == network).map(|(id, _)| id)
    }

    /// Every address of every pod.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let attached = self.attached.values().flat_map(|a| a.attachment.addresses.iter());
        attached.chain(self.adopted.values().flat_map(|a| a.known.addresses.iter())).copied()
    }

    /// The interface of that index is `now` this one, or none. Returns the addresses of pods that are gone with the
    /// one before; of those that the plugin brought DEL is still to come.
    pub fn interface_gone(&mut self, index: u32, now: Option<&Veth>) -> Vec<IpAddr> {
        for a in self.attached.values_mut().filter(|a| a.interface.as_ref().is_some_and(|i| i.index == index)) {
            let peer = a.attachment.host.as_ref().map(|host| host.peer_index);
            // It may have another name now. If it is the next pod's already, that one takes it when it is added.
            let now = now.filter(|now| Some(now.peer_index) == peer);
            let now = now.map(|now| Interface { name: now.name.clone(), index, peer_index: now.peer_index });
            if a.interface != now {
                (a.interface, a.judged) = (now, Judged::Unknown);
            }
        }
        // One that has another name is found again.
        let is_there = |i: &Interface| now.is_some_and(|now| now.name == i.name && now.peer_index == i.peer_index);
        self.drop_adopted(|a| a.known.interface.index == index && !is_there(&a.known.interface))
    }

    /// Forgets adopted pods. Returns their addresses that no other pod has.
    fn drop_adopted(&mut self, is_gone: impl Fn(&Adopted) -> bool) -> Vec<IpAddr> {
        let gone: BTreeMap<u32, Adopted>;
        (gone, self.adopted) = std::mem::take(&mut self.adopted).into_iter().partition(|(_, a)| is_gone(a));
        self.unused(gone.into_values())
    }

    /// The indexes of all pods' interfaces.
    pub fn interfaces(&self) -> impl Iterator<Item = u32> {
        let attached = self.attached.values().filter_map(|a| a.interface.as_ref());
        attached.chain(self.adopted.values().map(|a| &a.known.interface)).map(|i| i.index)
    }

    /// Whether any pod is on this interface.
    pub fn has_interface(&self, index: u32) -> bool {
        self.interfaces().any(|i| i == index)
    }

    /// The addresses of adopted pods that are gone, less those that other pods have.
    fn unused(&self, gone: impl IntoIterator<Item = Adopted>) -> Vec<IpAddr> {
        let addresses = gone.into_iter().flat_map(|a| a.known.addresses.clone());
        addresses.filter(|address| !self.has_address(address)).collect()
    }

    /// What is known of adopted pods.
    pub fn adopted(&self) -> impl Iterator<Item = &Arc<Remembered>> {
        self.adopted.values().map(|a| &a.known)
    }

    /// Takes in a pod that ran before, with the addresses that it has now. Returns those that nobody has any more.
    pub fn adopt(&mut self, known: Remembered) -> Vec<IpAddr> {
        let index = known.interface.index;
        if self.attached.values().any(|a| a.interface.as_ref().is_some_and(|i| i.index == index)) {
            return Vec::new();
        }
        let policy_delay = self.unmanaged.remove(&known.pod).unwrap_or_default();
        let before =
            self.adopted.insert(index, Adopted { known: Arc::new(known), judged: Judged::Unknown, policy_delay });
        self.unused(before)
    }

    /// Forgets of which pods the DEL has come, once the cluster has forgotten them.
    pub fn drop_ended(&mut self, cluster: &Cluster) {
        // A pod that was just added may not have its addresses in the cluster yet, and a runtime may know of more of
        // them.
        self.ended.retain(|key, addresses| {
            let same = |p: &Pod| p.addresses.is_empty() || p.addresses.iter().any(|a| addresses.contains(a));
            cluster.pods.get(key).is_some_and(|p| same(p))
        });
    }

    /// Pods that a policy selects, that run here, and that nobody brought: they are to be found.
    pub fn unmanaged(&mut self, cluster: &Cluster, view: &View) -> Vec<(ObjectKey, Vec<IpAddr>)> {
        // A record whose DEL never came may be of an earlier pod of that name, and says nothing of the one that runs
        // now.
        let living = self.attached.values().filter(|a| !a.is_gone()).map(|a| &a.attachment.pod);
        let brought: HashMap<(&str, &str), &str> =
            living.map(|pod| ((&*pod.namespace, &*pod.name), &*pod.uid)).collect();
        let is_brought = |key: &ObjectKey, pod: &Pod| {
            brought.get(&(&*key.namespace, &*key.name)).is_some_and(|uid| is_same(&pod.uid, uid))
        };
        // One that has other addresses than it had is looked for again.
        let adopted: HashSet<(&ObjectKey, &[IpAddr])> =
            self.adopted.values().map(|a| (&a.known.pod, a.known.addresses.as_slice())).collect();
        let unmanaged = cluster.pods.iter().filter(|(key, pod)| runs(pod) && !is_brought(key, pod));
        let unmanaged = unmanaged
            .filter(|(key, pod)| !adopted.contains(&(*key, &*pod.addresses)) && !self.ended.contains_key(*key));
        let (mut before, now) = (std::mem::take(&mut self.unmanaged), Instant::now());
        let mut selected = Vec::new();
        for (key, pod) in unmanaged {
            let mut policy_delay = before.remove(key).unwrap_or_default();
            if policy_delay.policy_chain(view, &key.namespace, Some(&pod.labels), now).is_some() {
                selected.push((key.clone(), pod.addresses.to_vec()));
            }
            self.unmanaged.insert(key.clone(), policy_delay);
        }
        selected
    }

    /// The policy chain that an attachment has, or would have.
    pub fn policy_chain(&self, attachment: &Attachment, cluster: &Cluster, view: &View) -> Option<PolicyChain> {
        let remembered = self.attached.get(&attachment.id).and_then(|a| a.labels.as_ref());
        view.policy_chain(&attachment.pod.namespace, labels(attachment, cluster).or(remembered))
    }

    /// The plan of all pods, what each uses, and how many are in which state.
    pub fn plan(&mut self, cluster: &Cluster, view: &View) -> (NodePlan, BTreeMap<Holder, Arc<Use>>, Census) {
        self.judge(cluster, view);
        // Whose pods are gone, the others can have: there may be some without.
        let there = self.interfaces().collect();
        self.pod_marks.retain(&there);
        let (mut plan, mut uses, mut census) = (NodePlan::default(), Vec::new(), Census::default());
        let (pod_marks, mut in_use) = (&mut self.pod_marks, HashSet::new());
        let mut add = |holder, interface: &Interface, addresses: &[IpAddr], selected: &mut Selected| {
            let pod_mark = pod_marks.get(interface.index);
            in_use.insert(interface.index);
            let planned = selected.planned(pod_mark, interface, addresses);
            if planned.used.held {
                census.held += 1;
            } else {
                census.selected += 1;
            }
            uses.push((holder, planned.used.clone()));
            plan.add(view, planned.chain.clone(), planned.pod.clone(), planned.policy_chain.clone());
        };
        self.undecided.clear();
        for (id, a) in &mut self.attached {
            match (&mut a.judged, &a.interface) {
                (Judged::Selected(selected), Some(i)) => {
                    if *selected.policy_chain == PolicyChain::Isolated {
                        self.undecided.insert(id.clone());
                    }
                    add(a.holder.clone(), i, &a.attachment.addresses, selected);
                }
                (Judged::Selected(_), None) if a.attachment.host.is_none() => census.unmanaged += 1,
                // Its interface is gone, and so is the pod; DEL is still to come.
                (Judged::Selected(_), None) => {}
                (Judged::Free | Judged::Unknown, _) => census.free += 1,
            }
        }
        for (index, a) in &mut self.adopted {
            if let Judged::Selected(selected) = &mut a.judged {
                add(Holder::Adopted(*index), &a.known.interface, &a.known.addresses, selected);
            }
        }
        self.pod_marks.retain(&in_use);
        let before = std::mem::replace(&mut self.too_long, plan.isolate_long_lists());
        if self.too_long > before {
            tracing::warn!(
                policy_chains = self.too_long,
                "policies of this node's pods list more destinations than it can hold: pods with the longest lists are held"
            );
        }
        (plan, uses.into_iter().collect(), census)
    }

    /// When pods are to be judged again, if nothing else happens.
    pub fn next(&self) -> Option<Instant> {
        let known =
            self.attached.values().map(|a| &a.policy_delay).chain(self.adopted.values().map(|a| &a.policy_delay));
        known.chain(self.unmanaged.values()).filter_map(PolicyDelay::next).min()
    }

    /// Finds out what policies say of each pod of which that is not known.
    fn judge(&mut self, cluster: &Cluster, view: &View) {
        let by = &self.judged_by;
        let now = Instant::now();
        let due = self.next().is_some_and(|due| due <= now);
        let same = !due
            && cluster.pods.has(&by.pods)
            && view.policies.has(&by.policies)
            && view.allocations.has(&by.allocations);
        if !same {
            let adopted = self.adopted.values_mut().map(|a| &mut a.judged);
            self.attached.values_mut().map(|a| &mut a.judged).chain(adopted).for_each(|j| *j = Judged::Unknown);
            self.judged_by = JudgedBy {
                pods: cluster.pods.mark(),
                policies: view.policies.mark(),
                allocations: view.allocations.mark(),
            };
        }
        for a in self.attached.values_mut().filter(|a| matches!(a.judged, Judged::Unknown)) {
            if let Some(now) = labels(&a.attachment, cluster) {
                a.labels = Some(now.clone());
            }
            a.judged = a.policy_delay.policy_chain(view, &a.attachment.pod.namespace, a.labels.as_ref(), now).into();
        }
        for a in self.adopted.values_mut().filter(|a| matches!(a.judged, Judged::Unknown)) {
            // Another pod of the name has other addresses.
            let pod = cluster.pods.get(&a.known.pod).filter(|pod| *pod.addresses == *a.known.addresses);
            if let Some(pod) = pod.filter(|pod| a.known.labels.as_ref() != Some(&pod.labels)) {
                Arc::make_mut(&mut a.known).labels = Some(pod.labels.clone());
            }
            a.judged = a.policy_delay.policy_chain(view, &a.known.pod.namespace, a.known.labels.as_ref(), now).into();
        }
    }
}

impl From<Option<PolicyChain>> for Judged {
    fn from(policy_chain: Option<PolicyChain>) -> Self {
        let selected =
            |policy_chain| Judged::Selected(Selected { policy_chain: Arc::new(policy_chain), planned: None });
        policy_chain.map_or(Judged::Free, selected)
    }
}

impl Selected {
    fn planned(&mut self, pod_mark: u16, interface: &Interface, addresses: &[IpAddr]) -> &Planned {
        let as_before = self.planned.take().filter(|planned| planned.pod.pod_mark == pod_mark);
        self.planned.insert(as_before.unwrap_or_else(|| {
            let policy_chain =
                if pod_mark == OVERFLOW_MARK { Arc::new(PolicyChain::Isolated) } else { self.policy_chain.clone() };
            let held = *policy_chain == PolicyChain::Isolated;
            let allocations = policy_chain.allocations().collect();
            let used =
                Use { addresses: addresses.to_vec(), allocations, held, policy_chain: Some(policy_chain.clone()) };
            let pod = PodPlan {
                interface: interface.name.clone(),
                interface_index: interface.index,
                addresses: addresses.to_vec(),
                pod_mark,
                policy_chain: policy_chain.name(),
            };
            let chain = chain_name(pod_mark, interface.index);
            Planned { chain, pod: Arc::new(pod), policy_chain, used: Arc::new(used) }
        }))
    }
}

/// Whether the cluster knows an attachment's pod.
pub fn is_known(attachment: &Attachment, cluster: &Cluster) -> bool {
    labels(attachment, cluster).is_some()
}

/// The labels that the cluster knows of an attachment's pod; none if the pod of that name is another one.
fn labels<'a>(attachment: &Attachment, cluster: &'a Cluster) -> Option<&'a Labels> {
    let key = ObjectKey::new(&attachment.pod.namespace, &attachment.pod.name);
    let pod = cluster.pods.get(&key)?;
    is_same(&pod.uid, &attachment.pod.uid).then_some(&pod.labels)
}

/// Whether these are uids of one pod; not every source and every runtime tells them.
fn is_same(uid: &str, other: &str) -> bool {
    uid.is_empty() || other.is_empty() || uid == other
}

fn runs(pod: &Pod) -> bool {
    !pod.host_network && !pod.finished && !pod.addresses.is_empty()
}

/// Pod marks by interface index. A pod mark that was given back is taken again as late as can be.
#[derive(Debug, Default)]
struct PodMarks {
    of: HashMap<u32, u16>,
    last: u16,
}

impl PodMarks {
    fn new(held: impl IntoIterator<Item = (u16, u32)>) -> Self {
        let of: HashMap<u32, u16> = held.into_iter().map(|(pod_mark, index)| (index, pod_mark)).collect();
        let last = of.values().copied().filter(|t| *t < OVERFLOW_MARK).max().unwrap_or(0);
        PodMarks { of, last }
    }

    fn get(&mut self, index: u32) -> u16 {
        if let Some(pod_mark) = self.of.get(&index).filter(|pod_mark| **pod_mark != OVERFLOW_MARK) {
            return *pod_mark;
        }
        let taken: HashSet<u16> = self.of.values().copied().collect();
        let after = (1..OVERFLOW_MARK).map(|n| (self.last + n - 1) % (OVERFLOW_MARK - 1) + 1);
        let pod_mark = after.into_iter().find(|t| !taken.contains(t)).unwrap_or(OVERFLOW_MARK);
        if pod_mark != OVERFLOW_MARK {
            self.last = pod_mark;
        }
        self.of.insert(index, pod_mark);
        pod_mark
    }

    fn retain(&mut self, indexes: &HashSet<u32>) {
        self.of.retain(|index, _| indexes.contains(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_pod_mark_gets_one_when_another_has_gone() {
        let mut pod_marks = PodMarks::default();
        let all: HashSet<u16> = (1..=510).map(|index| pod_marks.get(index)).collect();
        assert_eq!(all, (1..OVERFLOW_MARK).collect());
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [OVERFLOW_MARK; 2]);
        // A restarted daemon finds the pod marks in the kernel.
        let mut pod_marks = PodMarks::new(pod_marks.of.iter().map(|(index, pod_mark)| (*pod_mark, *index)));
        let given_back = pod_marks.get(7);
        pod_marks.retain(&(1..=512).filter(|index| *index != 7).collect());
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [given_back, OVERFLOW_MARK]);
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [given_back, OVERFLOW_MARK]);
    }
}
