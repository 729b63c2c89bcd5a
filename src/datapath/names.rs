//! Names and numbers of Egret's objects in the kernel: devices, tables, rules, addresses.

use crate::model::uplink_key::CODES;
/// The numbers that the plugin uses, too.
pub use egret_cni::quarantine::{
    PROTOCOL, RULE_QUARANTINE, RULE_QUARANTINE_REDIRECTED, TABLE_QUARANTINE, TABLE_REDIRECTED,
};
use egret_nft::mac::Mac;
use ipnetwork::Ipv6Network;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The tunnel device.
pub const DEVICE: &str = "egret";
/// Where devices have no egress hook: the device that packets are routed into, see `datapath/veth_pair.rs`.
pub const OUT_DEVICE: &str = "egret-out";
/// The peer of [`OUT_DEVICE`].
pub const HOP_DEVICE: &str = "egret-hop";
/// The device with the egress IPs that the node's own router announces, and the other end of its pair of veths: see
/// `datapath/route_device.rs`.
pub const ROUTE_DEVICE: [&str; 2] = ["egret-ip", "egret-ip-end"];
/// Begins the names of VLAN interfaces that Egret makes; the index of the parent, a point and the VLAN's number follow: see
/// `datapath/vlan.rs`.
pub const VLAN_DEVICE: &str = "egret";
/// Devices on which every node has the addresses of all Services: kube-proxy's in IPVS mode
/// (`DefaultDummyDevice`, pkg/proxy/ipvs) and kube-router's. They do not tell which node has an address.
pub const DEVICES_OF_SERVICES: [&str; 2] = ["kube-ipvs0", "kube-dummy-if"];
/// The metric of Egret's own addresses (`IFA_RT_PRIORITY`, Linux 4.18). It has no effect, as these addresses have no
/// route of a prefix, and the kernel stores it: kernels before 5.18 store no protocol number of an address.
pub const ADDRESS_METRIC: u32 = 7871;
/// The interface group of the tunnel device, and of [`OUT_DEVICE`] (`IFLA_GROUP`). Rules match the device by it, because the kernel
/// compares a number faster than a name.
pub const DEVICE_GROUP: u32 = 7871;
/// The nftables tables `inet egret` and `netdev egret`.
pub const TABLE: &str = "egret";
/// The nftables table `inet egret-flush-guard`: see `datapath/ruleset/flush_guard.rs`.
pub const FLUSH_GUARD: &str = "egret-flush-guard";

/// The nftables tables that make the kernel tell of a packet's way, one for each trace that runs at the same time: see
/// `datapath/trace_table.rs`.
pub const TRACES: [&str; 4] = ["egret-trace", "egret-trace-2", "egret-trace-3", "egret-trace-4"];
/// The device by which a probe comes into a pod's veth, and its other end: see `datapath/probe.rs`.
pub const PROBE_DEVICE: [&str; 2] = ["egret-probe", "egret-probe-end"];

/// Routing table of requests: packets from pods to their gateway.
pub const TABLE_REQUEST: u32 = 7871;
/// Routing table of replies: packets from a gateway back to the pod's node.
pub const TABLE_REPLY: u32 = 7872;
/// Routing table of selected pods' packets on which nothing has decided: it contains the cluster's networks alone.
pub const TABLE_FLUSH_GUARD: u32 = 7874;
/// Routing tables of gateways with an uplink of their own: this number plus the uplink's index, 1 to 510.
pub const TABLE_UPLINK: u32 = 7880;

/// The largest number of gateways' own uplinks on a node: see `Marks::uplink`.
pub const UPLINKS: u32 = 510;

/// The kernel's table of the host's own addresses (`RT_TABLE_LOCAL`, include/uapi/linux/rtnetlink.h). Egret has routes in
/// it for egress IPs on [`ROUTE_DEVICE`] only.
pub const TABLE_LOCAL: u32 = 255;
/// The kernel's main table (`RT_TABLE_MAIN`). Egret has no routes in it.
pub const TABLE_MAIN: u32 = 254;

/// Whether a routing table's number is one of Egret's.
pub fn is_own_table(table: u32) -> bool {
    matches!(table, TABLE_REQUEST | TABLE_REPLY | TABLE_QUARANTINE | TABLE_FLUSH_GUARD | TABLE_REDIRECTED)
        || (TABLE_UPLINK + 1..=TABLE_UPLINK + UPLINKS).contains(&table)
}

/// Priority of the rule for requests. Of the rules, the quarantine's alone come before it.
pub const RULE_REQUEST: u32 = 72;
/// Priority of the rule for replies.
pub const RULE_REPLY: u32 = 73;
/// Priority of the rules for gateways' own uplinks.
pub const RULE_UPLINK: u32 = 74;
/// Priority of the rules for packets on which nothing has decided.
pub const RULE_FLUSH_GUARD: u32 = 75;
/// Priority of the rules for packets of selected pods that another program's eBPF redirects, see
/// `datapath/redirected.rs`.
pub const RULE_REDIRECTED: u32 = 76;
/// Priority of the rules for those whose route the program looks up itself.
pub const RULE_FOUND_BY_PROGRAM: u32 = 77;
/// Priority of the rule for replies to this node's pods that came in by a VRF. The kernel's rule for VRFs has the
/// priority 1000 (`FIB_RULE_PREF`, drivers/net/vrf.c).
pub const RULE_FROM_VRF: u32 = 78;
/// Priority of the rules for source validation of packets that leave by a VRF.
pub const RULE_TO_VRF: u32 = 79;

/// The tunnel next hop: the one next hop in the tunnel. No host has it; the device's egress chain replaces its MAC
/// address.
pub const TUNNEL_NEXT_HOP4: Ipv4Addr = Ipv4Addr::new(169, 254, 78, 1);
/// As [`TUNNEL_NEXT_HOP4`], for IPv6.
pub const TUNNEL_NEXT_HOP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xe);
/// The tunnel next hop's MAC address.
pub const TUNNEL_NEXT_HOP_MAC: [u8; 6] = [0x02, 0x65, 0x67, 0xff, 0xff, 0xff];
/// The tunnel device's own address, the same on every node. A device without an IPv4 address drops all IPv4 packets
/// that arrive on it unless rp_filter is 0 (`fib_validate_source`, net/ipv4/fib_frontend.c).
pub const DEVICE4: Ipv4Addr = Ipv4Addr::new(169, 254, 78, 71);
/// The length of the prefix that [`TUNNEL_NEXT_HOP4`] and [`DEVICE4`] share.
pub const NETWORK4: u8 = 25;

/// The network of the addresses from which nodes send liveness probes. The rest of an address is the node's tunnel MAC
/// address.
pub const PROBER: Ipv6Network = link_local(0x6501, 80);
/// The network of health addresses. A gateway node has one while all of its uplinks work. The rest of an address is
/// as in [`PROBER`].
pub const HEALTH: Ipv6Network = link_local(0x6502, 80);
/// The network of uplinks' health addresses. A gateway node has one for each family of each uplink that works. The
/// uplink's code (`UplinkKey::code`), of 11 bits, precedes the tunnel MAC address.
pub const UPLINK_HEALTH: Ipv6Network = link_local(0x6800, 69);

const fn link_local(role: u16, prefix: u8) -> Ipv6Network {
    match Ipv6Network::new_checked(Ipv6Addr::new(0xfe80, 0, 0, 0, role, 0, 0, 0), prefix) {
        Some(network) => network,
        None => panic!("no prefix length"),
    }
}

/// Whether an interface has the name of one that Egret makes for a VLAN.
pub fn is_vlan_device(name: &str) -> bool {
    let numbers = name.strip_prefix(VLAN_DEVICE).and_then(|numbers| numbers.split_once('.'));
    numbers.is_some_and(|(parent, id)| parent.parse::<u32>().is_ok() && id.parse::<u16>().is_ok())
}

/// Whether `address` is a health address of a node or of an uplink.
pub fn is_health(address: Ipv6Addr) -> bool {
    HEALTH.contains(address) || UPLINK_HEALTH.contains(address)
}

/// The address in [`UPLINK_HEALTH`] of the node with this tunnel MAC address for the uplink with this code.
pub fn of_uplink(code: u16, mac: Mac) -> Ipv6Addr {
    let mut segments = of_mac(UPLINK_HEALTH, mac).segments();
    segments[4] |= code & (CODES - 1);
    segments.into()
}

/// The address in [`PROBER`] or [`HEALTH`] of the node with this tunnel MAC address.
pub fn of_mac(network: Ipv6Network, mac: Mac) -> Ipv6Addr {
    let mut octets = network.network().octets();
    octets[10..].copy_from_slice(&mac);
    octets.into()
}

/// Whether this is one of the tunnel device's own addresses, which stay as long as the device.
pub fn is_devices_own(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a == DEVICE4,
        IpAddr::V6(a) => PROBER.contains(a),
    }
}

/// The tunnel's default UDP port.
pub const TUNNEL_PORT: u16 = 7871;
/// The tunnel's default VXLAN network identifier.
pub const TUNNEL_VNI: u32 = 7871;
