//! The cooldown of ids and addresses that were given back.
//!
//! An id cools down so that a node that has not heard yet sends nobody's traffic by an allocation that is another's by now: the
//! id travels with the packet, and the owner knows the old one no more. For the same reason an address may be given at
//! once to a policy that names it, under another id. From the pool it is given later: servers may still take it for
//! the policy that had it.

use super::family::addresses;
use crate::api::{AddressPair, EgressGatewayStatus, PolicyKey, ReleasedAllocation, Users};
use crate::model::Gateway;
use jiff::Timestamp;
use std::collections::HashMap;
use std::net::IpAddr;

/// How long an id or an address that was given back is kept from others.
pub const COOLDOWN_SECONDS: i64 = 600;

/// What a gateway was given back and still rests, and since when.
pub(super) fn in_cooldown(status: &EgressGatewayStatus, now: i64) -> impl Iterator<Item = (&ReleasedAllocation, i64)> {
    // A time to come is another clock's; nothing rests for longer than it should.
    let since = move |released: &ReleasedAllocation| released.at.min(now);
    status.released.iter().map(move |r| (r, since(r))).filter(move |(_, at)| at.saturating_add(COOLDOWN_SECONDS) > now)
}

/// Until when the gateway's annotation ends the cooldown of addresses, seconds since the Unix epoch; what it says, if
/// that is no time.
pub(super) fn cooldown_ended_until(gateway: &Gateway) -> Result<i64, &str> {
    match &gateway.end_cooldown {
        None => Ok(i64::MIN),
        Some(text) => text.parse::<Timestamp>().map(Timestamp::as_second).map_err(|_| text.as_str()),
    }
}

/// What was given back.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The gateway's place.
    pub(super) gateway: usize,
    pub(super) id: u16,
    pub(super) address: AddressPair,
    /// Who had it, by name; some of them are gone.
    pub(super) policies: Users,
    /// When.
    pub(super) at: i64,
    /// Whether a person has ended the cooldown of its addresses.
    pub(super) ended: bool,
    /// Those who had it and are there, by seniority, sorted.
    had_by: Vec<usize>,
}

impl Entry {
    /// Whether one of these policies had it; such may have it again.
    fn was_of(&self, policies: &[usize]) -> bool {
        policies.iter().any(|p| self.had_by.binary_search(p).is_ok())
    }
}

/// All that rests.
#[derive(Clone, Debug, Default)]
pub(super) struct Cooldowns {
    pub(super) entries: Vec<Entry>,
    by_address: HashMap<IpAddr, Vec<usize>>,
    by_policy: HashMap<(usize, usize), Vec<usize>>,
    by_id: HashMap<u16, Vec<usize>>,
}

impl Cooldowns {
    /// Adds what a gateway's policies gave back. `places` are the policies that still exist.
    pub(super) fn add(
        &mut self,
        gateway: usize,
        id: u16,
        address: AddressPair,
        policies: Users,
        (at, ended): (i64, bool),
        places: &HashMap<&PolicyKey, usize>,
    ) {
        let entry = self.entries.len();
        let mut had_by: Vec<usize> = policies.iter().filter_map(|name| places.get(name).copied()).collect();
        had_by.sort_unstable();
        for policy in &had_by {
            self.by_policy.entry((gateway, *policy)).or_default().push(entry);
        }
        for address in addresses(&address) {
            self.by_address.entry(address).or_default().push(entry);
        }
        self.by_id.entry(id).or_default().push(entry);
        self.entries.push(Entry { gateway, id, address, policies, at, ended, had_by });
    }

    /// Until when an address is kept from these policies; `None` if it is not.
    pub(super) fn until(&self, address: IpAddr, policies: &[usize]) -> Option<i64> {
        let entries = self.by_address.get(&address).into_iter().flatten().map(|e| &self.entries[*e]);
        entries.filter(|e| !e.ended && !e.was_of(policies)).map(|e| e.at + COOLDOWN_SECONDS).max()
    }

    /// Whether an id is kept from these policies: an allocation that changes its addresses one by one leaves its id behind
    /// more than once, and not always for the same policies.
    pub(super) fn keeps_id(&self, id: u16, policies: &[usize]) -> bool {
        self.by_id.get(&id).into_iter().flatten().any(|e| !self.entries[*e].was_of(policies))
    }

    /// What these policies gave back to the gateway, the latest first.
    pub(super) fn of(&self, gateway: usize, policies: &[usize]) -> Vec<&Entry> {
        let places = policies.iter().filter_map(|p| self.by_policy.get(&(gateway, *p))).flatten();
        let mut entries: Vec<&Entry> = places.map(|e| &self.entries[*e]).collect();
        entries.sort_by_key(|e| (std::cmp::Reverse(e.at), e.id, e.address.ipv4, e.address.ipv6));
        entries
    }

    /// Whether any policy gave it back a short while ago.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.by_address.get(&address).into_iter().flatten().any(|e| !self.entries[*e].ended)
    }
}
