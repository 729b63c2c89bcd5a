//! Changes during pods' starts: of the runtime, the daemon, the configuration, the plugin. Needs root.

use crate::site::{NODE, Pod, Site};
use lab::VISITOR;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

#[test]
fn the_runtime_is_killed_and_restarted() {
    let site = Site::with_egret();
    let before = site.visitor("before");
    site.assert_left_by_egress("before");
    site.runtime.restart();
    site.runtime.wait_network();
    site.wait_only_by_egress("before");
    let after = site.visitor("after");
    site.assert_left_by_egress("after");
    before.end();
    after.end();
    assert_eq!(site.attachments(), 0);
    site.lab.assert_nothing_leaked();
}

#[test]
fn the_runtime_is_killed_while_pods_start() {
    let site = Site::with_egret();
    let names: Vec<String> = (0..12).map(|n| format!("pod-{n}")).collect();
    thread::scope(|scope| {
        let starts = scope.spawn(|| site.start_at_once(&names, VISITOR));
        thread::sleep(Duration::from_millis(150));
        site.runtime.restart();
        let results = starts.join().expect("a thread");
        assert!(results.iter().any(Result::is_err), "the runtime was killed after all of them");
    });
    // A kubelet lists the sandboxes, and removes those that it does not want.
    for id in site.runtime.cri.list().expect("a list") {
        site.runtime.cri.stop(&id).unwrap_or_else(|e| panic!("{e}"));
        site.runtime.cri.remove(&id).unwrap_or_else(|e| panic!("{e}"));
    }
    let pods: Vec<_> = names.iter().map(|name| site.visitor(&format!("again-{name}"))).collect();
    pods.iter().for_each(|pod| site.assert_left_by_egress(&pod.name));
    pods.into_iter().for_each(Pod::end);
    site.lab.assert_nothing_leaked();
}

#[test]
fn the_daemon_is_killed_again_and_again_while_pods_start() {
    let site = Site::with_egret();
    let over = AtomicBool::new(false);
    let pods: Vec<Pod> = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                site.lab.daemon("n1").restart();
                thread::sleep(Duration::from_millis(400));
            }
        });
        let pods = (0..10).map(|n| site.visitor(&format!("pod-{n}"))).collect();
        over.store(true, Ordering::Relaxed);
        pods
    });
    for pod in &pods {
        site.wait_only_by_egress(&pod.name);
    }
    pods.into_iter().for_each(Pod::end);
    assert_eq!(site.attachments(), 0);
    site.lab.assert_nothing_leaked();
}

/// Another CNI's agent rewrites the configuration while pods start, in place or by rename. A pod that starts between
/// the agent's write and the daemon's has no entry in its list; the daemon adopts it as soon as it sees it.
#[test]
fn the_configuration_is_rewritten_while_pods_start() {
    let mut site = Site::plain();
    let [conf, bin] = [&site.runtime.conf_dir, &site.runtime.bin_dir].map(|d| d.display().to_string());
    site.start_egret();
    // Only this node's daemon maintains its directories.
    site.lab.daemon(NODE).term();
    site.lab.node_arguments = ["--cni-conf-dir".into(), conf, "--cni-bin-dir".into(), bin].into();
    site.lab.start_node(NODE);
    site.lab.wait_ready(NODE);
    let list = site.runtime.conf_dir.join("10-lab.conflist");
    site.lab.wait_until("the entry is there", Duration::from_secs(2), || has_entry(&list));
    site.runtime.wait_network();
    let plain = site.plain_conflist();
    let over = AtomicBool::new(false);
    let pods: Vec<Pod> = thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::Relaxed) || round >= 8 {
                    break;
                }
                if round % 2 == 0 {
                    fs::write(&list, &plain).expect("write");
                } else {
                    let new = list.with_extension("new");
                    fs::write(&new, &plain).expect("write");
                    fs::rename(&new, &list).expect("rename");
                }
                thread::sleep(Duration::from_millis(700));
            }
        });
        let start = |n: usize| site.start_patiently("shop", &format!("pod-{n}"), VISITOR);
        let (pods, errors): (Vec<_>, Vec<_>) = (0..12).map(start).unzip();
        over.store(true, Ordering::Relaxed);
        // Between truncation and write, the agent's file is empty for the runtime. Egret's file never is.
        let errors: Vec<String> = errors.into_iter().flatten().map(|e| e.to_string()).collect();
        assert!(
            errors.iter().all(|e| e.contains("cni config") || e.contains("cni plugin not initialized")),
            "{errors:#?}"
        );
        pods
    });
    for pod in &pods {
        site.wait_only_by_egress(&pod.name);
    }
    site.lab.wait_until("the entry is there", Duration::from_secs(2), || has_entry(&list));
    pods.into_iter().for_each(Pod::end);
    assert_eq!(site.attachments(), 0);
}

fn has_entry(path: &std::path::Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.contains("egret-cni"))
}

/// No `text file busy`, no incomplete program.
#[test]
fn the_plugin_is_replaced_while_pods_start() {
    let site = Site::with_egret();
    let ours = fs::read(env!("CARGO_BIN_EXE_egret-cni")).expect("the plugin");
    let releases = ["one", "another"].map(|name| {
        let path = site.node().directory.join(name);
        // The kernel ignores bytes after the sections of an ELF file.
        fs::write(&path, [&ours[..], name.as_bytes()].concat()).expect("write");
        path.display().to_string()
    });
    let socket = site.node().cni_socket().display().to_string();
    let over = AtomicBool::new(false);
    let mut replaced = 0;
    thread::scope(|scope| {
        let starts = scope.spawn(|| {
            for round in 0..3 {
                let names: Vec<String> = (0..10).map(|n| format!("pod-{round}-{n}")).collect();
                let started = site.start_at_once(&names, VISITOR);
                let pods: Vec<_> = started.into_iter().map(|p| Arc::new(p.unwrap_or_else(|e| panic!("{e}")))).collect();
                names.iter().for_each(|name| site.assert_left_by_egress(name));
                crate::site::end_at_once(pods);
            }
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) && !starts.is_finished() {
            let out = site.runtime.egretd(&["install", "--socket", &socket, "--plugin", &releases[replaced % 2]]);
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            replaced += 1;
        }
    });
    assert!(replaced >= 10, "replaced {replaced} times only");
    assert_eq!(site.attachments(), 0);
    site.lab.assert_nothing_leaked();
}
