//! A node's roles: which connections it sends to which nodes, and from which nodes it accepts which connections.

use super::kept::Owners;
use super::message::Changed;
use crate::datapath::ruleset::PeerIndexes;
use crate::model::marks::{EgressId, MAX_PEER, Marks};
use egret_nft::conntrack::Tracked;
use egret_nft::mac::Mac;
use egret_nft::rule::protocol::{TCP, UDP};
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// This node's roles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The tunnel device's index.
    pub device: u32,
    /// The source address of messages. `None` if the tunnel carries no IPv6, and no messages are possible.
    pub source: Option<Ipv6Addr>,
    /// This node's tunnel MAC address.
    pub mac: Mac,
    /// The egress IPs that this node owns or may come to own.
    pub addresses: HashMap<IpAddr, Role>,
    /// The other nodes' indexes in connection marks.
    pub peers: PeerIndexes,
    /// All addresses of this node, which no pod has.
    pub own: BTreeSet<IpAddr>,
    /// The owners of the egress IPs that this node's pods use.
    pub owners: Owners,
}

/// This node's role for one egress IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// The egress IP's id.
    pub allocation: EgressId,
    /// Whether this node is the owner.
    pub owns: bool,
    /// The other nodes that are or just were the owner.
    pub owners: Vec<Mac>,
    /// The health addresses of the other nodes that may become the owner.
    pub members: Arc<[Ipv6Addr]>,
}

impl Roles {
    /// Whether this node is the egress IP's owner.
    pub fn owns(&self, address: &IpAddr) -> bool {
        self.addresses.get(address).is_some_and(|role| role.owns)
    }

    /// The connection to send for an entry in this node's table, if it is to be replicated.
    pub fn replicated(&self, tracked: &Tracked, marks: Marks) -> Option<Changed> {
        let role = self.addresses.get(&tracked.back.destination).filter(|role| role.owns)?;
        let known = matches!(tracked.out.protocol, TCP | UDP);
        if !known || tracked.is_over || !tracked.has_changed_port() {
            return None;
        }
        let source_node = if tracked.mark & marks.connection_kind_mask() == marks.connection_of_peer(0) {
            let index = (tracked.mark & u32::from(MAX_PEER)) as u16;
            *self.peers.iter().find(|(_, peer)| **peer == index)?.0
        } else {
            (tracked.mark == marks.connection(role.allocation)).then_some(self.mac)?
        };
        let (address, port) = (tracked.back.destination, tracked.back.ports[1]);
        Some(Changed { out: tracked.out, address, port, source_node })
    }

    /// The mark of a connection that `from` has sent. `None` if that node is no owner of its egress IP.
    pub fn mark(&self, from: Mac, changed: &Changed, marks: Marks) -> Option<u32> {
        let role = self.addresses.get(&changed.address).filter(|role| role.owners.contains(&from))?;
        if !self.can_be(changed) {
            return None;
        }
        if changed.source_node == self.mac {
            return Some(marks.connection(role.allocation));
        }
        self.peers.get(&changed.source_node).map(|index| marks.connection_of_peer(*index))
    }

    /// The mark of a connection that kept its port and that `from` has sent. `None` if its pod is not on that node,
    /// or this node is not the owner of its egress IP.
    pub fn mark_of_kept(&self, from: Mac, changed: &Changed, marks: Marks) -> Option<u32> {
        let counts = changed.source_node == from && self.owns(&changed.address);
        if !counts || changed.port != changed.out.ports[0] || !self.can_be(changed) {
            return None;
        }
        self.peers.get(&from).map(|index| marks.connection_of_peer(*index))
    }

    /// Whether a pod can have this connection.
    fn can_be(&self, changed: &Changed) -> bool {
        let Changed { out, address, port, .. } = changed;
        let same_family = [out.source, out.destination].iter().all(|a| a.is_ipv4() == address.is_ipv4());
        let has_ports = matches!(out.protocol, TCP | UDP) && *port != 0 && !out.ports.contains(&0);
        same_family && has_ports && !self.own.contains(&out.source) && !self.own.contains(&out.destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use egret_nft::conntrack::Tuple;

    const OWNER: Mac = [2, 0x65, 0x67, 0, 0, 1];
    const HERE: Mac = [2, 0x65, 0x67, 0, 0, 2];
    const SOURCE: Mac = [2, 0x65, 0x67, 0, 0, 3];

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn roles(owns: bool) -> Roles {
        let role = Role { allocation: 5, owns, owners: vec![OWNER], members: Arc::new([]) };
        Roles {
            mac: HERE,
            addresses: [(address("192.0.2.50"), role)].into(),
            peers: [(OWNER, 1), (SOURCE, 2)].into(),
            own: [address("192.0.2.22")].into(),
            ..Roles::default()
        }
    }

    fn changed() -> Changed {
        let out = Tuple {
            source: address("10.244.1.5"),
            destination: address("198.51.100.7"),
            protocol: TCP,
            ports: [40_000, 443],
        };
        Changed { out, address: address("192.0.2.50"), port: 1025, source_node: SOURCE }
    }

    #[test]
    fn only_the_owners_plausible_connections_are_accepted() {
        let (roles, marks, told) = (roles(false), Marks::default(), changed());
        assert_eq!(roles.mark(OWNER, &told, marks), Some(marks.connection_of_peer(2)));
        let here = Changed { source_node: HERE, ..told };
        assert_eq!(roles.mark(OWNER, &here, marks), Some(marks.connection(5)));
        assert_eq!(roles.mark(SOURCE, &told, marks), None, "another node's word");
        let with = |change: &dyn Fn(&mut Changed)| {
            let mut other = told;
            change(&mut other);
            roles.mark(OWNER, &other, marks)
        };
        assert_eq!(with(&|c| c.address = address("192.0.2.51")), None, "an egress IP that this node cannot have");
        assert_eq!(with(&|c| c.source_node = [2, 0x65, 0x67, 0, 0, 9]), None, "a pod of an unknown node");
        assert_eq!(with(&|c| c.out.source = address("192.0.2.22")), None, "this node's own connection");
        assert_eq!(with(&|c| c.out.destination = address("2001:db8::1")), None, "two families");
        assert_eq!(with(&|c| c.out.protocol = 132), None, "no TCP or UDP");
        assert_eq!(with(&|c| c.port = 0), None, "no port");
    }

    #[test]
    fn kept_ports_are_accepted_only_from_the_pods_node_and_only_by_the_owner() {
        let (marks, kept) = (Marks::default(), Changed { port: 40_000, ..changed() });
        let mark = |owns, from, kept: &Changed| roles(owns).mark_of_kept(from, kept, marks);
        assert_eq!(mark(true, SOURCE, &kept), Some(marks.connection_of_peer(2)));
        assert_eq!(mark(false, SOURCE, &kept), None, "this node is not the owner");
        assert_eq!(mark(true, OWNER, &kept), None, "another node's pod, though it was the owner");
        let of_unknown = Changed { source_node: [9; 6], ..kept };
        assert_eq!(mark(true, [9; 6], &of_unknown), None, "an unknown node");
        assert_eq!(mark(true, HERE, &Changed { source_node: HERE, ..kept }), None, "this node itself");
        assert_eq!(mark(true, SOURCE, &changed()), None, "that port is not for the pod's node to choose");
        let own = Tuple { source: address("192.0.2.22"), ..kept.out };
        assert_eq!(mark(true, SOURCE, &Changed { out: own, ..kept }), None, "this node's own connection");
        assert_eq!(roles(false).mark(SOURCE, &kept, marks), None, "it is no owner's word of changed ports");
    }

    #[test]
    fn the_owner_replicates_only_live_connections_with_a_changed_port() {
        let marks = Marks::default();
        let wanted = changed();
        let back = Tuple { destination: wanted.address, ports: [443, 1025], ..wanted.out.reversed() };
        let mark = marks.connection_of_peer(2);
        let tracked = Tracked { out: wanted.out, back, mark, timeout: 9, is_over: false, is_established: true };
        assert_eq!(roles(true).replicated(&tracked, marks), Some(wanted));
        assert_eq!(roles(false).replicated(&tracked, marks), None, "not the owner");
        let own = Tracked { mark: marks.connection(5), ..tracked };
        assert_eq!(roles(true).replicated(&own, marks), Some(Changed { source_node: HERE, ..wanted }));
        let none = [
            Tracked { mark: 0, ..tracked },
            Tracked { mark: marks.connection_of_peer(9), ..tracked },
            Tracked { mark: marks.connection(6), ..tracked },
            Tracked { is_over: true, ..tracked },
            Tracked { back: Tuple { ports: [443, 40_000], ..back }, ..tracked },
        ];
        assert!(none.iter().all(|other| roles(true).replicated(other, marks).is_none()));
    }
}
