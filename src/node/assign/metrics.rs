//! The metrics of the assign hook.

use super::Action;
use super::client::HookFailure;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    action: &'static str,
    outcome: &'static str,
}

/// Counts the requests to the hook.
#[derive(Clone, Debug, Default)]
pub struct AssignMetrics {
    requests: Family<Labels, Counter>,
}

impl AssignMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "assign_hook_requests",
            "Requests to the assign hook, by action (assign, release) and outcome: done, refused, no_answer",
            self.requests.clone(),
        );
    }

    /// Counts a request.
    pub(super) fn count(&self, action: Action, answer: &Result<(), HookFailure>) {
        let action = match action {
            Action::Assign => "assign",
            Action::Release => "release",
        };
        let outcome = match answer {
            Ok(()) => "done",
            Err(HookFailure::Refused { .. }) => "refused",
            Err(HookFailure::NoAnswer(_)) => "no_answer",
        };
        self.requests.get_or_create(&Labels { action, outcome }).inc();
    }
}
