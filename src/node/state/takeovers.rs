//! Counts the egress IPs that this node has taken over.

use super::NodeDaemon;
use crate::model::Cluster;
use crate::model::marks::EgressId;
use crate::model::uplink_key::UplinkKey;
use crate::node::metrics::TakeoverReason;
use crate::node_plan::allocations::Facts;
use std::collections::BTreeMap;

impl NodeDaemon {
    /// Counts the takeovers since the last pass. An egress IP counts when it is on this node and no other host has
    /// answered for it, and not again when a new daemon finds it.
    pub(super) fn count_takeovers(&mut self) {
        if self.facts.taken == self.egress.counted {
            return;
        }
        let counted = std::mem::replace(&mut self.egress.counted, self.facts.taken.clone());
        let mut new = self.facts.taken.clone();
        new.retain(|id, since| counted.get(id) != Some(since));
        let allocations = &self.view.allocations.allocations;
        let needs =
            |id: EgressId| allocations.get(&id).map(|allocation| allocation.needs().collect()).unwrap_or_default();
        for reason in reasons(&self.cluster, &self.facts, &new, needs) {
            self.metrics.taken_over(reason);
        }
    }
}

/// The reason for each of these takeovers. `needs` are the uplinks that an egress IP needs.
fn reasons(
    cluster: &Cluster,
    facts: &Facts,
    new: &BTreeMap<EgressId, i64>,
    needs: impl Fn(EgressId) -> Vec<UplinkKey>,
) -> Vec<TakeoverReason> {
    let taken = cluster.allocations().filter(|allocation| new.get(&allocation.id) == Some(&allocation.since));
    let reasons = taken.map(|allocation| {
        let Some(node) = &allocation.node else { return TakeoverReason::Other };
        let lost = facts.lost.get(node);
        if facts.dead.contains(node) || !cluster.nodes.contains_key(node) {
            TakeoverReason::OwnerDead
        } else if lost.is_some_and(|lost| needs(allocation.id).iter().any(|need| lost.contains(need))) {
            TakeoverReason::UplinkLost
        } else {
            TakeoverReason::Other
        }
    });
    reasons.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, naming};

    #[test]
    fn the_reason_is_what_is_known_of_the_node_that_the_allocation_names() {
        let mut world = World::new(&["192.0.2.50-192.0.2.52"]);
        world.policy("a/p", naming(&["192.0.2.50"]));
        world.policy("a/q", naming(&["192.0.2.51"]));
        world.allocate();
        let allocations = world.cluster.gateways["g"].status.allocations.clone();
        let taken: BTreeMap<EgressId, i64> = allocations[..1].iter().map(|a| (a.id, a.since)).collect();
        let owner = allocations[0].node.clone().unwrap();
        let needs: Vec<UplinkKey> = UplinkKey::of(&allocations[0].address, None).collect();
        let of = |world: &World, facts: &Facts| reasons(&world.cluster, facts, &taken, |_| needs.clone());

        assert_eq!(of(&world, &Facts::default()), [TakeoverReason::Other]);
        let lost = Facts { lost: [(owner.clone(), needs.iter().cloned().collect())].into(), ..Facts::default() };
        assert_eq!(of(&world, &lost), [TakeoverReason::UplinkLost]);
        let dead = Facts { dead: [owner.clone()].into(), ..lost };
        assert_eq!(of(&world, &dead), [TakeoverReason::OwnerDead]);
        world.without_node(&owner);
        assert_eq!(of(&world, &Facts::default()), [TakeoverReason::OwnerDead]);
        let renewed = taken.iter().map(|(id, since)| (*id, since + 1)).collect();
        assert_eq!(reasons(&world.cluster, &dead, &renewed, |_| needs.clone()), [], "the allocation was renewed since");
    }
}
