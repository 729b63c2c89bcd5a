//! Which of a policy's egress IPs a pod has, if the policy has several.
//!
//! The choice follows from the pod's name, uid and labels, and with a preference from the owners of the egress IPs, so
//! that it is known when ADD is called, and that everybody computes the same.

use crate::api::{AddressPair, Preference, Spread};
use crate::model::fnv::{fnv1a, rank};
use crate::model::{Client, Cluster, Policy, addresses_of};
use std::net::IpAddr;

/// The labels that have a pod's ordinal, of StatefulSets (Kubernetes 1.28) and of indexed Jobs,
/// <https://kubernetes.io/docs/reference/labels-annotations-taints/>.
const ORDINAL_LABELS: [&str; 2] = ["apps.kubernetes.io/pod-index", "batch.kubernetes.io/job-completion-index"];

/// An egress IP among which a pod has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice<T> {
    /// What is chosen.
    pub of: T,
    /// Its position among the egress IPs that the policy asks for, from 0.
    pub ordinal: u16,
    /// Its hash. It does not depend on the others, so that only the pods of an egress IP that is added or removed change.
    hash: u64,
    /// Where it is, and whether it works.
    pub state: ChoiceState,
}

/// The state of an egress IP, as a pod's node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChoiceState {
    /// Whether some node holds it.
    pub is_held: bool,
    /// Whether packets can leave from it now.
    pub is_ready: bool,
    /// How near the node is that holds it.
    pub near: Near,
}

/// How near a pod's node and another node are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// They are the same node.
    Node,
    /// They have the same zone.
    Zone,
    /// Neither.
    Far,
}

impl Near {
    /// How near two nodes are.
    pub fn of(cluster: &Cluster, node: &str, other: Option<&str>) -> Self {
        let zone = |name: &str| cluster.nodes.get(name)?.labels.get(ZONE_LABEL);
        match other {
            Some(other) if other == node => Near::Node,
            Some(other) if zone(node).is_some() && zone(node) == zone(other) => Near::Zone,
            _ => Near::Far,
        }
    }

    fn is(self, preference: Preference) -> bool {
        match preference {
            Preference::SameNode => self == Near::Node,
            Preference::SameZone => self != Near::Far,
        }
    }
}

/// The label of a node's zone, <https://kubernetes.io/docs/reference/labels-annotations-taints/#topologykubernetesiozone>.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl<T: Copy> Choice<T> {
    /// The egress IP that a policy names.
    pub fn named(of: T, ordinal: u16, address: &AddressPair, state: ChoiceState) -> Self {
        let bytes = addresses_of(address).flat_map(|address| match address {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        });
        Choice { of, ordinal, hash: fnv1a(bytes), state }
    }

    /// An egress IP that the controller chooses.
    pub fn numbered(of: T, ordinal: u16, state: ChoiceState) -> Self {
        Choice { of, ordinal, hash: fnv1a(ordinal.to_be_bytes()), state }
    }
}

/// How a policy divides its traffic among its egress IPs.
#[derive(Clone, Copy, Debug)]
pub struct Division<'a> {
    /// By what.
    pub spread: Spread,
    /// Which are preferred.
    pub preference: &'a [Preference],
    /// How many it asks for.
    pub asked: usize,
}

impl<'a> From<&'a Policy> for Division<'a> {
    fn from(policy: &'a Policy) -> Self {
        Division { spread: policy.spread, preference: &policy.preference, asked: policy.address.count() }
    }
}

impl Division<'_> {
    /// The egress IP of a pod, among those that the policy has. With [`Spread::Connection`] one for connections that cannot
    /// be divided. `None`: the policy has none for this pod.
    pub fn one<T: Copy>(&self, choices: &[Choice<T>], pod: Client<'_>) -> Option<T> {
        if self.asked <= 1 {
            return choices.first().map(|choice| choice.of);
        }
        if let (Spread::Ordinal, Some(ordinal)) = (self.spread, ordinal(pod)) {
            let wanted = ordinal % self.asked as u64;
            return choices.iter().find(|choice| u64::from(choice.ordinal) == wanted).map(|choice| choice.of);
        }
        if self.spread == Spread::Connection {
            return self.by_connection(choices).first().copied();
        }
        let seed = match pod.uid {
            "" => fnv1a(pod.namespace.bytes().chain([b'/']).chain(pod.name.bytes())),
            uid => fnv1a(uid.bytes()),
        };
        let possible = self.possible(choices).into_iter();
        possible.max_by_key(|choice| (rank(choice.hash, seed), choice.ordinal)).map(|choice| choice.of)
    }

    /// With [`Spread::Connection`], the egress IPs among which connections have one each, in order; otherwise none.
    pub fn by_connection<T: Copy>(&self, choices: &[Choice<T>]) -> Vec<T> {
        if self.spread != Spread::Connection || self.asked <= 1 {
            return Vec::new();
        }
        let possible = self.possible(choices);
        let any_ready = possible.iter().any(|choice| choice.state.is_ready);
        let mut ready: Vec<_> = possible.into_iter().filter(|choice| choice.state.is_ready || !any_ready).collect();
        ready.sort_by_key(|choice| choice.ordinal);
        ready.into_iter().map(|choice| choice.of).collect()
    }

    /// The egress IPs that new connections of a pod can have: one, none, or with [`Spread::Connection`] several.
    pub fn all<T: Copy>(&self, choices: &[Choice<T>], pod: Client<'_>) -> Vec<T> {
        match self.by_connection(choices) {
            all if all.is_empty() => self.one(choices, pod).into_iter().collect(),
            all => all,
        }
    }

    /// The preferred egress IPs. One that no node holds yet is left out while there are others: the policy has just got it.
    fn possible<'c, T>(&self, choices: &'c [Choice<T>]) -> Vec<&'c Choice<T>> {
        let any_held = choices.iter().any(|choice| choice.state.is_held);
        let held: Vec<&Choice<T>> = choices.iter().filter(|choice| choice.state.is_held || !any_held).collect();
        let near = self.preference.iter().map(|preference| {
            let is_near = |choice: &&&Choice<T>| choice.state.near.is(*preference) && choice.state.is_ready;
            held.iter().filter(is_near).copied().collect::<Vec<_>>()
        });
        near.into_iter().find(|near| !near.is_empty()).unwrap_or(held)
    }
}

/// The ordinal of a pod: a label's, otherwise the number at the end of its name.
fn ordinal(pod: Client<'_>) -> Option<u64> {
    let labelled = ORDINAL_LABELS.iter().find_map(|label| pod.labels?.get(label)?.parse().ok());
    labelled.or_else(|| pod.name.rsplit_once('-')?.1.parse().ok())
}

#[cfg(test)]
mod tests;
