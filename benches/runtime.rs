//! Pods' starts by a real container runtime, as a kubelet feels them: how long RunPodSandbox takes with the chain of
//! plugins as the cluster's CNI wrote it, and with Egret's entry in it; and how long a daemon takes to be ready on a
//! node where `egretd install` has just run.

mod harness;
// The parts of the tests with containerd, as they are.
#[path = "../tests/containerd/cri.rs"]
#[allow(dead_code, reason = "sandboxes without containers are started and ended")]
mod cri;
#[path = "../tests/containerd/image.rs"]
#[allow(dead_code, reason = "pods' image is all that is used of it")]
mod image;
#[path = "../tests/containerd/messages.rs"]
#[allow(dead_code, reason = "as of cri")]
mod messages;
#[path = "../tests/containerd/runtime.rs"]
#[allow(dead_code, reason = "nothing is killed here")]
mod runtime;
#[path = "../tests/containerd/site.rs"]
#[allow(dead_code, reason = "nothing is proven here")]
mod site;
#[path = "../tests/containerd/visitor.rs"]
#[allow(dead_code, reason = "nobody listens")]
mod visitor;

use harness::{Bound, Table, median, ms};
use lab::VISITOR;
use serde_json::Value;
use site::{Pod, Site};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So many pods in a row, and as many at once.
const PODS: usize = 50;
/// Pods in a row are started by turns with and without the entry, so many at a time.
const TURN: usize = 10;
/// How often as many are started at once, each way.
const ROUNDS: usize = 8;
/// How often a daemon is started.
const STARTS: usize = 9;
/// What a daemon may take to be ready.
const READY: Duration = Duration::from_secs(3);
/// After a change of the list the runtime reads it again within this time.
const READ_AGAIN: Duration = Duration::from_millis(500);

fn main() {
    if visitor::is_in_a_pod() {
        visitor::run();
    }
    harness::begin(&format!("A pod's start by containerd: RunPodSandbox, {PODS} pods that a policy selects"));
    let site = Site::with_egret();
    let mut table = Table::default();

    // Once each way before anything is counted.
    let mut row = [Vec::new(), Vec::new()];
    for entry in [false, true] {
        in_a_row(&site, entry, 2);
    }
    for turn in 0..PODS / TURN {
        for entry in [turn % 2 == 1, turn % 2 == 0] {
            row[usize::from(entry)].extend(in_a_row(&site, entry, TURN));
        }
    }
    share(&mut table, &format!("{PODS} in a row"), &row);
    let mut together = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        // Each way comes first as often as the other: what one leaves behind, the next one feels.
        for entry in [round % 2 == 1, round % 2 == 0] {
            together[usize::from(entry)].extend(at_once(&site, entry));
        }
    }
    share(&mut table, &format!("{PODS} at once"), &together);
    table.print(["", "median", "Egret's share"]);

    let times: Vec<Duration> = (0..STARTS).map(|_| until_ready(&site)).collect();
    let mut table = Table::default();
    let time = median(&times);
    let longest = times.iter().max().copied().unwrap_or_default();
    let part = |time: Duration| time.as_secs_f64() / READY.as_secs_f64();
    table.row("a daemon's start until it is ready, median", ms(time), part(time), Bound::None);
    table.row("the longest", ms(longest), part(longest), Bound::AtMost(1.0));
    table.print(["", "time", "of 3 s"]);
}

/// The rows of a pair of medians, without and with the entry.
fn share(table: &mut Table, what: &str, [without, with]: &[Vec<Duration>; 2]) {
    let (without, with) = (median(without), median(with));
    let share = 1.0 - without.as_secs_f64() / with.as_secs_f64();
    table.row(&format!("{what}, without the entry"), ms(without), 0.0, Bound::None);
    table.row(&format!("{what}, with it"), ms(with), share, Bound::AtMost(0.05));
}

/// Lets the runtime have the list with or without the entry. The pods have IPv4 alone: for IPv6 the plugin `ptp` waits
/// more than a second for duplicate address detection, beside which everything else would be nothing.
fn configure(site: &Site, entry: bool) {
    let mut list = site.lab.plain_conflist(site::NODE).json;
    let ipam = &mut list["plugins"][0]["ipam"];
    for (field, value) in [("ranges", "/0/0/subnet"), ("routes", "/0/dst")] {
        let first = ipam[field][0].clone();
        ipam[field] = Value::Array(vec![first]);
        let text = ipam[field].pointer(value).and_then(Value::as_str);
        assert!(text.is_some_and(|t| t.contains('.')), "{field} is not IPv4: {ipam}");
    }
    site.runtime.configure(&list.to_string());
    if entry {
        site.runtime.install();
    }
    std::thread::sleep(READ_AGAIN);
    site.runtime.wait_network();
}

fn in_a_row(site: &Site, entry: bool, count: usize) -> Vec<Duration> {
    configure(site, entry);
    let names: Vec<String> = (0..count).map(|n| format!("pod-{n}")).collect();
    let start = |name: &String| timed(site, name);
    let (times, pods): (Vec<Duration>, Vec<Pod>) = names.iter().map(start).unzip();
    end(site, entry, pods);
    times
}

fn at_once(site: &Site, entry: bool) -> Vec<Duration> {
    configure(site, entry);
    let names: Vec<String> = (0..PODS).map(|n| format!("pod-{n}")).collect();
    let (times, pods): (Vec<Duration>, Vec<Pod>) = std::thread::scope(|scope| {
        let threads: Vec<_> = names.iter().map(|name| scope.spawn(move || timed(site, name))).collect();
        threads.into_iter().map(|t| t.join().expect("a thread")).unzip()
    });
    end(site, entry, pods);
    times
}

/// Starts a pod; only the runtime's part is timed.
fn timed(site: &Site, name: &str) -> (Duration, Pod) {
    let mut pod = site.planned("shop", name, VISITOR);
    let begin = Instant::now();
    pod.id = site.run(&pod, 0).unwrap_or_else(|e| panic!("{name}: {e}"));
    (begin.elapsed(), pod)
}

/// Makes sure that it was what it should have been, and ends the pods.
fn end(site: &Site, entry: bool, pods: Vec<Pod>) {
    assert_eq!(site.attachments(), if entry { pods.len() } else { 0 }, "pods that Egret holds");
    site::end_at_once(pods.into_iter().map(Arc::new).collect());
}

/// From the daemon's start until it says that it is ready, where everything of an earlier one's has been removed, and
/// the entry was installed.
fn until_ready(site: &Site) -> Duration {
    let daemon = site.lab.daemon(site::NODE);
    daemon.term();
    let run_dir = site.node().run_dir().display().to_string();
    let state_dir = site.node().state_dir().display().to_string();
    let out = site.runtime.egretd(&["uninstall", "--state-dir", &state_dir, "--run-dir", &run_dir]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    site.runtime.install();
    let begin = Instant::now();
    daemon.restart();
    while !site.lab.ready(site::NODE) {
        assert!(begin.elapsed() < 10 * READY, "the daemon does not become ready");
        std::thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}
