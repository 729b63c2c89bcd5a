//! The interfaces on which the programs stand.

use super::Wanted;
use crate::datapath::filters::filtered;
use crate::datapath::names::DEVICE;
use anyhow::{Context, Result};
use egret_bpf::{Hook, Link, Program, Programs, programs_at};
use egret_nft::netlink::{NETLINK_ROUTE, Socket, attributes, string};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Message types, include/uapi/linux/rtnetlink.h.
const RTM_GETLINK: u16 = 18;
const IFLA_IFNAME: u16 = 3;
const IFLA_QDISC: u16 = 6;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
/// `ARPHRD_ETHER`, include/uapi/linux/if_arp.h.
const ETHERNET: u16 = 1;
/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;

/// The programs on one interface.
#[derive(Debug)]
struct Attached {
    role: Role,
    _links: [Link; 2],
}

/// What packets come in by an interface, and leave by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A selected pod's.
    Pod,
    /// The tunnel device's.
    Tunnel,
    /// A gateway's, to and from servers, and between nodes.
    Uplink,
    /// Those between nodes.
    Underlay,
}

impl Role {
    /// The program for packets that come in, and the one for packets that leave.
    const fn programs(self) -> [Program; 2] {
        match self {
            Role::Pod => [Program::Enter, Program::LeavePod],
            Role::Tunnel => [Program::Enter, Program::LeaveTunnel],
            Role::Uplink => [Program::EnterUplink, Program::LeaveUplink],
            Role::Underlay => [Program::EnterUnderlay, Program::LeaveUplink],
        }
    }
}

/// The interfaces with programs.
#[derive(Debug, Default)]
pub(super) struct Devices {
    attached: BTreeMap<u32, Attached>,
}

/// What has become of what was wanted.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// The interfaces without programs, and why.
    pub(super) without: BTreeMap<String, String>,
    /// The interfaces to other nodes that tunnel packets reach by the tunnel device alone, and why.
    pub(super) by_device: BTreeMap<String, String>,
    /// The other nodes' ends of the tunnel to which tunnel packets may pass the tunnel device by, and the interface to each.
    pub(super) nodes: BTreeMap<IpAddr, u32>,
}

impl Devices {
    /// Puts the programs onto the interfaces that are wanted, and takes them from others, and from those where somebody
    /// else has a program or a filter for packets that come in: a packet that goes the fast way would pass it by.
    pub(super) fn apply(&mut self, programs: &Programs, wanted: &Wanted) -> Result<Applied> {
        let underlay: BTreeSet<u32> = wanted.nodes.values().copied().collect();
        let mut roles: BTreeMap<u32, Role> = underlay.iter().map(|index| (*index, Role::Underlay)).collect();
        roles.extend(wanted.pods.iter().map(|index| (*index, Role::Pod)));
        roles.extend(wanted.uplinks.iter().map(|index| (*index, Role::Uplink)));
        roles.extend(wanted.tunnel.map(|tunnel| (tunnel.device, Role::Tunnel)));
        self.attached.retain(|index, attached| roles.get(index) == Some(&attached.role));
        let mut socket = Socket::open(NETLINK_ROUTE).context("netlink")?;
        let filtered = filtered(&mut socket).context("queueing disciplines")?;
        let (mut applied, mut plain, mut tunnel) = (Applied::default(), BTreeSet::new(), None);
        for (index, role) in roles {
            let interface = match Interface::read(&mut socket, index) {
                // It has gone meanwhile.
                None if role == Role::Tunnel => {
                    tunnel = Some("it has gone".to_owned());
                    continue;
                }
                None => continue,
                Some(interface) => interface,
            };
            let attached = self.attach(programs, index, role, &interface, &filtered);
            if role == Role::Tunnel {
                tunnel = attached.as_ref().err().cloned().or_else(|| interface.sees_tunnel_packets(index));
            } else if underlay.contains(&index) && attached.is_ok() {
                match interface.is_plain() {
                    Ok(()) => drop(plain.insert(index)),
                    Err(why) => drop(applied.by_device.insert(interface.name.clone(), why)),
                }
            }
            if let Err(why) = attached {
                self.attached.remove(&index);
                let by_role = if role == Role::Underlay { &mut applied.by_device } else { &mut applied.without };
                by_role.insert(interface.name, why);
            }
        }
        match tunnel {
            Some(why) => drop(applied.by_device.insert(DEVICE.to_owned(), why)),
            None => applied.nodes.extend(wanted.nodes.iter().filter(|(_, index)| plain.contains(*index))),
        }
        Ok(applied)
    }

    /// Takes all programs away.
    pub(super) fn clear(&mut self) {
        self.attached.clear();
    }

    fn attach(
        &mut self,
        programs: &Programs,
        index: u32,
        role: Role,
        interface: &Interface,
        filtered: &BTreeSet<u32>,
    ) -> Result<(), String> {
        if filtered.contains(&index) {
            return Err("another program filters or limits the packets that come in by it (tc)".to_owned());
        }
        if interface.kind != ETHERNET {
            return Err("it is no Ethernet device".to_owned());
        }
        if role == Role::Pod && interface.has_master {
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
        let [enter, leave] = role.programs();
        let links = [attach(leave)?, attach(enter)?];
        self.attached.insert(index, Attached { role, _links: links });
        Ok(())
    }
}

/// What must be known of an interface.
#[derive(Debug, Default)]
struct Interface {
    name: String,
    kind: u16,
    has_master: bool,
    /// What makes it, if it is a virtual one (`IFLA_INFO_KIND`).
    virtual_kind: String,
    /// The queueing discipline of packets that leave.
    qdisc: String,
}

impl Interface {
    fn read(socket: &mut Socket, index: u32) -> Option<Interface> {
        let mut request = [0; IFINFOMSG];
        request[4..8].copy_from_slice(&index.to_ne_bytes());
        let answer = socket.get(RTM_GETLINK, &request).ok()?;
        let kind = u16::from_ne_bytes(answer.get(2..4)?.try_into().ok()?);
        let mut interface = Interface { kind, ..Interface::default() };
        for (kind, value) in attributes(answer.get(IFINFOMSG..)?) {
            match kind {
                IFLA_IFNAME => interface.name = string(value),
                IFLA_QDISC => interface.qdisc = string(value),
                IFLA_MASTER => interface.has_master = true,
                IFLA_LINKINFO => {
                    let of = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    interface.virtual_kind = of.map(|(_, value)| string(value)).unwrap_or_default();
                }
                _ => {}
            }
        }
        Some(interface)
    }

    /// Whether tunnel packets may be written to it and read from it as they are on the wire. A bridge, a bond or a VLAN has more
    /// to do with them.
    fn is_plain(&self) -> Result<(), String> {
        if self.has_master {
            return Err("it belongs to another device".to_owned());
        }
        if !["", "veth"].contains(&&*self.virtual_kind) {
            return Err(format!("it is a virtual device of the kind {}", self.virtual_kind));
        }
        Ok(())
    }

    /// Why all packets must pass it, the tunnel device, if so.
    fn sees_tunnel_packets(&self, index: u32) -> Option<String> {
        if self.qdisc != "noqueue" {
            return Some(format!("it has the queueing discipline {}", self.qdisc));
        }
        let others = programs_at(index, Hook::Egress).is_ok_and(|all| all > 1);
        others.then(|| "another eBPF program takes the packets that leave by it".to_owned())
    }
}
