//! Policies that are made of Services' annotations for kube-vip (`--kube-vip-annotations`).
//!
//! A Service with `kube-vip.io/egress: "true"` gets an EgressPolicy of its name, which the Service owns. What the
//! controller has made bears the annotation [`MADE_FROM`](crate::model::MADE_FROM). It changes and removes nothing else.

use crate::api::EgressPolicySpec;
use crate::cluster::Statuses;
use crate::model::notice::Notice;
use crate::model::{AskedEgress, Cluster, Metadata, Namespaces, ObjectKey, Policy, PolicyKey, kube_vip};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long a write counts that the source has not shown yet.
const PATIENCE: Duration = Duration::from_secs(10);
/// So many policies are written or removed in one pass: whatever Services ask for, statuses do not wait longer.
const AT_ONCE: usize = 64;

/// What is to be done about one policy.
#[derive(Debug, PartialEq)]
enum Change<'a> {
    /// Write it, for the Service of this name.
    Write(&'a AskedEgress, Box<EgressPolicySpec>),
    /// Remove it: no Service asks for it.
    Remove,
    /// The Service's annotations cannot become a policy, and why.
    Refuse(&'a AskedEgress, String),
}

/// What the controller remembers of the policies that it makes.
#[derive(Debug, Default)]
pub(super) struct MadePolicies {
    /// Writes and removals (`None`) that the source may not have shown yet.
    written: BTreeMap<PolicyKey, (Option<EgressPolicySpec>, Instant)>,
    /// Policies whose last write or removal failed, and when.
    failed: BTreeMap<PolicyKey, Instant>,
    /// The Services that cannot have a policy, and why.
    refused: BTreeMap<PolicyKey, String>,
}

impl MadePolicies {
    /// Writes and removes policies. What was written is seen in a later snapshot. Returns the time until something that
    /// has just been written, or could not be, is looked at again. One Service's failure is not the controller's: it is
    /// logged, and tried again then.
    pub(super) async fn update(&mut self, cluster: &Cluster, statuses: &Statuses) -> Option<Duration> {
        let now = Instant::now();
        self.written.retain(|_, (_, at)| now < *at + PATIENCE);
        self.failed.retain(|_, at| now < *at + PATIENCE);
        let (mut refused, mut due, mut count) = (BTreeMap::new(), None, 0);
        for (key, change) in changes(cluster) {
            let wanted = match &change {
                Change::Refuse(asked, why) => {
                    if self.refused.get(&key) != Some(why) {
                        warn!(service = %key, "made no policy of the Service's annotations: {why}");
                        statuses.service(&service_of(&key), &asked.uid, Notice::warning("NoEgressPolicy", why.clone()));
                    }
                    refused.insert(key, why.clone());
                    continue;
                }
                Change::Write(_, spec) => Some(&**spec),
                Change::Remove => None,
            };
            let written = self.written.get(&key).filter(|(written, _)| written.as_ref() == wanted).map(|(_, at)| *at);
            let left = match written.or_else(|| self.failed.get(&key).copied()) {
                Some(at) => (at + PATIENCE).saturating_duration_since(now),
                None if count == AT_ONCE => Duration::ZERO,
                None => {
                    count += 1;
                    self.make(key, change, statuses).await;
                    PATIENCE
                }
            };
            due = [due, Some(left)].into_iter().flatten().min();
        }
        self.refused = refused;
        due
    }

    async fn make(&mut self, key: PolicyKey, change: Change<'_>, statuses: &Statuses) {
        let (wanted, done) = match change {
            Change::Write(asked, spec) => {
                let done = statuses.write_made_policy(&key, &asked.uid, &spec).await;
                (Some(*spec), done)
            }
            _ => (None, statuses.remove_made_policy(&key).await),
        };
        match done {
            Ok(()) => {
                let what = if wanted.is_some() { "wrote" } else { "removed" };
                info!(policy = %key, "{what} the policy of the Service's annotations for kube-vip");
                self.written.insert(key, (wanted, Instant::now()));
            }
            Err(e) => {
                warn!(policy = %key, "cannot write the policy of the Service's annotations; retrying: {e:#}");
                self.failed.insert(key, Instant::now());
            }
        }
    }
}

fn service_of(key: &PolicyKey) -> ObjectKey {
    ObjectKey { namespace: key.namespace.clone().unwrap_or_default(), name: key.name.clone() }
}

/// What is to be done, by policy.
fn changes(cluster: &Cluster) -> BTreeMap<PolicyKey, Change<'_>> {
    let mut changes = BTreeMap::new();
    for (service, known) in &cluster.services {
        let Some(asked) = known.load_balancer.as_ref().and_then(|known| known.egress.as_deref()) else { continue };
        let key = PolicyKey { namespace: Some(service.namespace.clone()), name: service.name.clone() };
        let present = cluster.policies.get(&key);
        let spec = match kube_vip::policy(&service.name, &asked.annotations) {
            Ok(spec) => spec,
            Err(fault) => {
                changes.insert(key, Change::Refuse(asked, fault.to_string()));
                continue;
            }
        };
        if present.is_some_and(|policy| !policy.is_made()) || cluster.unreadable.contains_key(&key) {
            let why = "the namespace has an EgressPolicy of the Service's name that was not made of its annotations; \
                       delete or rename that one, or remove kube-vip.io/egress from the Service";
            changes.insert(key, Change::Refuse(asked, why.to_owned()));
            continue;
        }
        let wanted = match Policy::namespaced(&service.namespace, &spec, Metadata::default()) {
            Ok(wanted) => wanted,
            Err(fault) => {
                changes.insert(key, Change::Refuse(asked, fault.to_string()));
                continue;
            }
        };
        if !present.is_some_and(|policy| policy.says_the_same(&wanted)) {
            changes.insert(key, Change::Write(asked, spec.into()));
        }
    }
    for (key, policy) in &cluster.policies {
        let Namespaces::One(_) = policy.namespaces else { continue };
        let asks = |service: &ObjectKey| {
            let known = cluster.services.get(service).and_then(|service| service.load_balancer.as_ref());
            known.is_some_and(|known| known.egress.is_some())
        };
        if policy.is_made() && !asks(&service_of(key)) {
            changes.insert(key.clone(), Change::Remove);
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, naming};
    use std::sync::Arc;

    fn asked(world: &mut World, service: &str, annotations: &[(&str, &str)]) {
        world.service(service, &["192.0.2.200"], None);
        let key = ObjectKey::parse(service).unwrap();
        let all = annotations.iter().map(|(key, value)| (format!("kube-vip.io/{key}"), (*value).to_owned()));
        let asked = AskedEgress { annotations: all.collect(), uid: "u".into() };
        let service = Arc::make_mut(world.cluster.services.get_mut(&key).unwrap());
        service.load_balancer.as_mut().unwrap().egress = Some(Box::new(asked));
    }

    /// Stores what is to be written, as the source would show it.
    fn store(world: &mut World) -> Vec<String> {
        let all: Vec<_> = changes(&world.cluster)
            .into_iter()
            .map(|(key, change)| match change {
                Change::Write(_, spec) => (key, Some(*spec)),
                _ => (key, None),
            })
            .collect();
        for (key, spec) in &all {
            match spec {
                Some(spec) => {
                    let meta = Metadata { made: true, generation: Some(1), created: Some(7), ..Metadata::default() };
                    let namespace = key.namespace.as_deref().unwrap();
                    let policy = Policy::namespaced(namespace, spec, meta).unwrap();
                    world.cluster.policies.insert(key.clone(), Arc::new(policy));
                }
                None => drop(world.cluster.policies.remove(key)),
            }
        }
        all.iter().map(|(key, spec)| format!("{key} {}", spec.is_some())).collect()
    }

    #[test]
    fn a_service_that_asks_for_egress_has_a_policy_as_long_as_it_asks() {
        let mut world = World::default();
        asked(&mut world, "shop/web", &[("egress", "true")]);
        world.service("shop/other", &["192.0.2.201"], None);
        assert_eq!(store(&mut world), ["shop/web true"]);
        assert!(changes(&world.cluster).is_empty(), "the source shows it");
        asked(&mut world, "shop/web", &[("egress", "true"), ("egress-destination-ports", "udp:5060")]);
        assert_eq!(store(&mut world), ["shop/web true"], "the annotations have changed");
        assert!(changes(&world.cluster).is_empty());
        world.service("shop/web", &["192.0.2.200"], None);
        assert_eq!(store(&mut world), ["shop/web false"]);
        assert!(changes(&world.cluster).is_empty() && world.cluster.policies.is_empty());
    }

    #[test]
    fn a_policy_of_somebody_else_is_not_touched() {
        let mut world = World::default();
        world.policy("shop/web", naming(&["192.0.2.50"]));
        asked(&mut world, "shop/web", &[("egress", "true")]);
        let found = changes(&world.cluster);
        assert!(matches!(&found[&"shop/web".into()], Change::Refuse(_, why) if why.contains("delete or rename")));
        asked(&mut world, "shop/web", &[("egress", "true"), ("egress-allowed-networks", "here")]);
        let found = changes(&world.cluster);
        assert!(matches!(&found[&"shop/web".into()], Change::Refuse(_, why) if why.contains("\"here\"")));
    }
}
