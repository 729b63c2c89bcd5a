//! The tunnel device: one VXLAN device for all other nodes. It neither learns nor floods.
//!
//! Every packet that is routed into it has the same next hop, the tunnel next hop. The egress chain of the table
//! `netdev egret` replaces the tunnel next hop's MAC address by the destination node's, and the forwarding database
//! ([`crate::datapath::fdb`]) maps that to the node's underlay address.

use crate::datapath::names::{
    DEVICE, DEVICE_GROUP, DEVICE4, NETWORK4, PROBER, PROTOCOL, TUNNEL_NEXT_HOP_MAC, TUNNEL_NEXT_HOP4, TUNNEL_NEXT_HOP6,
    of_mac,
};
use crate::datapath::route_socket::{Change, RouteSocket, errno};
use crate::datapath::sysctl;
use crate::datapath::underlay::Underlay;
use anyhow::{Context, Result, bail};
use egret_nft::mac::{Mac, Shown};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, ENODEV, ENOENT};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan};
use std::net::IpAddr;

/// The smallest MTU of a device with IPv6 (`IPV6_MIN_MTU`, include/uapi/linux/ipv6.h).
pub const IPV6_MIN_MTU: u32 = 1280;

/// The tunnel's overhead per packet, bytes: Ethernet 14, VXLAN 8, UDP 8, IPv4 20.
const OVERHEAD4: u32 = 50;
/// As [`OVERHEAD4`], with IPv6's 40 bytes.
const OVERHEAD6: u32 = 70;

/// The desired state of the tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The UDP port, the same on every node.
    pub port: u16,
    /// This node's underlay address, to which the other nodes send.
    pub local: IpAddr,
    /// The device's MAC address.
    pub mac: Mac,
    /// The device's MTU, in bytes: see [`mtu`].
    pub mtu: u32,
    /// Whether the device carries IPv6. It can if the host has IPv6 and the MTU is at least [`IPV6_MIN_MTU`].
    pub ipv6: bool,
}

/// The MTU of a tunnel over `underlay`, in bytes: the underlay's less the overhead.
pub fn mtu(underlay: &Underlay) -> u32 {
    underlay.mtu().saturating_sub(if underlay.local().is_ipv4() { OVERHEAD4 } else { OVERHEAD6 })
}

/// Creates or adjusts the device, and returns its interface index. The kernel cannot change the network identifier,
/// port or local address of a device, so a device with other ones is created anew; its routes and forwarding entries
/// are lost.
///
/// # Errors
/// Another interface has the name, another VXLAN device has the identifier and port, another program has the UDP
/// port, the kernel lacks VXLAN, or /proc/sys cannot be written.
pub async fn ensure(socket: &RouteSocket, tunnel: &Tunnel) -> Result<u32> {
    let mut device = find(socket).await?;
    if let Some(there) = &device {
        if !is_vxlan(there) {
            bail!(
                "there is an interface {DEVICE} already, and it is no VXLAN device; rename it or remove it \
                 (`ip link delete {DEVICE}`), Egret needs the name for its tunnel"
            );
        }
        if !has_fixed_parameters(there, tunnel) {
            remove(socket).await?;
            device = None;
        }
    }
    let device = match device {
        Some(there) => there,
        None => {
            create(socket, tunnel).await?;
            find(socket).await?.context("the tunnel device vanished just after its creation")?
        }
    };
    let index = device.header.index;
    // Set before the device is up, so that no packet arrives under other settings.
    settings(tunnel.ipv6)?;
    adjust(socket, &device, tunnel).await?;
    // The prefix brings a route to the tunnel next hop: the kernel sends a copy of a packet there by address
    // (`nf_dup_ipv4`).
    address(socket, index, DEVICE4.into(), NETWORK4).await?;
    neighbour(socket, index, TUNNEL_NEXT_HOP4.into()).await?;
    if tunnel.ipv6 {
        // The prefix brings a route to the other nodes' addresses.
        address(socket, index, of_mac(PROBER, tunnel.mac).into(), 64).await?;
        neighbour(socket, index, TUNNEL_NEXT_HOP6.into()).await?;
    }
    Ok(index)
}

/// Removes the device, and with it its routes, addresses and forwarding entries. Returns whether it existed. A device
/// of that name that is no VXLAN device is another program's and stays.
pub async fn remove(socket: &RouteSocket) -> Result<bool> {
    let Some(device) = find(socket).await?.filter(is_vxlan) else { return Ok(false) };
    let removed = socket
        .apply(vec![Change {
            message: RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(device.header.index).build()),
            flags: 0,
            done_already: &[ENODEV],
            about: format!("remove the tunnel device {DEVICE}"),
        }])
        .await?;
    Ok(removed > 0)
}

/// The device's interface index, if there is a VXLAN device of that name.
pub async fn index(socket: &RouteSocket) -> Result<Option<u32>> {
    Ok(find(socket).await?.filter(is_vxlan).map(|device| device.header.index))
}

async fn find(socket: &RouteSocket) -> Result<Option<LinkMessage>> {
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(DEVICE).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        Ok(_) => bail!("cannot read the tunnel device {DEVICE}: the kernel's response is no link message"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e.context(format!("cannot read the tunnel device {DEVICE}"))),
    }
}

fn infos(link: &LinkMessage) -> &[LinkInfo] {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::LinkInfo(infos) = a { Some(infos.as_slice()) } else { None })
        .unwrap_or_default()
}

fn is_vxlan(link: &LinkMessage) -> bool {
    infos(link).contains(&LinkInfo::Kind(InfoKind::Vxlan))
}

/// The parameters of a VXLAN device that can be set at its creation only (`vxlan_nl2conf`,
/// drivers/net/vxlan/vxlan_core.c).
fn fixed_parameters(tunnel: &Tunnel) -> Vec<InfoVxlan> {
    vec![
        InfoVxlan::Id(tunnel.vni),
        InfoVxlan::Port(tunnel.port),
        match tunnel.local {
            IpAddr::V4(a) => InfoVxlan::Local(a),
            IpAddr::V6(a) => InfoVxlan::Local6(a),
        },
        // The allocation's id travels in the group-based-policy extension.
        InfoVxlan::Gbp,
        InfoVxlan::Learning(false),
        InfoVxlan::CollectMetadata(false),
        // With a checksum the receiver can merge segments (GRO). It costs the sender nothing, because the kernel
        // derives it from the inner one (Documentation/networking/checksum-offloads.rst, local checksum offload).
        InfoVxlan::UDPCsum(true),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
    ]
}

fn has_fixed_parameters(link: &LinkMessage, tunnel: &Tunnel) -> bool {
    let Some(data) =
        infos(link).iter().find_map(|i| if let LinkInfo::Data(InfoData::Vxlan(d)) = i { Some(d) } else { None })
    else {
        return false;
    };
    let foreign = |d: &InfoVxlan| {
        matches!(d, InfoVxlan::Group(_) | InfoVxlan::Group6(_) | InfoVxlan::Gpe | InfoVxlan::Link(1..))
            || *d == InfoVxlan::Vnifilter(true)
    };
    // A kernel may omit a checksum flag that is off.
    let off = |d: &InfoVxlan| matches!(d, InfoVxlan::UDPZeroCsumTX(false) | InfoVxlan::UDPZeroCsumRX(false));
    fixed_parameters(tunnel).iter().all(|wanted| data.contains(wanted) || off(wanted)) && !data.iter().any(foreign)
}

async fn create(socket: &RouteSocket, tunnel: &Tunnel) -> Result<()> {
    let device = fixed_parameters(tunnel)
        .into_iter()
        .fold(LinkMessageBuilder::<LinkVxlan>::new(DEVICE), LinkMessageBuilder::<LinkVxlan>::append_info_data)
        .address(tunnel.mac.to_vec())
        .mtu(tunnel.mtu)
        .append_extra_attribute(LinkAttribute::Group(DEVICE_GROUP))
        .build();
    let made = socket
        .apply(vec![Change {
            message: RouteNetlinkMessage::NewLink(device),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            done_already: &[],
            about: format!("create the tunnel device {DEVICE}"),
        }])
        .await;
    let Tunnel { vni, port, local, .. } = tunnel;
    match made {
        Ok(_) => Ok(()),
        Err(e) if errno(&e) == Some(EEXIST) => Err(e.context(format!(
            "another VXLAN device has network identifier {vni} on UDP port {port} (`ip -d link show type vxlan`); \
             remove it, or give the tunnel another port or identifier"
        ))),
        Err(e) => Err(e.context(format!("VXLAN {vni} from {local}, UDP port {port}"))),
    }
}

fn settings(ipv6: bool) -> Result<()> {
    // Packets from the tunnel are routed by their mark, and replies by another table. A node whose pods' only route
    // is the tunnel has no route back at all.
    sysctl::loosen_source_validation(DEVICE)?;
    if ipv6 {
        // A host may switch IPv6 off for new interfaces only.
        sysctl::ensure(&format!("ipv6/conf/{DEVICE}/disable_ipv6"), "0")?;
        sysctl::ensure(&format!("ipv6/conf/{DEVICE}/accept_ra"), "0")?;
        // The hop limit of this node's replies to liveness probes: the receiver sees that no router has forwarded
        // them.
        sysctl::ensure(&format!("ipv6/conf/{DEVICE}/hop_limit"), "255")?;
    }
    Ok(())
}

/// Sets the parameters that the kernel can change on an existing device: MAC address, MTU, group, and up.
async fn adjust(socket: &RouteSocket, device: &LinkMessage, tunnel: &Tunnel) -> Result<()> {
    let has = |wanted: LinkAttribute| device.attributes.contains(&wanted);
    let mut change = LinkUnspec::new_with_index(device.header.index);
    let mut differs = false;
    if !has(LinkAttribute::Address(tunnel.mac.to_vec())) {
        change = change.address(tunnel.mac.to_vec());
        differs = true;
    }
    if !has(LinkAttribute::Mtu(tunnel.mtu)) {
        change = change.mtu(tunnel.mtu);
        differs = true;
    }
    if !has(LinkAttribute::Group(DEVICE_GROUP)) {
        change = change.append_extra_attribute(LinkAttribute::Group(DEVICE_GROUP));
        differs = true;
    }
    if !device.header.flags.contains(LinkFlags::Up) {
        change = change.up();
        differs = true;
    }
    if !differs {
        return Ok(());
    }
    let done = socket
        .apply(vec![Change {
            message: RouteNetlinkMessage::SetLink(change.build()),
            flags: 0,
            done_already: &[],
            about: format!("set the tunnel device {DEVICE} up with {} and MTU {}", Shown(tunnel.mac), tunnel.mtu),
        }])
        .await;
    match done {
        Ok(_) => Ok(()),
        Err(e) if errno(&e) == Some(EADDRINUSE) => Err(e.context(format!(
            "UDP port {} is taken by another program (`ss -ulpn sport = :{}`); stop it, or give the tunnel another port",
            tunnel.port, tunnel.port
        ))),
        Err(e) if [Some(EAFNOSUPPORT), Some(EADDRNOTAVAIL)].contains(&errno(&e)) => {
            Err(e.context(format!(
                "the host cannot open UDP sockets for {}; give a tunnel address that it has",
                tunnel.local
            )))
        }
        Err(e) => Err(e),
    }
}

/// Gives a device an address of its own.
pub(super) async fn address(socket: &RouteSocket, index: u32, own: IpAddr, prefix: u8) -> Result<()> {
    let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // The kernel derives the scope of an IPv6 address from the address.
    let scope = if own.is_ipv4() { AddressScope::Link } else { AddressScope::Universe };
    let mut filter = AddressMessage::default();
    filter.header.family = family;
    filter.header.index = index;
    let attribute = if own.is_ipv4() { AddressAttribute::Local } else { AddressAttribute::Address };
    let there = socket
        .dump(RouteNetlinkMessage::GetAddress(filter), |m| match m {
            RouteNetlinkMessage::NewAddress(a) if a.header.index == index && a.attributes.contains(&attribute(own)) => {
                Some(a.header.prefix_len == prefix && (own.is_ipv6() || a.header.scope == scope))
            }
            _ => None,
        })
        .await
        .context("cannot read the tunnel device's addresses")?;
    if there.contains(&true) {
        return Ok(());
    }
    let mut wanted = AddressMessage::default();
    wanted.header.family = family;
    wanted.header.prefix_len = prefix;
    wanted.header.scope = scope;
    wanted.header.index = index;
    wanted.attributes = vec![
        AddressAttribute::Local(own),
        AddressAttribute::Address(own),
        AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
    ];
    if own.is_ipv6() {
        // Duplicate address detection has no effect in the tunnel, which forwards no multicast.
        wanted.header.flags = AddressHeaderFlags::Nodad;
    }
    socket
        .apply(vec![Change {
            message: RouteNetlinkMessage::NewAddress(wanted),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            done_already: &[],
            about: format!("give interface {index} its address {own}/{prefix}"),
        }])
        .await?;
    Ok(())
}

/// Adds a permanent neighbour entry for the tunnel next hop, because no host answers for it.
pub(super) async fn neighbour(socket: &RouteSocket, index: u32, tunnel_next_hop: IpAddr) -> Result<()> {
    let mut wanted = NeighbourMessage::default();
    wanted.header.family = if tunnel_next_hop.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    wanted.header.ifindex = index;
    wanted.attributes = vec![NeighbourAttribute::Destination(tunnel_next_hop.into())];
    match socket.get(RouteNetlinkMessage::GetNeighbour(wanted.clone())).await {
        Ok(RouteNetlinkMessage::NewNeighbour(there))
            if there.header.state == NeighbourState::Permanent
                && there.attributes.contains(&NeighbourAttribute::LinkLayerAddress(TUNNEL_NEXT_HOP_MAC.to_vec())) =>
        {
            return Ok(());
        }
        Err(e) if errno(&e) != Some(ENOENT) => {
            return Err(e.context(format!("cannot read the neighbour entry of the tunnel next hop {tunnel_next_hop}")));
        }
        _ => {}
    }
    wanted.header.state = NeighbourState::Permanent;
    wanted.attributes.push(NeighbourAttribute::LinkLayerAddress(TUNNEL_NEXT_HOP_MAC.to_vec()));
    socket
        .apply(vec![Change {
            message: RouteNetlinkMessage::NewNeighbour(wanted),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            done_already: &[],
            about: format!("add the neighbour entry of the tunnel next hop {tunnel_next_hop}"),
        }])
        .await?;
    Ok(())
}
