//! The mark that an uninstallation leaves in the run directory. A runtime keeps the lists that it has read, and calls
//! the plugin until it reads them again, or until the last pod of an old list has ended. Until then the plugin must
//! let every call succeed.

use crate::careful;
use std::io::{self, Write};
use std::path::Path;

const FILE: &str = "uninstalled";
const TEXT: &str =
    "egretd uninstall was here: egret-cni does nothing. egretd install and egretd node remove this file.\n";

/// Whether the mark is there.
pub fn is_marked(run_dir: &Path) -> bool {
    run_dir.join(FILE).symlink_metadata().is_ok()
}

/// Writes the mark.
///
/// # Errors
/// The file cannot be written.
pub fn mark(run_dir: &Path) -> io::Result<()> {
    careful::create(&run_dir.join(FILE))?.write_all(TEXT.as_bytes())
}

/// Removes the mark, and returns whether there was one.
///
/// # Errors
/// The file cannot be removed.
pub fn clear(run_dir: &Path) -> io::Result<bool> {
    let was_there = is_marked(run_dir);
    careful::put_aside(&run_dir.join(FILE))?;
    Ok(was_there)
}
