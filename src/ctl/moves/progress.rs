//! Waits until moves are done, and tells of each step.

use super::movable::MovableIp;
use super::{MovedIp, Say};
use crate::cluster::Source;
use crate::ctl::output::count;
use crate::ctl::state::ClusterState;
use crate::model::selector::Name;
use anyhow::{Context, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::time::{Instant as Deadline, timeout_at};

/// A rebalance is over when nothing has moved for so long.
const QUIET: Duration = Duration::from_secs(3);

/// What is waited for.
pub(super) struct Progress {
    /// The egress IPs that move, with the node that held each at the beginning.
    from: BTreeMap<u16, String>,
    goal: Goal,
}

enum Goal {
    /// All are on this node.
    To(String),
    /// None is on this node.
    AwayFrom(String),
    /// The gateway's egress IPs no longer move.
    Even,
}

impl Progress {
    pub(super) fn of_move(ip: &MovableIp, to: &str) -> Self {
        Progress { from: from(std::slice::from_ref(ip)), goal: Goal::To(to.to_owned()) }
    }

    pub(super) fn of_drain(movable: &[MovableIp], node: &str) -> Self {
        Progress { from: from(movable), goal: Goal::AwayFrom(node.to_owned()) }
    }

    pub(super) fn of_rebalance(state: &ClusterState, gateway: &str) -> Self {
        let movable: Vec<MovableIp> = MovableIp::all(state).into_iter().filter(|ip| *ip.gateway == *gateway).collect();
        Progress { from: from(&movable), goal: Goal::Even }
    }

    /// Whether this egress IP is where it should be.
    fn has_arrived(&self, ip: &MovableIp) -> bool {
        let holder = match ip.held_by.as_slice() {
            [one] => Some(one.as_str()),
            _ => None,
        };
        let is_settled = holder.is_some() && ip.node.as_deref() == holder && ip.leaving.is_none();
        match &self.goal {
            Goal::To(to) => is_settled && holder == Some(to),
            Goal::AwayFrom(node) => is_settled && holder != Some(node),
            Goal::Even => is_settled,
        }
    }
}

fn from(movable: &[MovableIp]) -> BTreeMap<u16, String> {
    let holder = |ip: &MovableIp| ip.held_by.first().cloned().or_else(|| ip.node.as_deref().map(str::to_owned));
    movable.iter().map(|ip| (ip.id, holder(ip).unwrap_or_else(|| "no node".to_owned()))).collect()
}

/// Waits until everything has arrived. Returns what has moved.
///
/// # Errors
/// It has not arrived within `patience`; the text says what is missing.
pub(super) async fn wait(
    open: &mut Source,
    progress: Progress,
    patience: Duration,
    say: Say<'_>,
) -> anyhow::Result<Vec<MovedIp>> {
    let (begun, deadline) = (Instant::now(), Deadline::now() + patience);
    let mut moved: BTreeMap<u16, MovedIp> = BTreeMap::new();
    let mut assigned: BTreeSet<(u16, Name)> = BTreeSet::new();
    let mut quiet_since = Instant::now();
    loop {
        open.snapshots.borrow_and_update();
        let movable = MovableIp::all(&ClusterState::of(open));
        let mut missing = Vec::new();
        for ip in movable.iter().filter(|ip| progress.from.contains_key(&ip.id)) {
            let was = &progress.from[&ip.id];
            if let Some(node) = ip.node.clone().filter(|node| **node != **was && ip.leaving.is_some())
                && assigned.insert((ip.id, node.clone()))
            {
                quiet_since = Instant::now();
                say(&format!("{}: moving from {was} to {node}", ip.egress_ip));
            }
            if !progress.has_arrived(ip) {
                missing.push(ip);
            } else if let Some(to) = ip.held_by.first().filter(|to| *to != was && !moved.contains_key(&ip.id)) {
                let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                quiet_since = Instant::now();
                say(&format!("{}: node {to} holds it, after {milliseconds} ms", ip.egress_ip));
                let (egress_ip, from, to) = (ip.egress_ip.clone(), was.clone(), to.clone());
                moved.insert(ip.id, MovedIp { egress_ip, from, to, milliseconds });
            }
        }
        let is_even = matches!(progress.goal, Goal::Even);
        if missing.is_empty() && (!is_even || quiet_since.elapsed() >= QUIET) {
            return Ok(moved.into_values().collect());
        }
        let until = if is_even { deadline.min(Deadline::now() + QUIET) } else { deadline };
        match timeout_at(until, open.snapshots.changed()).await {
            Ok(changed) => changed.context("the source of cluster state has ended")?,
            Err(_) if Deadline::now() < deadline => {}
            Err(_) => match missing.first() {
                None => return Ok(moved.into_values().collect()),
                Some(first) => bail!(
                    "{} not moved within {} s, {} among them, which is assigned to {} and held by {}; `kubectl egret \
                     status` names what is wrong",
                    count(missing.len(), "egress IP has", "egress IPs have"),
                    patience.as_secs(),
                    first.egress_ip,
                    first.node.as_deref().unwrap_or("no node"),
                    if first.held_by.is_empty() { "no node".to_owned() } else { first.held_by.join(", ") }
                ),
            },
        }
    }
}
