//! The plugin's program in the runtime's plugin directory.

use super::directory::{Directory, is_young};
use super::network::PLUGIN;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Any user may execute it, as is usual there; its work needs root.
const MODE: u32 = 0o755;

/// Path of the plugin's program that was released with the running `egretd`: in the same directory.
///
/// # Errors
/// The running program's path cannot be determined.
pub fn beside_this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe().context("the running egretd's own path")?.with_file_name(PLUGIN))
}

/// Writes the program to the directory, replacing what is there. A runtime that starts it meanwhile gets the old or
/// the new one, never a part. Returns whether the program differed.
///
/// # Errors
/// The source or the directory does not exist, or the program cannot be written.
pub fn put(source: &Path, bin_dir: &Path) -> Result<bool> {
    let bytes = fs::read(source).with_context(|| {
        format!("cannot read the plugin's program {}; set --plugin if it is elsewhere", source.display())
    })?;
    let Some(directory) = Directory::open(bin_dir)? else {
        bail!(
            "there is no directory {}; set --cni-bin-dir to the directory in which the container runtime looks for \
             plugins (containerd: bin_dir)",
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

/// Whether the program `source` is complete. An installation of a new release may still be writing it.
pub fn is_settled(source: &Path) -> bool {
    !source.metadata().is_ok_and(|m| is_young(&m))
}

/// Removes the program. Returns whether there was one.
///
/// # Errors
/// The program cannot be removed.
pub fn remove(bin_dir: &Path) -> Result<bool> {
    match Directory::open(bin_dir)? {
        Some(directory) => directory.remove(PLUGIN),
        None => Ok(false),
    }
}
