//! The programs and maps of a daemon, looked at and broken from outside by `bpftool`.

use super::{going_fast, wait_fast};
use lab::scene::assert_leaves_by_egress;
use lab::{Daemon, EGRESS4, EXT4, Lab, VISITOR};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// What a daemon holds, by the kernel's ids.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) maps: BTreeSet<u32>,
    pub(super) programs: BTreeSet<u32>,
    pub(super) links: BTreeSet<u32>,
}

/// Reads them from /proc/PID/fdinfo, proc(5).
pub(super) fn of(daemon: &Daemon) -> Objects {
    let mut objects = Objects::default();
    let directory = format!("/proc/{}/fdinfo", daemon.pid().expect("it runs"));
    for entry in fs::read_dir(directory).expect("/proc").flatten() {
        for line in fs::read_to_string(entry.path()).unwrap_or_default().lines() {
            let Some((name, id)) = line.split_once(":\t") else { continue };
            let into = match name {
                "map_id" => &mut objects.maps,
                "prog_id" => &mut objects.programs,
                "link_id" => &mut objects.links,
                _ => continue,
            };
            into.extend(id.trim().parse::<u32>());
        }
    }
    // Maps that only programs hold.
    for id in &objects.programs {
        let shown = bpftool(&["-j", "prog", "show", "id", &id.to_string()]).unwrap_or_default();
        let shown: Value = serde_json::from_str(&shown).unwrap_or_default();
        let maps = shown["map_ids"].as_array().into_iter().flatten();
        objects.maps.extend(maps.filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    }
    objects
}

fn bpftool(arguments: &[&str]) -> Option<String> {
    let output = Command::new("bpftool").args(arguments).output().expect("bpftool; tests/setup.sh installs it");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether the kernel still has one of these programs.
pub(super) fn any_is_loaded(programs: &BTreeSet<u32>) -> bool {
    programs.iter().any(|id| bpftool(&["prog", "show", "id", &id.to_string()]).is_some())
}

/// Deletes all elements of a map, or sets those to zero that cannot be deleted. Returns the map's name; `None` if there is
/// nothing to delete: what only counts packets, or is constant.
fn emptied(id: u32) -> Option<String> {
    let id = id.to_string();
    let shown: Value = serde_json::from_str(&bpftool(&["-j", "map", "show", "id", &id])?).ok()?;
    let (name, kind) = (shown["name"].as_str()?.to_owned(), shown["type"].as_str()?.to_owned());
    if kind == "array" {
        let zero = vec!["0"; shown["bytes_value"].as_u64()? as usize];
        let key = [&["map", "update", "id", &*id, "key", "0", "0", "0", "0", "value"][..], &zero].concat();
        return (shown["max_entries"] == 1 && bpftool(&key).is_some()).then_some(name);
    }
    let elements: Value = serde_json::from_str(&bpftool(&["-j", "map", "dump", "id", &id])?).ok()?;
    for element in elements.as_array()? {
        let key = element["key"].as_array()?.iter().filter_map(Value::as_str);
        let key: Vec<&str> =
            ["map", "delete", "id", &id, "key", "hex"].into_iter().chain(key.map(|b| &b[2..])).collect();
        // A lease may have gone by itself.
        let _ = bpftool(&key);
    }
    Some(name)
}

#[test]
fn each_map_emptied_and_each_program_detached_is_slower_and_never_different() {
    let (lab, pod, session, flood, owner) = going_fast(&[]);
    for node in ["n1", &owner] {
        let objects = of(&lab.daemon(node));
        assert_eq!(objects.programs.len(), 6, "{node}: {objects:?}");
        // The tunnel device, and a pod or an uplink: two programs each.
        assert!(objects.links.len() >= 4, "{node}: {objects:?}");
        lab.forget_wire();
        let mut names = BTreeSet::new();
        for map in objects.maps {
            let Some(name) = emptied(map) else { continue };
            thread::sleep(Duration::from_millis(300));
            assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "{name} of {node} emptied");
            names.insert(name);
        }
        for expected in [
            "leases4",
            "leases6",
            "peers",
            "nodes",
            "slow_ids",
            "slow_ips",
            "counts",
            "copies",
            "pendings",
            "fast_pat.bss",
        ] {
            assert!(names.contains(expected), "{node}: {expected} of {names:?}");
        }
        for link in objects.links {
            assert!(bpftool(&["link", "detach", "id", &link.to_string()]).is_some(), "link {link} of {node}");
            thread::sleep(Duration::from_millis(300));
            assert_eq!(lab.sources(EXT4), [EGRESS4.into()].into(), "link {link} of {node} detached");
        }
        // The daemon puts all of it back, at last when it looks.
        wait_fast(&lab, &[node]);
    }
    let report = session.stop();
    assert!(report.broken.is_none() && report.longest_silence < Duration::from_millis(900), "{report:?}");
    let report = flood.stop();
    assert_eq!(report.lost(), 0, "{report:?}");
    assert_leaves_by_egress(&pod);
}

/// Without the flag there is nothing of it.
#[test]
fn by_default_no_program_is_loaded() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    pod.bulk(EXT4, 2_000_000).expect("bulk");
    for node in lab.nodes() {
        let objects = of(&lab.daemon(&node.name));
        assert!(objects.programs.is_empty() && objects.maps.is_empty() && objects.links.is_empty(), "{objects:?}");
        assert_eq!(super::fast_packets(&lab, &node.name), 0.0, "{}", node.name);
    }
    assert_leaves_by_egress(&pod);
}
