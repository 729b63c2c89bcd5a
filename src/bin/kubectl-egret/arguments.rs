//! The command line of `kubectl egret`.

use anyhow::bail;
use clap::{ArgGroup, Args, Parser, Subcommand};
use clap_complete::Shell;
use egret::api;
use egret::cluster::kube::Client;
use egret::cluster::{KubeOptions, Person, SourceName};
use egret::ctl::output::Format;
use egret::ctl::trace::TraceOptions;
use egret::model::ObjectKey;
use egret::model::destination::parse_cidr;
use egret::model::target::Target;
use egret::model::trace::Protocol;
use egret::probe::arguments::ServerArguments;
use ipnetwork::IpNetwork;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

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
    /// Check whether Egret can work in this cluster, and whether it does
    #[command(after_help = "\
Exit code 2: a check failed.

Examples:
  kubectl egret check                       before and after an installation
  kubectl egret check --before              only what concerns the time before
  kubectl egret check -o json")]
    Check(Check),
    /// Test whether Egret keeps its promises in this cluster, as a server outside sees it
    ///
    /// Starts pods of Egret's own image on a gateway node that holds the egress IP, on one that does not, and on another
    /// node. They ask the server which address it sees: new pods' first packets, many pods at once, a planned move, a
    /// change to another egress IP, a gateway without nodes, the end of a policy, and pods that no policy selects. IPv4
    /// and IPv6, where gateway, pods and server have both.
    ///
    /// Everything is in a namespace of its own, and is deleted at the end, after a failure and after ctrl-C. Of your objects
    /// it uses two free addresses of a gateway's pool for the time of the test, and nothing else.
    #[command(after_help = "\
Exit codes: 0 all promises are kept, 2 one is not, 1 the test could not run.

Examples:
  kubectl-egret test-server                 on a host outside; or: docker run --network host IMAGE test-server
  kubectl egret test --server 203.0.113.7   asks that server, port 8080
  kubectl egret test --server 203.0.113.7:8081 --server [2001:db8::7]:8081 --gateway office
  kubectl egret test --server https://ifconfig.example
  kubectl egret test --server 203.0.113.7 -o json
  kubectl egret test --server 203.0.113.7 --keep   leaves the pods, to look at them")]
    Test(Test),
    /// Answer, outside the cluster, with the source address that is seen: the server for `test`
    #[command(after_help = "\
It answers HTTP and UDP on one port, on IPv4 and IPv6, and prints a line for each request: the address and the path.

Examples:
  kubectl-egret test-server
  kubectl-egret test-server --port 8081
  curl http://203.0.113.7:8080/             answers with your address")]
    TestServer(ServerArguments),
    /// Show which pods leave from which egress IP
    #[command(after_help = "\
WHAT is a policy (NAMESPACE/NAME), an egress IP, or a node. Without it: the pods of the namespace that policies select.

Examples:
  kubectl egret pods -n shop                the pods of a namespace
  kubectl egret pods -A -o wide             all pods, with policies that never decide
  kubectl egret pods shop/visitors          the pods that a policy selects
  kubectl egret pods 192.0.2.50             the pods behind an egress IP
  kubectl egret pods worker-3               the pods of a node")]
    Pods(Pods),
    /// Tell what an address is: the policy, the owner and the pods behind an egress IP
    #[command(after_help = "\
Examples:
  kubectl egret ip 192.0.2.50               who was that, in the other side's log?
  kubectl egret ip 192.0.2.50 -o yaml")]
    Ip(Ip),
    /// Explain with which address a pod leaves the cluster, and why
    #[command(after_help = "\
Examples:
  kubectl egret why visitor -n shop         the pod's policies
  kubectl egret why shop/visitor --to 203.0.113.7:443
  kubectl egret why shop/visitor --to [2001:db8::7]:53/udp")]
    Why(Why),
    /// Send one packet as if a pod had sent it, or wait for the pod's next one, and show its way and the reply's
    ///
    /// Shows each chain and rule that decided on the packet, in the syntax of nft, on the pod's node and on the node that
    /// holds the egress IP; the address and port it left from; and whether a reply came. The packet is a TCP SYN, a UDP
    /// datagram or an ICMP echo request. It comes in by the host's end of the pod's veth, so that no rule of the pod's own
    /// network namespace sees it; with --wait these have seen it. What makes the kernel tell of the packet is gone when the
    /// command ends, and after 30 seconds.
    #[command(after_help = "\
Exit code 2: no reply came back, because a rule dropped the packet or for another reason; the output says which.

Examples:
  kubectl egret trace shop/visitor --to 203.0.113.7:443
  kubectl egret trace visitor -n shop --to [2001:db8::7]:53 --protocol udp
  kubectl egret trace shop/visitor --to 203.0.113.7                 an ICMP echo request
  kubectl egret trace shop/visitor --to 203.0.113.7:443 --wait      the application's own next packet
  kubectl egret trace shop/visitor --to 203.0.113.7:443 -o wide     with other programs' chains, and policies of chains")]
    Trace(Trace),
    /// Show what would change if manifests were applied: pods, connections, policies, pools
    #[command(after_help = "\
Nothing is written. Exit codes with --exit-code: 0 nothing changes, 2 something changes, 1 error, or an object would be
rejected.

Examples:
  kubectl egret plan -f policy.yaml
  kubectl egret plan -f manifests/ --exit-code
  helm template shop | kubectl egret plan -f -
  kubectl egret plan -f policy.yaml --delete   if it were deleted")]
    Plan(Plan),
    /// Move an egress IP to a node, without a pause
    #[command(after_help = "\
WHAT is an egress IP or a policy (NAMESPACE/NAME). The policy gets the annotation egret.dev/move-to, which also keeps the
egress IP there; --undo removes it.

Examples:
  kubectl egret move 192.0.2.50 --to gateway-2 --wait
  kubectl egret move shop/visitors --to gateway-2
  kubectl egret move shop/visitors --undo")]
    Move(Move),
    /// Move all egress IPs away from a node, without a pause
    #[command(after_help = "\
The node gets the label egret.dev/drain=true. Pods stay; `kubectl drain` moves both.

Examples:
  kubectl egret drain gateway-1 --wait
  kubectl egret drain gateway-1 --undo      egress IPs may be on the node again")]
    Drain(Drain),
    /// Spread the egress IPs of a gateway evenly over its nodes, without a pause
    #[command(after_help = "\
The gateway gets the annotation egret.dev/rebalance=true, and stays balanced when nodes come and go until --undo removes
it.

Examples:
  kubectl egret rebalance default --wait
  kubectl egret rebalance default --undo")]
    Rebalance(Rebalance),
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

#[derive(Args)]
pub struct Check {
    /// Only what has to be so before an installation
    #[arg(long)]
    pub before: bool,
}

#[derive(Args)]
pub struct Test {
    /// Server outside: ADDRESS[:PORT], NAME[:PORT], or a URL that answers with the client's address; give it twice for an
    /// IPv4 and an IPv6 address [default port: 8080]
    #[arg(long, value_delimiter = ',')]
    pub server: Vec<String>,
    /// EgressGateway whose pool is used [default: the default gateway, or the only one]
    #[arg(long)]
    pub gateway: Option<String>,
    /// Image of the pods, with egretd [default: that of the DaemonSet egret-node, which all nodes have]
    #[arg(long)]
    pub image: Option<String>,
    /// How many pods begin at once
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub pods: u32,
    /// Leave everything as it is at the end
    #[arg(long)]
    pub keep: bool,
    /// How long the test may take, seconds
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub timeout: u64,
}

#[derive(Args)]
pub struct Pods {
    /// Policy, egress IP or node
    pub what: Option<String>,
    /// Show the pods again after each change
    #[arg(long, short)]
    pub watch: bool,
}

#[derive(Args)]
pub struct Ip {
    /// Address
    pub address: IpAddr,
    /// Show it again after each change
    #[arg(long, short)]
    pub watch: bool,
}

#[derive(Args)]
pub struct Why {
    /// Pod: NAME or NAMESPACE/NAME
    pub pod: String,
    /// Destination: 203.0.113.7, 203.0.113.7:443, [2001:db8::7]:53/udp
    #[arg(long)]
    pub to: Option<Target>,
    /// Networks that no policy covers; give the same as the nodes' daemons have
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    pub direct: Vec<IpNetwork>,
    /// With --cluster dir: run directory of the daemon on this host
    #[arg(long, env = "EGRET_RUN_DIR", default_value = "/run/egret")]
    pub run_dir: PathBuf,
}

#[derive(Args)]
pub struct Trace {
    /// Pod: NAME or NAMESPACE/NAME
    pub pod: String,
    /// Destination: 203.0.113.7:443, [2001:db8::7]:53/udp; without a port an ICMP echo request is sent
    #[arg(long)]
    pub to: Target,
    /// Protocol: tcp, udp or icmp [default: tcp with a port, icmp without]
    #[arg(long)]
    pub protocol: Option<Protocol>,
    /// Send nothing, and wait for the next packet that the pod itself sends there
    #[arg(long)]
    pub wait: bool,
    /// How long to wait for the reply, or with --wait for the packet, seconds [default: 3, or 25 with --wait]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=25))]
    pub timeout: Option<u64>,
    /// Networks that no policy covers; give the same as the nodes' daemons have
    #[arg(long, env = "EGRET_DIRECT", value_delimiter = ',', value_parser = network)]
    pub direct: Vec<IpNetwork>,
    /// With --cluster dir: run directory of a daemon on this host; may be given several times
    #[arg(long = "run-dir", env = "EGRET_RUN_DIR", value_name = "RUN_DIR", default_value = "/run/egret")]
    pub run_dirs: Vec<PathBuf>,
}

#[derive(Args)]
pub struct Plan {
    /// File, directory of manifests, or - for standard input; may be given several times
    #[arg(long, short, required = true, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    /// Show what would change if the objects were deleted
    #[arg(long)]
    pub delete: bool,
    /// Exit with 2 if something changes
    #[arg(long, alias = "detailed-exitcode")]
    pub exit_code: bool,
}

/// How long a command waits for moves.
#[derive(Args)]
pub struct Wait {
    /// Wait until the nodes report that it is done, and show the progress
    #[arg(long)]
    pub wait: bool,
    /// How long to wait, seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub timeout: u64,
}

#[derive(Args)]
pub struct Move {
    /// Egress IP, or policy as NAMESPACE/NAME
    pub what: String,
    /// Node of the gateway
    #[arg(long, required_unless_present = "undo", conflicts_with = "undo")]
    pub to: Option<String>,
    /// Remove the annotation that asks for a node; the egress IP stays where it is
    #[arg(long)]
    pub undo: bool,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Args)]
pub struct Drain {
    /// Node
    pub node: String,
    /// Let egress IPs be on the node again
    #[arg(long)]
    pub undo: bool,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Args)]
pub struct Rebalance {
    /// EgressGateway
    pub gateway: String,
    /// Stop balancing; the egress IPs stay where they are
    #[arg(long)]
    pub undo: bool,
    #[command(flatten)]
    pub wait: Wait,
}

impl Trace {
    /// What is to be traced, of the pod.
    ///
    /// # Errors
    /// Protocol and port do not fit.
    pub fn asked(&self, pod: ObjectKey) -> anyhow::Result<TraceOptions> {
        let of_target = match self.to.port {
            Some((api::Protocol::Udp, _)) => Protocol::Udp,
            Some((api::Protocol::Tcp, _)) => Protocol::Tcp,
            Some((other, _)) if self.protocol.is_none() => bail!("{other} cannot be traced; use tcp, udp or icmp"),
            Some(_) => Protocol::Tcp,
            None => Protocol::Icmp,
        };
        let protocol = self.protocol.unwrap_or(of_target);
        let port = match (protocol, self.to.port) {
            (Protocol::Icmp, None) => 0,
            (Protocol::Icmp, Some(_)) => bail!("ICMP has no ports; write --to {}", self.to.address),
            (_, Some((_, port))) if port > 0 => port,
            _ => bail!("{protocol} needs a port; write --to {}", SocketAddr::new(self.to.address, 443)),
        };
        let seconds = self.timeout.unwrap_or(if self.wait { 25 } else { 3 });
        Ok(TraceOptions {
            pod,
            to: self.to.address,
            protocol,
            port,
            wait: self.wait,
            patience: Duration::from_secs(seconds),
            direct: self.direct.clone(),
            run_dirs: self.run_dirs.clone(),
        })
    }
}

impl Wait {
    /// The time to wait; `None`: do not wait.
    pub fn patience(&self) -> Option<Duration> {
        self.wait.then(|| Duration::from_secs(self.timeout))
    }
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

    /// The namespace of names without one: the one that is given, else that of the kubeconfig's context.
    ///
    /// # Errors
    /// The kubeconfig cannot be read.
    pub async fn namespace(&self, source: &SourceName) -> anyhow::Result<String> {
        match (&self.namespace, source) {
            (Some(namespace), _) => Ok(namespace.clone()),
            (None, SourceName::Kube(options)) => Ok(Client::connect(options).await?.namespace()),
            (None, SourceName::Dir(_)) => Ok("default".to_owned()),
        }
    }
}

fn network(text: &str) -> Result<IpNetwork, String> {
    parse_cidr(text).map_err(|e| e.to_string())
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
