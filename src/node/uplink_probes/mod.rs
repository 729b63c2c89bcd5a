//! Probes of targets beyond the uplinks (`spec.probes` of an EgressGateway), which tell whether an uplink leads
//! anywhere.
//!
//! A task of its own sends the probes. While they fail, it asks the gateway's other nodes through the tunnel whether
//! theirs succeed: an uplink counts as lost only then. Neither the API server nor an older report has a part in it.

mod judge;
mod message;
mod metrics;
mod task;

pub use judge::{ProbeSettings, ProbeState};
pub use metrics::ProbeMetrics;
pub use task::watch;

use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::model::uplink_probes::ProbeTarget;
use egret_nft::mac::Mac;
use std::collections::BTreeMap;
use std::net::Ipv6Addr;

/// The probes of one gateway of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probing {
    /// How often.
    pub settings: ProbeSettings,
    /// The targets of the family.
    pub targets: Vec<ProbeTarget>,
    /// The mark of the packets, which selects the gateway's own route; 0: the main table.
    pub mark: u32,
    /// The interface by which they leave, if it is in a VRF.
    pub device: Option<Name>,
    /// The gateway's other nodes, by tunnel MAC address, with the addresses to which messages for them are sent.
    pub peers: BTreeMap<Mac, Ipv6Addr>,
}

/// All probes of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The tunnel device's index. It changes when the device is created again.
    pub device: u32,
    /// The source address of messages; `None` if the tunnel carries no IPv6. Then no uplink is found lost.
    pub source: Option<Ipv6Addr>,
    /// The probes by gateway, interface and family.
    pub probes: BTreeMap<UplinkKey, Probing>,
}

/// What the probes of one gateway of one family say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The state.
    pub state: ProbeState,
    /// A sentence about it if the probes do not succeed.
    pub message: String,
}

/// The findings of all probes.
pub type Findings = BTreeMap<UplinkKey, Finding>;
