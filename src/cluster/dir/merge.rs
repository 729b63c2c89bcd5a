//! Merges the files' objects into one snapshot.

use super::object::{GatewayStatus, Object};
use crate::model::selector::{Labels, Name};
use crate::model::shared::Shared;
use crate::model::{Cluster, PolicyKey};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// One file's part of the snapshot.
pub struct Part<'a, O> {
    /// The file, relative to the root.
    pub path: &'a Path,
    /// Whether the file is in the directory of statuses.
    pub is_status: bool,
    /// The file's objects with their lines.
    pub objects: O,
}

/// An object's position.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The file, relative to the root.
    pub path: &'a Path,
    /// The line, from 1.
    pub line: u32,
}

/// Merges the objects of all files. If two have the same name, the first in the order of paths and lines counts, and
/// `twice` is called with the object's label, the first position and the second.
pub fn merge<'a, O: Iterator<Item = (u32, &'a mut Object)>>(
    parts: impl Iterator<Item = Part<'a, O>>,
    mut twice: impl FnMut(String, Place<'_>, Place<'_>),
) -> Cluster {
    let (mut nodes, mut namespaces, mut pods, mut services) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut gateways, mut policies) = (Vec::new(), Vec::new());
    let (mut slices, mut endpoints) = (Vec::new(), Vec::new());
    let (mut egress_nodes, mut reported, mut policy_statuses) = (Vec::new(), Vec::new(), Vec::new());
    let mut gateway_statuses: BTreeMap<Name, &mut GatewayStatus> = BTreeMap::new();
    for Part { path, is_status, objects } in parts {
        for (line, object) in objects {
            let at = Place { path, line };
            match object {
                Object::Node(name, v) => nodes.push((name.clone(), at, v.clone())),
                Object::Namespace(name, v) => namespaces.push((name.clone(), at, Labels::clone(v))),
                Object::Pod(key, v) => pods.push((key.clone(), at, v.clone())),
                Object::Service(key, v) => services.push((key.clone(), at, v.clone())),
                Object::EndpointSlice(key, v) => slices.push((key.clone(), at, v.clone())),
                Object::Endpoints(key, v) => endpoints.push((key.clone(), at, v.clone())),
                Object::Gateway(name, v) => gateways.push((name.clone(), at, v.clone())),
                Object::Policy(key, v) => policies.push((key.clone(), at, v.clone())),
                Object::EgressNode(name, v) if is_status => reported.push((name.clone(), at, v.clone())),
                Object::EgressNode(name, v) => egress_nodes.push((name.clone(), at, v.clone())),
                Object::PolicyStatus(key, v) => policy_statuses.push((key.clone(), at, v.clone())),
                // A status file's path names its object, so no two files have a status of the same object.
                Object::GatewayStatus(name, gateway_status) => {
                    gateway_statuses.insert(name.clone(), gateway_status);
                }
            }
        }
    }
    let mut all_reported = unique(reported, |n| format!("EgressNode/{n}"), &mut twice);
    for (name, status) in unique(egress_nodes, |n| format!("EgressNode/{n}"), &mut twice) {
        all_reported.entry(name).or_insert(status);
    }
    // Kubernetes mirrors Endpoints as EndpointSlices and vice versa.
    let mut all_endpoints = unique(slices, |k| format!("EndpointSlice/{k}"), &mut twice);
    for (key, endpoints) in unique(endpoints, |k| format!("Endpoints/{k}"), &mut twice) {
        all_endpoints.entry(key).or_insert(endpoints);
    }
    let mut gateways = unique(gateways, |n| format!("EgressGateway/{n}"), &mut twice);
    for (name, gateway) in &mut gateways {
        if let Some(gateway_status) = gateway_statuses.get_mut(name) {
            *gateway = gateway_status.merge(gateway);
        }
    }
    let kind = |key: &PolicyKey| if key.namespace.is_some() { "EgressPolicy" } else { "ClusterEgressPolicy" };
    Cluster {
        nodes: unique(nodes, |n| format!("Node/{n}"), &mut twice).into(),
        namespaces: unique(namespaces, |n| format!("Namespace/{n}"), &mut twice).into(),
        pods: unique(pods, |k| format!("Pod/{k}"), &mut twice).into(),
        services: unique(services, |k| format!("Service/{k}"), &mut twice).into(),
        endpoints: all_endpoints.into(),
        gateways: gateways.into(),
        policies: unique(policies, |k| format!("{}/{k}", kind(k)), &mut twice).into(),
        egress_nodes: all_reported.into(),
        policy_statuses: unique(policy_statuses, |k| format!("the status of {k}"), &mut twice).into(),
        ..Cluster::default()
    }
}

fn unique<'a, K: Ord, V>(
    mut all: Vec<(K, Place<'a>, V)>,
    what: impl Fn(&K) -> String,
    twice: &mut impl FnMut(String, Place<'_>, Place<'_>),
) -> BTreeMap<K, V> {
    // The sort is stable, so the first one stays first.
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.dedup_by(|b, a| {
        let same = a.0 == b.0;
        if same {
            twice(what(&a.0), a.1, b.1);
        }
        same
    });
    all.into_iter().map(|(key, _, value)| (key, value)).collect()
}

/// A name and an object.
type Entry<'a, K, V> = (&'a K, &'a Arc<V>);

/// Makes a snapshot share equal parts with the previous one. Returns whether all parts are equal. Most objects are
/// shared already, so their contents need not be compared.
pub fn share(before: &Cluster, now: &mut Cluster) -> bool {
    fn objects<K: PartialEq, V: PartialEq>(
        before: &Shared<BTreeMap<K, Arc<V>>>,
        now: &mut Shared<BTreeMap<K, Arc<V>>>,
    ) -> bool {
        let object = |(a, b): (Entry<'_, K, V>, Entry<'_, K, V>)| a.0 == b.0 && (Arc::ptr_eq(a.1, b.1) || a.1 == b.1);
        let same = before.len() == now.len() && before.iter().zip(&*now).all(object);
        if same {
            now.clone_from(before);
        }
        same
    }
    fn whole<T: PartialEq>(before: &Shared<T>, now: &mut Shared<T>) -> bool {
        let same = before == now;
        if same {
            now.clone_from(before);
        }
        same
    }
    [
        whole(&before.namespaces, &mut now.namespaces),
        whole(&before.unreadable, &mut now.unreadable),
        whole(&before.inside, &mut now.inside),
        objects(&before.nodes, &mut now.nodes),
        objects(&before.pods, &mut now.pods),
        objects(&before.services, &mut now.services),
        objects(&before.endpoints, &mut now.endpoints),
        objects(&before.gateways, &mut now.gateways),
        objects(&before.policies, &mut now.policies),
        objects(&before.egress_nodes, &mut now.egress_nodes),
        objects(&before.policy_statuses, &mut now.policy_statuses),
    ]
    .iter()
    .all(|same| *same)
}
