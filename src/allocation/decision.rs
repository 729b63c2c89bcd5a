//! What becomes of a policy.

use crate::api::{AddressPair, AllocationKind};
use crate::model::selector::Name;
use std::fmt;

/// What became of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It has an allocation.
    Granted(Grant),
    /// It has none.
    Rejected(Rejection),
}

/// A policy's allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The gateway.
    pub gateway: Name,
    /// The allocation's id.
    pub id: u16,
    /// How its address came to be.
    pub kind: AllocationKind,
    /// Its address.
    pub address: AddressPair,
    /// The node that is to hold it.
    pub node: Option<Name>,
    /// The node that holds it until `node` does.
    pub leaving: Option<Name>,
    /// Who else leaves from the address, in words, if policies name it.
    pub shared_with: Option<String>,
    /// What a person should know besides.
    pub note: Option<String>,
}

/// Why a policy has no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// In one word, for programs.
    pub reason: Reason,
    /// In words, with what to do.
    pub message: String,
}

impl Rejection {
    pub(super) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Rejection { reason, message: message.into() }
    }
}

/// Why a policy has no allocation, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The gateway that it names does not exist.
    GatewayUnknown,
    /// The gateway makes no sense, and how it made sense last is not known.
    GatewayInvalid,
    /// It names no gateway, and no gateway is the default one.
    NoDefaultGateway,
    /// It names no gateway, and several say that they are the default one.
    SeveralDefaultGateways,
    /// The gateway is not for policies of its namespace.
    NamespaceNotAllowed,
    /// The address that it names is not in the gateway's pool.
    AddressOutsidePool,
    /// The address that it names is another allocation's.
    AddressTaken,
    /// The address that it names is a policy's of another namespace, and the gateway does not let them share it.
    AddressNotShared,
    /// The address that it names is reserved for other namespaces.
    AddressReserved,
    /// Its namespace would have more of the gateway than it may.
    QuotaExceeded,
    /// The address that it names is a node's own.
    AddressOfNode,
    /// The address that it names is one of the cluster's pods or Services.
    AddressInCluster,
    /// The gateway has no addresses to give.
    PoolEmpty,
    /// All the gateway's addresses of a family are in use.
    PoolExhausted,
    /// The gateway has no node whose address could be used.
    NoNode,
    /// All allocation ids of the cluster are in use.
    NoIdLeft,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
