//! The decision for a policy.

use crate::api::{AddressPair, AllocationKind};
use crate::model::ObjectKey;
use crate::model::selector::Name;
use crate::model::spread::{Choice, ChoiceState, Division, Near};
use crate::model::{AddressRequest, Client, Policy};
use std::fmt;

/// The decision for a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The policy has an allocation, or several.
    Granted(Grants),
    /// The policy has none.
    Rejected(Rejection),
    /// The policy asks for none: it has `action: Direct`.
    Direct,
}

/// The allocations of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grants {
    /// The first one.
    pub first: Grant,
    /// The others, in the order in which the policy asks for them.
    pub others: Vec<Grant>,
    /// How many the policy asks for.
    pub asked: usize,
    /// Why it has not all of them.
    pub missing: Option<Rejection>,
}

impl Grants {
    /// All allocations.
    pub fn iter(&self) -> impl Iterator<Item = &Grant> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// How many they are.
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Those that new connections of a pod can have, once nodes hold all of them. `near` tells how near a node is to the
    /// pod's.
    pub fn of_pod(&self, policy: &Policy, pod: Client<'_>, near: impl Fn(Option<&str>) -> Near) -> Vec<&Grant> {
        let choices = self.iter().map(|grant| {
            let state = ChoiceState { is_held: true, is_ready: true, near: near(grant.node.as_deref()) };
            match policy.address {
                AddressRequest::Explicit(_) => Choice::named(grant, grant.ordinal, &grant.address, state),
                _ => Choice::numbered(grant, grant.ordinal, state),
            }
        });
        Division::from(policy).all(&choices.collect::<Vec<_>>(), pod)
    }
}

/// An allocation of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The gateway of the allocation.
    pub gateway: Name,
    /// The egress ID.
    pub id: u16,
    /// Its position among the egress IPs that the policy asks for, from 0.
    pub ordinal: u16,
    /// How the address was chosen.
    pub kind: AllocationKind,
    /// The Service whose address it is, with [`AllocationKind::Service`].
    pub service: Option<ObjectKey>,
    /// The egress IP.
    pub address: AddressPair,
    /// The node that is to hold it.
    pub node: Option<Name>,
    /// In a planned move, the node that holds it until `node` does.
    pub leaving: Option<Name>,
    /// If the policy names the address: the names of the other policies that share it.
    pub shared_with: Option<String>,
    /// A remark for users.
    pub note: Option<String>,
}

/// The reason why a policy has no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// One word for programs.
    pub reason: Reason,
    /// A sentence for users, with the remedy.
    pub message: String,
}

impl Rejection {
    pub(super) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Rejection { reason, message: message.into() }
    }
}

/// The reason why a policy has no allocation, as one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The policy names a gateway that does not exist.
    GatewayUnknown,
    /// The spec of the gateway is invalid, and its last good state is not known.
    GatewayInvalid,
    /// The policy names no gateway, and there is no default gateway.
    NoDefaultGateway,
    /// The policy names no gateway, and several gateways are the default one.
    SeveralDefaultGateways,
    /// The gateway is not available to the namespace of the policy.
    NamespaceNotAllowed,
    /// The policy names a Service that does not exist.
    ServiceUnknown,
    /// The policy names a Service whose load balancer has given it no address.
    ServiceWithoutAddress,
    /// The policy names a Service and a gateway that places its addresses itself.
    GatewayNotExternal,
    /// The policy names an address, or a Service with one, that is not in the gateway's pool.
    AddressOutsidePool,
    /// The policy names an address that another allocation has.
    AddressTaken,
    /// The policy names an address that a policy of another namespace has, and the gateway does not share across
    /// namespaces.
    AddressNotShared,
    /// The policy names an address that is reserved for other namespaces.
    AddressReserved,
    /// The namespace would exceed its quota of the gateway.
    QuotaExceeded,
    /// The policy names the address of another namespace's Service.
    AddressOfService,
    /// The policy names a node's own address.
    AddressOfNode,
    /// The policy names an address in a network of the cluster's pods or Services.
    AddressInCluster,
    /// The gateway has no addresses to give out.
    PoolEmpty,
    /// The gateway has no free address of a family left.
    PoolExhausted,
    /// The gateway has no node whose own address could be used.
    NoNode,
    /// The cluster has no free egress ID left.
    NoIdLeft,
    /// Some node's daemon is too old to know the kind of allocation.
    NodesTooOld,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
