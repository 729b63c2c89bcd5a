//! Names kept once, and lists of destinations: clusters repeat the same few ten thousand times.

use crate::api::{EgressGatewayStatus, Users};
use crate::plan::destination::Destination;
use crate::plan::model::{Gateway, Namespaces, PodMatch, Policy};
use crate::plan::selector::{Labels, Name, Selector};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Names {
    words: HashSet<Name>,
    destinations: HashSet<Arc<[Destination]>>,
}

impl Names {
    /// The one copy of `text`.
    pub fn get(&mut self, text: &str) -> Name {
        match self.words.get(text) {
            Some(name) => name.clone(),
            None => {
                let name = Name::from(text);
                self.words.insert(name.clone());
                name
            }
        }
    }

    /// Labels, each word of them kept once.
    pub fn labels(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        labels.iter().map(|(k, v)| (self.get(k), self.get(v))).collect()
    }

    /// Exchanges a selector's words for the copies kept here.
    pub fn selector(&mut self, selector: &mut Selector) {
        selector.share_names(&mut |name| self.get(name));
    }

    /// As [`Names::selector`], for all of a policy.
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
            match self.destinations.get(egress) {
                Some(same) => *egress = same.clone(),
                None => drop(self.destinations.insert(egress.clone())),
            }
        }
    }

    /// As [`Names::selector`], for all of a gateway.
    pub fn gateway(&mut self, gateway: &mut Gateway) {
        self.selector(&mut gateway.nodes);
        self.selector(&mut gateway.namespaces);
    }

    /// As [`Names::selector`], for a ledger, which loses the room that it does not need: it can have ten thousand paths.
    pub fn ledger(&mut self, ledger: &mut EgressGatewayStatus) {
        ledger.paths.shrink_to_fit();
        ledger.released.shrink_to_fit();
        for path in &mut ledger.paths {
            for name in [&mut path.node, &mut path.leaving].into_iter().flatten() {
                *name = self.get(name);
            }
            self.users(&mut path.policies);
        }
        ledger.released.iter_mut().for_each(|released| self.users(&mut released.policies));
    }

    fn users(&mut self, users: &mut Users) {
        users.shrink_to_fit();
        for policy in users {
            policy.name = self.get(&policy.name);
            policy.namespace = policy.namespace.as_ref().map(|namespace| self.get(namespace));
        }
    }

    /// Forgets what is used once or not at all: there is nothing to share in it.
    pub fn tidy(&mut self) {
        self.words.retain(|name| Name::strong_count(name).is_none_or(|count| count > 2));
        self.words.shrink_to_fit();
        self.destinations.retain(|list| Arc::strong_count(list) > 2);
        self.destinations.shrink_to_fit();
    }
}
