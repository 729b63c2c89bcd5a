//! The family of the tunnel's outer packets. The whole cluster uses one.
//!
//! A node whose tunnel address is of another family than the others' reaches none of them. The nodes of a cluster may
//! list their InternalIPs in different orders, so each node computes the family from what all of them see.

use crate::model::{Cluster, Node};
use egret_nft::Family;
use std::net::IpAddr;

/// The tunnel family of the cluster.
///
/// It is the family that most nodes' tunnel addresses have now, if most nodes have an InternalIP of it: a running
/// tunnel is not torn down because a node joins or changes its status. Otherwise it is the family that more nodes
/// have; of both, the one that more nodes list first; else IPv4.
pub fn of_cluster(cluster: &Cluster) -> Family {
    let nodes = || cluster.nodes.values();
    let having = |family: Family| nodes().filter(|node| is_of(family, node)).count();
    let first = |family: Family| {
        nodes().filter(|node| internal(node).next().map(|address| Family::of(&address)) == Some(family)).count()
    };
    let all = cluster.nodes.len();
    let in_use = of_ends(cluster, None).filter(|family| 2 * having(*family) > all);
    let v6_is_better = (having(Family::V6), first(Family::V6)) > (having(Family::V4), first(Family::V4));
    in_use.unwrap_or(if v6_is_better { Family::V6 } else { Family::V4 })
}

/// The family of most other nodes' tunnel addresses, if at least two other nodes have one.
pub fn of_others(cluster: &Cluster, node: &str) -> Option<Family> {
    of_ends(cluster, Some(node))
}

fn of_ends(cluster: &Cluster, but: Option<&str>) -> Option<Family> {
    let nodes = cluster.egress_nodes.iter().filter(|(name, _)| cluster.nodes.contains_key(&**name));
    let others = nodes.filter(|(name, _)| but.is_none_or(|but| ***name != *but));
    let ends: Vec<Family> =
        others.filter_map(|(_, status)| status.tunnel_address.map(|address| Family::of(&address))).collect();
    let most = |family: &Family| 2 * ends.iter().filter(|end| *end == family).count() > ends.len();
    Family::BOTH.into_iter().find(most).filter(|_| but.is_none() || ends.len() > 1)
}

fn is_of(family: Family, node: &Node) -> bool {
    internal(node).any(|address| Family::of(&address) == family)
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
    fn family(nodes: &[(&[&str], Option<&str>)]) -> Family {
        let mut cluster = Cluster::default();
        for (at, (addresses, end)) in nodes.iter().enumerate() {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let node = Node { internal: addresses.len(), addresses: addresses.into(), ..Node::default() };
            cluster.nodes.insert(format!("n{at}").into(), Arc::new(node));
            let mut status = EgressNode::default();
            status.tunnel_address = end.map(|a| a.parse().unwrap());
            cluster.egress_nodes.insert(format!("n{at}").into(), Arc::new(status));
        }
        of_cluster(&cluster)
    }

    const FOUR: &[&str] = &["192.0.2.1"];
    const SIX: &[&str] = &["2001:db8::1"];
    const FOUR_SIX: &[&str] = &["192.0.2.1", "2001:db8::1"];
    const SIX_FOUR: &[&str] = &["2001:db8::1", "192.0.2.1"];

    #[test]
    fn a_new_cluster_takes_the_family_that_all_nodes_have() {
        let of = |nodes: &[&'static [&'static str]]| family(&nodes.iter().map(|a| (*a, None)).collect::<Vec<_>>());
        assert_eq!(of(&[FOUR, FOUR_SIX, SIX_FOUR, SIX_FOUR]), Family::V4);
        assert_eq!(of(&[SIX, FOUR_SIX, FOUR_SIX]), Family::V6);
        assert_eq!(of(&[FOUR_SIX, FOUR_SIX, SIX_FOUR]), Family::V4, "of both, the one that more name first");
        assert_eq!(of(&[SIX_FOUR, FOUR_SIX, SIX_FOUR]), Family::V6);
        assert_eq!(of(&[SIX_FOUR, FOUR_SIX]), Family::V4);
        assert_eq!(of(&[SIX, SIX, FOUR]), Family::V6, "no family is all nodes': the one that more have");
        assert_eq!(of(&[]), Family::V4);
    }

    #[test]
    fn a_tunnel_that_runs_stays_of_its_family() {
        let four = (FOUR_SIX, Some("192.0.2.1"));
        assert_eq!(family(&[four, four, (SIX, None)]), Family::V4, "a node joins that has the other one only");
        assert_eq!(family(&[four, four, (SIX_FOUR, Some("2001:db8::1"))]), Family::V4);
        assert_eq!(family(&[four, (FOUR_SIX, Some("2001:db8::1")), (SIX, None)]), Family::V6, "no majority");
        let moved = (SIX, Some("192.0.2.1"));
        assert_eq!(family(&[moved, moved, four]), Family::V6, "most nodes have lost their addresses of it");
    }
}
