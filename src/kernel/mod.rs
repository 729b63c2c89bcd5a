//! Kernel interfaces that any program could use: netlink, nf_tables, connection tracking, raw frames. Nothing in this
//! module knows of Egret.

pub mod conntrack;
pub mod fdb;
pub mod frames;
pub mod icmpv6_filter;
pub mod netlink;
pub mod nft;
pub mod packet_address;
pub mod route_socket;
pub mod socket_filter;
