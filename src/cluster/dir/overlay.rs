//! Puts manifests over a snapshot, as `kubectl apply` and `kubectl delete` would.

use super::documents::Documents;
use crate::cluster::decode::manifest::{Reader, StatusPath};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::{Object, label};
use crate::cluster::opt_in;
use crate::model::capacity::AnnotatedCapacity;
use crate::model::selector::Name;
use crate::model::{Cluster, Gateway, Namespaces, Node, Policy, PolicyKey, Service};
use serde::Deserialize;
use std::sync::Arc;

/// What is done with the objects of manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// They are created, or replace those of the same name.
    Apply,
    /// They are deleted.
    Delete,
}

/// The result.
#[derive(Clone, Debug, Default)]
pub struct Overlaid {
    /// The objects that are created, changed or deleted, `EgressPolicy shop/visitors`.
    pub objects: Vec<String>,
    /// Objects that would be rejected: file and line, what is wrong, and the remedy.
    pub rejected: Vec<String>,
}

/// The part of a manifest that says whether a namespace is named.
#[derive(Deserialize)]
struct Head {
    metadata: Option<HeadMetadata>,
}

#[derive(Deserialize)]
struct HeadMetadata {
    namespace: Option<String>,
}

/// Puts the manifests of one file over a snapshot. Objects without a namespace are those of `namespace`. `now` is the
/// creation time of new objects, in seconds since the Unix epoch.
pub fn overlay(cluster: &mut Cluster, verb: Verb, (file, text): (&str, &[u8]), namespace: &str, now: i64) -> Overlaid {
    let mut result = Overlaid::default();
    let mut names = Names::default();
    let mut documents = Documents::new(text);
    loop {
        let document = match documents.next() {
            Ok(None) => {
                opt_in::update(cluster, std::iter::empty());
                return result;
            }
            Ok(Some(document)) => document,
            Err(e) => {
                opt_in::update(cluster, std::iter::empty());
                result.rejected.push(format!("{file}: {e}"));
                return result;
            }
        };
        let mut reader = Reader { names: &mut names, node: None, statuses: StatusPath::InFiles };
        let objects = match reader.read(document.text) {
            Ok(objects) => objects,
            Err(mut fault) => {
                let line = document.line + fault.line.saturating_sub(1);
                fault.line = line;
                result.rejected.push(format!("{file}:{line}: {fault}"));
                continue;
            }
        };
        // Documents with a list name their namespaces.
        let head = serde_saphyr::from_str::<Head>(document.text).ok().and_then(|head| head.metadata);
        let of_default = head.is_some_and(|metadata| metadata.namespace.is_none());
        for (_, mut object) in objects {
            if let (true, Object::Policy(key, policy)) = (of_default, &mut object)
                && key.namespace.is_some()
            {
                key.namespace = Some(namespace.into());
                Arc::make_mut(policy).namespaces = Namespaces::One(namespace.into());
            }
            let (kind, of, name) = object.identity();
            let shown = label((kind, of, name));
            if matches!(kind, Kind::EgressNode) {
                continue;
            }
            result.objects.push(shown);
            match verb {
                Verb::Apply => apply(cluster, object, now),
                Verb::Delete => delete(cluster, &object),
            }
        }
    }
}

fn apply(cluster: &mut Cluster, object: Object, now: i64) {
    match object {
        Object::Namespace(name, labels) => drop(cluster.namespaces.insert(name, *labels)),
        Object::Node(name, node) => {
            // A manifest of a node has its labels at most. What the kubelet says stays.
            let node = match cluster.nodes.get(&name) {
                Some(there) => {
                    let says_nothing = node.capacity == AnnotatedCapacity::default();
                    let capacity = if says_nothing { there.capacity } else { node.capacity };
                    Node { labels: node.labels.clone(), cordoned: node.cordoned, capacity, ..Node::clone(there) }
                }
                None => Node::clone(&node),
            };
            cluster.nodes.insert(name, Arc::new(node));
        }
        Object::Pod(key, pod) => drop(cluster.pods.insert(key, pod)),
        Object::Service(key, service) => {
            // So it is with a Service: its load balancer gives it its address.
            let there = cluster.services.get(&key).and_then(|there| there.load_balancer.clone());
            let load_balancer = service.load_balancer.clone().or(there);
            cluster.services.insert(key, Arc::new(Service { load_balancer, ..Service::clone(&service) }));
        }
        Object::Gateway(name, gateway) => {
            let there = cluster.gateways.get(&name).map(|there| (there.status.clone(), there.version.clone()));
            let (status, version) = there.unwrap_or_default();
            let gateway = Gateway { status, version, ..Gateway::clone(&gateway) };
            cluster.gateways.insert(name, Arc::new(gateway));
        }
        Object::Policy(key, policy) => {
            let created = cluster.policies.get(&key).map_or(now, |there| there.created);
            cluster.unreadable.remove(&key);
            cluster.policies.insert(key, Arc::new(Policy { created, ..Policy::clone(&policy) }));
        }
        Object::Endpoints(..)
        | Object::EndpointSlice(..)
        | Object::EgressNode(..)
        | Object::Announcement(..)
        | Object::GatewayStatus(..)
        | Object::PolicyStatus(..)
        | Object::Networks(..) => {}
    }
}

fn delete(cluster: &mut Cluster, object: &Object) {
    match object {
        Object::Namespace(name, _) => {
            cluster.namespaces.remove(name);
            let within: Vec<PolicyKey> =
                cluster.policies.keys().filter(|key| key.namespace.as_ref() == Some(name)).cloned().collect();
            within.iter().for_each(|key| drop(cluster.policies.remove(key)));
            let is_within = |namespace: &Name| namespace == name;
            let pods: Vec<_> = cluster.pods.keys().filter(|key| is_within(&key.namespace)).cloned().collect();
            pods.iter().for_each(|key| drop(cluster.pods.remove(key)));
        }
        Object::Node(name, _) => drop(cluster.nodes.remove(name)),
        Object::Pod(key, _) => drop(cluster.pods.remove(key)),
        Object::Service(key, _) => drop(cluster.services.remove(key)),
        Object::Gateway(name, _) => drop(cluster.gateways.remove(name)),
        Object::Policy(key, _) => {
            cluster.unreadable.remove(key);
            cluster.policies.remove(key);
        }
        Object::Endpoints(..)
        | Object::EndpointSlice(..)
        | Object::EgressNode(..)
        | Object::Announcement(..)
        | Object::GatewayStatus(..)
        | Object::PolicyStatus(..)
        | Object::Networks(..) => {}
    }
}
