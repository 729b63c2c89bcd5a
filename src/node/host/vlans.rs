//! The interfaces of VLANs that gateways name by `vlan`.

use super::Host;
use super::egress_ips::AddressKey;
use crate::datapath::addresses::local_addresses;
use crate::datapath::uplink::{Interface, Uplinks};
use crate::datapath::vlan::{self, Vlan};
use crate::model::uplink_key::is_on_vlan;
use crate::node_plan::{View, addresses};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of the interfaces of VLANs.
#[derive(Debug, Default)]
pub(super) struct Vlans {
    /// Whether it is known that there is none of Egret's.
    are_absent: bool,
    /// Why there is none that can be used, by the address and the uplink's name.
    refused: BTreeMap<AddressKey, String>,
}

impl Vlans {
    /// Makes the next reconciliation look for own interfaces.
    pub(super) fn invalidate(&mut self) {
        self.are_absent = false;
    }

    /// Why the VLAN's interface for an egress IP cannot be used.
    pub(super) fn refusal(&self, key: &AddressKey) -> Option<&str> {
        self.refused.get(key).map(String::as_str)
    }
}

impl Host {
    /// Makes the VLANs' interfaces that this node needs to hold egress IPs, before it holds any, and removes own ones that it
    /// does not need and on which no egress IP is left. What cannot be made is the fault of one uplink. Returns the number of
    /// changes.
    pub async fn vlans(&mut self, view: &View) -> Result<usize> {
        let allocations = view.allocations.allocations.values();
        let on_vlan = allocations.filter(|a| a.is_member() && is_on_vlan(a.interface.as_deref()));
        let spots = on_vlan.flat_map(|allocation| addresses(allocation).map(|a| (a, allocation.interface.clone())));
        let spots: BTreeSet<AddressKey> = spots.collect();
        self.vlans.refused.clear();
        if spots.is_empty() && self.vlans.are_absent {
            return Ok(0);
        }
        let mut all = vlan::all(&self.routes).await?;
        let mut uplinks = Uplinks::read(&self.routes).await?;
        // A gateway can have 10,000 addresses on one VLAN.
        let mut needed: BTreeMap<(u32, u16), (Interface, Vec<AddressKey>)> = BTreeMap::new();
        for key in spots {
            let (address, uplink) = &key;
            match uplinks.named(uplink.as_deref().unwrap_or_default(), address.is_ipv4()).await {
                Ok(Some((parent, Some(id)))) => {
                    needed.entry((parent.ifindex, id)).or_insert_with(|| (parent, Vec::new())).1.push(key);
                }
                // The step that reads the uplinks says what is missing.
                Ok(_) => {}
                Err(e) => drop(self.vlans.refused.insert(key, format!("{e:#}"))),
            }
        }
        let mut changes = 0;
        for ((_, id), (parent, spots)) in &needed {
            let ipv6 = spots.iter().any(|(address, _)| address.is_ipv6());
            match self.vlan(&mut all, parent, *id, ipv6).await {
                Ok(done) => changes += done,
                Err(e) => {
                    let why = format!("{e:#}");
                    self.vlans.refused.extend(spots.iter().map(|key| (key.clone(), why.clone())));
                }
            }
        }
        let is_needed = |vlan: &&Vlan| vlan.parent.is_some_and(|parent| needed.contains_key(&(parent, vlan.id)));
        let (own, unneeded): (Vec<_>, Vec<_>) = all.iter().filter(|vlan| vlan.is_ours()).partition(is_needed);
        let removed = self.remove_vlans(&unneeded).await?;
        self.vlans.are_absent = own.is_empty() && removed == unneeded.len();
        Ok(changes + removed)
    }

    /// The interface of one VLAN. Returns the number of changes.
    async fn vlan(&self, all: &mut Vec<Vlan>, parent: &Interface, id: u16, ipv6: bool) -> Result<usize> {
        let find = |all: &[Vlan]| all.iter().find(|vlan| vlan.is_of(parent.ifindex, id)).cloned();
        let (mut found, mut changes) = (find(all), 0);
        if found.is_none() {
            vlan::make(&self.routes, parent, id).await?;
            *all = vlan::all(&self.routes).await?;
            (found, changes) = (find(all), 1);
            if let Some(vlan) = found.as_ref().filter(|vlan| vlan.is_ours()) {
                tracing::info!(interface = vlan.name, parent = parent.name, vlan = id, "made the interface of a VLAN");
            }
        }
        let found = found.ok_or_else(|| vlan::name_is_taken(parent, id))?;
        if found.is_ours() {
            changes += usize::from(vlan::adjust(&self.routes, &found, ipv6).await?);
        }
        Ok(changes)
    }

    /// Removes those on which no egress IP is left. Returns how many.
    async fn remove_vlans(&mut self, unneeded: &[&Vlan]) -> Result<usize> {
        self.faults.vlans.clear();
        if unneeded.is_empty() {
            return Ok(0);
        }
        let held = local_addresses(&self.routes).await?;
        let is_held = |vlan: &Vlan| held.iter().any(|address| address.ifindex == vlan.ifindex && address.is_ours());
        let mut removed = 0;
        for vlan in unneeded.iter().filter(|vlan| !is_held(vlan)) {
            match vlan::remove(&self.routes, vlan).await {
                Ok(()) => {
                    tracing::info!(
                        interface = vlan.name,
                        "removed the interface of a VLAN that no gateway of this node names"
                    );
                    removed += 1;
                }
                Err(e) => drop(self.faults.vlans.insert(format!("interface {}", vlan.name), format!("{e:#}"))),
            }
        }
        Ok(removed)
    }
}
