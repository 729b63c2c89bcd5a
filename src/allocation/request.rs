//! What policies ask for, and of which gateway.

use super::decision::{Reason, Rejection};
use super::family::addresses;
use super::quota;
use crate::api::{AddressPair, Allocate, Sharing};
use crate::model::precedence::labels_or_name;
use crate::model::selector::Name;
use crate::model::{AddressRequest, Cluster, Gateway, Namespaces, Policy, PolicyKey};
use std::collections::HashMap;

/// An allocation that policies ask for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// The gateway's place.
    pub(super) gateway: usize,
    pub(super) kind: Kind,
    /// The places of the policies that ask, by seniority.
    pub(super) policies: Vec<usize>,
    /// The place of the allocation, once there is one.
    pub(super) allocation: Option<usize>,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// These addresses, shared with all who name the same.
    Explicit(AddressPair),
    /// The gateway's shared allocation.
    Shared,
    /// An allocation for one policy.
    Dedicated,
    /// The allocation of any of the gateway's nodes, for one policy.
    Node,
}

impl Kind {
    fn of(policy: &Policy) -> Self {
        match &policy.address {
            AddressRequest::Explicit(pair) => Kind::Explicit(pair.clone()),
            AddressRequest::Allocate(Allocate::Dedicated) => Kind::Dedicated,
            AddressRequest::Allocate(Allocate::Shared) => Kind::Shared,
            AddressRequest::Allocate(Allocate::Node) => Kind::Node,
        }
    }
}

/// A policy and its name as the allocations write it.
#[derive(Clone, Debug)]
pub(super) struct Requester<'a> {
    pub(super) key: &'a PolicyKey,
    pub(super) policy: &'a Policy,
    pub(super) name: String,
}

/// All policies and what they ask for.
#[derive(Clone, Debug)]
pub(super) struct Requests<'a> {
    /// By seniority: the older first, where no time is given last, then by name. A policy's place is its place here.
    pub(super) requesters: Vec<Requester<'a>>,
    /// Places by key.
    pub(super) places: HashMap<&'a PolicyKey, usize>,
    /// In the order of the most senior policy of each.
    pub(super) all: Vec<Request>,
    /// By a policy's place: its request's place, or why it has none.
    pub(super) of: Vec<Result<usize, Rejection>>,
}

impl<'a> Requests<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        let mut requesters: Vec<Requester> =
            cluster.policies.iter().map(|(key, policy)| Requester { key, policy, name: key.to_string() }).collect();
        requesters.sort_by_key(|a| (a.policy.created, a.key));
        let places = requesters.iter().enumerate().map(|(place, a)| (a.key, place)).collect();

        let gateways = Gateways::new(cluster);
        let kinds: Vec<Kind> = requesters.iter().map(|requester| Kind::of(requester.policy)).collect();
        let allowed = requesters.iter().zip(&kinds).map(|(requester, kind)| {
            let gateway = gateways.gateway_of(cluster, requester)?;
            gateways.check_reservations(cluster, gateway, requester, kind)?;
            Ok(gateway)
        });
        let allowed: Vec<Result<usize, Rejection>> = allowed.collect();
        let asks = allowed.iter().zip(&kinds).map(|(gateway, kind)| {
            let (name, gateway) = gateways.all[*gateway.as_ref().ok()?];
            Some((name, gateway, kind))
        });
        let mut exceeded = quota::exceeded(cluster, &requesters, &asks.collect::<Vec<_>>());
        let mut all: Vec<Request> = Vec::new();
        let mut common: HashMap<(usize, Kind, Option<&Name>), usize> = HashMap::new();
        let mut of = Vec::new();
        for (place, (gateway, kind)) in allowed.into_iter().zip(kinds).enumerate() {
            let gateway = match (gateway, exceeded.remove(&place)) {
                (Ok(gateway), None) => gateway,
                (Err(rejection), _) | (_, Some(rejection)) => {
                    of.push(Err(rejection));
                    continue;
                }
            };
            let request = match kind {
                Kind::Explicit(_) => {
                    let sharers = match (gateways.all[gateway].1.sharing, &requesters[place].policy.namespaces) {
                        (Sharing::Namespace, Namespaces::One(namespace)) => Some(namespace),
                        _ => None,
                    };
                    *common.entry((gateway, kind.clone(), sharers)).or_insert(all.len())
                }
                Kind::Shared => *common.entry((gateway, kind.clone(), None)).or_insert(all.len()),
                Kind::Dedicated | Kind::Node => all.len(),
            };
            if request == all.len() {
                all.push(Request { gateway, kind, policies: Vec::new(), allocation: None });
            }
            all[request].policies.push(place);
            of.push(Ok(request));
        }
        Requests { requesters, places, all, of }
    }

    /// The names of policies, for a sentence: not more than three.
    pub(super) fn name_some(&self, policies: &[usize]) -> String {
        let names: Vec<&str> = policies.iter().take(3).map(|p| self.requesters[*p].name.as_str()).collect();
        match policies.len() - names.len() {
            0 => names.join(", "),
            more => format!("{} and {more} more", names.join(", ")),
        }
    }
}

/// The gateways by place and name.
struct Gateways<'a> {
    all: Vec<(&'a Name, &'a Gateway)>,
    by_name: HashMap<&'a str, usize>,
    defaults: Vec<usize>,
    /// Where several gateways are the default one: which of them a policy has an allocation of already.
    present: HashMap<&'a PolicyKey, usize>,
    /// The same, of gateways of which the allocations alone is known: whether they are the default one is not.
    kept: HashMap<&'a PolicyKey, usize>,
}

impl<'a> Gateways<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let all: Vec<_> = cluster.gateways.iter().map(|(name, gateway)| (name, &**gateway)).collect();
        let by_name = all.iter().enumerate().map(|(place, (name, _))| (&***name, place)).collect();
        let defaults: Vec<usize> = (0..all.len()).filter(|place| all[*place].1.default).collect();
        let of = |places: &[usize]| {
            let mut present = HashMap::new();
            for place in places {
                for policy in all[*place].1.status.allocations.iter().flat_map(|allocation| &allocation.policies) {
                    present.entry(policy).or_insert(*place);
                }
            }
            present
        };
        let present = if defaults.len() > 1 { of(&defaults) } else { HashMap::new() };
        let kept = of(&(0..all.len()).filter(|place| all[*place].1.frozen).collect::<Vec<_>>());
        Gateways { all, by_name, defaults, present, kept }
    }

    /// The gateway that a policy is to use, if it may.
    fn gateway_of(&self, cluster: &Cluster, requester: &Requester) -> Result<usize, Rejection> {
        let place = match (&requester.policy.gateway, self.defaults.as_slice()) {
            (Some(name), _) => *self.by_name.get(&**name).ok_or_else(|| {
                let message = match self.some_names() {
                    names if names.is_empty() => format!("there is no EgressGateway {name:?}; create it"),
                    names => format!("there is no EgressGateway {name:?}; create it, or name one of: {names}"),
                };
                Rejection::new(Reason::GatewayUnknown, message)
            })?,
            (None, _) if let Some(place) = self.kept.get(requester.key) => *place,
            (None, [one]) => *one,
            (None, []) => {
                let message = "the policy names no gateway, and none is the default one; \
                               set spec.gateway, or default: true on one EgressGateway";
                return Err(Rejection::new(Reason::NoDefaultGateway, message));
            }
            // A second default gateway is a mistake that must not take their addresses from those who have one.
            (None, several) => *self.present.get(requester.key).ok_or_else(|| {
                let names: Vec<&str> = several.iter().map(|place| &**self.all[*place].0).collect();
                let message = format!(
                    "the policy names no gateway, and several are the default one: {}; \
                     set spec.gateway, or leave default: true on one of them",
                    names.join(", ")
                );
                Rejection::new(Reason::SeveralDefaultGateways, message)
            })?,
        };
        let (name, gateway) = self.all[place];
        match &requester.policy.namespaces {
            Namespaces::One(ns) if !gateway.namespaces.matches(&labels_or_name(cluster.namespaces.get(ns), ns)) => {
                let message = format!(
                    "EgressGateway {name:?} is not for policies of namespace {ns:?}: its namespaceSelector does not \
                     match the namespace's labels; label the namespace, or name another gateway"
                );
                Err(Rejection::new(Reason::NamespaceNotAllowed, message))
            }
            // Who may make a ClusterEgressPolicy may use every gateway.
            _ => Ok(place),
        }
    }

    /// Whether the addresses that a policy names are reserved for others.
    fn check_reservations(
        &self,
        cluster: &Cluster,
        gateway: usize,
        requester: &Requester,
        kind: &Kind,
    ) -> Result<(), Rejection> {
        let (name, gateway) = self.all[gateway];
        let (Kind::Explicit(pair), Namespaces::One(namespace)) = (kind, &requester.policy.namespaces) else {
            return Ok(());
        };
        for address in addresses(pair) {
            let mut reserved = gateway.reservations.iter().filter(|reserved| reserved.contains(address)).peekable();
            let labels = labels_or_name(cluster.namespaces.get(namespace), namespace);
            if reserved.peek().is_some() && !reserved.any(|reserved| reserved.namespaces.matches(&labels)) {
                let message = format!(
                    "{address} of EgressGateway {name:?} is reserved for other namespaces than {namespace:?} \
                     (spec.reservations); name another address, or have the namespace labelled"
                );
                return Err(Rejection::new(Reason::AddressReserved, message));
            }
        }
        Ok(())
    }

    fn some_names(&self) -> String {
        let names: Vec<&str> = self.all.iter().take(5).map(|(name, _)| &***name).collect();
        names.join(", ")
    }
}
