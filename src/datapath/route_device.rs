//! The device `egret-ip`, with the egress IPs that the node's own router announces (`announce: Route`).
//!
//! It is an end of a pair of veths, because every kernel on which pods run has veths, and not every one has dummies. A
//! router takes the addresses of interfaces that are up and have a carrier, so the other end is up, too. Nothing is
//! ever sent or received by the pair.

use crate::datapath::names::ROUTE_DEVICE;
use crate::datapath::route_socket::RouteSocket;
use crate::datapath::sysctl;
use crate::datapath::veths::{self, Names};
use anyhow::{Context, Result};
use netlink_packet_route::link::LinkFlags;

const PAIR: Names = Names { ends: ROUTE_DEVICE, purpose: "egress IPs that a router announces" };

/// Creates or adjusts the device, and returns its index.
///
/// # Errors
/// Another interface has one of the names, the kernel lacks veth, or /proc/sys cannot be written.
pub async fn ensure(socket: &RouteSocket) -> Result<u32> {
    let [device, end] = PAIR.ensure(socket).await.context("the device for egress IPs that a router announces")?;
    let [name, end_name] = ROUTE_DEVICE;
    let ipv6 = sysctl::ipv6()?;
    PAIR.set_ipv6(ipv6)?;
    if ipv6 {
        // No link-local address (`IN6_ADDR_GEN_MODE_NONE`): a router would look for neighbours there.
        sysctl::ensure(&format!("ipv6/conf/{name}/addr_gen_mode"), "1")?;
    }
    let what = |name| format!("set the device {name} up, without ARP");
    veths::adjust(socket, &end, Vec::new(), LinkFlags::Noarp, &what(end_name)).await?;
    veths::adjust(socket, &device, Vec::new(), LinkFlags::Noarp, &what(name)).await?;
    Ok(device.header.index)
}

/// Removes the device, and with it its addresses. Returns whether it existed. An interface of that name that is no veth
/// is another program's and stays.
///
/// # Errors
/// The kernel's refusal.
pub async fn remove(socket: &RouteSocket) -> Result<bool> {
    PAIR.remove(socket).await
}
