//! The hosts, and the wires between them. The addresses are documentation's (RFC 5737, RFC 3849).
//!
//! ```text
//! n1 (routed pods: ptp)     ---+                              +--- ext 192.0.2.100, 2001:db8::100
//! n2 (bridged pods: bridge) ---+--- fab, one L2 network ------+
//! g1 (gateway, routed pods) ---+    192.0.2.0/24              +--- router 192.0.2.1, 2001:db8::1 --- far 203.0.113.100
//! g2 (gateway, bridged)     ---+    2001:db8::/64                                                  2001:db8:2::100
//! ```

use super::cni::Conflist;
use super::host::{Host, checked};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// The outside server.
pub const EXT4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
/// The outside server.
pub const EXT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
/// The server behind the router.
pub const FAR4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
/// The server behind the router.
pub const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x100);

/// How a node's pods are connected, and by which CNI plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// `ptp` and `host-local`: a route for each pod.
    Routed,
    /// `bridge`, `host-local` and `portmap`: one bridge.
    Bridged,
}

/// Which tool wrote the CNI's masquerade rule on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masquerade {
    /// `iptables` and `ip6tables`, whichever of the two tools the machine has by these names.
    Iptables,
    /// `iptables-nft` and `ip6tables-nft`.
    IptablesNft,
    /// `iptables-legacy` and `ip6tables-legacy`.
    IptablesLegacy,
    /// `nft`.
    Nftables,
}

/// A node as a test asks for it.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its name, also its Kubernetes name.
    pub name: String,
    /// The last part of its addresses: `192.0.2.11` and `2001:db8::11`.
    pub last: u8,
    /// How its pods are connected.
    pub pods: Pods,
    /// Who masquerades them.
    pub masquerade: Masquerade,
    /// Whether it bears the label `egret.dev/gateway: "true"`.
    pub gateway: bool,
}

impl NodeSpec {
    /// An ordinary node.
    pub fn new(name: &str, last: u8, pods: Pods) -> NodeSpec {
        let masquerade = if name == "n2" { Masquerade::Nftables } else { Masquerade::Iptables };
        NodeSpec { name: name.to_owned(), last, pods, masquerade, gateway: false }
    }

    /// A gateway node.
    pub fn gateway(name: &str, last: u8, pods: Pods) -> NodeSpec {
        NodeSpec { gateway: true, ..NodeSpec::new(name, last, pods) }
    }
}

/// A node of the lab.
pub struct Node {
    /// Its namespace.
    pub host: Host,
    /// What was asked for.
    pub spec: NodeSpec,
    /// N in its pod networks `10.244.N.0/24` and `fd00:244:N::/64`.
    pub number: u8,
    /// A directory of its own: the CNI's state, Egret's run directory.
    pub directory: PathBuf,
    /// What the runtime on it runs for each pod.
    pub conflist: Mutex<Conflist>,
}

impl std::ops::Deref for Node {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    /// Its address.
    pub fn ipv4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.spec.last)
    }

    /// Its address; `192.0.2.11` goes with `2001:db8::11`.
    pub fn ipv6(&self) -> Ipv6Addr {
        format!("2001:db8::{}", self.spec.last).parse().expect("an IPv6 address")
    }

    /// Its pods' network.
    pub fn pods4(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    /// Egret's run directory on it.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Egret's state directory on it, which outlives a reboot.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The path of the daemon's socket for the plugin.
    pub fn cni_socket(&self) -> PathBuf {
        self.run_dir().join("cni.sock")
    }

    /// Egret's entry in the node's conflist.
    pub fn cni_entry(&self) -> Value {
        json!({"type": "egret-cni", "socket": self.cni_socket(), "stateDir": self.state_dir()})
    }

    /// Replaces what the runtime runs for each pod.
    pub fn set_conflist(&self, conflist: Conflist) {
        *self.conflist.lock().expect("a lock") = conflist;
    }

    /// Its pods' network.
    pub fn pods6(&self) -> String {
        format!("fd00:244:{}::/64", self.number)
    }
}

/// Makes namespaces `LAB-NAME`, in one go.
pub fn namespaces(lab: &str, names: &[&str]) {
    checked(&["ip", "-batch", "-"], Some(&names.iter().map(|n| format!("netns add {lab}-{n}\n")).collect::<String>()));
}

/// The network that everything is plugged into.
pub fn fabric(lab: &str) -> Host {
    let fab = Host::open("fab", &format!("{lab}-fab"));
    // A bridge that passes its frames through iptables would track and defragment what it should only carry.
    for table in ["iptables", "ip6tables", "arptables"] {
        let _ = fab.within(|| std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{table}"), "0"));
    }
    fab.ip_batch(&[
        "link set lo up".into(),
        "link add br0 type bridge mcast_snooping 0".into(),
        "link set br0 up".into(),
    ]);
    fab
}

/// Plugs a host into the fabric, by its `eth0`.
pub fn plug(fab: &Host, host: &Host, last: u8) {
    host.sysctl(&["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.default.accept_ra=0"]);
    host.ip_batch(&[
        "link set lo up".into(),
        format!("link add eth0 type veth peer name p-{} netns {}", host.name, fab.netns),
        format!("addr add 192.0.2.{last}/24 dev eth0"),
        format!("addr add 2001:db8::{last}/64 dev eth0 nodad"),
        "link set eth0 up".into(),
    ]);
    fab.ip(&format!("link set p-{} master br0 up", host.name));
}

/// What breaks egress gateways in the field: strict reverse-path filtering, `src_valid_mark` (set by WireGuard and by
/// Calico), bridge netfilter; and forwarding, which every node has on.
pub fn node_sysctls(host: &Host) {
    host.sysctl(&[
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
        "net.ipv4.conf.all.rp_filter=1",
        "net.ipv4.conf.default.rp_filter=1",
        "net.ipv4.conf.all.src_valid_mark=1",
    ]);
    if host.within(|| std::path::Path::new("/proc/sys/net/bridge").exists()) {
        host.sysctl(&["net.bridge.bridge-nf-call-iptables=1", "net.bridge.bridge-nf-call-ip6tables=1"]);
    } else {
        eprintln!("lab: no br_netfilter in this kernel; bridged pods are tested without it");
    }
}

/// Routes to the other nodes' pods, and to the rest by the router if there is one.
pub fn node_routes(node: &Node, nodes: &[Arc<Node>], router: bool) {
    let mut lines = Vec::new();
    for other in nodes.iter().filter(|o| o.number != node.number) {
        lines.push(format!("route add {} via {}", other.pods4(), other.ipv4()));
        lines.push(format!("route add {} via {}", other.pods6(), other.ipv6()));
    }
    if router {
        lines.push("route add default via 192.0.2.1".into());
        lines.push("route add default via 2001:db8::1".into());
    }
    node.ip_batch(&lines);
}

/// The CNI's own masquerade rule.
pub fn masquerade(node: &Node) {
    match node.spec.masquerade {
        Masquerade::Iptables | Masquerade::IptablesNft | Masquerade::IptablesLegacy => {
            let programs = match node.spec.masquerade {
                Masquerade::IptablesLegacy => ["iptables-legacy-restore", "ip6tables-legacy-restore"],
                Masquerade::IptablesNft => ["iptables-nft-restore", "ip6tables-nft-restore"],
                _ => ["iptables-restore", "ip6tables-restore"],
            };
            let of = [(node.pods4(), "10.244.0.0/16"), (node.pods6(), "fd00:244::/32")];
            for (program, (own, cluster)) in programs.into_iter().zip(of) {
                node.feed(
                    [program],
                    &format!(
                        "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -s {own} ! -d {cluster} -j MASQUERADE\nCOMMIT\n"
                    ),
                );
            }
        }
        Masquerade::Nftables => {
            node.nft(&format!(
                "table inet cni-masquerade {{\n chain post {{ type nat hook postrouting priority srcnat;\n  \
                 ip saddr {} ip daddr != 10.244.0.0/16 masquerade\n  \
                 ip6 saddr {} ip6 daddr != fd00:244::/32 masquerade\n }}\n}}\n",
                node.pods4(),
                node.pods6()
            ));
        }
    }
}

/// The router at `192.0.2.1`, and the network behind it with its one host.
pub fn behind_the_router(router: &Host, far: &Host) {
    router.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]);
    far.sysctl(&["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.default.accept_ra=0"]);
    router.ip_batch(&[
        format!("link add eth1 type veth peer name eth0 netns {}", far.netns),
        "addr add 203.0.113.1/24 dev eth1".into(),
        "addr add 2001:db8:2::1/64 dev eth1 nodad".into(),
        "link set eth1 up".into(),
    ]);
    far.ip_batch(&[
        "link set lo up".into(),
        format!("addr add {FAR4}/24 dev eth0"),
        format!("addr add {FAR6}/64 dev eth0 nodad"),
        "link set eth0 up".into(),
        "route add default via 203.0.113.1".into(),
        "route add default via 2001:db8:2::1".into(),
    ]);
}
