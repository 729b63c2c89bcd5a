//! A directory that runtimes and other CNIs use at the same time. Files are written atomically, and concurrent
//! changes by others are not lost.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::O_NONBLOCK;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Suffix of temporary files, `.NAME.egret-tmp`. No runtime reads files with it.
const TEMPORARY: &str = ".egret-tmp";
/// The longest file accepted, in bytes; containerd's limit. Network configurations have some kilobytes.
const MAX_BYTES: u64 = 2 << 20;
/// A file that was changed less than this time ago may be incomplete.
const YOUNG: Duration = Duration::from_secs(1);

/// A directory, locked against other processes of Egret (init container, daemon, command line) until it is dropped.
pub struct Directory {
    path: PathBuf,
    lock: Flock<File>,
}

/// A file's contents and metadata at the time of reading.
pub struct FileContents {
    pub bytes: Vec<u8>,
    /// Whether the name is a symbolic link.
    pub is_link: bool,
    metadata: Metadata,
}

impl FileContents {
    /// The contents as text.
    ///
    /// # Errors
    /// The contents are not UTF-8.
    pub fn text(&self) -> Result<&str, String> {
        str::from_utf8(&self.bytes).map_err(|e| format!("it is not UTF-8: {e}"))
    }

    /// Whether the file may be incomplete.
    pub fn is_young(&self) -> bool {
        is_young(&self.metadata)
    }

    /// The file's permission bits.
    pub fn mode(&self) -> u32 {
        self.metadata.permissions().mode() & 0o7777
    }
}

impl Directory {
    /// Opens and locks the directory, and removes the temporary files of killed processes. `None` if there is no such
    /// directory.
    ///
    /// # Errors
    /// The directory cannot be opened, locked or cleaned.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let about = || format!("directory {}", path.display());
        let file = match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(about)?,
        };
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).with_context(about)?;
        let directory = Directory { path: path.to_owned(), lock };
        for name in directory.names()? {
            // This process has the lock, so no other one is using the file.
            if name.starts_with('.') && name.ends_with(TEMPORARY) {
                directory.remove(&name)?;
            }
        }
        Ok(Some(directory))
    }

    /// The path of a file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory's file names in byte order, as runtimes sort them. Names that are not UTF-8 are omitted.
    ///
    /// # Errors
    /// The directory cannot be read.
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
    /// The file cannot be a network configuration: it is no regular file, is too big, or cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<FileContents>, String> {
        let path = self.path(name);
        let is_link = match path.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| e.to_string())?.is_symlink(),
        };
        // Non-blocking, because opening a FIFO would wait for a writer.
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
        Ok(Some(FileContents { bytes, is_link, metadata }))
    }

    /// Writes a file that belongs to Egret.
    ///
    /// # Errors
    /// The file cannot be written; the old one is unchanged.
    pub fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let temporary = self.temporary(name);
        let done = unfinished(&temporary, bytes, mode, None).and_then(|()| fs::rename(&temporary, self.path(name)));
        done.with_context(|| format!("{}", self.path(name).display()))?;
        self.keep()
    }

    /// Replaces the contents of a file that belongs to another program, and keeps its mode and owner. Returns false
    /// if the file was changed since it was read; the newer contents stay.
    ///
    /// # Errors
    /// The file cannot be written; the old one is unchanged.
    pub fn replace(&self, name: &str, found: &FileContents, bytes: &[u8]) -> Result<bool> {
        let (temporary, path) = (self.temporary(name), self.path(name));
        let about = || format!("{}", path.display());
        unfinished(&temporary, bytes, found.mode(), Some((found.metadata.uid(), found.metadata.gid())))
            .with_context(about)?;
        // The exchange returns what was in place at that moment. If that is not what was read before, another program
        // has written meanwhile, and may still: put the newer contents back, and compare again.
        let (mut there, mut mine) = (found.bytes.clone(), bytes.to_vec());
        loop {
            match exchange(&temporary, &path) {
                Ok(()) => {}
                // The file system cannot exchange.
                Err(Errno::EINVAL | Errno::ENOSYS) => {
                    fs::rename(&temporary, &path).with_context(about)?;
                    self.keep()?;
                    return Ok(true);
                }
                // The file was removed meanwhile.
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

    /// Removes a file. Returns whether there was one.
    ///
    /// # Errors
    /// The file cannot be removed.
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

    /// Syncs the directory, so that renames survive a power loss.
    fn keep(&self) -> Result<()> {
        self.lock.sync_all().with_context(|| format!("directory {}", self.path.display()))
    }
}

/// Whether a file may be incomplete. A modification time in the future does not count as recent.
pub fn is_young(file: &Metadata) -> bool {
    let age = file.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    age.is_some_and(|age| age < YOUNG)
}

/// Writes a temporary file and closes it. A program that is open for writing cannot be executed (`ETXTBSY`).
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

/// `renameat2` is not available with other C libraries.
#[cfg(not(target_env = "gnu"))]
fn exchange(_: &Path, _: &Path) -> nix::Result<()> {
    Err(Errno::ENOSYS)
}
