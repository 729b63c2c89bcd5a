//! Pods whose interface a test makes itself, as some CNIs do.

use super::manifests::Labels;
use super::{Lab, Pod};
use serde_json::json;
use std::net::IpAddr;

/// A routed pod by hand, as Calico makes them: the test says which address and which name the veth on the host has.
pub struct ByHand {
    /// The pod.
    pub pod: Pod,
    veth: String,
}

impl ByHand {
    /// Makes the interface, and calls `egret-cni` alone.
    pub fn add(lab: &Lab, name: &str, labels: Labels, veth: &str, address: &str) -> ByHand {
        let by_hand = ByHand::make(lab, name, labels, veth, address);
        by_hand.egret("ADD");
        by_hand
    }

    /// Makes the interface. `veth` is its name, and what else `ip link add` may be told.
    pub fn make(lab: &Lab, name: &str, labels: Labels, veth: &str, address: &str) -> ByHand {
        ByHand::on(lab, "n1", name, labels, veth, &[address.parse().expect("an address")])
    }

    /// Makes the interface and calls `egret-cni`, for a pod of both families on any node. Its addresses end in `last`.
    pub fn dual(lab: &Lab, node: &str, name: &str, labels: Labels, veth: &str, last: u8) -> ByHand {
        let number = lab.node(node).number;
        let addresses = [format!("10.244.{number}.{last}"), format!("fd00:244:{number}::{last:x}")];
        let addresses = addresses.map(|address| address.parse().expect("an address"));
        let by_hand = ByHand::on(lab, node, name, labels, veth, &addresses);
        by_hand.egret("ADD");
        by_hand
    }

    fn on(lab: &Lab, node: &str, name: &str, labels: Labels, veth: &str, addresses: &[IpAddr]) -> ByHand {
        let mut pod = lab.sandbox(node, "shop", name, labels);
        let node = lab.node(node);
        node.ip(&format!("link add {veth} type veth peer name eth0 netns {}", pod.netns));
        let veth = veth.split(' ').next().unwrap_or(veth);
        let mut of_node = vec![format!("link set {veth} up")];
        let mut of_pod = vec!["link set eth0 up".to_owned()];
        for address in addresses {
            let (gateway, length) = if address.is_ipv4() { ("169.254.1.1", 32) } else { ("fe80::1", 128) };
            of_node.push(format!("route replace {address} dev {veth}"));
            of_node.push(format!("addr add {gateway}/{} dev {veth}", if address.is_ipv4() { 32 } else { 64 }));
            of_pod.push(format!("addr add {address}/{length} dev eth0"));
            if address.is_ipv4() {
                of_pod.push(format!("route add {gateway} dev eth0"));
            }
            of_pod.push(format!("route add default via {gateway} dev eth0"));
        }
        node.ip_batch(&of_node);
        pod.ip_batch(&of_pod);
        let ip = |address: &IpAddr| {
            let length = if address.is_ipv4() { 32 } else { 128 };
            json!({"address": format!("{address}/{length}"), "interface": 0})
        };
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": pod.netns_path()}],
            "ips": addresses.iter().map(ip).collect::<Vec<_>>()
        });
        pod.addresses = addresses.to_vec();
        pod.result = Some(result);
        ByHand { pod, veth: veth.to_owned() }
    }

    /// Calls `egret-cni` alone.
    #[track_caller]
    pub fn egret(&self, verb: &str) {
        self.pod.egret(verb, |_| {}).unwrap_or_else(|e| panic!("{verb}: {e}"));
    }

    /// DEL, the interface, the manifest.
    #[track_caller]
    pub fn end(self) {
        self.egret("DEL");
        self.unplug();
        self.pod.forget();
    }

    /// Removes the interface.
    pub fn unplug(&self) {
        self.pod.node.ip(&format!("link del {}", self.veth));
    }
}
