//! What went over the wire: the kernel notes every packet's source, destination and protocol as it passes the
//! fabric. Nothing is sampled, nothing can be missed, and it costs one hash look-up a packet.

use super::host::Host;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::IpAddr;

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

/// Starts noting. ARP and neighbour discovery are not noted.
pub fn watch(fab: &Host) {
    fab.nft(
        "table bridge wire {
           set seen4 { type ipv4_addr . ipv4_addr . inet_proto; size 1048576; flags dynamic; }
           set seen6 { type ipv6_addr . ipv6_addr . inet_proto; size 1048576; flags dynamic; }
           chain pass { type filter hook prerouting priority -300; policy accept;
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
