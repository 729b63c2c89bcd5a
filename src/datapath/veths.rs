//! A pair of veths in the host's own network namespace, by the names of its ends.

use crate::datapath::route_socket::{Change, RouteSocket, errno};
use crate::datapath::sysctl;
use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use nix::libc::ENODEV;
use rtnetlink::{LinkUnspec, LinkVeth};

/// Two names of interfaces, and what the pair is for, in the text of an error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) ends: [&'static str; 2],
    pub(super) purpose: &'static str,
}

impl Names {
    /// Both ends as they are. The pair is created if it does not exist.
    ///
    /// # Errors
    /// Another interface has one of the names, or the kernel lacks veth.
    pub(super) async fn ensure(self, socket: &RouteSocket) -> Result<[LinkMessage; 2]> {
        let (mut first, mut second) = self.find(socket).await?;
        if !are_a_pair(first.as_ref(), second.as_ref()) {
            if let Some(one) = first.or(second) {
                self.delete(socket, &one).await?;
            }
            self.create(socket).await?;
            (first, second) = self.find(socket).await?;
        }
        let (Some(first), Some(second)) = (first, second) else {
            bail!("{} vanished just after its creation", self.ends[0])
        };
        Ok([first, second])
    }

    /// Switches IPv6 off on the second end, which receives nothing for the host, and with `ipv6` on on the first one, without
    /// router advertisements.
    ///
    /// # Errors
    /// /proc/sys cannot be written.
    pub(super) fn set_ipv6(self, ipv6: bool) -> Result<()> {
        let [first, second] = self.ends;
        let of_second = format!("ipv6/conf/{second}/disable_ipv6");
        if sysctl::get(&of_second)?.is_some() {
            sysctl::ensure(&of_second, "1")?;
        }
        if ipv6 {
            sysctl::ensure(&format!("ipv6/conf/{first}/disable_ipv6"), "0")?;
            sysctl::ensure(&format!("ipv6/conf/{first}/accept_ra"), "0")?;
        }
        Ok(())
    }

    /// Removes the pair. Returns whether it existed. Interfaces of these names that are no veths are another program's
    /// and stay.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(super) async fn remove(self, socket: &RouteSocket) -> Result<bool> {
        for name in self.ends {
            if let Some(device) = find(socket, name).await?.filter(is_veth) {
                self.delete(socket, &device).await?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn find(self, socket: &RouteSocket) -> Result<(Option<LinkMessage>, Option<LinkMessage>)> {
        Ok((find(socket, self.ends[0]).await?, find(socket, self.ends[1]).await?))
    }

    async fn delete(self, socket: &RouteSocket, device: &LinkMessage) -> Result<()> {
        let Names { ends: [first, second], purpose } = self;
        if !is_veth(device) {
            bail!(
                "there is an interface {first} or {second} already, and it is no veth; rename it or remove it, Egret needs \
                 the names for its {purpose}"
            );
        }
        let about = format!("remove the devices {first} and {second}");
        let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_index(device.header.index).build());
        socket.apply(vec![Change { message, flags: 0, done_already: &[ENODEV], about }]).await.map(drop)
    }

    async fn create(self, socket: &RouteSocket) -> Result<()> {
        let [first, second] = self.ends;
        let message = RouteNetlinkMessage::NewLink(LinkVeth::new(first, second).build());
        let about = format!("create the devices {first} and {second}");
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        socket.apply(vec![Change { message, flags, done_already: &[], about }]).await.map(drop)
    }
}

async fn find(socket: &RouteSocket, name: &str) -> Result<Option<LinkMessage>> {
    match socket.get(RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build())).await {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        Ok(_) => bail!("cannot read the device {name}: the kernel's response is no link message"),
        Err(e) if errno(&e) == Some(ENODEV) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read the device {name}")),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    let is_veth = |info: &LinkInfo| *info == LinkInfo::Kind(InfoKind::Veth);
    link.attributes.iter().any(|a| matches!(a, LinkAttribute::LinkInfo(infos) if infos.iter().any(is_veth)))
}

fn are_a_pair(first: Option<&LinkMessage>, second: Option<&LinkMessage>) -> bool {
    let (Some(first), Some(second)) = (first, second) else { return false };
    is_veth(first) && is_veth(second) && first.attributes.contains(&LinkAttribute::Link(second.header.index))
}

/// Sets attributes and flags of a device, and sets it up. `what` says what is set, in the text of an error.
///
/// # Errors
/// The kernel's refusal.
pub(super) async fn adjust(
    socket: &RouteSocket,
    device: &LinkMessage,
    wanted: Vec<LinkAttribute>,
    flags: LinkFlags,
    what: &str,
) -> Result<()> {
    let has_flags = device.header.flags.contains(flags | LinkFlags::Up);
    if has_flags && wanted.iter().all(|attribute| device.attributes.contains(attribute)) {
        return Ok(());
    }
    let change = LinkUnspec::new_with_index(device.header.index).up();
    let change = wanted.into_iter().fold(change, |change, attribute| change.append_extra_attribute(attribute));
    let mut change = change.build();
    change.header.flags |= flags;
    change.header.change_mask |= flags;
    let message = RouteNetlinkMessage::SetLink(change);
    socket.apply(vec![Change { message, flags: 0, done_already: &[], about: what.to_owned() }]).await.map(drop)
}
