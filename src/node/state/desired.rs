//! The desired state, computed from the inputs alone.

use super::NodeDaemon;
use super::steps::{Input, Step};
use crate::model::Cluster;
use crate::node::Options;
use crate::node_plan::View;
use crate::node_plan::allocations::Facts;
use ipnetwork::IpNetwork;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// All that the desired state depends on.
pub(super) struct Inputs<'a> {
    pub(super) cluster: &'a Cluster,
    /// What the node has observed about itself, and about the liveness of others.
    pub(super) facts: &'a Facts,
    /// This node's name.
    pub(super) node: &'a str,
    /// Destinations that no policy covers, besides the cluster's own.
    pub(super) direct: &'a [IpNetwork],
    /// The addresses of this node's pods.
    pub(super) pods: BTreeSet<IpAddr>,
}

/// Brings `view` to the desired state. A part whose inputs have not changed keeps its value. Returns whether the
/// allocations or the networks have changed. Most changes are of policies alone, and then only pods' chains have to
/// be compared.
pub(super) fn desired(view: &mut View, inputs: Inputs) -> bool {
    let (allocations, networks) = (view.allocations.mark(), view.networks.mark());
    let Inputs { cluster, facts, node, direct, pods } = inputs;
    view.update(cluster, node, facts, direct, pods);
    !view.allocations.has(&allocations) || !view.networks.has(&networks)
}

impl NodeDaemon {
    /// The step [`View`](Step::View).
    pub(super) fn refresh_view(&mut self) {
        self.update_liveness_facts();
        let pods = self.pods.addresses().collect();
        let Options { name, direct, .. } = &self.options;
        let inputs = Inputs { cluster: &self.cluster, facts: &self.facts, node: name, direct, pods };
        if desired(&mut self.view, inputs) {
            self.host.view(&self.view);
            self.pending.raise(Input::Host);
        }
        self.pending.drop_step(Step::Allocations);
        let unknown = !self.view.networks.pods_are_known && self.cluster.nodes.len() > 1;
        self.problems.set_unknown_networks(unknown);
    }

    /// The step [`Allocations`](Step::Allocations).
    pub(super) fn refresh_allocations(&mut self) {
        self.update_liveness_facts();
        self.view.update_allocations(&self.cluster, &self.options.name, &self.facts);
        self.host.view(&self.view);
    }

    /// Updates the facts about the liveness of other nodes and of this one.
    fn update_liveness_facts(&mut self) {
        self.facts.dead.clone_from(&self.liveness.dead);
        self.facts.lost.clone_from(&self.liveness.lost);
        self.egress.holding.note(&self.options.name.as_str().into(), &mut self.facts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Allocate, EgressPolicySpec};
    use crate::fixture::{World, asking};

    #[test]
    fn equal_inputs_make_an_equal_state_and_no_change() {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", asking(Allocate::Dedicated));
        world.allocate();
        let facts = Facts::default();
        let pods = BTreeSet::from([[10, 1, 0, 9].into()]);
        let inputs = |cluster| Inputs { cluster, facts: &facts, node: "n1", direct: &[], pods: pods.clone() };
        let (mut once, mut again) = (View::default(), View::default());
        assert!(desired(&mut once, inputs(&world.cluster)) && desired(&mut again, inputs(&world.cluster)));
        assert_eq!((&once.allocations, &once.networks), (&again.allocations, &again.networks));
        assert!(!desired(&mut once, inputs(&world.cluster)), "nothing has changed");
        assert_eq!(once.allocations, again.allocations);
    }

    #[test]
    fn a_change_of_facts_changes_the_allocations_and_nothing_else() {
        let mut world = World::new(&["192.0.2.50"]);
        world.policy("a/p", asking(Allocate::Dedicated));
        world.allocate();
        let mut view = View::default();
        fn inputs<'a>(world: &'a World, facts: &'a Facts) -> Inputs<'a> {
            Inputs { cluster: &world.cluster, facts, node: "n1", direct: &[], pods: BTreeSet::new() }
        }
        desired(&mut view, inputs(&world, &Facts::default()));
        let before = view.clone();
        let facts = Facts { addresses: [[192, 0, 2, 50].into()].into(), ..Facts::default() };
        assert!(desired(&mut view, inputs(&world, &facts)));
        assert!(view.policies.is(&before.policies) && view.networks.is(&before.networks));
        assert_ne!(view.allocations, before.allocations);
    }
    #[test]
    fn a_policy_changes_the_allocations_only_by_its_dscp() {
        let mut world = World::new(&["192.0.2.50"]);
        let spec = |priority, dscp| EgressPolicySpec { priority, dscp, ..asking(Allocate::Dedicated) };
        world.policy("a/p", spec(0, None));
        world.allocate();
        let mut view = View::default();
        let facts = Facts::default();
        let mut change = |world: &World| {
            let inputs =
                Inputs { cluster: &world.cluster, facts: &facts, node: "n1", direct: &[], pods: BTreeSet::new() };
            let changed = desired(&mut view, inputs);
            (changed, view.allocations.allocations.values().map(|allocation| allocation.dscp).collect::<Vec<_>>())
        };
        assert_eq!(change(&world), (true, vec![None]));
        for (priority, dscp, changed) in [(1, None, false), (1, Some(46), true), (2, Some(46), false), (2, None, true)]
        {
            world.policy("a/p", spec(priority, dscp));
            assert_eq!(change(&world), (changed, vec![dscp]), "{priority} {dscp:?}");
        }
    }
}
