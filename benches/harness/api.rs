//! The big cluster of [`super::cluster`], in a real API server: created as kubelets and users would.

use super::cluster::{POLICIES_A_NAMESPACE, node_address, node_name, policy};
use egret::model::tunnel_mac;
use egret_nft::mac;
use lab::Lab;
use serde_json::{Value, json};

fn create(lab: &Lab, collection: &str, object: &Value) {
    lab.api().ask("POST", collection, Some(("application/json", object)));
}

/// Makes nodes, each with its end of the tunnel; the first `gateways` of them are gateways' nodes.
pub fn nodes(lab: &Lab, count: usize, gateways: usize) {
    for n in 0..count {
        let (name, address) = (node_name(n), node_address(n));
        let pods = u32::from(std::net::Ipv4Addr::new(10, 128, 0, 0)) + 256 * n as u32;
        let pods = format!("{}/24", std::net::Ipv4Addr::from(pods));
        // What a kubelet reports is most of a Node.
        let image = |i: usize| json!({"names": [format!("registry.example.org/team/image-{i}@sha256:{:064x}", n + i)], "sizeBytes": 1 << 26});
        let images: Vec<Value> = (0..20).map(image).collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {
                "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                "node.kubernetes.io/instance-type": "m6i.2xlarge", "topology.kubernetes.io/region": "eu-central-1",
                "topology.kubernetes.io/zone": format!("eu-central-1{}", ["a", "b", "c"][n % 3]),
                "egret.dev/gateway": (n < gateways).to_string()}},
            "spec": {"podCIDR": pods, "podCIDRs": [pods, format!("fd00:10:0:{n:x}::/64")]},
            "status": {"images": images, "addresses": [
                {"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]},
        });
        create(lab, "/api/v1/nodes", &node);
        let nodes = "/apis/egret.dev/v1alpha1/egressnodes";
        let own =
            json!({"apiVersion": "egret.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": name}, "spec": {}});
        create(lab, nodes, &own);
        let mac = mac::Shown(tunnel_mac::of_node(&name)).to_string();
        let status = json!({"status": {"tunnelAddress": address, "tunnelMac": mac}});
        let path = format!("{nodes}/{name}/status");
        lab.api().ask("PATCH", &path, Some(("application/merge-patch+json", &status)));
    }
}

/// Makes policies with their namespaces; each gets addresses of its own and covers one network.
pub fn policies(lab: &Lab, count: usize) {
    for n in 0..count {
        let one = policy(n);
        if n % POLICIES_A_NAMESPACE == 0 {
            lab.add_namespace(&one.namespace, &[("team", &one.namespace)]);
        }
        create(lab, &collection(&one.namespace), &object(n, "203.0.113.0/24"));
    }
}

/// Has a policy cover another network.
pub fn change_policy(lab: &Lab, n: usize, network: &str) {
    let one = policy(n);
    let path = format!("{}/{}", collection(&one.namespace), one.name);
    let change = json!({"spec": object(n, network)["spec"]});
    lab.api().ask("PATCH", &path, Some(("application/merge-patch+json", &change)));
}

fn collection(namespace: &str) -> String {
    format!("/apis/egret.dev/v1alpha1/namespaces/{namespace}/egresspolicies")
}

fn object(n: usize, network: &str) -> Value {
    let one = policy(n);
    json!({
        "apiVersion": "egret.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"namespace": one.namespace, "name": one.name},
        "spec": {"podSelector": {"matchLabels": {"app": one.name}},
                 "egress": [{"to": [{"ipBlock": {"cidr": network}}]}]},
    })
}
