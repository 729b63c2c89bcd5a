//! Gateways whose nodes announce their egress IPs to a router by BGP: the egress IPs are in no network of the lab.

use super::fault_injection::answered_by_after;
use super::frr::{Frr, Neighbour};
use super::survival::sessions_with;
use super::topology::{FAR4, FAR6, Node};
use super::{Lab, LabBuilder, Pod, Session, VISITOR, manifests};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The egress IP of the scene.
pub const EGRESS: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(198, 51, 100, 50), Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0x50));
/// The server behind the router, both ways.
pub const SERVERS: [IpAddr; 2] = [IpAddr::V4(FAR4), IpAddr::V6(FAR6)];
/// The pool of the scene's gateway.
pub const POOL: [&str; 2] = ["198.51.100.48/28", "2001:db8:51::50-2001:db8:51::5f"];
/// The AS numbers of the router and of the nodes.
const ROUTER: u32 = 65000;
const NODES: u32 = 65001;
/// What nodes announce: the addresses on Egret's device.
const POLICY: &str = "route-map egress permit 10\n match interface egret-ip\n";

/// The lab and the routers.
pub struct Routed {
    /// FRR by host. It ends before the lab.
    pub frr: BTreeMap<String, Frr>,
    /// The lab.
    pub lab: Lab,
}

impl std::ops::Deref for Routed {
    type Target = Lab;
    fn deref(&self) -> &Lab {
        &self.lab
    }
}

/// The gateway of the scene.
pub fn gateway() -> String {
    manifests::gateway("default", &POOL) + "  announce: Route\n"
}

/// The policy of the scene: pods of `shop` with the label `app: visitor` leave from [`EGRESS`].
pub fn policy() -> String {
    let (v4, v6) = EGRESS;
    let spec =
        format!("podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {v4}, ipv6: \"{v6}\" }}");
    manifests::policy("shop", "visitors", &spec)
}

impl Routed {
    /// The usual lab with a router, and FRR on it and on the gateway nodes.
    pub fn scene() -> Routed {
        Routed::of(Lab::builder())
    }

    /// The same with more settings.
    pub fn of(builder: LabBuilder) -> Routed {
        let routed = Routed::without_egret(builder);
        routed.write_manifest("gateway.yaml", &gateway());
        routed.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
        routed.write_manifest("policy.yaml", &policy());
        routed.start();
        for node in routed.nodes() {
            let pod = routed.add_pod(&node.name, "shop", &format!("probe-{}", node.name), VISITOR);
            routed.served(&pod);
            pod.delete();
        }
        routed.forget_wire();
        routed
    }

    /// The lab and the routers, before Egret is started.
    pub fn without_egret(builder: LabBuilder) -> Routed {
        let lab = builder.router().build();
        let gateways: Vec<Arc<Node>> = lab.nodes().iter().filter(|node| node.spec.gateway).cloned().collect();
        let router = Neighbour { addresses: ["192.0.2.1".to_owned(), "2001:db8::1".to_owned()], number: ROUTER };
        let mut frr = BTreeMap::new();
        let speaker = |node: &Arc<Node>| Neighbour {
            addresses: [node.ipv4().to_string(), node.ipv6().to_string()],
            number: NODES,
        };
        let peers: Vec<Neighbour> = gateways.iter().map(speaker).collect();
        let directory = lab.directory().join("router-frr");
        let several = "  maximum-paths 4\n";
        let of_router = Frr::start(lab.host("router"), &directory, (ROUTER, "192.0.2.1"), &peers, several, "");
        frr.insert("router".to_owned(), of_router);
        for node in &gateways {
            let redistribute = "  redistribute connected route-map egress\n";
            let (id, peers) = (node.ipv4().to_string(), std::slice::from_ref(&router));
            let of_node = Frr::start(node, &node.directory.join("frr"), (NODES, &id), peers, redistribute, POLICY);
            frr.insert(node.name.clone(), of_node);
        }
        // A host on the router's link would take an owner's address from a redirect, and keep it.
        lab.host("router").sysctl(&["net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0"]);
        Routed { frr, lab }
    }

    /// The nodes that have an address of the egress IP.
    pub fn holders(&self) -> Vec<String> {
        let has = |node: &&Arc<Node>| {
            let all = node.ip("-o addr");
            all.contains(&format!(" {}/32 ", EGRESS.0)) || all.contains(&format!(" {}/128 ", EGRESS.1))
        };
        self.nodes().iter().filter(has).map(|node| node.name.clone()).collect()
    }

    /// The node that has the egress IP, and the other gateway node.
    #[track_caller]
    pub fn owner_and_other(&self) -> (String, String) {
        let holders = self.holders();
        let [owner] = holders.as_slice() else { panic!("it is on {holders:?}") };
        let other = if owner == "g1" { "g2" } else { "g1" };
        (owner.clone(), other.to_owned())
    }

    /// Waits until the pod leaves from the egress IP, by both families.
    #[track_caller]
    pub fn served(&self, pod: &Pod) {
        for (server, egress) in both() {
            self.wait_for(&format!("{server} to see {}", pod.name), &Some(egress), || pod.udp_who(server).ok());
        }
    }

    /// Panics unless the pod leaves from the egress IP at once, by TCP and UDP, IPv4 and IPv6.
    #[track_caller]
    pub fn assert_leaves_by_egress(&self, pod: &Pod) {
        for (server, egress) in both() {
            assert_eq!(pod.udp_who_patiently(server).ok(), Some(egress), "{} by UDP to {server}", pod.name);
            assert_eq!(pod.who(server).ok(), Some(egress), "{} by TCP to {server}", pod.name);
        }
    }

    /// Panics unless every packet that came to the server, since the wire was last forgotten, came from the egress IP,
    /// and at least one did.
    #[track_caller]
    pub fn assert_nothing_leaked(&self) {
        for (server, egress) in both() {
            assert_eq!(self.sources(server), [egress].into(), "sources of packets to {server}");
        }
    }

    /// The routes that the router has to the egress IP: next hops, of IPv4.
    pub fn next_hops(&self) -> Vec<String> {
        let text = self.host("router").ip(&format!("-4 route show {}", EGRESS.0));
        let mut words = text.split_whitespace();
        let mut hops = Vec::new();
        while let Some(word) = words.next() {
            if word == "via" {
                hops.extend(words.next().map(str::to_owned));
            }
        }
        hops.sort();
        hops
    }

    /// Panics if the egress IP is not on this node alone, at any moment of this time.
    #[track_caller]
    pub fn assert_stays(&self, node: &str, time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            assert_eq!(self.holders(), [node], "after {:?}", begin.elapsed());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the router sends to this node alone.
    #[track_caller]
    pub fn wait_routed_to(&self, node: &str) {
        self.wait_for("the router's next hops", &vec![self.node(node).ipv4().to_string()], || self.next_hops());
    }

    /// Sessions of these pods with the server, both ways.
    pub fn sessions(&self, pods: &[Pod]) -> Vec<(String, Session)> {
        sessions_with(pods, SERVERS)
    }

    /// How long after `begin` the pod is answered again.
    pub fn answered_after(&self, pod: &Pod, begin: Instant) -> Duration {
        answered_by_after(pod, FAR4, begin)
    }
}

/// The servers, and the egress IP of the same family.
fn both() -> [(IpAddr, IpAddr); 2] {
    let [v4, v6] = SERVERS;
    [(v4, EGRESS.0.into()), (v6, EGRESS.1.into())]
}
