//! The gateway nodes that this source node reports as unreachable.
//!
//! When a gateway node dies, another one takes over its egress IPs within a second. If none does, the other gateway nodes
//! reach it and only source nodes do not. The controller can tell from the reports of all source nodes whether another
//! gateway node serves them better. The report is late on purpose: in a cluster of thousands of nodes all of them would
//! report each gateway node that dies.

use super::NodeDaemon;
use crate::api::ReportGiven;
use crate::model::selector::Name;
use crate::model::tunnel_mac;
use crate::node_plan::allocations::AllocationState;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;

/// How long no reachable node holds the egress IP before this node reports it. It is several times a takeover.
const PATIENCE: Duration = Duration::from_secs(3);
/// The interval at which the nodes of a cluster report, one after the other.
const PACE: Duration = Duration::from_millis(2);

/// When to report, and what.
#[derive(Debug, Default)]
pub(super) struct Unreachable {
    /// The time of the report, while an egress IP is on no node that this one reaches.
    due: Option<Instant>,
    /// The gateway nodes that are reported now.
    nodes: BTreeSet<Name>,
}

impl Unreachable {
    /// The time of the next report, if nothing changes.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.filter(|_| self.nodes.is_empty())
    }

    /// `dead` are the gateway nodes that do not answer. `stranded`: no node that answers holds an egress IP of this node's
    /// pods. `spread` is how much longer than [`PATIENCE`] this node waits.
    fn judge(&mut self, dead: &BTreeSet<Name>, stranded: bool, spread: Duration, now: Instant) -> &BTreeSet<Name> {
        // A reported node stays reported until it answers. Otherwise its egress IPs could move back at once.
        self.nodes.retain(|node| dead.contains(node));
        if !stranded {
            self.due = None;
        } else if *self.due.get_or_insert(now + PATIENCE + spread) <= now {
            self.nodes.clone_from(dead);
        }
        &self.nodes
    }
}

impl NodeDaemon {
    /// The requests for reports that this node answers: a gateway node all of them, a source node while it has something to
    /// report.
    pub(super) fn reports_given(&self, unreachable: &BTreeSet<Name>) -> Vec<ReportGiven> {
        if !self.view.allocations.is_gateway && unreachable.is_empty() {
            return Vec::new();
        }
        let requests = self.cluster.gateways.iter().filter_map(|(name, gateway)| {
            let requested_at = gateway.status.reports_requested_at?;
            Some(ReportGiven { gateway: name.to_string(), requested_at })
        });
        requests.collect()
    }

    /// The gateway nodes to report.
    pub(super) fn unreachable(&mut self) -> BTreeSet<Name> {
        let allocations = &self.view.allocations;
        let used = self
            .enforced
            .uses
            .values()
            .flat_map(|used| &used.allocations)
            .filter_map(|id| allocations.allocations.get(id));
        let mut managed = used.filter(|allocation| allocation.is_managed() && !allocation.owner_holds);
        let stranded = managed.any(|allocation| matches!(allocation.state, AllocationState::Remote(_)));
        // Gateway nodes report each other at once, as unreachable peers.
        let stranded = stranded && !allocations.is_gateway && !self.liveness.dead.is_empty();
        let [.., high, low] = tunnel_mac::of_node(&self.options.name);
        let turn = f64::from(u16::from_be_bytes([high, low])) / f64::from(u16::MAX);
        let nodes = u32::try_from(self.cluster.nodes.len()).unwrap_or(u32::MAX);
        let spread = (PACE * nodes).mul_f64(turn);
        self.unreachable.judge(&self.liveness.dead, stranded, spread, Instant::now()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> BTreeSet<Name> {
        all.iter().copied().map(Into::into).collect()
    }

    #[test]
    fn an_unreachable_node_is_reported_until_it_answers() {
        let (mut of, begin, spread) = (Unreachable::default(), Instant::now(), Duration::from_secs(1));
        let dead = names(&["g1"]);
        assert!(of.judge(&dead, true, spread, begin).is_empty());
        let due = begin + PATIENCE + spread;
        assert_eq!(of.next(), Some(due));
        assert!(of.judge(&dead, true, spread, due - Duration::from_millis(1)).is_empty());
        assert_eq!(*of.judge(&dead, true, spread, due), dead);
        assert_eq!(of.next(), None);
        assert_eq!(
            *of.judge(&names(&["g1", "g2"]), false, spread, due),
            dead,
            "the egress IP has moved, g2 has died since"
        );
        assert!(of.judge(&names(&["g2"]), false, spread, due).is_empty(), "g1 answers");
    }

    #[test]
    fn a_dead_node_whose_egress_ips_are_taken_over_is_not_reported() {
        let (mut of, begin, dead) = (Unreachable::default(), Instant::now(), names(&["g1"]));
        for n in 0..10 {
            let at = begin + PATIENCE * n;
            assert!(of.judge(&dead, true, Duration::ZERO, at).is_empty());
            assert!(of.judge(&dead, false, Duration::ZERO, at + PATIENCE / 2).is_empty());
        }
    }
}
