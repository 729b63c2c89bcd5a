//! Safe access to files in directories where anything may be in their place.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Flags for opening a file: do not follow a symbolic link, do not wait for a pipe's other end, do not take a terminal.
const SAFE_OPEN: i32 = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;

/// Opens a file to lock it. Anything else in its place is moved aside.
///
/// # Errors
/// The file cannot be created or opened.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let open = || {
        let file = File::options().create(true).write(true).truncate(false).custom_flags(SAFE_OPEN).open(path)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(not_a_file()) }
    };
    open().or_else(|e| {
        if path.symlink_metadata().is_ok_and(|there| !there.is_file()) {
            put_aside(path)?;
            return open();
        }
        Err(e)
    })
}

fn not_a_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no regular file")
}

/// Reads a file of at most `longest` bytes.
///
/// # Errors
/// The file does not exist, is longer, is no regular file, or cannot be read.
pub fn read(path: &Path, longest: u64) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(SAFE_OPEN).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(not_a_file());
    }
    let mut bytes = Vec::new();
    // The file may have grown since its metadata was read: bound the read itself.
    file.take(longest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        let message = format!("it is longer than {longest} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(bytes)
}

/// Creates a new, empty file, and moves aside anything else in its place.
///
/// # Errors
/// The file cannot be created.
pub fn create(path: &Path) -> io::Result<File> {
    let create = || File::options().write(true).create_new(true).custom_flags(SAFE_OPEN).open(path);
    create().or_else(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => put_aside(path).and_then(|()| create()),
        _ => Err(e),
    })
}

/// Writes a file atomically: writes `unfinished`, and renames it to `path`.
///
/// # Errors
/// The file cannot be written or renamed.
pub fn replace(path: &Path, unfinished: &Path, bytes: &[u8]) -> io::Result<()> {
    create(unfinished)?.write_all(bytes)?;
    if path.symlink_metadata().is_ok_and(|there| there.is_dir()) {
        put_aside(path)?;
    }
    fs::rename(unfinished, path)
}

/// Makes room for a file: removes a file or an empty directory, renames a directory that is not empty.
///
/// # Errors
/// The entry cannot be removed or renamed.
pub fn put_aside(path: &Path) -> io::Result<()> {
    let there = match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !there.is_dir() {
        return fs::remove_file(path);
    }
    fs::remove_dir(path).or_else(|_| {
        let mut name = std::ffi::OsString::from(".put-aside.");
        name.push(path.file_name().unwrap_or_default());
        let aside = path.with_file_name(name);
        let (directory, to) = (path.display(), aside.display());
        tracing::warn!(%directory, %to, "renamed a directory that was in a file's place");
        fs::rename(path, aside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_regular_files_are_read_and_anything_else_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        symlink("circle", path("circle")).unwrap();
        symlink("/dev/zero", path("device")).unwrap();
        symlink("/etc/hostname", path("elsewhere")).unwrap();
        fs::create_dir_all(path("directory/full")).unwrap();
        fs::write(path("long"), [0; 65]).unwrap();
        for name in ["pipe", "circle", "device", "elsewhere", "directory", "long"] {
            assert!(read(&path(name), 64).is_err(), "{name}");
            replace(&path(name), &path("unfinished"), b"new").unwrap();
            assert_eq!(read(&path(name), 64).unwrap(), b"new", "{name}");
        }
        assert!(path(".put-aside.directory/full").is_dir());
        symlink("nowhere", path("lock")).unwrap();
        assert!(open_lock(&path("lock")).unwrap().metadata().unwrap().is_file());
        assert!(!path("nowhere").exists());
    }
}
