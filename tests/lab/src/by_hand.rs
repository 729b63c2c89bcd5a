//! Pods whose interface a test makes itself, as some CNIs do.

use super::manifests::Labels;
use super::{Lab, Pod};
use serde_json::json;

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
        let mut pod = lab.sandbox("n1", "shop", name, labels);
        let node = lab.node("n1");
        node.ip(&format!("link add {veth} type veth peer name eth0 netns {}", pod.netns));
        let veth = veth.split(' ').next().unwrap_or(veth);
        node.ip_batch(&[
            format!("link set {veth} up"),
            format!("route replace {address} dev {veth}"),
            format!("addr add 169.254.1.1/32 dev {veth}"),
        ]);
        pod.ip_batch(&[
            format!("addr add {address}/32 dev eth0"),
            "link set eth0 up".into(),
            "route add 169.254.1.1 dev eth0".into(),
            "route add default via 169.254.1.1".into(),
        ]);
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": pod.netns_path()}],
            "ips": [{"address": format!("{address}/32"), "interface": 0}]
        });
        pod.addresses = vec![address.parse().expect("an address")];
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
