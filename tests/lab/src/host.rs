//! A host or a pod: a network namespace, entered by a thread for the time of one action.
//!
//! Sockets opened inside stay inside, whichever thread uses them later; so do processes started inside.

use nix::sched::{CloneFlags, setns, unshare};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

/// A network namespace with a name under `/run/netns`, and for nodes a mount namespace with the right `/sys`.
pub struct Host {
    /// What tests call it: `n1`, `ext`.
    pub name: String,
    /// Its name under `/run/netns`, for `ip -n` by hand.
    pub netns: String,
    namespaces: Namespaces,
}

/// The namespaces of a host, for threads that outlive a borrow of it.
#[derive(Clone)]
pub struct Namespaces {
    net: Arc<File>,
    mounts: Option<Arc<File>>,
}

impl Namespaces {
    /// Takes the calling thread inside, for the rest of its life.
    #[expect(clippy::disallowed_methods, reason = "this is the helper that others use")]
    pub fn enter(&self) {
        if let Some(mounts) = &self.mounts {
            // A thread that shares its working directory with others may not change its mount namespace.
            unshare(CloneFlags::CLONE_FS).expect("unshare(CLONE_FS)");
            setns(mounts, CloneFlags::CLONE_NEWNS).expect("setns(CLONE_NEWNS)");
        }
        setns(&self.net, CloneFlags::CLONE_NEWNET).expect("setns(CLONE_NEWNET)");
    }

    /// Runs `action` in a thread inside.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            self.enter();
            action()
        };
        match thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Host {
    /// Opens a namespace that exists.
    pub fn open(name: &str, netns: &str) -> Host {
        let path = format!("/run/netns/{netns}");
        let net = File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        Host {
            name: name.to_owned(),
            netns: netns.to_owned(),
            namespaces: Namespaces { net: Arc::new(net), mounts: None },
        }
    }

    /// Gives the host its own view of `/sys`: without it `/sys/class/net` shows the machine's interfaces. The control
    /// groups stay, for container runtimes. The mount namespace lives as long as its file is open here, or a process
    /// is in it.
    pub fn with_own_sysfs(mut self) -> Host {
        let mounts = self.within(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("unshare(CLONE_NEWNS)");
            // Not private: a namespace's file that is unmounted outside must not stay pinned in here.
            checked(&["mount", "--make-rslave", "/"], None);
            // A mount on /sys hides what is mounted below it; /mnt is there everywhere, and is in the way of nobody here.
            checked(&["mount", "-t", "sysfs", "sysfs", "/mnt"], None);
            checked(&["mount", "--rbind", "/sys/fs/cgroup", "/mnt/fs/cgroup"], None);
            checked(&["mount", "--rbind", "/mnt", "/sys"], None);
            checked(&["umount", "-R", "/mnt"], None);
            File::open("/proc/thread-self/ns/mnt").expect("/proc/thread-self/ns/mnt")
        });
        self.namespaces.mounts = Some(Arc::new(mounts));
        self
    }

    /// The path of the namespace's file, as a runtime passes it in `CNI_NETNS`.
    pub fn netns_path(&self) -> String {
        format!("/run/netns/{}", self.netns)
    }

    /// Runs `action` in a thread inside the namespace.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        self.namespaces.within(action)
    }

    /// The way into it, for threads of their own.
    pub fn namespaces(&self) -> Namespaces {
        self.namespaces.clone()
    }

    /// Runs a command to its end and returns what it wrote. Panics, with all it said, if it fails.
    #[track_caller]
    pub fn run<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> String {
        let argv = owned(argv);
        success(&argv, None, self.within(|| output(&argv, None)))
    }

    /// Runs a command that reads `input`.
    #[track_caller]
    pub fn feed<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>, input: &str) -> String {
        let argv = owned(argv);
        success(&argv, Some(input), self.within(|| output(&argv, Some(input))))
    }

    /// Runs a command that may fail.
    pub fn try_run<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Output {
        let argv = owned(argv);
        self.within(|| output(&argv, None))
    }

    /// Starts a command and leaves it running; whoever holds the child ends it.
    pub fn spawn(&self, command: &mut Command) -> std::io::Result<Child> {
        self.within(|| command.spawn())
    }

    /// Runs `ip`, the arguments in one string.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        self.run(std::iter::once("ip").chain(arguments.split_whitespace()))
    }

    /// Runs `ip -batch`: one process for many lines.
    #[track_caller]
    pub fn ip_batch(&self, lines: &[String]) {
        self.feed(["ip", "-batch", "-"], &(lines.join("\n") + "\n"));
    }

    /// Runs `nft -f -`: one transaction.
    #[track_caller]
    pub fn nft(&self, ruleset: &str) -> String {
        self.feed(["nft", "-f", "-"], ruleset)
    }

    /// Sets sysctls, `net.ipv4.ip_forward=1`.
    pub fn sysctl(&self, settings: &[&str]) {
        self.within(|| {
            for setting in settings {
                let (key, value) = setting.split_once('=').expect("a sysctl is written key=value");
                let path = format!("/proc/sys/{}", key.replace('.', "/"));
                std::fs::write(&path, value).unwrap_or_else(|e| panic!("sysctl {setting} on {}: {e}", self.name));
            }
        });
    }

    /// The MAC address of an interface.
    #[track_caller]
    pub fn mac(&self, interface: &str) -> String {
        let text = self.ip(&format!("-o link show dev {interface}"));
        let mac = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
        mac.unwrap_or_else(|| panic!("{interface} has no MAC address: {text}")).to_owned()
    }

    /// The packets that all counters of a table count together.
    pub fn counted(&self, family: &str, table: &str) -> u64 {
        let text = self.run(["nft", "list", "table", family, table]);
        text.split("packets ").skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).sum()
    }

    /// How source addresses are looked at where packets come in: 0 not at all, 1 strictly, 2 loosely.
    pub fn set_rp_filter(&self, rp_filter: u8) {
        self.within(|| {
            let all = std::fs::read_dir("/proc/sys/net/ipv4/conf").expect("conf").flatten();
            // The tunnel device's own setting is Egret's.
            for interface in all.filter(|interface| interface.file_name() != "egret") {
                std::fs::write(interface.path().join("rp_filter"), rp_filter.to_string()).expect("rp_filter");
            }
        });
    }
}

/// Runs a command outside of any lab namespace. Panics, with all it said, if it fails.
#[track_caller]
pub fn checked<A: AsRef<OsStr>>(argv: &[A], input: Option<&str>) -> String {
    success(argv, input, output(argv, input))
}

#[track_caller]
fn success<A: AsRef<OsStr>>(argv: &[A], input: Option<&str>, out: Output) -> String {
    if !out.status.success() {
        let line: Vec<_> = argv.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        panic!(
            "`{}`: {}\n{}{}{}",
            line.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr),
            String::from_utf8_lossy(&out.stdout),
            input.map(|i| format!("its input was:\n{i}")).unwrap_or_default()
        );
    }
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Runs a command outside of any lab namespace, to its end.
pub fn output<A: AsRef<OsStr>>(argv: &[A], input: Option<&str>) -> Output {
    let (program, arguments) = argv.split_first().expect("a command has a name");
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().unwrap_or_else(|e| {
        panic!("{}: {e}; tests/setup.sh installs what the lab needs", program.as_ref().to_string_lossy())
    });
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        // A command that ends before it has read everything shows so by its status.
        let _ = stdin.write_all(text.as_bytes());
    }
    child.wait_with_output().expect("wait for a child")
}

fn owned<A: AsRef<OsStr>>(argv: impl IntoIterator<Item = A>) -> Vec<OsString> {
    argv.into_iter().map(|a| a.as_ref().to_owned()).collect()
}
