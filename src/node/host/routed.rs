//! The egress IPs that this node's own router announces: their device, and that nobody answers ARP for them.

use super::Host;
use super::egress_ips::UplinkStatus;
use crate::datapath::{route_device, unanswered};
use crate::node_plan::{View, addresses};
use anyhow::Result;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

/// What is known of the device for these egress IPs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum RouteDevice {
    /// It must be looked for.
    #[default]
    Unknown,
    /// There is none.
    Absent,
    /// It is there, with this index.
    Present(u32),
}

impl RouteDevice {
    /// Its index, if it is there.
    pub(super) fn index(self) -> Option<u32> {
        match self {
            RouteDevice::Present(index) => Some(index),
            RouteDevice::Unknown | RouteDevice::Absent => None,
        }
    }
}

impl Host {
    /// Creates the device on a node that may come to hold such egress IPs, before it holds any, and removes it from other
    /// nodes. Without it, these egress IPs have no uplink here.
    pub(super) async fn route_device(&mut self, view: &View, uplinks_now: &mut UplinkStatus) -> Result<()> {
        let allocations = view.allocations.allocations.values();
        let routed: Vec<_> = allocations.filter(|a| a.routed && a.is_member()).collect();
        match self.route_device {
            RouteDevice::Present(_) if !routed.is_empty() => return Ok(()),
            RouteDevice::Absent if routed.is_empty() => return Ok(()),
            _ => {}
        }
        if routed.is_empty() {
            route_device::remove(&self.routes).await?;
            self.route_device = RouteDevice::Absent;
            return Ok(());
        }
        match route_device::ensure(&self.routes).await {
            Ok(index) => self.route_device = RouteDevice::Present(index),
            Err(e) => {
                self.route_device = RouteDevice::Unknown;
                let all = routed.iter().flat_map(|a| addresses(a).map(|address| (address, a.interface.clone())));
                uplinks_now.lose(all, &format!("{e:#}"));
            }
        }
        Ok(())
    }

    /// Keeps this node from answering ARP for these addresses. Returns the number of changes.
    pub(super) async fn leave_unanswered(&mut self, announced: &BTreeSet<IpAddr>) -> Result<usize> {
        let there = self.unanswered().await?;
        let new: Vec<Ipv4Addr> = ipv4(announced).filter(|address| !there.contains(address)).collect();
        let added = unanswered::add(&self.routes, new.iter().copied()).await?;
        self.unanswered.get_or_insert_default().extend(new);
        Ok(added)
    }

    /// Ends that for all other addresses. Returns the number of changes.
    pub(super) async fn answer_again(&mut self, announced: &BTreeSet<IpAddr>) -> Result<usize> {
        let mut former = self.unanswered().await?;
        former.retain(|address| !announced.contains(&IpAddr::V4(*address)));
        let removed = unanswered::remove(&self.routes, former.iter().copied()).await?;
        self.unanswered.get_or_insert_default().retain(|address| !former.contains(address));
        Ok(removed)
    }

    async fn unanswered(&mut self) -> Result<BTreeSet<Ipv4Addr>> {
        if self.unanswered.is_none() {
            self.unanswered = Some(unanswered::read(&self.routes).await?);
        }
        Ok(self.unanswered.clone().unwrap_or_default())
    }
}

fn ipv4(addresses: &BTreeSet<IpAddr>) -> impl Iterator<Item = Ipv4Addr> {
    addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}
