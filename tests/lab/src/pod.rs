//! A pod: a network namespace that the conflist of its node is run for, and a manifest in the cluster directory.

use super::cni::{self, CniError, Conflist, Runtime};
use super::host::{Host, checked};
use super::manifests::{self, Labels, Manifests};
use super::server::UDP_WHO;
use super::topology::Node;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::Arc;

/// A pod. Dropping it does nothing: its namespace goes with the lab.
pub struct Pod {
    host: Host,
    /// Its node.
    pub node: Arc<Node>,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its Kubernetes name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// What the runtime passes to plugins.
    pub runtime: Runtime,
    /// What is run for it; the node's, as it was when the pod was made.
    pub conflist: Conflist,
    /// The result of ADD.
    pub result: Option<Value>,
    /// Its addresses, from the result of ADD.
    pub addresses: Vec<IpAddr>,
    manifest: Option<(Manifests, Vec<(String, String)>)>,
}

/// Which pod to make.
pub struct Wanted<'a> {
    /// The node it runs on.
    pub node: &'a Arc<Node>,
    /// Its Kubernetes namespace.
    pub namespace: &'a str,
    /// Its Kubernetes name.
    pub name: &'a str,
    /// Its labels.
    pub labels: Labels<'a>,
    /// The name of the network namespace to make for it.
    pub netns: String,
    /// Its uid and container id derive from it.
    pub serial: u64,
    /// The directory that gets its manifest; `None`: the cluster does not know it.
    pub manifests: Option<Manifests>,
}

impl std::ops::Deref for Pod {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Pod {
    /// What there is before a runtime calls ADD: the manifest, without addresses, and the network namespace.
    pub fn sandbox(wanted: Wanted) -> Pod {
        let Wanted { node, namespace, name, labels, netns, serial, manifests } = wanted;
        checked(&["ip", "netns", "add", &netns], None);
        let host = Host::open(name, &netns);
        host.sysctl(&["net.ipv6.conf.default.accept_dad=0"]);
        host.ip("link set lo up");
        let mut uid = format!("00000000-0000-4000-8000-{serial:012x}");
        if let Some(api) = manifests.as_ref().and_then(Manifests::api) {
            // The API server says how it is called.
            let made = api.apply(&manifests::pod(&node.name, namespace, name, &uid, labels, &[]));
            made["metadata"]["uid"].as_str().unwrap_or_default().clone_into(&mut uid);
        }
        let runtime = Runtime {
            container_id: format!("{serial:064x}"),
            netns: host.netns_path(),
            ifname: "eth0".to_owned(),
            args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
                 K8S_POD_INFRA_CONTAINER_ID={serial:064x};K8S_POD_UID={uid}"
            ),
            capabilities: json!({}),
        };
        let pod = Pod {
            host,
            node: Arc::clone(node),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid,
            runtime,
            conflist: node.conflist.lock().expect("a lock").clone(),
            result: None,
            addresses: Vec::new(),
            manifest: manifests.map(|m| (m, labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())),
        };
        pod.write_manifest();
        pod
    }

    /// Sends a datagram that the server would answer, from an address that is not the pod's.
    pub fn send_as(&self, address: IpAddr, server: IpAddr) {
        let (length, nodad) = if address.is_ipv4() { (32, "") } else { (128, "nodad") };
        self.ip(&format!("addr add {address}/{length} dev eth0 {nodad}"));
        let socket = self.within(|| UdpSocket::bind((address, 0))).expect("bind");
        let _ = socket.send_to(b"who", (server, UDP_WHO));
        self.ip(&format!("addr del {address}/{length} dev eth0"));
    }

    /// ADD, and the manifest gets the addresses, as by a kubelet.
    ///
    /// # Errors
    /// What the plugin that failed said.
    pub fn attach(&mut self) -> Result<(), CniError> {
        let result = self.conflist.add(&self.node, &self.runtime)?;
        self.addresses = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        self.result = Some(result);
        self.write_manifest();
        self.node.wait_for_ipv6_addresses();
        Ok(())
    }

    /// DEL.
    ///
    /// # Errors
    /// What the plugin that failed said.
    pub fn detach(&self) -> Result<(), CniError> {
        self.conflist.del(&self.node, &self.runtime, self.result.as_ref())
    }

    /// CHECK.
    ///
    /// # Errors
    /// What the plugin that failed said.
    pub fn check(&self) -> Result<(), CniError> {
        self.conflist.check(&self.node, &self.runtime, self.result.as_ref().expect("ADD came first"))
    }

    /// Calls `egret-cni` alone, with what it would be told, changed.
    ///
    /// # Errors
    /// What it said.
    pub fn egret(&self, verb: &str, change: impl FnOnce(&mut Value)) -> Result<Value, CniError> {
        let mut stdin = self.conflist.stdin_of(&self.node.cni_entry(), &self.runtime, self.result.as_ref());
        change(&mut stdin);
        cni::call(&self.node, verb, &self.runtime, &stdin)
    }

    /// DEL, the namespace, the manifest.
    #[track_caller]
    pub fn delete(self) {
        self.detach().unwrap_or_else(|e| panic!("DEL of {}/{}: {e}", self.namespace, self.name));
        self.remove_netns();
        self.forget();
    }

    /// Removes the manifest alone: the cluster knows the pod no more.
    pub fn forget(&self) {
        if let Some((manifests, _)) = &self.manifest {
            manifests.remove(&self.manifest_file());
        }
    }

    /// Removes the network namespace alone, as a reboot or a crash of the runtime would.
    pub fn remove_netns(&self) {
        checked(&["ip", "netns", "del", &self.host.netns], None);
    }

    /// Gives the pod other labels.
    pub fn relabel(&mut self, labels: Labels) {
        let (_, own) = self.manifest.as_mut().expect("a pod with a manifest");
        *own = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.write_manifest();
    }

    fn manifest_file(&self) -> String {
        format!("pod-{}-{}.yaml", self.namespace, self.name)
    }

    fn write_manifest(&self) {
        if let Some((manifests, labels)) = &self.manifest {
            let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let object =
                manifests::pod(&self.node.name, &self.namespace, &self.name, &self.uid, &labels, &self.addresses);
            // While the API server is away, a kubelet cannot tell it either.
            if manifests.api().is_none_or(|api| api.server.runs()) {
                manifests.write_object(&self.manifest_file(), &object);
            }
        }
    }

    /// Its IPv4 address.
    #[track_caller]
    pub fn ipv4(&self) -> Ipv4Addr {
        let found = self.addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
        found.unwrap_or_else(|| panic!("{} has no IPv4 address: {:?}", self.name, self.addresses))
    }

    /// Its IPv6 address.
    #[track_caller]
    pub fn ipv6(&self) -> Ipv6Addr {
        let found = self.addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
        found.unwrap_or_else(|| panic!("{} has no IPv6 address: {:?}", self.name, self.addresses))
    }

    /// The name of its interface's other end, on the node.
    pub fn host_interface(&self) -> String {
        let index: String = self
            .host
            .ip("-o link show eth0")
            .split("@if")
            .nth(1)
            .map_or_else(String::new, |rest| rest.chars().take_while(char::is_ascii_digit).collect());
        let all = self.node.ip("-o link");
        let line = all.lines().find(|l| l.split(':').next() == Some(&index));
        let name = line.and_then(|l| l.split(": ").nth(1)).unwrap_or_else(|| panic!("no interface {index} in\n{all}"));
        name.split('@').next().unwrap_or(name).to_owned()
    }
}
