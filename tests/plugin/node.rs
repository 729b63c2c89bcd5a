//! A node, its pods and a host outside, in network namespaces.

use egret_cni::offline_policies::OfflinePolicies;
use lab::turn::{self, Turn};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// Outside the cluster.
pub const OUTSIDE: [&str; 2] = ["192.0.2.100", "2001:db8::100"];
/// A pod on another node.
pub const CLUSTER: [&str; 2] = ["10.244.9.9", "fd00:244:9::9"];

static NODES: AtomicU32 = AtomicU32::new(0);

/// ```text
/// pod (eth0) --- (vN) node (eth0) --- (eth0) outside: OUTSIDE and CLUSTER
/// ```
pub struct Node {
    prefix: String,
    /// The node's namespace.
    pub name: String,
    directory: TempDir,
    _turn: Arc<Turn>,
    pods: Mutex<Vec<String>>,
}

pub struct Pod {
    /// The pod's namespace.
    pub name: String,
    /// The name of its veth's end on the node.
    pub host: String,
    /// 10.244.1.N and fd00:244:1::N.
    pub addresses: [String; 2],
}

impl Node {
    pub fn new() -> Node {
        assert!(nix::unistd::Uid::effective().is_root(), "these tests make network namespaces: run them as root");
        let turn = turn::beside_others();
        let prefix = format!("egt-{}-{}", std::process::id(), NODES.fetch_add(1, Ordering::Relaxed));
        let directory = tempfile::tempdir().unwrap();
        let node = Node { name: format!("{prefix}-node"), prefix, directory, _turn: turn, pods: Mutex::default() };
        let (name, outside) = (&node.name, node.outside());
        add_namespace(name);
        add_namespace(&outside);
        ip(&format!("link add eth0 netns {name} type veth peer name eth0 netns {outside}"));
        for (ns, four, six) in [(name, "192.0.2.1", "2001:db8::1"), (&outside, OUTSIDE[0], OUTSIDE[1])] {
            ip(&format!("-n {ns} address add {four}/24 dev eth0"));
            ip(&format!("-n {ns} address add {six}/64 dev eth0 nodad"));
            ip(&format!("-n {ns} link set lo up"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        for (address, bits) in [(CLUSTER[0], 32), (CLUSTER[1], 128)] {
            ip(&format!("-n {outside} address add {address}/{bits} dev lo"));
        }
        ip(&format!("-n {outside} route add 10.244.1.0/24 via 192.0.2.1"));
        ip(&format!("-n {outside} -6 route add fd00:244:1::/64 via 2001:db8::1"));
        ip(&format!("-n {name} route add 10.244.9.0/24 via 192.0.2.100"));
        ip(&format!("-n {name} -6 route add fd00:244:9::/64 via 2001:db8::100"));
        node.inside(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        node
    }

    fn outside(&self) -> String {
        format!("{}-out", self.prefix)
    }

    /// The run directory, with the daemon's socket and files.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// The state directory, with the offline policy snapshot.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("cni.sock")
    }

    /// An empty namespace, like a pod's.
    pub fn empty_pod(&self, number: u8) -> Pod {
        let name = format!("{}-p{number}", self.prefix);
        add_namespace(&name);
        self.pods.lock().unwrap().push(name.clone());
        let addresses = [format!("10.244.1.{number}"), format!("fd00:244:1::{number}")];
        Pod { name, host: format!("v{number}"), addresses }
    }

    /// A pod that reaches the node and the outside, as a main plugin leaves it.
    pub fn pod(&self, number: u8) -> Pod {
        let pod = self.empty_pod(number);
        let (ns, node, host) = (&pod.name, &self.name, &pod.host);
        ip(&format!("link add eth0 netns {ns} type veth peer name {host} netns {node}"));
        let [four, six] = &pod.addresses;
        ip(&format!("-n {ns} address add {four}/32 dev eth0"));
        ip(&format!("-n {ns} address add {six}/128 dev eth0 nodad"));
        ip(&format!("-n {ns} link set eth0 up"));
        ip(&format!("-n {node} address add 169.254.1.1/32 dev {host}"));
        ip(&format!("-n {node} address add fe80::1/64 dev {host} nodad"));
        ip(&format!("-n {node} link set {host} up"));
        ip(&format!("-n {node} route add {four} dev {host}"));
        ip(&format!("-n {node} -6 route add {six} dev {host}"));
        ip(&format!("-n {ns} route add 169.254.1.1 dev eth0"));
        ip(&format!("-n {ns} route add default via 169.254.1.1"));
        ip(&format!("-n {ns} -6 route add default via fe80::1 dev eth0"));
        pod
    }

    /// Creates what a daemon leaves for its absence: the snapshot, by which policies select pods of `selectable`, and
    /// the quarantine's routes.
    pub fn prepare(&self, selectable: &[&str]) {
        self.offline_policies(selectable);
        std::fs::create_dir_all(self.run_dir()).unwrap();
        let name = &self.name;
        ip(&format!("-n {name} route add unreachable default table 7873"));
        ip(&format!("-n {name} -6 route add unreachable default table 7873"));
        ip(&format!("-n {name} route add 10.244.9.0/24 via 192.0.2.100 table 7873"));
        ip(&format!("-n {name} -6 route add fd00:244:9::/64 via 2001:db8::100 table 7873"));
    }

    /// Creates the snapshot only, as after a reboot. Each namespace has a policy `visitors`.
    pub fn offline_policies(&self, selectable: &[&str]) {
        let selectable = selectable.iter().map(|ns| ((*ns).to_owned(), vec![format!("{ns}/visitors")])).collect();
        OfflinePolicies::new(selectable, None).store(&self.state_dir()).unwrap();
    }

    /// The quarantine's rules, as `ip rule` prints them: v4, then v6.
    pub fn rules(&self) -> Vec<String> {
        let mut all = String::new();
        for family in ["-4", "-6"] {
            all += &ip(&format!("{family} -n {} rule list priority 71", self.name));
        }
        all.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    /// The names of the attachments' files.
    pub fn records(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.run_dir().join("attachments")) else { return Vec::new() };
        let mut all: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    }

    /// Runs `what` in the node's network namespace; processes that it starts are in this namespace.
    pub fn inside<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        inside(&self.name, what)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let pods = std::mem::take(self.pods.get_mut().unwrap());
        for name in pods.iter().chain([&self.name, &self.outside()]) {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

impl Pod {
    pub fn netns(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// The main plugin's result for the pod.
    pub fn result(&self) -> String {
        let [four, six] = &self.addresses;
        format!(
            r#"{{"cniVersion":"1.1.0","interfaces":[{{"name":"{}"}},{{"name":"eth0","sandbox":"{}"}}],
                "ips":[{{"interface":1,"address":"{four}/32"}},{{"interface":1,"address":"{six}/128"}}],"dns":{{}}}}"#,
            self.host,
            self.netns().display()
        )
    }

    /// Whether packets to both `addresses` and their replies arrive: the ports are closed, and the other side says
    /// so.
    pub fn reaches(&self, addresses: [&str; 2]) -> [bool; 2] {
        inside(&self.name, || {
            addresses.map(|address| {
                let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), 9);
                match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
                    Ok(_) => true,
                    Err(e) => e.kind() == io::ErrorKind::ConnectionRefused,
                }
            })
        })
    }
}

fn add_namespace(name: &str) {
    ip(&format!("netns add {name}"));
    // The interfaces' link-local addresses are usable at once, and neighbours are resolved from the first packet on.
    inside(name, || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
}

fn inside<T: Send>(namespace: &str, what: impl FnOnce() -> T + Send) -> T {
    let file = File::open(format!("/run/netns/{namespace}")).unwrap();
    thread::scope(|scope| {
        let there = scope.spawn(|| {
            #[allow(clippy::disallowed_methods, reason = "this thread is for nothing else")]
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            what()
        });
        there.join().unwrap()
    })
}

/// Runs `ip`, and returns its output.
pub fn ip(arguments: &str) -> String {
    let out = Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is needed");
    assert!(out.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}
