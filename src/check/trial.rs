//! Trials of the kernel's features, in a temporary network namespace.

use super::{Need, NeedState, links, nf_tables};
use egret_nft::conntrack;
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::net::Ipv4Addr;

/// Creates a network namespace, and tries everything in it.
pub fn run() -> Vec<Need> {
    // The namespace belongs to the thread and ends with it, also if this process is killed.
    let trials = std::thread::spawn(|| {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
            let remedy =
                "run the check as root (CAP_SYS_ADMIN) on a kernel with CONFIG_NET_NS; nothing else could be tried";
            return vec![Need::missing("network namespace", format!("error: {e}"), remedy)];
        }
        let mut all = vec![raw_sockets()];
        all.extend(links::run());
        all.extend(nf_tables::run());
        all.push(connections());
        all
    });
    trials.join().unwrap_or_else(|_| {
        vec![Need {
            name: "trials",
            state: NeedState::Missing,
            found: "the trials panicked".into(),
            remedy: "report this with the output above".into(),
        }]
    })
}

/// Tries to delete tracked connections.
fn connections() -> Need {
    let ended = Socket::open(NETLINK_NETFILTER).map_err(anyhow::Error::from).and_then(|mut socket| {
        Ok(conntrack::delete_by_address(&mut socket, &[Ipv4Addr::LOCALHOST.into()].into(), |_| true)?)
    });
    let remedy = "needs CONFIG_NF_CT_NETLINK (module nf_conntrack_netlink): without it, connections outlive the \
                  policies and pods that they belong to";
    let ended = ended.map(drop).map_err(|e| format!("{e:#}"));
    Need::tried("conntrack, forgetting", ended, "connections by address", remedy)
}

/// Tries raw sockets: Egret sends its own ARP and neighbour discovery frames, and probes gateways.
fn raw_sockets() -> Need {
    let open = |family, kind, protocol| socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).map(drop);
    let packet = open(AddressFamily::Packet, SockType::Raw, None);
    // Without IPv6 there is nothing to announce in it.
    let icmpv6 = match open(AddressFamily::Inet6, SockType::Raw, Some(SockProtocol::IcmpV6)) {
        Err(nix::Error::EAFNOSUPPORT) => Ok(()),
        other => other,
    };
    Need::tried("raw sockets", packet.and(icmpv6), "packet and ICMPv6", "needs CONFIG_PACKET and CAP_NET_RAW")
}
