//! The objects that a test makes. All of them bear one label, so that nothing is forgotten.

use super::server::Server;
use crate::api::{API_VERSION, AddressPair};
use crate::probe::ProbeMethod;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::net::SocketAddr;

/// The label of everything that a test makes.
pub const LABEL: &str = "egret.dev/test";
/// The annotation of a test's namespace that changes while the test runs.
pub const ALIVE: &str = "egret.dev/test-alive";
/// The value of [`ALIVE`] that stays: the user keeps the objects.
pub const KEPT: &str = "kept";
/// The beginning of the names of namespaces and gateways.
pub const PREFIX: &str = "egret-test-";
/// The label by which policies select a test's pods.
const POLICY: &str = "egret.dev/test-policy";

/// The pool of the gateway that has no node. Nobody else's: TEST-NET-3 (RFC 5737), and the end of the network for
/// documentation (RFC 3849).
const NOBODYS: [&str; 2] = ["203.0.113.254", "2001:db8:ffff:ffff:ffff:ffff:ffff:fffe"];

/// Which policies select a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selected {
    /// None.
    No,
    /// Those with an egress IP.
    Yes,
    /// The one whose gateway has no node.
    Blocked,
}

impl Selected {
    fn word(self) -> &'static str {
        match self {
            Selected::No => "none",
            Selected::Yes => "covered",
            Selected::Blocked => "blocked",
        }
    }
}

/// A pod of the test.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Which policies select it.
    pub selected: Selected,
    /// How it asks.
    pub methods: &'static [ProbeMethod],
    /// How many requests it asks; 0: no end.
    pub count: u64,
    /// From one request to the next, milliseconds.
    pub interval: u64,
}

/// The namespace.
pub fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": name,
            // The pods need nothing, so the strictest level is right, whatever the cluster's default is.
            "labels": {LABEL: "true", "pod-security.kubernetes.io/enforce": "restricted"},
            "annotations": {ALIVE: "0"},
        },
    })
}

/// A pod on one node, of Egret's image.
pub fn pod(namespace: &str, image: &str, server: &Server, client: &Client) -> Value {
    let to: Vec<String> = server.addresses.iter().map(ToString::to_string).collect();
    let methods: Vec<String> =
        client.methods.iter().filter_map(|method| Some(method.to_possible_value()?.get_name().to_owned())).collect();
    let mut arguments = vec![
        "probe".to_owned(),
        format!("--to={}", to.join(",")),
        format!("--host={}", server.host),
        format!("--path={}", server.path),
        format!("--method={}", methods.join(",")),
        format!("--interval={}", client.interval),
        format!("--count={}", client.count),
    ];
    if server.tls {
        arguments.push("--tls".to_owned());
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": client.name, "labels": {LABEL: "true", POLICY: client.selected.word()}},
        "spec": {
            // The kubelet takes it without the scheduler: the test is about this node.
            "nodeName": client.node,
            "tolerations": [{"operator": "Exists"}],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "probe", "image": image, "imagePullPolicy": "IfNotPresent", "args": arguments,
                "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    })
}

/// A policy that covers the server and nothing else.
pub fn policy(
    namespace: &str,
    name: &str,
    gateway: &str,
    selects: Selected,
    priority: i32,
    address: Option<&AddressPair>,
    server: &Server,
) -> Value {
    let networks: Vec<Value> = server.addresses.iter().map(|to| json!({"ipBlock": {"cidr": network(to)}})).collect();
    let mut spec = json!({
        "gateway": gateway,
        "podSelector": {"matchLabels": {POLICY: selects.word()}},
        "priority": priority,
        "egress": [{"to": networks}],
    });
    if let Some(address) = address {
        spec["address"] = json!(address);
    }
    json!({
        "apiVersion": API_VERSION, "kind": "EgressPolicy",
        "metadata": {"namespace": namespace, "name": name, "labels": {LABEL: "true"}},
        "spec": spec,
    })
}

fn network(to: &SocketAddr) -> String {
    format!("{}/{}", to.ip(), if to.is_ipv6() { 128 } else { 32 })
}

/// A gateway that selects no node.
pub fn gateway_without_nodes(name: &str) -> Value {
    json!({
        "apiVersion": API_VERSION, "kind": "EgressGateway",
        "metadata": {"name": name, "labels": {LABEL: "true"}},
        "spec": {"nodeSelector": {"matchLabels": {LABEL: "no-node"}}, "addresses": NOBODYS},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{EgressGateway, EgressPolicy};
    use k8s_openapi::api::core::v1::Pod;

    fn server() -> Server {
        Server {
            addresses: vec!["192.0.2.100:8080".parse().unwrap(), "[2001:db8::100]:8080".parse().unwrap()],
            host: "192.0.2.100".to_owned(),
            path: "/".to_owned(),
            tls: false,
            is_reflector: false,
        }
    }

    #[test]
    fn the_objects_are_what_their_types_say() {
        let (name, node, methods) = ("a".to_owned(), "n1".to_owned(), &[ProbeMethod::Tcp, ProbeMethod::Udp][..]);
        let client = Client { name, node, selected: Selected::Yes, methods, count: 3, interval: 100 };
        let pod = pod("egret-test-x", "image:1", &server(), &client);
        let read: Pod = serde_json::from_value(pod.clone()).unwrap();
        let arguments = read.spec.unwrap().containers.remove(0).args.unwrap();
        assert!(arguments.contains(&"--to=192.0.2.100:8080,[2001:db8::100]:8080".to_owned()), "{arguments:?}");
        assert!(arguments.contains(&"--method=tcp,udp".to_owned()), "{arguments:?}");
        let policy = policy("egret-test-x", "first", "g", Selected::Yes, 1, None, &server());
        let read: EgressPolicy = serde_json::from_value(policy.clone()).unwrap();
        let blocks = serde_json::to_string(&read.spec.egress).unwrap();
        assert!(blocks.contains("192.0.2.100/32") && blocks.contains("2001:db8::100/128"), "{blocks}");
        let label = pod["metadata"]["labels"][POLICY].clone();
        assert_eq!(policy["spec"]["podSelector"]["matchLabels"][POLICY], label);
        let gateway: EgressGateway = serde_json::from_value(gateway_without_nodes("egret-test-x")).unwrap();
        assert!(!gateway.spec.default);
    }
}
