//! Other programs' eBPF at the veths of selected pods, and the rules against what it takes past nf_tables.

use super::Host;
use crate::datapath::redirected::{Redirected, Wanted};
use crate::datapath::{arrival, foreign_programs};
use crate::model::text::few;
use crate::node_plan::PodPlan;
use anyhow::{Context, Result};
use egret_nft::netlink::Socket;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The interval between two probes of the same veth: a CNI's configuration may have changed.
const AGAIN: Duration = Duration::from_secs(30);
/// At most so many veths are probed again at a time. Each takes some tens of milliseconds.
const AT_ONCE: usize = 8;
/// At most so many veths are named in the status.
const FEW: usize = 5;

/// The way of a pod's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PacketPath {
    /// No other program's eBPF is at its veth.
    Kernel,
    /// It has not been probed.
    Unknown,
    /// They arrive at nf_tables.
    Arrives,
    /// Another program's eBPF sends them past nf_tables.
    Diverted,
    /// It cannot be probed.
    Unprobed,
}

/// A veth to probe: its index, its name, and an address of the pod's.
type Probe = (u32, String, IpAddr);

/// What is known of the eBPF at pods' veths.
pub(super) struct Programs {
    socket: Socket,
    redirected: Redirected,
    /// By the veth's index, with its name. Whether eBPF is there is read when the veth is first seen, before the daemon's
    /// own programs are there, and again only if it was not.
    at: BTreeMap<u32, (PacketPath, String)>,
    /// Whether the answers are outdated that no eBPF is at a veth.
    outdated: bool,
    /// Whether a pod's packets were found to arrive last, or not to; `None` before the first probe.
    node: Option<PacketPath>,
    /// Whether a pod's packets no longer arrive, and other pods' are probed for that reason.
    suspected: bool,
    /// Whether the daemon's own program may be at a veth, that of the fast path.
    fast_path: bool,
    found: Receiver<(u32, PacketPath)>,
    find: Sender<(u32, PacketPath)>,
    probed: Instant,
    /// The probes until now: each veth has its turn.
    turn: usize,
}

impl Programs {
    pub(super) fn open(fast_path: bool) -> io::Result<Self> {
        let (socket, redirected) = (foreign_programs::open()?, Redirected::open()?);
        let (find, found) = channel();
        let (at, node, probed) = (BTreeMap::new(), None, Instant::now());
        let (outdated, suspected, turn) = (false, false, 0);
        Ok(Programs { socket, redirected, at, outdated, node, suspected, fast_path, found, find, probed, turn })
    }

    /// The netlink port by which rules are changed.
    pub(super) fn port(&self) -> u32 {
        self.redirected.port()
    }

    /// Makes the next call read everything from the kernel.
    pub(super) fn invalidate(&mut self) {
        self.outdated = true;
        self.invalidate_rules();
    }

    /// Makes the next call read the rules from the kernel.
    pub(super) fn invalidate_rules(&mut self) {
        self.redirected.invalidate();
    }

    /// Whether another program's eBPF is at a selected pod's veth.
    pub(super) fn are_there(&self) -> bool {
        self.at.values().any(|(way, _)| *way != PacketPath::Kernel)
    }

    /// Blocks what eBPF of other programs takes of these pods' packets to destinations outside the cluster, and begins to
    /// find out whether it does. Returns the number of changes.
    pub(super) fn block_redirects<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<PodPlan>>) -> Result<usize> {
        let pods: BTreeMap<u32, &PodPlan> = pods.map(|pod| (pod.interface_index, &**pod)).collect();
        self.at.retain(|index, (_, name)| pods.get(index).is_some_and(|pod| pod.interface == *name));
        let mut probes = Vec::new();
        for (index, pod) in &pods {
            let known = self.at.get(index).map(|(way, _)| *way);
            if known.is_some_and(|way| way != PacketPath::Kernel || !self.outdated) {
                continue;
            }
            // Later, one program may be the daemon's own.
            let own = u32::from(known.is_some() && self.fast_path);
            let is_there = foreign_programs::is_at(&mut self.socket, *index, own).context("eBPF at a pod's veth")?;
            let way = if is_there { PacketPath::Unknown } else { PacketPath::Kernel };
            self.at.insert(*index, (way, pod.interface.clone()));
            probes.extend(probe(pod).filter(|_| is_there));
        }
        self.outdated = false;
        let mut changes = self.redirected.block(&self.wanted(&pods))?;
        if self.node.is_none() && !probes.is_empty() {
            // The first pod's start waits for it. Later ones need not: what is assumed of them is what is so for others.
            let (index, name, address) = probes.remove(0);
            let way = ask(index, &name, address);
            self.node = Some(way);
            self.at.insert(index, (way, name));
            changes += self.redirected.block(&self.wanted(&pods))?;
        }
        probes.extend(self.due(&pods));
        self.start(probes)?;
        Ok(changes)
    }

    /// The rules that are needed.
    fn wanted(&self, pods: &BTreeMap<u32, &PodPlan>) -> Wanted {
        let mut wanted = Wanted::default();
        for (index, pod) in pods {
            let way = self.at.get(index).map_or(PacketPath::Kernel, |(way, _)| *way);
            let veth = match way {
                PacketPath::Kernel => continue,
                PacketPath::Arrives => None,
                PacketPath::Unknown | PacketPath::Unprobed if self.node == Some(PacketPath::Arrives) => None,
                PacketPath::Unknown | PacketPath::Unprobed | PacketPath::Diverted => Some(&*pod.interface),
            };
            pod.addresses.iter().for_each(|address| wanted.add(*address, veth));
        }
        wanted
    }

    /// The veths to probe again, by turns: those whose packets did not arrive, and one whose packets did; several, if those
    /// of another one no longer do.
    fn due(&mut self, pods: &BTreeMap<u32, &PodPlan>) -> Vec<Probe> {
        if self.probed.elapsed() < AGAIN {
            return Vec::new();
        }
        self.probed = Instant::now();
        let of = |is_one: fn(PacketPath) -> bool, number: usize| {
            let all: Vec<&u32> = self.at.iter().filter(|(_, (way, _))| is_one(*way)).map(|(index, _)| index).collect();
            let begin = self.turn * number % all.len().max(1);
            let by_turns = all.iter().cycle().skip(begin).take(number.min(all.len()));
            by_turns.filter_map(|index| probe(pods.get(*index)?)).collect::<Vec<_>>()
        };
        let arriving = if self.suspected { AT_ONCE } else { 1 };
        let again = [
            of(|way| way == PacketPath::Arrives, arriving),
            of(|way| matches!(way, PacketPath::Diverted | PacketPath::Unprobed), AT_ONCE),
        ];
        self.turn += 1;
        again.concat()
    }

    fn start(&self, probes: Vec<Probe>) -> Result<()> {
        if probes.is_empty() {
            return Ok(());
        }
        let find = self.find.clone();
        let run = move || {
            for (index, name, address) in probes {
                // Without a receiver, the daemon ends.
                let _ = find.send((index, ask(index, &name, address)));
            }
        };
        thread::Builder::new().name("arrival".into()).spawn(run).context("a thread")?;
        Ok(())
    }

    /// Takes what was found out. Returns whether anything has changed.
    fn take_found(&mut self) -> bool {
        let mut changed = false;
        while let Ok((index, way)) = self.found.try_recv() {
            let Some((before, name)) = self.at.get_mut(&index) else { continue };
            if way == PacketPath::Unprobed && *before != PacketPath::Unknown {
                // It says nothing new.
                continue;
            }
            let turned = *before == PacketPath::Arrives && way == PacketPath::Diverted;
            changed |= *before != way;
            if *before != way && way == PacketPath::Diverted {
                tracing::warn!(veth = %name, "an eBPF program takes a selected pod's packets past nf_tables: blocked");
            }
            *before = way;
            if way == PacketPath::Arrives {
                (self.node, self.suspected) = (Some(way), false);
            }
            let no_other = !self.at.values().any(|(way, _)| *way == PacketPath::Arrives);
            if turned && (self.suspected || no_other) {
                // Nor do those of a second one: the CNI's configuration has changed, presumably for all.
                self.node = Some(way);
                let arriving = self.at.values_mut().filter(|(way, _)| *way == PacketPath::Arrives);
                arriving.for_each(|(way, _)| *way = PacketPath::Diverted);
            }
            if turned {
                // Of one pod alone, a network policy may deny the probe.
                self.suspected = true;
                self.probed = Instant::now().checked_sub(AGAIN).unwrap_or(self.probed);
            }
        }
        changed
    }

    /// Whether the packets of selected pods under other programs' eBPF arrive at nf_tables, or what takes them elsewhere;
    /// `None` if there are none, or nothing is known yet.
    fn judgement(&self) -> Option<Result<(), String>> {
        let is_diverted = |way: PacketPath| {
            way == PacketPath::Diverted || way == PacketPath::Unprobed && self.node != Some(PacketPath::Arrives)
        };
        let diverted = self.at.values().filter(|(way, _)| is_diverted(*way));
        let diverted: BTreeSet<&str> = diverted.map(|(_, name)| &**name).collect();
        if diverted.is_empty() {
            return self.at.values().any(|(way, _)| *way == PacketPath::Arrives).then_some(Ok(()));
        }
        let (cni, remedy) = foreign_programs::remedy();
        let names = few(diverted.iter().map(ToString::to_string), FEW);
        let blocked = "everything that leaves the cluster is blocked for their pods, as no rule sees it";
        Some(Err(format!(
            "{cni} takes packets that come in by {names} past nf_tables, or drops them: {blocked}; {remedy}"
        )))
    }
}

fn ask(index: u32, name: &str, address: IpAddr) -> PacketPath {
    match arrival::of(index, name, address) {
        Ok(true) => PacketPath::Arrives,
        Ok(false) => PacketPath::Diverted,
        Err(e) => {
            tracing::warn!(veth = name, "cannot find out whether a pod's packets arrive at nf_tables: {e:#}");
            PacketPath::Unprobed
        }
    }
}

fn probe(pod: &PodPlan) -> Option<Probe> {
    Some((pod.interface_index, pod.interface.clone(), *pod.addresses.first()?))
}

impl Host {
    /// Takes what was found out about the way of pods' packets. Returns whether anything has changed.
    pub fn take_arrivals(&mut self) -> bool {
        self.programs.take_found()
    }

    /// Whether the packets of selected pods under other programs' eBPF arrive at nf_tables, or what takes them elsewhere;
    /// `None` if there are none, or nothing is known yet.
    pub fn arrivals(&self) -> Option<Result<(), String>> {
        self.programs.judgement()
    }
}
