//! Gateway nodes that this source node does not reach, as far as others are to hear of it.
//!
//! Of a gateway node that dies the other gateway nodes hear by themselves, and one of them takes its egress IPs over within a
//! second. If nobody does, they reach it and this node alone does not: the controller can tell from what all source nodes
//! say whether another gateway node serves them better. It is said late, for in a cluster of thousands of nodes all would
//! say it at once of each gateway node that dies.

use super::Node;
use crate::model::mac;
use crate::model::selector::Name;
use crate::node_plan::allocations::AllocationState;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;

/// How long an egress IP is without a node that this one reaches before that is said: several times a takeover.
const PATIENCE: Duration = Duration::from_secs(3);
/// All nodes together say it at this pace.
const PACE: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unreachable {
    /// When it is to be said, while an egress IP is on no node that this one reaches.
    due: Option<Instant>,
    /// Those that are named now.
    nodes: BTreeSet<Name>,
}

impl Unreachable {
    /// When something is to be said, if nothing changes.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.filter(|_| self.nodes.is_empty())
    }

    /// `dead`: those that do not answer. `stranded`: an egress IP of this node's pods is on none that answers, though one
    /// does. `spread`: how much longer than [`PATIENCE`] this node waits.
    fn judge(&mut self, dead: &BTreeSet<Name>, stranded: bool, spread: Duration, now: Instant) -> &BTreeSet<Name> {
        // Who is named stays so until it answers: else its egress IPs could come back to it as soon as they have left it.
        self.nodes.retain(|node| dead.contains(node));
        if !stranded {
            self.due = None;
        } else if *self.due.get_or_insert(now + PATIENCE + spread) <= now {
            self.nodes.clone_from(dead);
        }
        &self.nodes
    }
}

impl Node {
    /// The gateway nodes that others are to hear of.
    pub(super) fn unreachable(&mut self) -> BTreeSet<Name> {
        let allocations = &self.view.allocations;
        let used =
            self.uses.values().flat_map(|used| &used.allocations).filter_map(|id| allocations.allocations.get(id));
        let stranded = used.filter(|allocation| allocation.managed && !allocation.placed);
        let stranded = stranded.filter(|allocation| matches!(allocation.state, AllocationState::Remote(_))).count() > 0;
        // Of each other, gateway nodes say at once who does not answer.
        let stranded = stranded && !allocations.is_gateway && !self.seen.dead.is_empty();
        let [.., high, low] = mac::of_node(&self.options.name);
        let turn = f64::from(u16::from_be_bytes([high, low])) / f64::from(u16::MAX);
        let nodes = u32::try_from(self.cluster.nodes.len()).unwrap_or(u32::MAX);
        let spread = (PACE * nodes).mul_f64(turn);
        self.unreachable.judge(&self.seen.dead, stranded, spread, Instant::now()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> BTreeSet<Name> {
        all.iter().copied().map(Into::into).collect()
    }

    #[test]
    fn what_lasts_is_said_until_the_node_answers() {
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
    fn what_others_take_over_is_not_said() {
        let (mut of, begin, dead) = (Unreachable::default(), Instant::now(), names(&["g1"]));
        for n in 0..10 {
            let at = begin + PATIENCE * n;
            assert!(of.judge(&dead, true, Duration::ZERO, at).is_empty());
            assert!(of.judge(&dead, false, Duration::ZERO, at + PATIENCE / 2).is_empty());
        }
    }
}
