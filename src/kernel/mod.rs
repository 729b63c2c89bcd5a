//! The kernel's parts that Egret uses. Each module has a desired state, reads back what is there, compares, and
//! sends the difference; running it again changes nothing. Nothing here knows of Kubernetes.

pub use crate::plan::mac;

pub mod addresses;
pub mod announce;
pub mod check;
pub mod conntrack;
pub mod datapath;
pub mod echo;
pub mod fdb;
mod frames;
mod icmpv6_filter;
pub mod links;
pub mod names;
pub mod neighbours;
pub mod netlink;
pub mod nft;
pub mod node_messages;
mod packet_address;
pub mod port_log;
pub mod quarantine;
pub mod route_socket;
pub mod routes;
pub mod rules;
mod socket_filter;
pub mod sysctl;
pub mod tunnel;
pub mod uplink;
pub mod watch;
