//! The metrics of the controller.

use crate::api::{EgressGatewayStatus, EgressPolicyStatus};
use crate::model::selector::Name;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AllocationLabels {
    gateway: String,
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GatewayLabel {
    gateway: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConditionLabels {
    condition: String,
    status: String,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    object: &'static str,
    result: &'static str,
}

pub(super) struct Metrics {
    allocation: Histogram,
    allocations: Family<AllocationLabels, Gauge>,
    in_cooldown: Family<GatewayLabel, Gauge>,
    policies: Family<ConditionLabels, Gauge>,
    writes: Family<WriteLabels, Counter>,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            // 0.1 ms to 1.6 s.
            allocation: Histogram::new(exponential_buckets(0.0001, 2.0, 15)),
            allocations: Family::default(),
            in_cooldown: Family::default(),
            policies: Family::default(),
            writes: Family::default(),
        };
        registry.register_with_unit(
            "allocation_duration",
            "How long it took to compute the allocations",
            Unit::Seconds,
            metrics.allocation.clone(),
        );
        registry.register("allocations", "Allocations by gateway and kind", metrics.allocations.clone());
        registry.register(
            "allocations_in_cooldown",
            "Allocations that were given back and are kept from reuse for ten minutes",
            metrics.in_cooldown.clone(),
        );
        registry.register("policies", "Policies by condition", metrics.policies.clone());
        registry.register("status_writes", "Statuses written", metrics.writes.clone());
        metrics
    }

    pub(super) fn allocated(&self, duration: Duration) {
        self.allocation.observe(duration.as_secs_f64());
    }

    pub(super) fn gateway_statuses(&self, gateways: &BTreeMap<Name, EgressGatewayStatus>) {
        self.allocations.clear();
        self.in_cooldown.clear();
        for (name, status) in gateways {
            let gateway = name.to_string();
            for allocation in &status.allocations {
                let kind = format!("{:?}", allocation.kind);
                self.allocations.get_or_create(&AllocationLabels { gateway: gateway.clone(), kind }).inc();
            }
            self.in_cooldown.get_or_create(&GatewayLabel { gateway }).set(status.released.len() as i64);
        }
    }

    pub(super) fn policies<'a>(&self, statuses: impl Iterator<Item = &'a EgressPolicyStatus>) {
        self.policies.clear();
        for condition in statuses.flat_map(|status| &status.conditions) {
            self.policies
                .get_or_create(&ConditionLabels {
                    condition: condition.type_.clone(),
                    status: condition.status.clone(),
                    reason: condition.reason.clone(),
                })
                .inc();
        }
    }

    /// Counts a write of a status.
    pub(super) fn written(&self, object: &'static str, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.writes.get_or_create(&WriteLabels { object, result }).inc();
    }
}
