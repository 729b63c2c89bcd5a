//! A cluster of many nodes and many policies, as manifests and as the statuses that a controller and the nodes'
//! daemons would have written.

use egret::api::{AddressPair, Allocation, AllocationKind, EgressGatewayStatus, EgressNodeStatus, PolicyKey};
use egret::model::tunnel_mac;
use egret_nft::mac;
use lab::Lab;
use lab::manifests;
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

/// How many policies share a namespace, and a file.
pub const POLICIES_A_NAMESPACE: usize = 100;

/// Writes as many nodes as are asked for beside those that are there, with their ends of the tunnel.
pub fn write_nodes(directory: &Path, count: usize) {
    let mut text = String::new();
    for n in 0..count {
        let (name, address) = (node_name(n), node_address(n));
        let pods = u32::from(Ipv4Addr::new(10, 128, 0, 0)) + 256 * n as u32;
        let zone = ["a", "b", "c"][n % 3];
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n  labels:\n    kubernetes.io/hostname: {name}\n    \
             kubernetes.io/os: linux\n    kubernetes.io/arch: amd64\n    node.kubernetes.io/instance-type: m6i.2xlarge\n    \
             topology.kubernetes.io/region: eu-central-1\n    topology.kubernetes.io/zone: eu-central-1{zone}\n  \
             annotations:\n    node.alpha.kubernetes.io/ttl: \"300\"\nspec:\n  podCIDR: {pods}/24\n  podCIDRs:\n  - {pods}/24\n  \
             - fd00:10:0:{n:x}::/64\nstatus:\n  addresses:\n  - type: InternalIP\n    address: {address}\n  - type: Hostname\n    \
             address: {name}",
            pods = Ipv4Addr::from(pods),
        )
        .expect("text grows");
        let status = EgressNodeStatus {
            tunnel_address: Some(address.into()),
            tunnel_mac: Some(mac::Shown(tunnel_mac::of_node(&name)).to_string()),
            ..EgressNodeStatus::default()
        };
        write_status(directory, "EgressNode", "egressnodes", &name, &json!(status));
    }
    fs::write(directory.join("nodes.yaml"), text).expect("write nodes");
}

/// The name of the node of this number.
pub fn node_name(n: usize) -> String {
    format!("ip-10-64-{}-{}.eu-central-1.compute.internal", n / 256, n % 256)
}

/// The address of the node of this number.
pub fn node_address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + n as u32)
}

/// The namespace, the name and the egress address of a policy, and the pods that it selects: those with the label
/// `app` and its name as the value.
pub struct Policy {
    pub namespace: String,
    pub name: String,
    pub address: Ipv4Addr,
}

/// The policy of this number.
pub fn policy(n: usize) -> Policy {
    Policy {
        namespace: format!("team-{:03}", n / POLICIES_A_NAMESPACE),
        name: format!("app-{n:05}"),
        address: Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 1)) + n as u32),
    }
}

impl Policy {
    /// Its manifest; it covers the networks.
    pub fn manifest(&self, networks: &[&str]) -> String {
        let mut text = format!(
            "---\napiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  namespace: {}\n  name: {}\nspec:\n  \
             podSelector:\n    matchLabels:\n      app: {}\n  address:\n    ipv4: {}\n",
            self.namespace, self.name, self.name, self.address
        );
        if !networks.is_empty() {
            text += "  egress:\n  - to:\n";
            networks.iter().for_each(|n| text += &format!("    - ipBlock: {{ cidr: {n} }}\n"));
        }
        text
    }
}

/// Writes policies with their namespaces, a file for each namespace; the first policy has a file of its own,
/// `first.yaml`. Every policy covers one network.
pub fn write_policies(lab: &Lab, count: usize) {
    lab.write_manifest("first.yaml", &policy(0).manifest(&["203.0.113.0/24"]));
    for namespace in 0..count.div_ceil(POLICIES_A_NAMESPACE) {
        let first = namespace * POLICIES_A_NAMESPACE;
        let name = policy(first).namespace;
        lab.add_namespace(&name, &[("kubernetes.io/metadata.name", &name), ("team", &name)]);
        let others = (first..count.min(first + POLICIES_A_NAMESPACE)).filter(|n| *n > 0);
        let text: String = others.map(|n| policy(n).manifest(&["203.0.113.0/24"])).collect();
        lab.write_manifest(&format!("policies-{name}.yaml"), &text);
    }
}

/// Writes the gateway. Each policy has an allocation of its own, on these nodes in turn.
pub fn write_gateway(directory: &Path, policies: usize, nodes: &[&str]) {
    let gateway = "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata:\n  name: default\nspec:\n  \
                   nodeSelector: { matchLabels: { egret.dev/gateway: \"true\" } }\n  addresses: [\"198.18.0.0/15\"]\n  \
                   interface: eth0\n  default: true\n";
    fs::write(directory.join("gateway.yaml"), gateway).expect("write a gateway");
    let path = |n: usize| {
        let policy = policy(n);
        Allocation {
            id: n as u16 + 1,
            kind: AllocationKind::Explicit,
            address: AddressPair { ipv4: Some(policy.address), ipv6: None },
            node: Some(nodes[n % nodes.len()].into()),
            policies: [PolicyKey { namespace: Some(policy.namespace.into()), name: policy.name.into() }].into(),
            ..Allocation::default()
        }
    };
    let status = EgressGatewayStatus {
        nodes: nodes.iter().map(|n| (*n).to_owned()).collect(),
        allocations: (0..policies).map(path).collect(),
        ..EgressGatewayStatus::default()
    };
    write_status(directory, "EgressGateway", "egressgateways", "default", &json!(status));
}

fn write_status(directory: &Path, kind: &str, plural: &str, name: &str, status: &Value) {
    let directory = directory.join("status").join(plural);
    fs::create_dir_all(&directory).expect("make a directory of statuses");
    let object =
        json!({"apiVersion": "egret.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "status": status});
    fs::write(directory.join(format!("{name}.yaml")), object.to_string() + "\n").expect("write a status");
}

/// A local pod's manifest: it bears the label of the policy of its number.
pub fn pod(n: usize, node: &str, addresses: &[IpAddr]) -> Value {
    let policy = policy(n);
    manifests::pod(
        node,
        &policy.namespace,
        &format!("pod-{n:05}-{node}"),
        &uid(n),
        &[("app", policy.name.as_str()), ("pod-template-hash", "7d4b9c6f5"), ("tier", "backend")],
        addresses,
    )
}

/// A local pod's uid.
pub fn uid(n: usize) -> String {
    format!("00000000-0000-4000-9000-{n:012x}")
}
