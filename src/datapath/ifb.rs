//! ifb devices, to which a filter at a veth redirects the packets that come in by it, so that a queueing discipline limits
//! what a pod sends. The CNI plugin `bandwidth` makes one for each pod with `kubernetes.io/egress-bandwidth`.
//!
//! A redirected packet comes in by the veth again, and passes neither its ingress hook (`tc_skip_classify`, net/core/dev.c)
//! nor the egress hook of the next device by which it leaves (`nf_skip_egress`, drivers/net/ifb.c).

use crate::datapath::filters;
use egret_nft::netlink::{Error, NETLINK_ROUTE, Socket, attributes, string};
use nix::libc::ENODEV;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// include/uapi/linux/rtnetlink.h and if_link.h.
const RTM_GETLINK: u16 = 18;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
/// The kinds of filters, and the attribute with their actions: `TCA_U32_ACT`, `TCA_MATCHALL_ACT`, `TCA_FLOWER_ACT`,
/// include/uapi/linux/pkt_cls.h.
pub(super) const KINDS: [(&str, u16); 3] = [("u32", 7), ("matchall", 2), ("flower", 3)];
/// `TCA_ACT_KIND`, `TCA_ACT_OPTIONS`.
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
/// include/uapi/linux/tc_act/tc_mirred.h: `TCA_MIRRED_PARMS`, `TCA_EGRESS_REDIR`, and the places of `eaction` and
/// `ifindex` in `struct tc_mirred`.
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const EACTION: usize = 20;
const IFINDEX: usize = 24;
/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;

/// A socket for [`is_redirected`].
///
/// # Errors
/// As socket(2).
pub fn open() -> io::Result<Socket> {
    Socket::open(NETLINK_ROUTE)
}

/// Whether a filter redirects what comes in by the interface with this index to an ifb device.
///
/// # Errors
/// The filters cannot be read.
pub fn is_redirected(socket: &mut Socket, index: u32) -> Result<bool, Error> {
    for target in targets(socket, index)? {
        if is_ifb(socket, target)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The interfaces to which filters redirect what comes in by one.
fn targets(socket: &mut Socket, interface: u32) -> Result<BTreeSet<u32>, Error> {
    filters::read(socket, interface, BTreeSet::new, |found, kind, options| {
        let Some((_, of_actions)) = KINDS.iter().find(|(name, _)| *name == kind) else { return };
        let actions = attributes(options).filter(|(kind, _)| kind == of_actions);
        found.extend(
            actions.flat_map(|(_, actions)| attributes(actions)).filter_map(|(_, action)| redirects_to(action)),
        );
    })
}

/// The interface to which an action redirects, so that packets leave by it.
fn redirects_to(action: &[u8]) -> Option<u32> {
    let action: BTreeMap<u16, &[u8]> = attributes(action).collect();
    if string(action.get(&TCA_ACT_KIND)?) != "mirred" {
        return None;
    }
    let (_, parameters) = attributes(action.get(&TCA_ACT_OPTIONS)?).find(|(kind, _)| *kind == TCA_MIRRED_PARMS)?;
    number_at(parameters, IFINDEX).filter(|_| number_at(parameters, EACTION) == Some(TCA_EGRESS_REDIR))
}

/// Whether the interface with this index is an ifb device.
fn is_ifb(socket: &mut Socket, index: u32) -> Result<bool, Error> {
    let mut request = [0; IFINFOMSG];
    request[4..8].copy_from_slice(&index.to_ne_bytes());
    let answer = match socket.get(RTM_GETLINK, &request) {
        Ok(answer) => answer,
        Err(e) if e.errno() == Some(ENODEV) => return Ok(false),
        Err(e) => return Err(e),
    };
    let of_link = attributes(answer.get(IFINFOMSG..).unwrap_or_default()).filter(|(kind, _)| *kind == IFLA_LINKINFO);
    let mut kinds = of_link.flat_map(|(_, info)| attributes(info)).filter(|(kind, _)| *kind == IFLA_INFO_KIND);
    Ok(kinds.any(|(_, kind)| string(kind) == "ifb"))
}

fn number_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}
