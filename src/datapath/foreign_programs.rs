//! Other programs' eBPF at the veths of pods, where it can take packets past nf_tables.

use crate::datapath::filters;
use egret_bpf::{Hook, programs_at};
use egret_nft::netlink::{Error, NETLINK_ROUTE, Socket};
use nix::libc::EPERM;
use nix::net::if_::if_nametoindex;
use std::io;

/// Interfaces of CNIs whose eBPF takes packets from pods' veths: Cilium's (also GKE's Dataplane V2), Calico's eBPF
/// dataplane.
const DEVICES: [&str; 2] = [CILIUM, "bpfin.cali"];
const CILIUM: &str = "cilium_host";

/// The device of such a CNI on this host, if there is one.
pub fn device() -> Option<&'static str> {
    DEVICES.into_iter().find(|name| if_nametoindex(*name).is_ok())
}

/// Whether such a CNI writes the identities of pods into packets' marks.
pub fn writes_marks() -> bool {
    if_nametoindex(CILIUM).is_ok()
}

/// The program whose eBPF is at pods' veths, as far as its devices tell, and what to do so that packets take the kernel's
/// way.
pub fn remedy() -> (&'static str, &'static str) {
    match device() {
        Some(CILIUM) => (
            "Cilium",
            "set its bpf.hostLegacyRouting=true (enable-host-legacy-routing) and restart its agents, or allow the probe to \
             198.51.100.71 and 2001:db8:7871::1, UDP port 9, if a network policy denies it",
        ),
        Some(_) => ("Calico's eBPF dataplane", "use its iptables or nftables dataplane"),
        None => ("another program's eBPF", "make it pass packets to the kernel's stack"),
    }
}

/// Whether another program's eBPF sees first what comes in by the interface with this index. `own` is the number of
/// programs of this process there.
///
/// # Errors
/// The filters cannot be read.
pub fn is_at(socket: &mut Socket, index: u32, own: u32) -> Result<bool, Error> {
    if has_filter(socket, index)? {
        return Ok(true);
    }
    Ok(match programs_at(index, Hook::Ingress) {
        Ok(all) => all > own,
        // The kernel may tell it to a process with CAP_BPF alone, or a seccomp profile may forbid bpf(2).
        Err(e) if e.raw_os_error() == Some(EPERM) => device().is_some(),
        // Before Linux 6.6 there are filters alone. Or the interface is gone.
        Err(_) => false,
    })
}

/// A socket for [`is_at`].
///
/// # Errors
/// As socket(2).
pub fn open() -> io::Result<Socket> {
    Socket::open(NETLINK_ROUTE)
}

/// Whether the interface has a filter of kind `bpf` for packets that come in.
fn has_filter(socket: &mut Socket, index: u32) -> Result<bool, Error> {
    filters::read(socket, index, || false, |found, kind, _| *found |= kind == "bpf")
}
