//! The pair of veths in front of the tunnel device, for packets that pass no egress hook: all of them on kernels whose devices
//! have none (before Linux 5.16), and those that came by an ifb device on the others.
//!
//! Packets are routed into [`OUT_DEVICE`] instead of the tunnel device. They come out of its peer, [`HOP_DEVICE`],
//! whose ingress chain in the table `netdev egret` sets the next hop's MAC address and forwards them into the tunnel
//! device. A packet that this chain does not forward is dropped: by its policy, and without the chain by the kernel,
//! because the MAC address of the tunnel next hop is not the device's own (`PACKET_OTHERHOST`: `ip_rcv_core`,
//! `ip6_rcv_core`).

use crate::datapath::names::{
    DEVICE_GROUP, DEVICE4, HOP_DEVICE, NETWORK4, OUT_DEVICE, PROBER, TUNNEL_NEXT_HOP4, TUNNEL_NEXT_HOP6, of_mac,
};
use crate::datapath::route_socket::RouteSocket;
use crate::datapath::tunnel::{self, Tunnel};
use crate::datapath::veths::{self, Names};
use anyhow::{Context, Result};
use netlink_packet_route::link::{LinkAttribute, LinkFlags};

/// Begins the error if the kernel does not create the devices.
pub const REFUSED: &str = "veths before the tunnel device";

const PAIR: Names = Names { ends: [OUT_DEVICE, HOP_DEVICE], purpose: "tunnel" };

/// Creates or adjusts the pair, and returns the index of [`OUT_DEVICE`].
///
/// # Errors
/// Another interface has one of the names, the kernel lacks veth, or /proc/sys cannot be written.
pub async fn ensure(socket: &RouteSocket, tunnel: &Tunnel) -> Result<u32> {
    let [out, hop] = PAIR.ensure(socket).await.context(REFUSED)?;
    // Nothing is received there but by the chain of the table `netdev egret`.
    PAIR.set_ipv6(tunnel.ipv6)?;
    let what = |name| format!("set MTU and MAC address of the device {name}, and set it up");
    let of_hop = vec![LinkAttribute::Mtu(tunnel.mtu)];
    veths::adjust(socket, &hop, of_hop, LinkFlags::empty(), &what(HOP_DEVICE)).await?;
    let of_out = vec![
        LinkAttribute::Mtu(tunnel.mtu),
        LinkAttribute::Group(DEVICE_GROUP),
        // By the source address, the receiver recognises this node.
        LinkAttribute::Address(tunnel.mac.to_vec()),
    ];
    veths::adjust(socket, &out, of_out, LinkFlags::empty(), &what(OUT_DEVICE)).await?;
    let index = out.header.index;
    // A copy of a packet is sent to the tunnel next hop by address, and needs a route to it: without one, the kernel takes
    // the packet's own destination for the next hop (`nf_dup_ipv4`, `rt_set_nexthop`).
    tunnel::address(socket, index, DEVICE4.into(), NETWORK4).await?;
    tunnel::neighbour(socket, index, TUNNEL_NEXT_HOP4.into()).await?;
    if tunnel.ipv6 {
        tunnel::address(socket, index, of_mac(PROBER, tunnel.mac).into(), 64).await?;
        tunnel::neighbour(socket, index, TUNNEL_NEXT_HOP6.into()).await?;
    }
    Ok(index)
}

/// Removes the pair. Returns whether it existed. Interfaces of these names that are no veths are another program's and
/// stay.
///
/// # Errors
/// The kernel's refusal.
pub async fn remove(socket: &RouteSocket) -> Result<bool> {
    PAIR.remove(socket).await
}
