//! The plugin's side of the protocol ([`super::protocol`]): sends a request to the daemon and reads its response.

use crate::protocol::{CniError, PROTOCOL, Request, Response, Verb, codes};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the daemon may take to respond. A runtime allows minutes for the whole ADD. Pods that no policy selects
/// must not wait longer for a daemon that hangs.
const RESPONSE_SECONDS: i64 = 10;
/// Pause between two attempts while the daemon is away.
const RETRY: Duration = Duration::from_millis(50);
/// The longest response accepted, in bytes. Real ones have a few hundred.
const MAX_RESPONSE: u64 = 1024 * 1024;

/// How a request to the daemon ended.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestResult {
    /// The daemon did what was requested.
    Done,
    /// The daemon understood the request and reports a failure.
    Refused(CniError),
    /// The daemon accepted the connection but did not respond in time; the reason, in words. It may still do what was
    /// requested.
    TimedOut(String),
    /// No daemon that understands the request is there; the reason, in words.
    Offline(String),
}

/// One request to the daemon at a socket. It can be sent several times.
pub struct Client<'a> {
    socket: &'a Path,
    line: Vec<u8>,
}

impl<'a> Client<'a> {
    /// Encodes the request `verb` for the daemon at `socket`.
    ///
    /// # Errors
    /// The request cannot be encoded as JSON; no input causes that.
    pub fn new(socket: &'a Path, verb: Verb) -> Result<Self, CniError> {
        let mut line = serde_json::to_vec(&Request { version: PROTOCOL, verb })
            .map_err(|e| CniError::new(codes::IO, format!("the request to egretd cannot be encoded: {e}"), ""))?;
        line.push(b'\n');
        Ok(Client { socket, line })
    }

    /// Sends the request once.
    pub fn send(&self) -> RequestResult {
        let at = self.socket.display();
        let mut stream = match dial(self.socket) {
            Ok(stream) => stream,
            Err(e) if timed_out(&e) => return self.timed_out(),
            Err(e) => return RequestResult::Offline(format!("cannot connect to {at}: {e}")),
        };
        // A daemon may respond and close before it has read everything: ignore a write error, read the response.
        match stream.write_all(&self.line) {
            Err(e) if timed_out(&e) => return self.timed_out(),
            _ => {}
        }
        let mut response = Vec::new();
        match BufReader::new((&mut stream).take(MAX_RESPONSE)).read_until(b'\n', &mut response) {
            Err(e) if timed_out(&e) => return self.timed_out(),
            Err(e) => return RequestResult::Offline(format!("the connection to {at} failed: {e}")),
            Ok(_) if response.is_empty() => {
                return RequestResult::Offline(format!("{at} closed the connection without a response"));
            }
            Ok(_) => {}
        }
        match serde_json::from_slice::<Response>(&response) {
            Ok(Response { version, .. }) if version != PROTOCOL => RequestResult::Offline(format!(
                "egretd at {at} speaks protocol version {version}, this plugin speaks version {PROTOCOL}"
            )),
            Ok(Response { error: None, .. }) => RequestResult::Done,
            Ok(Response { error: Some(e), .. }) if e.code == codes::INCOMPATIBLE => {
                RequestResult::Offline(format!("egretd at {at} rejected the protocol version: {e}"))
            }
            Ok(Response { error: Some(e), .. }) => RequestResult::Refused(e),
            Err(e) => RequestResult::Offline(format!("the response from {at} cannot be decoded: {e}")),
        }
    }

    /// Sends the request until the daemon is not offline any more, for at most `patience`.
    pub fn send_for(&self, patience: Duration) -> RequestResult {
        let deadline = Instant::now() + patience;
        loop {
            match self.send() {
                RequestResult::Offline(_) if Instant::now() < deadline => thread::sleep(RETRY),
                outcome => return outcome,
            }
        }
    }

    fn timed_out(&self) -> RequestResult {
        let at = self.socket.display();
        RequestResult::TimedOut(format!(
            "egretd at {at} did not respond within {RESPONSE_SECONDS} seconds; look at its log on this node"
        ))
    }
}

/// Connects with a timeout. The standard library has none, and connecting blocks while a listener's queue is full.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::seconds(RESPONSE_SECONDS);
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

fn timed_out(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
