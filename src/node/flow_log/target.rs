//! Where records go: the standard output, a file, a syslog server, a Unix socket.

use anyhow::{Result, bail};
use jiff::Timestamp;
use nix::sys::stat::fstat;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{ToSocketAddrs, UdpSocket};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// The facility local0 and the severity info (RFC 5424, section 6.2.1).
const PRIORITY: u8 = 16 * 8 + 6;
/// The longest time that a write to a program's socket may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// The interval at which a file's name is checked.
const LOOK: Duration = Duration::from_secs(1);

/// The value of `--flow-log`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// `stdout`.
    Stdout,
    /// `file:PATH`.
    File(PathBuf),
    /// `syslog:ADDRESS`, host and port: by UDP.
    Syslog(String),
    /// `unix:PATH`: a stream or datagram socket on which a program listens.
    Unix(PathBuf),
}

impl FromStr for LogTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdout" => Ok(LogTarget::Stdout),
            Some(("file", path)) if path.starts_with('/') => Ok(LogTarget::File(path.into())),
            Some(("unix", path)) if path.starts_with('/') => Ok(LogTarget::Unix(path.into())),
            Some(("syslog", address)) if address.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) => {
                Ok(LogTarget::Syslog(address.to_owned()))
            }
            _ => Err(format!(
                "{text:?} is no place for records; write stdout, file:/PATH, syslog:HOST:PORT or unix:/PATH"
            )),
        }
    }
}

impl fmt::Display for LogTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogTarget::Stdout => f.write_str("stdout"),
            LogTarget::File(path) => write!(f, "file:{}", path.display()),
            LogTarget::Syslog(address) => write!(f, "syslog:{address}"),
            LogTarget::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl LogTarget {
    /// Opens the target. A target that cannot be opened is logged, and opened again when there is something to write,
    /// because the node's pods must not wait for it.
    pub(super) fn open(&self) -> Sink {
        match self {
            LogTarget::Stdout => Sink::Stdout,
            LogTarget::File(path) => {
                let file = open(path);
                let file = file.inspect_err(|e| tracing::warn!("--flow-log {self}: {e:#}; trying again")).ok();
                Sink::File { path: path.clone(), file, looked: Instant::now() }
            }
            LogTarget::Syslog(address) => {
                let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
                Sink::Syslog { address: address.clone(), host, socket: None }
            }
            LogTarget::Unix(path) => Sink::Unix { path: path.clone(), socket: None },
        }
    }
}

fn open(path: &Path) -> Result<File> {
    // Non-blocking, because opening a FIFO would wait for a reader.
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW);
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        bail!("{} is no regular file; use unix:PATH for a program that listens", path.display());
    }
    Ok(file)
}

/// An open target.
pub(super) enum Sink {
    Stdout,
    File { path: PathBuf, file: Option<File>, looked: Instant },
    Syslog { address: String, host: String, socket: Option<UdpSocket> },
    Unix { path: PathBuf, socket: Option<Unix> },
}

pub(super) enum Unix {
    Stream(UnixStream),
    Datagram(UnixDatagram),
}

impl Sink {
    /// Writes complete lines. Returns how many of them were written.
    pub(super) fn write(&mut self, lines: &[u8]) -> (u64, io::Result<()>) {
        match self {
            Sink::Stdout => whole(lines, io::stdout().lock().write_all(lines)),
            Sink::File { path, file, looked } => {
                let written = current(path, file, looked).and_then(|file| file.write_all(lines));
                whole(lines, written)
            }
            Sink::Syslog { address, host, socket } => {
                let result = connected(socket, address);
                each(lines, result, |socket, line| {
                    let header = format!("<{PRIORITY}>1 {:.6} {host} egretd - flow - ", Timestamp::now());
                    socket.send(&[header.as_bytes(), line].concat()).map(drop)
                })
            }
            Sink::Unix { path, socket } => {
                let result = match socket {
                    Some(socket) => Ok(socket),
                    None => connect(path).map(|connected| socket.insert(connected)),
                };
                let (written, result) = match result {
                    Ok(Unix::Stream(stream)) => whole(lines, stream.write_all(lines)),
                    Ok(Unix::Datagram(datagram)) => each(lines, Ok(datagram), |to, line| to.send(line).map(drop)),
                    Err(e) => (0, Err(e)),
                };
                if result.is_err() {
                    // After a part of a line, the stream cannot be used any more.
                    *socket = None;
                }
                (written, result)
            }
        }
    }
}

/// The file with this name. After a rotation has renamed or removed it, a new one is created.
fn current<'a>(path: &Path, file: &'a mut Option<File>, looked: &mut Instant) -> io::Result<&'a mut File> {
    if looked.elapsed() >= LOOK {
        *looked = Instant::now();
        let here = file.as_ref().and_then(|file| fstat(file).ok()).map(|of| (of.st_dev, of.st_ino));
        let named = fs::symlink_metadata(path).ok().map(|of| (of.dev(), of.ino()));
        if here != named {
            *file = None;
        }
    }
    match file {
        Some(file) => Ok(file),
        None => {
            let opened = open(path).map_err(io::Error::other)?;
            Ok(file.insert(opened))
        }
    }
}

fn connected<'a>(socket: &'a mut Option<UdpSocket>, address: &str) -> io::Result<&'a mut UdpSocket> {
    if socket.is_none() {
        let to = address.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
        let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let new = UdpSocket::bind(from)?;
        new.connect(to)?;
        *socket = Some(new);
    }
    socket.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
}

fn connect(path: &Path) -> io::Result<Unix> {
    match UnixStream::connect(path) {
        Ok(stream) => {
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(Unix::Stream(stream))
        }
        Err(e) if e.raw_os_error() == Some(nix::libc::EPROTOTYPE) => {
            let datagram = UnixDatagram::unbound()?;
            datagram.connect(path)?;
            datagram.set_write_timeout(Some(PATIENCE))?;
            Ok(Unix::Datagram(datagram))
        }
        Err(e) => Err(e),
    }
}

fn whole(lines: &[u8], result: io::Result<()>) -> (u64, io::Result<()>) {
    let count = if result.is_ok() { count(lines) } else { 0 };
    (count, result)
}

/// Sends each line in its own datagram, without the newline.
fn each<T>(lines: &[u8], to: io::Result<T>, send: impl Fn(&mut T, &[u8]) -> io::Result<()>) -> (u64, io::Result<()>) {
    let mut to = match to {
        Ok(to) => to,
        Err(e) => return (0, Err(e)),
    };
    let (mut written, mut result) = (0, Ok(()));
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match send(&mut to, line) {
            Ok(()) => written += 1,
            Err(e) => result = Err(e),
        }
    }
    (written, result)
}

/// The number of lines.
pub(super) fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests;
