//! Runs a sequence, and says what was not as promised.

use super::capture::Seen;
use super::cluster::Cluster;
use super::model::{Allowed, SERVERS};
use super::step::{DAEMONS, NODES, Step};
use super::timeline::{HEARD, Life, Timeline};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use std::{fs, io};

/// So long after everything is healed, pods may still wait for their answers: a dead gateway is tried again, a runtime
/// repeats ADD, and the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(40);

/// What was not as promised.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which promise; a shrunk sequence must break the same one.
    pub kind: &'static str,
    /// The details.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.text)
    }
}

/// What a run was.
pub struct RunResult {
    /// What was wrong; empty: nothing.
    pub faults: Vec<Fault>,
    /// How many packets were looked at.
    pub packets: usize,
    /// How many of them could only be seen as one of the egress IPs.
    pub held: usize,
    /// Where the logs of a run with faults are.
    pub logs: Option<PathBuf>,
}

/// Runs a sequence on a cluster of its own.
pub fn run(steps: &[Step]) -> RunResult {
    catch_unwind(AssertUnwindSafe(|| run_inside(steps))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default();
        RunResult { faults: vec![Fault { kind: "the fuzzer itself failed", text }], packets: 0, held: 0, logs: None }
    })
}

fn run_inside(steps: &[Step]) -> RunResult {
    let mut cluster = Cluster::start(!steps.contains(&Step::Unowned));
    let mut said = Vec::new();
    for step in steps {
        said.push(format!("{:.3} {step}\n", cluster.now().as_secs_f64()));
        cluster.apply(*step);
    }
    said.push(format!("{:.3} heal\n", cluster.now().as_secs_f64()));
    let mut faults = ended_daemons(&cluster);
    cluster.heal();
    faults.extend(unanswered(&mut cluster));
    let quiet = (cluster.timeline.last_change() + HEARD + Duration::from_secs(1)).saturating_sub(cluster.now());
    thread::sleep(quiet);
    faults.extend(ended_daemons(&cluster));
    faults.extend(panics(&cluster));
    let seen = cluster.finish();
    let (held, leaks) = leaks(&cluster.timeline, &seen);
    faults.extend(leaks);
    let logs = if faults.is_empty() { None } else { keep_logs(&cluster, &said.concat()).ok() };
    RunResult { faults, packets: seen.len(), held, logs }
}

/// Daemons end only when they are killed.
fn ended_daemons(cluster: &Cluster) -> Vec<Fault> {
    let ended = DAEMONS.iter().filter(|daemon| {
        let process = cluster.lab().daemon(daemon);
        process.pid().is_some() && !process.runs()
    });
    ended.map(|daemon| Fault { kind: "a daemon ended by itself", text: (*daemon).to_owned() }).collect()
}

fn panics(cluster: &Cluster) -> Vec<Fault> {
    let lines = DAEMONS.iter().flat_map(|daemon| {
        let log = cluster.lab().daemon(daemon).log();
        let lines: Vec<String> = log.lines().filter(|l| l.contains("panicked at")).map(str::to_owned).collect();
        lines.into_iter().map(move |line| format!("{daemon}: {line}"))
    });
    lines.map(|text| Fault { kind: "a daemon panicked", text }).collect()
}

/// Now that all is well, every pod is answered that can be.
fn unanswered(cluster: &mut Cluster) -> Vec<Fault> {
    let healed = cluster.now();
    loop {
        cluster.finish_adding();
        let mut waiting: Vec<String> =
            cluster.unfinished().iter().map(|pod| format!("p{pod} cannot be made")).collect();
        for (pod, slot) in &cluster.slots {
            let Some((_, traffic)) = &slot.running else { continue };
            for (server, address) in SERVERS.iter().enumerate() {
                if cluster.timeline.answers(slot.incarnation, server) && !traffic.answered(server, healed) {
                    let node = NODES[cluster.timeline.lives[slot.incarnation].node];
                    waiting.push(format!("p{pod} on {node} is not answered by {address}"));
                }
            }
        }
        if waiting.is_empty() {
            return Vec::new();
        }
        if cluster.now() > healed + PATIENCE {
            let text = format!("{PATIENCE:?} after everything is healed: {}", waiting.join(", "));
            return vec![Fault { kind: "traffic does not come back", text }];
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Packets with a source that they may not have, one fault for each pod, server and source; and how many packets
/// could only have an egress IP.
fn leaks(timeline: &Timeline, seen: &[Seen]) -> (usize, Vec<Fault>) {
    let mut wrong: BTreeMap<(usize, usize, IpAddr), (usize, String)> = BTreeMap::new();
    let mut held = 0;
    for packet in seen {
        let Some(life) = timeline.lives.get(packet.sender.incarnation) else { continue };
        let span = [packet.sender.began, packet.at];
        let Some(allowed) = timeline.allowed(packet.sender.incarnation, packet.server, span) else { continue };
        held += usize::from(!allowed.node);
        let may_be = allowed.has(packet.source, addresses(life.node)) || (allowed.node && is_remnant(packet));
        if !may_be {
            let key = (packet.sender.incarnation, packet.server, packet.source);
            wrong.entry(key).or_insert_with(|| (0, told(life, packet, &allowed))).0 += 1;
        }
    }
    let fault =
        |(count, text)| Fault { kind: "a packet left with a wrong source", text: format!("{text}; {count} of them") };
    (held, wrong.into_values().map(fault).collect())
}

/// What a pod still sends of a TCP connection that was ended with its policy: connection tracking takes it for no
/// part of anything, and nobody translates it.
fn is_remnant(packet: &Seen) -> bool {
    let own = match packet.source {
        IpAddr::V4(source) => source.octets()[..2] == [10, 244],
        IpAddr::V6(source) => source.segments()[..2] == [0xfd00, 0x244],
    };
    own && packet.kind == "TCP"
}

fn told(life: &Life, packet: &Seen, allowed: &Allowed) -> String {
    format!(
        "p{} on {} was seen by {} from {} at {:.3} s ({}, of a flow begun at {:.3} s); allowed was {allowed:?}",
        life.pod,
        NODES[life.node],
        SERVERS[packet.server],
        packet.source,
        packet.at.as_secs_f64(),
        packet.kind,
        packet.sender.began.as_secs_f64(),
    )
}

/// The addresses of a node, as the lab gives them.
fn addresses(node: usize) -> [IpAddr; 2] {
    let last = [11, 12, 21, 22][node];
    [format!("192.0.2.{last}"), format!("2001:db8::{last}")].map(|a| a.parse().expect("an address"))
}

fn keep_logs(cluster: &Cluster, said: &str) -> io::Result<PathBuf> {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let _ = fs::remove_dir_all(&kept);
    fs::create_dir_all(&kept)?;
    fs::write(kept.join("steps"), said)?;
    for entry in fs::read_dir(cluster.lab().directory().join("logs"))? {
        let entry = entry?;
        fs::copy(entry.path(), kept.join(entry.file_name()))?;
    }
    fs::write(kept.join("statuses"), cluster.lab().manifests().statuses())?;
    Ok(kept)
}
