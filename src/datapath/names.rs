//! The names and numbers under which Egret's things stand in the kernel.

use crate::model::mac::Mac;
use crate::model::uplink_key::CODES;
use ipnetwork::Ipv6Network;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The tunnel device.
pub const DEVICE: &str = "egret";
/// The group that the tunnel device is in, and no other interface (`IFLA_GROUP`): rules know the device by it, for a
/// number is compared faster than a name.
pub const DEVICE_GROUP: u32 = 7871;
/// The nftables tables `inet egret` and `netdev egret`.
pub const TABLE: &str = "egret";
/// The nftables table `inet egret-guard`: see `datapath/guard.rs`.
pub const GUARD: &str = "egret-guard";

/// Routing table of requests: a pod's packets to their gateway.
pub const TABLE_REQUEST: u32 = 7871;
/// Routing table of replies: a gateway's packets back to the pod's node.
pub const TABLE_REPLY: u32 = 7872;
/// Routing table of quarantined pods: the cluster's networks, and nothing else.
pub const TABLE_QUARANTINE: u32 = 7873;
/// Routing table of selected pods' packets on which nothing has decided: the cluster's networks, and nothing else.
pub const TABLE_GUARD: u32 = 7874;
/// Routing tables of gateways' own uplinks: this number plus the uplink's index, 1 to 511.
pub const TABLE_UPLINK: u32 = 7880;

/// How many uplinks of their own gateways can have on a node.
pub const UPLINKS: u32 = 511;

/// Whether a routing table is Egret's, by its number.
pub fn is_own_table(table: u32) -> bool {
    matches!(table, TABLE_REQUEST | TABLE_REPLY | TABLE_QUARANTINE | TABLE_GUARD)
        || (TABLE_UPLINK + 1..=TABLE_UPLINK + UPLINKS).contains(&table)
}

/// Priority of the quarantine's routing rules. All of Egret's stand before the ones that usual CNIs add.
pub const RULE_QUARANTINE: u32 = 71;
/// Priority of the rule for requests.
pub const RULE_REQUEST: u32 = 72;
/// Priority of the rule for replies.
pub const RULE_REPLY: u32 = 73;
/// Priority of the rules for gateways' own uplinks.
pub const RULE_UPLINK: u32 = 74;
/// Priority of the rules for packets on which nothing has decided.
pub const RULE_GUARD: u32 = 75;

/// The protocol number that Egret's routes, rules and addresses carry (`RTA_PROTOCOL`, `FRA_PROTOCOL`,
/// `IFA_PROTO`), by which it knows its own. Not taken in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 71;

/// The one next hop inside the tunnel. It exists nowhere: the egress chain of the device replaces its MAC address.
pub const TUNNEL_NEXT_HOP4: Ipv4Addr = Ipv4Addr::new(169, 254, 78, 1);
/// As [`TUNNEL_NEXT_HOP4`], for IPv6.
pub const TUNNEL_NEXT_HOP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xe);
/// The tunnel next hop's MAC address.
pub const TUNNEL_NEXT_HOP_MAC: [u8; 6] = [0x02, 0x65, 0x67, 0xff, 0xff, 0xff];
/// The tunnel device's own address, on every node the same. A device without any IPv4 address drops all IPv4 that
/// arrives on it unless rp_filter is 0 (`fib_validate_source`, net/ipv4/fib_frontend.c).
pub const DEVICE4: Ipv4Addr = Ipv4Addr::new(169, 254, 78, 71);
/// The length of the prefix that [`TUNNEL_NEXT_HOP4`] and [`DEVICE4`] share.
pub const NETWORK4: u8 = 25;

/// A node asks from an address in this network whether others live: its tunnel MAC address is the rest.
pub const ASKING: Ipv6Network = link_local(0x6501, 80);
/// A gateway's node answers, while all of its uplinks work, at an address in this network: as [`ASKING`].
pub const HEALTH: Ipv6Network = link_local(0x6502, 80);
/// A gateway's node answers, for each of its uplinks that works and each family, at an address in this network. Before the
/// tunnel MAC address stands the uplink's code (`UplinkKey::code`), of 11 bits.
pub const UPLINK_HEALTH: Ipv6Network = link_local(0x6800, 69);

const fn link_local(role: u16, prefix: u8) -> Ipv6Network {
    match Ipv6Network::new_checked(Ipv6Addr::new(0xfe80, 0, 0, 0, role, 0, 0, 0), prefix) {
        Some(network) => network,
        None => panic!("no prefix length"),
    }
}

/// Whether a node answers at this address that it lives, or that one of its uplinks does.
pub fn is_health(address: Ipv6Addr) -> bool {
    HEALTH.contains(address) || UPLINK_HEALTH.contains(address)
}

/// The address in [`UPLINK_HEALTH`] of the node with this tunnel MAC address for the uplink with this code.
pub fn of_uplink(code: u16, mac: Mac) -> Ipv6Addr {
    let mut segments = of_mac(UPLINK_HEALTH, mac).segments();
    segments[4] |= code & (CODES - 1);
    segments.into()
}

/// The address in [`ASKING`] or [`HEALTH`] of the node with this tunnel MAC address.
pub fn of_mac(network: Ipv6Network, mac: Mac) -> Ipv6Addr {
    let mut octets = network.network().octets();
    octets[10..].copy_from_slice(&mac);
    octets.into()
}

/// Whether the tunnel device has this address for itself: it stays as long as the device does.
pub fn is_devices_own(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a == DEVICE4,
        IpAddr::V6(a) => ASKING.contains(a),
    }
}

/// UDP port of the tunnel.
pub const TUNNEL_PORT: u16 = 7871;
/// VXLAN network identifier of the tunnel.
pub const TUNNEL_VNI: u32 = 7871;
