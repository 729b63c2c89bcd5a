//! All that is known of the cluster, brought up to date change by change.

use super::decode::{Decoded, Item, Key, Listed, ReadableGateway, is_newer};
use super::kind::Kind;
use super::watch::Change;
use crate::cluster::dir::fault::Fault;
use crate::model::fallback_policy::{ReadableParts, fallback_policy};
use crate::model::selector::Name;
use crate::model::shared::Shared;
use crate::model::{Cluster, Gateway, Inside, ObjectKey, PodMatch, Policy, PolicyKey, Unreadable};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Store {
    /// As it is told.
    cluster: Cluster,
    /// What has been listed to its end once.
    listed: BTreeSet<Kind>,
    /// Policies that go by Services, while the Services are not known: without them they would select nothing.
    waiting: BTreeMap<PolicyKey, Arc<Policy>>,
    /// Networks inside the cluster, by the objects that say so.
    inside: BTreeMap<(Kind, Name), Vec<IpNetwork>>,
    /// What the API server or an installer said of Services' networks; inside, `None`: nobody knows them.
    answer: Option<Option<Inside>>,
    /// What is wrong with objects.
    faults: BTreeMap<(Kind, Key), Faulty>,
    /// The policies in the cluster that only stand for one that makes no sense.
    standing: BTreeSet<PolicyKey>,
    /// Kinds that cannot be followed now, and why.
    states: BTreeMap<Kind, String>,
    /// Whether the reader tells policies what became of them.
    tells_policies: bool,
    /// The newest version of a pod that was seen.
    newest_pod: String,
    /// Something is another since the last snapshot.
    changed: bool,
}

/// What is wrong with an object.
#[derive(Debug)]
struct Faulty {
    text: String,
    generation: Option<i64>,
    /// Of a policy: what can be read of it.
    readable: Option<Box<ReadableParts>>,
}

impl Store {
    /// Knows nothing. `tells_policies`: the reader is a controller.
    pub fn new(tells_policies: bool) -> Self {
        Store {
            cluster: Cluster::default(),
            listed: BTreeSet::new(),
            waiting: BTreeMap::new(),
            inside: BTreeMap::new(),
            answer: None,
            faults: BTreeMap::new(),
            standing: BTreeSet::new(),
            states: BTreeMap::new(),
            tells_policies,
            newest_pod: String::new(),
            changed: false,
        }
    }

    /// Takes in a change.
    pub fn take(&mut self, change: Change) {
        self.take_in(change);
        self.fill_in();
    }

    fn take_in(&mut self, change: Change) {
        match change {
            Change::Listed(kind, listed) => self.replace(kind, listed),
            Change::Applied(kind, decoded) => self.apply(kind, decoded),
            Change::Deleted(kind, key) => self.delete(kind, &key),
            Change::Found(decoded) => {
                // A watch that is behind will tell of it; one that is ahead has told that it is gone.
                if is_newer(&decoded.version, &self.newest_pod) {
                    self.apply(Kind::Pod, decoded);
                }
            }
            Change::Absent(kind) => drop(self.listed.insert(kind)),
            Change::ServiceNetworks(answer) => {
                self.answer = Some(answer);
                self.gather_inside();
            }
            Change::State(kind, Some(trouble)) => drop(self.states.insert(kind, trouble.text)),
            Change::State(kind, None) => drop(self.states.remove(&kind)),
        }
    }

    fn replace(&mut self, kind: Kind, listed: Listed) {
        let gone: Vec<Key> = self.keys(kind).filter(|key| !listed.contains_key(key)).collect();
        for key in gone {
            self.delete(kind, &key);
        }
        if kind == Kind::Pod {
            // Another etcd may count anew.
            self.newest_pod.clear();
        }
        for decoded in listed.into_values() {
            self.apply(kind, decoded);
        }
        self.listed.insert(kind);
        if kind == Kind::Service {
            for (key, policy) in std::mem::take(&mut self.waiting) {
                self.cluster.policies.insert(key, policy);
                self.changed = true;
            }
        }
    }

    /// What there is of a kind, the objects that make no sense among them.
    fn keys(&self, kind: Kind) -> Box<dyn Iterator<Item = Key> + '_> {
        let c = &self.cluster;
        let plain = |name: &Name| (None, name.clone());
        let object = |key: &ObjectKey| (Some(key.namespace.clone()), key.name.clone());
        let policies = move |cluster: bool| {
            let all = c.policies.keys().chain(self.waiting.keys());
            all.filter(move |k| k.namespace.is_none() == cluster).map(|k| (k.namespace.clone(), k.name.clone()))
        };
        let faulty = self.faults.keys().filter(move |(k, _)| *k == kind).map(|(_, key)| key.clone());
        let known: Box<dyn Iterator<Item = Key> + '_> = match kind {
            Kind::Namespace => Box::new(c.namespaces.keys().map(plain)),
            Kind::Node => Box::new(c.nodes.keys().map(plain)),
            Kind::Pod => Box::new(c.pods.keys().map(object)),
            Kind::Service => Box::new(c.services.keys().map(object)),
            Kind::EndpointSlice => Box::new(c.endpoints.keys().map(object)),
            Kind::EgressGateway => Box::new(c.gateways.keys().map(plain)),
            Kind::EgressPolicy => Box::new(policies(false)),
            Kind::ClusterEgressPolicy => Box::new(policies(true)),
            Kind::EgressNode => Box::new(c.egress_nodes.keys().map(plain)),
            Kind::ServiceCidr | Kind::IpPool => {
                Box::new(self.inside.keys().filter(move |(k, _)| *k == kind).map(|(_, name)| (None, name.clone())))
            }
        };
        Box::new(known.chain(faulty))
    }

    fn apply(&mut self, kind: Kind, decoded: Decoded) {
        let Decoded { key, version, generation, item, told, readable, gateway } = decoded;
        if kind == Kind::Pod && is_newer(&version, &self.newest_pod) {
            self.newest_pod = version;
        }
        match item {
            Ok(Some(item)) => {
                self.mended(kind, &key);
                self.put(item);
            }
            // It was of use, and is no longer.
            Ok(None) => self.delete(kind, &key),
            Err(fault) => {
                if let (Some(told), true) = (told, self.tells_policies) {
                    self.changed |= put(&mut self.cluster.policy_statuses, policy_key(&key), told);
                }
                if let Some(readable) = gateway {
                    self.keep_gateway(&key.1, *readable, generation, &fault);
                }
                self.faults.insert((kind, key), Faulty { text: fault.to_string(), generation, readable });
            }
        }
    }

    /// Follows the allocations of a gateway whose spec is invalid, with its last valid spec if there is one.
    fn keep_gateway(&mut self, name: &Name, readable: ReadableGateway, generation: Option<i64>, fault: &Fault) {
        let ReadableGateway { version, status, stands } = readable;
        let known = self.cluster.gateways.get(name).filter(|gateway| !gateway.frozen);
        let Some(gateway) = known.map(|gateway| Gateway::clone(gateway)).or(stands) else { return };
        let fault = Some(fault.to_string().into());
        let gateway = Gateway { version, status, generation, fault, ..gateway };
        self.changed |= put(&mut self.cluster.gateways, name.clone(), Arc::new(gateway));
    }

    /// Adds a fallback policy, made from the allocations, for each invalid policy without a last valid state. Adds to the
    /// policies' faults what is used of them.
    fn fill_in(&mut self) {
        let policies =
            self.faults.iter().filter_map(|((_, key), fault)| Some((key, fault, fault.readable.as_deref()?)));
        let policies: Vec<_> = policies.map(|(key, fault, readable)| (policy_key(key), fault, readable)).collect();
        if policies.is_empty() && self.standing.is_empty() {
            return;
        }
        let c = &mut self.cluster;
        let is_lost = |key: &PolicyKey| {
            self.standing.contains(key) || !(c.policies.contains_key(key) || self.waiting.contains_key(key))
        };
        let lost = policies.iter().filter(|(key, ..)| is_lost(key));
        let stands: BTreeMap<PolicyKey, Policy> =
            lost.filter_map(|(key, _, readable)| Some((key.clone(), fallback_policy(c, key, readable)?))).collect();
        for key in std::mem::take(&mut self.standing).iter().filter(|key| !stands.contains_key(key)) {
            self.changed |= remove(&mut c.policies, key);
        }
        for (key, policy) in stands {
            self.changed |= put(&mut c.policies, key.clone(), Arc::new(policy));
            self.standing.insert(key);
        }
        if self.tells_policies {
            for (key, fault, _) in policies {
                let message = format!("{}; {}", fault.text, used(c, &self.waiting, &self.standing, &key));
                let unreadable = Arc::new(Unreadable { message, generation: fault.generation });
                self.changed |= put(&mut c.unreadable, key, unreadable);
            }
        }
    }

    /// Nothing is wrong with an object any more.
    fn mended(&mut self, kind: Kind, key: &Key) {
        if self.faults.remove(&(kind, key.clone())).is_some() {
            self.changed |= remove(&mut self.cluster.unreadable, &policy_key(key));
        }
    }

    fn is_known(&self, kind: Kind, (namespace, name): &Key) -> bool {
        let c = &self.cluster;
        let object = || Some(ObjectKey { namespace: namespace.clone()?, name: name.clone() });
        let policy = || PolicyKey { namespace: namespace.clone(), name: name.clone() };
        match kind {
            Kind::Namespace => c.namespaces.contains_key(name),
            Kind::Node => c.nodes.contains_key(name),
            Kind::Pod => object().is_some_and(|k| c.pods.contains_key(&k)),
            Kind::Service => object().is_some_and(|k| c.services.contains_key(&k)),
            Kind::EndpointSlice => object().is_some_and(|k| c.endpoints.contains_key(&k)),
            Kind::EgressGateway => c.gateways.contains_key(name),
            Kind::EgressPolicy | Kind::ClusterEgressPolicy => {
                c.policies.contains_key(&policy()) || self.waiting.contains_key(&policy())
            }
            Kind::EgressNode => c.egress_nodes.contains_key(name),
            Kind::ServiceCidr | Kind::IpPool => self.inside.contains_key(&(kind, name.clone())),
        }
    }

    fn put(&mut self, item: Item) {
        let c = &mut self.cluster;
        self.changed |= match item {
            Item::Namespace(name, labels) => put(&mut c.namespaces, name, labels),
            Item::Node(name, node) => put(&mut c.nodes, name, node),
            Item::Pod(key, pod) => put(&mut c.pods, key, pod),
            Item::Service(key, service) => put(&mut c.services, key, service),
            Item::Endpoints(key, endpoints) => put(&mut c.endpoints, key, endpoints),
            Item::Gateway(name, gateway) => put(&mut c.gateways, name, gateway),
            Item::EgressNode(name, status) => put(&mut c.egress_nodes, name, status),
            Item::Inside(kind, name, networks) => {
                self.inside.insert((kind, name), networks);
                return self.gather_inside();
            }
            Item::Policy(key, policy, status) => {
                let told = match status {
                    Some(status) => put(&mut c.policy_statuses, key.clone(), status),
                    None => c.policy_statuses.contains_key(&key) && c.policy_statuses.remove(&key).is_some(),
                };
                self.standing.remove(&key);
                let ready = matches!(policy.pods, PodMatch::Labels(_)) || self.listed.contains(&Kind::Service);
                self.waiting.remove(&key);
                if ready {
                    put(&mut c.policies, key, policy) || told
                } else {
                    self.waiting.insert(key, policy);
                    told
                }
            }
        };
    }

    fn delete(&mut self, kind: Kind, (namespace, name): &Key) {
        self.mended(kind, &(namespace.clone(), name.clone()));
        let c = &mut self.cluster;
        let object = || namespace.clone().map(|namespace| ObjectKey { namespace, name: name.clone() });
        self.changed |= match kind {
            Kind::Namespace => remove(&mut c.namespaces, name),
            Kind::Node => remove(&mut c.nodes, name),
            Kind::Pod => object().is_some_and(|k| remove(&mut c.pods, &k)),
            Kind::Service => object().is_some_and(|k| remove(&mut c.services, &k)),
            Kind::EndpointSlice => object().is_some_and(|k| remove(&mut c.endpoints, &k)),
            Kind::EgressGateway => remove(&mut c.gateways, name),
            Kind::EgressPolicy | Kind::ClusterEgressPolicy => {
                let key = PolicyKey { namespace: namespace.clone(), name: name.clone() };
                self.waiting.remove(&key);
                self.standing.remove(&key);
                let told = remove(&mut c.policy_statuses, &key);
                remove(&mut c.policies, &key) || told
            }
            Kind::EgressNode => remove(&mut c.egress_nodes, name),
            Kind::ServiceCidr | Kind::IpPool => {
                self.inside.remove(&(kind, name.clone()));
                return self.gather_inside();
            }
        };
    }

    /// Puts together what is known to be inside.
    fn gather_inside(&mut self) {
        let mut inside = self.answer.clone().flatten().unwrap_or_default();
        for ((kind, name), networks) in &self.inside {
            let (all, from) = match kind {
                Kind::IpPool => (&mut inside.pods, format!("Calico's IPPool {name}")),
                _ => (&mut inside.services, format!("ServiceCIDR {name}")),
            };
            all.extend(networks.iter().map(|network| (*network, Name::from(from.as_str()))));
        }
        if *self.cluster.inside != inside {
            self.cluster.inside = inside.into();
            self.changed = true;
        }
    }

    /// Whether somebody has to be asked for the Services' networks: no object tells them.
    pub fn lacks_service_networks(&self) -> bool {
        let told = self.inside.keys().any(|(kind, _)| *kind == Kind::ServiceCidr);
        !self.tells_policies && self.listed.contains(&Kind::ServiceCidr) && !told && self.answer.is_none()
    }

    /// Whether Services are to be followed: a policy goes by them, or nobody knows their networks.
    pub fn needs_services(&self) -> bool {
        let told = self.inside.keys().any(|(kind, _)| *kind == Kind::ServiceCidr);
        if self.answer == Some(None) && !told {
            return true;
        }
        let by_service = |policy: &Arc<Policy>| matches!(policy.pods, PodMatch::Services(_));
        !self.waiting.is_empty() || self.cluster.policies.values().any(by_service)
    }

    /// Services are no longer followed: what is known of them is old from now on.
    pub fn forget_services(&mut self) {
        self.listed.remove(&Kind::Service);
        self.states.remove(&Kind::Service);
        self.changed |= !self.cluster.services.is_empty();
        self.cluster.services = Default::default();
    }

    /// Whether a kind has been listed to its end.
    pub fn has_listed(&self, kind: Kind) -> bool {
        self.listed.contains(&kind)
    }

    /// The kinds that have not been listed yet and are needed for a first snapshot.
    pub fn missing(&self) -> Vec<Kind> {
        let services = Some(Kind::Service).filter(|_| self.needs_services());
        let optional = Kind::OPTIONAL.into_iter().filter(|_| !self.tells_policies);
        Kind::ALWAYS.into_iter().chain(optional).chain(services).filter(|kind| !self.listed.contains(kind)).collect()
    }

    /// The snapshot, if it is another than the last one that was taken.
    pub fn news(&mut self) -> Option<Cluster> {
        std::mem::take(&mut self.changed).then(|| self.cluster.clone())
    }

    /// What is wrong now, a line each.
    pub fn problems(&self) -> Vec<String> {
        let faults = self.faults.iter().map(|((kind, key), fault)| {
            let used = match kind {
                Kind::EgressPolicy | Kind::ClusterEgressPolicy => {
                    used(&self.cluster, &self.waiting, &self.standing, &policy_key(key))
                }
                Kind::EgressGateway => {
                    self.cluster.gateways.get(&key.1).map_or(NOTHING, |gateway| gateway.while_invalid())
                }
                _ if self.is_known(*kind, key) => LAST_GOOD,
                _ => NOTHING,
            };
            let name = match key {
                (Some(namespace), name) => format!("{namespace}/{name}"),
                (None, name) => name.to_string(),
            };
            format!("{kind} {name}: {} ({used})", fault.text)
        });
        self.states.values().cloned().chain(faults).collect()
    }
}

/// What is used of an object that makes no sense.
const LAST_GOOD: &str = "its last good state is used until that is mended";
const NOTHING: &str = "it is not used until that is mended";
const ALLOCATION: &str = "its last good state is not known: until that is mended, whatever its pods send to the outside leaves by \
                    the egress IP that it has";

/// The same, of a policy.
fn used(
    cluster: &Cluster,
    waiting: &BTreeMap<PolicyKey, Arc<Policy>>,
    standing: &BTreeSet<PolicyKey>,
    key: &PolicyKey,
) -> &'static str {
    if standing.contains(key) {
        ALLOCATION
    } else if cluster.policies.contains_key(key) || waiting.contains_key(key) {
        LAST_GOOD
    } else {
        NOTHING
    }
}

fn policy_key((namespace, name): &Key) -> PolicyKey {
    PolicyKey { namespace: namespace.clone(), name: name.clone() }
}

/// Puts a value in place unless an equal one is there: a map that is looked at only is not copied.
fn put<K: Ord + Clone, V: PartialEq + Clone>(map: &mut Shared<BTreeMap<K, V>>, key: K, value: V) -> bool {
    let changed = map.get(&key) != Some(&value);
    if changed {
        map.insert(key, value);
    }
    changed
}

/// Removes a value if it is there, and else does not touch the map.
fn remove<K: Ord + Clone, V: Clone>(map: &mut Shared<BTreeMap<K, V>>, key: &K) -> bool {
    map.contains_key(key) && map.remove(key).is_some()
}

#[cfg(test)]
mod tests;
