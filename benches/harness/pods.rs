//! Many pods on a node, made in a second: their interfaces are real, and what the plugin leaves of them is there; the
//! programs that a runtime would have run for them were not.

use super::cluster;
use egret_cni::attachment::{Attachment, AttachmentId, HostInterface, PodRef};
use lab::{Lab, topology};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// So many pods have room in a node's network.
pub const MOST: usize = 250;

/// Gives a node pods, one for each of the first policies. Their ends of the veth pairs are all in one namespace.
pub fn populate(lab: &Lab, node: &str, count: usize) {
    let node = lab.node(node);
    let inside = format!("{}-c{}", lab.name(), node.number);
    topology::namespaces(lab.name(), &[&format!("c{}", node.number)]);
    let veth = |n: usize| format!("link add cali{n:05} type veth peer name p{n:05} netns {inside}");
    node.ip_batch(&(0..count).map(veth).collect::<Vec<_>>());
    let addresses = |n: usize| -> [IpAddr; 2] {
        // From the top of the node's network: its beginning is for pods that the plugins make.
        let part = MOST + 4 - n;
        [
            format!("10.244.{}.{part}", node.number).parse().expect("an address"),
            format!("fd00:244:{}::{part:x}", node.number).parse().expect("an address"),
        ]
    };
    let mut lines: Vec<String> = (0..count).map(|n| format!("link set cali{n:05} up")).collect();
    lines.extend((0..count).map(|n| format!("route add {} dev cali{n:05}", addresses(n)[0])));
    node.ip_batch(&lines);
    let ends = indexes(&node.run(["ip", "-o", "link"]));
    // An API server gives uids by itself.
    let uid = |n| if lab.manifests().api().is_some() { String::new() } else { cluster::uid(n) };
    let mut manifests = String::new();
    for n in 0..count {
        let [outer, inner] = ends[&format!("cali{n:05}")];
        let policy = cluster::policy(n);
        let attachment = Attachment {
            id: AttachmentId { container_id: format!("c{n:063x}"), ifname: "eth0".into() },
            network: "lab".into(),
            pod: PodRef { namespace: policy.namespace, name: format!("pod-{n:05}-{}", node.name), uid: uid(n) },
            addresses: addresses(n).to_vec(),
            host: Some(HostInterface { index: outer, peer_index: inner }),
        };
        attachment.store(&node.run_dir()).expect("write an attachment");
        manifests += &format!("---\n{}\n", cluster::pod(n, &node.name, &addresses(n)));
    }
    lab.write_manifest(&format!("pods-{}.yaml", node.name), &manifests);
}

/// Indexes of interfaces, and of their other ends, by name: from lines like `7: cali00000@if6: <BROADCAST> ...`.
fn indexes(text: &str) -> BTreeMap<String, [u32; 2]> {
    let parse = |line: &str| {
        let (index, rest) = line.split_once(": ")?;
        let (name, peer) = rest.split_once(": ")?.0.split_once("@if")?;
        Some((name.to_owned(), [index.parse().ok()?, peer.parse().ok()?]))
    };
    text.lines().filter_map(parse).collect()
}
