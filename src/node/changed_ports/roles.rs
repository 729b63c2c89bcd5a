//! Who tells whom, and whose word counts.

use super::kept::Holders;
use super::message::Changed;
use crate::datapath::ruleset::PeerIndexes;
use crate::kernel::conntrack::Tracked;
use crate::kernel::nft::rule::protocol::{TCP, UDP};
use crate::model::mac::Mac;
use crate::model::marks::{EgressId, MAX_PEER, Marks};
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// This node's part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The tunnel device's index.
    pub device: u32,
    /// The address that this node tells others from. `None`: the tunnel carries no IPv6, and nobody is told.
    pub asking: Option<Ipv6Addr>,
    /// This node's MAC address in the tunnel.
    pub mac: Mac,
    /// The egress IPs that this node has or may come to have.
    pub addresses: HashMap<IpAddr, Role>,
    /// Other nodes, by the index in the marks of their connections.
    pub peers: PeerIndexes,
    /// All addresses of this node: none of them is a pod's.
    pub own: BTreeSet<IpAddr>,
    /// The egress IPs by which this node's pods leave.
    pub holders: Holders,
}

/// This node's part for one egress IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// The egress IP's id.
    pub allocation: EgressId,
    /// Whether this node is the owner.
    pub owns: bool,
    /// Who else is or just was.
    pub owners: Vec<Mac>,
    /// The health addresses of the others that may come to own it.
    pub members: Arc<[Ipv6Addr]>,
}

impl Roles {
    /// Whether this node is the egress IP's owner.
    pub fn owns(&self, address: &IpAddr) -> bool {
        self.addresses.get(address).is_some_and(|role| role.owns)
    }

    /// What is to be told of a connection in this node's table, if anything is.
    pub fn told(&self, tracked: &Tracked, marks: Marks) -> Option<Changed> {
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

    /// The mark that a connection of which `from` tells has here. `None`: it is not for that node to tell of it.
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

    /// The mark that a connection which has kept its port, and of which `from` tells, has here. `None`: it is not for that
    /// node to tell of it, or not to this one. A node speaks of its own pods alone, and to the owner.
    pub fn mark_of_kept(&self, from: Mac, changed: &Changed, marks: Marks) -> Option<u32> {
        let counts = changed.source_node == from && self.owns(&changed.address);
        if !counts || changed.port != changed.out.ports[0] || !self.can_be(changed) {
            return None;
        }
        self.peers.get(&from).map(|index| marks.connection_of_peer(*index))
    }

    /// Whether a pod can have such a connection.
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
    use crate::kernel::conntrack::Tuple;

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
    fn only_the_owners_word_counts_and_only_of_connections_that_can_be() {
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
    fn a_node_tells_the_owner_of_its_own_pods_connections_that_kept_their_port() {
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
    fn the_owner_tells_of_changed_ports_alone_and_of_what_lives() {
        let marks = Marks::default();
        let wanted = changed();
        let back = Tuple { destination: wanted.address, ports: [443, 1025], ..wanted.out.reversed() };
        let mark = marks.connection_of_peer(2);
        let tracked = Tracked { out: wanted.out, back, mark, timeout: 9, is_over: false, is_established: true };
        assert_eq!(roles(true).told(&tracked, marks), Some(wanted));
        assert_eq!(roles(false).told(&tracked, marks), None, "not the owner");
        let own = Tracked { mark: marks.connection(5), ..tracked };
        assert_eq!(roles(true).told(&own, marks), Some(Changed { source_node: HERE, ..wanted }));
        let none = [
            Tracked { mark: 0, ..tracked },
            Tracked { mark: marks.connection_of_peer(9), ..tracked },
            Tracked { mark: marks.connection(6), ..tracked },
            Tracked { is_over: true, ..tracked },
            Tracked { back: Tuple { ports: [443, 40_000], ..back }, ..tracked },
        ];
        assert!(none.iter().all(|other| roles(true).told(other, marks).is_none()));
    }
}
