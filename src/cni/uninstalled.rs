//! The mark that an uninstallation leaves in the run directory. Runtimes keep the lists that they have read, and call
//! the plugin by them until they read again, or until the last pod of an old list has ended: so long it must stand in
//! nobody's way.

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

/// Leaves the mark.
///
/// # Errors
/// It cannot be written.
pub fn mark(run_dir: &Path) -> io::Result<()> {
    careful::create(&run_dir.join(FILE))?.write_all(TEXT.as_bytes())
}

/// Removes the mark; that it is not there is fine. Returns whether it was.
///
/// # Errors
/// It cannot be removed.
pub fn clear(run_dir: &Path) -> io::Result<bool> {
    let was_there = is_marked(run_dir);
    careful::put_aside(&run_dir.join(FILE))?;
    Ok(was_there)
}
