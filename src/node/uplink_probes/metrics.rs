//! What is counted of probes.

use super::Findings;
use super::judge::ProbeState;
use crate::model::selector::Name;
use crate::model::uplink_key::UplinkKey;
use crate::model::uplink_probes::ProbeTarget;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ProbeLabels {
    gateway: String,
    target: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabels {
    gateway: String,
    family: &'static str,
    state: &'static str,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct ProbeMetrics {
    probes: Family<ProbeLabels, Counter>,
    states: Family<StateLabels, Gauge>,
}

const STATES: [ProbeState; 4] = [ProbeState::Unproven, ProbeState::Succeeds, ProbeState::Fails, ProbeState::Lost];

impl ProbeState {
    /// The state as a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            ProbeState::Unproven => "unproven",
            ProbeState::Succeeds => "succeeds",
            ProbeState::Fails => "fails",
            ProbeState::Lost => "lost",
        }
    }
}

impl ProbeMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let probes = "Probes of gateways' targets, by result: answered, unanswered";
        registry.register("uplink_probes", probes, self.probes.clone());
        registry.register(
            "probed_uplinks",
            "1 for the state of this node's uplink by a gateway's probes, and 0 for the others: unproven, succeeds, fails \
             (on no other node they are known to succeed), lost (they succeed on another node)",
            self.states.clone(),
        );
    }

    /// Counts a probe whose result is known.
    pub(super) fn count(&self, gateway: &Name, target: &ProbeTarget, answered: bool) {
        let result = if answered { "answered" } else { "unanswered" };
        let labels = ProbeLabels { gateway: gateway.to_string(), target: target.to_string(), result };
        self.probes.get_or_create(&labels).inc();
    }

    /// Shows the states. Those of probes that are no more are removed.
    pub(super) fn show(&self, findings: &Findings) {
        self.states.clear();
        for (UplinkKey { gateway, ipv4, .. }, finding) in findings {
            let family = if *ipv4 { "ipv4" } else { "ipv6" };
            let gateway = gateway.as_deref().unwrap_or_default();
            for state in STATES {
                let labels = StateLabels { gateway: gateway.to_owned(), family, state: state.name() };
                self.states.get_or_create(&labels).set(i64::from(state == finding.state));
            }
        }
    }
}
