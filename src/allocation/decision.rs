//! The decision for a policy.

use crate::api::{AddressPair, AllocationKind};
use crate::model::ObjectKey;
use crate::model::selector::Name;
use std::fmt;

/// The decision for a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The policy has an allocation.
    Granted(Grant),
    /// The policy has none.
    Rejected(Rejection),
    /// The policy asks for none: it has `action: Direct`.
    Direct,
}

/// A policy's allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The gateway of the allocation.
    pub gateway: Name,
    /// The egress ID.
    pub id: u16,
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
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
