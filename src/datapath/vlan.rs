//! VLAN interfaces: those of the host, and those that Egret makes for gateways with `vlan`.
//!
//! A VLAN has one interface at most on its parent (`vlan_check_real_dev`, net/8021q/vlan.c). So Egret uses one that the host
//! has made, and makes one only where there is none. It recognises its own ones by their names.

use crate::datapath::names::{VLAN_DEVICE, is_vlan_device};
use crate::datapath::route_socket::{Change, RouteSocket};
use crate::datapath::sysctl;
use crate::datapath::uplink::Interface;
use anyhow::{Context, Result, anyhow};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, VlanProtocol,
};
use nix::libc::{EEXIST, ENETDOWN, ENODEV};
use rtnetlink::{LinkUnspec, LinkVlan};

/// The interface of a VLAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// The interface index.
    pub ifindex: u32,
    /// The interface name.
    pub name: String,
    /// The index of the interface that carries it. `None`: that one is in another network namespace, into which somebody has
    /// moved it. The VLAN's interface has stayed, and carries nothing of this host's.
    pub parent: Option<u32>,
    /// The VLAN's number in IEEE 802.1Q, 1 to 4094.
    pub id: u16,
    /// Whether it is set up.
    pub up: bool,
}

impl Vlan {
    /// Whether Egret has made it.
    pub fn is_ours(&self) -> bool {
        match self.parent {
            Some(parent) => self.name == own_name(parent, self.id),
            None => is_vlan_device(&self.name) && self.name.ends_with(&format!(".{}", self.id)),
        }
    }

    /// Whether it is the interface of the VLAN `id` on the interface `parent`.
    pub fn is_of(&self, parent: u32, id: u16) -> bool {
        self.parent == Some(parent) && self.id == id
    }
}

/// The name of the interface that Egret makes. No name is longer than 15 bytes (IFNAMSIZ, include/uapi/linux/if.h), which
/// suffices for parents with indexes of up to five digits.
fn own_name(parent: u32, id: u16) -> String {
    format!("{VLAN_DEVICE}{parent}.{id}")
}

/// The host's VLAN interfaces of IEEE 802.1Q.
///
/// # Errors
/// The interfaces cannot be read.
pub async fn all(socket: &RouteSocket) -> Result<Vec<Vlan>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vlan)]));
    let pick = |message| match message {
        RouteNetlinkMessage::NewLink(link) => parse(&link),
        _ => None,
    };
    socket.dump(RouteNetlinkMessage::GetLink(request), pick).await.context("cannot read the VLAN interfaces")
}

/// `None` for another kind of interface: without the kernel's module for VLANs, the kernel does not filter by the kind
/// (`rtnl_dump_ifinfo`, net/core/rtnetlink.c).
fn parse(link: &LinkMessage) -> Option<Vlan> {
    let (mut name, mut parent, mut is_apart, mut id, mut is_dot1q) = (None, None, false, None, true);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::LinkNetNsId(_) => is_apart = true,
            LinkAttribute::LinkInfo(infos) => {
                let data = infos.iter().find_map(|info| match info {
                    LinkInfo::Data(InfoData::Vlan(data)) => Some(data),
                    _ => None,
                });
                for info in data? {
                    match info {
                        InfoVlan::Id(number) => id = Some(*number),
                        InfoVlan::Protocol(protocol) => is_dot1q = *protocol == VlanProtocol::Ieee8021Q,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let vlan = Vlan {
        ifindex: link.header.index,
        name: name?,
        parent: parent.filter(|_| !is_apart),
        id: id?,
        up: link.header.flags.contains(LinkFlags::Up),
    };
    is_dot1q.then_some(vlan)
}

/// Makes the interface of the VLAN `id` on `parent`, without an address. [`adjust`] is to follow.
///
/// # Errors
/// The kernel has no VLANs, the parent carries none, its index is too large for a name, or there is another interface of this
/// name. The text has the remedy.
pub async fn make(socket: &RouteSocket, parent: &Interface, id: u16) -> Result<()> {
    let name = own_name(parent.ifindex, id);
    let message = RouteNetlinkMessage::NewLink(LinkVlan::new(&name, parent.ifindex, id).build());
    let about = format!("make the interface {name} of the VLAN {id} on {}", parent.name);
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    // Somebody else may just have made one.
    let change = Change { message, flags, done_already: &[EEXIST], about };
    socket.apply(vec![change]).await.map(drop).map_err(|e| {
        anyhow!(
            "{e:#}; load the kernel's module 8021q if it is missing, or name an interface that can carry a VLAN, or the \
             VLAN's own one"
        )
    })
}

/// Why there is no interface of the VLAN although the kernel says that one exists.
pub fn name_is_taken(parent: &Interface, id: u16) -> anyhow::Error {
    let name = own_name(parent.ifindex, id);
    anyhow!(
        "cannot make the interface of the VLAN {id} on {}: there is another interface {name}; rename it or remove it",
        parent.name
    )
}

/// Sets an own interface up, without router advertisements and strict source validation: no route of the main table leads by
/// it. With `ipv6`, IPv6 is switched on. While the parent is down, the kernel sets it up together with that
/// (`vlan_device_event`, net/8021q/vlan.c). Returns whether anything changed.
///
/// # Errors
/// The kernel's refusal, or /proc/sys cannot be written.
pub async fn adjust(socket: &RouteSocket, vlan: &Vlan, ipv6: bool) -> Result<bool> {
    let mut changed = sysctl::loosen_source_validation(&vlan.name)?;
    if sysctl::ipv6()? {
        changed |= sysctl::ensure(&format!("ipv6/conf/{}/accept_ra", vlan.name), "0")?;
        if ipv6 {
            // A host may switch IPv6 off for new interfaces only.
            changed |= sysctl::ensure(&format!("ipv6/conf/{}/disable_ipv6", vlan.name), "0")?;
        }
    }
    if vlan.up {
        return Ok(changed);
    }
    let message = RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(vlan.ifindex).up().build());
    let about = format!("set the interface {} up", vlan.name);
    let made = socket.apply(vec![Change { message, flags: 0, done_already: &[ENETDOWN], about }]).await?;
    Ok(changed || made > 0)
}

/// Removes an interface that Egret has made.
///
/// # Errors
/// The kernel's refusal.
pub async fn remove(socket: &RouteSocket, vlan: &Vlan) -> Result<()> {
    let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(vlan.ifindex).build());
    let about = format!("remove the interface {} of a VLAN", vlan.name);
    socket.apply(vec![Change { message, flags: 0, done_already: &[ENODEV], about }]).await.map(drop)
}

/// Removes all interfaces that Egret has made. Returns how many.
///
/// # Errors
/// The interfaces cannot be read, or the kernel refuses.
pub async fn remove_all(socket: &RouteSocket) -> Result<usize> {
    let (mut removed, mut failure) = (0, None);
    for vlan in all(socket).await?.iter().filter(|vlan| vlan.is_ours()) {
        match remove(socket, vlan).await {
            Ok(()) => removed += 1,
            Err(e) => failure = Some(e),
        }
    }
    failure.map_or(Ok(removed), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(attributes: Vec<LinkAttribute>, data: Vec<InfoVlan>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = 9;
        link.attributes = attributes;
        let infos = vec![LinkInfo::Kind(InfoKind::Vlan), LinkInfo::Data(InfoData::Vlan(data))];
        link.attributes.push(LinkAttribute::LinkInfo(infos));
        link
    }

    #[test]
    fn vlans_of_this_host_are_read() {
        let of = |name: &str| vec![LinkAttribute::IfName(name.into()), LinkAttribute::Link(2)];
        let id = vec![InfoVlan::Id(100), InfoVlan::Protocol(VlanProtocol::Ieee8021Q)];
        let vlan = parse(&link(of("eth0.100"), id.clone())).unwrap();
        assert_eq!((vlan.ifindex, vlan.parent, vlan.id, vlan.is_ours()), (9, Some(2), 100, false));
        assert!(vlan.is_of(2, 100) && !vlan.is_of(3, 100) && !vlan.is_of(2, 101));
        assert!(parse(&link(of("egret2.100"), id.clone())).unwrap().is_ours());
        // The index of a parent in another network namespace is none of this one's.
        let apart = |name| parse(&link([of(name), vec![LinkAttribute::LinkNetNsId(0)]].concat(), id.clone())).unwrap();
        assert_eq!((apart("eth0.100").parent, apart("eth0.100").is_ours()), (None, false));
        assert!(!apart("egret2.100").is_of(2, 100));
        assert!(apart("egret2.100").is_ours() && apart("egret7.100").is_ours());
        assert!(!apart("egret2.1100").is_ours() && !apart("egret2.10").is_ours());
        let dot1ad = vec![InfoVlan::Id(100), InfoVlan::Protocol(VlanProtocol::Ieee8021Ad)];
        assert_eq!(parse(&link(of("eth0.100"), dot1ad)), None);
        assert_eq!(parse(&LinkMessage::default()), None);
    }

    #[test]
    fn own_names_are_recognised() {
        assert!(is_vlan_device(&own_name(2, 100)) && own_name(99_999, 4094).len() <= 15);
        for name in ["egret", "egret-out", "egret2", "egret.100", "egretx.100", "eth0.100"] {
            assert!(!is_vlan_device(name), "{name}");
        }
    }
}
