//! One allocation as a node sees it.

use super::Facts;
use crate::api::{AddressPair, Placement};
use crate::model::bandwidth::Bandwidth;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::spread::{ChoiceState, Near};
use crate::model::uplink_key::UplinkKey;
use crate::model::uplink_probes::ProbedFamilies;
use egret_nft::mac::Mac;
use std::net::IpAddr;

/// One allocation, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAllocation {
    /// The gateway of the allocation.
    pub gateway: Name,
    /// The egress IP.
    pub address: AddressPair,
    /// The Service whose address it is, `namespace/name`.
    pub service: Option<Name>,
    /// Where its packets go from this node.
    pub state: AllocationState,
    /// What this node may do with its packets.
    pub role: Role,
    /// Whether Egret or something else places the address.
    pub placement: Placement,
    /// Whether this node answers echo requests to the address while it holds it.
    pub answers_ping: bool,
    /// Whether the gateway lets packets of long connections take the fast path.
    pub fast_path: bool,
    /// In a planned move to this node: the tunnel MAC of the node that holds the egress IP until then.
    pub handed_by: Option<Mac>,
    /// In a planned move away from this node, which holds it still: the tunnel MAC of the next owner.
    pub handed_to: Option<Mac>,
    /// If its policy has several dedicated ones: its position among them, from 0.
    pub ordinal: u16,
    /// Whether the owner reports that it holds the address.
    pub owner_holds: bool,
    /// Whether some node reports that it holds the address. A dead node cannot withdraw its report.
    pub is_held: bool,
    /// How near the owner is to this node.
    pub near: Near,
    /// What this node does with the address.
    pub placing: Placing,
    /// Whether the allocation names this node, or this node has taken the egress IP over.
    pub assignment: Assignment,
    /// The `since` of the allocation.
    pub since: i64,
    /// Whether this node must not use the address before the assign hook has brought it here.
    pub unassigned: bool,
    /// Whether this node's own router announces the address while it is here, and nobody answers ARP for it.
    pub routed: bool,
    /// The interface for the address, where the gateway names one, or `DEFAULT_ROUTE`.
    pub interface: Option<Name>,
    /// The families that the gateway probes.
    pub probed: ProbedFamilies,
    /// The DSCP of its packets, 0 to 63; on nodes that may become the owner.
    pub dscp: Option<u8>,
    /// How much it may send and receive; on nodes that may become the owner.
    pub bandwidth: Bandwidth,
    /// The uplink that its traffic leaves by, see [`NodeAllocations::uplinks`](super::NodeAllocations::uplinks). 0 is the
    /// main table.
    pub uplink: u16,
}

/// What a node may do with the packets of an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It only sends them to the owner.
    Source,
    /// It may become the owner, but cannot translate them now: another host has the address, for instance.
    Member,
    /// It may become the owner, and translates them. It does so before it becomes the owner and while it takes over,
    /// so that only the address is missing.
    Translator,
}

/// What an allocation says about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// It names the node.
    Here,
    /// It names another node, or none.
    Elsewhere,
    /// It names another node, which is or was dead, and this node owns the egress IP.
    TakenOver,
}

impl NodeAllocation {
    /// Its state as one of several egress IPs among which a pod has one.
    pub fn choice(&self) -> ChoiceState {
        let is_ready = !matches!(self.state, AllocationState::Unready(_));
        ChoiceState { is_held: self.is_held, is_ready, near: self.near }
    }

    /// Whether this node may become the owner.
    pub fn is_member(&self) -> bool {
        self.role != Role::Source
    }

    /// Whether Egret places the address.
    pub fn is_managed(&self) -> bool {
        self.placement == Placement::Managed
    }

    /// Whether this node translates packets of this egress IP.
    pub fn translates(&self) -> bool {
        self.role == Role::Translator
    }

    /// Whether this node treats its packets otherwise than by translating them.
    pub fn is_treated(&self) -> bool {
        self.dscp.is_some() || self.bandwidth != Bandwidth::default()
    }

    /// Whether the allocation names this node.
    pub fn is_assigned_here(&self) -> bool {
        self.assignment == Assignment::Here
    }

    /// The uplinks that its addresses need. None if Egret does not place them.
    pub fn needs(&self) -> impl Iterator<Item = UplinkKey> + use<> {
        let needs = UplinkKey::with_probes(&self.address, self.interface.as_ref(), &self.gateway, self.probed);
        needs.take(if self.is_managed() { usize::MAX } else { 0 })
    }

    /// Whether this node has the addresses: all of them, or those of a family that it has not lost.
    pub fn is_here(&self, id: EgressId, facts: &Facts) -> bool {
        is_here(&self.address, id, facts)
    }
}

/// Whether this node has the addresses of an allocation.
pub(super) fn is_here(address: &AddressPair, id: EgressId, facts: &Facts) -> bool {
    let here = |a: IpAddr| facts.addresses.contains(&a);
    let mut all = address.ipv4.map(IpAddr::V4).into_iter().chain(address.ipv6.map(IpAddr::V6));
    if facts.partial.contains(&id) { all.any(here) } else { all.all(here) }
}

/// What a node does with the address of an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Nothing: it neither adds nor removes the address.
    Never,
    /// It puts the address onto the uplink, after it has checked that no other host on the link has it.
    Take,
    /// It puts the address onto the uplink without this check, in a planned move: the old node answers until this one
    /// has it.
    TakeHanded,
    /// Another node becomes the holder. If the address is here, it stays until that node has it.
    Keep,
    /// It removes the address: another node has it.
    Leave,
}

/// Where packets of an allocation go from this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllocationState {
    /// Through the tunnel, to the node with this MAC address.
    Remote(Mac),
    /// Out of this node.
    Local,
    /// They are dropped, with the reason.
    Unready(Name),
}
