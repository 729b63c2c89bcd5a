//! The kernel's interfaces, as any program could use them: netlink, nf_tables, connection tracking, frames. Nothing here
//! knows of Egret.

pub mod conntrack;
pub mod fdb;
pub mod frames;
pub mod icmpv6_filter;
pub mod netlink;
pub mod nft;
pub mod packet_address;
pub mod route_socket;
pub mod socket_filter;
