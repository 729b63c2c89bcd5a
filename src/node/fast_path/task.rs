//! The thread of the fast path.

use super::devices::{Applied, Devices};
use super::metrics::FastPathMetrics;
use super::{Status, TunnelEnd, Wanted};
use crate::datapath::changes::{Changed, Changes};
use crate::datapath::obstacles;
use anyhow::{Context, Result};
use egret_bpf::Programs;
use egret_nft::conntrack::{Tuple, set_liberal};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use egret_nft::rule::protocol::TCP;
use std::collections::BTreeSet;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// The interval at which requests are read. A connection has sent 32 packets before its request.
const REQUESTS: Duration = Duration::from_millis(40);
/// The largest number of requests that are granted at once.
const AT_ONCE: usize = 1024;
/// The interval at which the interfaces are looked at without a notification: programs of others come without one.
const LOOK: Duration = Duration::from_secs(5);
/// The shortest pause between two readings of all rules, and how many times as long as the last reading it is at least: a
/// node can have ten thousand rules, and change them every second.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSE_FACTOR: u32 = 50;
/// The same for the interfaces: a node can have a thousand, and some appear every second.
const APPLY_PAUSE: Duration = Duration::from_millis(100);
const APPLY_FACTOR: u32 = 10;

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
    applied: Applied,
    /// What the maps were filled with.
    filled: Wanted,
    /// Whether another program may have changed them since.
    fills_again: bool,
    /// The number of this generation. Leases of others are void.
    generation: u32,
    /// What must see every packet. It is not known before the rules were read once.
    obstacle: Option<String>,
    /// A setting for which all packets must be seen. Nobody is notified of a change of it.
    setting: Option<String>,
    /// When the rules are read again.
    read_at: Option<Instant>,
    /// The rules are not read before this time.
    rested: Instant,
    /// When the programs are put onto interfaces again.
    apply_at: Option<Instant>,
    /// They are not before this time.
    apply_rested: Instant,
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
            applied: Applied::default(),
            filled: Wanted::default(),
            fills_again: false,
            generation: 1,
            obstacle: Some("the rules of this host are being read".to_owned()),
            setting: obstacles::setting(),
            read_at: Some(now),
            rested: now,
            apply_at: None,
            apply_rested: now,
        })
    }

    /// Runs until the handle is dropped, or until notifications do not come any more.
    pub(super) async fn run(mut self) {
        let (mut requests, mut look) = (interval(REQUESTS), interval(LOOK));
        requests.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (read_at, apply_at) = (self.read_at, self.apply_at);
            let is_open = self.publish.borrow().closed.is_none();
            let done = tokio::select! {
                biased;
                changed = self.changes.next() => changed.context("the kernel's notifications").and_then(|changed| self.changed(changed)),
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.wanted_changed(),
                    // The daemon ends.
                    Err(_) => return,
                },
                () = at(read_at) => self.read_rules(),
                () = at(apply_at) => self.apply(),
                _ = look.tick() => self.look(),
                _ = requests.tick(), if is_open => self.grant_requests(),
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
            self.apply_soon();
        }
        Ok(())
    }

    /// What closes the fast path does so at once; the rest waits until the interfaces may be looked at.
    fn wanted_changed(&mut self) -> Result<()> {
        self.apply_soon();
        self.write()
    }

    fn apply_soon(&mut self) {
        self.apply_at = self.apply_at.or(Some(self.apply_rested.max(Instant::now())));
    }

    /// Looks at what changes without a notification.
    fn look(&mut self) -> Result<()> {
        self.setting = obstacles::setting();
        self.fills_again = true;
        self.apply_soon();
        self.write()
    }

    /// Puts the programs where they are wanted, and fills their maps.
    fn apply(&mut self) -> Result<()> {
        let begun = Instant::now();
        let wanted = self.wanted.borrow().clone();
        let applied = self.devices.apply(&self.programs, &wanted).context("interfaces of the fast path")?;
        for (interface, why) in
            applied.without.iter().filter(|(name, why)| self.applied.without.get(*name) != Some(*why))
        {
            tracing::info!(interface, "packets of this interface take no fast path: {why}");
        }
        for (interface, why) in
            applied.by_device.iter().filter(|(name, why)| self.applied.by_device.get(*name) != Some(*why))
        {
            tracing::info!(interface, "packets to other nodes pass the tunnel device, also on the fast path: {why}");
        }
        self.fill(&wanted, &applied)?;
        self.applied = applied;
        self.apply_at = None;
        self.apply_rested = Instant::now() + APPLY_PAUSE.max(begun.elapsed() * APPLY_FACTOR);
        self.write()
    }

    /// Fills the maps by which leases are given. Leases by what they held before end.
    fn fill(&mut self, wanted: &Wanted, applied: &Applied) -> Result<()> {
        let filled = &self.filled;
        let is_same = filled.peers == wanted.peers && filled.nodes == applied.nodes && filled.slow == wanted.slow;
        if is_same && !self.fills_again {
            return Ok(());
        }
        self.fills_again = false;
        self.programs.set_peers(&wanted.peers).context("the fast path's peers")?;
        self.programs.set_nodes(&applied.nodes).context("the fast path's nodes")?;
        let slow = &wanted.slow;
        self.programs.set_slow(&slow.ids, &slow.addresses).context("the fast path's exceptions")?;
        let tunnel = self.filled.tunnel;
        self.filled = Wanted { tunnel, nodes: applied.nodes.clone(), ..wanted.clone() };
        if !is_same {
            self.next_generation();
        }
        Ok(())
    }

    fn read_rules(&mut self) -> Result<()> {
        let begun = Instant::now();
        let obstacle = match obstacles::rule(&mut self.rules) {
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
            let no_tunnel = wanted.tunnel.is_none().then_some("there is no tunnel device");
            // Where no tunnel packet may pass the tunnel device by, the programs take none for one.
            let is_passed_by = !self.applied.nodes.is_empty();
            let tunnel =
                wanted.tunnel.map(|tunnel| TunnelEnd { port: if is_passed_by { tunnel.port } else { 0 }, ..tunnel });
            (tunnel, wanted.closed.or(no_tunnel).map(str::to_owned))
        };
        let closed = closed.or_else(|| self.setting.clone()).or_else(|| self.obstacle.clone());
        if closed.is_none() && self.publish.borrow().closed.is_some() || self.filled.tunnel != tunnel {
            // Leases of the time before it was closed, and of another tunnel, stay void.
            self.next_generation();
        }
        self.filled.tunnel = tunnel;
        let generation = if closed.is_none() { self.generation } else { 0 };
        self.programs.set_state(generation, tunnel.as_ref()).context("the fast path's generation")?;
        self.metrics.set_open(closed.is_none());
        let Applied { without, by_device, .. } = &self.applied;
        let slow = self.filled.slow.ids.len();
        let status = Status { closed, without: without.clone(), by_device: by_device.clone(), slow };
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
    fn grant_requests(&mut self) -> Result<()> {
        let mut connections = BTreeSet::new();
        while connections.len() < AT_ONCE
            && let Some(request) = self.programs.take_request().context("the fast path's requests")?
        {
            connections.insert(Tuple {
                source: request.source,
                destination: request.destination,
                protocol: TCP,
                ports: request.ports,
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
        let _ = self.programs.set_state(0, None);
        self.publish.send_replace(Status { closed: Some(format!("{error:#}")), ..Status::default() });
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
