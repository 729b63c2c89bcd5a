//! This node's part in what owners of egress IPs tell others of connections whose port was changed.

use super::Node;
use crate::datapath::names::{HEALTH, of_mac};
use crate::model::mac::Mac;
use crate::model::marks::PathId;
use crate::model::selector::Name;
use crate::model::shared::Mark;
use crate::node::changed_ports::{Role, Roles, Way, Ways};
use crate::node_plan::addresses;
use crate::node_plan::allocations::{Path, PathState, Paths};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;
use std::sync::Arc;

/// What the part was last made of.
#[derive(Debug, Default)]
pub(super) struct MadeOf {
    paths: Mark<Paths>,
    end: Option<(u32, Ipv6Addr)>,
    handed: Vec<(PathId, Mac)>,
}

impl Node {
    /// Says what this node's part is from now on, if it is another one.
    pub(super) fn set_roles(&mut self) {
        let end = self.host.asking();
        if end.is_none() && self.host.tunnel_end().is_none() {
            // The tunnel is being looked at.
            return;
        }
        let handed: Vec<(PathId, Mac)> = self.handed.iter().map(|(id, (mac, _))| (*id, *mac)).collect();
        let of = &self.roles_of;
        if self.view.paths.has(&of.paths) && (of.end, &of.handed) == (end, &handed) {
            return;
        }
        self.roles_of = MadeOf { paths: self.view.paths.mark(), end, handed };
        self.changed_ports.set_roles(self.roles());
    }

    fn roles(&self) -> Roles {
        let (paths, asking) = (&self.view.paths, self.host.asking());
        let mut members: HashMap<&Name, Arc<[Ipv6Addr]>> = HashMap::new();
        let mut all = HashMap::new();
        for (id, path) in paths.paths.iter().filter(|(_, path)| path.member) {
            let members = members.entry(&path.gateway).or_insert_with(|| self.others(&path.gateway));
            let remote = match path.state {
                PathState::Remote(mac) => Some(mac),
                _ => None,
            };
            let before = self.handed.get(id).map(|(mac, _)| *mac);
            let role = Role {
                path: *id,
                owns: path.state == PathState::Local,
                owners: remote.into_iter().chain(path.handed_by).chain(before).collect(),
                members: members.clone(),
            };
            all.extend(addresses(path).map(|address| (address, role.clone())));
        }
        let mac = self.host.tunnel_end().map(|end| end.mac).unwrap_or_default();
        Roles {
            device: asking.map_or(0, |(device, _)| device),
            asking: asking.map(|(_, source)| source),
            mac,
            addresses: all,
            peers: self.host.peer_indexes().clone(),
            own: self.facts.addresses.clone(),
            ways: ways(&paths.paths, mac),
        }
    }

    /// Where the gateway's other nodes hear, as far as they can hold addresses.
    fn others(&self, gateway: &Name) -> Arc<[Ipv6Addr]> {
        let nodes = self.view.paths.gateway_nodes.get(gateway).into_iter().flatten();
        let others = nodes.filter(|name| ***name != *self.options.name);
        let hears = |name: &Name| {
            let status = self.cluster.egress_nodes.get(name)?;
            status.tunnel_mac.filter(|_| status.answers).map(|mac| of_mac(HEALTH, mac))
        };
        others.filter_map(hears).collect()
    }
}

/// Who owns each egress IP; `own`: this node.
fn ways(paths: &BTreeMap<PathId, Path>, own: Mac) -> Ways {
    let owned = paths.iter().filter_map(|(id, path)| {
        let owner = match path.state {
            PathState::Local => own,
            PathState::Remote(mac) => mac,
            PathState::Unready(_) => return None,
        };
        Some((*id, Way { owner, address: path.address.clone() }))
    });
    owned.collect()
}
