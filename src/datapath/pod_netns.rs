//! Finds a pod's veth by the addresses in the pod's network namespace.
//!
//! Some CNIs leave nothing in the host's tables that leads from a pod's address to its veth: Cilium's own programs deliver
//! packets. The kernel tells the id of the namespace in which a veth's other end is, and the addresses of a namespace by
//! that id, to a process with `CAP_NET_ADMIN` there (`rtnl_get_net_ns_capable`, Linux 4.20). So the daemon need not enter
//! it.

use crate::datapath::pod_veth::Veth;
use anyhow::{Context, Result};
use egret_nft::mac::Mac;
use egret_nft::netlink::{Attributes, Error, NETLINK_ROUTE, Socket, attributes, string};
use nix::libc::{EACCES, EINVAL, ENOENT};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Messages and attributes, include/uapi/linux/rtnetlink.h, if_link.h and if_addr.h.
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_TARGET_NETNSID: u16 = 10;
/// Lengths of `struct ifinfomsg` and `ifaddrmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;

/// The veth whose other end is in another namespace and has `address`; `None` if no veth's has.
///
/// # Errors
/// The kernel's answers cannot be read.
pub fn find(address: IpAddr) -> Result<Option<Veth>> {
    let mut socket = Socket::open(NETLINK_ROUTE).context("rtnetlink")?;
    let mut by_namespace: BTreeMap<i32, Vec<Veth>> = BTreeMap::new();
    for (namespace, veth) in veths(&mut socket)? {
        by_namespace.entry(namespace).or_default().push(veth);
    }
    for (namespace, veths) in by_namespace {
        let interfaces = with_address(&mut socket, namespace, address)?;
        let found = veths.into_iter().find(|veth| interfaces.contains(&veth.peer_index));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// The veths of this namespace whose other ends are in other namespaces, with the ids of those.
fn veths(socket: &mut Socket) -> Result<Vec<(i32, Veth)>, Error> {
    socket.dump(RTM_GETLINK, &[0; IFINFOMSG], Vec::new, |all, message| all.extend(veth(message)))
}

fn veth(message: &[u8]) -> Option<(i32, Veth)> {
    let number = |value: &[u8]| value.try_into().ok().map(u32::from_ne_bytes);
    let index = message.get(4..8).and_then(number)?;
    let mut veth = Veth { name: String::new(), index, peer_index: 0, master: None, mac: Mac::default() };
    let (mut namespace, mut is_veth) = (None, false);
    for (kind, value) in attributes(message.get(IFINFOMSG..)?) {
        match kind {
            IFLA_ADDRESS => veth.mac = Mac::try_from(value).unwrap_or_default(),
            IFLA_IFNAME => veth.name = string(value),
            IFLA_LINK => veth.peer_index = number(value)?,
            IFLA_MASTER => veth.master = number(value).filter(|index| *index != 0),
            IFLA_LINK_NETNSID => namespace = number(value).map(u32::cast_signed),
            IFLA_LINKINFO => {
                is_veth = attributes(value).any(|(kind, name)| kind == IFLA_INFO_KIND && string(name) == "veth");
            }
            _ => {}
        }
    }
    namespace.filter(|_| is_veth).map(|id| (id, veth))
}

/// The indexes of the interfaces with `address` in the namespace with this id. A namespace that has just gone, or of
/// another user, has none.
fn with_address(socket: &mut Socket, namespace: i32, address: IpAddr) -> Result<Vec<u32>, Error> {
    let mut request = vec![0; IFADDRMSG];
    request[0] = egret_nft::Family::of(&address).number();
    request.attribute(IFA_TARGET_NETNSID, &namespace.to_ne_bytes());
    let octets = match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let found = socket.dump(RTM_GETADDR, &request, Vec::new, |found, message| {
        let is_it = |(kind, value): (u16, &[u8])| matches!(kind, IFA_LOCAL | IFA_ADDRESS) && *value == *octets;
        if attributes(message.get(IFADDRMSG..).unwrap_or_default()).any(is_it) {
            found.extend(message.get(4..8).and_then(|index| index.try_into().ok()).map(u32::from_ne_bytes));
        }
    });
    match found {
        Err(e) if matches!(e.errno(), Some(EACCES | EINVAL | ENOENT)) => Ok(Vec::new()),
        other => other,
    }
}
