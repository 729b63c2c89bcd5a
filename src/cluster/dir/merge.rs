//! Brings the objects of all files into the store.

use super::area::status_of;
use crate::cluster::kind::Kind;
use crate::cluster::object::{Key, Object, label};
use crate::cluster::refused::Refused;
use crate::cluster::store::Store;
use std::collections::BTreeMap;
use std::path::Path;

/// An object of a file.
#[derive(Clone, Copy)]
pub struct Defined<'a> {
    /// The file, relative to the root.
    pub path: &'a Path,
    /// The line, from 1.
    pub line: u32,
    pub object: &'a Object,
}

/// Refused objects.
pub type Refusals = BTreeMap<(Kind, Key), Refused>;

/// Whether it is a status of its own, then kind, namespace and name.
type Slot<'a> = (bool, Kind, Option<&'a str>, &'a str);

impl<'a> Defined<'a> {
    /// The place of the object in the store.
    fn slot(&self) -> Slot<'a> {
        let (kind, namespace, name) = self.object.identity();
        let kind = if kind == Kind::Endpoints { Kind::EndpointSlice } else { kind };
        (matches!(self.object, Object::GatewayStatus(..) | Object::PolicyStatus(..)), kind, namespace, name)
    }

    /// Whether another object in the same place is preferred. Kubernetes mirrors Endpoints as EndpointSlices and vice
    /// versa. A node's own report is preferred to an EgressNode in a manifest.
    fn is_second_choice(&self) -> bool {
        match self.object {
            Object::Endpoints(..) => true,
            Object::EgressNode(..) => status_of(self.path).is_none(),
            _ => false,
        }
    }
}

/// Sorts the objects of all files. If two have the same name, the first in the order of paths and lines counts, and
/// `twice` is called with the object's label and both.
pub fn merge<'a>(
    objects: impl Iterator<Item = Defined<'a>>,
    mut twice: impl FnMut(String, Defined<'a>, Defined<'a>),
) -> Vec<Defined<'a>> {
    let mut all: Vec<Defined<'a>> = objects.collect();
    // The sort is stable, so the first one stays first.
    all.sort_by(|a, b| a.slot().cmp(&b.slot()).then(a.is_second_choice().cmp(&b.is_second_choice())));
    all.dedup_by(|b, a| {
        let same = a.slot() == b.slot();
        if same && a.is_second_choice() == b.is_second_choice() {
            twice(label(a.object.identity()), *a, *b);
        }
        same
    });
    all
}

/// The object of this key, if a readable file has it.
pub fn find<'a>(all: &[Defined<'a>], kind: Kind, (namespace, name): &Key) -> Option<Defined<'a>> {
    let slot: Slot<'_> = (false, kind, namespace.as_deref(), name);
    all.binary_search_by(|defined| defined.slot().cmp(&slot)).ok().map(|place| all[place])
}

/// Brings the store to these objects.
pub fn bring(all: &[Defined<'_>], refused: &Refusals, store: &mut Store) {
    let (objects, statuses) = all.split_at(all.partition_point(|defined| !defined.slot().0));
    store.retain_refused(|key| refused.contains_key(key));
    let of_gateways = statuses.iter().filter(|defined| matches!(defined.object, Object::GatewayStatus(..)));
    of_gateways.for_each(|defined| store.put(defined.object.clone()));
    for ((kind, key), refused) in refused {
        store.refuse(*kind, key.clone(), refused.clone());
    }
    objects.iter().for_each(|defined| store.put(defined.object.clone()));
    for kind in Kind::STORED {
        let defined = objects.iter().filter(|defined| defined.slot().1 == kind).count();
        // All objects are in the store. If there are no more, none is gone, and none needs to be looked up.
        if store.count(kind) > defined + refused.keys().filter(|(of, _)| *of == kind).count() {
            let is_refused = |key: &Key| refused.contains_key(&(kind, key.clone()));
            store.retain(kind, |key| find(all, kind, key).is_some() || is_refused(key));
        }
    }
    // The status of a policy that was deleted is there until its file is deleted.
    let of_policies = statuses.iter().filter(|defined| matches!(defined.object, Object::PolicyStatus(..)));
    of_policies.for_each(|defined| store.put(defined.object.clone()));
    let is_there = |kind, namespace: Option<&str>, name: &str| {
        statuses.binary_search_by(|defined| defined.slot().cmp(&(true, kind, namespace, name))).is_ok()
    };
    store.retain_statuses(
        |name| is_there(Kind::EgressGateway, None, name),
        |key| is_there(Kind::of_policy(key), key.namespace.as_deref(), &key.name),
    );
}
