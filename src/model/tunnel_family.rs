//! IPv4 or IPv6 for the tunnel's outer packets: the cluster's decision, not each node's.
//!
//! A node whose end is of the other family than the others' reaches nobody. Nodes in one cluster may list their InternalIPs in
//! different orders, so each must come to the same family from what all of them see.

use crate::model::{Cluster, Node};
use std::fmt;
use std::net::IpAddr;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl TunnelFamily {
    const BOTH: [TunnelFamily; 2] = [TunnelFamily::V4, TunnelFamily::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { TunnelFamily::V4 } else { TunnelFamily::V6 }
    }

    /// The family that most nodes' ends have now, if most nodes have an address of it: a tunnel that runs is not torn down
    /// because a node joins, or says something else of itself than before. Else the one that all nodes have; of both or none,
    /// the one that more nodes have, that more nodes name first, IPv4.
    pub fn of_cluster(cluster: &Cluster) -> Self {
        let nodes = || cluster.nodes.values();
        let having = |family: Self| nodes().filter(|node| family.is_of(node)).count();
        let first = |family: Self| nodes().filter(|node| internal(node).next().map(Self::of) == Some(family)).count();
        let all = cluster.nodes.len();
        let in_use = Self::of_ends(cluster, None).filter(|family| 2 * having(*family) > all);
        let v6_is_better = (having(Self::V6), first(Self::V6)) > (having(Self::V4), first(Self::V4));
        in_use.unwrap_or(if v6_is_better { Self::V6 } else { Self::V4 })
    }

    /// The family of most nodes' ends, but for one node's, if there are two others.
    pub fn of_others(cluster: &Cluster, node: &str) -> Option<Self> {
        Self::of_ends(cluster, Some(node))
    }

    fn of_ends(cluster: &Cluster, but: Option<&str>) -> Option<Self> {
        let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(&**name));
        let others = nodes.filter(|(name, _)| but.is_none_or(|but| ***name != *but));
        let ends: Vec<Self> = others.filter_map(|(_, said)| said.tunnel_address.map(Self::of)).collect();
        let most = |family: &Self| 2 * ends.iter().filter(|end| *end == family).count() > ends.len();
        Self::BOTH.into_iter().find(most).filter(|_| but.is_none() || ends.len() > 1)
    }

    fn is_of(self, node: &Node) -> bool {
        internal(node).any(|address| Self::of(address) == self)
    }
}

impl fmt::Display for TunnelFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TunnelFamily::V4 => "IPv4",
            TunnelFamily::V6 => "IPv6",
        })
    }
}

/// A node's InternalIPs, in the API's order.
pub fn internal(node: &Node) -> impl Iterator<Item = IpAddr> {
    node.addresses.iter().take(node.internal).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::egress_node::EgressNode;
    use std::sync::Arc;

    /// Nodes with these InternalIPs, and the ends of the tunnel that they say they have.
    fn family(nodes: &[(&[&str], Option<&str>)]) -> TunnelFamily {
        let mut cluster = Cluster::default();
        for (at, (addresses, end)) in nodes.iter().enumerate() {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let node = Node { internal: addresses.len(), addresses: addresses.into(), ..Node::default() };
            cluster.nodes.insert(format!("n{at}").into(), Arc::new(node));
            let mut said = EgressNode::default();
            said.tunnel_address = end.map(|a| a.parse().unwrap());
            cluster.egress_nodes.insert(format!("n{at}").into(), Arc::new(said));
        }
        TunnelFamily::of_cluster(&cluster)
    }

    const FOUR: &[&str] = &["192.0.2.1"];
    const SIX: &[&str] = &["2001:db8::1"];
    const FOUR_SIX: &[&str] = &["192.0.2.1", "2001:db8::1"];
    const SIX_FOUR: &[&str] = &["2001:db8::1", "192.0.2.1"];

    #[test]
    fn a_new_cluster_takes_the_family_that_all_nodes_have() {
        let of = |nodes: &[&'static [&'static str]]| family(&nodes.iter().map(|a| (*a, None)).collect::<Vec<_>>());
        assert_eq!(of(&[FOUR, FOUR_SIX, SIX_FOUR, SIX_FOUR]), TunnelFamily::V4);
        assert_eq!(of(&[SIX, FOUR_SIX, FOUR_SIX]), TunnelFamily::V6);
        assert_eq!(of(&[FOUR_SIX, FOUR_SIX, SIX_FOUR]), TunnelFamily::V4, "of both, the one that more name first");
        assert_eq!(of(&[SIX_FOUR, FOUR_SIX, SIX_FOUR]), TunnelFamily::V6);
        assert_eq!(of(&[SIX_FOUR, FOUR_SIX]), TunnelFamily::V4);
        assert_eq!(of(&[SIX, SIX, FOUR]), TunnelFamily::V6, "no family is all nodes': the one that more have");
        assert_eq!(of(&[]), TunnelFamily::V4);
    }

    #[test]
    fn a_tunnel_that_runs_stays_of_its_family() {
        let four = (FOUR_SIX, Some("192.0.2.1"));
        assert_eq!(family(&[four, four, (SIX, None)]), TunnelFamily::V4, "a node joins that has the other one only");
        assert_eq!(family(&[four, four, (SIX_FOUR, Some("2001:db8::1"))]), TunnelFamily::V4);
        assert_eq!(family(&[four, (FOUR_SIX, Some("2001:db8::1")), (SIX, None)]), TunnelFamily::V6, "no majority");
        let moved = (SIX, Some("192.0.2.1"));
        assert_eq!(family(&[moved, moved, four]), TunnelFamily::V6, "most nodes have lost their addresses of it");
    }
}
