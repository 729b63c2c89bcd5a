//! The ruleset as text: a node's tables in nft's own syntax.

#[cfg(test)]
mod tests;

use super::{PeerIndexes, Ruleset, SharedSets, shared_sets};
use crate::model::marks::Marks;
use crate::model::{Cluster, ObjectKey};
use crate::node_plan::NodePlan;
use crate::node_plan::expected::{Expected, NoSuchNode};
use egret_nft::text::Listing;
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::fmt;

/// The tables that a node is expected to load, with the names that they use for pods' interfaces.
pub struct ExpectedRuleset {
    node: String,
    pods: BTreeMap<String, ObjectKey>,
    ruleset: Ruleset,
}

impl ExpectedRuleset {
    /// The tables of `node`, from the cluster's state. `direct` lists destinations that no policy covers, in addition
    /// to the cluster's own. Names and numbers of interfaces and indexes of pods and peers are examples: a node gives
    /// its own.
    ///
    /// # Errors
    /// The cluster has no such node.
    pub fn expected(
        cluster: &Cluster,
        node: &str,
        direct: &[IpNetwork],
        marks: Marks,
    ) -> Result<ExpectedRuleset, NoSuchNode> {
        ExpectedRuleset::with(cluster, node, direct, marks, |_| ())
    }

    /// As [`ExpectedRuleset::expected`]. `tell` completes the plan by what only the node knows.
    ///
    /// # Errors
    /// The cluster has no such node.
    pub fn with(
        cluster: &Cluster,
        node: &str,
        direct: &[IpNetwork],
        marks: Marks,
        tell: impl FnOnce(&mut NodePlan),
    ) -> Result<ExpectedRuleset, NoSuchNode> {
        let Expected { view, mut plan, pods } = Expected::new(cluster, node, direct)?;
        tell(&mut plan);
        let peers: PeerIndexes = view.allocations.peers.keys().copied().zip(1..).collect();
        let shared = shared_sets(&view, &peers, marks, &SharedSets::default());
        Ok(ExpectedRuleset { node: node.to_owned(), pods, ruleset: Ruleset::new(plan, &shared, marks, None) })
    }

    /// The tables.
    pub fn ruleset(&self) -> &Ruleset {
        &self.ruleset
    }
}

impl Ruleset {
    /// The names of pods' interfaces, by index.
    pub fn interfaces(&self) -> BTreeMap<u32, String> {
        self.plan.pods.values().map(|pod| (pod.interface_index, pod.interface.clone())).collect()
    }
}

impl fmt::Display for ExpectedRuleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# What `egretd node` loads on {}.", self.node)?;
        self.pods.iter().try_for_each(|(interface, pod)| writeln!(f, "# {interface} stands for the veth of {pod}."))?;
        writeln!(f)?;
        write!(f, "{}", self.ruleset)
    }
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interfaces = self.interfaces();
        let listing = |(name, table)| Listing { name, table, interfaces: &interfaces };
        self.tables.iter().map(|(name, table)| listing((*name, table))).try_for_each(|listing| write!(f, "{listing}"))
    }
}
