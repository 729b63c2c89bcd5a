//! Gateways with an uplink of their own, `eth1`, beside the nodes' network: a second L2 network with a server on it.

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

/// Gives the gateways their uplinks, and pods of namespace `shop` the egress IP there. Waits until all nodes have it.
pub fn scene(lab: &Lab) -> OwnUplinks {
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
    for node in lab.nodes().iter().filter(|node| node.spec.gateway) {
        node.ip_batch(&[
            format!("link add eth1 type veth peer name p-{} netns {}", node.name, host.netns),
            format!("addr add 198.51.100.{}/24 dev eth1", node.spec.last),
            format!("addr add 2001:db8:51::{}/64 dev eth1 nodad", node.spec.last),
            "link set eth1 up".into(),
        ]);
        host.ip(&format!("link set p-{} master br0 up", node.name));
    }
    // Distributions' usual setting: these have no route to that network.
    for node in lab.nodes().iter().filter(|node| !node.spec.gateway) {
        node.sysctl(&["net.ipv4.conf.all.rp_filter=0"]);
    }
    let server = Server::start(&host);
    let spec = format!("podSelector: {{}}\n  address: {{ ipv4: {}, ipv6: \"{}\" }}", EGRESS.0, EGRESS.1);
    lab.write_manifest("policy.yaml", &manifests::policy("shop", "own", &spec));
    let gateway = manifests::gateway("default", &["198.51.100.50-198.51.100.59", "2001:db8:51::50-2001:db8:51::59"]);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  interface: eth1\n"));
    lab.start();
    OwnUplinks { host, _server: server }
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
