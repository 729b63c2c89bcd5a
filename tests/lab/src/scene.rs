//! The scene that most tests begin with: Egret runs everywhere, one gateway, one policy.

use super::manifests;
use super::pod::Pod;
use super::server::Server;
use super::topology::{EXT4, EXT6};
use super::{Lab, LabBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address that pods of the scene leave from.
pub const EGRESS4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 50);
/// The address that pods of the scene leave from.
pub const EGRESS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x50);
/// The labels of the pods that the scene's policy selects, in namespace `shop`.
pub const VISITOR: &[(&str, &str)] = &[("app", "visitor")];
/// The outside server, both ways.
pub const SERVERS: [IpAddr; 2] = [IpAddr::V4(EXT4), IpAddr::V6(EXT6)];

/// The scene's egress address of the server's family.
pub fn egress_towards(server: IpAddr) -> IpAddr {
    if server.is_ipv4() { EGRESS4.into() } else { EGRESS6.into() }
}

/// The scene's policy: pods of `shop` with the label `app: visitor` leave from [`EGRESS4`] and [`EGRESS6`].
pub fn visitors() -> String {
    manifests::policy(
        "shop",
        "visitors",
        &format!(
            "podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: {EGRESS4}, ipv6: \"{EGRESS6}\" }}"
        ),
    )
}

impl LabBuilder {
    /// Builds the lab, starts Egret on it, with the scene's gateway and policy (`gateway.yaml`, `policy.yaml`), and
    /// waits until every node has them.
    pub fn scene(self) -> Lab {
        self.build().with_scene()
    }
}

impl Lab {
    /// The usual lab with the scene.
    pub fn scene() -> Lab {
        Lab::builder().scene()
    }

    /// See [`LabBuilder::scene`], of a lab that is built.
    #[must_use]
    pub fn with_scene(self) -> Lab {
        let lab = self;
        lab.write_manifest(
            "gateway.yaml",
            &manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]),
        );
        lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop"), ("team", "sales")]);
        lab.write_manifest("policy.yaml", &visitors());
        lab.start();
        lab.wait_everywhere("shop", VISITOR, &[EGRESS4.into(), EGRESS6.into()]);
        lab
    }

    /// Another policy of the scene's namespace: pods with the label `app: rich` leave from 192.0.2.56 and 2001:db8::56.
    pub fn write_rich(&self) {
        let spec =
            "podSelector: { matchLabels: { app: rich } }\n  address: { ipv4: 192.0.2.56, ipv6: \"2001:db8::56\" }";
        self.write_manifest("rich.yaml", &manifests::policy("shop", "rich", spec));
    }

    /// Waits until a pod with these labels, whichever node it is on, leaves from these addresses. What went over the
    /// wire meanwhile is forgotten.
    #[track_caller]
    pub fn wait_everywhere(&self, namespace: &str, labels: manifests::Labels, addresses: &[IpAddr]) {
        for node in self.nodes() {
            let pod = self.add_pod(&node.name, namespace, &format!("probe-{}", node.name), labels);
            for address in addresses {
                self.wait_seen_as(&pod, *address);
            }
            pod.delete();
        }
        self.forget_wire();
    }

    /// The id of the policy's allocation.
    #[track_caller]
    pub fn egress_id(&self, policy: &str) -> u16 {
        let statuses = self.manifests().statuses();
        let mut id = None;
        for line in statuses.lines().map(|l| l.trim().trim_start_matches("- ")) {
            if let Some(number) = line.strip_prefix("id: ") {
                id = number.parse().ok();
            } else if line == policy && id.is_some() {
                break;
            }
        }
        id.unwrap_or_else(|| panic!("no allocation of {policy} in the allocations:\n{statuses}"))
    }

    /// Panics unless every packet that came to the outside server, since the wire was last forgotten, came from the
    /// scene's egress address, and at least one did.
    #[track_caller]
    pub fn assert_nothing_leaked(&self) {
        for server in SERVERS {
            let sources = self.sources(server);
            assert_eq!(sources, [egress_towards(server)].into(), "sources of packets to {server}");
        }
    }

    /// Panics unless the pods leave by the scene's egress address, reach a pod of n2 with their own, and send a megabyte to
    /// each server.
    #[track_caller]
    pub fn assert_carries(&self, pods: &[Pod]) {
        let to = self.add_pod("n2", "office", "to", &[]);
        let _server = Server::start(&to);
        for pod in pods {
            assert_leaves_by_egress(pod);
            assert_eq!(pod.who(to.ipv4()).ok(), Some(pod.ipv4().into()), "{} inside the cluster", pod.name);
            for server in SERVERS {
                pod.bulk(server, 1_000_000).unwrap_or_else(|e| panic!("{} to {server}: {e}", pod.name));
            }
        }
    }

    /// Panics if any packet came to the outside server since the wire was last forgotten.
    #[track_caller]
    pub fn assert_nothing_arrives(&self) {
        for server in SERVERS {
            assert!(self.sources(server).is_empty(), "packets came to {server} from {:?}", self.sources(server));
        }
    }
}

/// Panics unless the server sees the pod as the scene's egress address, at once, by TCP and UDP, IPv4 and IPv6.
#[track_caller]
pub fn assert_leaves_by_egress(pod: &Pod) {
    for server in SERVERS {
        let who = pod.udp_who_patiently(server);
        assert_eq!(who.ok(), Some(egress_towards(server)), "{} on {} by UDP to {server}", pod.name, pod.node.name);
        let who = pod.who(server);
        assert_eq!(who.ok(), Some(egress_towards(server)), "{} on {} by TCP to {server}", pod.name, pod.node.name);
    }
}

/// Panics unless the server sees the pod as its node, at once, by TCP and UDP, IPv4 and IPv6.
#[track_caller]
pub fn assert_leaves_by_node(pod: &Pod) {
    for server in SERVERS {
        let own: IpAddr = if server.is_ipv4() { pod.node.ipv4().into() } else { pod.node.ipv6().into() };
        let who = pod.udp_who_patiently(server);
        assert_eq!(who.ok(), Some(own), "{} on {} by UDP to {server}", pod.name, pod.node.name);
        assert_eq!(pod.who(server).ok(), Some(own), "{} on {} by TCP to {server}", pod.name, pod.node.name);
    }
}

/// Panics if the pod gets an answer from the outside.
#[track_caller]
pub fn assert_blocked(pod: &Pod) {
    for server in SERVERS {
        assert!(pod.udp_who(server).is_err(), "{} on {} got an answer by UDP from {server}", pod.name, pod.node.name);
        assert!(pod.who(server).is_err(), "{} on {} got an answer by TCP from {server}", pod.name, pod.node.name);
    }
}
