//! Egret's state in a node's kernel. Each module takes a desired state, reads the observed one, compares the two, and
//! sends the difference; a second run changes nothing. Nothing in this module knows of Kubernetes.

pub mod addresses;
pub mod announce;
pub mod changes;
pub mod echo;
pub mod fdb;
pub mod frames;
pub mod icmpv6_filter;
pub mod names;
pub mod neighbours;
pub mod netlink_reader;
pub mod node_messages;
pub mod obstacles;
pub mod packet_address;
pub mod packet_headers;
pub mod pod_veth;
pub mod port_log;
pub mod probe;
pub mod probe_packet;
pub mod route_socket;
pub mod routes;
pub mod rules;
pub mod ruleset;
pub mod socket_filter;
pub mod sysctl;
pub mod trace_table;
pub mod tunnel;
pub mod underlay;
pub mod uplink;
pub mod uplink_probe;
pub mod veth_pair;
pub mod watch;
