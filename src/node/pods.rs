//! The pods of this node: those that the plugin attached, and adopted ones, which started without the plugin.

mod known;

pub use known::is_known;

use crate::datapath::pod_veth::Veth;
use crate::model::marks::EgressId;
use crate::model::precedence::PolicyIndex;
use crate::model::selector::Labels;
use crate::model::shared::Mark;
use crate::model::{Client, Cluster, ObjectKey, Pod, PolicyKey};
use crate::node::adopted_files::Remembered;
use crate::node::pod_marks::{OVERFLOW_MARK, PodMarks};
use crate::node::policy_delay::PolicyDelay;
use crate::node_plan::allocations::NodeAllocations;
use crate::node_plan::policy_chain::PolicyChain;
use crate::node_plan::{NodePlan, PodPlan, View, chain_name};
use egret_cni::attachment::{Attachment, AttachmentId, PodRef};
use known::{is_same, known};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::time::Instant;

/// The host's end of a pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    /// The index of the pod's end, in the pod's network namespace.
    pub peer_index: u32,
}

/// A pod that the plugin attached.
#[derive(Debug)]
struct Attached {
    pod_id: PodId,
    attachment: Attachment,
    /// `None` if it has none on the host, or if it is gone.
    interface: Option<Interface>,
    /// The pod's uid, the cluster's or, if that has none, the runtime's.
    uid: Box<str>,
    /// The pod's labels when the cluster last had it. The cluster may drop the pod before its container ends.
    labels: Option<Labels>,
    judged: Judged,
    policy_delay: PolicyDelay,
}

impl Attached {
    /// Whether its interface on the host is gone.
    fn is_gone(&self) -> bool {
        self.interface.is_none() && self.attachment.host.is_some()
    }
}

/// A pod that started without the plugin. It exists as long as its interface: the Pod object may be deleted while the
/// container continues to send.
#[derive(Debug)]
struct Adopted {
    /// The pod, with its labels when the cluster last had it.
    known: Arc<Remembered>,
    judged: Judged,
    policy_delay: PolicyDelay,
}

/// The result of the evaluation of policies for a pod. It does not depend on other pods.
#[derive(Debug, Default)]
enum Judged {
    /// Not evaluated.
    #[default]
    Unknown,
    /// No policy selects the pod.
    Free,
    /// Policies select the pod, or could.
    Selected(Selected),
}

/// A pod that policies select.
#[derive(Debug)]
struct Selected {
    policy_chain: Arc<PolicyChain>,
    /// Cached for the pod's last pod mark.
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

/// The inputs of the last evaluation of all pods.
#[derive(Debug, Default)]
struct JudgedBy {
    pods: Mark<BTreeMap<ObjectKey, Arc<Pod>>>,
    policies: Mark<PolicyIndex>,
    allocations: Mark<NodeAllocations>,
}

/// Identifies a pod of either kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodId {
    /// By the runtime's names.
    Attached(Arc<AttachmentId>),
    /// By its interface's index.
    Adopted(u32),
}

/// The addresses of a selected pod and the allocations that it can use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    pub addresses: Vec<IpAddr>,
    pub allocations: BTreeSet<EgressId>,
    /// Whether the pod is isolated, because its policies are unknown.
    pub isolated: bool,
    /// The pod's policy chain; `None` in the default value alone.
    pub policy_chain: Option<Arc<PolicyChain>>,
}

/// The number of pods in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Policies select them.
    pub selected: i64,
    /// They are isolated, because their policies are unknown.
    pub isolated: i64,
    /// No policy selects them.
    pub free: i64,
    /// Policies select them, and they have no veth on the host.
    pub unmanaged: i64,
}

/// The node's pods and their pod marks.
#[derive(Debug, Default)]
pub struct Pods {
    attached: BTreeMap<AttachmentId, Attached>,
    /// By their interfaces' indexes.
    adopted: BTreeMap<u32, Adopted>,
    /// Pods whose DEL has come while the cluster still lists them, with their addresses. They are not unmanaged.
    ended: BTreeMap<ObjectKey, Vec<IpAddr>>,
    /// Pods that are isolated because the cluster does not have them, or their namespaces.
    undecided: BTreeSet<AttachmentId>,
    /// Unmanaged pods whose veths were not found or, because no policy selects them, not searched.
    unmanaged: HashMap<ObjectKey, PolicyDelay>,
    pod_marks: PodMarks,
    judged_by: JudgedBy,
    /// The policies that list too many destinations for this node. Their pods are isolated.
    over_limit: BTreeSet<PolicyKey>,
}

impl Pods {
    /// Starts with the pod marks that the kernel has, by interface index.
    pub fn new(pod_marks: impl IntoIterator<Item = (u16, u32)>) -> Self {
        Pods { pod_marks: PodMarks::new(pod_marks), ..Pods::default() }
    }

    /// Adds a pod, or replaces the one with the same id. Other pods with the same interface index or name are gone,
    /// because both are unique. Returns the addresses of adopted ones among them that no pod has now.
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
        let (pod_id, uid) = (PodId::Attached(Arc::new(id.clone())), attachment.pod.uid.as_str().into());
        self.attached.insert(id, Attached { pod_id, attachment, interface, uid, labels, judged, policy_delay });
        self.drop_adopted(|a| same(&a.known.interface))
    }

    /// Removes a pod. Returns those of its addresses that no other pod has.
    pub fn detach(&mut self, id: &AttachmentId) -> Vec<IpAddr> {
        let Some(gone) = self.attached.remove(id) else { return Vec::new() };
        let pod = &gone.attachment.pod;
        self.ended.insert(ObjectKey::new(&pod.namespace, &pod.name), gone.attachment.addresses.clone());
        gone.attachment.addresses.into_iter().filter(|a| !self.has_address(a)).collect()
    }

    /// Whether a pod has this address.
    pub fn has_address(&self, address: &IpAddr) -> bool {
        self.has_attached(address) || self.adopted.values().any(|a| a.known.addresses.contains(address))
    }

    /// Whether a pod other than `but` has this address and is not gone.
    pub fn is_in_use(&self, address: &IpAddr, but: &ObjectKey) -> bool {
        let living = self.attached.values().filter(|a| !a.is_gone());
        living.flat_map(|a| &a.attachment.addresses).any(|a| a == address)
            || self.adopted.values().any(|a| a.known.pod != *but && a.known.addresses.contains(address))
    }

    /// Whether the plugin attached this pod and its interface is gone. Its DEL is late or never comes.
    pub fn is_gone(&self, key: &ObjectKey) -> bool {
        let of_pod =
            |a: &&Attached| *a.attachment.pod.namespace == *key.namespace && *a.attachment.pod.name == *key.name;
        self.attached.values().filter(of_pod).any(Attached::is_gone)
    }

    /// Whether the plugin attached a pod with this address.
    pub fn has_attached(&self, address: &IpAddr) -> bool {
        self.attached.values().any(|a| a.attachment.addresses.contains(address))
    }

    /// The attachment with this id.
    pub fn get(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.attached.get(id).map(|a| &a.attachment)
    }

    /// All attachments.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.values().map(|a| &a.attachment)
    }

    /// Whether the pod is still here.
    pub fn has(&self, pod_id: &PodId) -> bool {
        match pod_id {
            PodId::Attached(id) => self.attached.contains_key(&**id),
            PodId::Adopted(index) => self.adopted.contains_key(index),
        }
    }

    /// Whether the pod's policies are known.
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

    /// The interface with this index is gone, or is `now` another one. Returns the addresses of adopted pods that are
    /// gone with it. An attached pod stays until its DEL.
    pub fn interface_gone(&mut self, index: u32, now: Option<&Veth>) -> Vec<IpAddr> {
        for a in self.attached.values_mut().filter(|a| a.interface.as_ref().is_some_and(|i| i.index == index)) {
            let peer = a.attachment.host.as_ref().map(|host| host.peer_index);
            // It may have been renamed. If it is already another pod's, that pod takes it when it is attached.
            let now = now.filter(|now| Some(now.peer_index) == peer);
            let now = now.map(|now| Interface { name: now.name.clone(), index, peer_index: now.peer_index });
            if a.interface != now {
                (a.interface, a.judged) = (now, Judged::Unknown);
            }
        }
        // An adopted pod whose interface was renamed is found again.
        let is_there = |i: &Interface| now.is_some_and(|now| now.name == i.name && now.peer_index == i.peer_index);
        self.drop_adopted(|a| a.known.interface.index == index && !is_there(&a.known.interface))
    }

    /// Drops adopted pods. Returns those of their addresses that no other pod has.
    fn drop_adopted(&mut self, is_gone: impl Fn(&Adopted) -> bool) -> Vec<IpAddr> {
        let gone: BTreeMap<u32, Adopted>;
        (gone, self.adopted) = std::mem::take(&mut self.adopted).into_iter().partition(|(_, a)| is_gone(a));
        self.unused(gone.into_values())
    }

    /// The host's end of the veth of the pod with this name and address.
    pub fn interface_of(&self, key: &ObjectKey, address: &IpAddr) -> Option<&Interface> {
        let is_of = |pod: &PodRef| *pod.namespace == *key.namespace && *pod.name == *key.name;
        let attached = self.attached.values().filter(|a| is_of(&a.attachment.pod));
        let attached =
            attached.filter(|a| a.attachment.addresses.contains(address)).filter_map(|a| a.interface.as_ref());
        let adopted = self.adopted.values().map(|a| &a.known).filter(|known| known.pod == *key);
        let adopted = adopted.filter(|known| known.addresses.contains(address)).map(|known| &known.interface);
        attached.chain(adopted).next()
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

    /// The addresses of removed adopted pods that no other pod has.
    fn unused(&self, gone: impl IntoIterator<Item = Adopted>) -> Vec<IpAddr> {
        let addresses = gone.into_iter().flat_map(|a| a.known.addresses.clone());
        addresses.filter(|address| !self.has_address(address)).collect()
    }

    /// The adopted pods.
    pub fn adopted(&self) -> impl Iterator<Item = &Arc<Remembered>> {
        self.adopted.values().map(|a| &a.known)
    }

    /// Adopts a pod, or replaces it if its addresses have changed. Returns its former addresses that no pod has now.
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

    /// Drops the pods whose DEL has come once the cluster has dropped them.
    pub fn drop_ended(&mut self, cluster: &Cluster) {
        // A pod that was just attached may have no addresses in the cluster yet, and its runtime may report more of
        // them.
        self.ended.retain(|key, addresses| {
            let same = |p: &Pod| p.addresses.is_empty() || p.addresses.iter().any(|a| addresses.contains(a));
            cluster.pods.get(key).is_some_and(|p| same(p))
        });
    }

    /// The unmanaged pods that policies select, and whose veths are to be found.
    pub fn unmanaged(&mut self, cluster: &Cluster, view: &View) -> Vec<(ObjectKey, Vec<IpAddr>)> {
        // An attachment whose DEL never came may be of an earlier pod with the same name.
        let living = self.attached.values().filter(|a| !a.is_gone()).map(|a| &a.attachment.pod);
        let attached: HashMap<(&str, &str), &str> =
            living.map(|pod| ((&*pod.namespace, &*pod.name), &*pod.uid)).collect();
        let is_attached = |key: &ObjectKey, pod: &Pod| {
            attached.get(&(&*key.namespace, &*key.name)).is_some_and(|uid| is_same(&pod.uid, uid))
        };
        // An adopted pod whose addresses have changed is searched again.
        let adopted: HashSet<(&ObjectKey, &[IpAddr])> =
            self.adopted.values().map(|a| (&a.known.pod, a.known.addresses.as_slice())).collect();
        let unmanaged = cluster.pods.iter().filter(|(key, pod)| runs(pod) && !is_attached(key, pod));
        let unmanaged = unmanaged
            .filter(|(key, pod)| !adopted.contains(&(*key, &*pod.addresses)) && !self.ended.contains_key(*key));
        let (mut before, now) = (std::mem::take(&mut self.unmanaged), Instant::now());
        let mut selected = Vec::new();
        for (key, pod) in unmanaged {
            let mut policy_delay = before.remove(key).unwrap_or_default();
            if policy_delay.policy_chain(view, Client::of(key, pod), now).is_some() {
                selected.push((key.clone(), pod.addresses.to_vec()));
            }
            self.unmanaged.insert(key.clone(), policy_delay);
        }
        selected
    }

    /// The policy chain that an attachment has, or would have.
    pub fn policy_chain(&self, attachment: &Attachment, cluster: &Cluster, view: &View) -> Option<PolicyChain> {
        let known = known(attachment, cluster);
        let remembered = self.attached.get(&attachment.id).and_then(|a| a.labels.as_ref());
        let uid = known.map(|pod| &*pod.uid).filter(|uid| !uid.is_empty()).unwrap_or(&attachment.pod.uid);
        let PodRef { namespace, name, .. } = &attachment.pod;
        view.policy_chain(Client { namespace, name, uid, labels: known.map(|pod| &pod.labels).or(remembered) })
    }

    /// Computes the plan of all pods, what each uses, and the number of pods in each state.
    pub fn plan(&mut self, cluster: &Cluster, view: &View) -> (NodePlan, BTreeMap<PodId, Arc<Use>>, Census) {
        self.judge(cluster, view);
        // Free the pod marks of removed pods first, because other pods may lack one.
        let there = self.interfaces().collect();
        self.pod_marks.retain(&there);
        let (mut plan, mut uses, mut census) = (NodePlan::default(), Vec::new(), Census::default());
        let (pod_marks, mut in_use) = (&mut self.pod_marks, HashSet::new());
        let mut add = |pod_id, interface: &Interface, addresses: &[IpAddr], selected: &mut Selected| {
            let pod_mark = pod_marks.get(interface.index);
            in_use.insert(interface.index);
            let planned = selected.planned(pod_mark, interface, addresses);
            if planned.used.isolated {
                census.isolated += 1;
            } else {
                census.selected += 1;
            }
            uses.push((pod_id, planned.used.clone()));
            plan.add(view, planned.chain.clone(), planned.pod.clone(), planned.policy_chain.clone());
        };
        self.undecided.clear();
        for (id, a) in &mut self.attached {
            match (&mut a.judged, &a.interface) {
                (Judged::Selected(selected), Some(i)) => {
                    if *selected.policy_chain == PolicyChain::Isolated {
                        self.undecided.insert(id.clone());
                    }
                    add(a.pod_id.clone(), i, &a.attachment.addresses, selected);
                }
                (Judged::Selected(_), None) if a.attachment.host.is_none() => census.unmanaged += 1,
                // Its interface and so the pod are gone; DEL is still to come.
                (Judged::Selected(_), None) => {}
                (Judged::Free | Judged::Unknown, _) => census.free += 1,
            }
        }
        for (index, a) in &mut self.adopted {
            if let Judged::Selected(selected) = &mut a.judged {
                add(PodId::Adopted(*index), &a.known.interface, &a.known.addresses, selected);
            }
        }
        self.pod_marks.retain(&in_use);
        let before = std::mem::replace(&mut self.over_limit, plan.isolate_long_lists());
        for policy in self.over_limit.difference(&before) {
            tracing::warn!(%policy, "the policies of this node's pods list too many destinations: isolated the policy's pods");
        }
        (plan, uses.into_iter().collect(), census)
    }

    /// The policies that list too many destinations for this node.
    pub fn over_limit(&self) -> &BTreeSet<PolicyKey> {
        &self.over_limit
    }

    /// When pods are to be evaluated again.
    pub fn next(&self) -> Option<Instant> {
        let known =
            self.attached.values().map(|a| &a.policy_delay).chain(self.adopted.values().map(|a| &a.policy_delay));
        known.chain(self.unmanaged.values()).filter_map(PolicyDelay::next).min()
    }

    /// Evaluates the policies for each pod whose result is unknown or outdated.
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
            if let Some(pod) = known(&a.attachment, cluster) {
                a.labels = Some(pod.labels.clone());
                if !pod.uid.is_empty() {
                    a.uid.clone_from(&pod.uid);
                }
            }
            let PodRef { namespace, name, .. } = &a.attachment.pod;
            let pod = Client { namespace, name, uid: &a.uid, labels: a.labels.as_ref() };
            a.judged = a.policy_delay.policy_chain(view, pod, now).into();
        }
        for a in self.adopted.values_mut().filter(|a| matches!(a.judged, Judged::Unknown)) {
            // A pod of the same name with other addresses is another pod.
            let pod = cluster.pods.get(&a.known.pod).filter(|pod| *pod.addresses == *a.known.addresses);
            let is_new = |pod: &&Arc<Pod>| a.known.labels.as_ref() != Some(&pod.labels) || a.known.uid != pod.uid;
            if let Some(pod) = pod.filter(is_new) {
                let known = Arc::make_mut(&mut a.known);
                (known.labels, known.uid) = (Some(pod.labels.clone()), pod.uid.clone());
            }
            let Remembered { pod: ObjectKey { namespace, name }, uid, labels, .. } = &*a.known;
            let pod = Client { namespace, name, uid, labels: labels.as_ref() };
            a.judged = a.policy_delay.policy_chain(view, pod, now).into();
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
            let isolated = *policy_chain == PolicyChain::Isolated;
            let allocations = policy_chain.allocations().collect();
            let used =
                Use { addresses: addresses.to_vec(), allocations, isolated, policy_chain: Some(policy_chain.clone()) };
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

fn runs(pod: &Pod) -> bool {
    !pod.host_network && !pod.finished && !pod.addresses.is_empty()
}
