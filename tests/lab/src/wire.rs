//! What went over the wire: the kernel notes every packet's source, destination and protocol as it passes the
//! fabric. Nothing is sampled, nothing can be missed, and it costs one hash look-up a packet.

use super::host::Host;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Packets of one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    /// Who they say they are from.
    pub from: IpAddr,
    /// Where they went.
    pub to: IpAddr,
    /// `tcp`, `udp`, `icmp`, `ipv6-icmp`, or a number.
    pub protocol: String,
    /// How many.
    pub packets: u64,
}

/// Starts noting. ARP and neighbour discovery are not noted, nor what a node answers as a router of the nodes' link: that
/// a host of it is elsewhere (a redirect) or not reachable. The former owner of an egress IP says so to a server that has
/// not learned of the change.
pub fn watch(fab: &Host) {
    fab.nft(
        "table bridge wire {
           set seen4 { type ipv4_addr . ipv4_addr . inet_proto; size 1048576; flags dynamic; }
           set seen6 { type ipv6_addr . ipv6_addr . inet_proto; size 1048576; flags dynamic; }
           chain pass { type filter hook prerouting priority -300; policy accept;
             icmp type redirect @th,192,24 0xc00002 accept
             icmp type destination-unreachable icmp code host-unreachable @th,192,24 0xc00002 accept
             icmpv6 type destination-unreachable icmpv6 code addr-unreachable @th,256,64 0x20010db800000000 accept
             ether type ip update @seen4 { ip saddr . ip daddr . ip protocol counter }
             ether type ip6 icmpv6 type { 130-137, 143 } accept
             ether type ip6 update @seen6 { ip6 saddr . ip6 daddr . meta l4proto counter }
           }
         }",
    );
}

/// All that was noted.
pub fn seen(fab: &Host) -> Vec<Seen> {
    let text = fab.run(["nft", "-j", "list", "table", "bridge", "wire"]);
    let all: Value = serde_json::from_str(&text).expect("nft's JSON");
    let mut seen = Vec::new();
    for element in
        all["nftables"].as_array().into_iter().flatten().filter_map(|o| o["set"]["elem"].as_array()).flatten()
    {
        let element = &element["elem"];
        let key = &element["val"]["concat"];
        let address = |i: usize| key[i].as_str().and_then(|t| t.parse().ok());
        let (Some(from), Some(to)) = (address(0), address(1)) else { panic!("not understood: {element}") };
        let protocol = key[2].as_str().map_or_else(|| key[2].to_string(), str::to_owned);
        let packets = element["counter"]["packets"].as_u64().expect("a counter");
        seen.push(Seen { from, to, protocol, packets });
    }
    seen.sort();
    seen
}

/// The source addresses of all packets to `to`.
pub fn sources(fab: &Host, to: IpAddr) -> BTreeSet<IpAddr> {
    seen(fab).into_iter().filter(|s| s.to == to).map(|s| s.from).collect()
}

/// Forgets what was noted.
pub fn forget(fab: &Host) {
    fab.nft("flush set bridge wire seen4; flush set bridge wire seen6");
}

/// The flags of the group-based policy as the kernel writes them: the receiver does not learn the sender's address
/// (`VXLAN_GBP_DONT_LEARN`).
pub const AS_THE_KERNEL: u8 = 0x40;

/// A packet of Egret's tunnel without its outer headers: VXLAN with group-based policy (draft-smith-vxlan-group-policy), and in
/// it a request by UDP over IPv4. `flags` are those of the policy: [`AS_THE_KERNEL`], or none.
pub fn tunnel_payload(
    flags: u8,
    [to_mac, from_mac]: [&[u8]; 2],
    allocation: u16,
    from: SocketAddr,
    to: SocketAddr,
) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!("IPv4") };
    let sum =
        |words: &[u8]| words.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum::<u32>();
    let folded = |sum: u32| !((((sum & 0xffff) + (sum >> 16)) & 0xffff) as u16);
    let addresses = [source.octets(), destination.octets()].concat();
    let mut udp = [&from.port().to_be_bytes()[..], &to.port().to_be_bytes(), &[0, 11, 0, 0], b"who"].concat();
    let check = folded(sum(&udp) + sum(&addresses) + 17 + 11);
    udp[6..8].copy_from_slice(&check.to_be_bytes());
    let mut ip = [&[0x45, 0, 0, 31, 0, 1, 0x40, 0, 64, 17, 0, 0][..], &addresses].concat();
    let check = folded(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let vxlan = [&[0x88, flags][..], &allocation.to_be_bytes(), &7871u32.to_be_bytes()[1..], &[0]].concat();
    [&vxlan[..], to_mac, from_mac, &[0x08, 0x00], &ip, &udp].concat()
}
