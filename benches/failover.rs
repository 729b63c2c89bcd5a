//! Gateways that die and allocations that are moved: how long connections are silent for it; and what it costs a
//! gateway that many nodes ask whether it lives. `cargo bench --bench failover -- moves` measures one of `deaths`,
//! `moves`, `probing`.

mod harness;

use harness::{Bound, Table, cluster, median, ms, probers};
use lab::fault_injection::{self, THOUSAND, holders, label, plugged, thousand_allocations};
use lab::{Flood, Lab, NodeSpec, Pod, Pods, SERVERS, Session, VISITOR};
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

/// How often a gateway dies in each lab.
const DEATHS: usize = 6;
/// How often an allocation is moved on purpose.
const MOVES: usize = 8;
/// Sessions in all; the first of them are busy, sending every 10 ms, the others send every 100 ms.
const SESSIONS: usize = 200;
const IDLE_PACE: Duration = Duration::from_millis(100);
const UDP_PACE: Duration = Duration::from_millis(5);
/// Until everybody has found out and everything has come to rest.
const REST: Duration = Duration::from_millis(2500);

/// What is asked for: silence of a busy session, the gap of UDP, silence with quick probing, what a thousand
/// allocations may take more, silence when an allocation is moved.
const SILENCE: Duration = Duration::from_millis(1500);
const GAP: Duration = Duration::from_millis(1100);
const QUICK: Duration = Duration::from_millis(700);
const MORE: Duration = Duration::from_millis(200);
const MOVED: Duration = Duration::from_millis(50);

/// Nodes that ask, how often in all, and for how long in each round.
const PROBER: usize = 1000;
const INTERVAL: Duration = Duration::from_millis(300);
const ASKED: Duration = Duration::from_secs(6);
const ASKED_ROUNDS: usize = 5;

fn main() {
    harness::begin("Gateways that die, and allocations that are moved");
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    for (name, measure) in [("deaths", deaths as fn()), ("moves", moves), ("probing", probing)] {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            measure();
        }
    }
}

/// A lab with two gateway nodes, and a pod on each node.
struct Scene {
    lab: Lab,
    pods: Vec<Pod>,
    /// Who has all allocations.
    owner: fn(&Lab) -> Vec<String>,
}

impl Scene {
    fn new(lab: Lab, owner: fn(&Lab) -> Vec<String>) -> Scene {
        // Noting every packet would be a part of what is measured.
        lab.host("fab").nft("delete table bridge wire");
        let pods = ["n1", "n2", "g1", "g2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR)).into();
        let scene = Scene { lab, pods, owner };
        for pod in &scene.pods {
            let answered = || SERVERS.iter().all(|server| pod.udp_who(*server).is_ok());
            scene.lab.wait_until(&format!("{} is answered", pod.name), Duration::from_secs(20), answered);
        }
        scene
    }

    fn owner(&self) -> (String, String) {
        let owner = (self.owner)(&self.lab).pop().expect("a node that has all allocations");
        let other = if owner == "g1" { "g2" } else { "g1" };
        (owner, other.to_owned())
    }

    fn on(&self, nodes: &[&str]) -> Vec<&Pod> {
        self.pods.iter().filter(|p| nodes.contains(&p.node.name.as_str())).collect()
    }

    fn wait_owner(&self, node: &str) {
        self.lab.wait_for("all allocations are on", &vec![node.to_owned()], || (self.owner)(&self.lab));
    }
}

fn has_thousand(lab: &Lab) -> Vec<String> {
    let all = ["g1", "g2"].into_iter().filter(|node| fault_injection::held(lab, node) == THOUSAND);
    all.map(str::to_owned).collect()
}

/// Traffic of some pods.
struct Traffic<'a> {
    lab: &'a Lab,
    groups: Vec<Group>,
    /// How many connections the server had before.
    connections_before: usize,
}

#[derive(Default)]
struct Group {
    busy: Vec<Session>,
    idle: Vec<Session>,
    floods: Vec<Flood>,
}

/// How it went.
#[derive(Default)]
struct Failover {
    /// Of each busy session.
    silences: Vec<Duration>,
    /// Of each UDP flow.
    gaps: Vec<Duration>,
    sessions: usize,
    lost: usize,
    /// Sessions whose port another one from the same address has or had lately, so that one of the two was given
    /// another port. Which one, a node that picks them up in mid-stream cannot know.
    colliding: usize,
    colliding_lost: usize,
    packets_sent: u64,
    packets_lost: u64,
}

impl Traffic<'_> {
    /// Of groups of pods. Each pod has two sessions and two UDP flows, by IPv4 and IPv6; the sessions beyond, up to so
    /// many a group, are not busy.
    fn start<'a>(lab: &'a Lab, groups: &[Vec<&Pod>], sessions: usize) -> Traffic<'a> {
        let connections_before = lab.server("ext").lock().expect("a lock").connections().len();
        let start = |pods: &Vec<&Pod>| {
            let ends: Vec<_> = pods.iter().flat_map(|pod| SERVERS.map(|server| (*pod, server))).collect();
            let busy: Vec<Session> = ends.iter().map(|(pod, s)| pod.session(*s).expect("a session")).collect();
            let others = ends.iter().cycle().take(sessions.saturating_sub(busy.len()));
            let idle = others.map(|(pod, s)| pod.session_at_pace(*s, IDLE_PACE).expect("a session")).collect();
            let floods = ends.iter().map(|(pod, s)| pod.flood(*s, UDP_PACE, false)).collect();
            Group { busy, idle, floods }
        };
        let groups = groups.iter().map(start).collect();
        thread::sleep(Duration::from_millis(500));
        Traffic { lab, groups, connections_before }
    }

    fn stop(self, outcomes: &mut [&mut Failover]) {
        let server = self.lab.server("ext").lock().expect("a lock").connections();
        let seen: Vec<_> = server[self.connections_before..].iter().map(end).collect();
        let mut reports = Vec::new();
        for (at, group) in self.groups.into_iter().enumerate() {
            reports.extend(group.busy.into_iter().map(|session| (at, true, session.stop())));
            reports.extend(group.idle.into_iter().map(|session| (at, false, session.stop())));
            for flood in group.floods {
                let report = flood.stop();
                outcomes[at].gaps.push(report.longest_gap);
                outcomes[at].packets_sent += report.sent;
                outcomes[at].packets_lost += report.unanswered();
            }
        }
        for (at, busy, report) in &reports {
            let own = end(&report.local);
            let alone = reports.iter().filter(|(_, _, other)| end(&other.local) == own).count() == 1;
            let (lost, colliding) = (report.broken.is_some(), !alone || !seen.contains(&own));
            let outcome = &mut outcomes[*at];
            if *busy {
                outcome.silences.push(report.longest_silence);
            }
            outcome.sessions += 1;
            outcome.lost += usize::from(lost);
            outcome.colliding += usize::from(colliding);
            outcome.colliding_lost += usize::from(lost && colliding);
        }
    }
}

/// What tells sessions with one server apart that leave from one address.
fn end(address: &SocketAddr) -> (bool, u16) {
    (address.is_ipv4(), address.port())
}

fn longest(times: &[Duration]) -> Duration {
    times.iter().copied().max().expect("something was measured")
}

fn of(time: Duration, bound: Duration) -> f64 {
    time.as_secs_f64() / bound.as_secs_f64()
}

/// Two rows: the median, which has a bound, and the longest.
fn row(table: &mut Table, what: &str, times: &[Duration], allowed: Duration, bound: Bound) {
    let (middle, most) = (median(times), longest(times));
    table.row(&format!("{what}, median"), ms(middle), of(middle, allowed), bound);
    table.row(&format!("{what}, longest"), ms(most), of(most, allowed), Bound::None);
}

/// A row of what shall be lost nowhere.
fn lost_row(table: &mut Table, what: &str, outcome: &Failover) {
    let mut row = |what: &str, lost: usize, of: usize, bound| {
        table.row(what, format!("{lost} of {of}"), lost as f64 / of.max(1) as f64, bound);
    };
    let Failover { sessions, lost, colliding, colliding_lost, .. } = *outcome;
    row(what, lost - colliding_lost, sessions - colliding, Bound::AtMost(0.0));
    row("those whose ports collide", colliding_lost, colliding, Bound::None);
}

fn deaths() {
    let one = Scene::new(Lab::scene(), holders);
    let quick = Scene::new(Lab::builder().node_arguments(&["--probe-interval", "100ms"]).scene(), holders);
    let thousand = Scene::new(thousand_allocations(), has_thousand);
    let [mut bare, mut by_default, mut quickly, mut many] = [const { Vec::new() }; 4].map(Failover::with);
    for _ in 0..DEATHS {
        nothing(&one, &mut bare);
        death(&one, SESSIONS, &mut by_default);
        death(&quick, 0, &mut quickly);
        death(&thousand, 0, &mut many);
    }
    println!("A gateway's link goes down; sessions and UDP flows from pods on three nodes, IPv4 and IPv6:\n");
    let mut table = Table::default();
    row(&mut table, "a busy session's silence, nothing happens", &bare.silences, SILENCE, Bound::None);
    row(&mut table, "a gateway dies, default settings", &by_default.silences, SILENCE, Bound::AtMost(1.0));
    row(&mut table, "the same, gap of UDP", &by_default.gaps, GAP, Bound::AtMost(1.0));
    lost_row(&mut table, "the same, sessions lost", &by_default);
    row(&mut table, "a gateway dies, asked every 100 ms", &quickly.silences, QUICK, Bound::AtMost(1.0));
    row(&mut table, "the same, gap of UDP", &quickly.gaps, GAP, Bound::None);
    row(&mut table, "a gateway with 1,000 allocations dies", &many.silences, SILENCE, Bound::None);
    let more = |many: &[Duration], one: &[Duration]| median(many).saturating_sub(median(one));
    let silence = more(&many.silences, &by_default.silences);
    table.row("1,000 allocations, silence beyond one's", ms(silence), of(silence, MORE), Bound::AtMost(1.0));
    let gap = more(&many.gaps, &by_default.gaps);
    table.row("1,000 allocations, gap of UDP beyond one's", ms(gap), of(gap, MORE), Bound::AtMost(1.0));
    lost_row(&mut table, "1,000 allocations, sessions lost", &many);
    table.print(["", "time", "of what is allowed"]);
}

impl Failover {
    fn with(silences: Vec<Duration>) -> Failover {
        Failover { silences, ..Failover::default() }
    }
}

/// As long as a death takes, and nothing happens.
fn nothing(scene: &Scene, outcome: &mut Failover) {
    let traffic = Traffic::start(&scene.lab, &[scene.on(&["n1", "n2", "g1"])], SESSIONS);
    thread::sleep(REST);
    traffic.stop(&mut [outcome]);
}

/// The owner's link goes down, and comes back when all is over.
fn death(scene: &Scene, sessions: usize, outcome: &mut Failover) {
    let (owner, other) = scene.owner();
    let traffic = Traffic::start(&scene.lab, &[scene.on(&["n1", "n2", &other])], sessions);
    plugged(&scene.lab, &owner, false);
    // The dead node still has them; what counts is when the other one does.
    scene.lab.wait_until("the other one has all allocations", Duration::from_secs(20), || {
        (scene.owner)(&scene.lab).contains(&other)
    });
    thread::sleep(REST);
    traffic.stop(&mut [outcome]);
    plugged(&scene.lab, &owner, true);
    scene.wait_owner(&other);
    thread::sleep(REST);
}

fn moves() {
    let scene = Scene::new(Lab::scene(), holders);
    let [mut elsewhere, mut here, mut bare] = [const { Vec::new() }; 3].map(Failover::with);
    for _ in 0..MOVES {
        nothing(&scene, &mut bare);
        let (owner, other) = scene.owner();
        let groups = [["n1", "n2"], ["g1", "g2"]].map(|nodes| scene.on(&nodes));
        let traffic = Traffic::start(&scene.lab, &groups, SESSIONS / 2);
        label(&scene.lab, &owner, &[("egret.dev/drain", "true")]);
        scene.wait_owner(&other);
        thread::sleep(REST);
        traffic.stop(&mut [&mut elsewhere, &mut here]);
        label(&scene.lab, &owner, &[]);
        // Who was drained counts as dead until it answers again.
        thread::sleep(REST);
    }
    println!("An allocation is moved on purpose:\n");
    let mut table = Table::default();
    row(&mut table, "a busy session's silence, nothing happens", &bare.silences, MOVED, Bound::None);
    for (whose, outcome) in [("pods on other nodes", &elsewhere), ("pods on the two gateway nodes", &here)] {
        row(&mut table, &format!("{whose}, silence"), &outcome.silences, MOVED, Bound::AtMost(1.0));
        let packets = format!("{} of {}", outcome.packets_lost, outcome.packets_sent);
        let share = outcome.packets_lost as f64 / outcome.packets_sent as f64;
        table.row(&format!("{whose}, UDP packets lost"), packets, share, Bound::None);
        lost_row(&mut table, &format!("{whose}, sessions lost"), outcome);
    }
    table.print(["", "time", "of what is allowed"]);
}

fn probing() {
    let lab = Lab::builder()
        .nodes(vec![NodeSpec::gateway("g1", 21, Pods::Routed), NodeSpec::new("sink", 31, Pods::Routed)])
        .build();
    lab.host("fab").nft("delete table bridge wire");
    let directory = lab.manifests().path();
    cluster::write_nodes(directory, PROBER);
    cluster::write_policies(&lab, 1);
    cluster::write_gateway(directory, 1, &["g1"]);
    let asker = probers::Asker::new(&lab, "g1", "sink", PROBER);
    let daemon = lab.start_node("g1");
    lab.wait_ready("g1");
    lab.wait_until("the gateway answers everybody", Duration::from_secs(20), || {
        let asked = asker.ask(true, INTERVAL, INTERVAL);
        asker.answers() == asked.probes
    });
    let schedstat = format!("/proc/{}/schedstat", daemon.pid().expect("it runs"));
    let of_daemon = || probers::run_time(schedstat.as_ref());
    let (mut kernel, mut idle, mut asked) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ASKED_ROUNDS {
        let before = of_daemon();
        let sink = asker.ask(false, INTERVAL, ASKED);
        let between = of_daemon();
        let gateway = asker.ask(true, INTERVAL, ASKED);
        assert_eq!(asker.answers(), gateway.probes, "all were answered");
        kernel.push(of(gateway.processor_time.saturating_sub(sink.processor_time), ASKED));
        idle.push(of(between - before, ASKED));
        asked.push(of(of_daemon() - between, ASKED));
    }
    println!("A gateway is asked by {PROBER} nodes, each every {INTERVAL:?}:\n");
    let mut table = Table::default();
    let mut row = |what: &str, shares: &[f64]| {
        let share = median(shares);
        table.row(what, format!("{:.3} %", share * 100.0), share, Bound::None);
    };
    row("the daemon, while nobody asks", &idle);
    row("the daemon, while all ask", &asked);
    row("the kernel, beyond what the same packets cost a host that drops them", &kernel);
    table.print(["", "of one core", "of one core"]);
}
