//! What nodes say of themselves, as it is held.

use crate::api::{BlockedAllocation, EgressNodeStatus, LostUplink, RefusedAllocation, TakenAllocation};
use crate::model::mac::{self, Mac};
use crate::model::marks::EgressId;
use crate::model::uplink_key::UplinkKey;
use std::net::IpAddr;

/// What a node's daemon says of itself to the others, [`EgressNodeStatus`], as it is held: there are thousands, and all but
/// the gateways' nodes say no more than where their end of the tunnel is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressNode {
    /// Where tunnel packets are sent.
    pub tunnel_address: Option<IpAddr>,
    /// The MAC address of its end of the tunnel; `None` also if what stands there is none.
    pub tunnel_mac: Option<Mac>,
    /// Whether it answers to those who ask whether it lives.
    pub answers: bool,
    of_allocations: Option<Box<OfAllocations>>,
}

impl OfAllocations {
    /// What it says of an uplink that it has lost.
    pub fn loss(&self, key: &UplinkKey) -> Option<&LostUplink> {
        let is_it =
            |lost: &&LostUplink| lost.family == key.family() && lost.interface.as_deref() == key.interface.as_deref();
        self.lost.iter().find(is_it)
    }
}

/// What a node says of allocations, and of others that may have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OfAllocations {
    /// Those that it holds.
    pub held: Vec<EgressId>,
    /// Those that it has taken over.
    pub taken: Vec<TakenAllocation>,
    /// Those that it should hold and cannot.
    pub refused: Vec<RefusedAllocation>,
    /// Gateways' nodes that do not answer it; this one itself, while it cannot hold any allocation.
    pub unreachable_peers: Vec<String>,
    /// What it has lost of its uplinks.
    pub lost: Vec<LostUplink>,
    /// Those that pods of its use and that lead nowhere from it now.
    pub blocked: Vec<BlockedAllocation>,
}

impl EgressNode {
    /// What it says of allocations.
    pub fn of_allocations(&self) -> &OfAllocations {
        static NOTHING: OfAllocations = OfAllocations {
            held: Vec::new(),
            taken: Vec::new(),
            refused: Vec::new(),
            unreachable_peers: Vec::new(),
            lost: Vec::new(),
            blocked: Vec::new(),
        };
        self.of_allocations.as_deref().unwrap_or(&NOTHING)
    }

    /// The same, for tests to change.
    #[cfg(test)]
    pub(crate) fn of_allocations_mut(&mut self) -> &mut OfAllocations {
        self.of_allocations.get_or_insert_default()
    }
}

impl From<EgressNodeStatus> for EgressNode {
    fn from(said: EgressNodeStatus) -> Self {
        let EgressNodeStatus {
            tunnel_address,
            tunnel_mac,
            answers,
            allocations,
            taken,
            refused,
            unreachable_peers,
            lost,
            blocked,
            direct: _,
            faults: _,
        } = said;
        let of_allocations = OfAllocations { held: allocations, taken, refused, unreachable_peers, lost, blocked };
        EgressNode {
            tunnel_address,
            tunnel_mac: tunnel_mac.as_deref().and_then(|text| mac::parse(text).ok()),
            answers,
            of_allocations: (of_allocations != OfAllocations::default()).then(|| Box::new(of_allocations)),
        }
    }
}
