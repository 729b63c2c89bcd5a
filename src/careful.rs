//! Files in directories where anything may stand in their place: one bad entry is one bad entry.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// How every file here is opened: whoever has put a link, a pipe or a device in its place does not lead this elsewhere, and
/// does not make it wait.
const CAREFULLY: i32 = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;

/// Opens a file to lock it. What is none is put aside.
///
/// # Errors
/// It cannot be made or opened.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let open = || {
        let file = File::options().create(true).write(true).truncate(false).custom_flags(CAREFULLY).open(path)?;
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

/// Reads a file of at most so many bytes.
///
/// # Errors
/// It is not there, is longer, is no regular file, or cannot be read.
pub fn read(path: &Path, longest: u64) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(CAREFULLY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(not_a_file());
    }
    let mut bytes = Vec::new();
    // What it says of its length may be wrong a moment later.
    file.take(longest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        let message = format!("it is longer than {longest} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(bytes)
}

/// Makes a new, empty file in place of whatever was there.
///
/// # Errors
/// It cannot be made.
pub fn create(path: &Path) -> io::Result<File> {
    let create = || File::options().write(true).create_new(true).custom_flags(CAREFULLY).open(path);
    create().or_else(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => put_aside(path).and_then(|()| create()),
        _ => Err(e),
    })
}

/// Writes a file whole or not at all, by another one that then takes its name.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, unfinished: &Path, bytes: &[u8]) -> io::Result<()> {
    create(unfinished)?.write_all(bytes)?;
    if path.symlink_metadata().is_ok_and(|there| there.is_dir()) {
        put_aside(path)?;
    }
    fs::rename(unfinished, path)
}

/// Makes room for a file where something else is: removes it, or gives another name to a directory that is not empty.
///
/// # Errors
/// It stays there.
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
        tracing::warn!(directory = %path.display(), to = %aside.display(), "it stands where a file is to be, and is renamed");
        fs::rename(path, aside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_a_file_is_read_and_anything_else_makes_room_for_one() {
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
