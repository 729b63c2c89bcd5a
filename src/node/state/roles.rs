//! This node's roles in the replication of connections with a changed port.

use super::NodeDaemon;
use crate::datapath::names::{HEALTH, of_mac};
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::shared::Mark;
use crate::node::changed_ports::{EgressOwner, Owners, Role, Roles};
use crate::node_plan::addresses;
use crate::node_plan::allocations::{AllocationState, NodeAllocation, NodeAllocations};
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;
use std::sync::Arc;

/// The inputs from which the roles were last computed.
#[derive(Debug, Default)]
pub(super) struct RoleInputs {
    allocations: Mark<NodeAllocations>,
    end: Option<(u32, Ipv6Addr)>,
    handed: Vec<(EgressId, Mac)>,
}

impl NodeDaemon {
    /// Computes the roles anew if their inputs have changed, and passes them to the replication thread.
    pub(super) fn set_roles(&mut self) {
        let end = self.host.prober();
        if end.is_none() && self.host.tunnel_end().is_none() {
            // The tunnel device is being repaired.
            return;
        }
        let handed: Vec<(EgressId, Mac)> = self.egress.handovers.to_here().collect();
        let of = &self.connections.roles_of;
        if self.view.allocations.has(&of.allocations) && (of.end, &of.handed) == (end, &handed) {
            return;
        }
        self.connections.roles_of = RoleInputs { allocations: self.view.allocations.mark(), end, handed };
        self.connections.changed_ports.set_roles(self.roles());
    }

    fn roles(&self) -> Roles {
        let (allocations, asking) = (&self.view.allocations, self.host.prober());
        let mut members: HashMap<&Name, Arc<[Ipv6Addr]>> = HashMap::new();
        let mut all = HashMap::new();
        for (id, allocation) in allocations.allocations.iter().filter(|(_, allocation)| allocation.is_member()) {
            let members = members.entry(&allocation.gateway).or_insert_with(|| self.others(&allocation.gateway));
            let remote = match allocation.state {
                AllocationState::Remote(mac) => Some(mac),
                _ => None,
            };
            let before = self.egress.handovers.former_owner(*id);
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
            source: asking.map(|(_, source)| source),
            mac,
            addresses: all,
            peers: self.host.peer_indexes().clone(),
            own: self.facts.addresses.clone(),
            owners: owners(&allocations.allocations, mac),
        }
    }

    /// The health addresses of the gateway's other nodes that can own egress IPs.
    fn others(&self, gateway: &Name) -> Arc<[Ipv6Addr]> {
        let nodes = self.view.allocations.gateway_nodes.get(gateway).into_iter().flatten();
        let others = nodes.filter(|name| ***name != *self.options.name);
        let answering = |name: &Name| {
            let status = self.cluster.egress_nodes.get(name)?;
            status.tunnel_mac.filter(|_| status.answers).map(|mac| of_mac(HEALTH, mac))
        };
        others.filter_map(answering).collect()
    }
}

/// The owner of each egress IP that has one. `own` is this node.
fn owners(allocations: &BTreeMap<EgressId, NodeAllocation>, own: Mac) -> Owners {
    let owned = allocations.iter().filter_map(|(id, allocation)| {
        let owner = match allocation.state {
            AllocationState::Local => own,
            AllocationState::Remote(mac) => mac,
            AllocationState::Unready(_) => return None,
        };
        Some((*id, EgressOwner { owner, address: allocation.address.clone() }))
    });
    owned.collect()
}
