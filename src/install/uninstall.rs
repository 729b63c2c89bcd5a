//! Everything of Egret's goes from the host: the entry, what is in the kernel, the files; and what the node told the
//! cluster of itself.

use super::{configuration, plugin};
use crate::cluster::{self, SourceName};
use crate::cni::offline_policies::OfflinePolicies;
use crate::cni::{attachment, run_dir, uninstalled};
use crate::datapath::addresses;
use crate::datapath::quarantine::Quarantine;
use crate::datapath::routes;
use crate::datapath::rules;
use crate::datapath::ruleset::{HANDOVER, INET, NETDEV};
use crate::datapath::tunnel;
use crate::kernel::conntrack;
use crate::kernel::netlink::{NETLINK_NETFILTER, Socket};
use crate::kernel::nft::Nftables;
use crate::kernel::route_socket::RouteSocket;
use crate::model::marks::Marks;
use anyhow::{Context, Error, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What is uninstalled, and from where.
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
    /// Whether the plugin's program goes as well.
    pub remove_plugin: bool,
    /// The bits of marks that were Egret's.
    pub marks: Marks,
    /// The cluster that is told that this node is gone, and the node's name there.
    pub cluster: Option<(SourceName, String)>,
}

/// What went wrong does not stop what comes after it.
#[derive(Default)]
struct Work {
    errors: Vec<Error>,
}

impl Work {
    /// Tells of one thing that was done, if there was anything to do.
    fn done(&mut self, what: &str, result: Result<usize>) {
        match result {
            Ok(0) => {}
            Ok(n) => tracing::info!(n, "removed: {what}"),
            Err(e) => self.errors.push(e.context(format!("{what} could not be removed"))),
        }
    }
}

/// Removes everything; what is gone already is fine. Everything is tried, whatever goes wrong before it.
///
/// # Errors
/// A daemon runs; or all that went wrong, in one text.
pub async fn run(options: &Options) -> Result<()> {
    let run_dir = &options.run_dir;
    let about = || format!("run directory {}", run_dir.display());
    run_dir::make(run_dir).with_context(about)?;
    let Some(lock) = run_dir::lock_daemon(run_dir).with_context(about)? else {
        bail!(
            "an egretd runs on this host, with the run directory {}; stop it first: it would put back what is removed",
            run_dir.display()
        );
    };
    let mut work = Work::default();
    // From here on the plugin lets everything pass, and the runtime forgets it; then nothing comes after what is
    // removed below.
    uninstalled::mark(run_dir).with_context(about)?;
    let (changed, errors) = configuration::remove(&options.conf_dir);
    for file in changed {
        tracing::info!("{}/{file} no longer calls egret-cni", options.conf_dir.display());
    }
    work.errors.extend(errors);
    // First, so that others stop to send here.
    if let Some((source, node)) = &options.cluster {
        work.done("what the node said of itself", cluster::remove_node(source, node).await.map(usize::from));
    }
    {
        // A plugin that began before the mark was there ends its work first.
        let _plugins = run_dir::lock_plugins(run_dir).with_context(about)?;
        kernel(&mut work, options.marks).await;
        files(&mut work, run_dir);
        state(&mut work, &options.state_dir);
    }
    if options.remove_plugin {
        work.done("the plugin", plugin::remove(&options.bin_dir).map(usize::from));
        // Nobody is left who would look at the mark.
        let cleared = uninstalled::clear(run_dir).map(usize::from);
        work.done("the mark for the plugin", cleared.with_context(about));
    }
    drop(lock);
    if options.remove_plugin {
        // Somebody else's file in it is no reason to fail.
        let _ = fs::remove_dir(run_dir);
    }
    if work.errors.is_empty() {
        return Ok(());
    }
    let texts: Vec<String> = work.errors.iter().map(|e| format!("\n- {e:#}")).collect();
    bail!("not everything could be removed; run it again when this is mended:{}", texts.concat())
}

/// The tables stand until the last: without the rules, what has a path is dropped by them and can neither leave another
/// way nor become a connection. One that lives on would leave with the pod's own address as its source, for that is
/// what its translation says, and nobody else would translate it again.
async fn kernel(work: &mut Work, marks: Marks) {
    match RouteSocket::open() {
        Ok(socket) => {
            work.done("routing rules", rules::sync(&socket, &BTreeSet::new()).await);
            work.done("tracked connections", connections(marks));
            work.done("the tunnel device", tunnel::remove(&socket).await.map(usize::from));
            work.done("routes", own_routes(&socket).await);
            let placed = addresses::sync(&socket, &BTreeSet::new()).await;
            let placed = placed.and_then(|mut changes| match changes.stuck.pop() {
                Some((_, e)) => Err(e),
                None => Ok(changes.removed.len()),
            });
            work.done("egress addresses", placed);
        }
        Err(e) => work.errors.push(e.context("rules, routes, addresses and the tunnel device could not be removed")),
    }
    work.done("quarantines", quarantines());
    work.done("nf_tables' tables", tables());
    // Those that the gateway's own pods have begun meanwhile.
    work.done("tracked connections", connections(marks));
}

fn tables() -> Result<usize> {
    Ok(Nftables::open().context("nf_tables")?.remove(&[INET, NETDEV, HANDOVER[0], HANDOVER[1]])?)
}

fn quarantines() -> Result<usize> {
    let mut quarantine = Quarantine::open()?;
    let held = quarantine.held()?;
    held.iter().try_for_each(|address| quarantine.lift(address))?;
    Ok(held.len())
}

async fn own_routes(socket: &RouteSocket) -> Result<usize> {
    let mut removed = 0;
    for table in routes::tables(socket).await? {
        removed += routes::sync(socket, table, &BTreeSet::new()).await?;
    }
    Ok(removed)
}

fn connections(marks: Marks) -> Result<usize> {
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    let ours = conntrack::MarkFilter { mark: marks.connection(0), mask: marks.connection_mask() };
    conntrack::delete(&mut socket, ours, |_| true)
}

fn files(work: &mut Work, run_dir: &Path) {
    let attachments = attachment::load_all(run_dir).map_or(0, |all| all.len());
    let directory = match fs::remove_dir_all(run_dir.join(run_dir::ATTACHMENTS)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(attachments),
    };
    work.done("attachments", directory.context(run_dir::ATTACHMENTS));
    for (name, what) in [(run_dir::ADOPTED, "of adopted pods"), (run_dir::KNOWN, "of the cluster")] {
        match fs::remove_dir_all(run_dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                work.errors.push(Error::new(e).context(format!("what was known {what} could not be removed")));
            }
            _ => {}
        }
    }
    let names = [run_dir::SOCKET, run_dir::PLUGIN_LOCK, run_dir::DAEMON_LOCK];
    // With those that a killed writer left unfinished.
    for path in names.into_iter().flat_map(|name| [run_dir.join(name), run_dir.join(format!(".{name}"))]) {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                work.errors.push(Error::new(e).context(format!("{} could not be removed", path.display())));
            }
            _ => {}
        }
    }
}

/// What outlives a reboot, and the directory if nothing else is in it.
fn state(work: &mut Work, state_dir: &Path) {
    let was_there = usize::from(OfflinePolicies::is_there(state_dir));
    let removed = OfflinePolicies::remove(state_dir).map(|()| was_there);
    work.done(
        "the offline policy snapshot",
        removed.with_context(|| format!("state directory {}", state_dir.display())),
    );
    let _ = fs::remove_dir(state_dir);
}
