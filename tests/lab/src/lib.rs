//! A lab: hosts in network namespaces on one kernel, with Egret's built programs on them. See `topology.rs` for who is
//! there, and `turn.rs` for which tests run beside which. Labs of parallel tests do not meet, and nothing of a lab stays, whatever happens to its test.
//!
//! ```ignore
//! let lab = Lab::new();
//! lab.start();
//! let pod = lab.add_pod("n1", "shop", "visitor", &[("app", "visitor")]);
//! assert_eq!(pod.who(EXT4).unwrap(), lab.node("n1").ipv4());
//! ```

pub mod api;
pub mod assign_hook;
pub mod bulk;
pub mod by_hand;
pub mod client;
pub mod cni;
pub mod daemon;
pub mod fault_injection;
pub mod felix;
mod fleet;
pub mod frr;
pub mod host;
pub mod kernel;
pub mod kube_router;
pub mod leftovers;
pub mod machine;
pub mod manifests;
pub mod metrics;
pub mod own_uplinks;
pub mod places;
pub mod pod;
pub mod problems;
pub mod redirecting;
pub mod routed;
pub mod scene;
pub mod server;
pub mod snapshot;
pub mod survival;
pub mod topology;
pub mod traffic;
pub mod turn;
pub mod wire;

pub use bulk::Bulk;
pub use client::FIRST_PACKET;
pub use cni::{CniError, Conflist};
pub use daemon::Daemon;
pub use host::Host;
pub use metrics::Metrics;
pub use pod::Pod;
pub use scene::{EGRESS4, EGRESS6, SERVERS, VISITOR};
pub use server::Server;
pub use topology::{EXT4, EXT6, FAR4, FAR6, Masquerade, Node, NodeSpec, Pods};
pub use traffic::{Flood, Session};

use manifests::{Labels, Manifests};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

/// A lab; it goes when dropped.
pub struct Lab {
    name: String,
    directory: PathBuf,
    nodes: Vec<Arc<Node>>,
    hosts: BTreeMap<&'static str, Host>,
    servers: BTreeMap<&'static str, Mutex<Server>>,
    manifests: Manifests,
    namespaces: Mutex<BTreeSet<String>>,
    daemons: Mutex<BTreeMap<String, Daemon>>,
    serial: AtomicU64,
    machine_dropped_before: u64,
    /// Arguments that every `egretd node` gets besides the usual ones.
    pub node_arguments: Vec<String>,
    controller_arguments: Vec<String>,
    ipv6_tunnel: bool,
    tunnel_network: Option<&'static str>,
    /// Given back last of all.
    _turn: Arc<turn::Turn>,
}

/// Which lab to build.
pub struct LabBuilder {
    nodes: Vec<NodeSpec>,
    ipv6_tunnel: bool,
    tunnel_network: Option<&'static str>,
    router: bool,
    egret: bool,
    node_arguments: Vec<String>,
    controller_arguments: Vec<String>,
    kubernetes: bool,
    api_arguments: Vec<String>,
    bare: bool,
}

impl LabBuilder {
    /// With a Kubernetes API server instead of the cluster directory.
    #[must_use]
    pub fn kubernetes(mut self) -> Self {
        self.kubernetes = true;
        self
    }

    /// With nothing of Egret on the API server.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.bare = true;
        self
    }

    /// More flags for the API server.
    #[must_use]
    pub fn api_arguments(mut self, arguments: &[&str]) -> Self {
        self.api_arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// Other nodes than n1, n2, g1, g2.
    #[must_use]
    pub fn nodes(mut self, nodes: Vec<NodeSpec>) -> Self {
        self.nodes = nodes;
        self
    }

    /// With the nodes' IPv6 addresses as the ends of the tunnel.
    #[must_use]
    pub fn ipv6_tunnel(mut self) -> Self {
        self.ipv6_tunnel = true;
        self
    }

    /// With these addresses as the ends of the tunnel: `"10.99.0."` and the last part of the node's other addresses.
    #[must_use]
    pub fn tunnel_network(mut self, beginning: &'static str) -> Self {
        self.tunnel_network = Some(beginning);
        self
    }

    /// With `router` and `far`, the network behind it.
    #[must_use]
    pub fn router(mut self) -> Self {
        self.router = true;
        self
    }

    /// Without `egret-cni` in the conflists.
    #[must_use]
    pub fn without_egret(mut self) -> Self {
        self.egret = false;
        self
    }

    /// More arguments for every `egretd node`.
    #[must_use]
    pub fn node_arguments(mut self, arguments: &[&str]) -> Self {
        self.node_arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// More arguments for every `egretd controller`.
    #[must_use]
    pub fn controller_arguments(mut self, arguments: &[&str]) -> Self {
        self.controller_arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// Builds it.
    pub fn build(self) -> Lab {
        Lab::build(self)
    }
}

impl Lab {
    /// n1, n2, g1, g2 and ext.
    #[expect(clippy::new_without_default, reason = "namespaces and processes are nobody's default")]
    pub fn new() -> Lab {
        Lab::builder().build()
    }

    /// Other labs.
    pub fn builder() -> LabBuilder {
        use Pods::{Bridged, Routed};
        LabBuilder {
            nodes: vec![
                NodeSpec::new("n1", 11, Routed),
                NodeSpec::new("n2", 12, Bridged),
                NodeSpec::gateway("g1", 21, Routed),
                NodeSpec::gateway("g2", 22, Bridged),
            ],
            ipv6_tunnel: false,
            tunnel_network: None,
            router: false,
            egret: true,
            node_arguments: Vec::new(),
            controller_arguments: Vec::new(),
            kubernetes: false,
            api_arguments: Vec::new(),
            bare: false,
        }
    }

    fn build(wanted: LabBuilder) -> Lab {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test builds network namespaces and needs root: run `sudo -E cargo test` or `make test`"
        );
        let turn = turn::beside_others();
        machine::watch();
        static SWEPT: Once = Once::new();
        SWEPT.call_once(leftovers::sweep);
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let name = format!("egt-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&name);
        let mut lab = Lab {
            manifests: Manifests::create(directory.join("cluster")),
            nodes: Vec::new(),
            hosts: BTreeMap::new(),
            servers: BTreeMap::new(),
            namespaces: Mutex::default(),
            daemons: Mutex::default(),
            serial: AtomicU64::new(1),
            machine_dropped_before: machine::dropped(),
            node_arguments: wanted.node_arguments.clone(),
            controller_arguments: wanted.controller_arguments.clone(),
            ipv6_tunnel: wanted.ipv6_tunnel,
            tunnel_network: wanted.tunnel_network,
            _turn: turn,
            name,
            directory,
        };
        // From here on, a panic drops `lab`, which removes what is there so far.
        lab.wire_up(&wanted);
        for host in ["ext", "far"] {
            if let Some(server) = lab.hosts.get(host).map(Server::start) {
                lab.servers.insert(host, Mutex::new(server));
            }
        }
        if let Some(host) = lab.hosts.get("api") {
            let more: Vec<&str> = wanted.api_arguments.iter().map(String::as_str).collect();
            let api = Arc::new(api::Api::start(host, &lab.directory, &more));
            if !wanted.bare {
                api.install();
            }
            lab.manifests.use_api(api);
        }
        for node in &lab.nodes {
            lab.manifests.write_object(&format!("node-{}.yaml", node.name), &manifests::node(node));
        }
        lab
    }

    fn wire_up(&mut self, wanted: &LabBuilder) {
        let mut outside = vec!["fab", "ext"];
        if wanted.router {
            outside.extend(["router", "far"]);
        }
        if wanted.kubernetes {
            outside.push("api");
        }
        let names: Vec<&str> = outside.iter().copied().chain(wanted.nodes.iter().map(|n| n.name.as_str())).collect();
        topology::namespaces(&self.name, &names);
        let fab = topology::fabric(&self.name);
        wire::watch(&fab);
        self.hosts = outside.iter().map(|n| (*n, Host::open(n, &format!("{}-{n}", self.name)))).collect();
        topology::plug(&fab, &self.hosts["ext"], 100);
        if wanted.kubernetes {
            topology::plug(&fab, &self.hosts["api"], api::LAST);
        }
        if wanted.router {
            topology::plug(&fab, &self.hosts["router"], 1);
            topology::behind_the_router(&self.hosts["router"], &self.hosts["far"]);
            self.hosts["ext"]
                .ip_batch(&["route add default via 192.0.2.1".into(), "route add default via 2001:db8::1".into()]);
        }
        for (number, spec) in (1..).zip(&wanted.nodes) {
            let host = Host::open(&spec.name, &format!("{}-{}", self.name, spec.name)).with_own_sysfs();
            topology::node_sysctls(&host);
            topology::plug(&fab, &host, spec.last);
            let directory = self.directory.join(&spec.name);
            fs::create_dir_all(directory.join("run")).expect("make a node's directory");
            let mut node =
                Node { host, spec: spec.clone(), number, conflist: Mutex::new(Conflist::empty()), directory };
            node.conflist = Mutex::new(self.conflist_for(&node, wanted.egret));
            topology::masquerade(&node);
            self.nodes.push(Arc::new(node));
        }
        for node in &self.nodes {
            topology::node_routes(node, &self.nodes, wanted.router);
        }
    }

    fn conflist_for(&self, node: &Node, egret: bool) -> Conflist {
        let subnets = [node.pods4(), node.pods6()];
        let list = match node.spec.pods {
            Pods::Routed => Conflist::routed(&node.directory, &subnets),
            Pods::Bridged => Conflist::bridged(&node.directory, &subnets),
        };
        if egret { list.with(node.cni_entry()) } else { list }
    }

    /// The conflist that the lab gives the node, without `egret-cni`.
    pub fn plain_conflist(&self, node: &str) -> Conflist {
        self.conflist_for(self.node(node), false)
    }

    /// A node.
    #[track_caller]
    pub fn node(&self, name: &str) -> &Arc<Node> {
        self.nodes.iter().find(|n| n.name == name).unwrap_or_else(|| panic!("no node {name} in this lab"))
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// A host that is no node: `fab`, `ext`, `router`, `far`.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.get(name).unwrap_or_else(|| panic!("no host {name} in this lab"))
    }

    /// The server on `ext` or `far`.
    pub fn server(&self, host: &str) -> &Mutex<Server> {
        self.servers.get(host).unwrap_or_else(|| panic!("no server on {host} in this lab"))
    }

    /// The lab's name, with which everything of it begins.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that everything of the lab lies in.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The API server.
    pub fn api(&self) -> &Arc<api::Api> {
        self.manifests.api().expect("a lab with an API server")
    }

    /// The cluster directory, or what stands for it.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Writes a file into the cluster directory.
    pub fn write_manifest(&self, file: &str, text: &str) {
        self.manifests.write(file, text);
    }

    /// Removes a file from the cluster directory.
    pub fn remove_manifest(&self, file: &str) {
        self.manifests.remove(file);
    }

    /// Writes a Namespace. `add_pod` does it for namespaces that are not there yet.
    pub fn add_namespace(&self, name: &str, labels: Labels) {
        self.namespaces.lock().expect("a lock").insert(name.to_owned());
        self.manifests.write_object(&format!("namespace-{name}.yaml"), &manifests::namespace(name, labels));
    }

    /// Makes a pod, through the node's conflist. Panics if a plugin fails.
    #[track_caller]
    pub fn add_pod(&self, node: &str, namespace: &str, name: &str, labels: Labels) -> Pod {
        let mut pod = self.sandbox(node, namespace, name, labels);
        pod.attach().unwrap_or_else(|e| panic!("ADD of {namespace}/{name} on {node}: {e}"));
        pod
    }

    /// Makes a pod up to the moment where the runtime calls ADD.
    pub fn sandbox(&self, node: &str, namespace: &str, name: &str, labels: Labels) -> Pod {
        if !self.namespaces.lock().expect("a lock").contains(namespace) {
            self.add_namespace(namespace, &[("kubernetes.io/metadata.name", namespace)]);
        }
        self.sandbox_of(node, namespace, name, labels, Some(self.manifests.clone()))
    }

    /// As [`Lab::sandbox`], for a pod that the cluster directory does not know.
    pub fn sandbox_unknown(&self, node: &str, namespace: &str, name: &str) -> Pod {
        self.sandbox_of(node, namespace, name, &[], None)
    }

    fn sandbox_of(&self, node: &str, namespace: &str, name: &str, labels: Labels, manifests: Option<Manifests>) -> Pod {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        Pod::sandbox(pod::Wanted {
            node: self.node(node),
            namespace,
            name,
            labels,
            netns: format!("{}-p{serial}-{name}", self.name),
            serial,
            manifests,
        })
    }

    /// Waits until something is so. Panics if it is not in time.
    #[track_caller]
    pub fn wait_until(&self, what: &str, patience: Duration, mut is_so: impl FnMut() -> bool) {
        let begin = Instant::now();
        loop {
            if is_so() {
                return;
            }
            assert!(begin.elapsed() < patience, "waited {patience:?} in vain until {what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until something has a value. Panics with the last other value if it has not in time.
    #[track_caller]
    pub fn wait_for<T: PartialEq + Debug>(&self, what: &str, wanted: &T, mut get: impl FnMut() -> T) {
        let begin = Instant::now();
        loop {
            let found = get();
            if found == *wanted {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "waited 20 s for {what} {wanted:?}; it is {found:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the server sees the pod as `address`, of the address's family.
    #[track_caller]
    pub fn wait_seen_as(&self, pod: &Pod, address: impl Into<IpAddr>) {
        let address = address.into();
        let server: IpAddr = if address.is_ipv4() { EXT4.into() } else { EXT6.into() };
        self.wait_for(&format!("{server} to see {} as", pod.name), &Ok(address), || {
            pod.who(server).map_err(|e| e.to_string())
        });
    }

    /// Every address from which packets came to `to`, over the lab's life or since [`Lab::forget_wire`].
    pub fn sources(&self, to: impl Into<IpAddr>) -> BTreeSet<IpAddr> {
        wire::sources(self.host("fab"), to.into())
    }

    /// Everything that went over the wire.
    pub fn wire(&self) -> Vec<wire::Seen> {
        wire::seen(self.host("fab"))
    }

    /// Forgets what went over the wire so far.
    pub fn forget_wire(&self) {
        wire::forget(self.host("fab"));
    }

    /// What a person needs who looks at a failed test.
    fn tell(&self) {
        for entry in fs::read_dir(self.directory.join("logs")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let skipped = lines.len().saturating_sub(150);
            // What a crash says first stands far above its last line.
            let crash = lines[..skipped].iter().position(|l| l.starts_with("fatal error") || l.starts_with("panic"));
            if let Some(crash) = crash {
                eprintln!(
                    "--- {}: it crashed:\n{}",
                    entry.path().display(),
                    lines[crash..(crash + 40).min(lines.len())].join("\n")
                );
            }
            eprintln!("--- {} ({skipped} lines before)", entry.path().display());
            eprintln!("{}", lines[skipped..].join("\n"));
        }
        eprintln!("{}", self.manifests.statuses());
        for node in &self.nodes {
            eprintln!("--- dropped on {}: {}", node.name, node.egret_drops());
        }
        eprintln!("--- lost by the machine itself: {}", machine::dropped() - self.machine_dropped_before);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            self.tell();
        }
        // Daemons first: they write into the directory.
        if let Ok(daemons) = self.daemons.get_mut() {
            daemons.values().for_each(Daemon::kill9);
            daemons.clear();
        }
        self.servers.clear();
        leftovers::remove(&self.name);
    }
}
