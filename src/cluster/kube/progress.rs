//! What has been read of the API server, and what is still missing for a snapshot.

use super::watch::Change;
use crate::cluster::decode::Decoded;
use crate::cluster::kind::Kind;
use crate::cluster::object::Key;
use crate::cluster::store::Store;
use crate::model::{Cluster, Inside};
use std::collections::{BTreeMap, BTreeSet};

/// All objects of one kind.
pub type Listed = BTreeMap<Key, Decoded>;

/// The store, and which kinds it has completely.
#[derive(Debug)]
pub struct Progress {
    store: Store,
    is_controller: bool,
    /// Services are followed whatever the policies are.
    follows_services: bool,
    /// The kinds that have been listed to the end.
    listed: BTreeSet<Kind>,
    /// The networks of Services that the API server or an installer named. Outer `None`: the API server has not answered
    /// yet; inner `None`: nobody knows them.
    service_networks: Option<Option<Inside>>,
    /// The kinds that cannot be followed now, and why.
    troubles: BTreeMap<Kind, String>,
    /// The newest version of a pod that was seen.
    newest_pod: String,
}

impl Progress {
    /// The state before anything is read.
    pub fn new(is_controller: bool) -> Self {
        Progress {
            store: Store::new(is_controller, false),
            is_controller,
            follows_services: false,
            listed: BTreeSet::new(),
            service_networks: None,
            troubles: BTreeMap::new(),
            newest_pod: String::new(),
        }
    }

    /// Follows Services whatever the policies are.
    #[must_use]
    pub fn following_services(self, follows_services: bool) -> Self {
        Progress { follows_services, ..self }
    }

    /// Takes a change.
    pub fn take(&mut self, change: Change) {
        match change {
            Change::Listed(kind, listed) => self.replace(kind, listed),
            Change::Applied(kind, decoded) => self.apply(kind, decoded),
            Change::Deleted(kind, key) => self.store.delete(kind, &key),
            Change::Found(decoded) => {
                // The watch delivers a newer pod itself. A pod that is older than its last event may be deleted.
                if is_newer(&decoded.version, &self.newest_pod) {
                    self.apply(Kind::Pod, decoded);
                }
            }
            Change::Absent(kind) => drop(self.listed.insert(kind)),
            Change::ServiceNetworks(answer) => {
                self.store.set_other_networks(answer.clone().unwrap_or_default());
                self.service_networks = Some(answer);
            }
            Change::State(kind, Some(trouble)) => drop(self.troubles.insert(kind, trouble.text)),
            Change::State(kind, None) => drop(self.troubles.remove(&kind)),
        }
    }

    fn replace(&mut self, kind: Kind, listed: Listed) {
        self.store.retain(kind, |key| listed.contains_key(key));
        if kind == Kind::Pod {
            // Another etcd may count from the start.
            self.newest_pod.clear();
        }
        for decoded in listed.into_values() {
            self.apply(kind, decoded);
        }
        self.listed.insert(kind);
        if kind == Kind::Service {
            self.store.services_are_known();
        }
    }

    fn apply(&mut self, kind: Kind, decoded: Decoded) {
        if kind == Kind::Pod && is_newer(&decoded.version, &self.newest_pod) {
            self.newest_pod.clone_from(&decoded.version);
        }
        self.store.apply(kind, decoded);
    }

    /// Whether the networks of Services must be asked for, because no object lists them.
    pub fn lacks_service_networks(&self) -> bool {
        let none_listed = self.listed.contains(&Kind::ServiceCidr) && !self.store.has_networks(Kind::ServiceCidr);
        !self.is_controller && none_listed && self.service_networks.is_none()
    }

    /// Whether Services must be followed: a policy needs them, or nobody knows their networks.
    pub fn needs_services(&self) -> bool {
        let unknown = self.service_networks == Some(None) && !self.store.has_networks(Kind::ServiceCidr);
        unknown || self.follows_services || self.store.needs_services()
    }

    /// Whether the kinds must be followed that say which nodes announce Services' addresses.
    pub fn needs_announcements(&self) -> bool {
        self.is_controller && self.store.has_addresses_of_services()
    }

    /// The Services are no longer followed.
    pub fn forget_services(&mut self) {
        self.listed.remove(&Kind::Service);
        self.troubles.remove(&Kind::Service);
        self.store.forget_services();
    }

    /// Whether a kind has been listed to the end.
    pub fn has_listed(&self, kind: Kind) -> bool {
        self.listed.contains(&kind)
    }

    /// The kinds that the first snapshot needs and that have not been listed yet.
    pub fn missing(&self) -> Vec<Kind> {
        let services = Some(Kind::Service).filter(|_| self.needs_services());
        let optional = Kind::OPTIONAL.into_iter().filter(|_| !self.is_controller);
        let announcements = Kind::ANNOUNCEMENTS.into_iter().filter(|_| self.needs_announcements());
        let all = Kind::ALWAYS.into_iter().chain(optional).chain(services).chain(announcements);
        all.filter(|kind| !self.listed.contains(kind)).collect()
    }

    /// The first snapshot.
    pub fn first(&mut self) -> Cluster {
        self.store.compact();
        self.store.news().unwrap_or_default()
    }

    /// The snapshot, if it has changed since the last one.
    pub fn news(&mut self) -> Option<Cluster> {
        self.store.news()
    }

    /// The current problems, one line each.
    pub fn problems(&mut self) -> Vec<String> {
        self.troubles.values().cloned().chain(self.store.problems()).collect()
    }
}

/// Whether resource version `a` is newer than `b`. They are numbers in all versions of Kubernetes; what is not a
/// number is older.
fn is_newer(a: &str, b: &str) -> bool {
    a.parse::<u64>().ok() > b.parse::<u64>().ok()
}

#[cfg(test)]
mod tests;
