//! A directory that runtimes and other CNIs use at the same time: what is written there appears whole or not at all,
//! and what somebody else writes meanwhile is not lost.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::O_NONBLOCK;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Files are written under `.NAME.egret-tmp` before they take their name. No runtime reads files that end so.
const TEMPORARY: &str = ".egret-tmp";
/// Network configurations have some kilobytes; this is what containerd takes at most.
const MAX_BYTES: u64 = 2 << 20;
/// A file that was changed less than this long ago may still be being written.
const YOUNG: Duration = Duration::from_secs(1);

/// A directory, locked against other processes of Egret until it is dropped: an init container, a daemon, a person.
pub struct Directory {
    path: PathBuf,
    lock: Flock<File>,
}

/// A file as it was read.
pub struct Found {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether its name is that of a symbolic link.
    pub is_link: bool,
    metadata: Metadata,
}

impl Found {
    /// As text.
    ///
    /// # Errors
    /// It is none.
    pub fn text(&self) -> Result<&str, String> {
        str::from_utf8(&self.bytes).map_err(|e| format!("it is not UTF-8: {e}"))
    }

    /// Whether its writer may not have finished.
    pub fn is_young(&self) -> bool {
        is_young(&self.metadata)
    }

    /// The permission bits.
    pub fn mode(&self) -> u32 {
        self.metadata.permissions().mode() & 0o7777
    }
}

impl Directory {
    /// Opens and locks it, and removes what a killed process left unfinished. `None` if there is no such directory.
    ///
    /// # Errors
    /// It cannot be opened, locked or cleaned.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let about = || format!("directory {}", path.display());
        let file = match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(about)?,
        };
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).with_context(about)?;
        let directory = Directory { path: path.to_owned(), lock };
        for name in directory.names()? {
            // The lock is ours: nobody is at work on it.
            if name.starts_with('.') && name.ends_with(TEMPORARY) {
                directory.remove(&name)?;
            }
        }
        Ok(Some(directory))
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The names in it, sorted as runtimes sort them: by their bytes. Names that are not UTF-8 are left out.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
        let entries = entries.with_context(|| format!("directory {}", self.path.display()))?;
        let mut names: Vec<String> = entries.into_iter().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Reads a file; `None` if there is none.
    ///
    /// # Errors
    /// Why it cannot be a network configuration: it is no file, is too big, cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Found>, String> {
        let path = self.path(name);
        let is_link = match path.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| e.to_string())?.is_symlink(),
        };
        // Who puts a pipe under such a name shall not make us wait for it.
        let file = match OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound && !is_link => return Ok(None),
            other => other.map_err(|e| e.to_string())?,
        };
        let metadata = file.metadata().map_err(|e| e.to_string())?;
        if !metadata.is_file() {
            return Err("it is no regular file".into());
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(format!("it has more than {} MiB", MAX_BYTES >> 20));
        }
        Ok(Some(Found { bytes, is_link, metadata }))
    }

    /// Writes a file of Egret's own.
    ///
    /// # Errors
    /// It cannot be written; then what was there is there still.
    pub fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let temporary = self.temporary(name);
        let done = unfinished(&temporary, bytes, mode, None).and_then(|()| fs::rename(&temporary, self.path(name)));
        done.with_context(|| format!("{}", self.path(name).display()))?;
        self.keep()
    }

    /// Gives somebody else's file new contents, with its mode and owner. False: it is not as it was found any more,
    /// and was left to who changed it.
    ///
    /// # Errors
    /// It cannot be written; then what was there is there still.
    pub fn replace(&self, name: &str, found: &Found, bytes: &[u8]) -> Result<bool> {
        let (temporary, path) = (self.temporary(name), self.path(name));
        let about = || format!("{}", path.display());
        unfinished(&temporary, bytes, found.mode(), Some((found.metadata.uid(), found.metadata.gid())))
            .with_context(about)?;
        // What comes out is what was there in that very moment. If it is not what was thought to be there, somebody has
        // written meanwhile and perhaps still does: the newer one goes back to its place, and so on.
        let (mut there, mut mine) = (found.bytes.clone(), bytes.to_vec());
        loop {
            match exchange(&temporary, &path) {
                Ok(()) => {}
                // A file system that cannot.
                Err(Errno::EINVAL | Errno::ENOSYS) => {
                    fs::rename(&temporary, &path).with_context(about)?;
                    self.keep()?;
                    return Ok(true);
                }
                // It was removed.
                Err(Errno::ENOENT) => {
                    fs::remove_file(&temporary).with_context(about)?;
                    return Ok(false);
                }
                Err(e) => return Err(e).with_context(about),
            }
            let out = fs::read(&temporary).with_context(about)?;
            if out == there {
                fs::remove_file(&temporary).with_context(about)?;
                self.keep()?;
                return Ok(mine == bytes);
            }
            (there, mine) = (mine, out);
        }
    }

    /// Removes a file; that it is not there is no error. Returns whether it was.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, name: &str) -> Result<bool> {
        match fs::remove_file(self.path(name)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).with_context(|| format!("{} cannot be removed", self.path(name).display())),
        }
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!(".{name}{TEMPORARY}"))
    }

    /// Makes names outlast a loss of power.
    fn keep(&self) -> Result<()> {
        self.lock.sync_all().with_context(|| format!("directory {}", self.path.display()))
    }
}

/// Whether a file's writer may not have finished. What was changed in the future is not young.
pub fn is_young(file: &Metadata) -> bool {
    let age = file.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    age.is_some_and(|age| age < YOUNG)
}

/// Writes all of a file but its name. It is closed when this returns: a program that is open for writing cannot be
/// executed (`ETXTBSY`).
fn unfinished(path: &Path, bytes: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    let now = file.metadata()?;
    if let Some((uid, gid)) = owner.filter(|owner| *owner != (now.uid(), now.gid())) {
        fchown(&file, Some(uid), Some(gid))?;
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

#[cfg(target_env = "gnu")]
fn exchange(a: &Path, b: &Path) -> nix::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE)
}

/// Other C libraries do not offer it.
#[cfg(not(target_env = "gnu"))]
fn exchange(_: &Path, _: &Path) -> nix::Result<()> {
    Err(Errno::ENOSYS)
}
