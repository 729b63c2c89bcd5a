//! `egretd trace`: joins standard input and output to the daemon's socket, for a command that runs in the daemon's
//! container by the API server.

use anyhow::{Context, Result};
use egret_cni::run_dir::SOCKET;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

/// Copies both ways until the daemon closes the connection. The end of standard input ends the trace.
///
/// # Errors
/// The daemon does not run.
pub fn relay(run_dir: &Path) -> Result<()> {
    let path = run_dir.join(SOCKET);
    let cannot = || format!("cannot ask the daemon at {}; see its log and /readyz", path.display());
    let mut answers = UnixStream::connect(&path).with_context(cannot)?;
    let mut requests = answers.try_clone().with_context(cannot)?;
    // The thread ends with the process.
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut requests);
        let _ = requests.shutdown(Shutdown::Write);
    });
    match io::copy(&mut answers, &mut io::stdout()) {
        // Who asked is gone.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map(drop).with_context(cannot),
    }
}
