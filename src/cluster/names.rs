//! Interns names and lists of destinations, of which a cluster has many equal ones.

use crate::api::{EgressGatewayStatus, EgressPolicyStatus, Users};
use crate::model::covers::Covers;
use crate::model::selector::{Labels, Name, Selector};
use crate::model::{Gateway, Namespaces, PodMatch, Policy};
use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

/// The interned values.
#[derive(Debug, Default)]
pub struct Names {
    /// Names that were kept at the last [`Names::trim`], sorted. With 5,000 nodes and 10,000 policies, a set would
    /// have as much memory again in unused capacity.
    kept: Vec<Name>,
    /// Names added since.
    words: HashSet<Name>,
    keys: HashSet<Arc<[Name]>>,
    destinations: HashSet<Arc<Covers>>,
}

impl Names {
    /// The interned copy of `text`.
    pub fn get(&mut self, text: &str) -> Name {
        if let Some(name) = self.words.get(text) {
            return name.clone();
        }
        if let Ok(place) = self.kept.binary_search_by(|name| (**name).cmp(text)) {
            return self.kept[place].clone();
        }
        let name = Name::from(text);
        self.words.insert(name.clone());
        name
    }

    /// Labels of interned names.
    pub fn labels(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        let mut labels: Labels = labels.iter().map(|(k, v)| (self.get(k), self.get(v))).collect();
        labels.share_keys(|keys| one_of(&mut self.keys, keys));
        labels
    }

    /// Replaces a selector's names by interned copies.
    pub fn selector(&mut self, selector: &mut Selector) {
        selector.share_names(&mut |name| self.get(name));
    }

    /// Like [`Names::selector`], for a whole policy.
    pub fn policy(&mut self, policy: &mut Policy) {
        match &mut policy.namespaces {
            Namespaces::One(name) => *name = self.get(name),
            Namespaces::Selected(s) => self.selector(s),
        }
        match &mut policy.pods {
            PodMatch::Labels(s) => self.selector(s),
            PodMatch::Services(names) => names.iter_mut().for_each(|n| *n = self.get(n)),
        }
        let move_to = policy.for_controller.as_mut().map(|more| &mut more.move_to);
        for name in [Some(&mut policy.gateway), move_to].into_iter().flatten().flatten() {
            *name = self.get(name);
        }
        if let Some(egress) = &mut policy.egress {
            *egress = one_of(&mut self.destinations, egress);
        }
    }

    /// Like [`Names::selector`], for a whole gateway.
    pub fn gateway(&mut self, gateway: &mut Gateway) {
        self.selector(&mut gateway.nodes);
        self.selector(&mut gateway.namespaces);
        gateway.reservations.iter_mut().for_each(|reserved| self.selector(&mut reserved.namespaces));
    }

    /// Like [`Names::selector`], for a gateway's status. Also frees unused capacity: a gateway can have 10,000
    /// allocations.
    pub fn gateway_status(&mut self, gateway_status: &mut EgressGatewayStatus) {
        gateway_status.allocations.shrink_to_fit();
        gateway_status.released.shrink_to_fit();
        for allocation in &mut gateway_status.allocations {
            for name in [&mut allocation.node, &mut allocation.leaving, &mut allocation.service].into_iter().flatten() {
                *name = self.get(name);
            }
            self.users(&mut allocation.policies);
        }
        gateway_status.released.iter_mut().for_each(|released| self.users(&mut released.policies));
    }

    /// Replaces the names in a policy's status by shared ones.
    pub fn policy_status(&mut self, status: &mut EgressPolicyStatus) {
        status.pods_by_node.iter_mut().for_each(|on| on.node = self.get(&on.node));
    }

    fn users(&mut self, users: &mut Users) {
        users.shrink_to_fit();
        for policy in users {
            policy.name = self.get(&policy.name);
            policy.namespace = policy.namespace.as_ref().map(|namespace| self.get(namespace));
        }
    }

    /// Removes values that are used once or not at all, because there is nothing to share.
    pub fn trim(&mut self) {
        let is_shared = |name: &Name| Name::strong_count(name).is_none_or(|count| count > 2);
        self.kept.retain(is_shared);
        self.kept.extend(std::mem::take(&mut self.words).into_iter().filter(is_shared));
        self.kept.sort_unstable();
        self.kept.shrink_to_fit();
        self.keys.retain(|list| Arc::strong_count(list) > 2);
        self.keys.shrink_to_fit();
        self.destinations.retain(|list| Arc::strong_count(list) > 2);
        self.destinations.shrink_to_fit();
    }
}

/// The interned copy of `list`.
fn one_of<T: Eq + Hash + ?Sized>(all: &mut HashSet<Arc<T>>, list: &Arc<T>) -> Arc<T> {
    match all.get(list) {
        Some(same) => same.clone(),
        None => {
            all.insert(list.clone());
            list.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(names: &mut Names, pairs: &[(&str, &str)]) -> Labels {
        names.labels(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn a_shared_name_is_one_copy_before_and_after_trimming() {
        let mut names = Names::default();
        let (a, b) = (names.get("team-a"), names.get("team-a"));
        assert!(Name::ptr_eq(&a, &b));
        for _ in 0..2 {
            names.trim();
            assert!(Name::ptr_eq(&a, &names.get("team-a")));
        }
        assert_eq!((names.kept.len(), names.words.len()), (1, 0));
    }

    #[test]
    fn names_used_once_or_never_are_removed() {
        let mut names = Names::default();
        let (one, two) = (names.get("one"), names.get("two"));
        let again = two.clone();
        drop(names.get("nobody's"));
        names.trim();
        assert_eq!(names.kept, ["two"]);
        drop((one, two, again));
        names.trim();
        assert!(names.kept.is_empty());
    }

    #[test]
    fn labels_of_the_same_keys_share_them() {
        let mut names = Names::default();
        let a = labels(&mut names, &[("zone", "a"), ("arch", "amd64")]);
        let b = labels(&mut names, &[("arch", "arm64"), ("zone", "b")]);
        names.trim();
        let c = labels(&mut names, &[("arch", "arm64"), ("zone", "a")]);
        assert_eq!(names.keys.len(), 1);
        let of_zone = |labels: &Labels| labels.get("zone").map(ToString::to_string).unwrap_or_default();
        assert_eq!([of_zone(&a), of_zone(&b), of_zone(&c)], ["a", "b", "a"]);
        drop((a, b, c));
        names.trim();
        assert!(names.keys.is_empty() && names.kept.is_empty());
    }
}
