//! Waits until moves are done, and tells of each step.

use super::place::Place;
use super::{MovedIp, Say};
use crate::cluster::Source;
use crate::ctl::output::count;
use crate::ctl::state::State;
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
    pub(super) fn of_move(place: &Place, to: &str) -> Self {
        Progress { from: from(std::slice::from_ref(place)), goal: Goal::To(to.to_owned()) }
    }

    pub(super) fn of_drain(places: &[Place], node: &str) -> Self {
        Progress { from: from(places), goal: Goal::AwayFrom(node.to_owned()) }
    }

    pub(super) fn of_rebalance(state: &State, gateway: &str) -> Self {
        let places: Vec<Place> = Place::all(state).into_iter().filter(|place| *place.gateway == *gateway).collect();
        Progress { from: from(&places), goal: Goal::Even }
    }

    /// Whether this egress IP is where it should be.
    fn has_arrived(&self, place: &Place) -> bool {
        let holder = match place.held_by.as_slice() {
            [one] => Some(one.as_str()),
            _ => None,
        };
        let is_settled = holder.is_some() && place.node.as_deref() == holder && place.leaving.is_none();
        match &self.goal {
            Goal::To(to) => is_settled && holder == Some(to),
            Goal::AwayFrom(node) => is_settled && holder != Some(node),
            Goal::Even => is_settled,
        }
    }
}

fn from(places: &[Place]) -> BTreeMap<u16, String> {
    let holder = |place: &Place| place.held_by.first().cloned().or_else(|| place.node.as_deref().map(str::to_owned));
    places.iter().map(|place| (place.id, holder(place).unwrap_or_else(|| "no node".to_owned()))).collect()
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
        let places = Place::all(&State::of(open));
        let mut missing = Vec::new();
        for place in places.iter().filter(|place| progress.from.contains_key(&place.id)) {
            let was = &progress.from[&place.id];
            if let Some(node) = place.node.clone().filter(|node| **node != **was && place.leaving.is_some())
                && assigned.insert((place.id, node.clone()))
            {
                quiet_since = Instant::now();
                say(&format!("{}: moving from {was} to {node}", place.egress_ip));
            }
            if !progress.has_arrived(place) {
                missing.push(place);
            } else if let Some(to) = place.held_by.first().filter(|to| *to != was && !moved.contains_key(&place.id)) {
                let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                quiet_since = Instant::now();
                say(&format!("{}: node {to} holds it, after {milliseconds} ms", place.egress_ip));
                let (egress_ip, from, to) = (place.egress_ip.clone(), was.clone(), to.clone());
                moved.insert(place.id, MovedIp { egress_ip, from, to, milliseconds });
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
