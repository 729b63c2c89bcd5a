//! The arguments of `egretd`.

use clap::{Parser, Subcommand};
use egret::cluster::SourceName;
use egret::model::ObjectKey;
use egret::model::destination::parse_cidr;
use egret::model::marks::Marks;
use egret::model::target::Target;
use egret::node;
use egret::probe::arguments::{ProbeArguments, ServerArguments};
use egret::telemetry::logs;
use egret::telemetry::server::ListenAddress;
use egret_cni::config::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use egret_nft::Family;
use ipnetwork::IpNetwork;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Egret gives Kubernetes pods a stable source address outside the cluster.
#[derive(Parser)]
#[command(name = "egretd", version)]
pub struct Arguments {
    #[command(flatten)]
    pub logs: Logs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(clap::Args)]
pub struct Logs {
    /// Log level, or levels by module as in `info,egret::node=debug`
    #[arg(long, env = "EGRET_LOG_LEVEL", default_value = "info", global = true)]
    pub log_level: String,
    /// Log format
    #[arg(long, env = "EGRET_LOG_FORMAT", value_enum, default_value_t, global = true)]
    pub log_format: logs::Format,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the node daemon: apply policies to this node's pods, and hold this node's egress IPs
    Node(Box<Node>),
    /// Run the controller: allocate egress IPs to policies, and assign them to nodes
    Controller(Controller),
    /// Install the CNI plugin; `egretd node` puts its entry into the network configuration when it is in sync
    Install(Install),
    /// Remove everything of Egret's from this host; pods then leave with their node's address
    Uninstall(Uninstall),
    /// Print the CustomResourceDefinitions
    Crds,
    /// Check what this kernel and this host lack, one line a requirement; fails if Egret cannot run here
    Check,
    /// Explain with which address a pod leaves the cluster, and why: its policies, or the way to one destination
    Why(Why),
    /// Print the nftables ruleset that a node loads, as it follows from the cluster's state, in nft's own syntax
    Ruleset(Ruleset),
    /// Print what the daemon on this host desires and observes: egress IPs, pods, uplinks, faults
    State(State),
    /// Join standard input and output to the daemon on this host, for `kubectl egret trace`
    Trace(Trace),
    /// Answer, outside the cluster, with the source address that is seen: the server for `kubectl egret test`
    TestServer(ServerArguments),
    /// Ask a server which source address it sees, as pods of `kubectl egret test` do
    #[command(hide = true)]
    Probe(ProbeArguments),
}

#[derive(clap::Args)]
pub struct Cluster {
    /// Source of cluster state: kube, or dir:PATH
    #[arg(long = "cluster", env = "EGRET_CLUSTER")]
    pub source: SourceName,
    /// With --cluster kube: kubeconfig file with the API server's address and the credentials [default: those of a
    /// pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct Why {
    /// Pod, as NAMESPACE/NAME
    #[arg(value_parser = pod)]
    pub pod: ObjectKey,
    /// Destination: 203.0.113.7, 203.0.113.7:443, [2001:db8::7]:53/udp
    #[arg(long)]
    pub to: Option<Target>,
    #[command(flatten)]
    pub cluster: Cluster,
    /// Networks that no policy covers; give the same as the nodes' daemons have
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    pub direct: Vec<IpNetwork>,
}

#[derive(clap::Args)]
pub struct Ruleset {
    /// The node's name in the cluster
    #[arg(long = "node", env = "EGRET_NODE_NAME")]
    pub name: String,
    #[command(flatten)]
    pub cluster: Cluster,
    /// Networks that no policy covers, as the node's daemon is told them
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    pub direct: Vec<IpNetwork>,
    #[command(flatten)]
    pub marks: MarkBits,
}

#[derive(clap::Args)]
pub struct State {
    /// Run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    pub run_dir: PathBuf,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Trace {
    /// Run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    pub run_dir: PathBuf,
}

/// Where Egret's bits lie in marks.
#[derive(clap::Args)]
pub struct MarkBits {
    /// Upper 16 bits of Egret's connection marks
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    pub connection_mark: u16,
    /// Lowest of the eleven bits of packet marks that Egret uses, 16 to 21
    #[arg(long, env = "EGRET_MARK_SHIFT", default_value_t = Marks::default().shift)]
    pub mark_shift: u8,
}

#[derive(clap::Args)]
pub struct Node {
    /// Name of this node in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    pub name: String,
    #[command(flatten)]
    pub cluster: Cluster,
    /// Directory of the plugin's socket and the attachment records
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    pub run_dir: PathBuf,
    /// Directory of the offline policy snapshot for the plugin; it must outlive a reboot
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Address to which other nodes send tunnel packets [default: the node's first InternalIP on this host of the
    /// tunnel's family]
    #[arg(long, env = "EGRET_TUNNEL_ADDRESS")]
    pub tunnel_address: Option<IpAddr>,
    /// Address family of the tunnel's outer packets, the same on all nodes: IPv4 or IPv6 [default: one that all nodes
    /// have]
    #[arg(long, env = "EGRET_TUNNEL_FAMILY", value_parser = tunnel_family)]
    pub tunnel_family: Option<Family>,
    /// Networks that no policy covers, in addition to the cluster's own: 10.0.0.0/8,fd00::/8
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    pub direct: Vec<IpNetwork>,
    /// Interval at which a gateway's nodes are probed, 50ms to 10s
    #[arg(long, env = "EGRET_PROBE_INTERVAL", default_value = "300ms", value_parser = interval)]
    pub probe_interval: Duration,
    /// Number of half intervals without a reply after which a node counts as dead, 1 to 20; each has three probes
    #[arg(long, env = "EGRET_PROBE_MISSES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub probe_misses: u32,
    #[command(flatten)]
    pub marks: MarkBits,
    /// Own the nftables tables, so that no other program can change or flush them while the daemon runs (Linux 6.9)
    #[arg(long, env = "EGRET_OWN_TABLES", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    pub own_tables: bool,
    /// How packets enter the tunnel: by the egress hook of its device (Linux 5.16), or by a pair of veths before it, which
    /// costs more and works on any kernel; auto: by the hook, where the kernel has it
    #[arg(long, env = "EGRET_TUNNEL_EGRESS", default_value = "auto", value_parser = tunnel_egress)]
    pub tunnel_egress: node::TunnelEgress,
    /// Send packets of long connections past the host's nf_tables by eBPF, each connection for this time, 50ms to 1s, after
    /// which one of its packets takes the kernel's own way again; 0: none
    #[arg(long, env = "EGRET_FAST_PATH_LEASE", default_value = "0", value_parser = lease)]
    pub fast_path_lease: Duration,
    /// Program that brings an egress IP to this node before the node uses it, a cloud's secondary address for instance:
    /// unix:/PATH, http://HOST:PORT/PATH
    #[arg(long, env = "EGRET_ASSIGN_HOOK", value_name = "HOOK")]
    pub assign_hook: Option<node::HookUrl>,
    /// Record the beginning and the end of each connection that leaves from an egress IP of this node, as a line of JSON:
    /// stdout, file:/PATH, syslog:HOST:PORT, unix:/PATH
    #[arg(long, env = "EGRET_FLOW_LOG", value_name = "TARGET")]
    pub flow_log: Option<node::LogTarget>,
    /// Address of /metrics; empty for none
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9871")]
    pub metrics_address: ListenAddress,
    /// Address of /healthz and /readyz; empty for none
    #[arg(long, env = "EGRET_HEALTH_ADDRESS", default_value = "127.0.0.1:9873")]
    pub health_address: ListenAddress,
    #[command(flatten)]
    pub readers: Readers,
    /// Directory of the network configuration in which to keep the plugin's entry
    #[arg(long, env = "EGRET_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory in which to keep the plugin's program, copied from this program's directory
    #[arg(long, env = "EGRET_CNI_BIN_DIR", requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct CniDirectories {
    /// Directory in which the container runtime looks for plugins
    #[arg(long, env = "EGRET_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Directory in which the container runtime looks for network configurations
    #[arg(long, env = "EGRET_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
}

#[derive(clap::Args)]
pub struct Install {
    #[command(flatten)]
    pub directories: CniDirectories,
    /// Path of the plugin's program [default: egret-cni in this program's directory]
    #[arg(long)]
    pub plugin: Option<PathBuf>,
    /// Socket of `egretd node` on this host: cni.sock in its run directory
    #[arg(long, env = "EGRET_CNI_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// State directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Also put the entry into the network configuration, and wait until there is one; for an `egretd node` without
    /// --cni-conf-dir
    #[arg(long)]
    pub entry: bool,
}

#[derive(clap::Args)]
pub struct Uninstall {
    #[command(flatten)]
    pub directories: CniDirectories,
    /// Run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    pub run_dir: PathBuf,
    /// State directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Upper 16 bits of the connection marks that Egret used
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    pub connection_mark: u16,
    /// Also remove the plugin's program; do this when no pod is left that started with it
    #[arg(long)]
    pub remove_plugin: bool,
    /// Also remove the node's report from this source of cluster state: kube, or dir:PATH
    #[arg(long, env = "EGRET_CLUSTER", requires = "name")]
    pub cluster: Option<SourceName>,
    /// With --cluster kube: kubeconfig file with the API server's address and the credentials [default: those of a
    /// pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of the node in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    pub name: Option<String>,
}

fn network(text: &str) -> Result<IpNetwork, String> {
    parse_cidr(text).map_err(|e| e.to_string())
}

fn tunnel_egress(text: &str) -> Result<node::TunnelEgress, String> {
    match text.to_ascii_lowercase().as_str() {
        "auto" => Ok(node::TunnelEgress::Auto),
        "hook" => Ok(node::TunnelEgress::Hook),
        "veth" => Ok(node::TunnelEgress::Veth),
        _ => Err(format!("{text:?} is not a value of --tunnel-egress; write auto, hook or veth")),
    }
}

fn tunnel_family(text: &str) -> Result<Family, String> {
    match text.to_ascii_lowercase().as_str() {
        "ipv4" => Ok(Family::V4),
        "ipv6" => Ok(Family::V6),
        _ => Err(format!("{text:?} is no address family; write IPv4 or IPv6")),
    }
}

fn pod(text: &str) -> Result<ObjectKey, String> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| format!("{text:?} is no pod; write NAMESPACE/NAME"))?;
    Ok(ObjectKey::new(namespace, name))
}

fn interval(text: &str) -> Result<Duration, String> {
    duration(text, 50.0..=10_000.0)
        .ok_or_else(|| format!("{text:?} is no time from 50ms to 10s; write it like 300ms or 1.5s"))
}

fn lease(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    duration(text, 50.0..=1000.0)
        .ok_or_else(|| format!("{text:?} is no time from 50ms to 1s, and not 0; write it like 500ms or 1s"))
}

/// A time within this range of milliseconds.
fn duration(text: &str, range: std::ops::RangeInclusive<f64>) -> Option<Duration> {
    let (number, milliseconds) = match text.strip_suffix("ms") {
        Some(number) => (number, 1.0),
        None => (text.strip_suffix('s')?, 1000.0),
    };
    let milliseconds = number.trim().parse::<f64>().ok()? * milliseconds;
    // NaN is in no range.
    range.contains(&milliseconds).then(|| Duration::from_micros((milliseconds * 1000.0) as u64))
}

fn base(text: &str) -> Result<u16, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u16::from_str_radix(digits, 16).map_err(|e| format!("{e}; write four hexadecimal digits, as in 0x4547"))
}

/// Authentication of metrics readers.
#[derive(clap::Args)]
pub struct Readers {
    /// Serve /metrics over TLS, and only to users who may `get` the non-resource URL /metrics; the API server decides
    /// by TokenReview and SubjectAccessReview
    #[arg(long, env = "EGRET_METRICS_AUTHENTICATION", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub metrics_authentication: bool,
}

#[derive(clap::Args)]
pub struct Controller {
    #[command(flatten)]
    pub cluster: Cluster,
    /// Namespace of the Lease for leader election among several controllers [default: the pod's own]
    #[arg(long, env = "EGRET_LEASE_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// This controller's identity in the Lease [default: the host's name and a random number]
    #[arg(long, env = "EGRET_LEASE_IDENTITY")]
    pub lease_identity: Option<String>,
    /// Make an EgressPolicy of each Service with the annotation kube-vip.io/egress: "true": its pods leave from its address
    #[arg(long, env = "EGRET_KUBE_VIP_ANNOTATIONS", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub kube_vip_annotations: bool,
    /// Address of /metrics; empty for none
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9872")]
    pub metrics_address: ListenAddress,
    /// Address of /healthz and /readyz; empty for none
    #[arg(long, env = "EGRET_HEALTH_ADDRESS", default_value = "127.0.0.1:9874")]
    pub health_address: ListenAddress,
    #[command(flatten)]
    pub readers: Readers,
}
