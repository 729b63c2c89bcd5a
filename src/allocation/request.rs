//! The requests of policies, and the gateway that each one uses.

use super::address_pair::addresses;
use super::decision::{Reason, Rejection};
use super::index::{AllocationIndex, GatewayIndex, List, PolicyIndex, RequestIndex};
use super::{quota, services};
use crate::api::{AddressPair, Allocate, Allocation, AllocationKind, Placement, Sharing};
use crate::model::precedence::labels_or_name;
use crate::model::selector::Name;
use crate::model::{AddressRequest, Cluster, DEFAULT_GATEWAY, Gateway, Namespaces, ObjectKey, Policy, PolicyKey};
use smallvec::{SmallVec, smallvec};
use std::collections::HashMap;

/// A request for an allocation, by one or more policies.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// The index of the gateway.
    pub(super) gateway: GatewayIndex,
    pub(super) kind: Kind,
    /// The indices of the requesting policies, by seniority.
    pub(super) policies: Vec<PolicyIndex>,
    /// The index of the allocation, once granted.
    pub(super) allocation: Option<AllocationIndex>,
}

/// The kind of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// These addresses, shared by all policies that name them.
    Explicit(AddressPair),
    /// These addresses of a Service, shared by all policies that name it.
    Service(ObjectKey, AddressPair),
    /// The shared allocation of the gateway.
    Shared,
    /// An allocation for one policy while the pool has addresses, and then one that others have, too.
    Pooled,
    /// An allocation for one policy, which may ask for several: its position among them, from 0.
    Dedicated(u16),
    /// The own address of any node of the gateway, for one policy.
    Node,
}

impl Kind {
    /// The kind of the allocation that is asked for.
    pub(super) fn allocation(&self) -> AllocationKind {
        match self {
            Kind::Explicit(_) => AllocationKind::Explicit,
            Kind::Service(..) => AllocationKind::Service,
            Kind::Shared => AllocationKind::Shared,
            Kind::Pooled => AllocationKind::Pooled,
            Kind::Dedicated(_) => AllocationKind::Dedicated,
            Kind::Node => AllocationKind::Node,
        }
    }

    /// The addresses that the policy names, itself or by a Service.
    pub(super) fn named(&self) -> Option<&AddressPair> {
        match self {
            Kind::Explicit(pair) | Kind::Service(_, pair) => Some(pair),
            Kind::Shared | Kind::Pooled | Kind::Dedicated(_) | Kind::Node => None,
        }
    }

    /// Whether it is the gateway's default address, which all policies may share.
    pub(super) fn is_default_of(&self, gateway: &Gateway) -> bool {
        matches!(self, Kind::Explicit(pair) if *pair == gateway.default_address)
    }

    /// The Service that the policy names.
    pub(super) fn service(&self) -> Option<&ObjectKey> {
        match self {
            Kind::Service(service, _) => Some(service),
            _ => None,
        }
    }

    /// What a policy asks for, one for each of its egress IPs; none with `action: Direct`. A Service's
    /// addresses are still to be found, and so is the gateway's default address.
    fn of(policy: &Policy) -> SmallVec<[Self; 1]> {
        match &policy.address {
            AddressRequest::Explicit(pairs) => pairs.iter().map(|pair| Kind::Explicit(pair.clone())).collect(),
            AddressRequest::Service(service) => smallvec![Kind::Service(service.clone(), AddressPair::default())],
            AddressRequest::Unspecified => smallvec![Kind::Dedicated(0)],
            AddressRequest::Allocate(Allocate::Dedicated, count) => (0..*count).map(Kind::Dedicated).collect(),
            AddressRequest::Allocate(Allocate::Shared, _) => smallvec![Kind::Shared],
            AddressRequest::Allocate(Allocate::Pooled, _) => smallvec![Kind::Pooled],
            AddressRequest::Allocate(Allocate::Node, _) => smallvec![Kind::Node],
            AddressRequest::Direct => SmallVec::new(),
        }
    }
}

/// A policy, its key, and its key as text.
#[derive(Clone, Debug)]
pub(super) struct Requester<'a> {
    pub(super) key: &'a PolicyKey,
    pub(super) policy: &'a Policy,
    pub(super) name: String,
}

/// All policies and their requests.
#[derive(Clone, Debug)]
pub(super) struct Requests<'a> {
    /// All policies by seniority: older ones first, those without a time last, then by name. The index of a policy is
    /// its index here.
    pub(super) requesters: List<PolicyIndex, Requester<'a>>,
    /// The index of each, by its key.
    pub(super) by_key: HashMap<&'a PolicyKey, PolicyIndex>,
    /// All requests, in the order of the most senior policy of each.
    pub(super) all: List<RequestIndex, Request>,
    /// By the index of the policy: the indices of its requests, or its rejection; none: it asks for nothing.
    pub(super) of: List<PolicyIndex, Result<SmallVec<[RequestIndex; 1]>, Rejection>>,
}

impl<'a> Requests<'a> {
    pub(super) fn new(cluster: &'a Cluster) -> Self {
        let mut requesters: Vec<Requester> =
            cluster.policies.iter().map(|(key, policy)| Requester { key, policy, name: key.to_string() }).collect();
        requesters.sort_by_key(|a| (a.policy.created, a.key));
        let requesters: List<PolicyIndex, Requester> = requesters.into_iter().collect();
        let by_key = requesters.indexed().map(|(index, a)| (a.key, index)).collect();

        let gateways = Gateways::new(cluster);
        let mut kinds = requesters.map(|requester| Kind::of(requester.policy));
        let allowed = requesters.iter().zip(kinds.iter_mut()).map(|(requester, kinds)| {
            kinds.first()?;
            let gateway = gateways.gateway_of(cluster, requester).and_then(|gateway| {
                for kind in kinds.iter_mut() {
                    if requester.policy.address == AddressRequest::Unspecified
                        && let Some(default) = default_address(gateways.all[gateway].1, requester.key)
                    {
                        *kind = Kind::Explicit(default.clone());
                    }
                    if let Kind::Service(service, pair) = kind {
                        *pair = services::egress_ip(cluster, gateways.all[gateway], service)?;
                    }
                    gateways.check_reservations(cluster, gateway, requester, kind)?;
                }
                Ok(gateway)
            });
            Some(gateway)
        });
        let allowed: Vec<Option<Result<GatewayIndex, Rejection>>> = allowed.collect();
        let asks = allowed.iter().zip(kinds.iter()).map(|(gateway, kinds)| {
            let (name, gateway) = gateways.all[*gateway.as_ref()?.as_ref().ok()?];
            Some((name, gateway, kinds.as_slice()))
        });
        let mut exceeded = quota::exceeded(cluster, &requesters, &asks.collect());
        let mut all: List<RequestIndex, Request> = List::new();
        let mut common: HashMap<(GatewayIndex, Kind, Option<&Name>), RequestIndex> = HashMap::new();
        let mut of = List::new();
        for (gateway, (index, kinds)) in allowed.into_iter().zip(kinds.into_indexed()) {
            let gateway = match (gateway, exceeded.remove(&index)) {
                (Some(Ok(gateway)), None) => gateway,
                (Some(Err(rejection)), _) | (_, Some(rejection)) => {
                    of.push(Err(rejection));
                    continue;
                }
                (None, None) => {
                    of.push(Ok(SmallVec::new()));
                    continue;
                }
            };
            let request = |kind: Kind| {
                let request = match kind {
                    Kind::Explicit(_) | Kind::Service(..) => {
                        let of = gateways.all[gateway].1;
                        let sharers = match (of.sharing, &requesters[index].policy.namespaces) {
                            _ if kind.is_default_of(of) => None,
                            // The default address of a gateway that cannot be read.
                            _ if requesters[index].policy.address == AddressRequest::Unspecified => None,
                            (Sharing::Namespace, Namespaces::One(namespace)) => Some(namespace),
                            _ => None,
                        };
                        *common.entry((gateway, kind.clone(), sharers)).or_insert(all.end())
                    }
                    Kind::Shared => *common.entry((gateway, kind.clone(), None)).or_insert(all.end()),
                    Kind::Dedicated(_) | Kind::Pooled | Kind::Node => all.end(),
                };
                if request == all.end() {
                    all.push(Request { gateway, kind, policies: Vec::new(), allocation: None });
                }
                all[request].policies.push(index);
                request
            };
            of.push(Ok(kinds.into_iter().map(request).collect()));
        }
        Requests { requesters, by_key, all, of }
    }

    /// Names at most three policies, as text for users.
    pub(super) fn name_some(&self, policies: &[PolicyIndex]) -> String {
        let names: Vec<&str> = policies.iter().take(3).map(|p| self.requesters[*p].name.as_str()).collect();
        match policies.len() - names.len() {
            0 => names.join(", "),
            more => format!("{} and {more} more", names.join(", ")),
        }
    }
}

/// The egress IP that a policy has that names none; `None`: one of its own. The default address of a gateway that cannot
/// be read is the one that its policies have.
fn default_address<'g>(gateway: &'g Gateway, policy: &PolicyKey) -> Option<&'g AddressPair> {
    if !gateway.default_address.is_empty() || !gateway.frozen {
        return Some(&gateway.default_address).filter(|pair| !pair.is_empty());
    }
    let mut explicit = gateway.status.allocations.iter().filter(|a| a.kind == AllocationKind::Explicit);
    explicit.find(|allocation| allocation.policies.contains(policy)).map(|allocation| &allocation.address)
}

/// The gateway that the policy's namespace has for policies that name none.
fn default_of_namespace(cluster: &Cluster, requester: &Requester) -> Option<Name> {
    let Namespaces::One(namespace) = &requester.policy.namespaces else { return None };
    cluster.namespaces.get(namespace)?.get(DEFAULT_GATEWAY).filter(|name| !name.is_empty()).cloned()
}

/// All gateways, by index and by name.
struct Gateways<'a> {
    all: List<GatewayIndex, (&'a Name, &'a Gateway)>,
    by_name: HashMap<&'a str, GatewayIndex>,
    defaults: Vec<GatewayIndex>,
    /// If several gateways are the default one: the one of which a policy already has an allocation.
    present: HashMap<&'a PolicyKey, GatewayIndex>,
    /// The gateway of which a policy already has a Service's address.
    of_services: HashMap<&'a PolicyKey, GatewayIndex>,
    /// The same for frozen gateways, of which it is unknown whether they are the default one.
    kept: HashMap<&'a PolicyKey, GatewayIndex>,
}

impl<'a> Gateways<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let all: List<GatewayIndex, _> = cluster.gateways.iter().map(|(name, gateway)| (name, &**gateway)).collect();
        let by_name = all.indexed().map(|(index, (name, _))| (&***name, index)).collect();
        let those = |which: fn(&Gateway) -> bool| -> Vec<GatewayIndex> {
            all.indices().filter(|index| which(all[*index].1)).collect()
        };
        let defaults = those(|gateway| gateway.default);
        let of = |indices: &[GatewayIndex], which: fn(&Allocation) -> bool| {
            let mut present = HashMap::new();
            for index in indices {
                let allocations = all[*index].1.status.allocations.iter().filter(|allocation| which(allocation));
                for policy in allocations.flat_map(|allocation| &allocation.policies) {
                    present.entry(policy).or_insert(*index);
                }
            }
            present
        };
        let present = if defaults.len() > 1 { of(&defaults, |_| true) } else { HashMap::new() };
        let external = those(|gateway| gateway.placement == Placement::External);
        let of_services = of(&external, |allocation| allocation.service.is_some());
        let kept = of(&those(|gateway| gateway.frozen), |_| true);
        Gateways { all, by_name, defaults, present, of_services, kept }
    }

    /// The gateway that a policy uses.
    ///
    /// # Errors
    /// There is none, or the policy may not use it.
    fn gateway_of(&self, cluster: &Cluster, requester: &Requester) -> Result<GatewayIndex, Rejection> {
        let index = match (&requester.policy.gateway, self.defaults.as_slice()) {
            (Some(name), _) => *self.by_name.get(&**name).ok_or_else(|| {
                let message = match self.some_names() {
                    names if names.is_empty() => format!("there is no EgressGateway {name:?}; create it"),
                    names => format!("there is no EgressGateway {name:?}; create it, or name one of: {names}"),
                };
                Rejection::new(Reason::GatewayUnknown, message)
            })?,
            (None, _) if let Some(index) = self.kept.get(requester.key) => *index,
            (None, _) if let AddressRequest::Service(service) = &requester.policy.address => {
                let addresses = services::addresses(cluster, service)?;
                let can_have = |index: &GatewayIndex| services::can_have(self.all[*index].1, addresses);
                let present = self.of_services.get(requester.key).copied().filter(can_have);
                let found = present.or_else(|| self.all.indices().find(can_have));
                found.ok_or_else(|| services::no_gateway(service, addresses))?
            }
            (None, _) if let Some(name) = default_of_namespace(cluster, requester) => {
                *self.by_name.get(&*name).ok_or_else(|| {
                    let message = format!(
                        "the policy names no gateway, and the gateway of its namespace ({DEFAULT_GATEWAY}), {name:?}, does \
                         not exist; set spec.gateway, or have the namespace's corrected"
                    );
                    Rejection::new(Reason::GatewayUnknown, message)
                })?
            }
            (None, [one]) => *one,
            (None, []) => {
                let message = "the policy names no gateway, and none is the default one; \
                               set spec.gateway, or default: true on one EgressGateway";
                return Err(Rejection::new(Reason::NoDefaultGateway, message));
            }
            // A second default gateway is a mistake. It must not take the egress IPs of policies that have one.
            (None, several) => *self.present.get(requester.key).ok_or_else(|| {
                let names: Vec<&str> = several.iter().map(|index| &**self.all[*index].0).collect();
                let message = format!(
                    "the policy names no gateway, and several are the default one: {}; \
                     set spec.gateway, or leave default: true on one of them",
                    names.join(", ")
                );
                Rejection::new(Reason::SeveralDefaultGateways, message)
            })?,
        };
        let (name, gateway) = self.all[index];
        match &requester.policy.namespaces {
            Namespaces::One(ns) if !gateway.namespaces.matches(&labels_or_name(cluster.namespaces.get(ns), ns)) => {
                let message = format!(
                    "EgressGateway {name:?} is not available to policies of namespace {ns:?}: its namespaceSelector \
                     does not match the namespace's labels; label the namespace, or name another gateway"
                );
                Err(Rejection::new(Reason::NamespaceNotAllowed, message))
            }
            // A user who may create ClusterEgressPolicies may use every gateway.
            _ => Ok(index),
        }
    }

    /// Refuses a policy that names an address that is reserved for other namespaces.
    fn check_reservations(
        &self,
        cluster: &Cluster,
        gateway: GatewayIndex,
        requester: &Requester,
        kind: &Kind,
    ) -> Result<(), Rejection> {
        let (name, gateway) = self.all[gateway];
        let (Some(pair), Namespaces::One(namespace)) = (kind.named(), &requester.policy.namespaces) else {
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
