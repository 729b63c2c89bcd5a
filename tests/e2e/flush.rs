//! `nft flush ruleset` is the first line of most hosts' /etc/nftables.conf, and so part of every restart of
//! nftables.service. These tests need Linux 6.9, on which other programs cannot flush Egret's tables.
//! `--own-tables=false` simulates older kernels. Needs root.

use lab::fault_injection::owner_and_other;
use lab::host::Host;
use lab::kernel::difference;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::survival::{assert_live, sessions};
use lab::{EGRESS4, Flood, Lab, Node, Pod, SERVERS, Server, VISITOR, topology};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long other programs flush.
const SO_LONG: Duration = Duration::from_secs(15);

/// Flushes on a host again and again until it is dropped.
struct Flushing(Child);

impl Flushing {
    fn on(host: &Host) -> Flushing {
        let mut command = Command::new("sh");
        command.args(["-c", "while nft flush ruleset; do sleep 0.05; done"]).stdin(Stdio::null());
        Flushing(host.spawn(&mut command).expect("a shell"))
    }

    fn goes_on(&mut self) -> bool {
        self.0.try_wait().expect("wait for a child").is_none()
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// UDP packets of old and new connections, IPv4 and IPv6, from each pod.
fn floods(pods: &[Pod]) -> Vec<Flood> {
    let pace = Duration::from_millis(10);
    let of_pod = |pod: &Pod| SERVERS.map(|server| [false, true].map(|fresh| pod.flood(server, pace, fresh)));
    pods.iter().flat_map(of_pod).flatten().collect()
}

#[track_caller]
fn assert_lost_nothing(floods: Vec<Flood>) {
    for flood in floods {
        let report = flood.stop();
        assert!(report.sent > 20 && report.lost() == 0, "{report:?}");
    }
}

/// Flushes on all nodes under traffic. A packet from any address but the egress IPs is a leak. The first flush
/// removes the lab's masquerade.
fn assert_flushes_open_nothing(lab: &Lab, pods: &[Pod]) {
    let floods = floods(pods);
    let mut flushing: Vec<Flushing> = lab.nodes().iter().map(|node| Flushing::on(node)).collect();
    thread::sleep(SO_LONG);
    assert!(flushing.iter_mut().all(Flushing::goes_on), "nft has failed");
    drop(flushing);
    lab.assert_nothing_leaked();
    let sent: u64 = floods.into_iter().map(|flood| flood.stop().sent).sum();
    assert!(sent > 1000, "only {sent} packets were sent");
}

/// The tables' flags as `nft` shows them. Version 1.0.6 has no name for the persist flag.
fn flags(node: &Node) -> Vec<String> {
    let text = node.run(["nft", "list", "table", "inet", "egret"]);
    text.lines().take(3).filter_map(|line| line.trim().strip_prefix("flags ")).map(str::to_owned).collect()
}

#[test]
fn a_flush_by_another_program_interrupts_nothing_and_opens_nothing() {
    let lab = Lab::scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let (going_on, floods) = (sessions(&pods), floods(&pods));
    let mut flushing: Vec<Flushing> = lab.nodes().iter().map(|node| Flushing::on(node)).collect();
    let begin = Instant::now();
    while begin.elapsed() < SO_LONG {
        thread::sleep(Duration::from_secs(2));
        // New pods are enforced as before.
        let late = lab.add_pod("n1", "shop", "late", VISITOR);
        assert_leaves_by_egress(&late);
        late.delete();
    }
    assert!(flushing.iter_mut().all(Flushing::goes_on), "nft has failed");
    drop(flushing);
    assert!(!lab.node("n1").run(["nft", "list", "tables"]).contains("nat"), "nothing was flushed");
    assert_lost_nothing(floods);
    assert_live("under flushes", going_on);
    lab.assert_nothing_leaked();
}

/// While the daemon is away, its tables have no owner. They stay, and the next daemon adopts them first of all.
#[test]
fn a_daemon_that_is_killed_leaves_its_tables_to_the_next_one() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pods = ["n1", "n2", &owner].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let (going_on, floods) = (sessions(&pods), floods(&pods));
    let handles = |node: &Node| {
        let text = node.run(["nft", "-a", "list", "table", "inet", "egret"]);
        text.lines()
            .filter(|l| l.contains(" # handle ") && !l.starts_with("table"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for name in ["n1", "n2", &owner] {
        let node = lab.node(name);
        let before = handles(node);
        lab.daemon(name).kill9();
        assert_eq!(difference(&before, &handles(node)), "", "{name}: its tables go with the daemon");
        thread::sleep(Duration::from_millis(300));
        lab.daemon(name).restart();
        lab.wait_ready(name);
        node.run(["nft", "flush", "ruleset"]);
        assert_eq!(difference(&before, &handles(node)), "", "{name}: they were made anew");
        topology::masquerade(node);
    }
    assert_lost_nothing(floods);
    assert_live("with other daemons", going_on);
    lab.assert_nothing_leaked();
}

/// Tables of a daemon that owned none: an older one, or one with `--own-tables=false`.
#[test]
fn tables_without_an_owner_get_one_under_traffic() {
    let mut lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    let (going_on, floods) = (sessions(&pods), floods(&pods));
    lab.node_arguments.clear();
    for name in ["n1", "n2", "g1", "g2"] {
        assert_eq!(flags(lab.node(name)), [""; 0], "{name}");
        lab.daemon(name).kill9();
        lab.start_node(name);
        lab.wait_ready(name);
        assert!(flags(lab.node(name)).concat().contains("owner"), "{name}: {:?}", flags(lab.node(name)));
    }
    for flood in floods {
        // A new chain with the policy drop has no rules until the transaction is committed.
        let report = flood.stop();
        assert!(report.sent > 20 && report.lost() <= 2, "{report:?}");
    }
    assert_live("while tables are made anew", going_on);
    lab.assert_nothing_leaked();
}

#[test]
fn everybody_can_list_the_tables_and_nobody_can_change_them() {
    let lab = Lab::scene();
    let node = lab.node("n1");
    assert!(node.run(["nft", "list", "ruleset"]).contains("chain egress-guard"));
    assert!(node.run(["nft", "-j", "list", "ruleset"]).contains("\"egress-guard\""));
    for command in
        ["nft flush chain inet egret prerouting", "nft delete table inet egret", "nft flush table netdev egret"]
    {
        let refused = node.try_run(command.split(' '));
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains("not permitted"), "{command}: {text}");
    }
}

/// As on kernels before Linux 6.9, where other programs can flush the tables: selected pods' packets wait until the
/// daemon has restored them, on the pod's node and on the owner.
#[test]
fn a_flush_of_tables_without_an_owner_opens_nothing_while_a_daemon_runs() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    pods.iter().for_each(assert_leaves_by_egress);
    assert_flushes_open_nothing(&lab, &pods);
    for pod in &pods {
        lab.wait_seen_as(pod, EGRESS4);
    }
    pods.iter().for_each(assert_leaves_by_egress);
}

/// A daemon that runs and cannot restore the tables still blocks its pods; their traffic inside the cluster
/// continues.
#[test]
fn pods_stay_enforced_when_the_tables_of_a_hanging_daemon_are_flushed() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let (owner, _) = owner_and_other(&lab);
    let inside = lab.add_pod("n2", "office", "inside", &[]);
    let _server = Server::start(&inside);
    for name in ["n1", "n2", &owner] {
        let (node, daemon) = (lab.node(name), lab.daemon(name));
        let pod = lab.add_pod(name, "shop", &format!("visitor-{name}"), VISITOR);
        let other = lab.add_pod(name, "office", &format!("other-{name}"), &[]);
        assert_leaves_by_egress(&pod);
        lab.forget_wire();
        daemon.suspend(true);
        node.run(["nft", "flush", "ruleset"]);
        topology::masquerade(node);
        assert_blocked(&pod);
        lab.assert_nothing_arrives();
        assert_eq!(pod.who(inside.ipv4()).ok(), Some(pod.ipv4().into()), "{name}");
        assert_eq!(pod.who(inside.ipv6()).ok(), Some(pod.ipv6().into()), "{name}");
        assert_leaves_by_node(&other);
        daemon.suspend(false);
        lab.wait_seen_as(&pod, EGRESS4);
        pod.delete();
    }
}
