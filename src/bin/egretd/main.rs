//! The command `egretd`: arguments and wiring only.

mod arguments;

use anyhow::Context;
use arguments::{
    Arguments, Cluster, Command, Controller, Install, MarkBits, Node, Readers, Ruleset, State, Uninstall, Why,
};
use clap::Parser;
use egret::check;
use egret::cluster::kube::{Reviewer, TokenReview};
use egret::cluster::{self, ElectionSettings, KubeOptions, Scope, SourceName};
use egret::ctl::why;
use egret::datapath::ruleset;
use egret::model::marks::Marks;
use egret::telemetry::access::{Access, Guard};
use egret::telemetry::logs;
use egret::telemetry::server::{Addresses, ListenAddress};
use egret::{api, controller, install, memory, node, signals};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// How long `egretd ruleset` waits for the cluster's state. Reading 100,000 pods takes some seconds.
const PATIENCE: Duration = Duration::from_secs(30);

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
        Command::Trace(flags) => node::trace::relay(&flags.run_dir)?,
        Command::TestServer(flags) => until_stopped(flags.run())?,
        Command::Probe(flags) => until_stopped(flags.run())?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Node {
    async fn run(self) -> anyhow::Result<()> {
        let stop = signals::stopped()?;
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
            liveness: node::liveness::LivenessSettings { interval: self.probe_interval, misses: self.probe_misses },
            marks: self.marks.layout()?,
            own_tables: self.own_tables,
            tunnel_egress: self.tunnel_egress,
            fast_path_lease: Some(self.fast_path_lease).filter(|lease| !lease.is_zero()),
            assign_hook: self.assign_hook,
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
                Ok(TokenReview::Allowed) => Access::Allowed,
                Ok(TokenReview::Unauthenticated) => Access::Unauthenticated,
                Ok(TokenReview::Forbidden(who)) => Access::Forbidden(format!(
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
        let identity = self.lease_identity.unwrap_or_else(ElectionSettings::unique_identity);
        let lease = Some(ElectionSettings::new(self.lease_namespace.unwrap_or_default(), identity));
        let source = self.cluster.source.with(KubeOptions {
            kubeconfig: self.cluster.kubeconfig,
            lease,
            follows_services: self.kube_vip_annotations,
            ..KubeOptions::default()
        });
        let options = controller::Options { kube_vip_annotations: self.kube_vip_annotations };
        runtime()?.block_on(async {
            let addresses = self.readers.addresses(self.metrics_address, self.health_address, &source).await?;
            controller::run(&source, &addresses, options).await
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
        Ok(Marks::of_a_node(self.connection_mark, self.mark_shift)?)
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
        Ok(ruleset::ExpectedRuleset::expected(&cluster, &self.name, &self.direct, marks)?.to_string())
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

/// Runs something that has nothing to do when it is stopped.
fn until_stopped(run: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let stop = signals::stopped()?;
        tokio::select! { () = stop => Ok(()), done = run => done }
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
