//! Egret on a host: the plugin's program and its entry in the node's network configuration, put there, kept there, and
//! taken away again with everything else of Egret's.

pub mod configuration;
mod directory;
pub mod keep;
mod network;
pub mod plugin;
pub mod uninstall;

use crate::cni::config::{check_socket, check_state_dir};
use crate::cni::uninstalled;
use anyhow::{Context, Result, bail};
use configuration::State;
use network::Entry;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often a directory is looked at in which there is no configuration yet.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How often a file is looked at that is being written.
const SETTLING: Duration = Duration::from_millis(50);
/// How often it is said that this still waits.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What is installed, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime's directory of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's directory of network configurations.
    pub conf_dir: PathBuf,
    /// The plugin's program.
    pub plugin: PathBuf,
    /// Where the plugin finds the daemon.
    pub socket: PathBuf,
    /// Where the plugin finds what the daemon leaves for the time when it is away.
    pub state_dir: PathBuf,
    /// Whether the entry is put into the network configuration as well.
    pub entry: bool,
}

/// Puts the program into its place; then, if it is asked to, the entry, for which it waits until there is a configuration
/// to put it into. Who does not ask leaves the entry to the daemon, which puts it there when it is in sync.
///
/// # Errors
/// What cannot be written; a configuration that cannot be extended.
pub fn run(options: &Options) -> Result<()> {
    let entry = entry(&options.socket, &options.state_dir)?;
    let place = options.bin_dir.display();
    match plugin::put(&options.plugin, &options.bin_dir)? {
        true => tracing::info!("egret-cni is in {place} now"),
        false => tracing::info!("egret-cni in {place} is up to date"),
    }
    if let Some(run_dir) = options.socket.parent() {
        uninstalled::clear(run_dir).with_context(|| format!("run directory {}", run_dir.display()))?;
    }
    if !options.entry {
        tracing::info!("the entry in the network configuration is left to egretd node --cni-conf-dir");
        return Ok(());
    }
    let dir = options.conf_dir.display();
    let (mut said, mut said_at, mut changed) = (Vec::new(), None::<Instant>, false);
    loop {
        let outcome = configuration::put(&options.conf_dir, entry)?;
        changed |= outcome.changed;
        for file in outcome.passed_over.iter().filter(|file| !said.contains(*file)) {
            tracing::warn!("{}", passed_over(file));
        }
        said = outcome.passed_over;
        match outcome.state {
            State::Ready(file) if changed => {
                tracing::info!("{dir}/{file} calls egret-cni now");
                return Ok(());
            }
            State::Ready(file) => {
                tracing::info!("{dir}/{file} calls egret-cni already");
                return Ok(());
            }
            State::LeftAlone { file, reason } => bail!(left_alone(&options.conf_dir, &file, &reason)),
            State::Unsettled => thread::sleep(SETTLING),
            State::Missing => {
                if said_at.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                    said_at = Some(Instant::now());
                    tracing::info!("there is no network configuration in {dir} yet; waiting for the cluster's CNI");
                }
                thread::sleep(LOOK_AGAIN);
            }
        }
    }
}

fn passed_over(file: &str) -> String {
    format!("passed over: {file} (CRI-O passes it over, too; containerd loads no network at all because of it)")
}

fn left_alone(dir: &Path, file: &str, reason: &str) -> String {
    format!("{}/{file} is left alone, and pods start without Egret: {reason}", dir.display())
}

/// What the entry tells the plugin.
fn entry<'a>(socket: &'a Path, state_dir: &'a Path) -> Result<Entry<'a>> {
    check_socket(socket).and_then(|()| check_state_dir(state_dir)).map_err(|e| anyhow::anyhow!("{e}"))?;
    let text = |path: &'a Path| path.to_str().with_context(|| format!("{path:?} is not UTF-8; give it another name"));
    Ok(Entry { socket: text(socket)?, state_dir: text(state_dir)? })
}
