//! Sends a probe as if its pod had sent it: the frame comes in by the host's end of the pod's veth.
//!
//! The daemon cannot enter the pod's network namespace, which takes `CAP_SYS_ADMIN`, and a packet socket on the veth sends
//! towards the pod. So the frame is sent on a device that is there for this moment alone. A filter on its egress side
//! redirects the frame to the ingress side of the pod's veth (`act_mirred`), where all of the host's rules meet it as they
//! meet the pod's own packets. No rule of the pod's own namespace does.

use crate::datapath::names::PROBE_DEVICE;
use crate::datapath::packet_address::packet_address;
use anyhow::{Context, Result, bail};
use egret_nft::mac::Mac;
use egret_nft::netlink::{Attributes, NETLINK_ROUTE, NLM_F_CREATE, NLM_F_EXCL, Socket, attributes, string};
use nix::libc::{ENODEV, EOPNOTSUPP};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto, socket};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

/// Messages and attributes, include/uapi/linux/rtnetlink.h, if_link.h and veth.h.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_TARGET_NETNSID: u16 = 46;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFF_UP: u32 = 1;
/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
/// include/uapi/linux/pkt_sched.h, pkt_cls.h and tc_act/tc_mirred.h.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: i32 = 4;
const TCA_INGRESS_REDIR: i32 = 3;
/// `ETH_P_ALL` in network byte order, and the filter's priority in the upper half.
const ALL_PROTOCOLS: u32 = 1 << 16 | (0x0003_u16.to_be() as u32);

/// An interface as the kernel describes it.
#[derive(Default)]
struct Link {
    mac: Mac,
    /// The other end's index, and the id of its namespace.
    peer: Option<(u32, i32)>,
    /// The bridge of which it is a port.
    master: Option<u32>,
}

/// Sends the frame that `frame` makes from the pod's MAC address and that of its gateway, in by the veth with this index.
/// It takes some milliseconds, in which it waits for the kernel.
///
/// # Errors
/// The kernel lacks `act_mirred`, `cls_u32` or `sch_ingress`, or the veth is gone.
pub fn send(veth: u32, frame: impl FnOnce(Mac, Mac) -> Vec<u8>) -> Result<()> {
    let mut routes = Socket::open(NETLINK_ROUTE).context("rtnetlink")?;
    let host_end = link(&mut routes, veth, None).context("the pod's veth")?;
    let Some((peer, namespace)) = host_end.peer else { bail!("interface {veth} is no veth of a pod's") };
    let pod = link(&mut routes, peer, Some(namespace)).context("the pod's interface")?;
    // The pod's gateway is the bridge, or the host's end itself.
    let gateway = match host_end.master {
        Some(bridge) => link(&mut routes, bridge, None).context("the pod's bridge")?.mac,
        None => host_end.mac,
    };
    let frame = frame(pod.mac, gateway);
    // All traces of this daemon have one device.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    remove(&mut routes)?;
    let made = make(&mut routes).context("cannot make the probe's device")?;
    let sent = redirect(&mut routes, made, veth).and_then(|()| transmit(made, &frame));
    let removed = remove(&mut routes);
    sent.and(removed.map(drop))
}

/// Removes the device that a killed daemon has left, and tells whether there was one.
///
/// # Errors
/// The kernel refuses.
pub fn remove_device() -> Result<bool> {
    remove(&mut Socket::open(NETLINK_ROUTE).context("rtnetlink")?)
}

fn remove(routes: &mut Socket) -> Result<bool> {
    let mut request = ifinfomsg(0, 0);
    request.text(IFLA_IFNAME, PROBE_DEVICE[0]);
    match routes.request(RTM_DELLINK, 0, &request) {
        Ok(()) => Ok(true),
        Err(e) if e.errno() == Some(ENODEV) => Ok(false),
        Err(e) => Err(e).with_context(|| format!("cannot remove the device {}; remove it", PROBE_DEVICE[0])),
    }
}

/// Makes the device, and returns its index. Its other end stays down, so that no packet leaves by it.
fn make(routes: &mut Socket) -> Result<u32> {
    let mut request = ifinfomsg(0, IFF_UP);
    request.text(IFLA_IFNAME, PROBE_DEVICE[0]);
    request.nested(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, "veth");
        info.nested(IFLA_INFO_DATA, |data| {
            data.nested(VETH_INFO_PEER, |peer| {
                peer.extend(ifinfomsg(0, 0));
                peer.text(IFLA_IFNAME, PROBE_DEVICE[1]);
            });
        });
    });
    routes.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &request)?;
    Ok(nix::net::if_::if_nametoindex(PROBE_DEVICE[0])?)
}

/// Redirects what leaves by the device to the ingress side of the veth.
fn redirect(routes: &mut Socket, device: u32, veth: u32) -> Result<()> {
    let needs = || "it needs the kernel's sch_ingress (clsact), cls_u32 and act_mirred";
    let mut qdisc = tcmsg(device, CLSACT_HANDLE, TC_H_CLSACT, 0);
    qdisc.text(TCA_KIND, "clsact");
    routes.request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &qdisc).with_context(needs)?;
    let mut filter = tcmsg(device, 0, CLSACT_EGRESS, ALL_PROTOCOLS);
    filter.text(TCA_KIND, "u32");
    filter.nested(TCA_OPTIONS, |options| {
        // `struct tc_u32_sel` with one key that matches everything.
        let mut selector = vec![TC_U32_TERMINAL, 0, 1, 0];
        selector.resize(32, 0);
        options.attribute(TCA_U32_SEL, &selector);
        options.nested(TCA_U32_ACT, |actions| {
            actions.nested(1, |action| {
                action.text(TCA_ACT_KIND, "mirred");
                action.nested(TCA_ACT_OPTIONS, |options| options.attribute(TCA_MIRRED_PARMS, &mirred(veth)));
            });
        });
    });
    routes.request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &filter).with_context(needs)
}

/// `struct tc_mirred`
fn mirred(to: u32) -> Vec<u8> {
    let action = [[0; 4], [0; 4], TC_ACT_STOLEN.to_ne_bytes(), [0; 4], [0; 4]].concat();
    [&action[..], &TCA_INGRESS_REDIR.to_ne_bytes(), &to.to_ne_bytes()].concat()
}

fn transmit(device: u32, frame: &[u8]) -> Result<()> {
    let ethertype = frame.get(12..14).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]));
    let to = packet_address(device, ethertype).context("the probe's device")?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("cannot open a packet socket; it needs CAP_NET_RAW")?;
    match sendto(socket.as_raw_fd(), frame, &to, MsgFlags::empty()) {
        Ok(sent) if sent == frame.len() => Ok(()),
        Ok(sent) => bail!("the kernel took {sent} bytes of {}", frame.len()),
        Err(e) => Err(e).context("cannot send the probe"),
    }
}

/// Reads an interface, of this namespace or of the one with the id.
fn link(routes: &mut Socket, index: u32, namespace: Option<i32>) -> Result<Link> {
    let mut request = ifinfomsg(index, 0);
    if let Some(id) = namespace {
        request.attribute(IFLA_TARGET_NETNSID, &id.to_ne_bytes());
    }
    let answer = routes.get(RTM_GETLINK, &request).map_err(|e| match e.errno() {
        Some(ENODEV) => anyhow::anyhow!("interface {index} is gone"),
        Some(EOPNOTSUPP) => anyhow::anyhow!("this kernel tells nothing of interfaces in other namespaces (Linux 5.0)"),
        _ => anyhow::Error::new(e),
    })?;
    let (mut link, mut peer, mut id, mut is_veth) = (Link::default(), None, None, false);
    let number = |value: &[u8]| value.try_into().ok().map(u32::from_ne_bytes);
    for (kind, value) in attributes(answer.get(IFINFOMSG..).unwrap_or_default()) {
        match kind {
            IFLA_ADDRESS => link.mac = Mac::try_from(value).unwrap_or_default(),
            IFLA_MASTER => link.master = number(value).filter(|index| *index != 0),
            IFLA_LINK => peer = number(value),
            IFLA_LINK_NETNSID => id = number(value).map(u32::cast_signed),
            IFLA_LINKINFO => {
                is_veth = attributes(value).any(|(kind, name)| kind == IFLA_INFO_KIND && string(name) == "veth");
            }
            _ => {}
        }
    }
    link.peer = peer.zip(id).filter(|_| is_veth);
    Ok(link)
}

/// `struct ifinfomsg`
fn ifinfomsg(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

/// `struct tcmsg`
fn tcmsg(device: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [[0; 4], device.to_ne_bytes(), handle.to_ne_bytes(), parent.to_ne_bytes(), info.to_ne_bytes()].concat()
}
