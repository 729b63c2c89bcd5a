//! The interfaces on which the programs stand.

use super::Wanted;
use anyhow::{Context, Result};
use egret_bpf::{Hook, Link, Program, Programs, programs_at};
use egret_nft::netlink::{NETLINK_ROUTE, Socket, attributes};
use std::collections::{BTreeMap, BTreeSet};

/// Message types, include/uapi/linux/rtnetlink.h.
const RTM_GETLINK: u16 = 18;
const RTM_GETQDISC: u16 = 38;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const TCA_KIND: u16 = 1;
/// `ARPHRD_ETHER`, include/uapi/linux/if_arp.h.
const ETHERNET: u16 = 1;
/// Lengths of `struct ifinfomsg`, `tcmsg`.
const IFINFOMSG: usize = 16;
const TCMSG: usize = 20;

/// The programs on one interface.
#[derive(Debug)]
struct Attached {
    leave: Program,
    _links: [Link; 2],
}

/// The interfaces with programs.
#[derive(Debug, Default)]
pub(super) struct Devices {
    attached: BTreeMap<u32, Attached>,
}

impl Devices {
    /// Puts the programs onto the interfaces that are wanted, and takes them from others, and from those where somebody
    /// else has a program or a filter for packets that come in: a packet that goes the fast way would pass it by. Returns
    /// the interfaces without programs, and why.
    pub(super) fn apply(&mut self, programs: &Programs, wanted: &Wanted) -> Result<BTreeMap<String, String>> {
        let mut roles: BTreeMap<u32, Program> = wanted.pods.iter().map(|index| (*index, Program::LeavePod)).collect();
        roles.extend(wanted.uplinks.iter().map(|index| (*index, Program::LeaveUplink)));
        roles.extend((wanted.tunnel != 0).then_some((wanted.tunnel, Program::LeaveTunnel)));
        self.attached.retain(|index, attached| roles.get(index) == Some(&attached.leave));
        let mut socket = Socket::open(NETLINK_ROUTE).context("netlink")?;
        let filtered = filtered(&mut socket).context("queueing disciplines")?;
        let mut without = BTreeMap::new();
        for (index, leave) in roles {
            let interface = match Interface::read(&mut socket, index) {
                // It has gone meanwhile.
                None => continue,
                Some(interface) => interface,
            };
            if let Err(why) = self.attach(programs, index, leave, &interface, &filtered) {
                self.attached.remove(&index);
                without.insert(interface.name, why);
            }
        }
        Ok(without)
    }

    /// Takes all programs away.
    pub(super) fn clear(&mut self) {
        self.attached.clear();
    }

    fn attach(
        &mut self,
        programs: &Programs,
        index: u32,
        leave: Program,
        interface: &Interface,
        filtered: &BTreeSet<u32>,
    ) -> Result<(), String> {
        if filtered.contains(&index) {
            return Err("another program filters or limits the packets that come in by it (tc)".to_owned());
        }
        if interface.kind != ETHERNET {
            return Err("it is no Ethernet device".to_owned());
        }
        if leave == Program::LeavePod && interface.has_master {
            return Err("it is a port of a bridge".to_owned());
        }
        let own = u32::from(self.attached.contains_key(&index));
        match programs_at(index, Hook::Ingress) {
            Ok(all) if all > own => return Err("another eBPF program takes the packets that come in by it".to_owned()),
            Ok(all) if all == own && own == 1 => return Ok(()),
            // The interface is another one with the same index.
            Ok(_) => drop(self.attached.remove(&index)),
            Err(e) => return Err(format!("{e}: programs at interfaces (tcx) came with Linux 6.6")),
        }
        let attach =
            |program| programs.attach(program, index).map_err(|e| format!("an eBPF program cannot be attached: {e}"));
        // First where leases are given, which nothing uses without the other.
        let links = [attach(leave)?, attach(Program::Enter)?];
        self.attached.insert(index, Attached { leave, _links: links });
        Ok(())
    }
}

/// What must be known of an interface.
#[derive(Debug)]
struct Interface {
    name: String,
    kind: u16,
    has_master: bool,
}

impl Interface {
    fn read(socket: &mut Socket, index: u32) -> Option<Interface> {
        let mut request = [0; IFINFOMSG];
        request[4..8].copy_from_slice(&index.to_ne_bytes());
        let answer = socket.get(RTM_GETLINK, &request).ok()?;
        let kind = u16::from_ne_bytes(answer.get(2..4)?.try_into().ok()?);
        let (mut name, mut has_master) = (String::new(), false);
        for (kind, value) in attributes(answer.get(IFINFOMSG..)?) {
            match kind {
                IFLA_IFNAME => name = egret_nft::netlink::string(value),
                IFLA_MASTER => has_master = true,
                _ => {}
            }
        }
        Some(Interface { name, kind, has_master })
    }
}

/// The interfaces with a queueing discipline that can filter what comes in.
fn filtered(socket: &mut Socket) -> Result<BTreeSet<u32>, egret_nft::netlink::Error> {
    socket.dump(RTM_GETQDISC, &[0; TCMSG], BTreeSet::new, |found, message| {
        let index = message.get(4..8).and_then(|index| index.try_into().ok()).map(u32::from_ne_bytes);
        let kinds = attributes(message.get(TCMSG..).unwrap_or_default()).filter(|(kind, _)| *kind == TCA_KIND);
        let filters = |value: &[u8]| matches!(&*egret_nft::netlink::string(value), "ingress" | "clsact");
        if kinds.map(|(_, value)| value).any(filters) {
            found.extend(index);
        }
    })
}
