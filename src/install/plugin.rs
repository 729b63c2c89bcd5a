//! The plugin's program in the runtime's directory of plugins.

use super::directory::{Directory, is_young};
use super::network::PLUGIN;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Anybody may call it, as is usual there; what it does needs root.
const MODE: u32 = 0o755;

/// The program that comes with the running `egretd`: the one beside it.
///
/// # Errors
/// It is not known where `egretd` is.
pub fn beside_this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe().context("the running egretd's own path")?.with_file_name(PLUGIN))
}

/// Puts the program into the directory, in place of what is there. Runtimes that start it meanwhile get the one or the
/// other, whole. Returns whether it was another one.
///
/// # Errors
/// There is no such program or directory, or it cannot be written.
pub fn put(source: &Path, bin_dir: &Path) -> Result<bool> {
    let bytes = fs::read(source).with_context(|| {
        format!("the plugin's program {}; name it with --plugin if it is elsewhere", source.display())
    })?;
    let Some(directory) = Directory::open(bin_dir)? else {
        bail!(
            "there is no directory {}; name the one in which the container runtime looks for plugins \
             (containerd: bin_dir) with --cni-bin-dir",
            bin_dir.display()
        );
    };
    let there = directory.path(PLUGIN);
    let is_right = there.symlink_metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o7777 == MODE)
        && fs::read(&there).is_ok_and(|b| b == bytes);
    if !is_right {
        directory.write(PLUGIN, &bytes, MODE)?;
    }
    Ok(!is_right)
}

/// Whether the program `source` may still be being written, by somebody who brings a new release onto the host.
pub fn is_settled(source: &Path) -> bool {
    !source.metadata().is_ok_and(|m| is_young(&m))
}

/// Removes it. Returns whether it was there.
///
/// # Errors
/// It cannot be removed.
pub fn remove(bin_dir: &Path) -> Result<bool> {
    match Directory::open(bin_dir)? {
        Some(directory) => directory.remove(PLUGIN),
        None => Ok(false),
    }
}
