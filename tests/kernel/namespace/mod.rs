//! Network namespaces for tests. Each test has a fresh one of its own, which ends with the test's thread.

pub mod host;

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use std::future::Future;
use std::process::Command;

/// Runs `test` in a fresh network namespace, in a thread and a tokio runtime of its own.
///
/// # Panics
/// Not root, or the test panics.
pub fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let _turn = lab::turn::beside_others();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command in the calling thread's namespace, and returns what it prints.
///
/// # Panics
/// It fails.
pub fn run(program: &str, arguments: &str) -> String {
    let out = Command::new(program).args(arguments.split_whitespace()).output().expect(program);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments}: {error}");
    String::from_utf8(out.stdout).expect("text")
}

/// Runs `ip` with `arguments`.
pub fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// Runs `ip -j` with `arguments`, and returns what it says.
pub fn ip_json(arguments: &str) -> Vec<Value> {
    let text = ip(&format!("-j {arguments}"));
    if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).expect("JSON") }
}

/// A second network namespace, held by a thread of its own; other ends of veth pairs are moved into it.
pub struct Other {
    /// The thread's id: what `ip link set ... netns` takes.
    pub id: i32,
    work: Option<std::sync::mpsc::Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Other {
    /// Makes a namespace.
    ///
    /// # Panics
    /// Not root.
    pub fn new() -> Self {
        let (work, jobs) = std::sync::mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (said, heard) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
            ip("link set lo up");
            said.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            jobs.into_iter().for_each(|job| job());
        });
        Other { id: heard.recv().expect("a namespace"), work: Some(work), thread: Some(thread) }
    }

    /// Runs `job` in this namespace, and waits for it.
    ///
    /// # Panics
    /// The job does.
    pub fn inside<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (said, heard) = std::sync::mpsc::channel();
        let job = Box::new(move || drop(said.send(job())));
        self.work.as_ref().expect("open until dropped").send(job).expect("the namespace's thread lives");
        heard.recv().expect("the job ends")
    }

    /// Runs `ip` with `arguments` in this namespace.
    pub fn ip(&self, arguments: &str) -> String {
        let arguments = arguments.to_owned();
        self.inside(move || ip(&arguments))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
