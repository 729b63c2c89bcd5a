//! Removes everything of Egret's from the host: the entry in the network configuration, the kernel's state and the
//! files. Also removes what the node reported about itself to the cluster.

use super::{configuration, plugin};
use crate::cluster::{self, SourceName};
use crate::datapath::addresses;
use crate::datapath::probe;
use crate::datapath::redirected::{Redirected, Wanted};
use crate::datapath::route_device;
use crate::datapath::route_socket::RouteSocket;
use crate::datapath::routes;
use crate::datapath::rules;
use crate::datapath::ruleset::{BRIDGE, HANDOVER, INET, NETDEV};
use crate::datapath::tunnel;
use crate::datapath::unanswered;
use crate::datapath::veth_pair;
use crate::datapath::vlan;
use crate::model::marks::Marks;
use anyhow::{Context, Error, Result, bail};
use egret_cni::offline_policies::OfflinePolicies;
use egret_cni::quarantine::Quarantine;
use egret_cni::{attachment, run_dir, uninstalled};
use egret_nft::Nftables;
use egret_nft::conntrack;
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What is removed, and from where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime's directory of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's directory of network configurations.
    pub conf_dir: PathBuf,
    /// The daemon's run directory.
    pub run_dir: PathBuf,
    /// The daemon's state directory.
    pub state_dir: PathBuf,
    /// Whether to remove the plugin's program as well.
    pub remove_plugin: bool,
    /// The mark bits that Egret used.
    pub marks: Marks,
    /// The cluster in which to remove the node's report, and the node's name there.
    pub cluster: Option<(SourceName, String)>,
}

/// Collects errors, because a failed step does not stop the later ones.
#[derive(Default)]
struct Removal {
    errors: Vec<Error>,
}

impl Removal {
    /// Logs one step if it removed anything, or keeps its error.
    fn record(&mut self, what: &str, result: Result<usize>) {
        match result {
            Ok(0) => {}
            Ok(n) => tracing::info!(n, "removed {what}"),
            Err(e) => self.errors.push(e.context(format!("cannot remove {what}"))),
        }
    }
}

/// Removes everything. What does not exist is no error. Every step is tried, whatever failed before it.
///
/// # Errors
/// A daemon runs; or all failed steps, in one text.
pub async fn run(options: &Options) -> Result<()> {
    let run_dir = &options.run_dir;
    let about = || format!("run directory {}", run_dir.display());
    run_dir::make(run_dir).with_context(about)?;
    let Some(lock) = run_dir::lock_daemon(run_dir).with_context(about)? else {
        bail!(
            "egretd runs on this host with the run directory {}; stop it first, because it restores what is removed",
            run_dir.display()
        );
    };
    let mut removal = Removal::default();
    // From here on the plugin lets every call succeed, and then the runtime forgets it. So nothing is added after the
    // steps below.
    uninstalled::mark(run_dir).with_context(about)?;
    let (changed, errors) = configuration::remove(&options.conf_dir);
    for file in changed {
        tracing::info!("removed egret-cni from {}/{file}", options.conf_dir.display());
    }
    removal.errors.extend(errors);
    // Before the kernel's state, so that other nodes stop sending traffic to this one.
    if let Some((source, node)) = &options.cluster {
        removal.record("the node's report in the cluster", cluster::remove_node(source, node).await.map(usize::from));
    }
    {
        // Wait for plugins that began before the mark was set.
        let _plugins = run_dir::lock_plugins(run_dir).with_context(about)?;
        kernel(&mut removal, options.marks).await;
        files(&mut removal, run_dir);
        state(&mut removal, &options.state_dir);
    }
    if options.remove_plugin {
        removal.record("the plugin", plugin::remove(&options.bin_dir).map(usize::from));
        // Nothing reads the mark any more.
        let cleared = uninstalled::clear(run_dir).map(usize::from);
        removal.record("the uninstallation mark", cleared.with_context(about));
    }
    drop(lock);
    if options.remove_plugin {
        // A foreign file in the directory is no error.
        let _ = fs::remove_dir(run_dir);
    }
    if removal.errors.is_empty() {
        return Ok(());
    }
    let texts: Vec<String> = removal.errors.iter().map(|e| format!("\n- {e:#}")).collect();
    bail!("not everything was removed; correct the following and run the command again:{}", texts.concat())
}

/// Removes the nf_tables tables last. Without the rules, the tables drop traffic that has an egress IP, so that it
/// can neither take another way nor become a tracked connection. Such a connection would outlive the tables, and its
/// packets would leave with the pod's own address as their source: its NAT binding says so, and nothing would change
/// it.
async fn kernel(removal: &mut Removal, marks: Marks) {
    match RouteSocket::open() {
        Ok(socket) => {
            removal.record("routing rules", rules::sync(&socket, &BTreeSet::new()).await);
            removal.record("tracked connections", connections(marks));
            removal.record("the tunnel device", tunnel::remove(&socket).await.map(usize::from));
            removal.record("the veths before it", veth_pair::remove(&socket).await.map(usize::from));
            removal.record("a probe's device", probe::remove_device().map(usize::from));
            removal.record("routes", own_routes(&socket).await);
            let placed = addresses::sync(&socket, &BTreeSet::new()).await;
            let placed = placed.and_then(|mut changes| match changes.stuck.pop() {
                Some((_, e)) => Err(e),
                None => Ok(changes.removed.len()),
            });
            removal.record("egress IPs", placed);
            removal.record("interfaces of VLANs", vlan::remove_all(&socket).await);
            removal.record("the device for egress IPs", route_device::remove(&socket).await.map(usize::from));
            removal.record("routes in the table local", answer_again(&socket).await);
        }
        Err(e) => {
            removal.errors.push(e.context("cannot remove routing rules, routes, egress IPs and the tunnel device"))
        }
    }
    removal.record("quarantines", quarantines());
    removal.record("rules for redirected packets", redirected());
    removal.record("nf_tables' tables", tables());
    // Those that the gateway's own pods have begun meanwhile.
    removal.record("tracked connections", connections(marks));
}

fn tables() -> Result<usize> {
    Ok(Nftables::open().context("nf_tables")?.remove(&[INET, NETDEV, BRIDGE, HANDOVER[0], HANDOVER[1]])?)
}

fn quarantines() -> Result<usize> {
    let mut quarantine = Quarantine::open()?;
    let quarantined = quarantine.addresses()?;
    quarantined.iter().try_for_each(|address| quarantine.lift(address))?;
    Ok(quarantined.len())
}

fn redirected() -> Result<usize> {
    Redirected::open()?.block(&Wanted::default())
}

async fn own_routes(socket: &RouteSocket) -> Result<usize> {
    let mut removed = 0;
    for table in routes::tables(socket).await? {
        removed += routes::sync(socket, table, &BTreeSet::new()).await?;
    }
    Ok(removed)
}

/// Removes the routes that keep this host from answering ARP for egress IPs, after these.
async fn answer_again(socket: &RouteSocket) -> Result<usize> {
    let addresses = unanswered::read(socket).await?;
    unanswered::remove(socket, addresses).await
}

fn connections(marks: Marks) -> Result<usize> {
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    let ours = conntrack::MarkFilter { mark: marks.connection(0), mask: marks.connection_mask() };
    Ok(conntrack::delete(&mut socket, ours, |_| true)?)
}

fn files(removal: &mut Removal, run_dir: &Path) {
    let attachments = attachment::load_all(run_dir).map_or(0, |all| all.len());
    let directory = match fs::remove_dir_all(run_dir.join(run_dir::ATTACHMENTS)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(attachments),
    };
    removal.record("attachments", directory.context(run_dir::ATTACHMENTS));
    for (name, what) in [(run_dir::ADOPTED, "the records of adopted pods"), (run_dir::KNOWN, "the offline cache")] {
        match fs::remove_dir_all(run_dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                removal.errors.push(Error::new(e).context(format!("cannot remove {what}")));
            }
            _ => {}
        }
    }
    let names = [run_dir::SOCKET, run_dir::PLUGIN_LOCK, run_dir::DAEMON_LOCK];
    // Including the temporary files of killed processes.
    for path in names.into_iter().flat_map(|name| [run_dir.join(name), run_dir.join(format!(".{name}"))]) {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                removal.errors.push(Error::new(e).context(format!("cannot remove {}", path.display())));
            }
            _ => {}
        }
    }
}

/// Removes the files that outlive a reboot, and the directory if it is empty then.
fn state(removal: &mut Removal, state_dir: &Path) {
    let was_there = usize::from(OfflinePolicies::is_there(state_dir));
    let removed = OfflinePolicies::remove(state_dir).map(|()| was_there);
    removal.record(
        "the offline policy snapshot",
        removed.with_context(|| format!("state directory {}", state_dir.display())),
    );
    let _ = fs::remove_dir(state_dir);
}
