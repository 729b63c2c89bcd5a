//! Trials of devices and routes.

use super::{Need, NeedState};
use egret_nft::netlink::{self, Attributes, Error, NETLINK_ROUTE, NLM_F_CREATE, NLM_F_EXCL, Socket};
use nix::libc;

// include/uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTA_DST: u16 = 1;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;
const RTN_BLACKHOLE: u8 = 6;
const RTN_UNREACHABLE: u8 = 7;
const RTN_THROW: u8 = 9;
// include/uapi/linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_GBP: u16 = 23;
// include/uapi/linux/if_addr.h
const IFA_LOCAL: u16 = 2;
const IFA_RT_PRIORITY: u16 = 9;
/// `ifaddrmsg`: family, prefix length, flags, scope, index.
const IFADDRMSG: usize = 8;
// include/uapi/linux/fib_rules.h
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;

/// A routing table that is none of the three that always exist.
const TABLE: u32 = 7871;

/// Tries the tunnel device, pods' devices, and policy routing.
pub fn run() -> Vec<Need> {
    let mut socket = match Socket::open(NETLINK_ROUTE) {
        Ok(socket) => socket,
        Err(e) => return vec![Need::missing("rtnetlink", format!("error: {e}"), "needs CONFIG_NET")],
    };
    vec![
        tunnel(vxlan(&mut socket)),
        veth(device(&mut socket, "egt0", "veth", |_| {})),
        Need::tried(
            "addresses' metric",
            address_metric(&mut socket, IFA_RT_PRIORITY),
            "by which egress IPs are recognised",
            "needs Linux 4.18: without it Egret could not tell its own addresses from others, and adds none",
        ),
        routed(unanswered(&mut socket)),
        ipv4(routing(&mut socket, libc::AF_INET as u8)),
        optional_ipv6(routing(&mut socket, libc::AF_INET6 as u8)),
    ]
}

/// The tunnel device, by a trial's result.
pub(super) fn tunnel(result: Result<(), impl ToString>) -> Need {
    Need::tried(
        "VXLAN",
        result.map_err(|e| e.to_string()),
        "with group-based policy",
        "the tunnel needs CONFIG_VXLAN (module vxlan); some distributions ship it in a package of extra modules",
    )
}

/// Pods' interfaces and the pair of veths before the tunnel device, by a trial's result.
pub(super) fn veth(result: Result<(), impl ToString>) -> Need {
    Need::tried("veth", result.map_err(|e| e.to_string()), "pods' interfaces", "needs CONFIG_VETH (module veth)")
}

/// Egress IPs that the node's own router announces, by a trial's result.
fn routed(result: Result<(), String>) -> Need {
    let need = Need::tried(
        "announce: Route",
        result,
        "an address for which nobody answers ARP",
        "gateways with announce: Route cannot be used here; report this with the kernel's version",
    );
    // Most clusters have no such gateway.
    if need.state == NeedState::Missing { Need { state: NeedState::Warn, ..need } } else { need }
}

/// Policy routing in IPv4, by a trial's result.
pub(super) fn ipv4(result: Result<(), impl ToString>) -> Need {
    Need::tried(
        "policy routing, IPv4",
        result.map_err(|e| e.to_string()),
        "by mark, with throw and unreachable",
        "needs CONFIG_IP_ADVANCED_ROUTER and CONFIG_IP_MULTIPLE_TABLES",
    )
}

/// Policy routing in IPv6, by a trial's result.
pub(super) fn ipv6(result: Result<(), impl ToString>) -> Need {
    Need::tried(
        "policy routing, IPv6",
        result.map_err(|e| e.to_string()),
        "by mark, with throw and unreachable",
        "needs CONFIG_IPV6_MULTIPLE_TABLES; without it there is no egress in IPv6",
    )
}

/// On a host without IPv6, Egret works for IPv4 alone.
fn optional_ipv6(result: Result<(), Error>) -> Need {
    let without = matches!(&result, Err(e) if matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)));
    let need = ipv6(result);
    if without { Need { state: NeedState::Warn, ..need } } else { need }
}

fn vxlan(socket: &mut Socket) -> Result<(), Error> {
    device(socket, "egt1", "vxlan", |data| {
        data.attribute(IFLA_VXLAN_ID, &1u32.to_ne_bytes());
        data.attribute(IFLA_VXLAN_PORT, &7871u16.to_be_bytes());
        data.attribute(IFLA_VXLAN_LEARNING, &[0]);
        data.attribute(IFLA_VXLAN_GBP, &[]);
    })
}

fn device(socket: &mut Socket, name: &str, kind: &str, data: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
    // ifinfomsg: any family, any type, a new index.
    let mut message = vec![0; 16];
    message.text(IFLA_IFNAME, name);
    message.nested(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, kind);
        info.nested(IFLA_INFO_DATA, data);
    });
    socket.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &message)
}

/// Adds an address with Egret's metric in the attribute `kind`, and reads it back: a kernel that does not know the
/// attribute passes over it and reports no error.
fn address_metric(socket: &mut Socket, kind: u16) -> Result<(), String> {
    const LO: u32 = 1;
    let metric = crate::datapath::names::ADDRESS_METRIC.to_ne_bytes();
    let mut message = vec![libc::AF_INET as u8, 32, 0, 0];
    message.extend(LO.to_ne_bytes());
    message.attribute(IFA_LOCAL, &[192, 0, 2, 1]);
    message.attribute(kind, &metric);
    socket.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &message).map_err(|e| e.to_string())?;
    let all = vec![libc::AF_INET as u8, 0, 0, 0, 0, 0, 0, 0];
    let stored = socket.dump(
        RTM_GETADDR,
        &all,
        || false,
        |stored, address| {
            let attributes = address.get(IFADDRMSG..).unwrap_or_default();
            *stored |= netlink::attributes(attributes).any(|(k, value)| k == IFA_RT_PRIORITY && value == metric);
        },
    );
    match stored {
        Ok(true) => Ok(()),
        Ok(false) => Err("the kernel does not store it".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// Adds an address of the host, and in front of it a blackhole route in the table `local`. The kernel then answers no ARP
/// for the address, if it finds the route: with an error (`fib_props`, net/ipv4/fib_semantics.c).
fn unanswered(socket: &mut Socket) -> Result<(), String> {
    const LO: u32 = 1;
    const ADDRESS: [u8; 4] = [192, 0, 2, 2];
    let mut address = vec![libc::AF_INET as u8, 32, 0, 0];
    address.extend(LO.to_ne_bytes());
    address.attribute(IFA_LOCAL, &ADDRESS);
    socket.request(RTM_NEWADDR, NLM_F_CREATE, &address).map_err(|e| e.to_string())?;
    let table = crate::datapath::names::TABLE_LOCAL as u8;
    // rtmsg: family, prefix lengths, TOS, table, protocol, scope, type, flags.
    let (ip, protocol) = (libc::AF_INET as u8, crate::datapath::names::PROTOCOL);
    let mut route = vec![ip, 32, 0, 0, table, protocol, 0, RTN_BLACKHOLE, 0, 0, 0, 0];
    route.attribute(RTA_DST, &ADDRESS);
    socket.request(RTM_NEWROUTE, NLM_F_CREATE, &route).map_err(|e| e.to_string())?;
    let mut wanted = vec![ip, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    wanted.attribute(RTA_DST, &ADDRESS);
    match socket.get(RTM_GETROUTE, &wanted) {
        Err(e) if e.errno() == Some(libc::EINVAL) => Ok(()),
        Err(e) => Err(e.to_string()),
        Ok(_) => Err("the kernel finds its own route for the address first".into()),
    }
}

fn routing(socket: &mut Socket, family: u8) -> Result<(), Error> {
    // fib_rule_hdr: family, prefix lengths, TOS, table (in an attribute), two reserved, action, flags.
    let mut rule = vec![family, 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
    rule.attribute(FRA_PRIORITY, &72u32.to_ne_bytes());
    rule.attribute(FRA_FWMARK, &0x8000_0000u32.to_ne_bytes());
    rule.attribute(FRA_FWMASK, &0xc000_0000u32.to_ne_bytes());
    rule.attribute(FRA_TABLE, &TABLE.to_ne_bytes());
    rule.attribute(FRA_PROTOCOL, &[crate::datapath::names::PROTOCOL]);
    socket.request(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &rule)?;
    for (kind, priority) in [(RTN_THROW, 1u32), (RTN_UNREACHABLE, 2)] {
        // rtmsg: family, prefix lengths, TOS, table (in an attribute), protocol, scope, type, flags.
        let mut route = vec![family, 0, 0, 0, 0, crate::datapath::names::PROTOCOL, 0, kind, 0, 0, 0, 0];
        route.attribute(RTA_TABLE, &TABLE.to_ne_bytes());
        route.attribute(RTA_PRIORITY, &priority.to_ne_bytes());
        socket.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &route)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    mod needs_root {
        use super::super::*;
        use nix::sched::{CloneFlags, unshare};

        /// As Linux before 4.18 passes over IFA_RT_PRIORITY, this one passes over a number that it does not know.
        #[test]
        fn a_kernel_that_does_not_store_the_metric_is_detected() {
            let trial = std::thread::spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                address_metric(&mut Socket::open(NETLINK_ROUTE).unwrap(), 60)
            });
            assert_eq!(trial.join().unwrap(), Err("the kernel does not store it".to_owned()));
        }
    }
}
