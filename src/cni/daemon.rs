//! The plugin's side of the conversation with the daemon ([`super::protocol`]).

use super::protocol::{Failure, PROTOCOL, Request, Response, Verb, codes};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the daemon may take for an answer. A runtime gives the whole of ADD some minutes, and pods of other policies,
/// or of none, are not to wait for a daemon that hangs.
const ANSWER_SECONDS: i64 = 10;
/// How often a daemon that is away is looked for while waiting for it.
const RETRY: Duration = Duration::from_millis(50);
/// An answer has a few hundred bytes.
const MAX_ANSWER: u64 = 1024 * 1024;

/// How a question ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The daemon did it.
    Done,
    /// The daemon understood, and says no.
    Refused(Failure),
    /// A daemon is there and does not answer in time; in words. It may still do what it was asked.
    Silent(String),
    /// There is no daemon that understands; why, in words.
    Offline(String),
}

/// A question to the daemon behind a socket.
pub struct Question<'a> {
    socket: &'a Path,
    line: Vec<u8>,
}

impl<'a> Question<'a> {
    /// A question that is put to the daemon at `socket`.
    ///
    /// # Errors
    /// None that input can cause: it cannot be written as JSON.
    pub fn new(socket: &'a Path, verb: Verb) -> Result<Self, Failure> {
        let mut line = serde_json::to_vec(&Request { version: PROTOCOL, verb })
            .map_err(|e| Failure::new(codes::IO, format!("the question to egretd cannot be written: {e}"), ""))?;
        line.push(b'\n');
        Ok(Question { socket, line })
    }

    /// Puts it once.
    pub fn ask(&self) -> Answer {
        let at = self.socket.display();
        let mut stream = match dial(self.socket) {
            Ok(stream) => stream,
            Err(e) if timed_out(&e) => return self.silent(),
            Err(e) => return Answer::Offline(format!("no answer at {at}: {e}")),
        };
        // A daemon that closes before it has read all may have left its answer: writing may fail, reading decides.
        match stream.write_all(&self.line) {
            Err(e) if timed_out(&e) => return self.silent(),
            _ => {}
        }
        let mut answer = Vec::new();
        match BufReader::new((&mut stream).take(MAX_ANSWER)).read_until(b'\n', &mut answer) {
            Err(e) if timed_out(&e) => return self.silent(),
            Err(e) => return Answer::Offline(format!("the connection to {at} broke off: {e}")),
            Ok(_) if answer.is_empty() => {
                return Answer::Offline(format!("{at} closed the connection without an answer"));
            }
            Ok(_) => {}
        }
        match serde_json::from_slice::<Response>(&answer) {
            Ok(Response { version, .. }) if version != PROTOCOL => Answer::Offline(format!(
                "egretd at {at} speaks version {version} of the conversation, this plugin speaks {PROTOCOL}"
            )),
            Ok(Response { error: None, .. }) => Answer::Done,
            Ok(Response { error: Some(e), .. }) if e.code == codes::INCOMPATIBLE => {
                Answer::Offline(format!("egretd at {at} refused the conversation: {e}"))
            }
            Ok(Response { error: Some(e), .. }) => Answer::Refused(e),
            Err(e) => Answer::Offline(format!("the answer from {at} cannot be understood: {e}")),
        }
    }

    /// Puts it until there is an answer, for as long as `patience`.
    pub fn ask_for(&self, patience: Duration) -> Answer {
        let deadline = Instant::now() + patience;
        loop {
            match self.ask() {
                Answer::Offline(_) if Instant::now() < deadline => thread::sleep(RETRY),
                answer => return answer,
            }
        }
    }

    fn silent(&self) -> Answer {
        let at = self.socket.display();
        Answer::Silent(format!(
            "egretd at {at} did not answer within {ANSWER_SECONDS} seconds; look at its log on this node"
        ))
    }
}

/// Connects, with a bound on the time: the standard library has none for a listener whose queue is full.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::seconds(ANSWER_SECONDS);
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

fn timed_out(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
