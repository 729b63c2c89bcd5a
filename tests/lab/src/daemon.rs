//! Egret's daemons as processes: started, killed, restarted, their logs kept for a test that fails.

use super::host::{Host, Namespaces};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// A daemon. Clones speak of the same process; with the last one it ends.
#[derive(Clone)]
pub struct Daemon(Arc<Inner>);

struct Inner {
    name: String,
    namespaces: Namespaces,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

impl Daemon {
    /// Starts it. The log is appended to.
    pub fn start(name: &str, host: &Host, program: &Path, arguments: Vec<String>, log: PathBuf) -> Daemon {
        let inner = Inner {
            name: name.to_owned(),
            namespaces: host.namespaces(),
            program: program.to_owned(),
            arguments,
            log,
            child: Mutex::new(None),
        };
        let daemon = Daemon(Arc::new(inner));
        daemon.spawn();
        daemon
    }

    fn spawn(&self) {
        let this = &*self.0;
        let mut log = OpenOptions::new().create(true).append(true).open(&this.log).expect("open a log");
        writeln!(log, "=== {} {}", this.program.display(), this.arguments.join(" ")).expect("write a log");
        let mut command = Command::new(&this.program);
        command.args(&this.arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        // `EGRET_TUNNEL_EGRESS=veth make e2e` runs scenarios the way that older kernels need, `EGRET_FAST_PATH_LEASE=1s` with
        // the fast path.
        let kept = ["EGRET_TUNNEL_EGRESS", "EGRET_FAST_PATH_LEASE"];
        let foreign = |key: &str| key.starts_with("EGRET_") && !kept.contains(&key);
        for (key, _) in env::vars_os().filter(|(k, _)| foreign(&k.to_string_lossy())) {
            command.env_remove(key);
        }
        let child = this.namespaces.within(|| command.spawn());
        let child = child.unwrap_or_else(|e| panic!("start {}: {e}", this.program.display()));
        *this.child.lock().expect("a lock") = Some(child);
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill9(&self) {
        self.0.end();
    }

    /// Holds it up, as a busy machine would, until it is let go on.
    pub fn suspend(&self, suspended: bool) {
        let pid = self.pid().unwrap_or_else(|| panic!("{} does not run", self.0.name));
        let signal = if suspended { Signal::SIGSTOP } else { Signal::SIGCONT };
        kill(Pid::from_raw(pid.cast_signed()), signal).expect("a signal");
    }

    /// Asks it to end with SIGTERM. Panics if it has not ended in ten seconds.
    pub fn term(&self) -> ExitStatus {
        let mut slot = self.0.child.lock().expect("a lock");
        let mut child = slot.take().unwrap_or_else(|| panic!("{} does not run", self.0.name));
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).expect("SIGTERM");
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("wait for a child") {
                return status;
            }
            thread::sleep(Duration::from_millis(5));
        }
        *slot = Some(child);
        drop(slot);
        panic!("{} has not ended ten seconds after SIGTERM", self.0.name);
    }

    /// Starts it again, with the same arguments.
    pub fn restart(&self) {
        self.kill9();
        self.spawn();
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.0.child.lock().expect("a lock").as_ref().map(Child::id)
    }

    /// Whether it runs: it was started, and has not ended by itself.
    pub fn runs(&self) -> bool {
        self.0.child.lock().expect("a lock").as_mut().is_some_and(|c| c.try_wait().is_ok_and(|s| s.is_none()))
    }

    /// All that it wrote, in all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.0.log).unwrap_or_default()
    }
}

impl Inner {
    fn end(&self) {
        let child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}
