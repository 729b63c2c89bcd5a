//! What Egret has in a node's kernel. Each module has a desired state, reads back what is there, compares, and sends the
//! difference; running it again changes nothing. Nothing here knows of Kubernetes.

pub mod addresses;
pub mod announce;
pub mod echo;
pub mod names;
pub mod neighbours;
pub mod node_messages;
pub mod pod_veth;
pub mod port_log;
pub mod quarantine;
pub mod routes;
pub mod rules;
pub mod ruleset;
pub mod sysctl;
pub mod tunnel;
pub mod uplink;
pub mod watch;
