//! The daemon: arguments and wiring only.

use anyhow::Context;
use clap::{Parser, Subcommand};
use egret::check;
use egret::cluster::kube::{Reviewer, Verdict};
use egret::cluster::{self, KubeOptions, LeaseSettings, Scope, SourceName};
use egret::cni::config::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use egret::model::ObjectKey;
use egret::model::destination::parse_cidr;
use egret::model::marks::Marks;
use egret::model::target::Target;
use egret::model::tunnel_family::TunnelFamily;
use egret::node_plan::why::why;
use egret::telemetry::access::{Access, Guard};
use egret::telemetry::logs;
use egret::telemetry::server::{Addresses, ListenAddress};
use egret::{api, controller, install, memory, node};
use ipnetwork::IpNetwork;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// How long `egretd why` waits for the cluster's state. A hundred thousand pods take some seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Egret gives Kubernetes pods a source address that stays.
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
    /// What is logged: a level, or levels by module as in `info,egret::kernel=debug`
    #[arg(long, env = "EGRET_LOG_LEVEL", default_value = "info", global = true)]
    log_level: String,
    /// How it is logged
    #[arg(long, env = "EGRET_LOG_FORMAT", value_enum, default_value_t, global = true)]
    log_format: logs::Format,
}

#[derive(Subcommand)]
enum Command {
    /// Hold this node's pods to their policies, and this node's egress addresses
    Node(Node),
    /// Keep the allocations: give policies their addresses, and addresses their nodes
    Controller(Controller),
    /// Put the CNI plugin into place; `egretd node` puts its entry into the network configuration when it is in sync
    Install(Install),
    /// Remove everything of Egret's from this host; pods then leave from their node's address
    Uninstall(Uninstall),
    /// Print the CustomResourceDefinitions
    Crds,
    /// Tell what this kernel and this host lack, one line a need; fails if Egret cannot run here
    Check,
    /// Tell why a pod leaves the cluster as it does: its policies, or what becomes of one destination
    Why(Why),
}

#[derive(clap::Args)]
struct Cluster {
    /// Where cluster state comes from: kube, or dir:PATH
    #[arg(long = "cluster", env = "EGRET_CLUSTER")]
    source: SourceName,
    /// With --cluster kube: the file with the API server's address and the credentials [default: those of a pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Why {
    /// The pod, as NAMESPACE/NAME
    #[arg(value_parser = pod)]
    pod: ObjectKey,
    /// A destination: 203.0.113.7, 203.0.113.7:443, [2001:db8::7]:53/udp
    #[arg(long)]
    to: Option<Target>,
    #[command(flatten)]
    cluster: Cluster,
    /// Networks that no policy covers, as the nodes' daemons are told them
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    direct: Vec<IpNetwork>,
}

#[derive(clap::Args)]
struct Node {
    /// This node's name in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    name: String,
    #[command(flatten)]
    cluster: Cluster,
    /// Where the plugin's socket and the pods' attachments are
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    run_dir: PathBuf,
    /// Where the offline policy snapshot is left for the plugin; it must outlive a reboot
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// The address that other nodes send tunnel packets to [default: the node's first InternalIP on this
    /// host of the tunnel's family]
    #[arg(long, env = "EGRET_TUNNEL_ADDRESS")]
    tunnel_address: Option<IpAddr>,
    /// The family of the tunnel's outer packets, on all nodes alike: IPv4 or IPv6 [default: what all nodes have]
    #[arg(long, env = "EGRET_TUNNEL_FAMILY", value_parser = tunnel_family)]
    tunnel_family: Option<TunnelFamily>,
    /// Networks that no policy covers, beside the cluster's own: 10.0.0.0/8,fd00::/8
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    direct: Vec<IpNetwork>,
    /// How often a gateway's nodes are asked whether they live, 50ms to 10s
    #[arg(long, env = "EGRET_PROBE_INTERVAL", default_value = "300ms", value_parser = interval)]
    probe_interval: Duration,
    /// For how many halves of that a node must be silent before it counts as dead, 1 to 20; it is asked three times in each
    #[arg(long, env = "EGRET_PROBE_MISSES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    probe_misses: u32,
    /// The upper 16 bits of the connection marks that are Egret's
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    connection_mark: u16,
    /// The lowest of the eleven bits of packet marks that are Egret's, 16 to 21
    #[arg(long, env = "EGRET_MARK_SHIFT", default_value_t = Marks::default().shift)]
    mark_shift: u8,
    /// Own the nftables tables, so that nobody else can change or flush them while the daemon runs (Linux 6.9)
    #[arg(long, env = "EGRET_OWN_TABLES", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    own_tables: bool,
    /// Where /metrics is served; empty: nowhere
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9871")]
    metrics_address: ListenAddress,
    /// Where /healthz and /readyz are served; empty: nowhere
    #[arg(long, env = "EGRET_HEALTH_ADDRESS", default_value = "127.0.0.1:9873")]
    health_address: ListenAddress,
    #[command(flatten)]
    readers: Readers,
    /// Keep the plugin's entry in the network configuration in this directory
    #[arg(long, env = "EGRET_CNI_CONF_DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Keep the plugin's program, the one beside this one, in this directory
    #[arg(long, env = "EGRET_CNI_BIN_DIR", requires = "cni_conf_dir")]
    cni_bin_dir: Option<PathBuf>,
}

#[derive(clap::Args)]
struct CniDirectories {
    /// Where the container runtime looks for plugins
    #[arg(long, env = "EGRET_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// Where the container runtime looks for network configurations
    #[arg(long, env = "EGRET_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
}

#[derive(clap::Args)]
struct Install {
    #[command(flatten)]
    directories: CniDirectories,
    /// The plugin's program [default: egret-cni beside this program]
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// The socket of `egretd node` on this host: cni.sock in its run directory
    #[arg(long, env = "EGRET_CNI_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The state directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Put the entry into the network configuration, too, and wait until there is one: for an `egretd node` that runs
    /// without --cni-conf-dir
    #[arg(long)]
    entry: bool,
}

#[derive(clap::Args)]
struct Uninstall {
    #[command(flatten)]
    directories: CniDirectories,
    /// The run directory of `egretd node` on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    run_dir: PathBuf,
    /// The state directory of `egretd node` on this host
    #[arg(long, env = "EGRET_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// The upper 16 bits of the connection marks that were Egret's
    #[arg(long, env = "EGRET_CONNECTION_MARK", default_value = "0x4547", value_parser = base)]
    connection_mark: u16,
    /// Remove the plugin's program, too: when no pod is left that started with it
    #[arg(long)]
    remove_plugin: bool,
    /// Also remove what the node said of itself from this source of cluster state: kube, or dir:PATH
    #[arg(long, env = "EGRET_CLUSTER", requires = "name")]
    cluster: Option<SourceName>,
    /// With --cluster kube: the file with the API server's address and the credentials [default: those of a pod]
    #[arg(long, env = "EGRET_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// The node's name in the cluster
    #[arg(long, env = "EGRET_NODE_NAME")]
    name: Option<String>,
}

fn network(text: &str) -> Result<IpNetwork, String> {
    parse_cidr(text).map_err(|e| e.to_string())
}

fn tunnel_family(text: &str) -> Result<TunnelFamily, String> {
    match text.to_ascii_lowercase().as_str() {
        "ipv4" => Ok(TunnelFamily::V4),
        "ipv6" => Ok(TunnelFamily::V6),
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
    // Not a number is in no range.
    if !(50.0..=10_000.0).contains(&milliseconds) {
        return Err(wrong());
    }
    Ok(Duration::from_micros((milliseconds * 1000.0) as u64))
}

fn base(text: &str) -> Result<u16, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u16::from_str_radix(digits, 16).map_err(|e| format!("{e}; write four hexadecimal digits, as in 0x4547"))
}

/// Who may read the metrics.
#[derive(clap::Args)]
struct Readers {
    /// Serve /metrics by TLS, and only to who has a token of the cluster's and may `get` the non-resource URL /metrics;
    /// asks the API server by TokenReview and SubjectAccessReview
    #[arg(long, env = "EGRET_METRICS_AUTHENTICATION", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    metrics_authentication: bool,
}

#[derive(clap::Args)]
struct Controller {
    #[command(flatten)]
    cluster: Cluster,
    /// The namespace of the Lease by which several controllers take turns [default: the pod's own]
    #[arg(long, env = "EGRET_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// This controller's name in the Lease [default: the host's name and a random number]
    #[arg(long, env = "EGRET_LEASE_IDENTITY")]
    lease_identity: Option<String>,
    /// Where /metrics is served; empty: nowhere
    #[arg(long, env = "EGRET_METRICS_ADDRESS", default_value = "127.0.0.1:9872")]
    metrics_address: ListenAddress,
    /// Where /healthz and /readyz are served; empty: nowhere
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
    }
    Ok(ExitCode::SUCCESS)
}

impl Node {
    async fn run(self) -> anyhow::Result<()> {
        let stop = stopped()?;
        let options = KubeOptions { kubeconfig: self.cluster.kubeconfig, ..KubeOptions::default() };
        let cluster = self.cluster.source.with(options);
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
            marks: Marks::new(self.connection_mark, self.mark_shift)?,
            own_tables: self.own_tables,
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
                Err(e) => Access::Unknown(format!("the API server does not say whose token this is: {e}")),
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
    /// Runs it. It hears signals itself: it gives its Lease back before it ends.
    fn run(self) -> anyhow::Result<()> {
        let identity = self.lease_identity.unwrap_or_else(LeaseSettings::unique_identity);
        let lease = Some(LeaseSettings::new(self.lease_namespace.unwrap_or_default(), identity));
        let source = self.cluster.source.with(KubeOptions { kubeconfig: self.cluster.kubeconfig, lease, known: None });
        runtime()?.block_on(async {
            let addresses = self.readers.addresses(self.metrics_address, self.health_address, &source).await?;
            controller::run(&source, &addresses).await
        })
    }
}

impl Why {
    fn run(self) -> anyhow::Result<String> {
        let options = KubeOptions { kubeconfig: self.cluster.kubeconfig, ..KubeOptions::default() };
        let name = self.cluster.source.with(options);
        let open = async |scope| match timeout(PATIENCE, cluster::open(&name, scope)).await {
            Ok(source) => source,
            Err(_) => anyhow::bail!("the cluster could not be read within {PATIENCE:?}; the log above says why"),
        };
        let (cluster, problems) = runtime()?.block_on(async {
            // What the controller says is the controller's to know, and what is inside the cluster the nodes'.
            let source = open(Scope::Controller).await?;
            let mut cluster = (**source.snapshots.borrow()).clone();
            let node = cluster.pods.get(&self.pod).and_then(|pod| pod.node.as_ref()).or(cluster.nodes.keys().next());
            // A directory tells both the same.
            let differs = self.to.is_some() && matches!(name, SourceName::Kube(_));
            if let Some(node) = node.filter(|_| differs).map(ToString::to_string) {
                let as_node = open(Scope::Node(node)).await?.snapshots.borrow().clone();
                cluster.inside = as_node.inside.clone();
                cluster.services = as_node.services.clone();
                cluster.endpoints = as_node.endpoints.clone();
            }
            let mut problems = Vec::clone(&source.problems.borrow());
            if let Some(target) = &self.to
                && let Err(e) = cluster::add_services(&name, &mut cluster, target).await
            {
                problems.push(format!("{e:#}; an address of a Service is told of as if it had no endpoints"));
            }
            anyhow::Ok((cluster, problems.join("\n  ")))
        })?;
        let text = why(&cluster, &self.pod, self.to, &self.direct);
        if problems.is_empty() {
            return Ok(text?);
        }
        let unread = format!("not read, and nodes may go by what it was before:\n  {problems}");
        Ok(text.with_context(|| unread.clone())? + &unread + "\n")
    }
}

/// Waits until the daemon is told to stop, by SIGTERM or SIGINT.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be watched")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be watched")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        }
    })
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("the runtime")
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // `egretd crds | head`: who closes the pipe has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("stdout"),
    }
}
