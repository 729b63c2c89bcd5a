//! Gateways with an uplink of their own beside the nodes' network: a second L2 network with a server on it.

use super::host::Host;
use super::topology;
use super::{Lab, Node, Server, manifests};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// The egress IP of the scene there.
pub const EGRESS: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(198, 51, 100, 50), Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0x50));
/// The server on that network.
pub const OUTSIDE: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 1));

/// The network of the uplinks, and who is on it.
pub struct OwnUplinks {
    /// The network, with the server's address on it.
    pub host: Host,
    _server: Server,
}

/// What the gateways' own uplink is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The interface `eth1`.
    Plain,
    /// `eth1.100`, the VLAN 100 on `eth1`.
    Vlan,
    /// The VLAN 100 on `eth1`, whose interface the gateway's `vlan` is to make. The nodes have no address there.
    OwnVlan,
    /// `bond1`, of which one of `eth1` and `eth2` is used at a time.
    Bond,
    /// `eth1` in the VRF [`VRF`], with the server's host as the router.
    Vrf,
}

/// The VRF of [`Kind::Vrf`].
pub const VRF: &str = "blue";
/// A server behind the router there.
pub const BEHIND: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(203, 0, 113, 9), Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 9));

impl Kind {
    /// The name of the interface that has the addresses.
    pub fn interface(self) -> &'static str {
        match self {
            Kind::Plain | Kind::Vrf | Kind::OwnVlan => "eth1",
            Kind::Vlan => "eth1.100",
            Kind::Bond => "bond1",
        }
    }

    /// Connects a node's uplink with the bridge of the network's host.
    fn plug(self, node: &Node, host: &Host) {
        let pairs = if self == Kind::Bond { 2 } else { 1 };
        for n in 1..=pairs {
            let port = if n == 1 { format!("p-{}", node.name) } else { format!("q-{}", node.name) };
            node.ip_batch(&[
                format!("link add eth{n} type veth peer name {port} netns {}", host.netns),
                format!("link set eth{n} {}", if self == Kind::Bond { "down" } else { "up" }),
            ]);
            if matches!(self, Kind::Vlan | Kind::OwnVlan) {
                host.ip_batch(&[
                    format!("link set {port} up"),
                    format!("link add {port}.100 link {port} type vlan id 100"),
                    format!("link set {port}.100 master br0 up"),
                ]);
            } else {
                host.ip(&format!("link set {port} master br0 up"));
            }
        }
        match self {
            Kind::Plain | Kind::OwnVlan => {}
            Kind::Vlan => node.ip_batch(&["link add eth1.100 link eth1 type vlan id 100".into()]),
            Kind::Vrf => node.ip_batch(&[
                format!("link add {VRF} type vrf table 10"),
                format!("link set {VRF} up"),
                format!("link set eth1 master {VRF}"),
            ]),
            Kind::Bond => node.ip_batch(&[
                "link add bond1 type bond mode active-backup miimon 50".into(),
                "link set eth1 master bond1".into(),
                "link set eth2 master bond1".into(),
            ]),
        }
    }
}

/// Gives the gateways their uplinks, and pods of namespace `shop` the egress IP there. Waits until all nodes have it.
pub fn scene(lab: &Lab) -> OwnUplinks {
    scene_of(lab, Kind::Plain)
}

/// As [`scene`], with another kind of uplink.
pub fn scene_of(lab: &Lab, kind: Kind) -> OwnUplinks {
    topology::namespaces(lab.name(), &["up"]);
    let host = Host::open("up", &format!("{}-up", lab.name()));
    host.sysctl(&["net.ipv6.conf.default.accept_dad=0"]);
    host.ip_batch(&[
        "link set lo up".into(),
        "link add br0 type bridge mcast_snooping 0".into(),
        format!("addr add {}/24 dev br0", OUTSIDE.0),
        format!("addr add {}/64 dev br0 nodad", OUTSIDE.1),
        "link set br0 up".into(),
    ]);
    if kind == Kind::Vrf {
        host.ip_batch(&[
            format!("addr add {}/32 dev br0", BEHIND.0),
            format!("addr add {}/128 dev br0 nodad", BEHIND.1),
        ]);
    }
    let interface = kind.interface();
    for node in lab.nodes().iter().filter(|node| node.spec.gateway) {
        kind.plug(node, &host);
        node.ip(&format!("link set {interface} up"));
        if kind == Kind::OwnVlan {
            // As on most nodes. Without any route to the server, loose source validation drops what comes from it.
            node.ip_batch(&[
                format!("route add 0.0.0.0/0 via {} dev eth0", topology::EXT4),
                format!("route add ::/0 via {} dev eth0", topology::EXT6),
            ]);
            continue;
        }
        node.ip_batch(&[
            format!("addr add 198.51.100.{}/24 dev {interface}", node.spec.last),
            format!("addr add 2001:db8:51::{}/64 dev {interface} nodad", node.spec.last),
        ]);
        if kind == Kind::Vrf {
            // As Documentation/networking/vrf.rst has it: what the VRF has no route for is not looked up in the main table.
            node.ip_batch(&[
                "route add unreachable 0.0.0.0/0 table 10 metric 4278198272".into(),
                "route add unreachable ::/0 table 10 metric 4278198272".into(),
                format!("route add 0.0.0.0/0 via {} dev eth1 table 10", OUTSIDE.0),
                format!("route add ::/0 via {} dev eth1 table 10", OUTSIDE.1),
                // The main table has a default route, as on most nodes, and it leads elsewhere. Without any, what comes from
                // the server through the tunnel is dropped by loose source validation.
                format!("route add 0.0.0.0/0 via {} dev eth0", topology::EXT4),
                format!("route add ::/0 via {} dev eth0", topology::EXT6),
            ]);
        }
    }
    // Distributions' usual setting: these have no route to that network.
    for node in lab.nodes().iter().filter(|node| !node.spec.gateway) {
        node.sysctl(&["net.ipv4.conf.all.rp_filter=0"]);
    }
    let server = Server::start(&host);
    let spec = format!("podSelector: {{}}\n  address: {{ ipv4: {}, ipv6: \"{}\" }}", EGRESS.0, EGRESS.1);
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "own", &spec));
    set_gateway(
        lab,
        &match kind {
            Kind::Vrf => format!("  interface: {interface}\n{}", next_hop()),
            Kind::OwnVlan => vlan(100),
            _ => format!("  interface: {interface}\n"),
        },
    );
    lab.start();
    OwnUplinks { host, _server: server }
}

/// Sets the gateway, with `more` of its spec.
pub fn set_gateway(lab: &Lab, more: &str) {
    let gateway = manifests::gateway("default", &["198.51.100.50-198.51.100.59", "2001:db8:51::50-2001:db8:51::59"]);
    lab.write_manifest("gateway.yaml", &(gateway + more));
}

/// The server's host as the gateway's next hop.
pub fn next_hop() -> String {
    format!("  nextHop: {{ ipv4: {}, ipv6: \"{}\" }}\n", OUTSIDE.0, OUTSIDE.1)
}

/// A VLAN on `eth1` as the gateway's uplink.
pub fn vlan(id: u16) -> String {
    format!("  interface: eth1\n  vlan: {id}\n{}", next_hop())
}

/// The nodes that have both of the egress IP's addresses.
pub fn holders(lab: &Lab) -> Vec<String> {
    let has = |node: &&Arc<Node>| {
        let all = node.ip("-o addr");
        all.contains(&format!(" {}/32 ", EGRESS.0)) && all.contains(&format!(" {}/128 ", EGRESS.1))
    };
    lab.nodes().iter().filter(has).map(|node| node.name.clone()).collect()
}

/// The server and the egress IP of both families.
pub fn both() -> [(IpAddr, IpAddr); 2] {
    [(OUTSIDE.0.into(), EGRESS.0.into()), (OUTSIDE.1.into(), EGRESS.1.into())]
}

/// The server behind the router of [`Kind::Vrf`] and the egress IP, of both families.
pub fn behind_router() -> [(IpAddr, IpAddr); 2] {
    [(BEHIND.0.into(), EGRESS.0.into()), (BEHIND.1.into(), EGRESS.1.into())]
}
