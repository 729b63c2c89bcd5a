//! The thread of the fast path.

use super::devices::Devices;
use super::metrics::FastPathMetrics;
use super::{Status, Wanted};
use crate::datapath::changes::{Changed, Changes};
use crate::datapath::obstacles;
use anyhow::{Context, Result};
use egret_bpf::Programs;
use egret_nft::conntrack::{Tuple, set_liberal};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use egret_nft::rule::protocol::TCP;
use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// The interval at which wishes are read. A connection has sent 32 packets before its wish.
const WISHES: Duration = Duration::from_millis(40);
/// The largest number of wishes that are granted at once.
const AT_ONCE: usize = 1024;
/// The interval at which the interfaces are looked at without a notification: programs of others come without one.
const LOOK: Duration = Duration::from_secs(5);
/// The shortest pause between two readings of all rules, and how many times as long as the last reading it is at least: a
/// node can have ten thousand rules, and change them every second.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSE_FACTOR: u32 = 50;

/// The thread's state.
pub(super) struct Task {
    programs: Arc<Programs>,
    wanted: watch::Receiver<Wanted>,
    publish: watch::Sender<Status>,
    metrics: FastPathMetrics,
    changes: Changes,
    tracked: Socket,
    rules: Socket,
    devices: Devices,
    without: BTreeMap<String, String>,
    /// The number of this generation. Leases of others are void.
    generation: u32,
    /// What must see every packet. It is not known before the rules were read once.
    obstacle: Option<String>,
    /// When the rules are read again.
    read_at: Option<Instant>,
    /// The rules are not read before this time.
    rested: Instant,
}

impl Task {
    pub(super) fn new(
        programs: Arc<Programs>,
        wanted: watch::Receiver<Wanted>,
        publish: watch::Sender<Status>,
        metrics: FastPathMetrics,
    ) -> Result<Self> {
        let now = Instant::now();
        Ok(Task {
            programs,
            wanted,
            publish,
            metrics,
            changes: Changes::open().context("the kernel's notifications")?,
            tracked: Socket::open(NETLINK_NETFILTER).context("connection tracking")?,
            rules: Socket::open(NETLINK_NETFILTER).context("nf_tables")?,
            devices: Devices::default(),
            without: BTreeMap::new(),
            generation: 1,
            obstacle: Some("the rules of this host are being read".to_owned()),
            read_at: Some(now),
            rested: now,
        })
    }

    /// Runs until the handle is dropped, or until notifications do not come any more.
    pub(super) async fn run(mut self) {
        let (mut wishes, mut look) = (interval(WISHES), interval(LOOK));
        wishes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let read_at = self.read_at;
            let is_open = self.publish.borrow().closed.is_none();
            let done = tokio::select! {
                biased;
                changed = self.changes.next() => changed.context("the kernel's notifications").and_then(|changed| self.changed(changed)),
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.apply(),
                    // The daemon ends.
                    Err(_) => return,
                },
                () = at(read_at) => self.read_rules(),
                _ = look.tick() => self.apply(),
                _ = wishes.tick(), if is_open => self.grant_wishes(),
            };
            if let Err(e) = done {
                self.give_up(&e);
                return;
            }
        }
    }

    /// Ends all leases.
    fn changed(&mut self, changed: Changed) -> Result<()> {
        self.next_generation();
        self.write()?;
        if changed.rules && self.read_at.is_none() {
            self.read_at = Some(self.rested.max(Instant::now()));
        }
        if changed.interfaces {
            self.wanted.mark_changed();
        }
        Ok(())
    }

    /// Puts the programs where they are wanted.
    fn apply(&mut self) -> Result<()> {
        let wanted = self.wanted.borrow_and_update().clone();
        let peers = wanted.peers.iter().map(|(mark, mac)| (*mark, *mac)).collect();
        self.programs.set_peers(&peers).context("the fast path's peers")?;
        let without = self.devices.apply(&self.programs, &wanted).context("interfaces of the fast path")?;
        for (interface, why) in without.iter().filter(|(interface, why)| self.without.get(*interface) != Some(*why)) {
            tracing::info!(interface, "packets of this interface take no fast path: {why}");
        }
        self.without = without;
        self.write()
    }

    fn read_rules(&mut self) -> Result<()> {
        let begun = Instant::now();
        let obstacle = match obstacles::find(&mut self.rules) {
            Ok(obstacle) => obstacle,
            Err(e) => Some(format!("the rules of this host cannot be read: {e:#}")),
        };
        let took = begun.elapsed();
        self.rested = Instant::now() + PAUSE.max(took * PAUSE_FACTOR);
        self.read_at = None;
        self.obstacle = obstacle;
        self.write()
    }

    fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1).max(1);
    }

    /// Writes the generation, and publishes the status.
    fn write(&mut self) -> Result<()> {
        let (tunnel, closed) = {
            let wanted = self.wanted.borrow();
            let no_tunnel = (wanted.tunnel == 0).then_some("there is no tunnel device");
            (wanted.tunnel, wanted.closed.or(no_tunnel).map(str::to_owned))
        };
        let closed = closed.or_else(|| self.obstacle.clone());
        if closed.is_none() && self.publish.borrow().closed.is_some() {
            // Leases of the time before it was closed stay void.
            self.next_generation();
        }
        let generation = if closed.is_none() { self.generation } else { 0 };
        self.programs.set_state(generation, tunnel).context("the fast path's generation")?;
        self.metrics.set_open(closed.is_none());
        let status = Status { closed, without: self.without.clone() };
        self.publish.send_if_modified(|now| {
            let changed = *now != status;
            if now.closed != status.closed {
                match &status.closed {
                    Some(why) => tracing::info!("no packet takes the fast path: {why}"),
                    None => tracing::info!("packets of long connections take the fast path"),
                }
            }
            *now = status;
            changed
        });
        Ok(())
    }

    /// Makes connection tracking liberal with the connections that are in the way of a lease.
    fn grant_wishes(&mut self) -> Result<()> {
        let mut connections = BTreeSet::new();
        while connections.len() < AT_ONCE
            && let Some(wish) = self.programs.take_wish().context("the fast path's wishes")?
        {
            connections.insert(Tuple {
                source: wish.source,
                destination: wish.destination,
                protocol: TCP,
                ports: wish.ports,
            });
        }
        let connections: Vec<Tuple> = connections.into_iter().collect();
        if let Err(e) = set_liberal(&mut self.tracked, &connections) {
            // These connections get no lease.
            tracing::debug!("connection tracking cannot be made liberal: {e}");
        }
        Ok(())
    }

    /// Without notifications, no lease would be safe. With the last handle of the task, the programs go.
    fn give_up(&mut self, error: &anyhow::Error) {
        tracing::error!("no packet takes the fast path any more: {error:#}");
        self.devices.clear();
        self.metrics.set_open(false);
        let _ = self.programs.set_state(0, 0);
        self.publish.send_replace(Status { closed: Some(format!("{error:#}")), without: BTreeMap::new() });
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
