//! The source-port budget: how near the egress IPs of this node are to having no port left towards a destination.
//!
//! A thread of its own reads the kernel's connection table, filtered in the kernel by Egret's mark, so that nothing of
//! the daemon waits for it. Reading a table costs time for each of its connections, so the thread rests fifty times as
//! long as it has read.

mod budget;

use crate::api::PortsNearlyExhausted;
use crate::model::marks::{EgressId, Marks};
use anyhow::{Context, Result};
use budget::{Budget, Counts, SHOWN, Usage, nearly_exhausted};
use egret_nft::conntrack::{MarkFilter, Tracked, fold_tracked};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The shortest pause between two readings, and how many times as long as the last reading it is at least: the thread
/// uses at most a fiftieth of a processor.
const PAUSE: Duration = Duration::from_secs(30);
const PAUSE_FACTOR: u32 = 50;
/// Budgets of which less than this share is in use have no series: their destinations change all the time, and each would
/// be a new series of Prometheus.
const MEASURED: f64 = 0.1;

/// The egress IPs that this node owns, with their ids.
pub type OwnedIps = BTreeMap<IpAddr, EgressId>;

/// What the thread has found, for the node's status.
pub type NearlyExhausted = Arc<Vec<PortsNearlyExhausted>>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    egress_ip: String,
    destination: String,
    protocol: String,
    ports: String,
}

/// The metrics of the fullest budgets. Clones share the values.
#[derive(Clone, Debug, Default)]
pub struct SourcePortMetrics {
    used: Family<Labels, Gauge>,
    share: Family<Labels, Gauge<f64, AtomicU64>>,
}

impl SourcePortMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "source_ports_used",
            "Source ports of an egress IP of this node that connections to one destination use, of the ten fullest ranges of \
             which at least a tenth is in use",
            self.used.clone(),
        );
        registry.register(
            "source_ports_used_ratio",
            "The same as a share of the range; at 1, new connections to the destination are dropped",
            self.share.clone(),
        );
    }

    fn set(&self, by_share: &[Usage]) {
        self.used.clear();
        self.share.clear();
        for usage in by_share.iter().take(SHOWN).filter(|usage| usage.share() >= MEASURED) {
            let labels = Labels {
                egress_ip: usage.budget.egress_ip.to_string(),
                destination: usage.budget.server.to_string(),
                protocol: usage.budget.protocol().to_string(),
                ports: usage.budget.range.to_string(),
            };
            self.used.get_or_create(&labels).set(i64::from(usage.used));
            self.share.get_or_create(&labels).set(usage.share());
        }
    }
}

/// The daemon's handle of the thread.
#[derive(Debug)]
pub struct SourcePorts {
    owned: Sender<OwnedIps>,
    last: OwnedIps,
    found: watch::Receiver<NearlyExhausted>,
}

impl SourcePorts {
    /// Starts the thread. It ends when the handle is dropped.
    ///
    /// # Errors
    /// The thread or its socket cannot be created.
    pub fn start(marks: Marks, metrics: SourcePortMetrics) -> Result<Self> {
        let table = Socket::open(NETLINK_NETFILTER).context("connection tracking")?;
        let (owned, wanted) = mpsc::channel();
        let (publish, found) = watch::channel(NearlyExhausted::default());
        let reader = Reader { marks, table, metrics, publish, owned: OwnedIps::default(), nearly: BTreeSet::new() };
        thread::Builder::new().name("source-ports".into()).spawn(move || reader.run(&wanted)).context("a thread")?;
        Ok(SourcePorts { owned, last: OwnedIps::default(), found })
    }

    /// Sets the egress IPs that this node owns.
    pub fn set_owned(&mut self, owned: OwnedIps) {
        if owned != self.last {
            self.last.clone_from(&owned);
            // Without a receiver the thread has ended, and the daemon is about to.
            let _ = self.owned.send(owned);
        }
    }

    /// The destinations for which an egress IP of this node has few ports left.
    pub fn nearly_exhausted(&self) -> NearlyExhausted {
        self.found.borrow().clone()
    }

    /// Whether that has changed since the last call.
    pub fn has_changed(&mut self) -> bool {
        let changed = self.found.has_changed().unwrap_or_default();
        if changed {
            self.found.mark_unchanged();
        }
        changed
    }
}

/// The thread's state.
struct Reader {
    marks: Marks,
    table: Socket,
    metrics: SourcePortMetrics,
    publish: watch::Sender<NearlyExhausted>,
    owned: OwnedIps,
    nearly: BTreeSet<Budget>,
}

impl Reader {
    fn run(mut self, wanted: &Receiver<OwnedIps>) {
        let mut next: Option<Instant> = None;
        loop {
            // A node that owns nothing waits until it does.
            let pause = next.map(|at| at.saturating_duration_since(Instant::now()));
            let changed = match pause.filter(|_| !self.owned.is_empty()) {
                Some(pause) => wanted.recv_timeout(pause),
                None => wanted.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match changed {
                // Several have come while a large table was read.
                Ok(owned) => self.owned = wanted.try_iter().last().unwrap_or(owned),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.owned.is_empty() {
                self.show(&[]);
            } else if next.is_none_or(|at| at <= Instant::now()) {
                let begun = Instant::now();
                self.read();
                let took = begun.elapsed();
                tracing::debug!(?took, "counted the source ports in use");
                next = Some(Instant::now() + PAUSE.max(took * PAUSE_FACTOR));
            } else {
                // What has moved away is no longer this node's to report.
                self.nearly.retain(|budget| self.owned.contains_key(&budget.egress_ip));
                self.publish();
            }
        }
    }

    fn read(&mut self) {
        let filter = MarkFilter { mark: self.marks.connection(0), mask: self.marks.connection_mask() };
        let owned = &self.owned;
        let counted = fold_tracked(&mut self.table, filter, Counts::new, |counts, tracked| {
            if let Some(budget) = budget_of(tracked, self.marks, owned) {
                counts.add(budget);
            }
        });
        match counted {
            Ok(counts) => self.show(&counts.by_share()),
            Err(e) => tracing::warn!("cannot count the source ports in use; trying again: {e:#}"),
        }
    }

    fn show(&mut self, by_share: &[Usage]) {
        self.metrics.set(by_share);
        let before = std::mem::take(&mut self.nearly);
        self.nearly = nearly_exhausted(by_share, &before);
        for budget in self.nearly.difference(&before) {
            tracing::warn!(
                egress_ip = %budget.egress_ip, destination = %budget.server, protocol = %budget.protocol(),
                ports = %budget.range,
                "source ports nearly exhausted: when all are in use, new connections to this destination are dropped; \
                 divide the pods among several egress IPs"
            );
        }
        self.publish();
    }

    fn publish(&self) {
        let found = self.nearly.iter().filter_map(|budget| {
            Some(PortsNearlyExhausted {
                id: *self.owned.get(&budget.egress_ip)?,
                address: budget.egress_ip,
                destination: budget.server.ip(),
                port: budget.server.port(),
                protocol: budget.protocol(),
                ports: budget.range.to_string(),
            })
        });
        let found: Vec<PortsNearlyExhausted> = found.collect();
        self.publish.send_if_modified(|now| {
            let changed = **now != found;
            if changed {
                *now = Arc::new(found);
            }
            changed
        });
    }
}

/// The budget of a connection that leaves this node from an egress IP of its own. Connections that have ended count as
/// long as they have an entry: the kernel gives their ports to others in some cases only (`nf_nat_used_tuple_harder`).
fn budget_of(tracked: &Tracked, marks: Marks, owned: &OwnedIps) -> Option<Budget> {
    let of_peer = tracked.mark & marks.connection_kind_mask() == marks.connection_of_peer(0);
    let of_pod = tracked.mark & marks.connection_of_allocation_mask() == marks.connection(0);
    // Another mark has an entry that only admits late packets.
    if !of_peer && !of_pod || !owned.contains_key(&tracked.back.destination) {
        return None;
    }
    let source = SocketAddr::new(tracked.back.destination, tracked.back.ports[1]);
    Budget::of(source, SocketAddr::new(tracked.back.source, tracked.back.ports[0]), tracked.back.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use egret_nft::conntrack::Tuple;

    #[test]
    fn connections_that_leave_from_an_own_egress_ip_are_counted() {
        let (marks, pod) = (Marks::default(), IpAddr::from([10, 244, 1, 2]));
        let (egress_ip, server) = (IpAddr::from([192, 0, 2, 50]), IpAddr::from([203, 0, 113, 7]));
        let owned = OwnedIps::from([(egress_ip, 7)]);
        let out = Tuple { source: pod, destination: server, protocol: 6, ports: [40_000, 443] };
        let translated = |to: IpAddr, port: u16| Tuple { destination: to, ports: [443, port], ..out.reversed() };
        let of = |mark: u32, back: Tuple| {
            let tracked = Tracked { out, back, mark, timeout: 1, is_over: false, is_established: true };
            budget_of(&tracked, marks, &owned).map(|budget| (budget.egress_ip, budget.server.port(), budget.range))
        };
        let expected = Some((egress_ip, 443, budget::PortRange::High));
        assert_eq!(of(marks.connection_of_peer(3), translated(egress_ip, 40_001)), expected);
        assert_eq!(of(marks.connection(7), translated(egress_ip, 40_000)), expected, "of a pod on this node");
        assert_eq!(of(marks.connection(7), out.reversed()), None, "it goes through the tunnel to another node");
        assert_eq!(of(marks.handed(7), translated(egress_ip, 40_000)), None, "it admits late packets");
        let other = IpAddr::from([192, 0, 2, 51]);
        assert_eq!(of(marks.connection_of_peer(3), translated(other, 40_000)), None, "another node owns it");
    }
}
