//! The run directory: what lies in it, and the lock that a daemon holds on it.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// The daemon's socket.
pub const SOCKET: &str = "cni.sock";
/// Locked by the daemon that uses the directory.
pub const DAEMON_LOCK: &str = "egretd.lock";
/// Locked by plugins that do the daemon's work while it is away.
pub const PLUGIN_LOCK: &str = "attachments.lock";
/// A file for each attachment.
pub const ATTACHMENTS: &str = "attachments";
/// What the daemon was told of the cluster, with the Kubernetes API as its source.
pub const KNOWN: &str = "known";
/// The daemon's last word.
pub const LAST_WORD: &str = "last-word.json";

/// Makes the directory, for root alone.
///
/// # Errors
/// It cannot be made.
pub fn make(run_dir: &Path) -> io::Result<()> {
    fs::create_dir_all(run_dir)?;
    fs::set_permissions(run_dir, fs::Permissions::from_mode(0o700))
}

/// Takes the daemon's lock. `None`: somebody else has it.
///
/// # Errors
/// It cannot be locked.
pub fn lock_daemon(run_dir: &Path) -> io::Result<Option<Flock<File>>> {
    let path = run_dir.join(DAEMON_LOCK);
    loop {
        let file = File::options().create(true).write(true).truncate(false).open(&path)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, e)) => return Err(e.into()),
        };
        // An uninstallation removes the file; who locks what has been removed, locks nothing.
        if is_locked_by(run_dir, &lock)? {
            return Ok(Some(lock));
        }
    }
}

/// Whether the lock is of the file that is there now.
///
/// # Errors
/// The lock's own file cannot be looked at.
pub fn is_locked_by(run_dir: &Path, lock: &File) -> io::Result<bool> {
    let own = lock.metadata()?;
    Ok(run_dir.join(DAEMON_LOCK).metadata().is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())))
}

/// Takes the plugins' lock, for which it waits.
///
/// # Errors
/// It cannot be locked.
pub fn lock_plugins(run_dir: &Path) -> io::Result<File> {
    let file = File::create(run_dir.join(PLUGIN_LOCK))?;
    file.lock()?;
    Ok(file)
}
