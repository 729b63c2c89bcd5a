//! The node daemon's metrics.

use super::assign::AssignMetrics;
use super::changed_ports::ReplicationMetrics;
use super::fast_path::FastPathMetrics;
use super::flow_log::FlowLogMetrics;
use super::forwarding::FirstPackets;
use super::host::Counts;
use super::pods::Census;
use super::source_ports::SourcePortMetrics;
use super::uplink_probes::ProbeMetrics;
use crate::datapath::ruleset::Direction;
use crate::model::marks::EgressId;
use crate::node_plan::View;
use crate::node_plan::allocations::AllocationState;
use egret_nft::Count;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: String,
}

/// Why this node took an egress IP over.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum TakeoverReason {
    /// The node that the allocation names does not answer, or is no longer in the cluster.
    OwnerDead,
    /// That node answers, and has lost an uplink that the egress IP needs.
    UplinkLost,
    /// Neither is known any more.
    Other,
}

impl TakeoverReason {
    const ALL: [TakeoverReason; 3] = [TakeoverReason::OwnerDead, TakeoverReason::UplinkLost, TakeoverReason::Other];

    fn label(self) -> Reason {
        let reason = match self {
            TakeoverReason::OwnerDead => "owner_dead",
            TakeoverReason::UplinkLost => "uplink_lost",
            TakeoverReason::Other => "other",
        };
        Reason { reason: reason.to_owned() }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord, EncodeLabelSet)]
struct AllocationLabels {
    allocation: u16,
    role: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord, EncodeLabelSet)]
struct DirectionLabels {
    allocation: u16,
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerbLabel {
    verb: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FamilyLabel {
    family: &'static str,
}

/// The last values of one family's counters of first packets.
#[derive(Debug, Default)]
struct Forwarded {
    entered: u64,
    dropped: u64,
}

impl Forwarded {
    /// Returns the packets that were dropped since the last call. The two counters are read one after the other, so
    /// their difference may be smaller for a moment.
    fn dropped_since(&mut self, now: FirstPackets) -> u64 {
        if now.entered < self.entered {
            *self = Forwarded::default();
        }
        let dropped = now.entered.saturating_sub(now.forwarded);
        let since = dropped.saturating_sub(self.dropped);
        *self = Forwarded { entered: now.entered, dropped: self.dropped.max(dropped) };
        since
    }
}

/// The node daemon's metrics. Each method updates the metrics from a state or an event.
pub struct Metrics {
    pods: Family<StateLabels, Gauge>,
    allocations: Family<StateLabels, Gauge>,
    takeovers: Family<Reason, Counter>,
    dropped: Family<Reason, Counter>,
    other_ports: Counter,
    insertions_failed: Counter,
    assign_hook: AssignMetrics,
    changed_ports: ReplicationMetrics,
    fast_path: FastPathMetrics,
    flow_log: FlowLogMetrics,
    source_ports: SourcePortMetrics,
    uplink_probes: ProbeMetrics,
    forward_dropped: Family<FamilyLabel, Counter>,
    allocation_packets: Family<AllocationLabels, Counter>,
    allocation_bytes: Family<AllocationLabels, Counter>,
    bandwidth_dropped: Family<DirectionLabels, Counter>,
    requests: Family<VerbLabel, Histogram>,
    applies: Histogram,
    errors: Counter,
    faults: Gauge,
    changes: Counter,
    /// The last values of the kernel's counters. A counter starts at zero when its table or element is created anew.
    drops_seen: BTreeMap<String, u64>,
    other_ports_seen: u64,
    insertions_failed_seen: u64,
    first_packets_seen: [Forwarded; 2],
    allocations_seen: BTreeMap<AllocationLabels, Count>,
    /// The same, of packets that went the fast way.
    fast_seen: BTreeMap<AllocationLabels, Count>,
    bandwidth_seen: BTreeMap<DirectionLabels, u64>,
}

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 16))
}

impl Metrics {
    /// Creates all metrics, and the registry that exports them.
    pub fn new() -> (Registry, Self) {
        let metrics = Metrics {
            pods: Family::default(),
            allocations: Family::default(),
            takeovers: Family::default(),
            dropped: Family::default(),
            other_ports: Counter::default(),
            insertions_failed: Counter::default(),
            assign_hook: AssignMetrics::default(),
            changed_ports: ReplicationMetrics::default(),
            fast_path: FastPathMetrics::default(),
            flow_log: FlowLogMetrics::default(),
            source_ports: SourcePortMetrics::default(),
            uplink_probes: ProbeMetrics::default(),
            forward_dropped: Family::default(),
            allocation_packets: Family::default(),
            allocation_bytes: Family::default(),
            bandwidth_dropped: Family::default(),
            requests: Family::new_with_constructor(seconds),
            applies: seconds(),
            errors: Counter::default(),
            faults: Gauge::default(),
            changes: Counter::default(),
            drops_seen: BTreeMap::new(),
            other_ports_seen: 0,
            insertions_failed_seen: 0,
            first_packets_seen: Default::default(),
            allocations_seen: BTreeMap::new(),
            fast_seen: BTreeMap::new(),
            bandwidth_seen: BTreeMap::new(),
        };
        let mut registry = Registry::with_prefix("egret_node");
        registry.register(
            "pods",
            "Pods of this node by state: selected, isolated, free, unmanaged",
            metrics.pods.clone(),
        );
        registry.register("allocations", "Allocations by state: local, remote, unready", metrics.allocations.clone());
        TakeoverReason::ALL.iter().for_each(|reason| drop(metrics.takeovers.get_or_create(&reason.label())));
        registry.register(
            "takeovers",
            "Egress IPs that this node took over from the nodes that their allocations name, by reason: owner_dead, \
             uplink_lost, other",
            metrics.takeovers.clone(),
        );
        registry.register(
            "dropped_packets",
            "Packets dropped, by reason; leaked: they had an allocation and were about to leave another way",
            metrics.dropped.clone(),
        );
        registry.register(
            "other_port_connections",
            "Connections that left this node from another port than their pod's: one with the same address had it",
            metrics.other_ports.clone(),
        );
        registry.register(
            "insert_failed_packets",
            "Packets that the kernel dropped because another connection had their place in its table: of protocols without \
             ports, for one",
            metrics.insertions_failed.clone(),
        );
        metrics.assign_hook.register(&mut registry);
        metrics.changed_ports.register(&mut registry);
        metrics.fast_path.register(&mut registry);
        metrics.flow_log.register(&mut registry);
        metrics.source_ports.register(&mut registry);
        metrics.uplink_probes.register(&mut registry);
        registry.register(
            "forward_dropped_packets",
            "First packets of connections of other nodes' pods that this gateway admitted and did not forward: a firewall of \
             the host's, or no route",
            metrics.forward_dropped.clone(),
        );
        let packets = "Packets by allocation, by role: source (of this node's pods), gateway (of others')";
        registry.register("allocation_packets", packets, metrics.allocation_packets.clone());
        registry.register("allocation_bytes", "Bytes of these packets", metrics.allocation_bytes.clone());
        registry.register(
            "bandwidth_dropped_packets",
            "Packets dropped because they were beyond the bandwidth of their egress IP, by allocation and direction: egress, \
             ingress",
            metrics.bandwidth_dropped.clone(),
        );
        let requests = "How long plugins waited for an answer, by verb";
        registry.register_with_unit("cni_duration", requests, Unit::Seconds, metrics.requests.clone());
        let applies = "How long it took to bring the kernel in sync";
        registry.register_with_unit("apply_duration", applies, Unit::Seconds, metrics.applies.clone());
        registry.register("apply_errors", "How often the kernel could not be brought in sync", metrics.errors.clone());
        let faults = "Other nodes, networks and addresses that are passed over; the node's EgressNode names them";
        registry.register("faults", faults, metrics.faults.clone());
        registry.register("kernel_changes", "Changes made to the kernel's tables", metrics.changes.clone());
        (registry, metrics)
    }

    /// The metrics of the assign hook.
    pub fn assign_hook(&self) -> AssignMetrics {
        self.assign_hook.clone()
    }

    /// The metrics of the replication of connections with a changed port.
    pub fn changed_ports(&self) -> ReplicationMetrics {
        self.changed_ports.clone()
    }

    /// The metrics of the fast path.
    pub fn fast_path(&self) -> FastPathMetrics {
        self.fast_path.clone()
    }

    /// The metrics of the flow log.
    pub fn flow_log(&self) -> FlowLogMetrics {
        self.flow_log.clone()
    }

    /// The metrics of source ports in use.
    pub fn source_ports(&self) -> SourcePortMetrics {
        self.source_ports.clone()
    }

    /// The counters of probes by uplinks.
    pub fn uplink_probes(&self) -> ProbeMetrics {
        self.uplink_probes.clone()
    }

    /// Records an attempt to bring the kernel in sync.
    pub fn applied(&self, took: Duration, result: &anyhow::Result<usize>) {
        self.applies.observe(took.as_secs_f64());
        match result {
            Ok(changes) => {
                self.changes.inc_by(*changes as u64);
                if *changes > 0 {
                    tracing::debug!(changes, ?took, "the kernel is in sync");
                }
            }
            Err(_) => {
                self.errors.inc();
            }
        }
    }

    /// Sets the number of faults.
    pub fn faults(&self, n: usize) {
        self.faults.set(n as i64);
    }

    /// Records a response to a plugin.
    pub fn answered(&self, verb: &'static str, took: Duration) {
        self.requests.get_or_create(&VerbLabel { verb }).observe(took.as_secs_f64());
    }

    /// Sets the number of pods in each state.
    pub fn pods(&self, census: &Census) {
        let states = [
            ("selected", census.selected),
            ("isolated", census.isolated),
            ("free", census.free),
            ("unmanaged", census.unmanaged),
        ];
        for (state, n) in states {
            self.pods.get_or_create(&StateLabels { state }).set(n);
        }
    }

    /// Counts an egress IP that this node has taken over.
    pub fn taken_over(&self, reason: TakeoverReason) {
        self.takeovers.get_or_create(&reason.label()).inc();
    }

    /// Sets the number of allocations in each state.
    pub fn allocations(&self, view: &View) {
        let mut states = BTreeMap::from([("local", 0), ("remote", 0), ("unready", 0)]);
        for allocation in view.allocations.allocations.values() {
            let state = match allocation.state {
                AllocationState::Local => "local",
                AllocationState::Remote(_) => "remote",
                AllocationState::Unready(_) => "unready",
            };
            *states.entry(state).or_default() += 1;
        }
        for (state, n) in states {
            self.allocations.get_or_create(&StateLabels { state }).set(n);
        }
    }

    /// Adds what the kernel has counted since the last call.
    pub fn counts(&mut self, counts: &Counts) {
        for (reason, count) in &counts.drops {
            let seen = self.drops_seen.insert(reason.clone(), count.packets).unwrap_or(0);
            self.dropped.get_or_create(&Reason { reason: reason.clone() }).inc_by(since(seen, count.packets));
        }
        let seen = std::mem::replace(&mut self.other_ports_seen, counts.other_ports.packets);
        self.other_ports.inc_by(since(seen, counts.other_ports.packets));
        let seen = std::mem::replace(&mut self.insertions_failed_seen, counts.insertions_failed);
        self.insertions_failed.inc_by(since(seen, counts.insertions_failed));
        for (at, family) in ["ipv4", "ipv6"].into_iter().enumerate() {
            let dropped = self.first_packets_seen[at].dropped_since(counts.first_packets[at]);
            self.forward_dropped.get_or_create(&FamilyLabel { family }).inc_by(dropped);
        }
        for ((direction, allocation), count) in &counts.beyond_bandwidth {
            let direction = match direction {
                Direction::Egress => "egress",
                Direction::Ingress => "ingress",
            };
            let labels = DirectionLabels { allocation: *allocation, direction };
            let seen = self.bandwidth_seen.insert(labels.clone(), count.packets).unwrap_or_default();
            self.bandwidth_dropped.get_or_create(&labels).inc_by(since(seen, count.packets));
        }
        let roles = [("source", &counts.sent), ("gateway", &counts.forwarded)];
        for (role, allocations) in roles {
            for (allocation, count) in allocations {
                let labels = AllocationLabels { allocation: *allocation, role };
                let seen = self.allocations_seen.insert(labels.clone(), *count).unwrap_or_default();
                self.add(&labels, seen, *count);
            }
        }
    }

    /// Adds the packets that went the fast way since the last call, of this node's pods and of others', by allocation.
    pub fn fast_counts(&mut self, [sent, forwarded]: [BTreeMap<EgressId, egret_bpf::Count>; 2]) {
        for (role, allocations) in [("source", sent), ("gateway", forwarded)] {
            for (allocation, egret_bpf::Count { packets, bytes }) in allocations {
                let (labels, count) = (AllocationLabels { allocation, role }, Count { packets, bytes });
                let seen = self.fast_seen.insert(labels.clone(), count).unwrap_or_default();
                self.fast_path.packets.inc_by(since(seen.packets, packets));
                self.add(&labels, seen, count);
            }
        }
    }

    fn add(&self, labels: &AllocationLabels, seen: Count, count: Count) {
        self.allocation_packets.get_or_create(labels).inc_by(since(seen.packets, count.packets));
        self.allocation_bytes.get_or_create(labels).inc_by(since(seen.bytes, count.bytes));
    }
}

fn since(seen: u64, now: u64) -> u64 {
    now.checked_sub(seen).unwrap_or(now)
}
