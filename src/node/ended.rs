//! Connections whose pod or policy has ended while the kernel still tracks them.
//!
//! A tracked connection keeps the allocation with which it began. If its entry stayed, the next pod with the same
//! address would use that allocation, or the node's address, and a pod would keep an allocation that its policies no
//! longer give.

use super::changed_ports::Replicas;
use super::pods::{PodId, Pods, Use};
use crate::model::marks::{EgressId, Marks};
use crate::model::networks::Networks;
use crate::model::shared::Shared;
use anyhow::Result;
use egret_nft::conntrack::{self, Connection, EntryAction, MarkFilter};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// The connections whose entries are to be deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndedConnections {
    /// All connections of these addresses, whose pods are gone.
    pub addresses: BTreeSet<IpAddr>,
    /// The connections of these addresses with destinations outside the cluster. Their pods were in quarantine and
    /// cannot have begun them.
    pub quarantined: BTreeSet<IpAddr>,
    /// All connections that the present pods cannot have begun. It is unknown what they used before this daemon
    /// started.
    pub of_earlier: bool,
    /// All connections whose marks have this upper half, which an earlier daemon used.
    pub of_base: Option<u16>,
    /// The connections of these addresses on these allocations.
    allocations: BTreeMap<IpAddr, BTreeSet<EgressId>>,
}

/// What the daemon knows of the node and uses to classify connections.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    pub marks: Marks,
    /// The cluster's networks.
    pub networks: Shared<Networks>,
    /// The networks of this node's pods.
    pub of_pods: Box<[IpNetwork]>,
    /// Addresses that a pod or the node has now.
    pub in_use: HashSet<IpAddr>,
}

impl EndedConnections {
    /// Adds the allocations that pods could use before and can no longer use.
    pub fn uses(&mut self, before: &BTreeMap<PodId, Arc<Use>>, now: &BTreeMap<PodId, Arc<Use>>, pods: &Pods) {
        let none = BTreeSet::new();
        for (pod_id, old) in before {
            let new = now.get(pod_id);
            // A removed pod's connections were added at its removal. Another pod may have its address by now.
            if new.is_some_and(|new| Arc::ptr_eq(old, new)) || !pods.has(pod_id) {
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
        *self == EndedConnections::default()
    }

    /// Deletes the entries from the kernel's table. After an error it keeps them for the next call.
    pub async fn delete(&mut self, uses: &BTreeMap<PodId, Arc<Use>>, context: ConnectionContext) {
        let ended = self.clone();
        let possible = self.of_earlier.then(|| Possible::new(uses));
        // A large table takes long, and the endpoint for metrics and health must respond meanwhile.
        let deleted = tokio::task::spawn_blocking(move || ended.delete_entries(&context, possible.as_ref()));
        match deleted.await {
            Ok(Ok(n)) => {
                if n > 0 {
                    tracing::info!(entries = n, "deleted connections of removed pods or allocations");
                }
                *self = EndedConnections::default();
            }
            Ok(Err(e)) => tracing::error!("the connection table cannot be cleaned: {e:#}"),
            Err(e) => tracing::error!("the connection table cannot be cleaned: {e}"),
        }
    }

    fn delete_entries(&self, context: &ConnectionContext, possible: Option<&Possible>) -> Result<usize> {
        let marks = context.marks;
        let ours = MarkFilter { mark: marks.connection(0), mask: marks.connection_kind_mask() };
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let mut deleted = 0;
        if possible.is_some() || !self.allocations.is_empty() {
            deleted += conntrack::delete(&mut socket, ours, |c| {
                let allocation = (c.mark & marks.egress_id_mask()) as EgressId;
                possible.is_some_and(|possible| !possible.contains(c.source, allocation))
                    || self.allocations.get(&c.source).is_some_and(|p| p.contains(&allocation))
            })?;
        }
        if possible.is_some() {
            let gone = |a: &IpAddr| context.of_pods.iter().any(|n| n.contains(*a)) && !context.in_use.contains(a);
            let all = MarkFilter { mark: 0, mask: 0 };
            deleted += conntrack::delete(&mut socket, all, |c| gone(&c.source) || gone(&c.reply_source))?;
        }
        if let Some(base) = self.of_base {
            let marked = MarkFilter { mark: u32::from(base) << 16, mask: marks.connection_mask() };
            deleted += conntrack::delete(&mut socket, marked, |_| true)?;
        }
        deleted += conntrack::delete_by_address(&mut socket, &self.addresses, |_| true)?;
        let is_outside = |c: &Connection| !ours.matches(c) && !context.networks.is_direct(c.reply_source);
        deleted += conntrack::delete_by_address(&mut socket, &self.quarantined, is_outside)?;
        Ok(deleted)
    }
}

/// Deletes stale connections, which are translated to another address than their allocation's, in the background.
/// Each of their packets is dropped and extends their lifetime, so they would not expire. Connections of this node's
/// pods on `local` allocations keep a changed port.
pub fn delete_stale(marks: Marks, local: BTreeSet<EgressId>, replicas: Arc<Replicas>) {
    let stale =
        MarkFilter { mark: marks.stale(), mask: marks.connection_of_allocation_mask() | marks.egress_id_mask() };
    in_background("deleted or replaced connections that are older than their allocations", move |socket| {
        let deleted = conntrack::update_entries(socket, stale, |c| {
            let replacement =
                c.out.and_then(|out| local.iter().find_map(|id| replicas.translation_of(&out, marks.connection(*id))));
            replacement.map_or(EntryAction::Delete, |replacement| EntryAction::Replace(replacement, None))
        })?;
        Ok(deleted)
    });
}

/// Runs `clean` on connection tracking in the background, because the table may be large. Logs `what` with the number
/// of entries.
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

/// The connections that the present pods can have begun.
#[derive(Debug, Default)]
struct Possible {
    /// For each address, its allocations.
    allocations: HashMap<IpAddr, BTreeSet<EgressId>>,
    /// Addresses of isolated pods, whose policies are unknown: any allocation is possible.
    any: HashSet<IpAddr>,
}

impl Possible {
    fn new(uses: &BTreeMap<PodId, Arc<Use>>) -> Self {
        let mut possible = Possible::default();
        for (address, used) in uses.values().flat_map(|used| used.addresses.iter().map(move |a| (*a, used))) {
            if used.isolated {
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
