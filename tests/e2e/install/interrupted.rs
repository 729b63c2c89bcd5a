//! `egretd install` that is killed, and a plugin that is replaced while it runs.

use super::*;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::path::Path;

/// Runs `install` under the debugger, and kills it before its n-th system call. Returns false if it ended before.
fn killed_before(host: &Host, n: usize) -> bool {
    let script = format!("kill -STOP $$; exec {} {}", env!("CARGO_BIN_EXE_egretd"), host.arguments().join(" "));
    #[expect(clippy::zombie_processes, reason = "waitpid below")]
    let child = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    assert!(matches!(waitpid(pid, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(..))));
    ptrace::attach(pid).unwrap();
    waitpid(pid, None).unwrap();
    nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
    for _ in 0..n {
        ptrace::syscall(pid, None).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
            WaitStatus::Exited(_, status) => {
                assert_eq!(status, 0);
                return false;
            }
            other => panic!("{other:?}"),
        }
    }
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    while !matches!(waitpid(pid, None).unwrap(), WaitStatus::Signaled(..)) {}
    true
}

#[test]
fn an_installation_killed_at_any_step_leaves_the_old_or_the_new_state() {
    let host = Host::new();
    let check = |file: &str, allowed: &[&str], n: usize| {
        let now = fs::read_to_string(host.path(file)).unwrap_or_default();
        assert!(allowed.contains(&now.as_str()), "{file} after {n} steps: {now}");
    };
    let single = |text: &str| {
        let list = host.read("10-net-egret.conflist");
        assert!(list.contains(text.trim()), "{list}");
        list
    };
    // The list that replaces the single plugin, before and after.
    host.write("10-net.conf", SINGLE);
    host.install();
    let before = single(SINGLE);
    let changed = SINGLE.replace("1400", "9000");
    host.write("10-net.conf", &changed);
    host.install();
    let after = single(&changed);
    fs::remove_file(host.conf("10-net.conf")).unwrap();
    let new = fs::read_to_string(host.path("new-plugin")).unwrap();
    let mut n = 1;
    loop {
        // Odd: a list is extended. Even: a list that replaces another file is updated.
        let is_list = n % 2 == 1;
        for name in host.names("conf") {
            fs::remove_file(host.conf(&name)).unwrap();
        }
        fs::write(host.path("bin/egret-cni"), "old").unwrap();
        if is_list {
            host.write("10-flannel.conflist", PLAIN);
        } else {
            host.write("10-net.conf", &changed);
            host.write("10-net-egret.conflist", &before);
        }
        let killed = killed_before(&host, n) | killed_before(&host, n + 1);
        check("bin/egret-cni", &["old", &new], n);
        if is_list {
            check("conf/10-flannel.conflist", &[PLAIN, &host.extended()], n);
        } else {
            check("conf/10-net-egret.conflist", &[&before, &after], n);
            check("conf/10-net.conf", &[&changed], n);
        }
        host.install();
        check("bin/egret-cni", &[&new], n);
        if is_list {
            check("conf/10-flannel.conflist", &[&host.extended()], n);
        } else {
            check("conf/10-net-egret.conflist", &[&after], n);
        }
        assert_eq!((host.names("conf").len(), host.names("bin").len()), (1 + usize::from(!is_list), 1), "{n}");
        if !killed && n > 10 {
            break;
        }
        n += 1;
    }
    assert!(n > 100, "only {n} steps");
}

#[test]
fn a_running_plugin_is_replaced_atomically() {
    let host = Host::new();
    host.write("10-flannel.conflist", PLAIN);
    // Two programs: the real one, and the real one with appended bytes, which ELF ignores.
    let program = fs::read(env!("CARGO_BIN_EXE_egret-cni")).unwrap();
    let longer = [program.as_slice(), &[0; 4096]].concat();
    let is_whole = |path: &Path| [program.len(), longer.len()].contains(&(fs::metadata(path).unwrap().len() as usize));
    fs::write(host.path("new-plugin"), &program).unwrap();
    host.install();
    let plugin = host.path("bin/egret-cni");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let calling: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut calls = 0;
                    while !done.load(Ordering::Relaxed) {
                        let out = Command::new(&plugin).env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output();
                        let out = out.unwrap_or_else(|e| panic!("{e}"));
                        assert!(out.status.success(), "{out:?}");
                        assert!(is_whole(&plugin));
                        calls += 1;
                    }
                    calls
                })
            })
            .collect();
        for i in 0..20 {
            fs::write(host.path("new-plugin"), if i % 2 == 0 { &longer } else { &program }).unwrap();
            host.install();
        }
        done.store(true, Ordering::Relaxed);
        let calls: usize = calling.into_iter().map(|c| c.join().unwrap()).sum();
        assert!(calls > 20, "only {calls} calls");
    });
    assert_eq!(fs::read(&plugin).unwrap(), program);
}
