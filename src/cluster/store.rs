//! The store of both sources: all objects of the cluster, the refused ones, and their substitutes.
//!
//! A source says which objects were added, have changed, were deleted or cannot be read. A refused object keeps its
//! last good state. A policy or a gateway without one gets a substitute, made of the allocations and of its readable
//! parts: what cannot be read keeps what it covered, and affects nothing else.

mod maps;

use super::decode::Decoded;
use super::decode::validate::{object_key, policy_key};
use super::kind::Kind;
use super::object::{Key, Object};
use super::opt_in;
use super::refused::{Readable, ReadableGateway, Refused};
use crate::api::{Allocation, EgressGatewayStatus, Placement};
use crate::model::fallback_policy::from_allocations;
use crate::model::opt_in::gateway_of as opt_in_gateway;
use crate::model::selector::Name;
use crate::model::shared::Shared;
use crate::model::{AddressRequest, Cluster, Gateway, Inside, PodMatch, Policy, PolicyKey, Unreadable};
use ipnetwork::IpNetwork;
use maps::{put, put_shared, remove};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The objects of the cluster, updated change by change.
#[derive(Debug, Default)]
pub struct Store {
    cluster: Cluster,
    /// Whether the reader is a controller, which reports refused policies and gateways in their statuses.
    is_controller: bool,
    /// Refused objects. The last good state of one is in `cluster`, or in `waiting`.
    refused: BTreeMap<(Kind, Key), Refused>,
    /// The policies in `cluster` that are fallback policies.
    fallbacks: BTreeSet<PolicyKey>,
    /// Policies that need Services, while these are not known: they would select no pod, or have no address.
    waiting: Option<BTreeMap<PolicyKey, Arc<Policy>>>,
    /// Networks inside the cluster, by the objects that list them.
    networks: BTreeMap<(Kind, Name), Box<[IpNetwork]>>,
    /// Networks of Services that no object lists.
    other_networks: Inside,
    /// Statuses of gateways from files of their own, also of gateways that do not exist.
    statuses: BTreeMap<Name, Shared<EgressGatewayStatus>>,
    /// Fallback policies and reports of refused policies are not up to date.
    unsettled: bool,
    /// The policies of gateways that may be asked for are not up to date.
    opt_in_is_old: bool,
    /// The cluster has changed since the last snapshot.
    changed: bool,
}

impl Store {
    /// An empty store. Without `has_services`, policies that need Services wait for [`Store::services_are_known`].
    pub fn new(is_controller: bool, has_services: bool) -> Self {
        let waiting = (!has_services).then(BTreeMap::new);
        Store { is_controller, waiting, ..Store::default() }
    }

    /// Takes an object that was added or has changed.
    pub fn apply(&mut self, kind: Kind, decoded: Decoded) {
        let Decoded { key, object, policy_status, .. } = decoded;
        let is_policy = matches!(kind, Kind::EgressPolicy | Kind::ClusterEgressPolicy);
        let is_valid = object.is_ok();
        let key_of_policy = policy_key(&key);
        match object {
            Ok(Some(object)) => {
                self.heal(kind, &key);
                self.put(object);
            }
            // It was needed, and no longer is.
            Ok(None) => return self.delete(kind, &key),
            Err(refused) => self.refuse(kind, key, *refused),
        }
        match policy_status {
            Some(status) if is_policy => self.put(Object::PolicyStatus(key_of_policy, status)),
            None if is_policy && is_valid => {
                self.changed |= remove(&mut self.cluster.policy_statuses, &key_of_policy);
            }
            _ => {}
        }
    }

    /// Stores a valid object. If it is refused as it stands now, this is its last good state.
    pub fn put(&mut self, object: Object) {
        let c = &mut self.cluster;
        let of_gateway = matches!(object, Object::Gateway(..) | Object::GatewayStatus(..));
        self.opt_in_is_old |= of_gateway;
        self.unsettled |= of_gateway || matches!(object, Object::Policy(..));
        self.changed |= match object {
            Object::Namespace(name, labels) => put(&mut c.namespaces, name, *labels, |a, b| a == b),
            Object::Node(name, node) => put_shared(&mut c.nodes, name, node),
            Object::Pod(key, pod) => put_shared(&mut c.pods, key, pod),
            Object::Service(key, service) => put_shared(&mut c.services, key, service),
            Object::Endpoints(key, endpoints) | Object::EndpointSlice(key, endpoints) => {
                put_shared(&mut c.endpoints, key, endpoints)
            }
            Object::Announcement(by, key, said) => put_shared(&mut c.announcements, (by, key), said),
            Object::EgressNode(name, status) => put_shared(&mut c.egress_nodes, name, status),
            Object::PolicyStatus(key, status) => put_shared(&mut c.policy_statuses, key, status),
            Object::Gateway(name, mut gateway) => {
                if let Some(status) = self.statuses.get(&name).filter(|status| !gateway.status.is(status)) {
                    Arc::make_mut(&mut gateway).status = status.clone();
                }
                if let Some(refused) = self.refused.get(&(Kind::EgressGateway, (None, name.clone()))) {
                    let gateway = Arc::make_mut(&mut gateway);
                    (gateway.generation, gateway.fault) = (refused.generation, Some(refused.text.as_str().into()));
                }
                put_shared(&mut c.gateways, name, gateway)
            }
            Object::GatewayStatus(name, status) => {
                let gateway = c.gateways.get(&name).filter(|gateway| gateway.status != status).cloned();
                self.statuses.insert(name.clone(), status.clone());
                match gateway {
                    Some(mut gateway) => {
                        Arc::make_mut(&mut gateway).status = status;
                        put_shared(&mut c.gateways, name, gateway)
                    }
                    None => false,
                }
            }
            Object::Networks(kind, name, networks) => {
                self.networks.insert((kind, name), networks);
                return self.gather_networks();
            }
            Object::Policy(key, policy) => {
                self.fallbacks.remove(&key);
                if let Some(waiting) = &mut self.waiting {
                    waiting.remove(&key);
                    if needs_services(&policy, self.is_controller) {
                        waiting.insert(key, policy);
                        return;
                    }
                }
                put_shared(&mut c.policies, key, policy)
            }
        };
    }

    /// Notes that an object cannot be read as it stands now. Its last good state stays.
    pub fn refuse(&mut self, kind: Kind, key: Key, refused: Refused) {
        if let Readable::Gateway(readable) = &refused.readable {
            self.keep_gateway(&key.1, readable, &refused);
        }
        self.opt_in_is_old |= kind == Kind::EgressGateway;
        self.refused.insert((kind, key), refused);
        self.unsettled = true;
    }

    /// Updates the status of a gateway whose spec is refused. The rest has its last good state, or is frozen if there
    /// is none.
    fn keep_gateway(&mut self, name: &Name, readable: &ReadableGateway, refused: &Refused) {
        let status = readable.status.as_ref().or(self.statuses.get(name)).cloned().unwrap_or_default();
        let known = self.cluster.gateways.get(name).filter(|gateway| !gateway.frozen);
        let known = known.map(|gateway| Gateway::clone(gateway)).or_else(|| readable.frozen(&status));
        let Some(gateway) = known else { return };
        let version = readable.version.clone();
        let fault = Some(refused.text.as_str().into());
        let gateway = Gateway { version, status, generation: refused.generation, fault, ..gateway };
        self.changed |= put_shared(&mut self.cluster.gateways, name.clone(), Arc::new(gateway));
    }

    /// Notes that an object can be read again, or is gone.
    fn heal(&mut self, kind: Kind, key: &Key) {
        // Most of the time nothing is refused, and no key is copied.
        if !self.refused.is_empty() {
            let was_refused = self.refused.remove(&(kind, key.clone())).is_some();
            self.unsettled |= was_refused;
            self.opt_in_is_old |= was_refused && kind == Kind::EgressGateway;
        }
    }

    /// Removes an object that was deleted.
    pub fn delete(&mut self, kind: Kind, key: &Key) {
        self.heal(kind, key);
        self.unsettled |= kind == Kind::EgressGateway;
        self.opt_in_is_old |= kind == Kind::EgressGateway;
        let (c, name) = (&mut self.cluster, &key.1);
        self.changed |= match kind {
            Kind::Namespace => remove(&mut c.namespaces, name),
            Kind::Node => remove(&mut c.nodes, name),
            Kind::Pod => remove(&mut c.pods, &object_key(key)),
            Kind::Service => remove(&mut c.services, &object_key(key)),
            Kind::Endpoints | Kind::EndpointSlice => remove(&mut c.endpoints, &object_key(key)),
            Kind::EgressGateway => remove(&mut c.gateways, name),
            Kind::EgressPolicy | Kind::ClusterEgressPolicy => {
                let key = policy_key(key);
                self.waiting.iter_mut().for_each(|waiting| drop(waiting.remove(&key)));
                self.fallbacks.remove(&key);
                let had_status = remove(&mut c.policy_statuses, &key);
                remove(&mut c.policies, &key) || had_status
            }
            Kind::EgressNode => remove(&mut c.egress_nodes, name),
            Kind::ServiceL2Status | Kind::Lease => {
                kind.announcer().is_some_and(|by| remove(&mut c.announcements, &(by, object_key(key))))
            }
            Kind::ServiceCidr | Kind::IpPool | Kind::CiliumNode => {
                self.networks.remove(&(kind, name.clone()));
                return self.gather_networks();
            }
        };
    }

    /// Removes all objects of a kind, refused ones too, except those that are still there.
    pub fn retain(&mut self, kind: Kind, is_there: impl Fn(&Key) -> bool) {
        let gone: Vec<Key> = self.keys(kind).filter(|key| !is_there(key)).collect();
        for key in gone {
            self.delete(kind, &key);
        }
    }

    /// Notes that objects can be read again, except those that are still refused.
    pub fn retain_refused(&mut self, is_refused: impl Fn(&(Kind, Key)) -> bool) {
        self.refused.retain(|key, _| is_refused(key));
        (self.unsettled, self.opt_in_is_old) = (true, true);
    }

    /// Removes the statuses that are in files of their own, except those of `is_there`.
    pub fn retain_statuses(&mut self, gateway: impl Fn(&Name) -> bool, policy: impl Fn(&PolicyKey) -> bool) {
        let is_gone = |key: &&PolicyKey| opt_in_gateway(key).is_none() && !policy(key);
        let gone = self.cluster.policy_statuses.keys().filter(is_gone).cloned();
        for key in gone.collect::<Vec<_>>() {
            self.changed |= remove(&mut self.cluster.policy_statuses, &key);
        }
        let gone = self.statuses.keys().filter(|name| !gateway(name)).cloned();
        for name in gone.collect::<Vec<_>>() {
            self.put(Object::GatewayStatus(name.clone(), Shared::default()));
            self.statuses.remove(&name);
        }
    }

    /// The keys of a kind, refused objects among them. Those that have a last good state come twice.
    fn keys(&self, kind: Kind) -> impl Iterator<Item = Key> {
        let refused = self.refused.keys().filter(move |(k, _)| *k == kind).map(|(_, key)| key.clone());
        self.known(kind).chain(refused)
    }

    /// The keys of the objects of a kind, in their current or last good state.
    fn known(&self, kind: Kind) -> Box<dyn Iterator<Item = Key> + '_> {
        let c = &self.cluster;
        let plain = |name: &Name| (None, name.clone());
        let namespaced = |namespace: &Name, name: &Name| (Some(namespace.clone()), name.clone());
        let policies = move |cluster: bool| {
            let all = c.policies.keys().chain(self.waiting.iter().flat_map(BTreeMap::keys));
            // The source knows nothing of those that gateways stand for.
            let all = all.filter(|key| opt_in_gateway(key).is_none());
            all.filter(move |k| k.namespace.is_none() == cluster).map(|k| (k.namespace.clone(), k.name.clone()))
        };
        match kind {
            Kind::Namespace => Box::new(c.namespaces.keys().map(plain)),
            Kind::Node => Box::new(c.nodes.keys().map(plain)),
            Kind::Pod => Box::new(c.pods.keys().map(move |k| namespaced(&k.namespace, &k.name))),
            Kind::Service => Box::new(c.services.keys().map(move |k| namespaced(&k.namespace, &k.name))),
            Kind::Endpoints | Kind::EndpointSlice => {
                Box::new(c.endpoints.keys().map(move |k| namespaced(&k.namespace, &k.name)))
            }
            Kind::EgressGateway => Box::new(c.gateways.keys().map(plain)),
            Kind::EgressPolicy => Box::new(policies(false)),
            Kind::ClusterEgressPolicy => Box::new(policies(true)),
            Kind::EgressNode => Box::new(c.egress_nodes.keys().map(plain)),
            Kind::ServiceL2Status | Kind::Lease => {
                let of_kind = c.announcements.keys().filter(move |(by, _)| Some(*by) == kind.announcer());
                Box::new(of_kind.map(move |(_, k)| namespaced(&k.namespace, &k.name)))
            }
            Kind::ServiceCidr | Kind::IpPool | Kind::CiliumNode => {
                Box::new(self.networks.keys().filter(move |(k, _)| *k == kind).map(|(_, name)| (None, name.clone())))
            }
        }
    }

    /// The number of objects of a kind and of refused ones. An object that is refused and has a last good state counts
    /// twice.
    pub fn count(&self, kind: Kind) -> usize {
        self.keys(kind).count()
    }

    /// The policies that have a fallback policy.
    pub fn fallbacks(&self) -> impl Iterator<Item = &PolicyKey> {
        self.fallbacks.iter()
    }

    /// Frees unused capacity: a B-tree that grew entry by entry has a third of its space empty, one that was built at
    /// once has none.
    pub fn compact(&mut self) {
        fn rebuild<K: Ord + Clone, V: Clone>(map: &mut Shared<BTreeMap<K, V>>) {
            *map = std::mem::take(&mut **map).into_iter().collect();
        }
        let c = &mut self.cluster;
        rebuild(&mut c.nodes);
        rebuild(&mut c.namespaces);
        rebuild(&mut c.pods);
        rebuild(&mut c.services);
        rebuild(&mut c.policies);
        rebuild(&mut c.egress_nodes);
        rebuild(&mut c.policy_statuses);
    }

    /// The Services are known: policies that need them need not wait any longer.
    pub fn services_are_known(&mut self) {
        for (key, policy) in self.waiting.take().into_iter().flatten() {
            self.changed |= put_shared(&mut self.cluster.policies, key, policy);
        }
    }

    /// The Services are no longer followed, and what is known of them becomes outdated.
    pub fn forget_services(&mut self) {
        self.waiting.get_or_insert_default();
        self.changed |= !self.cluster.services.is_empty();
        self.cluster.services = Shared::default();
    }

    /// Whether Services decide what a policy selects, or which egress IP it has or may not have.
    pub fn needs_services(&self) -> bool {
        let external = |gateway: &Arc<Gateway>| gateway.placement == Placement::External;
        self.is_controller && self.cluster.gateways.values().any(external)
            || self.waiting.as_ref().is_some_and(|waiting| !waiting.is_empty())
            || self.cluster.policies.values().any(|policy| needs_services(policy, self.is_controller))
    }

    /// Whether a policy has the address of a Service.
    pub fn has_addresses_of_services(&self) -> bool {
        let waiting = self.waiting.iter().flat_map(BTreeMap::values);
        waiting.chain(self.cluster.policies.values()).any(|policy| has_address_of_service(policy))
    }

    /// Sets the networks that no object lists.
    pub fn set_other_networks(&mut self, networks: Inside) {
        self.other_networks = networks;
        self.gather_networks();
    }

    /// Whether an object of a kind lists networks.
    pub fn has_networks(&self, of: Kind) -> bool {
        self.networks.keys().any(|(kind, _)| *kind == of)
    }

    /// Joins all networks inside the cluster.
    fn gather_networks(&mut self) {
        let mut inside = self.other_networks.clone();
        for ((kind, name), networks) in &self.networks {
            let (all, from) = match kind {
                Kind::IpPool => (&mut inside.pods, format!("Calico's IPPool {name}")),
                Kind::CiliumNode => (&mut inside.pods, format!("CiliumNode {name}")),
                _ => (&mut inside.services, format!("ServiceCIDR {name}")),
            };
            all.extend(networks.iter().map(|network| (*network, Name::from(from.as_str()))));
        }
        if *self.cluster.inside != inside {
            self.cluster.inside = inside.into();
            self.changed = true;
        }
    }

    /// The statuses of gateways that do not exist.
    fn orphaned_statuses(&self) -> impl Iterator<Item = (&Name, &Shared<EgressGatewayStatus>)> {
        self.statuses.iter().filter(|(name, _)| !self.cluster.gateways.contains_key(*name))
    }

    /// The policies that allocations list, each with its gateway and allocations.
    fn allocated(&self) -> BTreeMap<&PolicyKey, (&Name, Vec<&Allocation>)> {
        let gateways = self.cluster.gateways.iter().map(|(name, gateway)| (name, &gateway.status));
        let mut found: BTreeMap<&PolicyKey, (&Name, Vec<&Allocation>)> = BTreeMap::new();
        for (name, status) in gateways.chain(self.orphaned_statuses()) {
            for allocation in &status.allocations {
                for key in &allocation.policies {
                    let (gateway, allocations) = found.entry(key).or_insert((name, Vec::new()));
                    if *gateway == name {
                        allocations.push(allocation);
                    }
                }
            }
        }
        found
    }

    /// The policies that allocations list and that nothing else names, though they were in force.
    pub fn allocated_only(&self) -> BTreeSet<PolicyKey> {
        let named = |key: &PolicyKey| {
            let refused = (Kind::of_policy(key), (key.namespace.clone(), key.name.clone()));
            // Gateways' own policies are no objects that could be lost.
            opt_in_gateway(key).is_some()
                || self.cluster.policies.contains_key(key)
                || self.refused.contains_key(&refused)
        };
        self.allocated().into_keys().filter(|key| !named(key)).cloned().collect()
    }

    /// Brings the fallback policies and the reports of refused policies up to date.
    fn settle(&mut self) {
        let is_settled = self.refused.is_empty() && self.fallbacks.is_empty() && self.cluster.unreadable.is_empty();
        if !std::mem::take(&mut self.unsettled) || is_settled {
            return;
        }
        let fallbacks = self.fallback_policies();
        let c = &mut self.cluster;
        for key in std::mem::take(&mut self.fallbacks).iter().filter(|key| !fallbacks.contains_key(key)) {
            self.changed |= remove(&mut c.policies, key);
        }
        for (key, policy) in fallbacks {
            self.changed |= put_shared(&mut c.policies, key.clone(), policy);
            self.fallbacks.insert(key);
        }
        let mut unreadable = BTreeMap::new();
        for ((kind, key), refused) in self.refused.iter().filter(|_| self.is_controller) {
            if matches!(kind, Kind::EgressPolicy | Kind::ClusterEgressPolicy) {
                let message = format!("{}; {}", refused.text, self.in_use(*kind, key));
                unreadable.insert(policy_key(key), Arc::new(Unreadable { message, generation: refused.generation }));
            }
        }
        if *self.cluster.unreadable != unreadable {
            self.cluster.unreadable = unreadable.into();
            self.changed = true;
        }
    }

    /// A fallback policy for each refused policy that is in force and has no last good state.
    fn fallback_policies(&self) -> BTreeMap<PolicyKey, Arc<Policy>> {
        let has_none = |key: &PolicyKey| self.fallbacks.contains(key) || !self.is_known(key);
        let policies = self.refused.iter().map(|((_, key), refused)| (policy_key(key), &refused.readable));
        let policies = policies.filter(|(_, readable)| !matches!(readable, Readable::Nothing | Readable::Gateway(_)));
        let lost: Vec<_> = policies.filter(|(key, _)| has_none(key)).collect();
        let allocated = if lost.is_empty() { BTreeMap::new() } else { self.allocated() };
        let fallback = |(key, readable): (PolicyKey, &Readable)| {
            let (gateway, allocations) = allocated.get(&key)?;
            let policy = match readable {
                Readable::WholePolicy(policy) => policy.clone(),
                Readable::Policy(readable) => Arc::new(from_allocations(&key, gateway, allocations, readable)?),
                Readable::Nothing | Readable::Gateway(_) => return None,
            };
            Some((key, policy))
        };
        lost.into_iter().filter_map(fallback).collect()
    }

    fn is_known(&self, policy: &PolicyKey) -> bool {
        let waits = self.waiting.as_ref().is_some_and(|waiting| waiting.contains_key(policy));
        waits || self.cluster.policies.contains_key(policy)
    }

    /// The snapshot, if it has changed since the last one.
    pub fn news(&mut self) -> Option<Cluster> {
        self.settle();
        if std::mem::take(&mut self.opt_in_is_old) {
            let refused = self.refused.iter().filter_map(|((_, key), refused)| match &refused.readable {
                Readable::Gateway(gateway) => Some((&key.1, gateway.opt_in.as_ref()?)),
                _ => None,
            });
            self.changed |= opt_in::update(&mut self.cluster, refused);
        }
        std::mem::take(&mut self.changed).then(|| self.cluster.clone())
    }

    /// The refused objects, one line each.
    pub fn problems(&mut self) -> impl Iterator<Item = String> {
        self.settle();
        let this = &*self;
        this.refused.iter().map(|((kind, key), refused)| {
            let name = policy_key(key);
            format!("{kind} {name}: {} ({})", refused.text, this.in_use(*kind, key))
        })
    }

    /// A text that says what is used of a refused object.
    fn in_use(&self, kind: Kind, key: &Key) -> &'static str {
        match kind {
            Kind::EgressPolicy | Kind::ClusterEgressPolicy => match policy_key(key) {
                key if self.fallbacks.contains(&key) => FALLBACK,
                key if self.is_known(&key) => LAST_GOOD,
                _ => NOTHING,
            },
            Kind::EgressGateway => self.cluster.gateways.get(&key.1).map_or(NOTHING, |g| g.while_invalid()),
            _ if self.known(kind).any(|known| known == *key) => LAST_GOOD,
            _ => NOTHING,
        }
    }
}

/// Whether Services decide what the policy selects, or which egress IP it has. The latter concerns controllers only.
fn needs_services(policy: &Policy, is_controller: bool) -> bool {
    matches!(policy.pods, PodMatch::Services(_)) || is_controller && has_address_of_service(policy)
}

fn has_address_of_service(policy: &Policy) -> bool {
    matches!(policy.address, AddressRequest::Service(_))
}

const LAST_GOOD: &str = "its last good state is used until it is corrected";
const NOTHING: &str = "it is not used until it is corrected";
const FALLBACK: &str = "its last good state is not known: until it is corrected, all traffic of its pods to destinations \
                        outside the cluster leaves by the egress IP that it has";
