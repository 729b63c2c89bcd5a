//! The node daemon: it watches the cluster, compiles the plan, keeps the kernel in sync with it, and responds to the
//! plugin.
//!
//! One task owns the state and handles one event after another, so there are no locks and no partial states. Plugins'
//! requests precede changes of the cluster, and requests that arrive together are programmed in one transaction.

mod adopted_files;
mod adoption;
mod assign;
mod changed_ports;
mod ended;
mod events;
mod existing;
mod fast_path;
mod flow_log;
mod forwarding;
mod holders;
mod holding;
mod host;
pub mod liveness;
mod metrics;
mod moved;
pub mod node_state;
mod pod_marks;
mod pods;
mod policy_delay;
mod report;
mod run;
mod socket;
mod source_ports;
mod state;
mod taint;
pub mod trace;
mod uplink_probes;

pub use run::run;

use crate::cluster::SourceName;
use crate::model::marks::Marks;
use crate::telemetry::server;
pub use assign::HookUrl;
pub use flow_log::LogTarget;
pub use host::TunnelEgress;
use ipnetwork::IpNetwork;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The daemon's settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's name in the cluster.
    pub name: String,
    /// The source of cluster state.
    pub cluster: SourceName,
    /// The directory of the socket and the attachments.
    pub run_dir: PathBuf,
    /// The directory of the offline policy snapshot, which outlives a reboot.
    pub state_dir: PathBuf,
    /// The address to which other nodes send tunnel packets; `None`: the node's first InternalIP.
    pub tunnel_address: Option<IpAddr>,
    /// The family of the tunnel's outer packets; `None`: the family that the cluster's nodes have.
    pub tunnel_family: Option<egret_nft::Family>,
    /// Destinations that no policy covers, besides the cluster's own.
    pub direct: Vec<IpNetwork>,
    /// Settings of the liveness probes.
    pub liveness: liveness::LivenessSettings,
    /// Egret's bits in marks.
    pub marks: Marks,
    /// Whether the daemon owns the nftables tables, on kernels that support it, so that no other program can change
    /// them.
    pub own_tables: bool,
    /// How packets enter the tunnel.
    pub tunnel_egress: TunnelEgress,
    /// How long packets of an established connection may go the fast way before one of them takes the kernel's own way
    /// again; `None`: all of them take it.
    pub fast_path_lease: Option<Duration>,
    /// What brings an egress IP to this node before the node uses it; `None`: nothing has to.
    pub assign_hook: Option<HookUrl>,
    /// Where connections of egress IPs are recorded; `None`: nowhere.
    pub flow_log: Option<LogTarget>,
    /// Addresses of the servers for metrics and health.
    pub addresses: server::Addresses,
    /// The runtime's directory of network configurations and that of plugins, if the daemon is to keep them as `egretd
    /// install` left them.
    pub cni_dirs: Option<(PathBuf, Option<PathBuf>)>,
}
