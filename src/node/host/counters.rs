//! The kernel's counters: dropped packets, changed ports, and the traffic of each allocation.

use super::Host;
use crate::datapath::ruleset::{self, Direction};
use crate::model::marks::EgressId;
use crate::node::forwarding::FirstPackets;
use anyhow::Result;
use egret_nft::Count;
use egret_nft::conntrack;
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::collections::BTreeMap;

impl Host {
    /// Reads the kernel's counters: dropped packets by reason, changed ports, and the traffic of each allocation, as a
    /// source node and as a gateway.
    pub fn counts(&mut self) -> Result<Counts> {
        let mut counts = Counts { drops: self.nft.counters(ruleset::INET)?, ..Counts::default() };
        counts.other_ports = counts.drops.remove(ruleset::counter::OTHER_PORT).unwrap_or_default();
        counts.first_packets = first_packets(&mut counts.drops);
        let of_bridge = self.nft.counters(ruleset::BRIDGE)?;
        for (name, count) in self.nft.counters(ruleset::NETDEV)?.into_iter().chain(of_bridge) {
            let sum = counts.drops.entry(name).or_default();
            (sum.packets, sum.bytes) = (sum.packets + count.packets, sum.bytes + count.bytes);
        }
        counts.insertions_failed = conntrack::insertions_failed(&mut Socket::open(NETLINK_NETFILTER)?)?;
        for (set, into) in [(ruleset::set::EGRESS_ID_OUT, &mut counts.sent), (ruleset::set::RX, &mut counts.forwarded)]
        {
            for (key, count) in self.nft.element_counters(ruleset::INET, set)? {
                if let Some(mark) = ruleset::mark_in(&key) {
                    into.push(((mark & self.marks.egress_id_mask()) as EgressId, count));
                }
            }
        }
        counts.beyond_bandwidth = self.beyond_bandwidth()?;
        Ok(counts)
    }

    /// The packets beyond the bandwidths of egress IPs. Nodes without limits do not have these sets.
    fn beyond_bandwidth(&mut self) -> Result<BTreeMap<(Direction, EgressId), Count>> {
        let mut all: BTreeMap<(Direction, EgressId), Count> = BTreeMap::new();
        for (set, direction, allocations) in self.shared.beyond_bandwidth() {
            for (key, count) in self.nft.element_counters(ruleset::INET, set)? {
                if let Some(id) = allocations.get(&key) {
                    let sum = all.entry((direction, *id)).or_default();
                    (sum.packets, sum.bytes) = (sum.packets + count.packets, sum.bytes + count.bytes);
                }
            }
        }
        Ok(all)
    }

    /// The number of stale packets, which were dropped because their connection is older than their allocation, and
    /// the counters of connections' first packets.
    pub fn stale_and_first_packets(&mut self) -> Result<(u64, [FirstPackets; 2])> {
        let mut counters = self.nft.counters(ruleset::INET)?;
        let stale = counters.get(ruleset::counter::STALE).map_or(0, |count| count.packets);
        Ok((stale, first_packets(&mut counters)))
    }
}

/// Removes the counters of first packets from all counters.
fn first_packets(counters: &mut BTreeMap<String, Count>) -> [FirstPackets; 2] {
    let mut packets = |name: &str| counters.remove(name).unwrap_or_default().packets;
    [0, 1].map(|at| FirstPackets {
        entered: packets(ruleset::counter::ENTERED[at]),
        forwarded: packets(ruleset::counter::FORWARDED[at]),
    })
}

/// The counters that [`Host::counts`] reads.
#[derive(Debug, Default)]
pub struct Counts {
    /// Dropped packets by the names in [`ruleset::counter`].
    pub drops: BTreeMap<String, Count>,
    /// First packets of other nodes' pods' connections, of IPv4 and of IPv6.
    pub first_packets: [FirstPackets; 2],
    /// First packets of connections that left from another port than their pod's.
    pub other_ports: Count,
    /// Packets of connections whose place in the kernel's table another one had.
    pub insertions_failed: u64,
    /// What this node's pods sent, by allocation.
    pub sent: Vec<(EgressId, Count)>,
    /// What other nodes' pods sent through this gateway, by allocation.
    pub forwarded: Vec<(EgressId, Count)>,
    /// What was beyond the bandwidth of an egress IP and was dropped, by direction and allocation.
    pub beyond_bandwidth: BTreeMap<(Direction, EgressId), Count>,
}
