//! Connections that have ended, by a pod's end or by the end of a policy, while the kernel still tracks them.
//!
//! A tracked connection keeps the way that it began with. Left in the table, it would lend its allocation, or the
//! node's address, to the next pod with the same address, and keep the pod on an allocation that it has no more.

use super::changed_ports::Replicas;
use super::pods::{Holder, Pods, Use};
use crate::kernel::conntrack::{self, Connection, EntryAction, MarkFilter};
use crate::kernel::netlink::{NETLINK_NETFILTER, Socket};
use crate::model::marks::{EgressId, Marks};
use crate::model::networks::Networks;
use crate::model::shared::Shared;
use anyhow::Result;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// Which connections are to be forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// All of these addresses: their pods are gone.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of these addresses with the outside: their pods, which are in quarantine, cannot have begun them.
    pub quarantined: BTreeSet<IpAddr>,
    /// All that pods as they are could not have begun: it is not known what they used before this daemon started.
    pub of_earlier: bool,
    /// All whose marks have this upper half: an earlier daemon's were other ones.
    pub of_base: Option<u16>,
    /// Those of these addresses on these allocations.
    allocations: BTreeMap<IpAddr, BTreeSet<EgressId>>,
}

/// What is to be known of the node, to tell connections by.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Egret's marks.
    pub marks: Marks,
    /// What is inside the cluster.
    pub networks: Shared<Networks>,
    /// The networks that this node's pods have their addresses from.
    pub of_pods: Box<[IpNetwork]>,
    /// Addresses in them that are somebody's now.
    pub in_use: HashSet<IpAddr>,
}

impl Ended {
    /// Adds what pods could use before and can no more.
    pub fn uses(&mut self, before: &BTreeMap<Holder, Arc<Use>>, now: &BTreeMap<Holder, Arc<Use>>, pods: &Pods) {
        let none = BTreeSet::new();
        for (holder, old) in before {
            let new = now.get(holder);
            // Pods that are gone are seen to when they go: their addresses may be others' by now.
            if new.is_some_and(|new| Arc::ptr_eq(old, new)) || !pods.has(holder) {
                continue;
            }
            let allocations = new.map_or(&none, |u| &u.allocations);
            let allocations: BTreeSet<EgressId> = old.allocations.difference(allocations).copied().collect();
            if !allocations.is_empty() {
                for address in &old.addresses {
                    self.allocations.entry(*address).or_default().extend(&allocations);
                }
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Ended::default()
    }

    /// Takes them out of the kernel's table. What cannot be taken out is tried again the next time.
    pub async fn forget(&mut self, uses: &BTreeMap<Holder, Arc<Use>>, scene: Scene) {
        let ended = self.clone();
        let possible = self.of_earlier.then(|| Possible::new(uses));
        // A large table takes its time, and the endpoint for metrics and health goes on meanwhile.
        let forgotten = tokio::task::spawn_blocking(move || ended.take_out(&scene, possible.as_ref()));
        match forgotten.await {
            Ok(Ok(n)) => {
                if n > 0 {
                    tracing::info!(entries = n, "connections of allocations or pods that are gone were ended");
                }
                *self = Ended::default();
            }
            Ok(Err(e)) => tracing::error!("the connection table cannot be cleaned: {e:#}"),
            Err(e) => tracing::error!("the connection table cannot be cleaned: {e}"),
        }
    }

    fn take_out(&self, scene: &Scene, possible: Option<&Possible>) -> Result<usize> {
        let marks = scene.marks;
        let ours = MarkFilter { mark: marks.connection(0), mask: marks.connection_kind_mask() };
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let mut forgotten = 0;
        if possible.is_some() || !self.allocations.is_empty() {
            forgotten += conntrack::delete(&mut socket, ours, |c| {
                let allocation = (c.mark & marks.allocation_mask()) as EgressId;
                possible.is_some_and(|possible| !possible.contains(c.source, allocation))
                    || self.allocations.get(&c.source).is_some_and(|p| p.contains(&allocation))
            })?;
        }
        if possible.is_some() {
            let gone = |a: &IpAddr| scene.of_pods.iter().any(|n| n.contains(*a)) && !scene.in_use.contains(a);
            let all = MarkFilter { mark: 0, mask: 0 };
            forgotten += conntrack::delete(&mut socket, all, |c| gone(&c.source) || gone(&c.reply_source))?;
        }
        if let Some(base) = self.of_base {
            let marked = MarkFilter { mark: u32::from(base) << 16, mask: marks.connection_mask() };
            forgotten += conntrack::delete(&mut socket, marked, |_| true)?;
        }
        forgotten += conntrack::delete_by_address(&mut socket, &self.addresses, |_| true)?;
        let is_outside = |c: &Connection| !ours.matches(c) && !scene.networks.is_direct(c.reply_source);
        forgotten += conntrack::delete_by_address(&mut socket, &self.quarantined, is_outside)?;
        Ok(forgotten)
    }
}

/// Takes connections that are translated to another address than their allocation's out of the kernel's table, in the
/// background. Each packet of theirs is dropped and prolongs them, so they would not end by themselves. Those of this
/// node's pods on `local` allocations, whose port was changed, keep it.
pub fn forget_stale(marks: Marks, local: BTreeSet<EgressId>, replicas: Arc<Replicas>) {
    let stale =
        MarkFilter { mark: marks.stale(), mask: marks.connection_of_allocation_mask() | marks.allocation_mask() };
    in_background("connections that are older than their allocations are picked up anew", move |socket| {
        conntrack::update_entries(socket, stale, |c| {
            let heir =
                c.out.and_then(|out| local.iter().find_map(|id| replicas.translation_of(&out, marks.connection(*id))));
            heir.map_or(EntryAction::Delete, |heir| EntryAction::Replace(heir, None))
        })
    });
}

/// Cleans the kernel's table of connections, which may be large, while everything else goes on; and says `what` came
/// of it.
pub fn in_background(what: &'static str, clean: impl FnOnce(&mut Socket) -> Result<usize> + Send + 'static) {
    tokio::task::spawn_blocking(move || {
        let cleaned = Socket::open(NETLINK_NETFILTER).map_err(anyhow::Error::from);
        match cleaned.and_then(|mut socket| clean(&mut socket)) {
            Ok(0) => {}
            Ok(n) => tracing::info!(entries = n, "{what}"),
            Err(e) => tracing::error!("the connection table cannot be cleaned: {e:#}"),
        }
    });
}

/// What pods as they are could have begun.
#[derive(Debug, Default)]
struct Possible {
    /// Connections on these allocations, of each address.
    allocations: HashMap<IpAddr, BTreeSet<EgressId>>,
    /// Any of these addresses: it is not known which policies select them.
    any: HashSet<IpAddr>,
}

impl Possible {
    fn new(uses: &BTreeMap<Holder, Arc<Use>>) -> Self {
        let mut possible = Possible::default();
        for (address, used) in uses.values().flat_map(|used| used.addresses.iter().map(move |a| (*a, used))) {
            if used.held {
                possible.any.insert(address);
            }
            possible.allocations.entry(address).or_default().extend(&used.allocations);
        }
        possible
    }

    fn contains(&self, source: IpAddr, allocation: EgressId) -> bool {
        self.any.contains(&source)
            || self.allocations.get(&source).is_some_and(|allocations| allocations.contains(&allocation))
    }
}
