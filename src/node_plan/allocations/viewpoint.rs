//! The allocations of one gateway from a node's point of view.

use super::allocation::is_here;
use super::peer_reports::PeerReports;
use super::{AllocationState, Assignment, End, Facts, NodeAllocation, Placing, Role};
use crate::api::{Allocation, AllocationKind, FastPath, Placement};
use crate::model::bandwidth::Bandwidth;
use crate::model::capacity::Capacity;
use crate::model::marks::{EgressId, MAX_UPLINK};
use crate::model::ownership::{self, Liveness, OwnershipInputs};
use crate::model::selector::Name;
use crate::model::spread::Near;
use crate::model::text::few;
use crate::model::uplink_key::UplinkKey;
use crate::model::{Cluster, Gateway};
use arcstr::literal;
use std::collections::BTreeMap;

/// The point of view from which allocations of one gateway are computed.
pub(super) struct Viewpoint<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) node: &'a str,
    pub(super) name: &'a Name,
    pub(super) gateway: &'a Gateway,
    pub(super) members: &'a [Name],
    /// Whether this node matches the gateway's nodeSelector.
    pub(super) selected: bool,
    /// Whether this node no longer exists in the cluster: other nodes take over what it holds, and ignore its status.
    pub(super) gone: bool,
    /// `None`: this node has no index left for the next hop of the gateway.
    pub(super) uplink: Option<u16>,
    pub(super) facts: &'a Facts,
    pub(super) ends: &'a BTreeMap<&'a str, End<'a>>,
}

/// The owners of a gateway's egress IPs, computed together.
pub(super) struct OwnersTogether {
    owners: BTreeMap<EgressId, Option<Name>>,
    /// The same if this node were dead; empty if nobody asks.
    without_this_node: BTreeMap<EgressId, Option<Name>>,
}

/// Sets the weights of the gateway's nodes. Returns the largest number of egress IPs of those that have one.
pub(super) fn capacities(
    cluster: &Cluster,
    gateway: &Gateway,
    members: &[Name],
    liveness: &mut Liveness,
) -> BTreeMap<Name, u32> {
    let known = members.iter().filter_map(|name| Some((name, Capacity::of(gateway, cluster.nodes.get(name)?))));
    let known: Vec<(&Name, Capacity)> = known.collect();
    let weighted = known.iter().filter(|(_, capacity)| capacity.weight != 1);
    liveness.weights = weighted.map(|(name, capacity)| (Name::clone(name), capacity.weight)).collect();
    liveness.full.clear();
    known.into_iter().filter_map(|(name, capacity)| Some((name.clone(), capacity.most?))).collect()
}

impl Viewpoint<'_> {
    /// What determines the owner, without the lists that [`Viewpoint::inputs`] refers to: the nodes that have taken it
    /// over, and the uplinks that it needs.
    fn lists<'b>(
        &'b self,
        entry: &Allocation,
        reports: &PeerReports<'b>,
        liveness: &Liveness,
    ) -> (Vec<&'b str>, Vec<UplinkKey>) {
        let takers = match () {
            () if self.gateway.placement == Placement::External => {
                let here = is_here(&entry.address, entry.id, self.facts);
                self.reporters(entry, reports, liveness, here)
            }
            () if entry.kind != AllocationKind::Node => reports.takers(entry),
            () => Vec::new(),
        };
        let (interface, probed) = (self.gateway.uplink_name(), self.gateway.probed());
        (takers, UplinkKey::with_probes(&entry.address, interface.as_ref(), self.name, probed).collect())
    }

    /// What determines the owner.
    fn inputs<'b>(
        &'b self,
        entry: &'b Allocation,
        reports: &PeerReports,
        (takers, needs): &'b (Vec<&'b str>, Vec<UplinkKey>),
    ) -> OwnershipInputs<'b> {
        let here = is_here(&entry.address, entry.id, self.facts);
        let managed = self.gateway.placement == Placement::Managed && entry.kind != AllocationKind::Node;
        OwnershipInputs {
            id: entry.id,
            node: entry.node.as_deref(),
            leaving: entry.leaving.as_deref().filter(|_| managed),
            arrived: entry.node.as_deref().is_some_and(|n| reports.holds(n, entry.id, here)),
            takers,
            // An address that Egret does not place does not move with the allocation.
            members: if managed { self.members } else { &[] },
            needs: if managed { needs } else { &[] },
        }
    }

    /// The owners of the gateway's egress IPs where nodes have a maximum; `None`: they have none, and each egress IP has
    /// its owner whatever the others have.
    pub(super) fn together(
        &self,
        reports: &PeerReports,
        liveness: &mut Liveness,
        most: &BTreeMap<Name, u32>,
    ) -> Option<OwnersTogether> {
        if most.is_empty() || self.gateway.placement != Placement::Managed {
            return None;
        }
        let is_managed = |entry: &&Allocation| !matches!(entry.kind, AllocationKind::Node | AllocationKind::Unknown);
        let entries = || self.gateway.status.allocations.iter().filter(is_managed);
        let lists: Vec<_> = entries().map(|entry| self.lists(entry, reports, liveness)).collect();
        let inputs = entries().zip(&lists).map(|(entry, lists)| (entry.id, self.inputs(entry, reports, lists)));
        let inputs: BTreeMap<EgressId, OwnershipInputs> = inputs.collect();
        let owners = |liveness: &mut Liveness| {
            let owners = ownership::owners(&inputs, liveness, most).into_iter();
            owners.map(|(id, owner)| (id, owner.map(Name::from))).collect()
        };
        let is_asked = entries().any(|entry| self.facts.relinquished.contains(&entry.id));
        let without_this_node = if is_asked {
            let mut without = liveness.clone();
            without.dead.insert(self.node.into());
            owners(&mut without)
        } else {
            BTreeMap::new()
        };
        Some(OwnersTogether { owners: owners(liveness), without_this_node })
    }

    pub(super) fn allocation(
        &self,
        entry: &Allocation,
        reports: &PeerReports,
        liveness: &Liveness,
        together: Option<&OwnersTogether>,
    ) -> NodeAllocation {
        let Viewpoint { node, gateway, facts, .. } = *self;
        let here = is_here(&entry.address, entry.id, facts);
        let external = gateway.placement == Placement::External;
        let managed = !external && entry.kind != AllocationKind::Node;
        let is_known = entry.kind != AllocationKind::Unknown;
        let by_allocations = is_known && entry.node.as_deref() == Some(node);
        let leaves = is_known && entry.leaving.as_deref() == Some(node);
        let member = is_known && (self.selected || managed && (by_allocations || leaves || here));

        let lists = self.lists(entry, reports, liveness);
        let standing = self.inputs(entry, reports, &lists);
        let (interface, probed) = (gateway.uplink_name(), gateway.probed());
        let owner = match together.and_then(|together| together.owners.get(&entry.id)) {
            Some(owner) => owner.as_deref(),
            None => ownership::owner(standing, liveness).filter(|_| is_known),
        };
        let mine = owner == Some(node);
        let arriving = by_allocations && standing.leaving.is_some() && liveness.is_alive(node);
        let placing = match owner {
            _ if !managed || !member => Placing::Never,
            _ if self.gone => Placing::Leave,
            _ if arriving && !standing.arrived => Placing::TakeHanded,
            Some(_) if mine && standing.leaving.is_some_and(|old| liveness.is_alive(old)) => Placing::TakeHanded,
            Some(_) if mine => Placing::Take,
            Some(other) if !reports.holds(other, entry.id, false) && !reports.refuses(other, entry.id) => Placing::Keep,
            None if entry.node.is_some() => Placing::Keep,
            _ => Placing::Leave,
        };
        let state = if mine && facts.relinquished.contains(&entry.id) {
            // The status of the node that took over has not arrived. It must be the first one in the order of the
            // allocation, without this node.
            let mut without = liveness.clone();
            without.dead.insert(node.into());
            let owner = match together.and_then(|together| together.without_this_node.get(&entry.id)) {
                Some(owner) => owner.as_deref(),
                None => ownership::owner(standing, &without),
            };
            self.state(entry, owner, liveness, member, here)
        } else {
            self.state(entry, owner, liveness, member, here)
        };
        let unready = matches!(state, AllocationState::Unready(_));
        let announces = entry.service.is_some() && state == AllocationState::Local;
        let refused = facts.refused.contains_key(&entry.id);
        let unassigned = managed && facts.unassigned.contains(&entry.id);
        let from = standing.leaving.filter(|old| by_allocations && *old != node && liveness.is_alive(old));
        let role = match () {
            () if !member => Role::Source,
            () if self.uplink.is_some() && if managed { !refused && !unassigned } else { !unready } => Role::Translator,
            () => Role::Member,
        };
        let assignment = match () {
            () if by_allocations => Assignment::Here,
            // An address that the host has on its own was not taken over by Egret.
            () if mine && managed && here && !refused && !leaves => Assignment::TakenOver,
            () => Assignment::Elsewhere,
        };
        NodeAllocation {
            gateway: self.name.clone(),
            address: entry.address.clone(),
            service: entry.service.clone(),
            state,
            role,
            placement: if managed { Placement::Managed } else { Placement::External },
            handed_to: entry.node.as_deref().filter(|_| leaves).and_then(|next| self.ends.get(next)).map(|end| end.mac),
            handed_by: from.and_then(|old| self.ends.get(old)).map(|end| end.mac),
            answers_ping: managed && gateway.answer_ping,
            fast_path: gateway.fast_path == FastPath::Auto,
            ordinal: entry.ordinal,
            owner_holds: owner.is_some_and(|owner| reports.holds(owner, entry.id, here)) || announces,
            is_held: reports.any_holds(entry.id, here),
            near: Near::of(self.cluster, node, owner),
            placing,
            assignment,
            since: entry.since,
            routed: managed && gateway.is_routed(),
            unassigned,
            interface,
            probed,
            dscp: None,
            bandwidth: Bandwidth::default(),
            uplink: self.uplink.unwrap_or_default(),
        }
    }

    /// That no node can take an egress IP over, and what to do.
    fn no_room(&self, liveness: &Liveness) -> String {
        let full = liveness.full.iter().filter(|name| liveness.is_alive(name));
        format!(
            "the nodes of gateway {} that answer hold as many egress IPs as they may: {}; raise maxEgressIPs in its \
             spec.capacity, or add a node",
            self.name,
            few(full, 3)
        )
    }

    /// External placement: this node if it has the address on an interface. Otherwise the nodes that report so, unless
    /// the node that the allocation names is one of them.
    fn reporters<'b>(
        &'b self,
        entry: &Allocation,
        reports: &PeerReports,
        liveness: &Liveness,
        here: bool,
    ) -> Vec<&'b str> {
        if here && self.selected {
            return vec![self.node];
        }
        let has = |name: &&str| liveness.is_alive(name) && reports.has_address(name, entry.id, here);
        if entry.node.as_deref().is_some_and(|node| has(&node)) {
            return Vec::new();
        }
        self.members.iter().map(|name| &**name).filter(has).collect()
    }

    fn state(
        &self,
        entry: &Allocation,
        owner: Option<&str>,
        liveness: &Liveness,
        member: bool,
        here: bool,
    ) -> AllocationState {
        let name = self.name;
        let unready = |text: String| AllocationState::Unready(text.into());
        let (managed, external) = (entry.kind != AllocationKind::Node, self.gateway.placement == Placement::External);
        match owner {
            None if entry.kind == AllocationKind::Unknown => AllocationState::Unready(literal!(
                "it is of a kind that this version of egretd does not know; upgrade egretd on this node"
            )),
            None => unready(match &entry.node {
                None if let Some(service) = &entry.service => {
                    format!("no node of gateway {name} announces the address of Service {service}")
                }
                None if managed && !liveness.full.is_empty() => self.no_room(liveness),
                None => format!(
                    "gateway {name} has no node for it; label a node so that it matches the gateway's nodeSelector"
                ),
                Some(node) if managed && liveness.full.iter().any(|full| liveness.is_alive(full)) => {
                    format!("node {node} does not answer, and {}", self.no_room(liveness))
                }
                Some(node) if managed && !external => {
                    format!("node {node} does not answer, nor does any other node of gateway {name}")
                }
                Some(node) => format!("node {node} does not answer, and its address is on no other node"),
            }),
            Some(owner) if owner == self.node => match self.facts.refused.get(&entry.id) {
                Some(why) => unready(why.clone()),
                None if self.uplink.is_none() => unready(format!(
                    "node {owner} already has {MAX_UPLINK} next hops of gateways, the most that are possible"
                )),
                // The node may announce a Service's address that is on no interface.
                None if external && !here && entry.service.is_none() => {
                    AllocationState::Unready(literal!("its address is on no node of the gateway"))
                }
                None if self.facts.unassigned.contains(&entry.id) => {
                    AllocationState::Unready(literal!("the assign hook has not brought its address to this node yet"))
                }
                None if !member => unready(format!("this node no longer belongs to gateway {name}")),
                None if managed && !external && !here && !self.facts.coming.contains(&entry.id) => {
                    // Until the address is here, packets go to the node before, as they did.
                    let before = entry.node.as_deref().and_then(|node| self.ends.get(node));
                    before.filter(|_| entry.node.as_deref() != Some(self.node)).map_or_else(
                        || AllocationState::Unready(literal!("its address is being put onto the uplink")),
                        |end| AllocationState::Remote(end.mac),
                    )
                }
                None => AllocationState::Local,
            },
            Some(owner) => match self.ends.get(owner) {
                Some(end) => AllocationState::Remote(end.mac),
                None => unready(format!("node {owner} has not reported its tunnel address; is egretd running there?")),
            },
        }
    }
}
