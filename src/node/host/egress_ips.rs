//! The egress IPs on their uplinks, and the health addresses in the tunnel.

use super::{Digest, Host};
use crate::datapath::addresses::{self, InterfaceAddress};
use crate::datapath::announce::{self, LinkAddress};
use crate::datapath::names::{HEALTH, is_health, of_mac, of_uplink};
use crate::datapath::uplink::{Interface, Uplinks};
use crate::model::marks::EgressId;
use crate::model::selector::Name;
use crate::model::uplink_key::{UplinkKey, is_on_vlan};
use crate::node_plan::allocations::{Facts, NodeAllocation};
use crate::node_plan::{View, addresses};
use anyhow::Result;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// The largest number of addresses in a line of the log.
const NAMED: usize = 6;
/// How often, and at which interval, new egress IPs are announced. By the last announcement the former owner, if it
/// lives, has given up the address; its kernel may have answered other hosts until then.
const ANNOUNCEMENTS: u32 = 5;
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_millis(150);

/// An egress IP, and the uplink that its gateway names.
pub(super) type AddressKey = (IpAddr, Option<Name>);

/// The desired addresses of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The allocations whose egress IPs are to be on this node.
    pub allocations: BTreeSet<EgressId>,
    /// The allocations among them that another node owns until this one does.
    pub moving: BTreeSet<EgressId>,
    /// Addresses of those allocations that have not been probed and are not to be added yet.
    pub unasked: BTreeSet<IpAddr>,
    /// Whether any uplink works; then the node has its health address.
    pub health: bool,
    /// The uplinks whose health addresses the node has.
    pub uplinks: BTreeSet<UplinkKey>,
    /// The uplinks that are lost because a gateway's probes fail. The node has none of their health addresses.
    pub failed_probes: BTreeSet<UplinkKey>,
}

/// An uplink that this node cannot use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    pub key: UplinkKey,
    /// Whether the interface exists and is down.
    pub down: bool,
    /// The reason.
    pub why: String,
}

/// The present interfaces of the egress IPs.
#[derive(Debug, Default)]
pub struct UplinkStatus {
    found: HashMap<AddressKey, Interface>,
    none: HashMap<AddressKey, String>,
    /// Allocations with an address that cannot be an egress IP of this host, with the reason.
    pub unusable: BTreeMap<EgressId, String>,
}

fn key(address: &IpAddr, interface: &Option<Name>) -> UplinkKey {
    UplinkKey { interface: interface.clone(), ipv4: address.is_ipv4(), gateway: None }
}

impl UplinkStatus {
    /// A status in which one interface is found for these addresses, whose gateways name none.
    #[cfg(test)]
    pub fn of(interface: &Interface, addresses: &[IpAddr]) -> Self {
        let found = addresses.iter().map(|a| ((*a, None), interface.clone())).collect();
        UplinkStatus { found, ..UplinkStatus::default() }
    }

    /// A status in which the interface that gateways name is found for these addresses.
    #[cfg(test)]
    pub fn of_named(name: &str, interface: &Interface, addresses: &[IpAddr]) -> Self {
        let found = addresses.iter().map(|a| ((*a, Some(name.into())), interface.clone())).collect();
        UplinkStatus { found, ..UplinkStatus::default() }
    }

    /// A status in which no interface is found for these addresses.
    #[cfg(test)]
    pub fn none_for(addresses: &[IpAddr]) -> Self {
        let none = addresses.iter().map(|a| ((*a, None), "no interface".to_owned())).collect();
        UplinkStatus { none, ..UplinkStatus::default() }
    }

    /// The union of both.
    #[cfg(test)]
    pub fn and(mut self, other: UplinkStatus) -> Self {
        self.found.extend(other.found);
        self.none.extend(other.none);
        self
    }

    /// The uplinks that do not work, and those that do.
    pub fn judge(&self) -> (Vec<Broken>, BTreeSet<UplinkKey>) {
        let (mut broken, mut works): (BTreeMap<_, (bool, String)>, BTreeSet<_>) = (BTreeMap::new(), BTreeSet::new());
        for ((address, named), interface) in &self.found {
            let key = key(address, named);
            if interface.running {
                works.insert(key);
            } else {
                let why = || (true, format!("interface {} is down or has no carrier", interface.name));
                broken.entry(key).or_insert_with(why);
            }
        }
        for ((address, named), why) in &self.none {
            broken.entry(key(address, named)).or_insert_with(|| (false, why.clone()));
        }
        let broken = broken.into_iter().map(|(key, (down, why))| Broken { key, down, why });
        (broken.collect(), works)
    }

    /// The interfaces on whose links addresses can be probed.
    pub fn askable(&self) -> BTreeMap<u32, Interface> {
        let found = self.found.values().filter(|interface| interface.running && interface.mac.is_some());
        found.map(|interface| (interface.ifindex, interface.clone())).collect()
    }

    /// Whether an allocation's address has an interface that works.
    pub fn is_usable(&self, address: IpAddr, allocation: &NodeAllocation) -> bool {
        self.interface(address, allocation).is_some_and(|interface| interface.running)
    }

    /// The interface of an allocation's address, if there is one.
    pub fn interface(&self, address: IpAddr, allocation: &NodeAllocation) -> Option<&Interface> {
        self.found.get(&(address, allocation.interface.clone()))
    }

    /// Whether some of an allocation's addresses have a working interface and others have not.
    pub fn is_partial(&self, allocation: &NodeAllocation) -> bool {
        let usable = addresses(allocation).filter(|address| self.is_usable(*address, allocation)).count();
        usable > 0 && usable < addresses(allocation).count()
    }

    /// Whether the allocation is partial, and this node has all of its usable addresses.
    pub fn is_served(&self, allocation: &NodeAllocation, facts: &Facts) -> bool {
        let mut usable = addresses(allocation).filter(|address| self.is_usable(*address, allocation));
        self.is_partial(allocation) && usable.all(|address| facts.addresses.contains(&address))
    }

    /// Whether the allocation's addresses, or at least the usable ones, can be probed on the link, or other nodes can be
    /// asked for them.
    pub fn can_ask(&self, allocation: &NodeAllocation) -> bool {
        self.is_partial(allocation)
            || addresses(allocation).all(|address| self.interface(address, allocation).is_some())
    }

    /// Records that these addresses have no uplink.
    pub(super) fn lose(&mut self, spots: impl Iterator<Item = AddressKey>, why: &str) {
        for key in spots {
            self.found.remove(&key);
            self.none.insert(key, why.to_owned());
        }
    }

    /// The health addresses of a node with this tunnel MAC address for these uplinks, and that of the node if none is
    /// missing.
    fn health(&self, desired: &Desired, mac: Mac) -> impl Iterator<Item = Ipv6Addr> {
        let uplinks = &desired.uplinks;
        let spots = self.found.keys().chain(self.none.keys());
        let lost = spots.map(|(address, named)| key(address, named)).filter(|key| !uplinks.contains(key));
        let lost: BTreeSet<u16> = lost.chain(desired.failed_probes.iter().cloned()).map(|key| key.code()).collect();
        let all = lost.is_empty().then(|| of_mac(HEALTH, mac));
        let codes: BTreeSet<u16> = uplinks.iter().map(UplinkKey::code).collect();
        codes.into_iter().filter(move |code| !lost.contains(code)).map(move |code| of_uplink(code, mac)).chain(all)
    }

    /// The addresses of allocations with the interfaces on which to probe and to announce them.
    pub fn targets(&self, view: &View, allocations: &BTreeSet<EgressId>) -> Vec<(EgressId, LinkAddress)> {
        let of_allocations =
            view.candidates().filter(|(id, _, allocation)| allocations.contains(id) && !allocation.routed);
        let of_allocations = of_allocations
            .filter(|(_, address, allocation)| !self.is_partial(allocation) || self.is_usable(*address, allocation));
        let found = of_allocations.filter_map(|(id, address, allocation)| {
            let interface = self.interface(address, allocation)?.clone();
            Some((id, LinkAddress { address, interface, claim: None }))
        });
        found.collect()
    }
}

impl Host {
    /// Finds the interfaces of the addresses of all allocations that this node may come to own.
    pub async fn uplink_status(&mut self, view: &View) -> Result<UplinkStatus> {
        let mut uplinks_now = UplinkStatus::default();
        let members: Vec<_> =
            view.allocations.allocations.iter().filter(|(_, allocation)| allocation.is_member()).collect();
        if !members.is_empty() {
            let mut uplinks = Uplinks::read(&self.routes).await?;
            for (id, allocation) in members {
                for address in addresses(allocation) {
                    if let Some(why) = uplinks.unusable(address).filter(|_| allocation.is_managed()) {
                        uplinks_now.unusable.entry(*id).or_insert(why);
                    }
                    let key = (address, allocation.interface.clone());
                    let found = match self.vlans.refusal(&key) {
                        Some(why) => Err(why.to_owned()),
                        None => {
                            let found = uplinks.find(address, allocation.interface.as_deref()).await;
                            found.map_err(|e| format!("{e:#}"))
                        }
                    };
                    match found {
                        Ok(interface) => match without_next_hop(view, &interface, address, allocation) {
                            Some(why) => drop(uplinks_now.none.insert(key, why)),
                            None => drop(uplinks_now.found.insert(key, interface)),
                        },
                        Err(why) => drop(uplinks_now.none.insert(key, why)),
                    }
                }
            }
        }
        self.uplinks = uplinks_now.found.values().map(|interface| interface.ifindex).collect();
        self.route_device(view, &mut uplinks_now).await?;
        Ok(uplinks_now)
    }

    /// Adds the desired egress IPs to the uplinks, removes others, and announces new ones. Returns the number of
    /// changes, and the allocations that could not be placed.
    pub async fn sync_egress_ips(
        &mut self,
        view: &View,
        uplinks_now: &UplinkStatus,
        desired: &Desired,
    ) -> Result<(usize, BTreeMap<EgressId, String>)> {
        let candidates = view.candidates().filter(|(id, _, _)| desired.allocations.contains(id));
        let of_key: BTreeMap<AddressKey, (EgressId, bool)> = candidates
            .map(|(id, a, allocation)| ((a, allocation.interface.clone()), (id, allocation.routed)))
            .collect();
        let interfaces: Vec<_> = of_key.keys().map(|key| uplinks_now.found.get(key).map(|i| i.ifindex)).collect();
        let digest = Digest::new(&(
            &of_key,
            (interfaces, self.route_device.index()),
            &desired.unasked,
            desired.health,
            (&desired.uplinks, &desired.failed_probes),
        ));
        if self.egress_ips == Some(digest) {
            return Ok((0, BTreeMap::new()));
        }
        let (mut wanted, mut refused): (BTreeSet<InterfaceAddress>, _) = (BTreeSet::new(), BTreeMap::new());
        let mut of_address: HashMap<IpAddr, (EgressId, &Interface)> = HashMap::new();
        let mut announced: BTreeSet<IpAddr> = BTreeSet::new();
        for (key, (id, routed)) in of_key.iter().filter(|(key, _)| !desired.unasked.contains(&key.0)) {
            match (uplinks_now.found.get(key), uplinks_now.none.get(key)) {
                (Some(interface), _) => {
                    let device = self.route_device.index().filter(|_| *routed);
                    wanted.insert((key.0, device.unwrap_or(interface.ifindex)));
                    of_address.insert(key.0, (*id, interface));
                    announced.extend(routed.then_some(key.0));
                }
                // The other family serves until this one is back.
                (None, _)
                    if view
                        .allocations
                        .allocations
                        .get(id)
                        .is_some_and(|allocation| uplinks_now.is_partial(allocation)) => {}
                (None, why) => drop(refused.insert(*id, why.cloned().unwrap_or_default())),
            }
        }
        if let (Some((tunnel, device)), true) = (&self.tunnel, desired.health && self.speaks_ipv6()) {
            let mac = tunnel.mac;
            wanted.extend(uplinks_now.health(desired, mac).map(|address| (address.into(), *device)));
        }
        // Before the addresses, so that nobody answers ARP for them.
        let mut changed = self.leave_unanswered(&announced).await?;
        let announce = |added: &[InterfaceAddress]| {
            let new = added
                .iter()
                .filter(|(address, _)| !announced.contains(address))
                .filter_map(|(address, _)| Some((*address, of_address.get(address)?.1)));
            announce_repeatedly(
                new.map(|(address, i)| LinkAddress { address, interface: i.clone(), claim: None }).collect(),
            );
        };
        let changes = addresses::sync_and_tell(&self.routes, &wanted, self.route_device.index(), announce).await?;
        changed += self.answer_again(&announced).await?;
        log_addresses("added to this node", changes.added.iter().map(|(address, _)| *address));
        log_addresses("removed from this node", changes.removed.iter().map(|(address, _)| *address));
        self.faults.addresses.clear();
        for ((address, _), e) in &changes.refused {
            match of_address.get(address) {
                Some((id, _)) => {
                    refused.insert(*id, format!("{address} cannot be added to the uplink: {e:#}"));
                }
                None => drop(self.faults.addresses.insert("health address".to_owned(), format!("{e:#}"))),
            }
        }
        let stuck = changes.stuck.iter().map(|((address, _), e)| (format!("address {address}"), format!("{e:#}")));
        self.faults.addresses.extend(stuck);
        self.egress_ips = (refused.is_empty() && self.faults.addresses.is_empty()).then_some(digest);
        Ok((changed + changes.added.len() + changes.removed.len(), refused))
    }
}

impl Host {
    /// Announces allocations' addresses again.
    pub fn announce_again(&self, view: &View, uplinks_now: &UplinkStatus, allocations: &BTreeSet<EgressId>) {
        announce_repeatedly(targets(view, uplinks_now, allocations));
    }

    /// Announces the addresses of allocations before they are added. To add a thousand takes a second, and servers'
    /// packets need not wait for that: the kernel translates them back before it checks whether the address is local.
    pub fn announce_ahead(&self, view: &View, uplinks_now: &UplinkStatus, allocations: &BTreeSet<EgressId>) {
        if !allocations.is_empty() {
            announce_once(&targets(view, uplinks_now, allocations));
        }
    }
}

fn has_next_hop(view: &View, address: IpAddr, allocation: &NodeAllocation) -> bool {
    let uplink = usize::from(allocation.uplink).checked_sub(1).and_then(|at| view.allocations.uplinks.get(at));
    let hops = uplink.map(|uplink| uplink.next_hop).unwrap_or_default();
    if address.is_ipv4() { hops.0.is_some() } else { hops.1.is_some() }
}

/// Why the interface needs a next hop that the gateway does not have. Without one, packets would be routed by the main table,
/// which leads neither into a VRF nor by the interface of a VLAN that Egret has made.
fn without_next_hop(
    view: &View,
    interface: &Interface,
    address: IpAddr,
    allocation: &NodeAllocation,
) -> Option<String> {
    let name = &interface.name;
    let (why, link) = match () {
        () if interface.is_in_vrf() => ("is in a VRF, whose routes Egret does not use", "VRF"),
        () if is_on_vlan(allocation.interface.as_deref()) => ("is one of a VLAN, which needs a router", "VLAN"),
        () => return None,
    };
    if has_next_hop(view, address, allocation) {
        return None;
    }
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    Some(format!("interface {name} {why} for {address}; set the gateway's nextHop.{family} to a router in the {link}"))
}

fn targets(view: &View, uplinks_now: &UplinkStatus, allocations: &BTreeSet<EgressId>) -> Vec<LinkAddress> {
    uplinks_now.targets(view, allocations).into_iter().map(|(_, target)| target).collect()
}

/// Logs egress IPs, at most the first six.
fn log_addresses(what: &str, addresses: impl Iterator<Item = IpAddr>) {
    let all: Vec<IpAddr> = addresses.filter(|a| !matches!(a, IpAddr::V6(a) if is_health(*a))).collect();
    if all.is_empty() {
        return;
    }
    let names: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
    let more = if all.len() > NAMED { ", ..." } else { "" };
    tracing::info!(count = all.len(), addresses = names.join(", ") + more, "egress IPs {what}");
}

/// Announces addresses several times in the background. A host that missed the frames would send to the former owner.
pub(super) fn announce_repeatedly(targets: Vec<LinkAddress>) {
    if targets.is_empty() {
        return;
    }
    tokio::spawn(async move {
        for _ in 0..ANNOUNCEMENTS {
            announce_once(&targets);
            tokio::time::sleep(ANNOUNCEMENT_INTERVAL).await;
        }
    });
}

fn announce_once(targets: &[LinkAddress]) {
    if let Err(e) = announce::announce(targets) {
        tracing::warn!("cannot announce egress IPs, and other hosts may take a while to find them: {e:#}");
    }
}
