//! The command line of `kubectl egret`.

use clap::{ArgGroup, Args, Parser, Subcommand};
use clap_complete::Shell;
use egret::cluster::{KubeOptions, Person, SourceName};
use egret::ctl::output::Format;
use std::path::PathBuf;

/// Shows, explains and steers Egret: which pods leave the cluster from which address, and why.
///
/// Exit codes: 0 done; 1 error, the message is on standard error; 2 done, and something was found that a script may
/// act on (each command says what).
#[derive(Parser)]
#[command(version, max_term_width = 120)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of all commands, named as kubectl names them.
#[derive(Args, Clone)]
pub struct Common {
    /// Source of cluster state: kube, or dir:PATH for a directory of manifests
    #[arg(
        long = "cluster",
        env = "EGRET_CLUSTER",
        default_value = "kube",
        global = true,
        help_heading = "Global options"
    )]
    pub cluster: SourceName,
    /// Kubeconfig file [default: the files of $KUBECONFIG, else ~/.kube/config]
    #[arg(long, env = "EGRET_KUBECONFIG", global = true, help_heading = "Global options")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file [default: its current context]
    #[arg(long, global = true, help_heading = "Global options")]
    pub context: Option<String>,
    /// Namespace
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub namespace: Option<String>,
    /// All namespaces
    #[arg(long, short = 'A', global = true, conflicts_with = "namespace", help_heading = "Global options")]
    pub all_namespaces: bool,
    /// Output format: wide, json or yaml [default: text, long lists shortened]
    #[arg(long, short, value_name = "FORMAT", value_parser = format, global = true, help_heading = "Global options")]
    pub output: Option<Format>,
    /// Log level of what is written to standard error: error, info, debug
    #[arg(
        long,
        env = "EGRET_LOG_LEVEL",
        default_value = "off",
        global = true,
        hide_env = true,
        help_heading = "Global options"
    )]
    pub log_level: String,
}

#[derive(Subcommand)]
pub enum Command {
    /// Show what is wrong, with remedies, and an overview of gateways, nodes and policies
    #[command(after_help = "\
Examples:
  kubectl egret status                      the whole cluster, on one screen
  kubectl egret status -n shop              policies of one namespace only
  kubectl egret status -o wide              all rows
  kubectl egret status --watch              again after each change
  kubectl egret status --exit-code -o json  for scripts: exit code 2 if something is wrong")]
    Status(Status),
    /// Turn the objects of other egress systems into Egret's
    ///
    /// Reads objects of kube-static-egress-ip, EgressGateway of spidernet, Antrea, Cilium, OVN-Kubernetes, Calico and
    /// kube-vip, and prints Egret's objects as YAML. Comments, and lines on standard error, say what cannot be said in
    /// Egret's objects and what will differ. Nothing is changed in the cluster.
    #[command(after_help = "\
Examples:
  kubectl egret convert -f egress.yaml               the objects of a manifest, or of a directory
  kubectl get egress -o yaml | kubectl egret convert -f -
  kubectl egret convert --from-cluster > egret.yaml  all that the API server has, with the addresses in use
  kubectl egret convert --from-cluster --exit-code   exit code 2 if something is lost or not converted")]
    Convert(Convert),
    /// Print a script that completes the commands in a shell
    #[command(after_help = "\
Examples:
  egretctl completion bash > /etc/bash_completion.d/egretctl
  kubectl egret completion zsh

For `kubectl egret <TAB>`, install kubectl_complete-egret beside the plugin: docs/kubectl.md.")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Args)]
pub struct Status {
    /// Show the status again after each change
    #[arg(long, short)]
    pub watch: bool,
    /// Exit with 2 if there is a problem
    #[arg(long, conflicts_with = "watch")]
    pub exit_code: bool,
}

#[derive(Args)]
#[command(group = ArgGroup::new("input").required(true))]
pub struct Convert {
    /// A manifest, a directory of manifests, or - for standard input; may be given several times
    #[arg(long = "filename", short, value_name = "FILE", group = "input")]
    pub files: Vec<PathBuf>,
    /// Read the objects that the cluster has
    #[arg(long, group = "input")]
    pub from_cluster: bool,
    /// Exit with 2 if something is lost or not converted
    #[arg(long)]
    pub exit_code: bool,
}

impl Common {
    /// Where the cluster's state is read from.
    pub fn source(&self) -> SourceName {
        self.cluster.clone().with(KubeOptions {
            kubeconfig: self.kubeconfig.clone(),
            person: Some(Person { context: self.context.clone() }),
            ..KubeOptions::default()
        })
    }

    /// The namespace that a list is restricted to; `None`: all.
    pub fn namespace_of_list(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

fn format(text: &str) -> Result<Format, String> {
    match text {
        "text" => Ok(Format::Text),
        "wide" => Ok(Format::Wide),
        "json" => Ok(Format::Json),
        "yaml" => Ok(Format::Yaml),
        _ => Err(format!("{text:?} is no output format; write wide, json or yaml")),
    }
}

/// The command line under the name that the program was called by; the examples name it too.
pub fn named(command: clap::Command, name: &'static str) -> clap::Command {
    let examples = |command: clap::Command| match command.get_after_help().map(ToString::to_string) {
        Some(text) if name == "egretctl" => command.after_help(text.replace("kubectl egret ", "egretctl ")),
        _ => command,
    };
    command.name(name).bin_name(name).mut_subcommands(examples)
}
