//! This node's part in what owners of egress IPs tell others of connections whose port was changed.

use super::Node;
use crate::datapath::names::{HEALTH, of_mac};
use crate::model::mac::Mac;
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::shared::Mark;
use crate::node::changed_ports::{Holder, Holders, Role, Roles};
use crate::node_plan::addresses;
use crate::node_plan::allocations::{AllocationState, NodeAllocation, NodeAllocations};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;
use std::sync::Arc;

/// What the part was last made of.
#[derive(Debug, Default)]
pub(super) struct MadeOf {
    allocations: Mark<NodeAllocations>,
    end: Option<(u32, Ipv6Addr)>,
    handed: Vec<(EgressId, Mac)>,
}

impl Node {
    /// Says what this node's part is from now on, if it is another one.
    pub(super) fn set_roles(&mut self) {
        let end = self.host.asking();
        if end.is_none() && self.host.tunnel_end().is_none() {
            // The tunnel is being looked at.
            return;
        }
        let handed: Vec<(EgressId, Mac)> = self.handed.iter().map(|(id, (mac, _))| (*id, *mac)).collect();
        let of = &self.roles_of;
        if self.view.allocations.has(&of.allocations) && (of.end, &of.handed) == (end, &handed) {
            return;
        }
        self.roles_of = MadeOf { allocations: self.view.allocations.mark(), end, handed };
        self.changed_ports.set_roles(self.roles());
    }

    fn roles(&self) -> Roles {
        let (allocations, asking) = (&self.view.allocations, self.host.asking());
        let mut members: HashMap<&Name, Arc<[Ipv6Addr]>> = HashMap::new();
        let mut all = HashMap::new();
        for (id, allocation) in allocations.allocations.iter().filter(|(_, allocation)| allocation.member) {
            let members = members.entry(&allocation.gateway).or_insert_with(|| self.others(&allocation.gateway));
            let remote = match allocation.state {
                AllocationState::Remote(mac) => Some(mac),
                _ => None,
            };
            let before = self.handed.get(id).map(|(mac, _)| *mac);
            let role = Role {
                allocation: *id,
                owns: allocation.state == AllocationState::Local,
                owners: remote.into_iter().chain(allocation.handed_by).chain(before).collect(),
                members: members.clone(),
            };
            all.extend(addresses(allocation).map(|address| (address, role.clone())));
        }
        let mac = self.host.tunnel_end().map(|end| end.mac).unwrap_or_default();
        Roles {
            device: asking.map_or(0, |(device, _)| device),
            asking: asking.map(|(_, source)| source),
            mac,
            addresses: all,
            peers: self.host.peer_indexes().clone(),
            own: self.facts.addresses.clone(),
            holders: holders(&allocations.allocations, mac),
        }
    }

    /// Where the gateway's other nodes hear, as far as they can hold addresses.
    fn others(&self, gateway: &Name) -> Arc<[Ipv6Addr]> {
        let nodes = self.view.allocations.gateway_nodes.get(gateway).into_iter().flatten();
        let others = nodes.filter(|name| ***name != *self.options.name);
        let hears = |name: &Name| {
            let status = self.cluster.egress_nodes.get(name)?;
            status.tunnel_mac.filter(|_| status.answers).map(|mac| of_mac(HEALTH, mac))
        };
        others.filter_map(hears).collect()
    }
}

/// Who owns each egress IP; `own`: this node.
fn holders(allocations: &BTreeMap<EgressId, NodeAllocation>, own: Mac) -> Holders {
    let owned = allocations.iter().filter_map(|(id, allocation)| {
        let owner = match allocation.state {
            AllocationState::Local => own,
            AllocationState::Remote(mac) => mac,
            AllocationState::Unready(_) => return None,
        };
        Some((*id, Holder { owner, address: allocation.address.clone() }))
    });
    owned.collect()
}
