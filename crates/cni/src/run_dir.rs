//! The run directory: its files and directories, and the daemon's lock on it.

use crate::careful::{create, open_lock, put_aside};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The daemon's socket.
pub const SOCKET: &str = "cni.sock";
/// The lock file of the daemon that uses the directory.
pub const DAEMON_LOCK: &str = "egretd.lock";
/// The lock file of plugins that do the daemon's work while it is away.
pub const PLUGIN_LOCK: &str = "attachments.lock";
/// Directory with one file for each attachment.
pub const ATTACHMENTS: &str = "attachments";
/// Directory with one file for each adopted pod.
pub const ADOPTED: &str = "adopted";
/// Directory of the offline cache, which the daemon keeps with the Kubernetes API as its source.
pub const KNOWN: &str = "known";

/// Creates the directory, accessible by root alone.
///
/// # Errors
/// The directory cannot be created.
pub fn make(run_dir: &Path) -> io::Result<()> {
    fs::create_dir_all(run_dir)?;
    fs::set_permissions(run_dir, fs::Permissions::from_mode(0o700))
}

/// Takes the daemon's lock. `None` if another process has it.
///
/// # Errors
/// The file cannot be opened or locked.
pub fn lock_daemon(run_dir: &Path) -> io::Result<Option<Flock<File>>> {
    let path = run_dir.join(DAEMON_LOCK);
    loop {
        let file = open_lock(&path)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, e)) => return Err(e.into()),
        };
        // An uninstallation removes the file. A lock on a removed file has no effect, so try again.
        if is_locked_by(run_dir, &lock)? {
            return Ok(Some(lock));
        }
    }
}

/// Creates a directory in the run directory. Anything else in its place is moved aside.
///
/// # Errors
/// The directory cannot be created.
pub fn make_within(run_dir: &Path, name: &str) -> io::Result<()> {
    let path = run_dir.join(name);
    match fs::create_dir(&path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !path.is_dir() => {
            put_aside(&path)?;
            fs::create_dir(&path)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs::create_dir_all(&path),
        other => other,
    }
}

/// Paths of the entries of a directory in the run directory. Empty if there is no such directory, or anything else in
/// its place.
///
/// # Errors
/// The directory cannot be read.
pub fn entries(run_dir: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(run_dir.join(name)) {
        // ELOOP: a symbolic link that leads to itself.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => Ok(Vec::new()),
        other => other?.map(|entry| Ok(entry?.path())).collect(),
    }
}

/// Checks that files can be written, by writing one of an attachment's size.
///
/// # Errors
/// The file cannot be written or removed.
pub fn try_writing(run_dir: &Path) -> io::Result<()> {
    let path = run_dir.join(".trial");
    let written = create(&path).and_then(|mut file| file.write_all(&[0; 4096]));
    let removed = match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    written.and(removed)
}

/// Whether `lock` is on the lock file that is in the directory now.
///
/// # Errors
/// The lock's own file has no metadata.
pub fn is_locked_by(run_dir: &Path, lock: &File) -> io::Result<bool> {
    let own = lock.metadata()?;
    Ok(run_dir.join(DAEMON_LOCK).metadata().is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())))
}

/// Takes the plugins' lock, and waits until it is free.
///
/// # Errors
/// The file cannot be opened or locked.
pub fn lock_plugins(run_dir: &Path) -> io::Result<File> {
    let file = open_lock(&run_dir.join(PLUGIN_LOCK))?;
    file.lock()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_anything_but_a_directory_are_empty() {
        let run_dir = tempfile::tempdir().unwrap();
        let within = |name: &str| run_dir.path().join(name);
        std::os::unix::fs::symlink("circle", within("circle")).unwrap();
        fs::write(within("file"), b"").unwrap();
        make_within(run_dir.path(), "full").unwrap();
        fs::write(within("full/one"), b"").unwrap();
        for name in ["circle", "file", "missing"] {
            assert!(entries(run_dir.path(), name).unwrap().is_empty(), "{name}");
        }
        assert_eq!(entries(run_dir.path(), "full").unwrap(), [within("full/one")]);
    }
}
