//! The pair of veths in front of the tunnel device, on kernels whose devices have no egress hook (before Linux 5.16).
//!
//! There, packets are routed into [`OUT_DEVICE`] instead of the tunnel device. They come out of its peer, [`HOP_DEVICE`],
//! whose ingress chain in the table `netdev egret` sets the next hop's MAC address and forwards them into the tunnel
//! device. A packet that this chain does not forward is dropped: by its policy, and without the chain by the kernel,
//! because the MAC address of the tunnel next hop is not the device's own (`PACKET_OTHERHOST`: `ip_rcv_core`,
//! `ip6_rcv_core`).

use crate::datapath::names::{
    DEVICE_GROUP, DEVICE4, HOP_DEVICE, NETWORK4, OUT_DEVICE, PROBER, TUNNEL_NEXT_HOP4, TUNNEL_NEXT_HOP6, of_mac,
};
use crate::datapath::route_socket::{Change, RouteSocket, errno};
use crate::datapath::sysctl;
use crate::datapath::tunnel::{self, Tunnel};
use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use nix::libc::ENODEV;
use rtnetlink::{LinkUnspec, LinkVeth};

/// Begins the error if the kernel does not create the devices.
pub const REFUSED: &str = "veths before the tunnel device";

/// Creates or adjusts the pair, and returns the index of [`OUT_DEVICE`].
///
/// # Errors
/// Another interface has one of the names, the kernel lacks veth, or /proc/sys cannot be written.
pub async fn ensure(socket: &RouteSocket, tunnel: &Tunnel) -> Result<u32> {
    let (mut out, mut hop) = (find(socket, OUT_DEVICE).await?, find(socket, HOP_DEVICE).await?);
    if !are_a_pair(out.as_ref(), hop.as_ref()) {
        if let Some(one) = out.or(hop) {
            delete(socket, &one).await?;
        }
        create(socket).await?;
        (out, hop) = (find(socket, OUT_DEVICE).await?, find(socket, HOP_DEVICE).await?);
    }
    let (Some(out), Some(hop)) = (out, hop) else { bail!("{OUT_DEVICE} vanished just after its creation") };
    // Nothing is received there but by the chain of the table `netdev egret`.
    let of_hop = format!("ipv6/conf/{HOP_DEVICE}/disable_ipv6");
    if sysctl::get(&of_hop)?.is_some() {
        sysctl::ensure(&of_hop, "1")?;
    }
    if tunnel.ipv6 {
        sysctl::ensure(&format!("ipv6/conf/{OUT_DEVICE}/disable_ipv6"), "0")?;
        sysctl::ensure(&format!("ipv6/conf/{OUT_DEVICE}/accept_ra"), "0")?;
    }
    adjust(socket, &hop, HOP_DEVICE, vec![LinkAttribute::Mtu(tunnel.mtu)]).await?;
    let of_out = vec![
        LinkAttribute::Mtu(tunnel.mtu),
        LinkAttribute::Group(DEVICE_GROUP),
        // By the source address, the receiver recognises this node.
        LinkAttribute::Address(tunnel.mac.to_vec()),
    ];
    adjust(socket, &out, OUT_DEVICE, of_out).await?;
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
    for name in [OUT_DEVICE, HOP_DEVICE] {
        if let Some(device) = find(socket, name).await?.filter(is_veth) {
            delete(socket, &device).await?;
            return Ok(true);
        }
    }
    Ok(false)
}

async fn find(socket: &RouteSocket, name: &str) -> Result<Option<LinkMessage>> {
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        Ok(_) => bail!("cannot read the device {name}: the kernel's response is no link message"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e.context(format!("cannot read the device {name}"))),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    let is_veth = |info: &LinkInfo| *info == LinkInfo::Kind(InfoKind::Veth);
    link.attributes.iter().any(|a| matches!(a, LinkAttribute::LinkInfo(infos) if infos.iter().any(is_veth)))
}

fn are_a_pair(out: Option<&LinkMessage>, hop: Option<&LinkMessage>) -> bool {
    let (Some(out), Some(hop)) = (out, hop) else { return false };
    is_veth(out) && is_veth(hop) && out.attributes.contains(&LinkAttribute::Link(hop.header.index))
}

async fn delete(socket: &RouteSocket, device: &LinkMessage) -> Result<()> {
    if !is_veth(device) {
        bail!(
            "there is an interface {OUT_DEVICE} or {HOP_DEVICE} already, and it is no veth; rename it or remove it, Egret \
             needs the names for its tunnel"
        );
    }
    let about = "remove the pair of veths before the tunnel device".to_owned();
    let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(device.header.index).build());
    socket.apply(vec![Change { message, flags: 0, done_already: &[ENODEV], about }]).await.map(drop)
}

async fn create(socket: &RouteSocket) -> Result<()> {
    let message = RouteNetlinkMessage::NewLink(LinkVeth::new(OUT_DEVICE, HOP_DEVICE).build());
    let about = format!("create the devices {OUT_DEVICE} and {HOP_DEVICE}");
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let created = socket.apply(vec![Change { message, flags, done_already: &[], about }]).await;
    created.context(REFUSED).map(drop)
}

/// Sets attributes, and up.
async fn adjust(socket: &RouteSocket, device: &LinkMessage, name: &str, wanted: Vec<LinkAttribute>) -> Result<()> {
    let is_up = device.header.flags.contains(LinkFlags::Up);
    if is_up && wanted.iter().all(|attribute| device.attributes.contains(attribute)) {
        return Ok(());
    }
    let change = LinkUnspec::new_with_index(device.header.index).up();
    let change = wanted.into_iter().fold(change, |change, attribute| change.append_extra_attribute(attribute));
    let about = format!("set MTU and MAC address of the device {name}, and set it up");
    let message = RouteNetlinkMessage::SetLink(change.build());
    socket.apply(vec![Change { message, flags: 0, done_already: &[], about }]).await.map(drop)
}
