//! What nodes say of themselves, as it is held.

use crate::api::{BlockedPath, EgressNodeStatus, LostUplink, RefusedPath, TakenPath};
use crate::model::mac::{self, Mac};
use crate::model::marks::PathId;
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
    of_paths: Option<Box<OfPaths>>,
}

impl OfPaths {
    /// What it says of an uplink that it has lost.
    pub fn loss(&self, key: &UplinkKey) -> Option<&LostUplink> {
        let is_it =
            |lost: &&LostUplink| lost.family == key.family() && lost.interface.as_deref() == key.interface.as_deref();
        self.lost.iter().find(is_it)
    }
}

/// What a node says of paths, and of others that may have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OfPaths {
    /// Those that it holds.
    pub held: Vec<PathId>,
    /// Those that it has taken over.
    pub taken: Vec<TakenPath>,
    /// Those that it should hold and cannot.
    pub refused: Vec<RefusedPath>,
    /// Gateways' nodes that do not answer it; this one itself, while it cannot hold any path.
    pub silent: Vec<String>,
    /// What it has lost of its uplinks.
    pub lost: Vec<LostUplink>,
    /// Those that pods of its use and that lead nowhere from it now.
    pub blocked: Vec<BlockedPath>,
}

impl EgressNode {
    /// What it says of paths.
    pub fn of_paths(&self) -> &OfPaths {
        static NOTHING: OfPaths = OfPaths {
            held: Vec::new(),
            taken: Vec::new(),
            refused: Vec::new(),
            silent: Vec::new(),
            lost: Vec::new(),
            blocked: Vec::new(),
        };
        self.of_paths.as_deref().unwrap_or(&NOTHING)
    }

    /// The same, for tests to change.
    #[cfg(test)]
    pub(crate) fn of_paths_mut(&mut self) -> &mut OfPaths {
        self.of_paths.get_or_insert_default()
    }
}

impl From<EgressNodeStatus> for EgressNode {
    fn from(said: EgressNodeStatus) -> Self {
        let EgressNodeStatus {
            tunnel_address,
            tunnel_mac,
            answers,
            paths,
            taken,
            refused,
            silent,
            lost,
            blocked,
            direct: _,
            faults: _,
        } = said;
        let of_paths = OfPaths { held: paths, taken, refused, silent, lost, blocked };
        EgressNode {
            tunnel_address,
            tunnel_mac: tunnel_mac.as_deref().and_then(|text| mac::parse(text).ok()),
            answers,
            of_paths: (of_paths != OfPaths::default()).then(|| Box::new(of_paths)),
        }
    }
}
