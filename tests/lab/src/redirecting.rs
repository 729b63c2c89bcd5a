//! A CNI whose eBPF takes pods' packets past nf_tables: `programs/redirect.bpf.c`.

use super::cni::Conflist;
use super::topology::Node;
use super::{Lab, Pod};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// The programs, compiled.
static PROGRAMS: &[u8] = include_bytes!("../programs/redirect.o");
/// Stands for the uplink's index in them.
const UPLINK: u32 = 0x0e67_7e57;

/// What the CNI's program does with packets to other nodes and to the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Sends them to the uplink (`bpf_redirect_neigh`).
    Neigh,
    /// Looks the route up and sends them there (`bpf_fib_lookup`).
    Fib,
    /// Leaves them to the host's stack.
    Stack,
}

impl Lab {
    /// Makes the CNI of a node put this program at the veths of pods, before Egret's plugin is called.
    pub fn redirect(&self, node: &str, program: Program) {
        let plugin = self.plugin(self.node(node), program);
        let mut conflist = self.node(node).conflist.lock().expect("a lock");
        let plugins = conflist.json["plugins"].as_array_mut().expect("a conflist has plugins");
        plugins.retain(|plugin| plugin["type"].as_str().is_none_or(|kind| !kind.contains("redirect-")));
        let at = plugins.iter().position(|plugin| plugin["type"] == "egret-cni").unwrap_or(plugins.len());
        plugins.insert(at, plugin);
    }

    /// The conflist's entry of a plugin that puts the program there.
    fn plugin(&self, node: &Node, program: Program) -> Value {
        let section = format!("{program:?}").to_lowercase();
        let object = self.directory().join(format!("{}-{section}.o", node.name));
        let link = node.ip("-o link show dev eth0");
        let index: u32 =
            link.split(':').next().and_then(|index| index.trim().parse().ok()).expect("an interface's index");
        fs::write(&object, replaced(PROGRAMS, UPLINK.to_ne_bytes(), index.to_ne_bytes())).expect("the programs");
        let script = self.directory().join(format!("redirect-{}-{section}", node.name));
        let object = object.display();
        let text = format!(
            "#!/bin/sh\nset -e\nconf=$(cat)\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\n\
             veth=$(echo \"$conf\" | jq -r '.prevResult.interfaces[] | select((.sandbox // \"\") == \"\" and .name != \"cni0\").name')\n\
             tc qdisc replace dev \"$veth\" clsact\n\
             tc filter replace dev \"$veth\" ingress prio 1 handle 1 bpf direct-action object-file {object} section {section}\n\
             echo \"$conf\" | jq .prevResult\n"
        );
        fs::write(&script, text).expect("the plugin");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("the plugin");
        json!({"type": script})
    }

    /// Puts the program at a running pod's veth, in the place of the one that is there.
    pub fn redirect_pod(&self, pod: &Pod, program: Program) {
        let Value::Object(plugin) = self.plugin(&pod.node, program) else { return };
        let result = pod.result.clone().unwrap_or_default();
        let conflist = Conflist::empty().with(Value::Object(plugin));
        let entry = conflist.json["plugins"][0].clone();
        let stdin = conflist.stdin_of(&entry, &pod.runtime, Some(&result));
        super::cni::call(&pod.node, "ADD", &pod.runtime, &stdin).expect("a program at a pod's veth");
    }
}

fn replaced(bytes: &[u8], from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len() - 3).filter(|at| bytes[*at..at + 4] == from).collect();
    assert!(!places.is_empty(), "no place for the uplink's index");
    places.into_iter().for_each(|at| bytes[at..at + 4].copy_from_slice(&to));
    bytes
}
