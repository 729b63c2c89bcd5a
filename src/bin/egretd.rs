//! The command `egretd`: arguments and wiring only.

use anyhow::Context;
use clap::{Parser, Subcommand};
use egret::check;
use egret::cluster::kube::{Reviewer, Verdict};
use egret::cluster::{self, KubeOptions, LeaseSettings, Scope, SourceName};
use egret::ctl::why;
use egret::datapath::ruleset;
use egret::model::ObjectKey;
use egret::model::destination::parse_cidr;
use egret::model::marks::Marks;
use egret::model::target::Target;
use egret::telemetry::access::{Access, Guard};
use egret::telemetry::logs;
use egret::telemetry::server::{Addresses, ListenAddress};
use egret::{api, controller, install, memory, node};
use egret_cni::config::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use egret_nft::Family;
use ipnetwork::IpNetwork;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// How long `egretd ruleset` waits for the cluster's state. Reading 100,000 pods takes some seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Egret gives Kubernetes pods a stable source address outside the cluster.
#[derive(Parser)]
#[command(name = "egretd", version)]
struct Arguments {
    #[command(flatten)]
    logs: Logs,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Logs {
    /// Log level, or levels by module as in `info,egret::datapath=debug`
    #[arg(long, env = "EGRET_LOG_LEVEL", default_value = "info", global = true)]
    log_level: String,
    /// Log format
    #[arg(long, env = "EGRET_LOG_FORMAT", value_enum, default_value_t, global = true)]
    log_format: logs::Format,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node daemon: apply policies to this node's pods, and hold this node's egress IPs
    Node(Node),
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
}

#[derive(clap::Args)]
struct Cluster {
    /// Source of cluster state: kube, or dir:PATH
    #[arg(long = "cluster", env = "EGRET_CLUSTER")]
    source: SourceName,
    /// With --cluster kube: kubeconfig file with the API server's address and the credentials [default: those of a
    /// pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Why {
    /// Pod, as NAMESPACE/NAME
    #[arg(value_parser = pod)]
    pod: ObjectKey,
    /// Destination: 203.0.113.7, 203.0.113.7:443, [2001:db8::7]:53/udp
    #[arg(long)]
    to: Option<Target>,
    #[command(flatten)]
    cluster: Cluster,
    /// Networks that no policy covers; give the same as the nodes' daemons have
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    direct: Vec<IpNetwork>,
}

#[derive(clap::Args)]
struct Ruleset {
    /// The node's name in the cluster
    #[arg(long = "node", env = "EGRET_NODE_NAME")]
    name: String,
    #[command(flatten)]
    cluster: Cluster,
    /// Networks that no policy covers, as the node's daemon is told them
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    direct: Vec<IpNetwork>,
    #[command(flatten)]
    marks: MarkBits,
}

#[derive(clap::Args)]
struct State {
    /// Run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    run_dir: PathBuf,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Where Egret's bits lie in marks.
#[derive(clap::Args)]
struct MarkBits {
    /// Upper 16 bits of Egret's connection marks
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    connection_mark: u16,
    /// Lowest of the eleven bits of packet marks that Egret uses, 16 to 21
    #[arg(long, env = "EGRET_MARK_SHIFT", default_value_t = Marks::default().shift)]
    mark_shift: u8,
}

#[derive(clap::Args)]
struct Node {
    /// Name of this node in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    name: String,
    #[command(flatten)]
    cluster: Cluster,
    /// Directory of the plugin's socket and the attachment records
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    run_dir: PathBuf,
    /// Directory of the offline policy snapshot for the plugin; it must outlive a reboot
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Address to which other nodes send tunnel packets [default: the node's first InternalIP on this host of the
    /// tunnel's family]
    #[arg(long, env = "EGRET_TUNNEL_ADDRESS")]
    tunnel_address: Option<IpAddr>,
    /// Address family of the tunnel's outer packets, the same on all nodes: IPv4 or IPv6 [default: one that all nodes
    /// have]
    #[arg(long, env = "EGRET_TUNNEL_FAMILY", value_parser = tunnel_family)]
    tunnel_family: Option<Family>,
    /// Networks that no policy covers, in addition to the cluster's own: 10.0.0.0/8,fd00::/8
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    direct: Vec<IpNetwork>,
    /// Interval at which a gateway's nodes are probed, 50ms to 10s
    #[arg(long, env = "EGRET_PROBE_INTERVAL", default_value = "300ms", value_parser = interval)]
    probe_interval: Duration,
    /// Number of half intervals without a reply after which a node counts as dead, 1 to 20; each has three probes
    #[arg(long, env = "EGRET_PROBE_MISSES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    probe_misses: u32,
    #[command(flatten)]
    marks: MarkBits,
    /// Own the nftables tables, so that no other program can change or flush them while the daemon runs (Linux 6.9)
    #[arg(long, env = "EGRET_OWN_TABLES", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    own_tables: bool,
    /// Record the beginning and the end of each connection that leaves from an egress IP of this node, as a line of JSON:
    /// stdout, file:/PATH, syslog:HOST:PORT, unix:/PATH
    #[arg(long, env = "EGRET_FLOW_LOG", value_name = "TARGET")]
    flow_log: Option<node::FlowLogTarget>,
    /// Address of /metrics; empty for none
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9871")]
    metrics_address: ListenAddress,
    /// Address of /healthz and /readyz; empty for none
    #[arg(long, env = "EGRET_HEALTH_ADDRESS", default_value = "127.0.0.1:9873")]
    health_address: ListenAddress,
    #[command(flatten)]
    readers: Readers,
    /// Directory of the network configuration in which to keep the plugin's entry
    #[arg(long, env = "EGRET_CNI_CONF_DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Directory in which to keep the plugin's program, copied from this program's directory
    #[arg(long, env = "EGRET_CNI_BIN_DIR", requires = "cni_conf_dir")]
    cni_bin_dir: Option<PathBuf>,
}

#[derive(clap::Args)]
struct CniDirectories {
    /// Directory in which the container runtime looks for plugins
    #[arg(long, env = "EGRET_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// Directory in which the container runtime looks for network configurations
    #[arg(long, env = "EGRET_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
}

#[derive(clap::Args)]
struct Install {
    #[command(flatten)]
    directories: CniDirectories,
    /// Path of the plugin's program [default: egret-cni in this program's directory]
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// Socket of `egretd node` on this host: cni.sock in its run directory
    #[arg(long, env = "EGRET_CNI_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// State directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Also put the entry into the network configuration, and wait until there is one; for an `egretd node` without
    /// --cni-conf-dir
    #[arg(long)]
    entry: bool,
}

#[derive(clap::Args)]
struct Uninstall {
    #[command(flatten)]
    directories: CniDirectories,
    /// Run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    run_dir: PathBuf,
    /// State directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Upper 16 bits of the connection marks that Egret used
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    connection_mark: u16,
    /// Also remove the plugin's program; do this when no pod is left that started with it
    #[arg(long)]
    remove_plugin: bool,
    /// Also remove the node's report from this source of cluster state: kube, or dir:PATH
    #[arg(long, env = "EGRET_CLUSTER", requires = "name")]
    cluster: Option<SourceName>,
    /// With --cluster kube: kubeconfig file with the API server's address and the credentials [default: those of a
    /// pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Name of the node in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    name: Option<String>,
}

fn network(text: &str) -> Result<IpNetwork, String> {
    parse_cidr(text).map_err(|e| e.to_string())
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
    let wrong = || format!("{text:?} is no time from 50ms to 10s; write it like 300ms or 1.5s");
    let (number, milliseconds) = match text.strip_suffix("ms") {
        Some(number) => (number, 1.0),
        None => (text.strip_suffix('s').ok_or_else(wrong)?, 1000.0),
    };
    let milliseconds = number.trim().parse::<f64>().map_err(|_| wrong())? * milliseconds;
    // NaN is in no range.
    if !(50.0..=10_000.0).contains(&milliseconds) {
        return Err(wrong());
    }
    Ok(Duration::from_micros((milliseconds * 1000.0) as u64))
}

fn base(text: &str) -> Result<u16, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u16::from_str_radix(digits, 16).map_err(|e| format!("{e}; write four hexadecimal digits, as in 0x4547"))
}

/// Authentication of metrics readers.
#[derive(clap::Args)]
struct Readers {
    /// Serve /metrics over TLS, and only to users who may `get` the non-resource URL /metrics; the API server decides
    /// by TokenReview and SubjectAccessReview
    #[arg(long, env = "EGRET_METRICS_AUTHENTICATION", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    metrics_authentication: bool,
}

#[derive(clap::Args)]
struct Controller {
    #[command(flatten)]
    cluster: Cluster,
    /// Namespace of the Lease for leader election among several controllers [default: the pod's own]
    #[arg(long, env = "EGRET_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// This controller's identity in the Lease [default: the host's name and a random number]
    #[arg(long, env = "EGRET_LEASE_IDENTITY")]
    lease_identity: Option<String>,
    /// Address of /metrics; empty for none
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9872")]
    metrics_address: ListenAddress,
    /// Address of /healthz and /readyz; empty for none
    #[arg(long, env = "EGRET_HEALTH_ADDRESS", default_value = "127.0.0.1:9874")]
    health_address: ListenAddress,
    #[command(flatten)]
    readers: Readers,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("egretd: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    memory::give_back_early();
    logs::init(arguments.logs.log_format, &arguments.logs.log_level)?;
    match arguments.command {
        Command::Node(flags) => runtime()?.block_on(flags.run())?,
        Command::Controller(flags) => flags.run()?,
        Command::Install(flags) => install::run(&flags.options()?)?,
        Command::Uninstall(flags) => runtime()?.block_on(install::uninstall::run(&flags.options()?))?,
        Command::Crds => print(&api::crds::yaml()?)?,
        Command::Check => return Ok(check::run()),
        Command::Why(flags) => print(&flags.run()?)?,
        Command::Ruleset(flags) => print(&flags.run()?)?,
        Command::State(flags) => print(&flags.run()?)?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Node {
    async fn run(self) -> anyhow::Result<()> {
        let stop = stopped()?;
        let cluster = self.cluster.name();
        let addresses = self.readers.addresses(self.metrics_address, self.health_address, &cluster).await?;
        let options = node::Options {
            name: self.name,
            cluster,
            run_dir: self.run_dir,
            state_dir: self.state_dir,
            tunnel_address: self.tunnel_address,
            tunnel_family: self.tunnel_family,
            direct: self.direct,
            liveness: node::liveness::Settings { interval: self.probe_interval, misses: self.probe_misses },
            marks: self.marks.layout()?,
            own_tables: self.own_tables,
            flow_log: self.flow_log,
            addresses,
            cni_dirs: self.cni_conf_dir.map(|conf_dir| (conf_dir, self.cni_bin_dir)),
        };
        node::run(options, stop).await
    }
}

impl Readers {
    async fn addresses(
        self,
        metrics: ListenAddress,
        health: ListenAddress,
        cluster: &SourceName,
    ) -> anyhow::Result<Addresses> {
        let guard = match self.metrics_authentication {
            true => Some(guard(cluster::reviewer(cluster).await?)),
            false => None,
        };
        Ok(Addresses { metrics, health, guard })
    }
}

fn guard(reviewer: Reviewer) -> Guard {
    Guard::new(Box::new(move |token| {
        let reviewer = reviewer.clone();
        Box::pin(async move {
            match reviewer.may_read_metrics(&token).await {
                Ok(Verdict::Allowed) => Access::Allowed,
                Ok(Verdict::Unauthenticated) => Access::Unauthenticated,
                Ok(Verdict::Forbidden(who)) => Access::Forbidden(format!(
                    "{who} may not get the non-resource URL /metrics; bind it to the ClusterRole egret-metrics-reader"
                )),
                Err(e) => Access::Unknown(format!("the API server cannot review the token: {e}")),
            }
        })
    }))
}

impl Install {
    fn options(self) -> anyhow::Result<install::Options> {
        Ok(install::Options {
            bin_dir: self.directories.cni_bin_dir,
            conf_dir: self.directories.cni_conf_dir,
            plugin: self.plugin.map_or_else(install::plugin::beside_this_program, Ok)?,
            socket: self.socket,
            state_dir: self.state_dir,
            entry: self.entry,
        })
    }
}

impl Uninstall {
    fn options(self) -> anyhow::Result<install::uninstall::Options> {
        Ok(install::uninstall::Options {
            bin_dir: self.directories.cni_bin_dir,
            conf_dir: self.directories.cni_conf_dir,
            run_dir: self.run_dir,
            state_dir: self.state_dir,
            remove_plugin: self.remove_plugin,
            marks: Marks::new(self.connection_mark, Marks::default().shift)?,
            cluster: self
                .cluster
                .map(|c| c.with(KubeOptions { kubeconfig: self.kubeconfig, ..KubeOptions::default() }))
                .zip(self.name),
        })
    }
}

impl Controller {
    /// Runs the controller. It handles signals itself, because it releases its Lease before it ends.
    fn run(self) -> anyhow::Result<()> {
        let identity = self.lease_identity.unwrap_or_else(LeaseSettings::unique_identity);
        let lease = Some(LeaseSettings::new(self.lease_namespace.unwrap_or_default(), identity));
        let source = self.cluster.source.with(KubeOptions {
            kubeconfig: self.cluster.kubeconfig,
            lease,
            ..KubeOptions::default()
        });
        runtime()?.block_on(async {
            let addresses = self.readers.addresses(self.metrics_address, self.health_address, &source).await?;
            controller::run(&source, &addresses).await
        })
    }
}

impl Cluster {
    fn name(self) -> SourceName {
        self.source.with(KubeOptions { kubeconfig: self.kubeconfig, ..KubeOptions::default() })
    }
}

async fn open_soon(name: &SourceName, scope: Scope) -> anyhow::Result<cluster::Source> {
    match timeout(PATIENCE, cluster::open(name, scope)).await {
        Ok(source) => source,
        Err(_) => anyhow::bail!("cannot read the cluster within {PATIENCE:?}; the log above says why"),
    }
}

impl MarkBits {
    fn layout(&self) -> anyhow::Result<Marks> {
        Ok(Marks::new(self.connection_mark, self.mark_shift)?)
    }
}

impl Ruleset {
    fn run(self) -> anyhow::Result<String> {
        let (marks, name) = (self.marks.layout()?, self.cluster.name());
        let source = runtime()?.block_on(open_soon(&name, Scope::Node(self.name.clone())))?;
        let (cluster, problems) = (source.snapshots.borrow().clone(), source.problems.borrow().clone());
        for problem in &*problems {
            eprintln!("egretd: cannot read a manifest, the node may use an earlier version of it: {problem}");
        }
        Ok(ruleset::Ruleset::expected(&cluster, &self.name, &self.direct, marks)?.to_string())
    }
}

impl State {
    fn run(self) -> anyhow::Result<String> {
        let state = node::node_state::ask(&self.run_dir)?;
        Ok(if self.json { serde_json::to_string_pretty(&state)? + "\n" } else { state.to_string() })
    }
}

impl Why {
    fn run(self) -> anyhow::Result<String> {
        let name = self.cluster.name();
        Ok(runtime()?.block_on(why::explain(&name, &self.pod, self.to, &self.direct))?.text)
    }
}

/// Completes when the daemon receives SIGTERM or SIGINT.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        }
    })
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("cannot start the async runtime")
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // `egretd crds | head`: a closed pipe is no error.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("stdout"),
    }
}
