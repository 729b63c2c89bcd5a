//! The family of the tunnel's outer packets. The whole cluster uses one.
//!
//! A node whose tunnel address is of another family than the others' reaches none of them. The nodes of a cluster may
//! list their InternalIPs in different orders, so each node computes the family from what all of them see.

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

    /// The tunnel family of the cluster.
    ///
    /// It is the family that most nodes' tunnel addresses have now, if most nodes have an InternalIP of it: a running
    /// tunnel is not torn down because a node joins or changes its status. Otherwise it is the family that more nodes
    /// have; of both, the one that more nodes list first; else IPv4.
    pub fn of_cluster(cluster: &Cluster) -> Self {
        let nodes = || cluster.nodes.values();
        let having = |family: Self| nodes().filter(|node| family.is_of(node)).count();
        let first = |family: Self| nodes().filter(|node| internal(node).next().map(Self::of) == Some(family)).count();
        let all = cluster.nodes.len();
        let in_use = Self::of_ends(cluster, None).filter(|family| 2 * having(*family) > all);
        let v6_is_better = (having(Self::V6), first(Self::V6)) > (having(Self::V4), first(Self::V4));
        in_use.unwrap_or(if v6_is_better { Self::V6 } else { Self::V4 })
    }

    /// The family of most other nodes' tunnel addresses, if at least two other nodes have one.
    pub fn of_others(cluster: &Cluster, node: &str) -> Option<Self> {
        Self::of_ends(cluster, Some(node))
    }

    fn of_ends(cluster: &Cluster, but: Option<&str>) -> Option<Self> {
        let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(&**name));
        let others = nodes.filter(|(name, _)| but.is_none_or(|but| ***name != *but));
        let ends: Vec<Self> = others.filter_map(|(_, status)| status.tunnel_address.map(Self::of)).collect();
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

/// The InternalIPs of a node, in the order of the API.
pub fn internal(node: &Node) -> impl Iterator<Item = IpAddr> {
    node.addresses.iter().take(node.internal).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::egress_node::EgressNode;
    use std::sync::Arc;

    /// The family of a cluster of nodes with these InternalIPs and tunnel addresses.
    fn family(nodes: &[(&[&str], Option<&str>)]) -> TunnelFamily {
        let mut cluster = Cluster::default();
        for (at, (addresses, end)) in nodes.iter().enumerate() {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let node = Node { internal: addresses.len(), addresses: addresses.into(), ..Node::default() };
            cluster.nodes.insert(format!("n{at}").into(), Arc::new(node));
            let mut status = EgressNode::default();
            status.tunnel_address = end.map(|a| a.parse().unwrap());
            cluster.egress_nodes.insert(format!("n{at}").into(), Arc::new(status));
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
