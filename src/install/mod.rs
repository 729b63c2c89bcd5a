//! Egret's installation on a host: the plugin's program and its entry in the node's network configuration. Installs
//! them, keeps them installed, and removes everything of Egret's.

pub mod configuration;
mod directory;
pub mod keep;
mod network;
pub mod plugin;
pub mod uninstall;

use anyhow::{Context, Result, bail};
use configuration::ConfigurationState;
use egret_cni::config::{check_socket, check_state_dir};
use egret_cni::uninstalled;
use network::Entry;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often a directory without a network configuration is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// How often a file that is being written is checked.
const RETRY: Duration = Duration::from_millis(50);
/// How often the log says that the installation still waits.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What is installed, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The runtime's directory of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's directory of network configurations.
    pub conf_dir: PathBuf,
    /// The plugin's program.
    pub plugin: PathBuf,
    /// The daemon's socket, for the plugin.
    pub socket: PathBuf,
    /// The daemon's state directory, for the plugin.
    pub state_dir: PathBuf,
    /// Whether to put the entry into the network configuration as well.
    pub entry: bool,
}

/// Installs the program. If `entry` is set, also waits for a network configuration and puts the entry into it.
/// Otherwise the daemon puts the entry there as soon as it is in sync.
///
/// # Errors
/// A file cannot be written, or the configuration cannot be extended.
pub fn run(options: &Options) -> Result<()> {
    let entry = entry(&options.socket, &options.state_dir)?;
    let place = options.bin_dir.display();
    match plugin::put(&options.plugin, &options.bin_dir)? {
        true => tracing::info!("installed egret-cni in {place}"),
        false => tracing::info!("egret-cni in {place} is up to date"),
    }
    if let Some(run_dir) = options.socket.parent() {
        uninstalled::clear(run_dir).with_context(|| format!("run directory {}", run_dir.display()))?;
    }
    if !options.entry {
        tracing::info!("egretd node --cni-conf-dir will put the entry into the network configuration");
        return Ok(());
    }
    let dir = options.conf_dir.display();
    let (mut reported, mut waiting_logged_at, mut changed) = (Vec::new(), None::<Instant>, false);
    loop {
        let outcome = configuration::put(&options.conf_dir, entry)?;
        changed |= outcome.changed;
        for file in outcome.skipped.iter().filter(|file| !reported.contains(*file)) {
            tracing::warn!("{}", skipped(file));
        }
        reported = outcome.skipped;
        match outcome.state {
            ConfigurationState::Ready(file) if changed => {
                tracing::info!("put egret-cni into {dir}/{file}");
                return Ok(());
            }
            ConfigurationState::Ready(file) => {
                tracing::info!("{dir}/{file} has egret-cni already");
                return Ok(());
            }
            ConfigurationState::NotExtensible { file, reason } => {
                bail!(not_extensible(&options.conf_dir, &file, &reason))
            }
            ConfigurationState::BeingWritten => thread::sleep(RETRY),
            ConfigurationState::Missing => {
                if waiting_logged_at.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                    waiting_logged_at = Some(Instant::now());
                    tracing::info!("there is no network configuration in {dir} yet; waiting for the cluster's CNI");
                }
                thread::sleep(CHECK_INTERVAL);
            }
        }
    }
}

fn skipped(file: &str) -> String {
    format!("skipped {file} (CRI-O skips it too; containerd loads no network at all because of it)")
}

fn not_extensible(dir: &Path, file: &str, reason: &str) -> String {
    format!("{}/{file} cannot be extended, and pods start without Egret: {reason}", dir.display())
}

/// The entry that tells the plugin the daemon's socket and state directory.
fn entry<'a>(socket: &'a Path, state_dir: &'a Path) -> Result<Entry<'a>> {
    check_socket(socket).and_then(|()| check_state_dir(state_dir)).map_err(|e| anyhow::anyhow!("{e}"))?;
    let text = |path: &'a Path| path.to_str().with_context(|| format!("{path:?} is not UTF-8; choose another path"));
    Ok(Entry { socket: text(socket)?, state_dir: text(state_dir)? })
}
