//! Egret's daemons on the lab's hosts.

use super::Lab;
use super::api::Role;
use super::daemon::Daemon;
use super::host::Host;
use super::metrics::{self, Metrics};
use super::places;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Where each daemon serves metrics: on its own namespace's loopback.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7870);
/// And health.
const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7869);

impl Lab {
    /// Starts the controller. It runs in the fabric's namespace, where it disturbs nobody, or beside the API server.
    pub fn start_controller(&self) -> Daemon {
        let mut arguments = vec!["controller".to_owned(), "--cluster".to_owned()];
        arguments.extend(self.common_arguments(Role::Controller));
        arguments.extend(self.controller_arguments.iter().cloned());
        self.start_daemon("controller", self.host_of("controller"), arguments)
    }

    /// Starts a node's daemon.
    pub fn start_node(&self, name: &str) -> Daemon {
        self.start_daemon(name, self.node(name), self.node_daemon_arguments(name))
    }

    /// How a node's daemon is started.
    pub fn node_daemon_arguments(&self, name: &str) -> Vec<String> {
        let node = self.node(name);
        let mut arguments = vec!["node".to_owned(), "--cluster".to_owned()];
        arguments.extend(self.common_arguments(Role::Node));
        arguments.extend(["--name".to_owned(), name.to_owned()]);
        arguments.extend(["--run-dir".to_owned(), node.run_dir().display().to_string()]);
        arguments.extend(["--state-dir".to_owned(), node.state_dir().display().to_string()]);
        let end = match self.tunnel_network {
            Some(beginning) => format!("{beginning}{}", node.spec.last),
            None if self.ipv6_tunnel => node.ipv6().to_string(),
            None => node.ipv4().to_string(),
        };
        arguments.extend(["--tunnel-address".to_owned(), end]);
        arguments.extend(self.node_arguments.iter().cloned());
        arguments
    }

    /// Starts a further controller, which serves its metrics elsewhere.
    pub fn start_another_controller(&self, name: &str, port: u16) -> Daemon {
        let mut arguments = vec!["controller".to_owned(), "--cluster".to_owned()];
        arguments.extend(self.common_arguments(Role::Controller));
        arguments.truncate(arguments.len() - 4);
        // Nobody asks it whether it is ready.
        arguments.extend(["--metrics-address".to_owned(), format!("127.0.0.1:{port}")]);
        arguments.extend(["--health-address".to_owned(), String::new()]);
        self.start_daemon(name, self.host_of("controller"), arguments)
    }

    /// The values of `--cluster` and what follows it for both daemons.
    fn common_arguments(&self, role: Role) -> Vec<String> {
        let mut arguments = match self.manifests.api() {
            None => vec![format!("dir:{}", self.manifests.path().display())],
            Some(api) => {
                vec!["kube".to_owned(), "--kubeconfig".to_owned(), api.kubeconfig(role).display().to_string()]
            }
        };
        arguments.extend(["--metrics-address".to_owned(), METRICS.to_string()]);
        arguments.extend(["--health-address".to_owned(), HEALTH.to_string()]);
        arguments
    }

    /// Starts a daemon under a name of its own.
    pub fn start_daemon(&self, name: &str, host: &Host, arguments: Vec<String>) -> Daemon {
        let logs = self.directory.join("logs");
        fs::create_dir_all(&logs).expect("make the logs' directory");
        let program = places::program("egretd");
        let daemon = Daemon::start(name, host, &program, arguments, logs.join(format!("{name}.log")));
        self.daemons.lock().expect("a lock").insert(name.to_owned(), daemon.clone());
        daemon
    }

    /// Starts the controller and all nodes' daemons, and waits until they are ready.
    #[track_caller]
    pub fn start(&self) {
        self.start_controller();
        for node in &self.nodes {
            self.start_node(&node.name);
        }
        for name in std::iter::once("controller").chain(self.nodes.iter().map(|n| n.name.as_str())) {
            self.wait_ready(name);
        }
    }

    /// A daemon that was started: a node's by the node's name, or `controller`.
    #[track_caller]
    pub fn daemon(&self, name: &str) -> Daemon {
        let daemons = self.daemons.lock().expect("a lock");
        daemons.get(name).unwrap_or_else(|| panic!("{name} was not started")).clone()
    }

    fn host_of(&self, daemon: &str) -> &Host {
        match daemon {
            "controller" if self.manifests.api().is_some() => self.host("api"),
            "controller" => self.host("fab"),
            node => self.node(node),
        }
    }

    /// Whether a daemon says that it is ready.
    pub fn ready(&self, daemon: &str) -> bool {
        metrics::get(self.host_of(daemon), HEALTH, "/readyz").is_ok_and(|(status, _)| status == 200)
    }

    /// Waits until a daemon is ready.
    #[track_caller]
    pub fn wait_ready(&self, daemon: &str) {
        self.wait_until(&format!("{daemon} is ready"), Duration::from_secs(20), || {
            assert!(self.daemon(daemon).runs(), "{daemon} has ended by itself");
            self.ready(daemon)
        });
    }

    /// A daemon's metrics.
    #[track_caller]
    pub fn metrics(&self, daemon: &str) -> Metrics {
        Metrics::parse(&self.metrics_text(daemon))
    }

    /// A daemon's metrics as it writes them.
    #[track_caller]
    pub fn metrics_text(&self, daemon: &str) -> String {
        let get = || metrics::get(self.host_of(daemon), METRICS, "/metrics");
        // A daemon without optimization can be busy for a while, on a machine that is busy too.
        let answer = get().or_else(|_| get()).or_else(|_| get());
        let (status, text) = answer.unwrap_or_else(|e| panic!("metrics of {daemon}: {e}"));
        assert_eq!(status, 200, "metrics of {daemon}: {text}");
        text
    }
}
