//! Everything that a lab makes carries its name, `egt-<pid>-<n>`: namespaces `egt-<pid>-<n>-…`, the directory
//! `egt-<pid>-<n>`, the environment of what a container runtime starts, and its control groups. So a lab finds all of
//! its own at its end, and the next run all of a run that was killed.

use super::host::output;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, thread};

const PREFIX: &str = "egt-";

/// The variable that holds the lab's name in the environment of container runtimes and of all that they start.
pub const VARIABLE: &str = "EGT_LAB";

/// Removes what labs left behind whose test process is no more.
pub fn sweep() {
    let mut labs: Vec<String> = names_in(Path::new("/run/netns")).chain(names_in(&env::temp_dir())).collect();
    labs.retain_mut(|name| {
        let mut parts = name.splitn(4, '-');
        let (Some(_), Some(pid), Some(n)) = (parts.next(), parts.next(), parts.next()) else { return false };
        let (Ok(pid), true) = (pid.parse::<u32>(), n.parse::<u32>().is_ok()) else { return false };
        *name = format!("{PREFIX}{pid}-{n}");
        !Path::new(&format!("/proc/{pid}")).exists()
    });
    labs.sort();
    labs.dedup();
    for lab in labs {
        eprintln!("lab: removing {lab}, left by a run that was killed");
        remove(&lab);
    }
}

/// Ends the processes in a lab's namespaces, removes the namespaces and the directory. What is gone already is fine:
/// two runs may sweep at once.
pub fn remove(lab: &str) {
    let namespaces: Vec<String> =
        names_in(Path::new("/run/netns")).filter(|n| n.starts_with(&format!("{lab}-"))).collect();
    let inodes: Vec<u64> =
        namespaces.iter().filter_map(|n| Some(fs::metadata(format!("/run/netns/{n}")).ok()?.ino())).collect();
    for pid in processes_in(&inodes) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    end_containers(lab);
    if !namespaces.is_empty() {
        let lines: String = namespaces.iter().map(|n| format!("netns del {n}\n")).collect();
        let said = output(&["ip", "-force", "-batch", "-"], Some(&lines));
        if namespaces.iter().any(|n| Path::new(&format!("/run/netns/{n}")).exists()) {
            eprintln!("lab: {lab} is not wholly removed: {}", String::from_utf8_lossy(&said.stderr));
        }
    }
    let _ = fs::remove_dir_all(env::temp_dir().join(lab));
}

/// Ends what the lab's container runtimes have started: it is in namespaces of its own, and outlives the runtime.
pub fn end_containers(lab: &str) {
    let variable = format!("{VARIABLE}={lab}");
    // A shim may just be starting something.
    for _ in 0..100 {
        let pids = processes_with(&variable);
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _ = kill(pid, Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
    for cgroup in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).map(|h| h.join(lab)) {
        remove_cgroup(&cgroup);
    }
}

/// A control group is removed as a directory without its files, after the groups in it.
fn remove_cgroup(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// Names of labs' things in a directory.
fn names_in(directory: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n.starts_with(PREFIX))
}

/// Processes, other than this one, whose main thread is in one of the network namespaces.
fn processes_in(inodes: &[u64]) -> Vec<Pid> {
    let is_inside = |pid: &u32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| inodes.contains(&m.ino()));
    others().filter(is_inside).map(|pid| Pid::from_raw(pid.cast_signed())).collect()
}

/// Processes, other than this one, that were started with this variable. One that has ended has no environment.
fn processes_with(variable: &str) -> Vec<Pid> {
    let has = |pid: &u32| {
        fs::read(format!("/proc/{pid}/environ")).is_ok_and(|e| e.split(|b| *b == 0).any(|v| v == variable.as_bytes()))
    };
    others().filter(has).map(|pid| Pid::from_raw(pid.cast_signed())).collect()
}

fn others() -> impl Iterator<Item = u32> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok()).filter(move |pid| *pid != own)
}
